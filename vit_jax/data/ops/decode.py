"""Ops that decode images. Images that are decoded already pass through unchanged.

Sources mark the JPEG files that need more than decoding (`data.images.MARK`): a photograph that the
camera stored rotated is turned upright, and a file without a proper end is decoded completely even
if only a crop is needed.
"""

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.images import CUT_SHORT, MARK
from vit_jax.data.ops import image_op, random_image_op
from vit_jax.data.ops.geometry import crop_to, crop_window, resize

# Wraps computations that few images need into one node of the graph: branches of many nodes would
# cost every image some microseconds for each node, even when they are not taken.
_apart = tf.function(autograph=False, experimental_attributes={"_noinline": True})


def encoded(image: tf.Tensor) -> bool:
    """Returns whether an image is still encoded."""
    return image.dtype == tf.string


@image_op
def decode(image: tf.Tensor, channels: int = 3, precise: bool = False) -> tf.Tensor:
    """Decodes JPEG, PNG, GIF (first frame), BMP or WebP bytes to uint8 `[h, w, channels]`.

    `precise` decodes JPEG with the slower, exact cosine transform (PIL's). The default is the
    transform with which most published models were trained.
    """
    if not encoded(image):
        return image

    def of_any_kind() -> tf.Tensor:
        if channels == 1:
            return tf.cond(tf.io.is_jpeg(image), lambda: _gray_jpeg(image), of_other_kinds)
        return of_other_kinds()

    def of_other_kinds() -> tf.Tensor:
        return tf.io.decode_image(image, channels=channels, expand_animations=False)

    def of_jpeg() -> tf.Tensor:
        if channels == 1:
            return _gray_jpeg(image, "INTEGER_ACCURATE")
        return tf.image.decode_jpeg(image, channels=channels, dct_method="INTEGER_ACCURATE")

    pixels = tf.cond(tf.io.is_jpeg(image), of_jpeg, of_any_kind) if precise else of_any_kind()
    pixels = tf.ensure_shape(pixels, [None, None, channels])
    return tf.cond(_is_marked(image), lambda: _turned(pixels, _mark(image)), lambda: pixels)


@random_image_op
def decode_jpeg_and_inception_crop(
    image: tf.Tensor,
    seed: tf.Tensor,
    size: int | tuple[int, int] | None = None,
    area_min: float = 5,
    area_max: float = 100,
    *,
    ratio_min: float = 0.75,
    ratio_max: float = 1.33,
    method: str = "bilinear",
    antialias: bool = False,
    sampler: str = "tensorflow",
) -> tf.Tensor:
    """Combines `decode` and `inception_crop`: decodes only the rows of a JPEG in the crop."""
    bounds = (area_min, area_max), (ratio_min, ratio_max), sampler

    def fused() -> tf.Tensor:
        window = crop_window(tf.io.extract_jpeg_shape(image), seed, *bounds)
        return tf.image.decode_and_crop_jpeg(image, window, channels=3)

    def separate() -> tf.Tensor:
        pixels = decode(image)
        return crop_to(pixels, crop_window(tf.shape(pixels), seed, *bounds))

    def unmarked() -> tf.Tensor:
        return tf.cond(tf.io.is_jpeg(image), fused, separate)

    def marked() -> tf.Tensor:
        return _marked_crop(image, seed, *bounds)

    crop = tf.cond(_is_marked(image), marked, unmarked) if encoded(image) else separate()
    return crop if size is None else resize(crop, size, method, antialias)


def _is_marked(image: tf.Tensor) -> tf.Tensor:
    return tf.strings.substr(image, 2, len(MARK)) == MARK


def _mark(image: tf.Tensor) -> tf.Tensor:
    """Returns the value of the mark in encoded bytes: an int32 scalar."""
    byte = tf.strings.substr(image, 2 + len(MARK), 1)
    return tf.cast(tf.io.decode_raw(byte, tf.uint8, fixed_length=1)[0], tf.int32)


@_apart
def _gray_jpeg(image: tf.Tensor, method: str = "") -> tf.Tensor:
    """Decodes a JPEG to uint8 `[h, w, 1]`. TensorFlow itself cannot do so with four inks (CMYK)."""

    def of_inks() -> tf.Tensor:
        return tf.image.rgb_to_grayscale(tf.image.decode_jpeg(image, channels=3, dct_method=method))

    def of_light() -> tf.Tensor:
        return tf.image.decode_jpeg(image, channels=1, dct_method=method)

    return tf.cond(tf.io.extract_jpeg_shape(image)[2] == 4, of_inks, of_light)


@_apart
def _marked_crop(
    image: tf.Tensor,
    seed: tf.Tensor,
    area_percent: tuple[float, float],
    ratios: tuple[float, float],
    sampler: str,
) -> tf.Tensor:
    """Returns a random crop of a marked JPEG.

    The window is drawn in the upright image and decoded from the stored image.
    """
    mark = _mark(image)
    swapped, of_rows, of_columns = _turn(mark)
    stored = tf.io.extract_jpeg_shape(image)
    upright = tf.where(swapped, tf.gather(stored, [1, 0, 2]), stored)
    top, left, height, width = tf.unstack(crop_window(upright, seed, area_percent, ratios, sampler))
    top = tf.where(of_rows, upright[0] - top - height, top)
    left = tf.where(of_columns, upright[1] - left - width, left)
    window = tf.where(swapped, [left, top, width, height], [top, left, height, width])
    whole = tf.cond(
        mark >= CUT_SHORT,
        # Fails if rows are missing, even if the crop does not contain them.
        lambda: tf.size(tf.image.decode_jpeg(image, channels=3)),
        lambda: 0,
    )
    with tf.control_dependencies([whole]):
        return _turned(tf.image.decode_and_crop_jpeg(image, window, channels=3), mark)


@_apart
def _turned(pixels: tf.Tensor, mark: tf.Tensor) -> tf.Tensor:
    """Turns pixels `[h, w, c]` upright, according to the orientation in a mark."""
    swapped, of_rows, of_columns = _turn(mark)
    x = tf.cond(swapped, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    x = tf.cond(of_rows, lambda: tf.reverse(x, [0]), lambda: x)
    x = tf.cond(of_columns, lambda: tf.reverse(x, [1]), lambda: x)
    return tf.ensure_shape(x, [None, None, pixels.shape[-1]])


def _turn(mark: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns whether to swap rows and columns, then to reverse rows, and to reverse columns."""
    orientation = mark % CUT_SHORT
    kind = (orientation - 1) % 4
    return orientation > 4, kind >= 2, (kind == 1) | (kind == 2)
