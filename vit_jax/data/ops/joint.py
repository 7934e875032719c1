"""Ops that transform an image together with its segmentation and its boxes, if it has them.

`image` is `[h, w, c]`, `segmentation` is uint8 `[h, w, 1]` with 255 for unlabeled pixels, and boxes
have the form of `vit_jax.data.boxes`. Images are resized bilinearly, and segmentations by the
nearest pixel. Padding is `fill` in the image and 255 in the segmentation.
"""

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import MissingField, random_record_op, record_op
from vit_jax.data.ops.decode import decode
from vit_jax.data.ops.geometry import Size, _pair, scaled_size
from vit_jax.errors import UserError

Record = dict[str, tf.Tensor]
IGNORED = 255
GREY = 128


@record_op
def joint_decode(record: Record, channels: int = 3) -> Record:
    """Decodes `image` and `segmentation`, and adds `image_size`, int32 (height, width) in pixels.

    If the size of the image differs from that of its segmentation, or from `listed_size` (height
    and width; 0 for unknown), the op fails as it does for a truncated file.
    """
    image = decode(record["image"], channels)
    record = dict(record)
    if "listed_size" in record:
        image = _checked_size(image, record.pop("listed_size"))
    record |= {"image": image, "image_size": tf.shape(image)[:2]}
    if "segmentation" not in record:
        return record
    segmentation = decode(record["segmentation"], 1)
    sizes = tf.shape(image)[:2], tf.shape(segmentation)[:2]
    same = tf.debugging.Assert(
        tf.reduce_all(sizes[0] == sizes[1]),
        ["the segmentation is", sizes[1], "pixels but the image", sizes[0]],
    )
    with tf.control_dependencies([same]):
        return record | {"segmentation": tf.identity(segmentation)}


def _checked_size(image: tf.Tensor, listed: tf.Tensor) -> tf.Tensor:
    size = tf.shape(image)[:2]
    same = tf.debugging.Assert(
        tf.reduce_all((size == listed) | (listed == 0)),
        ["the boxes are for", listed, "pixels but the image is", size, "(turned by EXIF, perhaps)"],
    )
    with tf.control_dependencies([same]):
        return tf.identity(image)


@record_op
def check_segmentation(record: Record, num_classes: int) -> Record:
    """Fails if a pixel is neither one of the classes nor 255."""
    segmentation = _segmentation(record)
    values = tf.cast(segmentation, tf.int32)
    wrong = (values >= num_classes) & (values != IGNORED)
    worst = tf.reduce_max(tf.where(wrong, values, -1))
    valid = tf.debugging.Assert(
        worst < 0, ["the segmentation has the label", worst, f"but only {num_classes} classes"]
    )
    with tf.control_dependencies([valid]):
        return record | {"segmentation": tf.identity(segmentation)}


@record_op
def shift_labels(record: Record, by: int) -> Record:
    """Adds `by` to every label of the segmentation except 255; negative results become 255.

    `shift_labels(-1)` makes the label "other" (0) of ADE20K ignored, and makes the trimaps of
    Oxford-IIIT Pets (1, 2, 3) start at 0.
    """
    values = tf.cast(_segmentation(record), tf.int32)
    shifted = tf.where(values == IGNORED, IGNORED, values + by)
    shifted = tf.where((shifted < 0) | (shifted > IGNORED), IGNORED, shifted)
    return record | {"segmentation": tf.cast(shifted, tf.uint8)}


@record_op
def map_labels(record: Record, *table: int) -> Record:
    """Replaces label i of the segmentation by `table[i]`, and labels beyond the table by 255."""
    padded = [*table, *[IGNORED] * (256 - len(table))]
    values = tf.cast(_segmentation(record), tf.int32)
    return record | {"segmentation": tf.cast(tf.gather(padded, values), tf.uint8)}


@random_record_op
def joint_flip_lr(record: Record, seed: tf.Tensor) -> Record:
    """Mirrors the image left to right, with probability one half."""
    mirrored = tf.random.stateless_uniform([], seed) < 0.5
    changed = {}
    for key in _pictures(record):
        x = record[key]
        changed[key] = tf.ensure_shape(tf.where(mirrored, tf.image.flip_left_right(x), x), x.shape)
    if "boxes" in record:
        y0, x0, y1, x1 = tf.unstack(record["boxes"], axis=-1)
        flipped = tf.stack([y0, 1 - x1, y1, 1 - x0], axis=-1)
        real = (record["box_label"] >= 0)[:, None]
        changed["boxes"] = tf.where(mirrored & real, flipped, record["boxes"])
    return record | changed


@record_op
def joint_resize(record: Record, size: Size, antialias: bool = False) -> Record:
    """Resizes to exactly `size`, changing the aspect ratio if necessary."""
    return _resized(record, tf.constant(_pair(size)), antialias, _pair(size))


@record_op
def joint_resize_small(record: Record, smaller_size: int, antialias: bool = False) -> Record:
    """Resizes so that the shorter side is `smaller_size`, keeping the aspect ratio."""
    sides = _sides(record)
    ratio = smaller_size / tf.reduce_min(sides)
    return _resized(record, scaled_size(sides, ratio), antialias)


@random_record_op
def joint_scale(
    record: Record,
    seed: tf.Tensor,
    low: float = 0.5,
    high: float = 2.0,
    antialias: bool = False,
    *,
    shorter: int = 0,
) -> Record:
    """Enlarges or reduces by a factor drawn uniformly between `low` and `high`.

    shorter: the length of the shorter side at a factor of 1; 0 is that of the image. This is
        `joint_resize_small` before this op, with one interpolation instead of two.
    """
    factor = tf.random.stateless_uniform([], seed, low, high)
    if shorter:
        factor *= shorter / tf.reduce_min(_sides(record))
    return _resized(record, scaled_size(_sides(record), factor), antialias)


@random_record_op
def joint_crop(
    record: Record,
    seed: tf.Tensor,
    size: Size,
    min_visible: float = 0.25,
    fill: int = GREY,
    *,
    max_class_share: float = 1.0,
) -> Record:
    """Crops a random window of `size` from the image, which is padded where it is smaller.

    Boxes are clipped to the window. Objects with less than the share `min_visible` of their box
    inside the window are removed. A window in which one class has more than `max_class_share` of
    the labeled pixels is drawn again, up to ten times (mmsegmentation's `cat_max_ratio`).
    """
    _refuse_padded(record)
    wanted = tf.constant(_pair(size))
    record = _padded(record, tf.maximum(wanted, tf.shape(record["image"])[:2]), fill)
    height, width = tf.unstack(tf.shape(record["image"])[:2])
    slack = tf.stack([height, width]) - wanted
    tries = 1 if max_class_share >= 1 else 11
    draws = tf.random.stateless_uniform([tries, 2], seed)
    starts = tf.minimum(tf.cast(draws * tf.cast(slack + 1, tf.float32), tf.int32), slack)
    start = starts[0]
    if tries > 1:
        start = _first_mixed(_segmentation(record), starts, _pair(size), max_class_share)
    changed = {}
    for key in _pictures(record):
        part = tf.slice(record[key], [start[0], start[1], 0], [*_pair(size), -1])
        changed[key] = tf.ensure_shape(part, [*_pair(size), record[key].shape[-1]])
    if "boxes" in record:
        whole, window = (tf.cast(x, tf.float32) for x in ((height, width), wanted))
        corner = tf.tile(tf.cast(start, tf.float32), [2])
        moved = (record["boxes"] * tf.tile(whole, [2]) - corner) / tf.tile(window, [2])
        changed |= _cut_boxes(record, moved, min_visible)
    return record | changed


def _first_mixed(
    segmentation: tf.Tensor, starts: tf.Tensor, size: tuple[int, int], max_share: float
) -> tf.Tensor:
    """Returns the first of `starts` whose window no class fills beyond `max_share`, or the last."""

    def is_filled(number: tf.Tensor) -> tf.Tensor:
        start = starts[number]
        window = tf.slice(segmentation, [start[0], start[1], 0], [*size, 1])
        counts = tf.math.bincount(tf.cast(tf.reshape(window, [-1]), tf.int32), minlength=256)
        counts = tf.cast(counts[:IGNORED], tf.float32)
        return tf.reduce_max(counts) >= max_share * tf.reduce_sum(counts)

    last = starts.shape[0] - 1
    found = tf.while_loop(
        lambda number: (number < last) & is_filled(number), lambda number: [number + 1], [0]
    )
    return starts[found[0]]


@record_op
def joint_fit(record: Record, size: Size, antialias: bool = False, fill: int = GREY) -> Record:
    """Resizes to fit into `size`, keeping the aspect ratio, and pads below and at the right.

    Boxes still refer to the image without its padding. The field `content`, float32 (height, width)
    in 0..1, holds the share of the result that is image. This op must be the last of the ops that
    move pixels.
    """
    wanted = tf.cast(_pair(size), tf.float32)
    sides = _sides(record)
    ratio = tf.reduce_min(wanted / sides)
    inner = tf.cast(tf.round(sides * ratio), tf.int32)
    inner = tf.clip_by_value(inner, 1, tf.constant(_pair(size)))
    record = _resized(record, inner, antialias)
    changed = {}
    for key in _pictures(record):
        value = fill if key == "image" else IGNORED
        whole = _pad_to(record[key], tf.constant(_pair(size)), value)
        changed[key] = tf.ensure_shape(whole, [*_pair(size), record[key].shape[-1]])
    return record | changed | {"content": tf.cast(inner, tf.float32) / wanted}


def _segmentation(record: Record) -> tf.Tensor:
    if "segmentation" not in record:
        raise MissingField(
            "records have no field 'segmentation'; copy('theirs', 'segmentation') before this op"
            " gives another one that name"
        )
    return record["segmentation"]


def _pictures(record: Record) -> list[str]:
    return [key for key in ("image", "segmentation") if key in record]


def _sides(record: Record) -> tf.Tensor:
    return tf.cast(tf.shape(record["image"])[:2], tf.float32)


def _refuse_padded(record: Record) -> None:
    if "content" in record:
        raise UserError("the image is padded already; put joint_fit behind this op")


def _resized(
    record: Record, size: tf.Tensor, antialias: bool, static: tuple = (None, None)
) -> Record:
    _refuse_padded(record)
    changed = {}
    for key in _pictures(record):
        x = record[key]
        method = "bilinear" if key == "image" else "nearest"
        y = tf.image.resize(x, size, method=method, antialias=antialias and key == "image")
        y = tf.round(y) if x.dtype.is_integer and key == "image" else y
        changed[key] = tf.ensure_shape(tf.cast(y, x.dtype), [*static, x.shape[-1]])
    return record | changed


def _padded(record: Record, size: tf.Tensor, fill: int) -> Record:
    """Pads the record below and at the right; boxes then refer to the padded image."""
    sides = _sides(record)
    changed = {
        key: _pad_to(record[key], size, fill if key == "image" else IGNORED)
        for key in _pictures(record)
    }
    if "boxes" in record:
        changed["boxes"] = record["boxes"] * tf.tile(sides / tf.cast(size, tf.float32), [2])
    return record | changed


def _pad_to(x: tf.Tensor, size: tf.Tensor, value: int) -> tf.Tensor:
    height, width = tf.unstack(size - tf.shape(x)[:2])
    padding = tf.stack([[0, height], [0, width], [0, 0]])
    return tf.pad(x, padding, constant_values=tf.cast(value, x.dtype))


def _cut_boxes(record: Record, moved: tf.Tensor, min_visible: float) -> Record:
    """Clips boxes to 0..1 and removes those of which less than `min_visible` remains."""
    cut = tf.clip_by_value(moved, 0.0, 1.0)

    def area(boxes: tf.Tensor) -> tf.Tensor:
        return tf.reduce_prod(boxes[:, 2:] - boxes[:, :2], axis=-1)

    kept = (record["box_label"] >= 0) & (area(cut) > 0) & (area(cut) >= min_visible * area(moved))
    return {
        "boxes": tf.where(kept[:, None], cut, 0.0),
        "box_label": tf.where(kept, record["box_label"], -1),
        "box_crowd": record["box_crowd"] & kept,
        "box_area": tf.where(kept, record["box_area"], 0.0),
    }
