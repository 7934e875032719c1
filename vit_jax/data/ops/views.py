"""Several views of one image, such as the crops of multi-crop training."""

from vit_jax.data import pp as preprocessing
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import Batched, random_record_op
from vit_jax.errors import UserError

Record = dict[str, tf.Tensor]


@random_record_op
def views(record: Record, seed: tf.Tensor, key_result: str, count: int, pp: str) -> Record:
    """Adds `count` views of the image, `[count, height, width, channels]`, as `key_result`.

    Each view is the image after the ops of the preprocessing string `pp`, with a key of its own:
    view i of an example depends on the seed, the example's position in the stream, and i. The field
    `image` stays as it was. Several crops that differ in size are several calls, as in multi-crop
    (Caron et al., 2020, SwAV, section 3.2). Views of a name that is there already are appended, so
    that crops of one size may differ in their other ops, as in DINO.
    """
    if count < 1:
        raise UserError(f"count={count}: write 1 or more")
    keys = tf.unstack(tf.random.split(seed, count))
    made = [record] * count
    for stage in preprocessing.stages(pp):
        made = _computed([stage(one, key) for one, key in zip(made, keys, strict=True)])
    images = tf.stack([one["image"] for one in made])
    there = [record[key_result]] if key_result in record else []
    return record | {key_result: tf.concat([*there, images], 0)}


def _computed(records: list[Record]) -> list[Record]:
    """Returns the records with the images of each field that are left to a kernel.

    One call computes the images of all records where they have one known shape, because each call
    of Python takes the global lock.
    """
    images = {key: [one[key] for one in records] for key in records[0]}
    for key, batched in images.items():
        if not isinstance(batched[0], Batched):
            continue
        kernel, arguments = batched[0]
        shapes = {tuple(map(str, (x.shape for x in one.arguments))) for one in batched}
        if len(shapes) == 1 and all(x.shape.is_fully_defined() for x in arguments):
            stacked = tuple(map(tf.stack, zip(*(one.arguments for one in batched), strict=True)))
            images[key] = tf.unstack(Batched(kernel, stacked).apply())
        else:
            images[key] = [one.apply_alone() for one in batched]
    return [dict(zip(images, row, strict=True)) for row in zip(*images.values(), strict=True)]
