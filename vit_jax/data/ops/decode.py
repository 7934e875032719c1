"""From encoded bytes to pixels. Images that are decoded already pass through unchanged."""

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import image_op, random_image_op
from vit_jax.data.ops.geometry import crop_to, crop_window, resize


def encoded(image: tf.Tensor) -> bool:
    return image.dtype == tf.string


@image_op
def decode(image: tf.Tensor, channels: int = 3, precise: bool = False) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame), BMP or WebP bytes to uint8 `[h, w, channels]`.

    `precise` decodes JPEG with the slower, exact cosine transform (PIL's); the default is the one
    most published models were trained with.
    """
    if not encoded(image):
        return image

    def of_any_kind() -> tf.Tensor:
        return tf.io.decode_image(image, channels=channels, expand_animations=False)

    def of_jpeg() -> tf.Tensor:
        return tf.image.decode_jpeg(image, channels=channels, dct_method="INTEGER_ACCURATE")

    pixels = tf.cond(tf.io.is_jpeg(image), of_jpeg, of_any_kind) if precise else of_any_kind()
    return tf.ensure_shape(pixels, [None, None, channels])


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
) -> tf.Tensor:
    """`decode` and `inception_crop` in one: of a JPEG only the rows of the crop are decoded."""
    area_percent, ratios = (area_min, area_max), (ratio_min, ratio_max)

    def fused() -> tf.Tensor:
        window = crop_window(tf.io.extract_jpeg_shape(image), seed, area_percent, ratios)
        return tf.image.decode_and_crop_jpeg(image, window, channels=3)

    def separate() -> tf.Tensor:
        pixels = decode(image)
        return crop_to(pixels, crop_window(tf.shape(pixels), seed, area_percent, ratios))

    crop = tf.cond(tf.io.is_jpeg(image), fused, separate) if encoded(image) else separate()
    return crop if size is None else resize(crop, size, method, antialias)
