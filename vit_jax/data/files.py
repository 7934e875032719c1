"""Safe reading of files from users: only regular files, and only paths inside their folder.

Any mistake in a file raises a `UserError` with one line that names the file and the position in it.
"""

import contextlib
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

MAX_TEXT_BYTES = 4 << 30
"""The largest text file that is read, in bytes. The largest public annotations have about 1 GB."""

_WEB = ("https://", "http://")
_LINE_END = re.compile(r"\r\n?|\n")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_SHOWN = 300
# Desktops, archives, and notebooks create these files, and others whose names begin with a dot.
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")


def shown(name: str | os.PathLike) -> str:
    """Returns a file name for a message: printable, on one line, and shortened if it is long."""
    text = os.fspath(name)
    if not text.isprintable():
        text = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[: _LONGEST_SHOWN // 2]}…{text[-_LONGEST_SHOWN // 2 :]}"
    return text


def path_hash(path: str) -> bytes:
    """Returns a hash to sort paths by, so that files keep their order when others are added."""
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest()


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Reads a regular file, or the target of a link to one, or an object such as `gs://b/x.csv`.

    Pipes and devices are refused, because reading them may never end.

    Raises:
      OSError: the file cannot be read, is not a regular file, or is larger than `max_bytes`.
    """
    if is_remote(path):
        with open_remote(path) as object_:
            size = object_.seek(0, os.SEEK_END)
            _check_size(size, max_bytes)
            object_.seek(0)
            return object_.read(size)
    # Without O_NONBLOCK, opening a pipe that has no writer would wait forever.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        _check_size(status.st_size, max_bytes)
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(f"{size:,} bytes, more than the {max_bytes:,} that are read")


class _Remote(io.RawIOBase):
    """An object on a store, read through TensorFlow, as a Python file. Errors are `OSError`s."""

    def __init__(self, path: str):
        from vit_jax.data.host_tensorflow import tf

        self._errors = tf.errors.OpError
        self._file = tf.io.gfile.GFile(path, "rb")

    def read(self, size: int = -1) -> bytes:
        return self._call(self._file.read, size)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._call(self._file.seek, offset, whence)
        return self.tell()

    def tell(self) -> int:
        return self._call(self._file.tell)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _call(self, method: Callable[..., Any], *args: int) -> Any:
        try:
            return method(*args)
        except self._errors as error:
            raise OSError(reason(error)) from error


def open_remote(path: str | os.PathLike) -> io.RawIOBase:
    """Opens an object such as `gs://bucket/photos.parquet` for reading at any place.

    Files behind `https://` are read by parts where their server sends parts, or else as a whole.

    Raises:
      OSError: a file behind `https://` is not there.
    """
    name = os.fspath(path)
    if not name.startswith(_WEB):
        return _Remote(name)
    with _web_errors():
        system, inner = fsspec.core.url_to_fs(name)
        if system.info(inner).get("partial"):
            return system.open(inner, "rb")
        whole: Any = io.BytesIO(system.cat_file(inner))
        return whole


@contextlib.contextmanager
def _web_errors() -> Iterator[None]:
    """Turns errors of the libraries of the web, which are of their own kinds, into `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason(error)) from error


def is_file(path: str | os.PathLike) -> bool:
    """Returns whether a path is that of a file, or of an object on a store or on the web.

    What may not be read is none, because a store may tell no more of a missing object.

    Raises:
      UserError: the store or the web does not tell.
    """
    name = os.fspath(path)
    if not is_remote(name):
        return os.path.isfile(name)
    from vit_jax.data.host_tensorflow import tf

    try:
        if not name.startswith(_WEB):
            return tf.io.gfile.exists(name) and not tf.io.gfile.isdir(name)
        with _web_errors():
            system, inner = fsspec.core.url_to_fs(name)
            return system.exists(inner)
    except tf.errors.PermissionDeniedError:
        return False
    except (OSError, tf.errors.OpError) as error:
        raise UserError(f"{shown(name)}: {reason(error)}") from error


def version(path: str | os.PathLike) -> str:
    """Returns what changes with the content of a file or an object, and "" if nothing tells.

    It is the time of the last change, or for files behind `https://` the ETag.

    Raises:
      OSError: the file is not there.
    """
    name = os.fspath(path)
    if not is_remote(name):
        return str(os.stat(name).st_mtime_ns)
    if name.startswith(_WEB):
        with _web_errors():
            system, inner = fsspec.core.url_to_fs(name)
            info = system.info(inner)
        return str(info.get("ETag") or info.get("Last-Modified") or "")
    from vit_jax.data.host_tensorflow import tf

    try:
        changed = tf.io.gfile.stat(name).mtime_nsec
    except tf.errors.OpError as error:
        raise OSError(reason(error)) from error
    return str(changed) if changed > 0 else ""


def read_text(path: str | os.PathLike) -> str:
    """Reads a text file in UTF-8, without its byte order mark.

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
    """Splits a text only at line feeds, carriage returns, or both in sequence.

    `str.splitlines` would also split at characters that occur inside texts, such as U+2028. The
    empty line after the last line end is omitted.
    """
    found = _LINE_END.split(text)
    return found[:-1] if not found[-1] else found


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the number, counted from 1, and the text of each line that is not blank."""
    return ((number, line) for number, line in enumerate(lines(text), 1) if line.strip())


def parse_json(path: str | os.PathLike, text: str, where: str = "") -> Any:
    """Parses a JSON text of the file `path`; `where` names the position, such as `: line 3`.

    Raises:
      UserError: the text is not JSON, or an object in it has a key twice, of which one is lost.
    """
    try:
        return storage.parse_json(text)
    except ValueError as error:
        raise UserError(f"{shown(path)}{where} is no JSON: {reason(error)}") from error


def path_inside(folder: str | os.PathLike, name: str, where: str) -> str:
    """Returns `name` relative to `folder`, and refuses paths outside the folder.

    A link inside the folder is followed when it is read, because tools that manage data store files
    as links.

    Args:
      name: a path relative to `folder`, or an absolute path inside it.
      where: the beginning of the error message, such as `train.json: images[3]`.

    Raises:
      UserError: the path is outside the folder, or is not a path.
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
    """Returns whether a file or folder is skipped by its name: dot files and desktop files.

    `._photo.jpg`, `.ipynb_checkpoints`, `Thumbs.db`, and `__MACOSX` are examples.
    """
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder that are not hidden, sorted by name.

    Raises:
      UserError: the folder cannot be listed.
    """
    try:
        with os.scandir(os.fspath(folder)) as entries:
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
    """Returns `path` with `~` replaced by the home folder; `~` of unknown users is unchanged."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def reason(error: BaseException) -> str:
    """Returns the message of an error on one line, without the file name that `OSError` adds."""
    if isinstance(error, FileNotFoundError) and not error.strerror and error.__cause__:
        error = error.__cause__  # The message of fsspec is the address alone.
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
