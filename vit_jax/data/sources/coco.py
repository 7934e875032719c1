"""A detection dataset as COCO stores it: one JSON file of annotations and a folder of images.

    config.data.source = "coco"
    config.data.name = "annotations/instances_{split}.json"
    config.data.args = {"images": "photos"}
    config.eval.sets = {"val": {"split": "val"}}
    config.task = {"name": "detection"}

Of the JSON are read: `images` (id, file_name, width, height), `categories` (id, name) and
`annotations` (image_id, category_id, bbox as [x, y, width, height] in pixels; area and iscrowd if
they are there). Classes are the categories by ascending id.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import boxes
from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.errors import UserError

_ID, _NUMBER = int | str, int | float
_SECTIONS = {
    "images": {"id": _ID, "file_name": str, "width": _NUMBER, "height": _NUMBER},
    "categories": {"id": _ID, "name": str},
    "annotations": {"image_id": _ID, "category_id": _ID, "bbox": list},
}
_OPTIONAL = {"area": _NUMBER, "iscrowd": int}


logger = logging.getLogger(__name__)


class Source:
    """`name` is the JSON file; `{split}` in it, and in `images`, is replaced by the split.

    images: folder of the files. max_objects, on_bad_box: see `boxes.pack` and `boxes.check`.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        images: str,
        max_objects: int = 100,
        on_bad_box: str = "fail",
    ):
        boxes.check_choice(on_bad_box)
        part = parse_split(split)[0]
        path = Path(name.replace("{split}", part)).expanduser()
        self._folder = Path(images.replace("{split}", part)).expanduser()
        if not self._folder.is_dir():
            raise UserError(f"no such folder: {self._folder}")
        stored = _read(path)
        categories = sorted(stored["categories"], key=lambda category: category["id"])
        self.class_names = tuple(str(category["name"]) for category in categories)
        self.num_classes = len(categories)
        labels = {category["id"]: i for i, category in enumerate(categories)}
        selected = split_range(split, len(stored["images"]))
        self._images = stored["images"][selected.start : selected.stop]
        self._objects = _objects(stored, labels, path, on_bad_box)
        self._max_objects = max_objects
        self._empty = _as_objects([], [], [], [])
        largest = max(self._images, key=lambda image: len(self._of(image).boxes), default=None)
        if largest:  # Said at the start, not when the crowded image's turn comes.
            boxes.pack([self._of(largest)], max_objects, lambda _: largest["file_name"])
        self.fingerprint = f"coco:{path.name}:{split}:{len(self._images)}"

    def __len__(self) -> int:
        return len(self._images)

    def fetch(self, indices: np.ndarray) -> Records:
        files = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            files[row] = Path(self.describe(index)).read_bytes()
        objects = [self._of(self._images[index]) for index in indices]
        packed = boxes.pack(objects, self._max_objects, lambda row: self.describe(indices[row]))
        sizes = [self._listed_size(self._images[index]) for index in indices]
        return {"image": files, "listed_size": np.array(sizes, np.int32), **packed}

    def describe(self, index: int) -> str:
        return str(self._folder / self._images[index]["file_name"])

    def _listed_size(self, image: dict) -> tuple[int, int]:
        """Height and width that the boxes are for, which `joint_decode` compares; 0 without boxes.

        Cameras store a photograph lying on its side and say so in EXIF. Tools that annotate turn
        it, the decoder does not, and the boxes would then be at wrong places.
        """
        return (image["height"], image["width"]) if len(self._of(image).boxes) else (0, 0)

    def _of(self, image: dict) -> boxes.Objects:
        return self._objects.get(image["id"], self._empty)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The sections of the file, each entry with the keys that are needed. Raises `UserError`."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    for section, keys in _SECTIONS.items():
        entries = stored.get(section) if isinstance(stored, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path} has no list {section!r}; is it COCO's instances format?")
        for number, entry in enumerate(entries):
            where = f"{path}: {section}[{number}]"
            for key in keys:
                if not isinstance(entry, dict) or key not in entry:
                    raise UserError(f"{where} has no {key!r}")
            for key, kind in {**keys, **_OPTIONAL}.items():
                if key in entry and not isinstance(entry[key], kind):
                    raise UserError(f"{where} has {key} {json.dumps(entry[key])}")
    return stored


def _objects(
    stored: dict, labels: dict[Any, int], path: Path, on_bad_box: str
) -> dict[Any, boxes.Objects]:
    """Image id → its objects, boxes in 0..1, checked."""
    images = {image["id"]: image for image in stored["images"]}
    of_image = defaultdict(list)
    for number, annotation in enumerate(stored["annotations"]):
        where = f"{path}: annotations[{number}]"
        if annotation["image_id"] not in images:
            raise UserError(f"{where} is of image {annotation['image_id']!r}, which is not listed")
        if annotation["category_id"] not in labels:
            raise UserError(
                f"{where} has category {annotation['category_id']!r}, which is not listed"
            )
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise UserError(f"{where} has bbox {box!r}; [x, y, width, height] is wanted")
        of_image[annotation["image_id"]].append(annotation)
    checked = {}
    for image_id, annotations in of_image.items():
        image = images[image_id]
        if not (image["width"] > 0 and image["height"] > 0):
            raise UserError(f"{path}: image {image['file_name']!r} has no size")
        found = _as_objects(
            [one["bbox"] for one in annotations],
            [labels[one["category_id"]] for one in annotations],
            [bool(one.get("iscrowd", 0)) for one in annotations],
            [float(one.get("area", 0)) for one in annotations],
        )
        x, y, width, height = np.moveaxis(found.boxes.astype(np.float64), -1, 0)
        corners = np.stack([y, x, y + height, x + width], -1)
        corners /= np.tile((image["height"], image["width"]), 2)
        checked[image_id] = boxes.check(
            found._replace(boxes=corners),
            on_bad_box=on_bad_box,
            describe=lambda image=image: f"{path}: image {image['file_name']!r}",
        )
    _tell_of_dropped(len(stored["annotations"]), checked.values(), path)
    return checked


def _tell_of_dropped(total: int, kept: Iterable[boxes.Objects], path: Path) -> None:
    """Few boxes may be bad; where all are, they are written in another way than COCO's."""
    dropped = total - sum(len(objects.boxes) for objects in kept)
    if total and dropped == total:
        raise UserError(
            f"{path}: not one of its {total} boxes lies inside its image; bbox is [x, y, width,"
            " height] in pixels of the image"
        )
    if dropped:
        logger.warning(
            "%s: %d of %d boxes are left out: empty, or not inside their images",
            path, dropped, total,
        )  # fmt: skip


def _as_objects(corners: list, labels: list, crowds: list, areas: list) -> boxes.Objects:
    return boxes.Objects(
        np.array(corners, np.float64).reshape(-1, 4),
        np.array(labels, np.int32),
        np.array(crowds, bool),
        np.array(areas, np.float32),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
