"""Images with captions: a file of lines, or COCO's captions JSON, and a folder of images.

    config.data.source = "captions"
    config.data.name = "photos/{split}.jsonl"
    config.data.args = {"images": "photos"}

A `.jsonl` file has lines {"image": "cat.jpg", "caption": "a cat"}. A `.csv` or `.tsv` file begins
with a line that names the columns `image` and `caption`. An image with several captions has several
lines. A `.json` file has the format of COCO: `images` (id, file_name) and `annotations` (image_id,
caption). File names are relative to the folder of images.

`_rows` says how cells with separators and quote marks are written.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vit_jax.data import files
from vit_jax.data.images import check_exif, for_decoding, read
from vit_jax.data.sources import Records, _rows
from vit_jax.data.sources import _coco_json as coco_json
from vit_jax.data.sources._splits import drawn_and_read, select_unlabeled, split_name
from vit_jax.errors import UserError

_KEYS = ("image", "caption")
_SECTIONS: Mapping[str, coco_json.Kinds] = {
    "images": {"id": coco_json.ID, "file_name": str},
    "annotations": {"image_id": coco_json.ID, "caption": str},
}


class Source:
    """Reads images with up to `max_texts` captions each.

    Args:
      name: the file of captions; `{split}` in it, and in `images`, is replaced by the split.
      split: the split, with a range or a fold of its images in brackets.
      images: the folder of the image files.
      max_texts: the maximum number of captions of an image; only its first captions are kept.
      exif: "apply" turns photographs upright by their EXIF orientation; "ignore" does not.
      split_seed: the seed of folds.
    """

    num_classes = 0
    class_names = None

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        images: str,
        max_texts: int = 5,
        exif: str = "apply",
        split_seed: int = 0,
    ):
        check_exif(exif)
        part = split_name(split)
        path = files.expand(name.replace("{split}", part))
        self._folder = files.existing_folder(images.replace("{split}", part))
        self._exif = exif
        captions: dict[str, list[str]] = {}
        places: dict[str, str] = {}
        for where, image, caption in _pairs(path, self._folder):
            place = f"{files.shown(path)}: {where}"
            relative = files.path_inside(self._folder, image, place)
            captions.setdefault(relative, []).append(caption)
            places.setdefault(relative, where)
        self._table = files.shown(path)
        selected = select_unlabeled(split, len(captions), split_seed)
        named = list(captions)
        self._files = [named[place] for place in selected]
        self._places = [places[image] for image in self._files]
        self._captions = np.full((len(self._files), max_texts), b"", object)
        for row, image in enumerate(self._files):
            texts = [text.encode(errors="replace") for text in captions[image][:max_texts]]
            self._captions[row, : len(texts)] = texts
        self.fingerprint = f"captions:{path.name}:{split}:{len(self._files)}"
        self.fingerprint += drawn_and_read(split_seed, exif)

    def __len__(self) -> int:
        return len(self._files)

    def fetch(self, indices: np.ndarray) -> Records:
        found = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            data = read(self._folder / self._files[index])
            found[row] = for_decoding(data, self._exif)
        return {"image": found, "captions": self._captions[indices]}

    def describe(self, index: int) -> str:
        place = f"{self._table}: {self._places[index]}"
        return f"{files.shown(self._folder / self._files[index])} ({place})"


def _pairs(path: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (position in the file, image, caption) for each line or annotation.

    Raises:
      UserError: the file cannot be read, or an entry lacks its image or caption.
    """
    table = functools.partial(_table, folder)
    kinds: dict[str, Callable[[Path, str], Iterator[tuple[str, dict]]]]
    kinds = {".jsonl": _rows.json_lines, ".csv": table, ".tsv": table, ".json": _coco}
    reader = kinds.get(path.suffix.lower())
    if not reader:
        raise UserError(f"{files.shown(path)}: write a file that ends in {', '.join(kinds)}")
    for where, entry in reader(path, files.read_text(path)):
        values = []
        for key in _KEYS:
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{files.shown(path)}: {where} has no {key!r}")
            values.append(value)
        yield where, values[0], values[1].strip()


def _coco(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    stored = coco_json.sections(path, text, _SECTIONS, "captions")
    coco_json.check_unique(path, stored, "images", "id")
    names = {image["id"]: image["file_name"] for image in stored["images"]}
    for number, entry in enumerate(stored["annotations"]):
        coco_json.check_listed(path, number, "image", entry["image_id"], names)
        name = names[entry["image_id"]]
        yield f"annotations[{number}]", {"image": name, "caption": entry["caption"]}


def _table(folder: Path, path: Path, text: str) -> Iterator[tuple[str, dict]]:
    columns, cells = _rows.columns_and_cells(path, text)
    _rows.check_columns(path, columns, _KEYS, "name image and caption")
    yield from _rows.named_cells(path, columns, cells, _KEYS, folder)
