"""Tokenizers, which convert texts to token numbers of a fixed length, from a vocabulary.

    "bytes"          built in: the bytes of UTF-8, numbered as ByT5 does (Xue et al. 2022)
    *.txt            a WordPiece vocabulary, one piece per line, like those of BERT and LiT
    *.model          a SentencePiece model, like those of T5, LiT, and SigLIP
    *.json           a `tokenizer.json` of Hugging Face, with its own rules

Texts that are too long are truncated, but keep the token from which a text tower takes its vector:
[CLS] at the start, or the end-of-text token at the last position.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vit_jax.errors import UserError

BYTES = "bytes"
NO_TEXT = -1
"""The value of all tokens of an empty text: an image may have fewer texts than other images."""

_BYTE_END, _FIRST_BYTE = 1, 3
_SHOWN = "bytes, or a file *.txt (WordPiece), *.model (SentencePiece) or *.json (tokenizer.json)"


class Tokenizer(Protocol):
    """Converts texts to token numbers, always `length` for each text."""

    vocab_size: int
    length: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns token numbers, int32 `[texts, length]`; all are `NO_TEXT` for an empty text."""

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of one row, without padding and other special tokens; "" if none."""


@functools.lru_cache(maxsize=8)
def open_tokenizer(vocab: str, length: int) -> Tokenizer:
    """Returns the tokenizer of a vocabulary, for texts of `length` tokens.

    Raises:
      UserError: the file does not exist or is of an unknown kind, or `length` is too small for a
        text.
    """
    if length < 2:
        raise UserError(f"texts of {length} tokens have no room for words; write at least 2")
    if vocab == BYTES:
        return _Tokenizer(_BYTE_END + 2 + 256, length, functools.partial(_bytes, length), _text_of)
    path = Path(vocab).expanduser()
    opener = {".txt": _word_piece, ".model": _sentence_piece, ".json": _own_rules}.get(path.suffix)
    if not opener:
        raise UserError(f"vocabulary {vocab!r}: write {_SHOWN}")
    if not path.is_file():
        raise UserError(f"vocabulary {vocab!r}: no such file; write {_SHOWN}")
    return opener(path, length)


class _Tokenizer(NamedTuple):
    """A `Tokenizer` of two functions: from texts to rows, and from a row without `NO_TEXT` back."""

    vocab_size: int
    length: int
    rows: Callable[[list[str]], list[list[int]]]
    text: Callable[[list[int]], str]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        out = np.full((len(texts), self.length), NO_TEXT, np.int32)
        there = [i for i, text in enumerate(texts) if text]
        if there:
            out[there] = self.rows([texts[i] for i in there])
        return out

    def decode(self, tokens: np.ndarray) -> str:
        return "" if tokens[0] == NO_TEXT else self.text(np.asarray(tokens).tolist())


def _padded(ids: Sequence[int], length: int, pad: int) -> list[int]:
    return [*ids[:length], *[pad] * (length - len(ids))]


def _bytes(length: int, texts: list[str]) -> list[list[int]]:
    """Returns the byte tokens of each text, which end with the end token even if truncated."""
    cut = ([_FIRST_BYTE + byte for byte in text.encode()[: length - 1]] for text in texts)
    return [_padded([*ids, _BYTE_END], length, 0) for ids in cut]


def _text_of(ids: list[int]) -> str:
    return bytes(i - _FIRST_BYTE for i in ids if i >= _FIRST_BYTE).decode(errors="ignore")


def _word_piece(path: Path, length: int) -> Tokenizer:
    """Returns a tokenizer of lower-case text into [CLS], pieces, and [PAD]; no [SEP], as in LiT."""
    from tokenizers import Tokenizer as Rules
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary {path}: {error}") from error
    # `splitlines` would be wrong: a piece may be a character that it splits at, such as U+0085.
    pieces = text.removesuffix("\n").split("\n")
    numbers = {piece: i for i, piece in enumerate(pieces) if piece}
    missing = [piece for piece in ("[PAD]", "[UNK]", "[CLS]") if piece not in numbers]
    if missing:
        raise UserError(
            f"vocabulary {path} has no line {missing[0]}; is it a WordPiece vocabulary?"
        )
    rules = Rules(models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=100))
    rules.normalizer = normalizers.BertNormalizer(lowercase=True)
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.decoder = decoders.WordPiece()
    rules.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", numbers["[CLS]"])]
    )
    rules.add_special_tokens(["[PAD]", "[CLS]"])
    return _of_rules(rules, length, numbers["[PAD]"], len(pieces))


def _own_rules(path: Path, length: int) -> Tokenizer:
    """Returns a tokenizer with the rules of a `tokenizer.json`, except its length and padding."""
    from tokenizers import Tokenizer as Rules

    try:
        rules = Rules.from_file(str(path))
    except Exception as error:  # The library raises no more specific type.
        raise UserError(f"vocabulary {path} is no tokenizer.json: {error}") from error
    known = (rules.token_to_id(name) for name in ("[PAD]", "<pad>", "<|endoftext|>"))
    padding = rules.padding or {}
    pad = padding.get("pad_id", next((number for number in known if number is not None), 0))
    rules.no_padding()
    return _of_rules(rules, length, pad, rules.get_vocab_size())


def _of_rules(rules: Any, length: int, pad: int, vocab_size: int) -> Tokenizer:
    # The library truncates so that the special tokens around a text fit.
    rules.enable_truncation(length)

    def rows(texts: list[str]) -> list[list[int]]:
        return [_padded(found.ids, length, pad) for found in rules.encode_batch(texts)]

    return _Tokenizer(vocab_size, length, rows, rules.decode)


def _sentence_piece(path: Path, length: int) -> Tokenizer:
    """Returns a tokenizer into pieces and the end token, which also pads.

    The last token is always the end token, as in SigLIP.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"vocabulary {path} is no SentencePiece model: {error}") from error
    end = model.eos_id()
    if end < 0:
        raise UserError(f"vocabulary {path} has no end-of-text piece; train it with eos_id")

    def rows(texts: list[str]) -> list[list[int]]:
        return [_padded(ids[: length - 1], length, end) for ids in model.encode(texts)]

    return _Tokenizer(model.vocab_size(), length, rows, model.decode)
