"""Detection datasets in the format of COCO: a JSON file of annotations and a folder of images.

    config.data.source = "coco"
    config.data.name = "annotations/instances_{split}.json"
    config.data.args = {"images": "photos"}
    config.eval.sets = {"val": {"split": "val"}}
    config.task = {"name": "detection"}

The source reads these parts of the JSON file: `images` (id, file_name, width, height), `categories`
(id, name), and `annotations` (image_id, category_id, bbox as [x, y, width, height] in pixels;
optionally area and iscrowd). Classes are the categories in ascending order of their ids. File names
are relative to the folder of images.
"""

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import boxes, files
from vit_jax.data.images import check_exif, for_decoding, read
from vit_jax.data.sources import Records
from vit_jax.data.sources import _coco_json as coco_json
from vit_jax.data.sources._splits import drawn_and_read, select_unlabeled, split_name
from vit_jax.errors import UserError

_SECTIONS: Mapping[str, coco_json.Kinds] = {
    "images": {
        "id": coco_json.ID,
        "file_name": str,
        "width": coco_json.NUMBER,
        "height": coco_json.NUMBER,
    },
    "categories": {"id": coco_json.ID, "name": str},
    "annotations": {"image_id": coco_json.ID, "category_id": coco_json.ID, "bbox": list},
}
_OPTIONAL = {"area": coco_json.NUMBER, "iscrowd": coco_json.FLAG}
_UNIQUE = (("images", "id"), ("images", "file_name"), ("categories", "id"), ("annotations", "id"))
# The number of pixels by which a box may extend outside the image: some tools count pixels from 1,
# or include both ends.
_TOLERANCE = 1.001
_MAX_SIDE = 2**31 - 1

logger = logging.getLogger(__name__)


class Source:
    """Reads images with their objects.

    Args:
      name: the JSON file; `{split}` in it, and in `images`, is replaced by the split.
      split: the split, with a range or a fold of its images in brackets, in the order of the file.
      images: the folder of the image files.
      max_objects: see `boxes.pack`.
      on_bad_box: see `boxes.check`. A box that extends up to one pixel outside the image is always
        clipped. A box that extends further fails by default, because it suggests that the boxes are
        not in the form of COCO.
      exif: "apply" turns photographs upright by their EXIF orientation, unless the width and height
        in the JSON are those of the image as stored. "ignore" never turns them, for boxes that were
        drawn on images as stored.
      split_seed: the seed of folds.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        images: str,
        max_objects: int = 100,
        on_bad_box: str = "fail",
        exif: str = "apply",
        split_seed: int = 0,
    ):
        boxes.check_choice(on_bad_box)
        check_exif(exif)
        part = split_name(split)
        path = files.expand(name.replace("{split}", part))
        self._folder = files.existing_folder(images.replace("{split}", part))
        self._exif = exif
        stored = coco_json.sections(path, files.read_text(path), _SECTIONS, "instances", _OPTIONAL)
        _check(stored, path, self._folder)
        categories = sorted(stored["categories"], key=lambda category: category["id"])
        self.class_names = tuple(str(category["name"]) for category in categories)
        self.num_classes = len(categories)
        labels = {category["id"]: i for i, category in enumerate(categories)}
        selected = select_unlabeled(split, len(stored["images"]), split_seed)
        self._images = [stored["images"][place] for place in selected]
        self._objects = _objects(stored, labels, path, on_bad_box)
        self._max_objects = max_objects
        self._empty = _as_objects([], [], [], [])
        largest = max(self._images, key=lambda image: len(self._of(image).boxes), default=None)
        if largest:  # Fail at the start, not when this image is read.
            name = files.shown(largest["file_name"])
            boxes.pack([self._of(largest)], max_objects, lambda _: name)
        self.fingerprint = f"coco:{path.name}:{split}:{len(self._images)}"
        self.fingerprint += drawn_and_read(split_seed, exif)

    def __len__(self) -> int:
        return len(self._images)

    def fetch(self, indices: np.ndarray) -> Records:
        found = np.empty(len(indices), object)
        sizes = [self._listed_size(self._images[index]) for index in indices]
        for row, index in enumerate(indices):
            data = read(self._folder / self._images[index]["file_name"])
            found[row] = for_decoding(data, self._exif, sizes[row])
        objects = [self._of(self._images[index]) for index in indices]
        packed = boxes.pack(objects, self._max_objects, lambda row: self.describe(indices[row]))
        return {"image": found, "listed_size": np.array(sizes, np.int32), **packed}

    def describe(self, index: int) -> str:
        return files.shown(self._folder / self._images[index]["file_name"])

    def _listed_size(self, image: dict) -> tuple[int, int]:
        """Returns the height and width to which the boxes refer; zeros if there are no boxes.

        `joint_decode` compares them with the image.
        """
        has_boxes = len(self._of(image).boxes)
        return (int(image["height"]), int(image["width"])) if has_boxes else (0, 0)

    def _of(self, image: dict) -> boxes.Objects:
        return self._objects.get(image["id"], self._empty)


def _check(stored: dict[str, list[dict]], path: Path, folder: Path) -> None:
    """Raises a `UserError` for ids and files that occur twice, and for files outside `folder`."""
    name = files.shown(path)
    if len({type(category["id"]) for category in stored["categories"]}) > 1:
        raise UserError(f"{name}: the ids of categories are numbers and texts; write all as one")
    for number, image in enumerate(stored["images"]):
        where = f"{name}: images[{number}]"
        image["file_name"] = files.path_inside(folder, image["file_name"], where)
    for section, key in _UNIQUE:
        coco_json.check_unique(path, stored, section, key)
    called = Counter(category["name"] for category in stored["categories"])
    if twice := [name for name, count in called.items() if count > 1]:
        logger.warning("%s: several categories are called %r", name, files.shown(twice[0]))


def _objects(
    stored: Mapping[str, list[dict]], labels: Mapping[Any, int], path: Path, on_bad_box: str
) -> dict[Any, boxes.Objects]:
    """Returns the checked objects of each image by the image's id, with boxes in 0..1."""
    images = {image["id"]: image for image in stored["images"]}
    of_image = defaultdict(list)
    for number, annotation in enumerate(stored["annotations"]):
        coco_json.check_listed(path, number, "image", annotation["image_id"], images)
        coco_json.check_listed(path, number, "category", annotation["category_id"], labels)
        box = annotation["bbox"]
        if len(box) != 4 or not all(map(coco_json.is_number, box)):
            raise UserError(
                f"{files.shown(path)}: annotations[{number}] has bbox {coco_json.as_json(box)}; "
                "[x, y, width, height] is wanted"
            )
        of_image[annotation["image_id"]].append(annotation)
    checked = {}
    for image_id, annotations in of_image.items():
        image = images[image_id]
        if not (0 < image["width"] <= _MAX_SIDE and 0 < image["height"] <= _MAX_SIDE):
            raise UserError(
                f"{files.shown(path)}: image {files.shown(image['file_name'])!r} has no size, but"
                f" width {image['width']} and height {image['height']}"
            )
        sides = np.array((image["height"], image["width"]), np.float64)
        found = _as_objects(
            [one["bbox"] for one in annotations],
            [labels[one["category_id"]] for one in annotations],
            [bool(one.get("iscrowd", 0)) for one in annotations],
            [one.get("area", 0) for one in annotations],
        )
        x, y, width, height = np.moveaxis(found.boxes, -1, 0)
        with np.errstate(invalid="ignore", over="ignore"):  # `boxes.check` finds such boxes.
            corners = np.stack([y, x, y + height, x + width], -1) / np.tile(sides, 2)
        checked[image_id] = boxes.check(
            found._replace(boxes=corners),
            on_bad_box=on_bad_box,
            describe=functools.partial(_described, path, image),
            tolerance=tuple(_TOLERANCE / sides),
        )
    _tell_of_dropped(len(stored["annotations"]), checked.values(), path)
    return checked


def _described(path: Path, image: Mapping[str, Any]) -> str:
    return f"{files.shown(path)}: image {files.shown(image['file_name'])!r}"


def _tell_of_dropped(total: int, kept: Iterable[boxes.Objects], path: Path) -> None:
    """Warns about removed boxes. Raises a `UserError` if all boxes are bad.

    A few boxes may be bad, but if all are, they are not in the form of COCO.
    """
    dropped = total - sum(len(objects.boxes) for objects in kept)
    if total and dropped == total:
        raise UserError(
            f"{files.shown(path)}: not one of its {total} boxes lies inside its image; bbox is"
            " [x, y, width, height] in pixels of the image"
        )
    if dropped:
        logger.warning(
            "%s: %d of %d boxes are left out: empty, or not inside their images",
            files.shown(path), dropped, total,
        )  # fmt: skip


def _as_objects(corners: list, labels: list, crowds: list, areas: list) -> boxes.Objects:
    with np.errstate(over="ignore"):
        return boxes.Objects(
            np.array(corners, np.float64).reshape(-1, 4),
            np.array(labels, np.int32),
            np.array(crowds, bool),
            np.array(areas, np.float64).astype(np.float32),
        )
