"""Boxes in records, in the form in which every source hands them over.

A box is (y0, x0, y1, x1) in 0..1 of the unpadded image. Records have room for a fixed number of
objects, because a batch is an array; the room that is left has label -1 and boxes of zeros.

boxes      float32 [n, 4]
box_label  int32 [n], -1 for "no object here"
box_crowd  bool [n], a group that is not taken apart: not counted, and not learned from
box_area   float32 [n], pixels covered in the original image; 0 for those of the box
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError

BAD_BOX_CHOICES = ("fail", "clip", "drop")
TOLERANCE = 1e-3
"""The share of a side by which rounding may put a box outside the image; it is always cut back."""


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
    """Returns the objects whose boxes can be used, cut to the image.

    A box is bad if it reaches outside the image by more than `tolerance`, or has no area inside the
    image, or is not finite.

    Args:
      on_bad_box: "fail"; "clip" to cut boxes to the image, and leave out those of which nothing
        remains; or "drop" to leave out every bad box, which is then learned as background.
      describe: names the record in an error.
      tolerance: of the height and of the width, as shares of them.

    Raises:
      UserError: a bad box, with "fail".
    """
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
    """Returns records with the objects of `images`, with room for `max_objects` in each.

    describe: names the i-th image in an error.

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
    """Raises `UserError` unless it is one of `BAD_BOX_CHOICES`."""
    if on_bad_box not in BAD_BOX_CHOICES:
        raise UserError(f"on_bad_box={on_bad_box!r}; write {', '.join(BAD_BOX_CHOICES)}")
