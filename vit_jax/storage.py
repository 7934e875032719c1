"""Files that may lie on an object store: safe reads, atomic writes, and retries; and JSON in them.

A path with `://` in it, such as `gs://bucket/run`, is on an object store, where a file is written
whole or not at all. Other paths are on a file system.
"""

import contextlib
import errno
import glob
import inspect
import json
import logging
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from etils import epath
from etils.epath import gpath

from vit_jax.errors import UserError, quoted

logger = logging.getLogger(__name__)

UPLOAD_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to write an object; stores limit the rate of writes to one."""

CREATING = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""The package of fsspec that `create` needs for an address, and the extra of ours that has it."""

MAX_BYTES = 4 << 30
"""Bytes of the largest file that `read_bytes` reads."""

MAX_DIGITS = 300
"""Digits of the longest number in JSON: longer ones are no floating-point numbers."""

Result = TypeVar("Result")


def errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading and writing raise, and `others`.

    Those of `gs://` are TensorFlow's own.
    """
    # While another thread imports TensorFlow, the module is there without its names.
    names: Any = getattr(sys.modules.get("tensorflow"), "errors", None)
    remote = (names.OpError,) if hasattr(names, "OpError") else ()
    return (*others, OSError, *remote)


def path_text(path: Any, what: str = "path") -> str:
    """Returns a path that a user gave, a text or an object of pathlib, as a text.

    Args:
      what: the name of the argument, for the message.

    Raises:
      UserError: it is neither.
    """
    if isinstance(path, str | os.PathLike) and isinstance(name := os.fspath(path), str):
        return name
    raise UserError(f"{what}={quoted(path)}: write a path, as a text or an object of pathlib")


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether `path` is on an object store, where nothing can be appended to a file."""
    return "://" in os.fspath(path)


class _LocalPath(gpath.PosixGPath):
    """A local path whose own name is never taken for a pattern.

    `glob` of etils takes the whole path for one: below `runs/lr[0.01]` it finds nothing, and below
    `runs/a*` also what belongs to `runs/ab`. Orbax calls it when it joins what each process wrote.
    """

    def glob(self, pattern: str) -> Iterator["_LocalPath"]:
        for name in glob.glob(pattern, root_dir=self):
            yield self / name


def literal(path: epath.PathLike) -> epath.Path:
    """Returns `path` so that Orbax, too, takes every character of it as it is."""
    return epath.Path(path) if is_remote(path) else _LocalPath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns `path` as an absolute path; addresses of object stores are absolute already.

    Raises:
      UserError: it is no path.
    """
    path = path_text(path)
    return epath.Path(path) if is_remote(path) else _LocalPath(path).expanduser().resolve()


def check_writable_name(path: epath.PathLike, where: str) -> None:
    """Raises a `UserError` if Orbax cannot write below `path`.

    Its storage library takes a backslash for a separator, and knows only names in Unicode.

    Args:
      where: what the user wrote, such as `workdir=DIR`.
    """
    name = os.fspath(path)
    if not {"\\", "\0"}.isdisjoint(name) or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(
            f"{where}: checkpoints cannot be written below a folder whose name has a backslash or"
            " is not valid UTF-8; write another path"
        )


def read_bytes(path: epath.PathLike, most: int = MAX_BYTES) -> bytes:
    """Returns the content of a regular file, or of an object on an object store.

    A pipe, or a link to a device, could go on for ever.

    Raises:
      One of `errors()`: the file cannot be read, is not regular, or has more than `most` bytes.
    """
    if not is_remote(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        if status.st_size > most:
            reason = f"{status.st_size:,} bytes, more than the {most:,} that are read"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
    return epath.Path(path).read_bytes()


def parse_json(content: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
      ValueError: it is no JSON, is nested too deep, has a number of more than `MAX_DIGITS` digits,
        or an object has a key twice, of which one would be lost.
    """
    try:
        return json.loads(content, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("brackets nested too deep") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {quoted(twice)} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def json_text(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON that every reader takes.

    JSON has no NaN or infinity, so these are the texts "NaN", "Infinity" and "-Infinity" (the JSON
    mapping of protocol buffers, which Python's `float` also reads).
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [*map(_finite, value)] if isinstance(value, list | tuple) else value


def write_atomically(path: epath.PathLike, data: bytes) -> None:
    """Writes a file so that readers, and a crash, see the old content or the new, never a mix.

    Writes to an object store are tried again after pauses, since stores limit their rate.
    """
    path = epath.Path(path)
    if is_remote(path):
        retrying(lambda: path.write_bytes(data), UPLOAD_PAUSES, str(path))
        return
    with writing_whole(path) as scratch, open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_output(path: str, text: str) -> None:
    """Writes a local text file that a flag names, as `write_atomically` does.

    A pipe or a device, such as `/dev/stdout`, cannot be replaced and is written as it is. A link
    stays, and the file that it leads to is replaced.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        write_atomically(os.path.realpath(path), text.encode())


def create(path: epath.PathLike, data: bytes) -> bool | None:
    """Creates a file on an object store by a conditional write, unless it is there.

    Google Cloud Storage writes with `ifGenerationMatch=0`, S3 with `If-None-Match: *`, through
    fsspec, whose mode "create" asks for that
    (https://filesystem-spec.readthedocs.io/en/latest/api.html).

    Returns whether this call created the file; None if the store, or what is installed of fsspec
    for it, has no conditional write.
    """
    import fsspec

    try:
        system, place = fsspec.core.url_to_fs(os.fspath(path))
        if "mode" not in inspect.signature(system.pipe_file).parameters:
            return None
        system.pipe_file(place, data, mode="create")
    except FileExistsError:
        return False
    except (ImportError, NotImplementedError, TypeError, ValueError):
        return None
    return True


def how_to_create(path: epath.PathLike) -> str:
    """Returns what to install so that `create` can write to a store; "" if nothing is known."""
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in CREATING:
        return ""
    package, extra = CREATING[scheme]
    return f"install or update {package} (the extra {extra!r} of vit-jax)"


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder against other processes of this host, until it is closed.

    Returns whether this call got the lock; None on a file system without locks, such as some
    network file systems.
    """
    import fcntl  # Not on every system.

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def writing_whole(path: epath.PathLike) -> Iterator[str]:
    """Yields the name of a scratch file, which takes the name `path` when the block succeeds.

    For libraries that write a local file by its name. When the block raises, the scratch file is
    removed and `path` stays as it was.
    """
    scratch = f"{os.fspath(path)}.tmp-{os.getpid()}"
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def retrying(attempt: Callable[[], Result], pauses: tuple[float, ...], what: str) -> Result:
    """Returns the result of `attempt()`, which is called again after each pause while it fails.

    Args:
      pauses: seconds to wait after the first, second, ... failure.
      what: the file or action, for the warning that each failure logs.

    Raises:
      The error of the last attempt, one of `errors()`. Other errors are raised at once.
    """
    for pause in pauses:
        try:
            return attempt()
        except errors() as error:
            logger.warning("%s: %s; trying again in %g s", what, error, pause)
            time.sleep(pause)
    return attempt()
