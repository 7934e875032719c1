"""Boxes in records, in the form that every source returns.

A box is (y0, x0, y1, x1) in 0..1 of the unpadded image. Records have a fixed number of slots for
objects, because a batch is an array. Unused slots have the label -1 and boxes of zeros.

boxes      float32 [n, 4]
box_label  int32 [n], -1 for an unused slot
box_crowd  bool [n], True for a group of objects that are not annotated individually; it is neither
           counted nor used for training
box_area   float32 [n], the area in pixels of the original image; 0 means the area of the box
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError

BAD_BOX_CHOICES = ("fail", "clip", "drop")
TOLERANCE = 1e-3
"""The share of a side by which rounding may move a box outside the image; it is always clipped."""


class Objects(NamedTuple):
    """The objects of one image: boxes `[n, 4]`, label, crowd and area each `[n]`."""

    boxes: np.ndarray
    label: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


def check(
    objects: Objects,
    *,
    on_bad_box: str,
    describe: Callable[[], str],
    tolerance: tuple[float, float] = (TOLERANCE, TOLERANCE),
) -> Objects:
    """Returns the objects with valid boxes, clipped to the image.

    A box is bad if it extends outside the image by more than `tolerance`, has no area inside the
    image, or is not finite.

    Args:
      on_bad_box: "fail" raises an error; "clip" clips boxes to the image and removes those of which
        nothing remains; "drop" removes every bad box, which is then treated as background.
      describe: returns the name of the record, for an error.
      tolerance: the tolerance as a share of the height and of the width.

    Raises:
      UserError: a box is bad, and `on_bad_box` is "fail"; or a label is negative, which means an
        unused slot.
    """
    labels = np.asarray(objects.label)
    if (labels < 0).any():
        number = int(np.argmax(labels < 0))
        raise UserError(
            f"{describe()}: object {number} has the label {labels[number]}; write 0 or more"
        )
    boxes = np.asarray(objects.boxes, np.float64).reshape(-1, 4)
    reach = np.tile(np.maximum(tolerance, TOLERANCE), 2)
    cut = np.clip(boxes, 0, 1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(boxes).all(1) & (cut[:, 2] > cut[:, 0]) & (cut[:, 3] > cut[:, 1])
        good = usable & ((boxes >= -reach) & (boxes <= 1 + reach)).all(1)
    if not good.all() and on_bad_box == "fail":
        number = int(np.argmin(good))
        values = ", ".join(f"{value:.4g}" for value in boxes[number])
        raise UserError(
            f"{describe()}: object {number} has the box ({values}); (y0, x0, y1, x1) in 0..1 with"
            " y0 < y1 and x0 < x1 is wanted (config.data.args.on_bad_box='clip' cuts boxes to the"
            " image, 'drop' leaves bad ones out)"
        )
    kept = usable if on_bad_box == "clip" else good
    return Objects(cut[kept], *(np.asarray(field)[kept] for field in objects[1:]))


def pack(
    images: Sequence[Objects], max_objects: int, describe: Callable[[int], str]
) -> dict[str, np.ndarray]:
    """Returns records with the objects of `images`, with `max_objects` slots in each.

    describe: returns the name of the i-th image, for an error.

    Raises:
      UserError: an image has more objects.
    """
    shape = (len(images), max_objects)
    records = {
        "boxes": np.zeros((*shape, 4), np.float32),
        "box_label": np.full(shape, -1, np.int32),
        "box_crowd": np.zeros(shape, bool),
        "box_area": np.zeros(shape, np.float32),
    }
    for row, objects in enumerate(images):
        count = len(objects.boxes)
        if count > max_objects:
            raise UserError(
                f"{describe(row)} has {count} objects, more than config.data.args.max_objects="
                f"{max_objects}; write {count} or more"
            )
        for field, values in zip(records.values(), objects, strict=True):
            field[row, :count] = values
    return records


def check_choice(on_bad_box: str) -> None:
    """Raises `UserError` unless `on_bad_box` is one of `BAD_BOX_CHOICES`."""
    if on_bad_box not in BAD_BOX_CHOICES:
        raise UserError(f"on_bad_box={on_bad_box!r}; write {', '.join(BAD_BOX_CHOICES)}")
