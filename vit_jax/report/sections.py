"""Sections of the report: additions of a task or a command, stored in `WORKDIR/report/`."""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.storage import write_atomically
from vit_jax.tracking.plain_text import one_line

logger = logging.getLogger(__name__)

FOLDER = "report"
INDEX = "sections.json"

_SMALL_IMAGE = 240  # pixels; smaller images are enlarged to this size
_PIXELS_PER_INCH = 100  # The text of a figure then has the size of the page's text.


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
      title: its heading; saving a section replaces the section with the same title.
      text: plain text, with an empty line between paragraphs.
      image: a PIL image, a matplotlib figure or the bytes of an image file.
      table: rows of cells; the first row is the heading.
      alt: the image in words, for those who cannot see it; empty for the heading.
      numbers: rows of cells with the numbers behind the image, as in `table`; shown folded.
    """

    title: str
    text: str = ""
    image: Any = None
    table: Sequence[Sequence[Any]] | None = None
    alt: str = ""
    numbers: Sequence[Sequence[Any]] | None = None


@dataclass(frozen=True)
class StoredSection:
    """A section read back.

    Attributes:
      image: bytes of a PNG file, or None.
      drawing: bytes of an SVG file that shows the same on light and dark pages, or None.
      width: the width of the image on the page, in CSS pixels.
      is_pixel_art: whether the image is so small that it is shown enlarged, pixel by pixel.
    """

    title: str
    text: str
    image: bytes | None
    drawing: bytes | None
    table: list[list[str]] | None
    width: int = 0
    is_pixel_art: bool = False
    alt: str = ""
    numbers: list[list[str]] | None = None


def save_sections(workdir: epath.PathLike, sections: Iterable[Section]) -> None:
    """Writes `sections` to `WORKDIR/report/`: pictures as files, the rest to `sections.json`.

    A figure becomes an SVG file for the page and a PNG file for other uses. New titles are
    appended; existing titles keep their position and get the new content. The index is replaced
    atomically after its pictures exist, so a concurrent reader or a crash never leaves a partial
    index. If a picture cannot be drawn, a warning is logged and its section has no picture.
    """
    folder = epath.Path(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    entries = {entry["title"]: entry for entry in _read_index(folder)}
    for section in sections:
        entries[section.title] = _store(section, folder)
    text = json.dumps({"version": 1, "sections": list(entries.values())}, indent=1) + "\n"
    write_atomically(folder / INDEX, text.encode())


def read_sections(workdir: epath.PathLike) -> list[StoredSection]:
    """Returns the sections saved in `workdir`, in order; a picture that is gone is left out.

    Raises:
      UserError: the index cannot be read.
    """
    folder = epath.Path(workdir) / FOLDER

    def picture(entry: Mapping[str, Any], key: str) -> bytes | None:
        # An index from another source may name any file, so only files of this folder are read. A
        # link could lead to a file that its owner would not show.
        name = str(entry.get(key) or "")
        path = folder / name
        is_own = name and "/" not in name and path.is_file() and not os.path.islink(path)
        return storage.read_bytes(path) if is_own else None

    return [
        StoredSection(
            title=entry["title"],
            text=str(entry.get("text", "")),
            image=picture(entry, "image"),
            drawing=picture(entry, "drawing"),
            table=_table(entry.get("table")),
            width=width if isinstance(width := entry.get("width"), int) else 0,
            is_pixel_art=bool(entry.get("is_pixel_art")),
            alt=str(entry.get("alt", "")),
            numbers=_table(entry.get("numbers")),
        )
        for entry in _read_index(folder)
    ]


def _read_index(folder: epath.Path) -> list[dict]:
    """Returns the entries of the index that have a title; [] if there is no index."""
    path = folder / INDEX
    if not path.exists():
        return []
    try:
        entries = storage.parse_json(storage.read_bytes(path))["sections"]
        return [entry for entry in entries if isinstance(entry["title"], str)]
    except storage.errors(ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an index of report sections; remove it") from error


def _table(stored: Any) -> list[list[str]] | None:
    is_table = isinstance(stored, list) and stored and all(isinstance(row, list) for row in stored)
    return [[str(cell) for cell in row] for row in stored] if is_table else None


def _store(section: Section, folder: epath.Path) -> dict:
    entry: dict[str, Any] = {"title": section.title, "text": section.text, "alt": section.alt}
    for name in ("table", "numbers"):
        rows = getattr(section, name)
        if rows is not None:
            entry[name] = [[_cell(value) for value in row] for row in rows]
    if section.image is not None:
        try:
            entry |= _store_picture(section, folder)
        except Exception as error:  # No error in a picture may end a run.
            reason = one_line(str(error), 200) or type(error).__name__
            title = one_line(section.title)
            logger.warning("report section %r has no picture, which failed: %s", title, reason)
    return entry


def _store_picture(section: Section, folder: epath.Path) -> dict[str, Any]:
    """Writes the picture of a section and returns its entries in the index."""
    from matplotlib.figure import Figure
    from PIL import Image

    name, image = _file_name(section.title), section.image
    found: dict[str, Any] = {}
    if isinstance(image, Figure):
        from vit_jax.report import figures

        size = tuple(round(inches * _PIXELS_PER_INCH) for inches in image.get_size_inches())
        png = figures.png(image)
        found["drawing"] = f"{name}.svg"
        write_atomically(folder / found["drawing"], figures.svg(image))
    else:
        if isinstance(image, bytes | bytearray):
            image = Image.open(io.BytesIO(image))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        png, size = buffer.getvalue(), image.size
    is_small = max(size) < _SMALL_IMAGE
    found |= {"image": f"{name}.png", "width": size[0], "is_pixel_art": is_small}
    if is_small:
        found["width"] = _SMALL_IMAGE
    write_atomically(folder / found["image"], png)
    return found


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _file_name(title: str) -> str:
    """Returns a file name: a title's words, and a hash if other titles have the same words."""
    words = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:60]
    if words.replace("_", " ").capitalize() == title:
        return words
    digest = hashlib.sha256(title.encode("utf-8", "backslashreplace")).hexdigest()[:6]
    return f"{words}_{digest}".strip("_")
