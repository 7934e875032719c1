"""Ops on the whole record: one-hot labels, and the selection of fields."""

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import MissingField, record_op
from vit_jax.errors import UserError, nearest

Record = dict[str, tf.Tensor]


@record_op
def onehot(
    record: Record,
    depth: int,
    key: str = "labels",
    key_result: str | None = None,
    multi: bool = True,
    *,
    on: float = 1.0,
    off: float = 0.0,
) -> Record:
    """Converts labels to float32 vectors of length `depth`: `on` at the labels, `off` elsewhere.

    Several labels give one vector with `on` at all of them, or one row each with `multi=False`. A
    label out of range gives `off` everywhere.
    """
    vectors = tf.one_hot(field(record, key), depth, on, off)
    if multi and vectors.shape.ndims == 2:
        vectors = tf.reduce_max(vectors, axis=0)
    return record | {key_result or key: vectors}


@record_op
def keep(record: Record, *keys: str) -> Record:
    """Drops all fields except these."""
    return _with_content(record, {key: field(record, key) for key in keys})


@record_op
def drop(record: Record, *keys: str) -> Record:
    """Drops these fields."""
    for key in keys:
        field(record, key)
    return _with_content(record, {key: x for key, x in record.items() if key not in keys})


@record_op
def copy(record: Record, inkey: str, outkey: str) -> Record:
    """Copies the field `inkey` to the name `outkey`."""
    return record | {outkey: field(record, inkey)}


def _with_content(before: Record, after: Record) -> Record:
    """Returns `after`. Raises `UserError` if it keeps boxes but drops an existing field `content`.

    The boxes of a padded image refer to the image without its padding (`joint_fit`), so they cannot
    be used without `content`.
    """
    if "boxes" in after and "content" in before and "content" not in after:
        names = ", ".join(repr(key) for key in [*after, "content"])
        raise UserError(
            "boxes without 'content' would lie in the wrong place of an image that joint_fit"
            f" padded; write keep({names})"
        )
    return after


def field(record: Record, key: str) -> tf.Tensor:
    """Returns a field of a record. Raises `MissingField` if the record has no such field."""
    if key not in record:
        raise MissingField(f"records have no field {key!r}; {nearest(key, record)}")
    return record[key]
