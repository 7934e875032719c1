"""tf.data on a TFRecord file that is read from the front, as most tf.data pipelines read it.

`tfrecord_loader.py FOLDER PP BATCH_SIZE`, served by `serving`. Of this project it uses the
preprocessing alone: there is no shuffling, no resuming, no other source.
"""

import os
import time
from pathlib import Path
from typing import Any

from serving import WARM_UP, Timed, main

from vit_jax.data import pp as preprocessing

_UNDER_WAY = 4
"""Batches after the last that is timed: tf.data works ahead, to the end as from the start."""


def prepare(folder: str, pp: str, batch_size: str) -> Timed:
    """Writes the files of the folder into one TFRecord file; returns a function that times it."""
    from vit_jax.data.host_tensorflow import tf

    path = str(Path(folder).with_suffix(".tfrecord"))
    with tf.io.TFRecordWriter(path) as writer:
        for file in sorted(Path(folder).iterdir()):
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[file.read_bytes()]))
            label = tf.train.Feature(int64_list=tf.train.Int64List(value=[0]))
            features = tf.train.Features(feature={"image": image, "label": label})
            writer.write(tf.train.Example(features=features).SerializeToString())

    def seconds_for(batches: int) -> float:
        stream = _dataset(path, pp, int(batch_size), batches).as_numpy_iterator()
        for _ in range(WARM_UP):
            next(stream)
        started = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = time.perf_counter() - started
        for _ in stream:  # A graph that is dropped while it runs can hold the process up.
            pass
        return seconds

    return seconds_for


def _dataset(path: str, pp: str, batch_size: int, batches: int) -> Any:
    from vit_jax.data.host_tensorflow import tf

    cores = len(os.sched_getaffinity(0))
    preprocess = preprocessing.build(pp)
    spec = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def example(number: Any, serialized: Any) -> dict[str, Any]:
        record = tf.io.parse_single_example(serialized, spec)
        return preprocess(record, tf.stack([0, tf.cast(number, tf.int32)]))

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    num_examples = (WARM_UP + batches + _UNDER_WAY) * batch_size
    dataset = tf.data.TFRecordDataset(path).repeat().enumerate().take(num_examples)
    dataset = dataset.map(example, num_parallel_calls=cores)
    return dataset.batch(batch_size, drop_remainder=True).prefetch(2).with_options(options)


if __name__ == "__main__":
    main(prepare)
