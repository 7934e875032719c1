"""Ops that convert texts to token numbers, which can be sent to a device."""

import numpy as np

from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops import random_record_op, record_op
from vit_jax.data.ops.records import Record, field
from vit_jax.data.tokenizer import BYTES, open_tokenizer
from vit_jax.errors import UserError


@record_op
def lower(record: Record, key: str = "caption") -> Record:
    """Converts texts to lower case."""
    return record | {key: tf.strings.lower(_texts(record, key), encoding="utf-8")}


@random_record_op
def choose(
    record: Record, seed: tf.Tensor, key: str = "captions", key_result: str = "caption"
) -> Record:
    """Chooses one of the non-empty texts of a record at random; "" if all are empty."""
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
    """Converts a text, or each of several, to `length` token numbers.

    The result is int32 `[length]` or `[texts, length]`. An empty text gives -1 everywhere.

    vocab: see `vit_jax.data.tokenizer`.
    """
    texts = _texts(record, key)
    tokenizer = open_tokenizer(vocab, length)

    def encode(texts: np.ndarray) -> np.ndarray:
        flat = [text.decode(errors="replace") for text in np.ravel(texts)]
        return tokenizer.encode(flat).reshape(*np.shape(texts), length)

    # This holds Python's lock for some microseconds, which are negligible next to image decoding.
    tokens = tf.numpy_function(encode, [texts], tf.int32, stateful=False)
    return record | {key_result: tf.ensure_shape(tokens, [*texts.shape, length])}


def _texts(record: Record, key: str) -> tf.Tensor:
    texts = field(record, key)
    if texts.dtype != tf.string:
        raise UserError(f"field {key!r} holds {texts.dtype.name}, not texts")
    return texts
