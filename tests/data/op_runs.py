"""Preprocessing strings, run as training runs them."""

from pathlib import Path

import sampled

from vit_jax.data import pp

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = sampled.load(GOLDEN / "big_vision/pp.npz")


def apply(spec, record, seed=(1, 2)):
    """Runs a preprocessing string inside a tf.data graph, as training does."""
    from vit_jax.data.host_tensorflow import tf

    preprocess = pp.build(spec)
    dataset = tf.data.Dataset.from_tensors({key: tf.constant(x) for key, x in record.items()})
    dataset = dataset.map(lambda record: preprocess(record, tf.constant(seed, tf.int32)))
    return next(iter(dataset.as_numpy_iterator()))


def apply_to_image(spec, image, seed=(1, 2)):
    return apply(spec, {"image": image}, seed)["image"]


def draw(spec, image, count):
    """`count` results of a random string on one image, under different keys."""
    from vit_jax.data.host_tensorflow import tf

    preprocess, image = pp.build(spec), tf.constant(image)
    dataset = tf.data.Dataset.range(count).map(
        lambda n: preprocess({"image": image}, tf.stack([tf.cast(n, tf.int32), 7]))["image"]
    )
    return list(dataset.as_numpy_iterator())
