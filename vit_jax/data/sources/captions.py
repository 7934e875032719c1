"""Images with captions: a file of lines, or COCO's captions JSON, and a folder of images.

    config.data.source = "captions"
    config.data.name = "photos/{split}.jsonl"
    config.data.args = {"images": "photos"}

A `.jsonl` file has lines {"image": "cat.jpg", "caption": "a cat"}, a `.csv` or `.tsv` file a first
line that names the columns `image` and `caption`; several lines of an image are its captions. A
`.json` file is COCO's: `images` (id, file_name) and `annotations` (image_id, caption).
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import parse_split, split_range
from vit_jax.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


class Source:
    """`name` is the file; `{split}` in it, and in `images`, is replaced by the split.

    images: folder of the files. max_texts: of an image's captions the first that are kept.
    """

    num_classes = 0
    class_names = None

    def __init__(self, name: str, split: str = "train", *, images: str, max_texts: int = 5):
        part = parse_split(split)[0]
        path = Path(name.replace("{split}", part)).expanduser()
        self._folder = Path(images.replace("{split}", part)).expanduser()
        if not self._folder.is_dir():
            raise UserError(f"no such folder: {self._folder}")
        captions: dict[str, list[str]] = {}
        for image, caption in _pairs(path):
            captions.setdefault(image, []).append(caption)
        selected = split_range(split, len(captions))
        self._files = list(captions)[selected.start : selected.stop]
        self._captions = np.full((len(self._files), max_texts), b"", object)
        for row, image in enumerate(self._files):
            texts = [text.encode() for text in captions[image][:max_texts]]
            self._captions[row, : len(texts)] = texts
        self.fingerprint = f"captions:{path.name}:{split}:{len(self._files)}"

    def __len__(self) -> int:
        return len(self._files)

    def fetch(self, indices: np.ndarray) -> Records:
        files = np.empty(len(indices), object)
        for row, index in enumerate(indices):
            files[row] = Path(self.describe(index)).read_bytes()
        return {"image": files, "captions": self._captions[indices]}

    def describe(self, index: int) -> str:
        return str(self._folder / self._files[index])


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """File name and caption, in the file's order. Raises `UserError` where one is missing."""
    kinds = {".jsonl": _lines, ".json": _coco} | dict.fromkeys(_SEPARATORS, _table)
    reader = kinds.get(path.suffix)
    if not reader:
        raise UserError(f"{path}: write a file that ends in {', '.join(kinds)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel's begin with a mark.
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: {error}") from error
    for where, entry in reader(path, text):
        values = [entry.get(key) if isinstance(entry, dict) else None for key in _KEYS]
        for key, value in zip(_KEYS, values, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: {where} has no {key!r}")
        yield values[0], values[1].strip()


_KEYS = ("image", "caption")


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    # Not `splitlines`, which also ends lines at characters that JSON texts may hold, as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(path, line, f": line {number}")


def _table(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=_SEPARATORS[path.suffix])
    try:
        for row in rows:
            yield f"line {rows.line_num}", row
    except csv.Error as error:
        raise UserError(
            f"{path}: the row that begins after line {rows.line_num} is no table's: {error}; is a "
            "quote left open?"
        ) from error


def _coco(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    stored = _parsed(path, text, "")
    sections = [stored.get(k) if isinstance(stored, dict) else None for k in _SECTIONS]
    for section, entries in zip(_SECTIONS, sections, strict=True):
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise UserError(f"{path} has no list {section!r}; is it COCO's captions format?")
    files = {image.get("id"): image.get("file_name") for image in sections[0]}
    for number, entry in enumerate(sections[1]):
        image = files.get(entry.get("image_id"))
        yield f"annotations[{number}]", {"image": image, "caption": entry.get("caption")}


_SECTIONS = ("images", "annotations")


def _parsed(path: Path, text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}{where} is no JSON: {error}") from error
