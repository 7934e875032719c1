"""Texts to token numbers: every kind of vocabulary, cut and padded, and files that are none."""

import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from vit_jax.data.tokenizer import open_tokenizer
from vit_jax.errors import UserError

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "3", "7", "above", ",", "dig", "##it")


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model, trained on captions as T5's: padding 0, end 1, unknown 2."""
    path = tmp_path_factory.mktemp("pieces") / "pieces.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a 3 above a 7", "a 2 left of a 5", "a 1 above a 4"] * 20),
            model_writer=file,
            vocab_size=18,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return str(path)


def test_word_piece_has_one_mark_and_pads_with_zero(words):
    tokenizer = open_tokenizer(words, 8)
    rows = tokenizer.encode(["A 3 above", "digit zzz,3", ""])
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[0], [2, 4, 5, 7, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows[1], [2, 9, 10, 1, 8, 5, 0, 0])
    np.testing.assert_array_equal(rows[2], [-1] * 8)
    assert tokenizer.decode(rows[0]) == "a 3 above"
    assert tokenizer.decode(rows[2]) == ""
    assert tokenizer.vocab_size == len(WORDS)
    np.testing.assert_array_equal(open_tokenizer(words, 3).encode(["a 3 above a 7"]), [[2, 4, 5]])


def test_only_line_feeds_part_the_pieces_of_a_vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\na\u2028b\ncat\n", encoding="utf-8")
    tokenizer = open_tokenizer(str(path), 2)
    assert tokenizer.vocab_size == 5
    np.testing.assert_array_equal(tokenizer.encode(["cat"]), [[2, 4]])


def test_sentence_piece_always_ends_with_the_end_mark(pieces):
    whole = sentencepiece.SentencePieceProcessor(model_file=pieces).encode("a 3 above a 7")
    tokenizer = open_tokenizer(pieces, 32)
    (row,) = tokenizer.encode(["a 3 above a 7"])
    np.testing.assert_array_equal(row, [*whole, *[1] * (32 - len(whole))])
    assert tokenizer.decode(row) == "a 3 above a 7"
    np.testing.assert_array_equal(
        open_tokenizer(pieces, 4).encode(["a 3 above a 7"]), [[*whole[:3], 1]]
    )


def test_a_tokenizer_json_keeps_its_rules(tmp_path):
    rules = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "a": 2, "3": 3}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.enable_padding(pad_id=1, length=20)
    rules.save(str(tmp_path / "tokenizer.json"))
    rows = open_tokenizer(str(tmp_path / "tokenizer.json"), 5).encode(["a 3 b", "3 " * 9])
    np.testing.assert_array_equal(rows, [[2, 3, 0, 1, 1], [3] * 5])


@pytest.mark.parametrize("told", [{}, {"pad_token": None}, {"pad_token": "not a token"}])
def test_a_pad_token_that_no_file_tells_is_that_of_the_rules(tmp_path, told):
    """Also where `None` is a word of the vocabulary, as it is of GPT-2's."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    rules = Tokenizer(models.WordLevel({"None": 0, "a": 1, "<pad>": 2}, unk_token="None"))
    rules.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(open_tokenizer(str(tmp_path), 3).encode(["a"]), [[1, 2, 2]])


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=12), st.integers(2, 20))
def test_bytes_lose_nothing_but_the_end(text, length):
    tokenizer = open_tokenizer("bytes", length)
    (row,) = tokenizer.encode([text])
    assert 1 in row
    assert row.max() < tokenizer.vocab_size
    assert text.startswith(tokenizer.decode(row))
    if len(text.encode()) < length:
        assert tokenizer.decode(row) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words.txt", None, r"words.txt': no such file; write bytes, or a file"),
        ("words.vocab", "a", "words.vocab': write bytes, or a file"),
        ("words.txt", "a\nb", r"words.txt has no line \[PAD\]; is it a WordPiece voc"),
        ("words.txt", b"\xff\xfe\x00", "words.txt: 'utf-8' codec"),
        ("pieces.model", "nothing", "pieces.model is no SentencePiece model"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer.json"),
    ],
)
def test_what_is_no_vocabulary_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as raised:
        open_tokenizer(str(path), 8)
    assert "\n" not in str(raised.value)


def test_a_text_needs_room():
    with pytest.raises(UserError, match="texts of 1 tokens"):
        open_tokenizer("bytes", 1)


def test_a_piece_whose_number_no_table_has_is_refused(tmp_path):
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2**31}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"'a</w>' has the number 2147483648"):
        open_tokenizer(str(tmp_path), 8)
