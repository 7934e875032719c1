"""Sections of the report: what a task or a command adds to it, kept in `WORKDIR/report/`."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from vit_jax.errors import UserError
from vit_jax.storage import write_atomically

FOLDER = "report"
INDEX = "sections.json"

_SMALL_IMAGE = 240  # pixels; smaller ones are enlarged to it
_PIXELS_PER_INCH = 100  # at which the text of a figure is as large as the page's


@dataclass(frozen=True)
class Section:
    """A part of the report.

    title: its heading; saving a section replaces the one of the same title.
    text: plain text, paragraphs apart by an empty line.
    image: a PIL image, a matplotlib figure or the bytes of an image file.
    table: rows of cells, the first of them the heading.
    """

    title: str
    text: str = ""
    image: Any = None
    table: Sequence[Sequence[Any]] | None = None


@dataclass(frozen=True)
class StoredSection:
    """A section read back.

    image, dark_image: PNG bytes or None. width: of the image on the page, in CSS pixels.
    is_pixel_art: whether the image is so small that it is shown enlarged, pixel by pixel.
    """

    title: str
    text: str
    image: bytes | None
    dark_image: bytes | None
    table: list[list[str]] | None
    width: int = 0
    is_pixel_art: bool = False


def save_sections(workdir: epath.PathLike, sections: Iterable[Section]) -> None:
    """Writes `sections` to `WORKDIR/report/`: images as PNG files, the rest to `sections.json`.

    New titles go to the end; those already there keep their place and take the new content. A
    reader, or a crash, meets the old index or the new, with its pictures there.
    """
    folder = epath.Path(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry["title"]: entry for entry in _read_index(folder)}
    for section in sections:
        entries[section.title] = _store(section, folder)
    index = {"version": 1, "sections": list(entries.values())}
    text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / INDEX, text.encode())


def read_sections(workdir: epath.PathLike) -> list[StoredSection]:
    """The sections saved in `workdir`, in order; a picture that is gone is left out."""
    folder = epath.Path(workdir) / FOLDER

    def picture(entry: dict, key: str) -> bytes | None:
        path = folder / entry[key] if entry.get(key) else None
        return path.read_bytes() if path is not None and path.exists() else None

    return [
        StoredSection(
            title=entry["title"],
            text=entry.get("text", ""),
            image=picture(entry, "image"),
            dark_image=picture(entry, "dark_image"),
            table=entry.get("table"),
            width=entry.get("width", 0),
            is_pixel_art=entry.get("is_pixel_art", False),
        )
        for entry in _read_index(folder)
    ]


def _read_index(folder: epath.Path) -> list[dict]:
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["sections"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an index of report sections; remove it") from error


def _store(section: Section, folder: epath.Path) -> dict:
    entry: dict[str, Any] = {"title": section.title, "text": section.text}
    if section.table is not None:
        entry["table"] = [[_cell(value) for value in row] for row in section.table]
    if section.image is None:
        return entry
    light, dark, size = _pngs(section.image)
    is_small = max(size) < _SMALL_IMAGE
    name = _file_name(section.title)
    entry["image"] = f"{name}.png"
    entry["width"] = _SMALL_IMAGE if is_small else size[0]
    entry["is_pixel_art"] = is_small
    write_atomically(folder / entry["image"], light)
    if dark is not None:
        entry["dark_image"] = f"{name}.dark.png"
        write_atomically(folder / entry["dark_image"], dark)
    return entry


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _file_name(title: str) -> str:
    """A file name from a title: its words, or a hash where other titles give the same words."""
    words = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60]
    if words.replace("_", " ") == title.lower():
        return words
    return f"{words}_{hashlib.sha256(title.encode()).hexdigest()[:6]}".strip("_")


def _pngs(image: Any) -> tuple[bytes, bytes | None, tuple[int, int]]:
    """`image` as PNG bytes, its twin for dark pages if it is a figure, and its size in pixels.

    A figure's size is in pixels of a common screen; its file holds more, for finer ones.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    if isinstance(image, Figure):
        from vit_jax.report import figures

        size = tuple(round(inches * _PIXELS_PER_INCH) for inches in image.get_size_inches())
        light = figures.png(image)
        with figures.recolored(image):
            return light, figures.png(image), size
    if isinstance(image, bytes | bytearray):
        image = Image.open(io.BytesIO(image))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue(), None, image.size
