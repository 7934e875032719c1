"""Preprocessing with tf.data: decodes and augments, one example a call, several at a time.

Records are fetched in Python, a batch at a time, and handed to the graph; the graph's threads are
its own. Because a batch is a pure function of its step, an example that cannot be decoded is dealt
with by finding it, replacing it and starting the graph again at the same step.
"""

import collections
import re
from collections.abc import Callable, Iterator

import numpy as np

from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.prefetch import OrderedPrefetcher, Workers
from vit_jax.data.reading import Feed, RawBatch, RecordReader, mask_padding, sample_record
from vit_jax.data.sources import Records, Source
from vit_jax.errors import UserError
from vit_jax.types import ArraySpec

_MAX_SAMPLES = 20
# Batches fetched ahead, still encoded, where a batch may have to wait for a whole file.
_BLOCK_READ_AHEAD = 16
_SEED = "augment_seed"
"""Field that carries the key of an example through the graph."""


def output_spec(source: Source, pp: str) -> dict[str, ArraySpec]:
    """What preprocessing makes of a source's records, found out with the first that works."""
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


class _Run:
    """One start of the graph: the batches in flight from a step on."""

    def __init__(self, step: int, raw_batches: OrderedPrefetcher):
        self.step = step
        """The step whose batch comes next."""
        self.raw_batches = raw_batches
        self.in_flight: collections.deque[RawBatch] = collections.deque()
        self.error: Exception | None = None
        """What ended the reading of records, to be raised after the batches before it."""
        self.outputs: Iterator = iter(())

    def end(self) -> None:
        """Stops reading, and lets go of the graph, whose generator in turn holds this object."""
        self.raw_batches.close()
        self.outputs = iter(())


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
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = self._workers.num_threads
        options.threading.max_intra_op_parallelism = 1  # One example a thread is enough.
        preprocess = tf.autograph.experimental.do_not_convert(self._example)
        return (
            tf.data.Dataset.from_generator(self._raw_batches, output_signature=signature)
            .unbatch()
            .map(preprocess, num_parallel_calls=self._workers.num_threads)
            .batch(self._feed.num_rows, drop_remainder=True)
            .prefetch(max(1, self._workers.prefetch))
            .with_options(options)
        )

    def _raw_batches(self) -> Iterator[Records]:
        """Feeds the graph. Runs on one of its threads, once for every start."""
        run = self._run
        try:
            for raw in run.raw_batches:
                run.in_flight.append(raw)
                yield raw.records | {_SEED: raw.seeds}
        except Exception as error:
            run.error = error

    def _start(self, step: int) -> None:
        """(Re)starts the graph so that the batch of `step` comes next."""
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

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        """The finished batch of `step`. Called for one step after the other."""
        while not self._closed:
            if self._run is None or self._run.step != step:
                self._start(step)
            run = self._run
            try:
                outputs = next(run.outputs)
            except StopIteration:
                if run.error:
                    raise run.error from None
                break
            except tf.errors.OpError as error:
                self._replace_bad(run.in_flight[0], error)
                self._start(step)
                continue
            run.step += 1
            mask = run.in_flight.popleft().mask
            return mask_padding(outputs, mask)
        raise RuntimeError("the stream of batches was closed")

    def _replace_bad(self, raw: RawBatch, error: Exception) -> None:
        """Finds the examples on which the graph failed, and reports each."""
        reasons = {}
        for row, seed in enumerate(raw.seeds):
            record = {key: tf.constant(x[row]) for key, x in raw.records.items()}
            try:
                self._example(record | {_SEED: tf.constant(seed)})
            except tf.errors.OpError as failure:
                reasons[row] = _reason(failure)
        if not reasons:
            raise UserError(
                f"the images that preprocessing {self._pp!r} makes do not form a batch; end it "
                f"with a resize or crop to a fixed size ({_reason(error)})"
            )
        for row, reason in reasons.items():
            self._reader.report_bad(int(raw.indices[row]), int(raw.positions[row]), reason)


def _example_function(sample: Records, pp: str) -> Callable:
    """The graph that preprocesses one record; its argument carries the key as a field.

    Raises:
        UserError: the string does not fit the records.
    """
    preprocess = preprocessing.build(pp)

    def example(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        fields = dict(record)
        seed = fields.pop(_SEED)
        outputs = {}
        for key, x in preprocess(fields, seed).items():
            if x.dtype == tf.string:
                if key == "image":
                    raise UserError(f"preprocessing {pp!r} leaves images encoded: add 'decode'")
                continue  # File names and the like cannot go to a device.
            outputs[key] = tf.cast(x, _DEVICE_DTYPES.get(x.dtype, x.dtype))
        return outputs

    signature = {
        key: tf.TensorSpec(x.shape[1:], _graph_dtype(x), name=key) for key, x in sample.items()
    }
    signature[_SEED] = tf.TensorSpec([2], tf.int32, name=_SEED)
    function = tf.function(example, input_signature=[signature], autograph=False)
    function.get_concrete_function()
    return function


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
