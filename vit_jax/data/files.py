"""Files that people bring: regular files only, text with its line, paths that stay in their folder.

Whatever is wrong with a file becomes one `UserError` line that names the file and the place in it.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError

MAX_TEXT_BYTES = 4 << 30
"""The largest text file that is read; the annotations of the largest public datasets have 1 GB."""

_LINE_END = re.compile(r"\r\n?|\n")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_SHOWN = 300
# Desktops, archives and notebooks leave these behind, besides files whose name begins with a dot.
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")


def shown(name: str | os.PathLike) -> str:
    """Returns a file name for a message: on one line, printable, and shortened if it is long."""
    text = os.fspath(name)
    if not text.isprintable():
        text = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[: _LONGEST_SHOWN // 2]}…{text[-_LONGEST_SHOWN // 2 :]}"
    return text


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Reads a regular file, or what a link to one leads to.

    Pipes and devices are refused because reading them may never end.

    Raises:
      OSError: the file cannot be read, is not a regular file, or is larger than `max_bytes`.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > max_bytes:
            raise OSError(f"{status.st_size:,} bytes, more than the {max_bytes:,} that are read")
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def read_text(path: str | os.PathLike) -> str:
    """Reads a text file in UTF-8; a byte order mark is left out.

    Raises:
      UserError: the file cannot be read, or is in another encoding.
    """
    try:
        data = read_bytes(path, MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: {reason(error)}") from error
    if data.startswith(_UTF_16):
        raise UserError(f"{shown(path)} is in UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        byte = data[error.start]
        raise UserError(
            f"{shown(path)}: line {line} is no text in UTF-8 (it has the byte 0x{byte:02x}): save "
            "the file as UTF-8"
        ) from error
    nul = text.find("\0")
    if nul >= 0:
        line = 1 + text.count("\n", 0, nul)
        raise UserError(f"{shown(path)}: line {line} has a NUL character; is it a text file?")
    return text


def lines(text: str) -> list[str]:
    """Splits a text at line feeds, carriage returns, or both in a row, and at nothing else.

    `str.splitlines` also ends lines at characters that stand inside texts, such as U+2028. The
    empty line behind the last line end is left out.
    """
    found = _LINE_END.split(text)
    return found[:-1] if not found[-1] else found


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank with their numbers, counted from 1."""
    return ((number, line) for number, line in enumerate(lines(text), 1) if line.strip())


def parse_json(path: str | os.PathLike, text: str, where: str = "") -> Any:
    """Parses a JSON text that stands in the file `path`; `where` names the place, as `: line 3`.

    Raises:
      UserError: the text is no JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{shown(path)}{where} is no JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{shown(path)}{where} is no JSON: brackets nested too deep") from error


def path_inside(folder: str | os.PathLike, name: str, where: str) -> str:
    """Returns `name` relative to `folder`, so that a list of files cannot name others.

    A link inside the folder is followed when it is read, as tools that manage data store files so.

    Args:
      name: a path relative to `folder`, or an absolute path inside it.
      where: what the message begins with, such as `train.json: images[3]`.

    Raises:
      UserError: the path leads out of the folder, or is no path.
    """
    relative = name
    if os.path.isabs(name):
        relative = os.path.relpath(name, os.path.abspath(folder))
    if "." in relative.split(os.sep) or ".." in relative or os.sep * 2 in relative:
        relative = os.path.normpath(relative)
    if relative in ("", ".", "..") or relative.startswith(f"..{os.sep}") or "\0" in relative:
        raise UserError(
            f"{where} names the file {shown(name)!r}, which is not in the folder {shown(folder)}"
        )
    return relative


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is passed over: dot files, and desktop files.

    `._photo.jpg`, `.ipynb_checkpoints`, `Thumbs.db` and `__MACOSX` are examples.
    """
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def visible(folder: str | os.PathLike) -> list[os.DirEntry]:
    """Returns the entries of a folder that are not hidden, sorted by name.

    Raises:
      UserError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_hidden(entry.name)]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot list {shown(folder)}: {reason(error)}") from error
    return sorted(found, key=lambda entry: entry.name)


def existing_folder(path: str | os.PathLike) -> Path:
    """Returns the path of a folder, with `~` replaced.

    Raises:
      UserError: there is no such folder.
    """
    expanded = expand(path)
    if not os.path.isdir(expanded):
        raise UserError(f"no such folder: {shown(expanded)}")
    return expanded


def expand(path: str | os.PathLike) -> Path:
    """Returns `path` with `~` replaced by the home folder; unknown users stay as they are."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def reason(error: Exception) -> str:
    """Returns the message of an error on one line, without the file name that `OSError` adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
