"""Texts to token numbers, which can go to a device."""

import numpy as np

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import random_record_op, record_op
from vit_jax.data.ops.records import Record, field
from vit_jax.data.tokenizer import BYTES, open_tokenizer
from vit_jax.errors import UserError


@record_op
def lower(record: Record, key: str = "caption") -> Record:
    """Texts in lower case."""
    return record | {key: tf.strings.lower(_texts(record, key), encoding="utf-8")}


@random_record_op
def choose(
    record: Record, seed: tf.Tensor, key: str = "captions", key_result: str = "caption"
) -> Record:
    """One of the texts of a record that are not empty, at random; "" where all are."""
    texts = _texts(record, key)
    real = tf.concat([tf.boolean_mask(texts, tf.not_equal(texts, "")), [""]], 0)
    count = tf.maximum(1, tf.size(real) - 1)
    number = tf.random.stateless_uniform([], seed, maxval=count, dtype=tf.int32)
    return record | {key_result: real[number]}


@record_op
def tokenize(
    record: Record,
    length: int,
    vocab: str = BYTES,
    key: str = "caption",
    key_result: str = "tokens",
) -> Record:
    """`length` token numbers of a text, or of each: int32 `[length]` or `[texts, length]`.

    vocab: see `vit_jax.data.tokenizer`. An empty text gives -1 throughout.
    """
    texts = _texts(record, key)
    tokenizer = open_tokenizer(vocab, length)

    def encode(texts: np.ndarray) -> np.ndarray:
        flat = [text.decode(errors="replace") for text in np.ravel(texts)]
        return tokenizer.encode(flat).reshape(*np.shape(texts), length)

    # Beside decoding an image, the microseconds that this holds Python's lock do not count.
    tokens = tf.numpy_function(encode, [texts], tf.int32, stateful=False)
    return record | {key_result: tf.ensure_shape(tokens, [*texts.shape, length])}


def _texts(record: Record, key: str) -> tf.Tensor:
    texts = field(record, key)
    if texts.dtype != tf.string:
        raise UserError(f"field {key!r} holds {texts.dtype.name}, not texts")
    return texts
