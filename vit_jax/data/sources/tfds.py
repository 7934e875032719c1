"""Random access to TensorFlow Datasets that were prepared as `array_record` or TFRecord.

Images stay encoded. The records have the order in which they were written.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from etils import epath

from vit_jax import storage
from vit_jax.data import boxes, files, images
from vit_jax.data.prepare import datasets
from vit_jax.data.sampling import BlockShuffle
from vit_jax.data.sources import Records
from vit_jax.data.sources._splits import drawn_and_read, select, split_name
from vit_jax.data.tfrecord import TfrecordReader
from vit_jax.errors import UserError, first_line, nearest, program

_KEPT_BYTES = 8 << 20
"""The size in bytes up to which a dataset is kept in memory, encoded, to save repeated reads."""


_DRAWN = re.compile(r"fold \d|per class")
_MANY = 100_000
_READ_AT_ONCE = 256
_STATES_AT_ONCE = 32

logger = logging.getLogger(__name__)


class _Class(NamedTuple):
    """The conversion of one label; `num_classes` is None if the dataset does not tell it."""

    num_classes: int | None


class _MultiHot(NamedTuple):
    """The conversion of a list of labels to a multi-hot vector of `num_classes`."""

    num_classes: int


class _Texts(NamedTuple):
    """The conversion of a list of texts to `limit` texts, padded with empty texts."""

    limit: int
    field: str
    """The field that holds the text, if the entries of the list have several fields."""


class Source:
    """Reads the features of a TFDS dataset that can be stacked into arrays.

    These are images, class labels, numbers and tensors of fixed shape, texts and lists of texts,
    objects with boxes (in the form of `vit_jax.data.boxes`), and lists of class labels, which
    become multi-hot vectors, uint8 [classes].

    A split without labels has -1 in their place. If the first record does, labels are left out.

    Args:
      name: the name of the dataset in TFDS, with `/config` and `:version` if needed.
      dir: the folder of prepared datasets; empty for the default of TFDS.
      split: a split such as `train[:99%]`, or with the folds and parts of classes of `_splits`.
      classes_of: the feature whose classes are `num_classes`. "" selects `label`, or else the label
        of the objects, or else the first labeled image.
      max_objects, on_bad_box: see `boxes.pack` and `boxes.check`.
      max_texts: the number of texts that are kept of a list, from the first.
      count_labels: reads the labels of all examples once, so that classes can be counted and
        balanced; folds and parts of classes need it and turn it on. Labels are kept beside the
        dataset, because they lie in the same records as the images.
      split_seed: the seed of folds and of parts of classes.
    """

    exif = "ignore"
    """Images are decoded as they are stored, whatever their EXIF orientation says."""

    def __init__(
        self,
        name: str,
        dir: str = "",
        split: str = "train",
        *,
        classes_of: str = "",
        max_objects: int = 100,
        on_bad_box: str = "fail",
        max_texts: int = 5,
        count_labels: bool = False,
        split_seed: int = 0,
    ):
        boxes.check_choice(on_bad_box)
        self._max_objects, self._on_bad_box = max_objects, on_bad_box
        builder = datasets.find_builder(name, dir)
        if not datasets.is_prepared(builder):
            where = f" --data_dir={dir}" if dir else ""
            raise UserError(
                f"dataset {name!r} is not prepared in {builder.data_path}; "
                f"run: {program()} prepare {name}{where}"
            )
        self._name = f"{builder.info.full_name} {split}"
        self._features = _stackable(builder.info.features, max_texts)
        is_drawn = bool(_DRAWN.search(split))
        opened = split_name(split) if is_drawn else split
        self._reader = _open_split(builder, opened, self._features)
        for key in _unlabeled(self._features, self._reader):
            del self._features[key]
        self.blocks = getattr(self._reader, "blocks", None)
        self._objects = _objects_feature(builder.info.features)
        label = _labels(builder.info.features, self._objects, classes_of, name)
        self.num_classes = getattr(label, "num_classes", 0) or 0
        names = getattr(label, "names", None)
        self.class_names = tuple(names) if names else None
        self._numbers = np.arange(len(self._reader))
        self.labels: np.ndarray | None = None
        if is_drawn or count_labels:
            self.labels = self._read_labels(builder, opened)
        if self.labels is not None and is_drawn:
            self._numbers = select(split, self.labels, seed=split_seed)
            self.labels = self.labels[self._numbers]
            self.blocks = self.blocks and _blocks_of(self.blocks, self._numbers)
        self.fingerprint = f"tfds:{self._name}:{len(self)}".replace(" ", ":")
        self.fingerprint += drawn_and_read(split_seed)
        is_stream = isinstance(self._reader, TfrecordReader)
        is_small = not is_stream and builder.info.dataset_size <= _KEPT_BYTES
        self._kept = self._read(np.arange(len(self._reader))) if is_small else None

    def __len__(self) -> int:
        return len(self._numbers)

    def fetch(self, indices: np.ndarray) -> Records:
        indices = self._numbers[indices]
        if self._kept is not None:
            return {key: x[indices] for key, x in self._kept.items()}
        return self._read(indices)

    def _read(self, indices: np.ndarray) -> Records:
        examples = self._reader.__getitems__(np.asarray(indices).tolist())
        records = {}
        for key, dtype in self._features.items():
            values = [example[key] for example in examples]
            if isinstance(dtype, _Class | _MultiHot):
                self._check_labels(key, values, indices)
            records[key] = _stack(values, dtype)
        if self._objects:
            records |= self._pack_objects([one[self._objects] for one in examples], indices)
        return records

    def _check_labels(self, key: str, values: list, indices: np.ndarray) -> None:
        """Raises a `UserError` for a record with a label that is none of the classes."""
        classes = cast(_Class | _MultiHot, self._features[key]).num_classes
        labels = [np.ravel(value) for value in values]
        every = np.concatenate(labels) if labels else np.zeros(0)
        is_none = (every < 0) | (every >= (np.inf if classes is None else classes))
        if is_none.any():
            place = np.repeat(np.arange(len(labels)), [len(one) for one in labels])[is_none][0]
            raise UserError(
                f"{self._describe(int(indices[place]))} has the {key} {int(every[is_none][0])},"
                f" which is none of {'its' if classes is None else f'the {classes}'} classes"
            )

    def _pack_objects(self, examples: list[dict], indices: np.ndarray) -> Records:
        def describe(row: int) -> str:
            return self._describe(int(indices[row]))

        checked = [
            boxes.check(
                _objects(example),
                on_bad_box=self._on_bad_box,
                describe=functools.partial(describe, row),
            )
            for row, example in enumerate(examples)
        ]
        return boxes.pack(checked, self._max_objects, describe)

    def describe(self, index: int) -> str:
        return self._describe(int(self._numbers[index]))

    def _describe(self, number: int) -> str:
        return f"record {number} of TFDS {self._name}"

    def _read_labels(self, builder: Any, split: str) -> np.ndarray:
        """Returns the labels of all examples of a split, which it keeps beside the dataset.

        Raises:
          UserError: an example of this dataset has no single label.
        """
        dtype = self._features.get("label")
        if dtype is not np.int32 and not isinstance(dtype, _Class):
            raise UserError(
                f"dataset {builder.info.full_name!r} has no feature 'label' with one class of each"
                f" example in {split!r}, so these cannot be drawn or counted by their classes"
            )
        path = epath.Path(builder.data_path) / f"labels-{urllib.parse.quote(split, safe='')}.npy"
        stamp = np.array("")
        with contextlib.suppress(ValueError, EOFError, *storage.errors()):
            shards = builder.info.splits[split].file_instructions
            stamp = np.array(_stamp([os.fspath(shard.filename) for shard in shards]))
            content = io.BytesIO(path.read_bytes())
            stored, of_shards = (np.load(content, allow_pickle=False) for _ in range(2))
            is_whole = stored.dtype == np.int32 and stored.shape == (len(self._reader),)
            if is_whole and of_shards == stamp:
                return stored
        if len(self._reader) > _MANY:
            logger.warning("reading the labels of %s once, with its images", self._name)
        labels = np.zeros(len(self._reader), np.int32)
        for chunk in _chunks(len(labels)):
            values = [one["label"] for one in self._reader.__getitems__(list(chunk))]
            if isinstance(dtype, _Class):
                self._check_labels("label", values, np.asarray(chunk))
            labels[list(chunk)] = values
        buffer = io.BytesIO()
        np.save(buffer, labels)
        np.save(buffer, stamp)
        try:
            storage.write_atomically(path, buffer.getvalue())
        except storage.errors() as error:
            logger.info("%s: labels are not kept: %s", path, error)
        return labels


def _stamp(paths: list[str]) -> str:
    """Returns a text that changes when one of the files is written again."""

    def state(path: str) -> tuple[str, str]:
        version = files.version(path)
        if not version:
            raise OSError(f"{path}: nothing tells when it was written")
        return os.path.basename(path), version

    with concurrent.futures.ThreadPoolExecutor(_STATES_AT_ONCE) as pool:
        return hashlib.sha256(repr(list(pool.map(state, paths))).encode()).hexdigest()


def _chunks(count: int) -> Iterator[range]:
    for start in range(0, count, _READ_AT_ONCE):
        yield range(start, min(start + _READ_AT_ONCE, count))


def _blocks_of(blocks: BlockShuffle, numbers: np.ndarray) -> BlockShuffle:
    """Returns the blocks in which some records of a split are read."""
    ends = np.cumsum(blocks.lengths)
    lengths = np.bincount(np.searchsorted(ends, numbers, side="right"))
    return blocks._replace(lengths=tuple(lengths[lengths > 0].tolist()))


def _stackable(features: Any, max_texts: int) -> dict[str, type | _Class | _MultiHot | _Texts]:
    """Returns the features that become arrays, with the dtype or conversion of each."""
    import tensorflow_datasets as tfds

    kept: dict[str, type | _Class | _MultiHot | _Texts] = {}
    for key, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            kept[key] = bytes
        elif isinstance(feature, tfds.features.Text):
            kept[key] = object
        elif isinstance(feature, tfds.features.ClassLabel):
            kept[key] = _Class(feature.num_classes)
        elif isinstance(feature, tfds.features.Tensor) and None not in feature.shape:
            kept[key] = feature.np_dtype
        elif isinstance(feature, tfds.features.Sequence) and isinstance(
            feature.feature, tfds.features.ClassLabel
        ):
            kept[key] = _MultiHot(feature.feature.num_classes)
        elif isinstance(feature, tfds.features.Sequence):
            inner = feature.feature
            fields = dict(inner.items()) if hasattr(inner, "items") else {"": inner}
            texts = [name for name, one in fields.items() if isinstance(one, tfds.features.Text)]
            if texts:
                kept[key] = _Texts(max_texts, texts[0])
    return kept


def _unlabeled(features: Mapping[str, Any], reader: Any) -> list[str]:
    """Returns the classes that the records of a split lack: the first one has -1 in their place.

    TFDS writes this number for the images of splits without labels.
    """
    kinds = [key for key, one in features.items() if isinstance(one, _Class | _MultiHot)]
    if not kinds or not len(reader):
        return []
    with contextlib.suppress(UserError, *storage.errors()):  # Told when records are fetched.
        (first,) = reader.__getitems__([0])
        return [key for key in kinds if (np.ravel(first[key]) < 0).any()]
    return []


def _objects_feature(features: Any) -> str:
    """Returns the name of the first feature that is a list of boxes with labels; "" if none is."""
    import tensorflow_datasets as tfds

    for key, feature in features.items():
        inner: Any = feature.feature if isinstance(feature, tfds.features.Sequence) else None
        fields = dict(inner.items()) if hasattr(inner, "items") else {}
        if isinstance(fields.get("bbox"), tfds.features.BBoxFeature):
            return key
    return ""


def _objects(example: dict) -> boxes.Objects:
    """Converts the objects of a TFDS detection dataset; some datasets lack crowds and areas."""
    count = len(example["bbox"])
    return boxes.Objects(
        np.asarray(example["bbox"], np.float32),
        np.asarray(example["label"], np.int32),
        np.asarray(example.get("is_crowd", np.zeros(count, bool))),
        np.asarray(example.get("area", np.zeros(count)), np.float32),
    )


def _labels(features: Any, objects: str, classes_of: str, name: str) -> Any:
    """Returns the feature that defines the classes; None if there is none.

    Raises:
      UserError: `classes_of` names no feature with classes.
    """
    candidates = {key: feature for key, feature in features.items() if key != objects}
    candidates = {k: f for k, f in candidates.items() if getattr(f, "num_classes", None)}
    if objects:
        candidates[objects] = features[objects].feature["label"]
    if classes_of and classes_of not in candidates:
        raise UserError(
            f"dataset {name!r} has no classes of {classes_of!r}; {nearest(classes_of, candidates)}"
        )
    preferred = [key for key in (classes_of, "label", objects) if key in candidates]
    return candidates[(preferred or list(candidates))[0]] if candidates else None


def _open_split(builder: Any, split: str, features: Iterable[str]) -> Any:
    """Returns a random-access reader of a split, which does not decode images.

    Raises:
      UserError: the dataset is stored in a format without random access, or has no such split.
    """
    import tensorflow_datasets as tfds

    decoders = {
        key: tfds.decode.SkipDecoding()
        for key in features
        if isinstance(builder.info.features[key], tfds.features.Image)
    }
    try:
        if builder.info.file_format is not tfds.core.file_adapters.FileFormat.TFRECORD:
            return builder.as_data_source(split=split, decoders=decoders)
        parse = functools.partial(builder.info.features.deserialize_example_np, decoders=decoders)
        shards = builder.info.splits[split].file_instructions
        return TfrecordReader(shards, parse, remote="://" in str(builder.data_path))
    except NotImplementedError as error:
        raise UserError(
            f"dataset {builder.info.full_name!r} is stored as {builder.info.file_format.value}, "
            "which cannot be read at random; prepare it in another folder: "
            f"{program()} prepare {builder.name} --data_dir=DIR"
        ) from error
    except (ValueError, KeyError, AssertionError) as error:
        suggestion = nearest(split.partition("[")[0], builder.info.splits)
        raise UserError(
            f"dataset {builder.info.full_name!r} has no split {split!r}; {suggestion}"
            f" ({first_line(error)})"
        ) from error


def _stack(values: list, dtype: type | _Class | _MultiHot | _Texts) -> np.ndarray:
    if isinstance(dtype, _Texts):
        texts = np.full((len(values), dtype.limit), b"", object)
        for row, value in enumerate(values):
            own = (value[dtype.field] if dtype.field else value)[: dtype.limit]
            texts[row, : len(own)] = own
        return texts
    if isinstance(dtype, _MultiHot):
        multi_hot = np.zeros((len(values), dtype.num_classes), np.uint8)
        for row, labels in enumerate(values):
            multi_hot[row, np.asarray(labels, np.int64)] = 1
        return multi_hot
    if isinstance(dtype, _Class):
        dtype = np.int32
    if dtype is bytes:
        values = [images.with_end_checked(image) for image in values]
    if dtype in (bytes, object):
        stacked = np.empty(len(values), object)
        stacked[:] = values
        return stacked
    return np.asarray(values, dtype)
