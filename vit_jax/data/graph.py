"""Preprocessing with tf.data: decodes and augments, one example a call, several at a time.

Records are fetched in Python, a batch at a time, and handed to the graph; the graph's threads are
its own. An example that cannot be decoded is an error, or, where bad ones are to be skipped, left
out by the graph, which goes on: rows carry their number, so that the gap is seen and filled with
another example. Nothing is remembered of bad examples, so that a batch stays a pure function of its
step.
"""

import collections
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import Batched
from vit_jax.data.prefetch import OrderedPrefetcher, Workers
from vit_jax.data.reading import Feed, RawBatch, RecordReader, mask_padding, sample_record
from vit_jax.data.sources import Records, Source
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec

_MAX_SAMPLES = 20
# Batches fetched ahead, still encoded, where a batch may have to wait for a whole file.
_BLOCK_READ_AHEAD = 16
# Examples that a compiled loop over images takes at once, but no more than a batch has.
_TOGETHER = 16
# Batches, over those that the graph holds when all is well, that may be lost to bad examples before
# the graph ends: it would go on for ever where preprocessing fits no example.
_MAX_LOST = 8
_SEED = "augment_seed"
"""Field that carries the key of an example through the graph."""
_ROW = "stream_row"
"""Field that carries the number of an example, from 0 at each start of the graph."""


def output_spec(source: Source, pp: str) -> dict[str, ArraySpec]:
    """Finds the output of preprocessing for a source's records, from the first that works."""
    example = _example_function(sample_record(source), pp)
    vocabularies = preprocessing.vocabularies(pp)
    for index in range(min(_MAX_SAMPLES, len(source))):
        try:
            record = {key: tf.constant(x[0]) for key, x in source.fetch(np.array([index])).items()}
            outputs = example(record | {_SEED: tf.zeros([2], tf.int32)})
        except (OSError, tf.errors.OpError) as error:
            failure = f"{source.describe(index)}: {_reason(error)}"
            continue
        return {
            key: ArraySpec(
                tuple(x.shape), np.dtype(x.dtype.as_numpy_dtype), vocabularies.get(key, "")
            )
            for key, x in outputs.items()
        }
    raise UserError(f"preprocessing {pp!r} fails on every image, the last tried is {failure}")


class _Piece(NamedTuple):
    """Some finished rows of a batch."""

    rows: np.ndarray
    """Their numbers, ascending, int64 [k]."""
    outputs: dict[str, np.ndarray]

    def cut(self, start: int | None, stop: int | None) -> "_Piece":
        part = slice(start, stop)
        return _Piece(self.rows[part], {key: x[part] for key, x in self.outputs.items()})


class _Run:
    """One start of the graph: the batches in flight from a step on."""

    def __init__(self, step: int, raw_batches: OrderedPrefetcher):
        self.step = step
        """The step whose batch comes next."""
        self.raw_batches = raw_batches
        self.in_flight: collections.deque[RawBatch] = collections.deque()
        self.error: Exception | None = None
        """The error that ended the reading of records, raised after the batches before it."""
        self.outputs: Iterator = iter(())
        self.next_row = 0
        """The number of the first row of the batch that comes next."""
        self.left: _Piece | None = None
        """The rows that the graph has finished of the batches after the last."""
        self.is_full = False
        """True if the graph was ended because it held too many batches."""

    def end(self) -> None:
        """Stops reading, and lets go of the graph, whose generator in turn holds this object.

        What has been read is still made: when its iterator goes, TensorFlow waits for the compiled
        loops that are running, and where that is as late as Python's own end, they never return.
        """
        self.raw_batches.close()
        exhaust(self.outputs)
        self.outputs = iter(())


def exhaust(outputs: Iterator) -> None:
    """Takes what is left of a finite graph's outputs, bad examples or not."""
    while True:
        try:
            next(outputs)
        except (StopIteration, tf.errors.CancelledError):
            return
        except tf.errors.OpError:
            continue


class PreprocessedStream:
    """Iterates over the batches of a feed, preprocessed.

    The graph's iterator is driven by a thread of its own, so that Ctrl-C reaches a waiting caller.
    """

    def __init__(
        self,
        reader: RecordReader,
        feed: Feed,
        pp: str,
        workers: Workers,
    ):
        self._reader = reader
        self._feed = feed
        self._pp = pp
        self._workers = workers
        self._closed = False
        self._run: _Run | None = None
        sample = sample_record(reader.source)
        self._example = _example_function(sample, pp)
        self._dataset = self._build_dataset(sample)
        one_ahead = Workers(1, min(1, workers.prefetch), workers.timeout_s)
        self._batches = OrderedPrefetcher(
            self._batch, iter(feed.steps), one_ahead, reader.source.fingerprint
        )

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def close(self) -> None:
        self._closed = True
        run = self._run
        if run:
            run.raw_batches.close()
        self._batches.close()
        if run:
            run.end()

    def _build_dataset(self, sample: Records) -> tf.data.Dataset:
        """Fetched batches, taken apart, preprocessed, put together again in the same order."""
        signature = {
            key: tf.TensorSpec([self._feed.num_rows, *x.shape[1:]], _graph_dtype(x))
            for key, x in sample.items()
        }
        signature[_SEED] = tf.TensorSpec([self._feed.num_rows, 2], tf.int32)
        signature[_ROW] = tf.TensorSpec([self._feed.num_rows], tf.int64)
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = self._workers.num_threads
        options.threading.max_intra_op_parallelism = 1  # One example a thread is enough.

        examples = tf.data.Dataset.from_generator(
            self._raw_batches, output_signature=signature
        ).unbatch()
        self._num_mapped = 0  # Examples that are somewhere in the maps below, at most.
        *stages, last = preprocessing.stages(self._pp)
        for stage in stages:
            examples = self._together(*self._mapped(stage, examples)).unbatch()
        examples, kernels = self._mapped(_then_for_device(last, self._pp), examples)
        if kernels:
            batches = self._together(examples, kernels)
            batches = batches.rebatch(self._feed.num_rows, drop_remainder=True)
        else:
            batches = examples.batch(self._feed.num_rows, drop_remainder=True)
        return batches.prefetch(max(1, self._workers.prefetch)).with_options(options)

    def _mapped(self, stage: Callable, examples: tf.data.Dataset) -> tuple[tf.data.Dataset, dict]:
        """Returns the examples after a stage, and by field the kernels left for batches."""
        kernels: dict[str, Callable] = {}

        @tf.autograph.experimental.do_not_convert
        def preprocess(record: dict[str, tf.Tensor]) -> dict[str, Any]:
            fields = dict(record)
            own = {key: fields.pop(key) for key in (_SEED, _ROW)}
            made = stage(fields, own[_SEED])
            for key, x in made.items():
                if not isinstance(x, Batched):
                    continue
                if all(argument.shape.is_fully_defined() for argument in x.arguments):
                    kernels[key], made[key] = x
                else:
                    made[key] = x.apply_alone()
            return made | own

        num_threads = self._workers.num_threads
        self._num_mapped += num_threads
        examples = examples.map(preprocess, num_parallel_calls=num_threads)
        return (examples.ignore_errors() if self._reader.skip_bad else examples), kernels

    def _together(self, examples: tf.data.Dataset, kernels: dict) -> tf.data.Dataset:
        """Returns the examples in small batches, with the kernels applied."""

        @tf.autograph.experimental.do_not_convert
        def apply(record: dict[str, Any]) -> dict[str, tf.Tensor]:
            made = {key: Batched(kernel, record[key]).apply() for key, kernel in kernels.items()}
            return record | made

        num_threads, num_together = self._workers.num_threads, min(_TOGETHER, self._feed.num_rows)
        self._num_mapped += num_together * num_threads
        return examples.batch(num_together).map(apply, num_parallel_calls=num_threads)

    def _raw_batches(self) -> Iterator[Records]:
        """Feeds the graph. Runs on one of its threads, once for every start."""
        run = self._run
        assert run is not None
        try:
            for number, raw in enumerate(run.raw_batches):
                run.in_flight.append(raw)
                rows = np.arange(len(raw.indices)) + number * len(raw.indices)
                yield raw.records | {_SEED: raw.seeds, _ROW: rows}
                run.is_full = len(run.in_flight) >= self._max_in_flight()
                if run.is_full:
                    return
        except Exception as error:
            run.error = error

    def _max_in_flight(self) -> int:
        in_map = self._num_mapped // self._feed.num_rows
        # Where three of four examples are bad, a batch of the graph is made of four.
        return 4 * max(1, self._workers.prefetch) + in_map + _MAX_LOST

    def _start(self, step: int) -> _Run:
        """Starts the graph, or starts it again, so that the batch of `step` comes next."""
        if self._run:
            self._run.end()
        steps = iter(range(step, self._feed.steps.stop))
        source = self._reader.source
        workers = self._workers
        if getattr(source, "blocks", None):
            workers = workers._replace(prefetch=max(workers.prefetch, _BLOCK_READ_AHEAD))
        raw_batches = OrderedPrefetcher(self._feed.load, steps, workers, source.fingerprint)
        self._run = _Run(step, raw_batches)
        self._run.outputs = self._dataset.as_numpy_iterator()  # Which does not copy.
        return self._run

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        """The finished batch of `step`. Called for one step after the other."""
        run = self._run
        if run is None or run.step != step or (run.is_full and not run.in_flight):
            run = self._start(step)
        pieces = self._pieces(run)
        if self._closed or not run.in_flight:
            raise RuntimeError("the stream of batches was closed")
        raw = run.in_flight[0]
        done = np.concatenate([piece.rows for piece in pieces] or [np.empty(0)])
        missing = np.setdiff1d(np.arange(self._feed.num_rows), done)
        pieces += [self._single(raw, row) for row in missing.tolist()]
        run.in_flight.popleft()
        run.step += 1
        run.next_row += self._feed.num_rows
        return mask_padding(self._joined(pieces), raw.mask)

    def _pieces(self, run: _Run) -> list[_Piece]:
        """Returns the graph's rows of the batch that comes next, counted from its first row."""
        stop = run.next_row + self._feed.num_rows
        pieces: list[_Piece] = []
        while True:
            piece = run.left or self._next_piece(run)
            if piece is None:
                return pieces
            inside = int(np.searchsorted(piece.rows, stop))
            run.left = piece.cut(inside, None) if inside < len(piece.rows) else None
            if inside:
                ours = piece.cut(None, inside)
                pieces.append(ours._replace(rows=ours.rows - run.next_row))
            if run.left or piece.rows[-1] == stop - 1:
                return pieces

    def _next_piece(self, run: _Run) -> _Piece | None:
        """The next rows that the graph finishes; None at its end, with batches still to be made."""
        try:
            outputs = dict(next(run.outputs))
        except StopIteration:
            if run.error and not run.in_flight:
                raise run.error from None
            return None
        except tf.errors.OpError as error:
            if not self._reader.skip_bad:
                self._fail(run.in_flight[0])
            raise self._no_batch(_reason(error)) from None
        del outputs[_SEED]
        return _Piece(outputs.pop(_ROW), outputs)

    def _fail(self, raw: RawBatch) -> None:
        """Raises a `UserError` for the first example of a batch that cannot be preprocessed."""
        for row in range(self._feed.num_rows):
            self._single(raw, row)

    def _single(self, raw: RawBatch, row: int) -> _Piece:
        """A row of a batch, made outside of the graph, of the first example that is not bad."""
        index, position = raw.indices[row : row + 1], raw.positions[row : row + 1]
        records = {key: x[row : row + 1] for key, x in raw.records.items()}
        while True:
            record = {key: tf.constant(x[0]) for key, x in records.items()}
            try:
                outputs = self._example(record | {_SEED: tf.constant(raw.seeds[row])})
            except tf.errors.OpError as error:
                instead = self._reader.report_bad(int(index[0]), int(position[0]), _reason(error))
                records, index = self._reader.read(np.array([instead]), position)
                continue
            return _Piece(np.array([row]), {key: x.numpy()[None] for key, x in outputs.items()})

    def _joined(self, pieces: list[_Piece]) -> dict[str, np.ndarray]:
        """The whole batch; not copied where the graph made it in one piece."""
        if len(pieces) == 1:
            return pieces[0].outputs
        joined = {}
        for key, first in pieces[0].outputs.items():
            joined[key] = np.empty((self._feed.num_rows, *first.shape[1:]), first.dtype)
            for piece in pieces:
                x = piece.outputs[key]
                if x.shape[1:] != first.shape[1:]:
                    raise self._no_batch(f"{key}: {first.shape[1:]} and {x.shape[1:]}")
                joined[key][piece.rows] = x
        return joined

    def _no_batch(self, reason: str) -> UserError:
        return UserError(
            f"the images that preprocessing {self._pp!r} makes do not form a batch; end it "
            f"with a resize or crop to a fixed size ({reason})"
        )


def _example_function(sample: Records, pp: str) -> Callable:
    """The graph that preprocesses one record; its argument carries the key as a field.

    Raises:
        UserError: the string does not fit the records.
    """
    preprocess = _then_for_device(preprocessing.build(pp), pp)

    def example(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        fields = dict(record)
        return preprocess(fields, fields.pop(_SEED))

    signature = {
        key: tf.TensorSpec(x.shape[1:], _graph_dtype(x), name=key) for key, x in sample.items()
    }
    signature[_SEED] = tf.TensorSpec([2], tf.int32, name=_SEED)
    function = tf.function(example, input_signature=[signature], autograph=False)
    function.get_concrete_function()
    return function


def _then_for_device(stage: Callable, pp: str) -> Callable:
    """The last stage of `pp`, or all of it, leaving only what can go to a device."""

    def for_device(record: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, Any]:
        outputs = {}
        for key, x in stage(record, seed).items():
            if isinstance(x, Batched):
                outputs[key] = x
            elif x.dtype != tf.string:  # File names and the like stay behind.
                outputs[key] = tf.cast(x, _DEVICE_DTYPES.get(x.dtype, x.dtype))
            elif key == "image":
                raise UserError(f"preprocessing {pp!r} leaves images encoded: add 'decode'")
        return outputs

    return for_device


# What 64-bit values become: devices compute in 32 bits.
_DEVICE_DTYPES = {tf.int64: tf.int32, tf.float64: tf.float32}


def _graph_dtype(x: np.ndarray) -> tf.DType:
    return tf.string if x.dtype.kind in "OSU" else tf.as_dtype(x.dtype)


def _reason(error: Exception) -> str:
    """An error's message, without the nodes and the stack that TensorFlow puts around it."""
    message = getattr(error, "message", str(error))
    text = re.sub(r"{{.*?}}|\[\[.*?\]\]|\[Op:.*?\].*", "", message, flags=re.DOTALL)
    text = re.sub(r".*\(most recent call last\):(\s*File .*?, in \S+)*", "", text, flags=re.DOTALL)
    return " ".join(text.split())
