"""Ops that move an image together with its segmentation and its boxes, whichever it has.

`image` is `[h, w, c]`, `segmentation` uint8 `[h, w, 1]` with 255 where nothing is labelled, and
boxes are as `vit_jax.data.boxes` describes them. Images are resized bilinearly, segmentations by
the nearest pixel. What is padded is `fill` in the image and 255 in the segmentation.
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
    """Decodes `image` and `segmentation`, and notes `image_size`, int32 (height, width) in pixels.

    An image of another size than its segmentation, or than `listed_size` says (height and width;
    0 for unknown), fails, as a truncated file does.
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
    """Fails where a pixel is neither one of the classes nor 255."""
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
    """Adds `by` to every label of the segmentation but 255; what falls below 0 becomes 255.

    `shift_labels(-1)` makes ADE20K's "other" (0) ignored, and the trimaps of Oxford-IIIT Pets
    (1, 2, 3) start at 0.
    """
    values = tf.cast(_segmentation(record), tf.int32)
    shifted = tf.where(values == IGNORED, IGNORED, values + by)
    shifted = tf.where((shifted < 0) | (shifted > IGNORED), IGNORED, shifted)
    return record | {"segmentation": tf.cast(shifted, tf.uint8)}


@record_op
def map_labels(record: Record, *table: int) -> Record:
    """Label i of the segmentation becomes `table[i]`; labels beyond the table become 255."""
    padded = [*table, *[IGNORED] * (256 - len(table))]
    values = tf.cast(_segmentation(record), tf.int32)
    return record | {"segmentation": tf.cast(tf.gather(padded, values), tf.uint8)}


@random_record_op
def joint_flip_lr(record: Record, seed: tf.Tensor) -> Record:
    """Mirrors every second image, left to right."""
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
    """Resizes to exactly `size`, changing the aspect ratio if it must."""
    return _resized(record, tf.constant(_pair(size)), antialias, _pair(size))


@record_op
def joint_resize_small(record: Record, smaller_size: int, antialias: bool = False) -> Record:
    """Resizes so that the shorter side is `smaller_size`, keeping the aspect ratio."""
    sides = _sides(record)
    ratio = smaller_size / tf.reduce_min(sides)
    return _resized(record, scaled_size(sides, ratio), antialias)


@random_record_op
def joint_scale(
    record: Record, seed: tf.Tensor, low: float = 0.5, high: float = 2.0, antialias: bool = False
) -> Record:
    """Enlarges or reduces by a factor drawn uniformly between `low` and `high`."""
    factor = tf.random.stateless_uniform([], seed, low, high)
    size = tf.maximum(1, tf.cast(tf.round(_sides(record) * factor), tf.int32))
    return _resized(record, size, antialias)


@random_record_op
def joint_crop(
    record: Record, seed: tf.Tensor, size: Size, min_visible: float = 0.25, fill: int = GREY
) -> Record:
    """A window of `size` anywhere in the image, which is padded where it is smaller.

    Boxes are cut at the window's border; an object of which less than `min_visible` of its box
    remains is left out.
    """
    _refuse_padded(record)
    wanted = tf.constant(_pair(size))
    record = _padded(record, tf.maximum(wanted, tf.shape(record["image"])[:2]), fill)
    height, width = tf.unstack(tf.shape(record["image"])[:2])
    slack = tf.stack([height, width]) - wanted
    draws = tf.random.stateless_uniform([2], seed)
    start = tf.minimum(tf.cast(draws * tf.cast(slack + 1, tf.float32), tf.int32), slack)
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


@record_op
def joint_fit(record: Record, size: Size, antialias: bool = False, fill: int = GREY) -> Record:
    """Resizes to fit into `size`, keeping the aspect ratio, and pads below and at the right.

    Boxes stay those of the image without its padding; `content`, float32 (height, width) in 0..1,
    says how much of the result is image. To be the last of the ops that move pixels.
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
    """The record with padding below and at the right; boxes are then those of the whole."""
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
    """Boxes within 0..1, those that are hardly seen left out."""
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
