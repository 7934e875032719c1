"""Several views of one image, such as the crops of multi-crop training."""

from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import random_record_op
from vit_jax.errors import UserError

Record = dict[str, tf.Tensor]


@random_record_op
def views(record: Record, seed: tf.Tensor, key_result: str, count: int, pp: str) -> Record:
    """Adds `count` views of the image, `[count, height, width, channels]`, as `key_result`.

    Each view is the image after the ops of the preprocessing string `pp`, with a key of its own:
    view i of an example depends on the seed, the example's position in the stream, and i. The field
    `image` stays as it was. Several crops that differ in size or in strength are several calls, as
    in multi-crop (Caron et al., 2020, SwAV, section 3.2).
    """
    if count < 1:
        raise UserError(f"count={count}: write 1 or more")
    prepare = preprocessing.build(pp)
    keys = tf.unstack(tf.random.split(seed, count))
    return record | {key_result: tf.stack([prepare(record, key)["image"] for key in keys])}
