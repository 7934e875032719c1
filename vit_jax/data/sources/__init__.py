"""Sources of records. Each source is one file with a class named `Source`.

A source is random access: any batch of record numbers can be fetched in one call, in any order,
from several threads. `open_source` finds the file by its name, so a new source is a new file here,
or a class anywhere else that a config names as `package.module:ClassName`.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vit_jax.data import files
from vit_jax.errors import UserError
from vit_jax.plugins import Kind, check_fields, check_known, is_foreign

logger = logging.getLogger(__name__)

_MAX_NAMED = 5

Records = dict[str, np.ndarray]

# Keys that every spec may carry although only some sources read them. Left unset they are ignored.
_OPTIONAL_KEYS = ("name", "dir", "split", "num_examples", "num_classes", "image_size")

_AT_LEAST_ONE = ("max_objects", "max_texts")


@runtime_checkable
class Source(Protocol):
    """Random access to `len(source)` records, numbered from 0 in an order that never changes.

    A source that is fast only for sequential reads may also have an attribute `blocks`
    (`sampling.BlockShuffle`). The training order then visits its records block by block.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    fingerprint: str
    """An identifier of the contents (name, split, count). Equal fingerprints mean equal records."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray) -> Records:
        """Returns the records `indices` (int64 [k]), as arrays whose leading axis is k.

        Decoded images are uint8 `[k, h, w, c]`. Encoded images are object arrays `[k]` of bytes,
        which the preprocessing string decodes. Labels are int32, from 0 to `num_classes` - 1;
        an image without a label has no place beside others with one. Several threads call this
        method.
        """
        ...

    def describe(self, index: int) -> str:
        """Returns the name of a record for error messages: its file, if it has one."""
        ...


class Described(Protocol):
    """A source as far as a run can be planned for it: its examples are counted, but not read."""

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...


class Labeled(Source, Protocol):
    """A source that knows its labels without reading images.

    labels: class numbers `[n]`, or ones and zeros `[n, classes]`.
    """

    labels: np.ndarray


def class_counts(source: Described) -> tuple[int, ...]:
    """Returns the number of examples of each class; () if the source does not know its labels.

    Sources that know them without reading images have an attribute `labels`: class numbers `[n]`,
    or ones and zeros `[n, classes]`.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        return ()
    if labels.ndim > 1:
        return tuple((labels > 0).sum(0).tolist())
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    return tuple(counts.tolist())


SOURCES = Kind(
    "data source",
    "vit_jax.data.sources",
    "Source",
    "package.module:Class",
    accepts=inspect.isclass,
    requires=("__len__", "fetch", "describe"),
)
"""The finder of the sources that `config.data.source` names."""


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source that `spec` describes.

    Args:
        spec: `source` is the name of a module in this package or `package.module:ClassName`; every
            other key is an argument of that class. None means "not given"; so do 0 and "" for the
            keys of `_OPTIONAL_KEYS`.

    Raises:
        UserError: the source is unknown, does not read a key, or finds a mistake of its own (a
            missing folder, an unknown split, no examples).
    """
    source: Any = spec.get("source")
    source_class = SOURCES.find(source, "config.data.source")
    accepted = inspect.signature(source_class).parameters
    arguments = {}
    for key, value in spec.items():
        # An argument such as strict=False, or a suffix of "", is a value like any other.
        unset = value is None or (key in _OPTIONAL_KEYS and not value)
        if key == "source":
            continue
        if key not in accepted:
            if unset and key in _OPTIONAL_KEYS:
                continue
            check_known(key, accepted, f"config.data: {key}={value!r}", f"key of source {source!r}")
        if not unset:
            arguments[key] = value
    check_fields(source_class.__init__, arguments, "config.data.args.")
    for key, value in arguments.items():
        least = int(key in _AT_LEAST_ONE)
        if isinstance(value, int) and value < least and not is_foreign(source):
            raise UserError(f"config.data.args.{key}={value}: write {least} or more")
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and arguments.get(key, "") == "":
            raise UserError(f"source {source!r} needs the key {key!r}")
    opened = source_class(**arguments)
    missing = [name for name in Source.__annotations__ if not hasattr(opened, name)]
    if missing:
        raise UserError(f"source {source!r} lacks {', '.join(missing)}; see vit_jax.data.Source")
    names = opened.class_names
    if names and len(names) != opened.num_classes:
        raise UserError(
            f"{opened.fingerprint} has {len(names):,} class names for {opened.num_classes:,}"
            " classes; give each class one name, or none"
        )
    if len(opened) == 0:
        raise UserError(f"{opened.fingerprint} has no examples")
    _warn_of_classes(opened, str(spec.get("split") or ""))
    return opened


def _warn_of_classes(source: Source, split: str) -> None:
    """Warns of a single class, and of classes that a part of the data, `train[:90%]`, lacks."""
    counts = np.array(class_counts(source))
    names = [*map(files.shown, source.class_names or map(str, range(len(counts))))]
    if len(counts) == 1 and np.ndim(getattr(source, "labels", 0)) == 1:
        logger.warning(
            "%s has the class %r alone: a classifier has nothing to tell apart",
            source.fingerprint, names[0],
        )  # fmt: skip
    lacking = np.flatnonzero(counts == 0)
    if len(lacking) and "[" in split:
        named = ", ".join(names[label] for label in lacking[:_MAX_NAMED])
        more = ", ..." if len(lacking) > _MAX_NAMED else ""
        logger.warning(
            "%s has no example of %d of %d classes (%s%s)",
            source.fingerprint, len(lacking), len(counts), named, more,
        )  # fmt: skip
