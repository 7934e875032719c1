"""Captions in the graph: lower case, one of several, token numbers."""

import numpy as np
import pytest

from vit_jax.data import pp
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.errors import UserError


def apply(text, record, count=1):
    """`count` results of a preprocessing string inside tf.data, under different keys."""
    preprocess = pp.build(text)
    fields = {key: tf.constant(x) for key, x in record.items()}
    dataset = tf.data.Dataset.range(count).map(
        lambda n: preprocess(fields, tf.stack([tf.cast(n, tf.int32), 7]))
    )
    return dataset.element_spec, list(dataset.as_numpy_iterator())


def test_a_caption_becomes_tokens_of_known_shape():
    spec, (out,) = apply("lower|tokenize(12)|keep('tokens')", {"caption": "Über A 3"})
    assert spec["tokens"].shape == (12,)
    np.testing.assert_array_equal(
        out["tokens"], open_tokenizer("bytes", 12).encode(["über a 3"])[0]
    )


def test_a_string_tells_its_vocabularies():
    text = "lower|tokenize(12)|tokenize(4, vocab='words.txt', key_result='few')|keep('tokens')"
    assert pp.vocabularies(text) == {"tokens": "bytes", "few": "words.txt"}


def test_several_captions_become_rows_and_empty_ones_say_so():
    spec, (out,) = apply("tokenize(6, key='captions')", {"captions": ["a 3", "", "a 7"]})
    assert spec["tokens"].shape == (3, 6)
    np.testing.assert_array_equal(
        out["tokens"], open_tokenizer("bytes", 6).encode(["a 3", "", "a 7"])
    )


def test_one_of_the_texts_is_chosen_and_never_an_empty_one():
    _, outputs = apply("choose", {"captions": ["a", "", "b", ""]}, count=40)
    assert {out["caption"] for out in outputs} == {b"a", b"b"}
    _, (alone,) = apply("choose", {"captions": ["", ""]})
    assert alone["caption"] == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokenize(8)", "no field 'caption'; did you mean 'captions'"),
        ("tokenize(8, key='label')", "'label' holds int32, not texts"),
        ("tokenize(8, 'none.txt', key='captions')", "tokenize.*none.txt': no such file"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(text, message):
    with pytest.raises(UserError, match=message):
        pp.build(text)(
            {"captions": tf.constant(["a"]), "label": tf.constant(1)}, tf.constant([0, 1])
        )
