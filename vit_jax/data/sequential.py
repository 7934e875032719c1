"""TFRecord files read from the front, as most tf.data pipelines do it: to measure ours against.

Nothing of ours is in it but the preprocessing: no order of its own, no resuming, no other sources.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from vit_jax.data import pp as preprocessing
from vit_jax.data.sources import Source

_WARM_UP = 3
"""Batches before the clock starts: they fill buffers."""

_IN_THE_MAKING = 4
"""Batches after the last that is timed: tf.data works ahead, to the end as from the start."""

_NUM_IMAGES = 512
"""Written once, and read over and over."""


def seconds_for(source: Source, pp: str, batch_size: int, batches: int, cores: int) -> float:
    """Seconds that sequential reading takes for `batches` of a source's images, preprocessed."""
    from vit_jax.data.graph import exhaust
    from vit_jax.data.host_tensorflow import tf

    preprocess = preprocessing.build(pp)
    features = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def example(number: tf.Tensor, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        record = tf.io.parse_single_example(serialized, features)
        return preprocess(record, tf.stack([0, tf.cast(number, tf.int32)]))

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "images.tfrecord")
        _write(source, path)
        num_examples = (_WARM_UP + batches + _IN_THE_MAKING) * batch_size
        dataset = tf.data.TFRecordDataset(path).repeat().enumerate().take(num_examples)
        dataset = dataset.map(example, num_parallel_calls=cores)
        dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2).with_options(options)
        stream = dataset.as_numpy_iterator()
        for _ in range(_WARM_UP):
            next(stream)
        started = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - started
        exhaust(stream)
        return seconds


def _write(source: Source, path: str) -> None:
    from vit_jax.data.host_tensorflow import tf

    with tf.io.TFRecordWriter(path) as writer:
        for index in range(_NUM_IMAGES):
            record = source.fetch(np.array([index % len(source)]))
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[record["image"][0]]))
            label = tf.train.Feature(int64_list=tf.train.Int64List(value=[record["label"][0]]))
            features = tf.train.Features(feature={"image": image, "label": label})
            writer.write(tf.train.Example(features=features).SerializeToString())
