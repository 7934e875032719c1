"""Indices of tar files of WebDataset: where the image of each sample lies, and its label.

The index of a tar file is the one that `prepare` wrote beside it; the one that an earlier call kept
in `CACHE`; a new one by way of the `.idx` file of NVIDIA DALI; or a new one by reading the headers
of all members. Opening a dataset never writes beside its files, which may be somebody else's.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax import storage
from vit_jax.data import files, images
from vit_jax.data.sources._table_files import regular
from vit_jax.data.sources.npz import check_sizes
from vit_jax.errors import UserError
from vit_jax.storage import is_remote

SUFFIX = ".vit_jax_index.npz"
CACHE = "~/.cache/vit_jax/tar_indices"
"""The folder of the indices that `of` builds."""

_VERSION = 4
"""The version of the index, which is made anew where the stored one has another."""

_MAX_TEXT = 1 << 20
_BUFFER = 1 << 20
_BLOCK = 512
_CHECKED = 16
_LONGEST_LINE = 100_000
# A component of a line of DALI's index: suffix, offset, size and name, which ends in the suffix.
_COMPONENT = re.compile(r"(\S{1,100}) (\d{1,18}) (\d{1,18}) (\S.*?\.\1)(?: |$)")

logger = logging.getLogger(__name__)


class Index(NamedTuple):
    """The samples of one tar file, in the order of the file.

    key: the names of the samples, without suffix. offset, size: where the image lies, in bytes.
    cls, json: the content of the members with these suffixes; "" where there is none. They are
      lists, because an array of texts would take as much for each one as for the longest.
    """

    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    cls: Sequence[str]
    json: Sequence[str]


class _Member(NamedTuple):
    """A regular file within a tar file: its name, and where its content lies, in bytes."""

    name: str
    offset: int
    size: int


_EMPTY = {
    "cls": "", "json": "", "unread": "",
    "size": 0, "offset": 0, "dots": math.inf, "is_clear": True,
}  # fmt: skip
_ARRAYS, _TEXTS = Index._fields[:3], Index._fields[3:]


def open_tar(path: str, buffer: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Opens a local or remote file for reading at any place. Raises `OSError`."""
    opened = files.open_remote(path) if is_remote(path) else io.FileIO(regular(path))
    return io.BufferedReader(opened, buffer)


def of(path: str) -> Index:
    """Returns the index of a tar file. One that had to be built is kept in `CACHE`.

    It is not kept for a remote file of which nothing tells whether it has changed.

    Raises:
      UserError: the file cannot be read, is damaged, or has no samples with images.
    """
    place = os.path.abspath(os.path.expanduser(path)) if not is_remote(path) else path
    name = hashlib.blake2b(os.fsencode(place), digest_size=16).hexdigest() + ".npz"
    kept = os.path.join(os.path.expanduser(CACHE), name)
    index, content = _read_or_built(path, [path + SUFFIX, kept])
    if content:
        try:
            os.makedirs(os.path.dirname(kept), exist_ok=True)
            storage.write_atomically(kept, content)
        except storage.errors() as error:
            logger.info("%s: its index is not kept: %s", files.shown(path), files.reason(error))
    return index


def prepare(paths: Sequence[str], tell: Callable[[str], None]) -> None:
    """Writes the index of each tar file beside it, where that is not done yet.

    Raises:
      UserError: a file is damaged or on the web, or its index cannot be written.
    """
    for path in paths:
        if path.startswith(("http://", "https://")):
            raise UserError(
                f"{files.shown(path)}: nothing can be written beside files on the web; training"
                f" builds an index and keeps it in {CACHE}"
            )
    for number, path in enumerate(paths, 1):
        index, content = _read_or_built(path, [path + SUFFIX])
        if content:
            try:
                storage.write_atomically(path + SUFFIX, content)
            except storage.errors() as error:
                raise UserError(
                    f"{files.shown(path + SUFFIX)}: {files.reason(error)}; training works without"
                    f" it and keeps an index in {CACHE}"
                ) from error
        tell(f"{files.shown(path)} ({number} of {len(paths)}): {len(index.key):,} samples")


def _read_or_built(path: str, places: Sequence[str]) -> tuple[Index, bytes]:
    """Returns the index from one of the places, or a new one; and what to store of a new one.

    That is b"" if there is nothing to store.
    """
    try:
        with open_tar(path, _BUFFER) as file:
            size = file.seek(0, os.SEEK_END)
            version = files.version(path)
            stamp = np.array([str(size), version, str(_VERSION)])
            for place in places if version else ():
                if stored := _stored(place, stamp):
                    return stored, b""
            index = _built(path, file, size)
    except OSError as error:
        raise UserError(f"{files.shown(path)}: {files.reason(error)}") from error
    if not version:
        return index, b""
    arrays, buffer = index._asdict(), io.BytesIO()
    texts = json.dumps({name: arrays.pop(name) for name in _TEXTS}).encode()
    np.savez(buffer, stamp=stamp, texts=np.frombuffer(texts, np.uint8), **arrays)
    return index, buffer.getvalue()


def _stored(place: str, stamp: np.ndarray) -> Index | None:
    """Returns the index in a file, if it is whole and of the very tar file with this stamp."""
    try:
        data = files.read_bytes(place, images.MAX_BYTES)
        check_sizes(io.BytesIO(data), len(data))
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if not np.array_equal(arrays["stamp"], stamp):
                return None
            texts = json.loads(arrays["texts"].tobytes())
            found = Index(*(arrays[name] for name in _ARRAYS), *(texts[name] for name in _TEXTS))
        return found if len(set(map(len, found))) == 1 else None
    except Exception:  # Whatever is wrong with it, an index can be made anew.
        return None


def _built(path: str, file: io.BufferedReader, size: int) -> Index:
    """Reads the members of a tar file. Members of a sample follow each other.

    Raises:
      OSError: the file is damaged, has no images, or has a member or a sample twice, of which one
        would get the image or the label of the other.
    """
    members: Iterable[_Member] = _dali_members(path, file, size) or _members(file)
    try:
        return _collected(members, file)
    except OSError:
        raise
    except Exception as error:  # `tarfile` raises errors of any type for damaged headers.
        raise OSError(f"no tar file, or a damaged one ({files.reason(error)})") from error


def _members(file: io.BufferedReader) -> Iterator[_Member]:
    """Yields the regular files of a tar file, from their headers."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0:  # `tarfile` would go back, and never reach the end.
                raise OSError("a member of a negative size")
            if member.issparse():
                raise OSError(f"{files.shown(member.name)!r} is sparse; pack it without --sparse")
            if member.isreg():
                yield _Member(member.name, member.offset_data, member.size)
            tar.members = []  # type: ignore[attr-defined]  # They would stay in memory.


def _collected(members: Iterable[_Member], file: io.BufferedReader) -> Index:
    """Returns the samples that the members of a tar file form."""
    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    for member in members:
        folder, name = os.path.split(member.name)
        stem, _, suffix = name.partition(".")
        if files.is_hidden(name):
            continue
        key = os.path.join(folder, stem)
        if not samples or samples[-1]["key"] != key:
            if key in seen:
                raise OSError(f"two samples are called {files.shown(key)!r}")
            seen.add(key)
            samples.append({**_EMPTY, "key": key})
            suffixes: set[str] = set()
        if suffix in suffixes:
            raise OSError(f"two members are called {files.shown(member.name)!r}")
        suffixes.add(suffix)
        if suffix in ("cls", "json") and member.size <= _MAX_TEXT:
            file.seek(member.offset)
            content = file.read(member.size)
            if len(content) < member.size:
                raise OSError(f"ends within {files.shown(member.name)!r}")
            samples[-1][suffix] = content.decode(errors="replace").strip("\ufeff \r\n\t")
        elif images.is_image_name(name) and suffix.count(".") <= samples[-1]["dots"]:
            # KEY.jpg is the image, also where KEY.mask.png stands before it.
            is_second = suffix.count(".") == samples[-1]["dots"]
            place = {"offset": member.offset, "size": member.size, "dots": suffix.count(".")}
            samples[-1] |= {**place, "is_clear": not is_second}
        elif name.lower().endswith(images.OTHER_SUFFIXES):
            samples[-1]["unread"] = member.name
    return _index_of(samples)


def _index_of(samples: Sequence[Mapping[str, Any]]) -> Index:
    """Returns the index of samples. Raises `OSError` for those whose image is not clear."""
    for sample in samples:
        if not sample["is_clear"]:
            raise OSError(
                f"the sample {files.shown(sample['key'])!r} has two images; call what is no image"
                " KEY.NAME.png, with a second dot"
            )
        if sample["unread"] and sample["dots"] == math.inf:
            raise OSError(
                f"{files.shown(sample['unread'])!r} has a format that is not read:"
                f" {images.how_to_read(sample['unread'])}"
            )
    # An empty image stays, and is a bad image when it is read.
    samples = [sample for sample in samples if sample["dots"] < math.inf]
    if not samples:
        raise OSError("no samples with images in it")
    columns: list[Any] = [[one[name] for one in samples] for name in Index._fields]
    arrays: list[Any] = [np.array(column) for column in columns[: len(_ARRAYS)]]
    return Index(*arrays, *columns[len(_ARRAYS) :])


def _dali_members(path: str, file: io.BufferedReader, size: int) -> list[_Member]:
    """Returns the members that DALI's index of a tar file lists; [] without one that fits it.

    `wds2idx` names the index of `a.tar` `a.idx`. After a line with the version and the number of
    samples, each line has suffix, offset, size and name of the members of a sample
    (github.com/NVIDIA/DALI, tools/wds2idx.py, version v1.2).
    """
    folder, name = os.path.split(path)
    stem = name[0] + name[1:].partition(".")[0]
    for place in dict.fromkeys((os.path.join(folder, stem), os.path.splitext(path)[0])):
        try:
            text = files.read_bytes(place + ".idx", images.MAX_BYTES).decode()
        except storage.errors(ValueError):
            continue
        found = _parsed(text)
        if found and _fits(found, file, size):
            return found
        logger.warning("%s.idx is not used: it is no index (v1.2) of %s", place, files.shown(path))
    return []


def _parsed(text: str) -> list[_Member]:
    """Returns the members in the text of an index; [] if a part of it is not understood."""
    version, _, rest = text.partition("\n")
    lines = rest.split("\n")[:-1] if rest.endswith("\n") else rest.split("\n")
    if version != f"v1.2 {len(lines)}":
        return []
    found = []
    for line in lines:
        if len(line) > _LONGEST_LINE:
            return []
        at = 0
        while at < len(line):
            match = _COMPONENT.match(line, at)
            if not match:
                return []
            found.append(_Member(match[4], int(match[2]), int(match[3])))
            at = match.end()
    return found


def _fits(members: Sequence[_Member], file: io.BufferedReader, size: int) -> bool:
    """Returns whether members are those of a tar file, so that none is left out or another's.

    They follow each other up to the end of the file. Some of them, and what lies between two, are
    compared with their headers.
    """
    numbers = np.linspace(0, len(members) - 1, min(len(members), _CHECKED)).astype(int)
    checked, end = set(numbers.tolist()), 0
    for number, member in enumerate(members):
        start = member.offset - _BLOCK
        while end < start:
            header = _header(file, end)
            if header is None or header.size < 0:  # A negative size would lead back.
                return False
            if header.isreg() and not files.is_hidden(_last(header.name)):
                return False
            end = _end(end + _BLOCK, header.size)
        if end != start or _end(member.offset, member.size) > size:
            return False
        header = _header(file, start) if number in checked else None
        if number in checked and (header is None or not _is_of(header, member)):
            return False
        end = _end(member.offset, member.size)
    file.seek(end)
    return not any(file.read(_BLOCK))


def _end(offset: int, size: int) -> int:
    """Returns where the next header begins."""
    return offset + -(-size // _BLOCK) * _BLOCK


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _header(file: io.BufferedReader, offset: int) -> tarfile.TarInfo | None:
    """Returns the header at an offset; None where there is none."""
    file.seek(offset)
    try:
        return tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _is_of(header: tarfile.TarInfo, member: _Member) -> bool:
    # Where a header before this one holds a long name, this one has its first 100 characters; and
    # where that holds a name in other letters, this one has question marks in their place.
    names = (member.name, member.name.encode("ascii", "replace").decode())
    is_called = any(name.startswith(header.name) for name in names)
    return header.isreg() and header.size == member.size and is_called
