"""Makes batches in host memory from a source, starting at any step.

Every process asks for the rows of the global batch that its devices hold. What is in a row depends
on the step, the row's number and the seed, so the processes agree without talking.
"""

import sys
import weakref
from typing import Protocol

import numpy as np

from vit_jax.data import sampling
from vit_jax.data.prefetch import OrderedPrefetcher, Workers, default_threads
from vit_jax.data.reading import Feed, RawBatch, RecordReader, mask_padding, sample_record
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.plugins import check_known
from vit_jax.types import ArraySpec

NumpyBatch = dict[str, np.ndarray]

BAD_IMAGE_CHOICES = ("fail", "skip")


class Stream(Protocol):
    """An iterator that makes batches and can be closed."""

    def __next__(self) -> NumpyBatch: ...

    def close(self) -> None: ...


class Batches:
    """An iterator of batches. Close it, or use it in a `with` block, to stop its threads."""

    def __init__(self, stream: Stream, reader: RecordReader):
        self._stream = stream
        self._reader = reader
        # Threads do not hold this object, so that dropping it, or leaving Python, stops them.
        self._close = weakref.finalize(self, stream.close)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> NumpyBatch:
        batch = next(self._stream)
        _check_labels(batch, self._reader.source)
        return batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._close()

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Bad images passed over so far, each with its reason; the first hundred of them."""
        return tuple(self._reader.bad_images)

    @property
    def num_bad_images(self) -> int:
        return self._reader.num_bad_images


def train_batches(
    source: Source,
    *,
    batch_size: int,
    rows: np.ndarray,
    seed: int,
    start_step: int = 0,
    stop_step: int = sys.maxsize,
    pp: str = "",
    repeats: int = 1,
    on_bad_image: str = "fail",
    num_threads: int = 0,
    prefetch: int = 2,
    timeout_s: float = 600.0,
) -> Batches:
    """Training batches: those of `start_step`, `start_step + 1`, ... up to `stop_step - 1`.

    Args:
        source: where records come from.
        batch_size: rows of the global batch, over all processes.
        rows: which of them this process holds, in the order wanted; integers `[k]`.
        seed: with the step, decides everything.
        start_step: the first step to yield; starting later costs nothing.
        stop_step: the first step that is neither yielded nor read ahead. Steps count from 0.
        pp: preprocessing, such as `"decode_jpeg_and_inception_crop(224)|flip_lr"`. Empty: records
            are used as they are, without TensorFlow.
        repeats: how often an example appears in its batch (repeated augmentation).
        on_bad_image: `fail`, or `skip` to put another image in the place of a bad one.
        num_threads: threads that read, and as many that decode; 0 for one a core.
        prefetch: batches made ahead; 0 makes each when it is asked for.
        timeout_s: how long a source may be silent before that is an error.

    Yields:
        `image`, `label` and whatever else numeric the records hold, each with leading axis k.

    Raises:
        UserError: an argument is wrong; or, in a batch, a record or label, or the source is silent.
    """
    rows = _checked_rows(rows, batch_size)
    if not 1 <= repeats <= batch_size:
        raise UserError(f"config.data.repeats={repeats}: write 1 to the batch size, {batch_size}")
    check_known(on_bad_image, BAD_IMAGE_CHOICES, f"on_bad_image={on_bad_image!r}")
    workers = Workers(num_threads or default_threads(), prefetch, timeout_s)
    reader = RecordReader(source, seed=seed, skip_bad=on_bad_image == "skip")
    blocks = getattr(source, "blocks", None)

    def load(step: int) -> RawBatch:
        positions = sampling.train_positions(step, batch_size)[rows]
        drawn_at = sampling.repeated_positions(positions, batch_size, repeats)
        if blocks is None:
            indices, _ = sampling.example_at(drawn_at, len(source), seed)
        else:
            distinct = -(-batch_size // repeats)
            indices, _ = sampling.example_in_blocks(drawn_at, distinct, seed, blocks)
        records, indices = reader.read(indices, positions)
        seeds = sampling.augment_seeds(seed, positions)
        return RawBatch(records, indices, positions, seeds, mask=None)

    feed = Feed(load, range(start_step, stop_step), len(rows))
    return _batches(reader, feed, pp, workers)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rows: np.ndarray,
    pp: str = "",
    num_threads: int = 0,
    prefetch: int = 2,
    timeout_s: float = 600.0,
) -> Batches:
    """Every example once, in the source's order: `num_eval_batches` batches for every process.

    Arguments are those of `train_batches`. Each batch also has `mask`, float32 `[k]`: 1 for an
    example, 0 for the zeros that fill up the last batch. A bad image is always an error, because a
    score over fewer images is not the same score.
    """
    rows = _checked_rows(rows, batch_size)
    workers = Workers(num_threads or default_threads(), prefetch, timeout_s)
    reader = RecordReader(source)

    def load(step: int) -> RawBatch:
        positions = sampling.train_positions(step, batch_size)[rows]
        mask = positions < len(source)
        indices = np.where(mask, positions, 0)
        records, indices = reader.read(indices, positions)
        seeds = sampling.augment_seeds(0, positions)
        return RawBatch(records, indices, positions, seeds, mask.astype(np.float32))

    feed = Feed(load, range(num_eval_batches(source, batch_size)), len(rows))
    return _batches(reader, feed, pp, workers)


def num_eval_batches(source: Source, batch_size: int) -> int:
    """Returns the number of batches of `eval_batches`, including the padded last one."""
    return -(-len(source) // batch_size)


def element_spec(source: Source, pp: str = "") -> dict[str, ArraySpec]:
    """Returns the shape, without the batch axis, and the dtype of each array of a training batch.

    Fetches one record and, with a preprocessing string, takes it through the graph.
    """
    if pp:
        from vit_jax.data.graph import output_spec

        return output_spec(source, pp)
    records = _numeric(sample_record(source))
    return {key: ArraySpec(x.shape[1:], x.dtype) for key, x in records.items()}


def _batches(reader: RecordReader, feed: Feed, pp: str, workers: Workers) -> Batches:
    """Returns one iterator over the whole way from raw records to finished batches."""
    if pp:
        from vit_jax.data.graph import PreprocessedStream

        return Batches(PreprocessedStream(reader, feed, pp, workers), reader)

    def finished(step: int) -> NumpyBatch:
        raw = feed.load(step)
        return mask_padding(_numeric(raw.records), raw.mask)

    name = reader.source.fingerprint
    return Batches(OrderedPrefetcher(finished, iter(feed.steps), workers, name), reader)


def _numeric(records: NumpyBatch) -> NumpyBatch:
    """Returns the arrays that can go to a device; text such as file names stays behind."""
    if records["image"].dtype == object:
        raise UserError(
            "images of this source are encoded: begin the preprocessing with 'decode' or "
            "'decode_jpeg_and_inception_crop(SIZE)'"
        )
    return {key: x for key, x in records.items() if x.dtype.kind in "biuf"}


def _check_labels(batch: NumpyBatch, source: Source) -> None:
    """Raises a `UserError` for a label that is no class, which would be learned as none of them."""
    classes, labels = source.num_classes, batch.get("label")
    if not classes:
        return
    if labels is None:  # Otherwise the classes are those of images, and objects may have others.
        objects = batch.get("box_label")  # Unused slots have -1.
        if objects is not None and (objects >= classes).any():
            raise UserError(
                f"{source.fingerprint}: label {objects[objects >= classes][0]} of an object is none"
                f" of its {classes:,} classes; write labels from 0 to {classes - 1:,}"
            )
        return
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        return
    if odd := labels[(labels < 0) | (labels >= classes)].tolist():
        raise UserError(
            f"{source.fingerprint}: label {odd[0]} of an image is none of its {classes:,} classes;"
            f" write labels from 0 to {classes - 1:,}, or drop those of all images by"
            " keep('image') at the end of the preprocessing"
        )


def _checked_rows(rows: np.ndarray, batch_size: int) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or len(rows) == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows must be numbers from 0 to {batch_size - 1}, got {rows}")
    return rows
