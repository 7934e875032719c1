"""From a source to batches in host memory, starting at any step.

Every process asks for the rows of the global batch that its devices hold. What is in a row depends
on the step, the row's number and the seed, so the processes agree without talking.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from vit_jax.data import sampling
from vit_jax.data.prefetch import OrderedPrefetcher, Workers
from vit_jax.data.reading import RawBatch, RecordReader
from vit_jax.data.sources import Source
from vit_jax.errors import UserError, nearest
from vit_jax.types import ArraySpec

NumpyBatch = dict[str, np.ndarray]

BAD_IMAGE_CHOICES = ("fail", "skip")


class Stream(Protocol):
    """What makes the batches: an iterator that can be closed."""

    def __next__(self) -> NumpyBatch: ...

    def close(self) -> None: ...


class Batches:
    """An iterator of batches. Close it, or use it in a `with` block, to stop its threads."""

    def __init__(self, stream: Stream, reader: RecordReader):
        self._stream = stream
        self._reader = reader

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> NumpyBatch:
        return next(self._stream)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

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
    pp: str = "",
    repeats: int = 1,
    blocks: sampling.BlockShuffle | None = None,
    on_bad_image: str = "fail",
    num_threads: int = 4,
    prefetch: int = 2,
    timeout_s: float = 600.0,
) -> Batches:
    """Endless training batches: those of `start_step`, `start_step + 1`, ...

    Args:
        source: where records come from.
        batch_size: rows of the global batch, over all processes.
        rows: which of them this process holds, in the order wanted; integers `[k]`.
        seed: with the step, decides everything.
        start_step: the first step to yield; starting later costs nothing.
        pp: preprocessing, such as `"decode_jpeg_and_inception_crop(224)|flip_lr"`. Empty: records
            are used as they are, without TensorFlow.
        repeats: how often an example appears in its batch (repeated augmentation).
        blocks: shuffle by blocks, for object stores; None permutes single records.
        on_bad_image: `fail`, or `skip` to put another image in the place of a bad one.
        num_threads: threads that read, and as many that decode.
        prefetch: batches made ahead; 0 makes each when it is asked for.
        timeout_s: how long a source may be silent before that is an error.

    Yields:
        `image`, `label` and whatever else numeric the records hold, each with leading axis k.
    """
    rows = _checked_rows(rows, batch_size)
    if repeats < 1 or batch_size % repeats:
        raise UserError(f"repeats={repeats} must divide the batch size {batch_size}")
    if on_bad_image not in BAD_IMAGE_CHOICES:
        raise UserError(
            f"on_bad_image={on_bad_image!r}; {nearest(on_bad_image, BAD_IMAGE_CHOICES)}"
        )
    reader = RecordReader(source, seed=seed, skip_bad=on_bad_image == "skip")

    def load(step: int) -> RawBatch:
        positions = sampling.train_positions(step, batch_size)[rows]
        drawn_at = sampling.repeated_positions(positions, batch_size, repeats)
        indices, _ = sampling.example_at(drawn_at, len(source), seed, blocks)
        records, indices = reader.read(indices, positions)
        seeds = sampling.augment_seeds(seed, positions)
        return RawBatch(records, indices, positions, seeds, mask=None)

    steps = itertools.count(start_step)
    return _batches(reader, load, steps, pp, Workers(num_threads, prefetch, timeout_s))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rows: np.ndarray,
    pp: str = "",
    num_threads: int = 4,
    prefetch: int = 2,
    timeout_s: float = 600.0,
) -> Batches:
    """Every example once, in the source's order: `num_eval_batches` batches for every process.

    Arguments are those of `train_batches`. Each batch also has `mask`, float32 `[k]`: 1 for an
    example, 0 for the zeros that fill up the last batch. A bad image is always an error, because a
    score over fewer images is not the same score.
    """
    rows = _checked_rows(rows, batch_size)
    reader = RecordReader(source)

    def load(step: int) -> RawBatch:
        positions = sampling.train_positions(step, batch_size)[rows]
        mask = positions < len(source)
        indices = np.where(mask, positions, 0)
        records, indices = reader.read(indices, positions)
        seeds = sampling.augment_seeds(0, positions)
        return RawBatch(records, indices, positions, seeds, mask.astype(np.float32))

    steps = iter(range(num_eval_batches(source, batch_size)))
    return _batches(reader, load, steps, pp, Workers(num_threads, prefetch, timeout_s))


def num_eval_batches(source: Source, batch_size: int) -> int:
    """How many batches `eval_batches` yields, the padded last one included."""
    return -(-len(source) // batch_size)


def element_spec(source: Source, pp: str = "") -> dict[str, ArraySpec]:
    """Shape (batch axis left out) and dtype of every array of a training batch.

    Fetches one record; with a preprocessing string its graph is traced but not run.
    """
    records = source.fetch(np.zeros(1, np.int64))
    if pp:
        from vit_jax.data.graph import output_spec

        return output_spec(records, pp)
    return {key: ArraySpec(x.shape[1:], x.dtype) for key, x in _numeric(records).items()}


def _batches(
    reader: RecordReader,
    load: Callable[[int], RawBatch],
    steps: Iterator[int],
    pp: str,
    workers: Workers,
) -> Batches:
    """Puts the way from raw records to finished batches behind one iterator."""
    if pp:
        from vit_jax.data.graph import PreprocessedStream

        stream = PreprocessedStream(reader, load, steps, pp, workers)
        return Batches(stream, reader)

    def finished(step: int) -> NumpyBatch:
        raw = load(step)
        return mask_padding(_numeric(raw.records), raw.mask)

    return Batches(OrderedPrefetcher(finished, steps, workers, reader.source.fingerprint), reader)


def mask_padding(batch: NumpyBatch, mask: np.ndarray | None) -> NumpyBatch:
    """Zeroes the rows that are padding and adds `mask`; nothing where there is no mask."""
    if mask is None:
        return batch
    if not mask.all():
        batch = {key: x.copy() for key, x in batch.items()}
        for x in batch.values():
            x[mask == 0] = 0
    return batch | {"mask": mask}


def _numeric(records: NumpyBatch) -> NumpyBatch:
    """What can go to a device: text such as file names stays behind."""
    if records["image"].dtype == object:
        raise UserError(
            "images of this source are encoded: begin the preprocessing with 'decode' or "
            "'decode_jpeg_and_inception_crop(SIZE)'"
        )
    return {key: x for key, x in records.items() if x.dtype.kind in "biuf"}


def _checked_rows(rows: np.ndarray, batch_size: int) -> np.ndarray:
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or len(rows) == 0 or rows.min() < 0 or rows.max() >= batch_size:
        raise ValueError(f"rows must be numbers from 0 to {batch_size - 1}, got {rows}")
    return rows
