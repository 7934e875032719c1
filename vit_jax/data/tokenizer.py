"""Tokenizers, which convert texts to token numbers of a fixed length, from a vocabulary.

    "bytes"          built in: the bytes of UTF-8, numbered as ByT5 does (Xue et al. 2022)
    *.txt            a WordPiece vocabulary, one piece per line, like those of BERT and LiT
    *.model          a SentencePiece model, like those of T5, LiT, and SigLIP
    *.json           a `tokenizer.json` of Hugging Face, with its own rules
    a folder         the tokenizer beside the weights of a released model; see `_beside_weights`

Texts that are too long are truncated, but keep the token from which a text tower takes its vector:
[CLS] at the start, or the end-of-text token at the last position.
"""

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vit_jax.checkpoints import files
from vit_jax.checkpoints.input_spec import OPEN_CLIP
from vit_jax.errors import UserError

BYTES = "bytes"
NO_TEXT = -1
"""The value of all tokens of an empty text: an image may have fewer texts than other images."""

_MOST_PIECES = 1 << 24
_BYTE_END, _FIRST_BYTE = 1, 3
_SHOWN = (
    "bytes, or a file *.txt (WordPiece), *.model (SentencePiece) or *.json (tokenizer.json), or the"
    " folder of a released model"
)


class Tokenizer(Protocol):
    """Converts texts to token numbers, always `length` for each text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def length(self) -> int: ...

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
    if path.is_dir():
        return _beside_weights(path, length)
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


def _padded(ids: Sequence[int], length: int, pad: int, *, in_front: bool = False) -> list[int]:
    padding = [pad] * (length - len(ids))
    return [*padding, *ids[:length]] if in_front else [*ids[:length], *padding]


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
        text = files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
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
    rules = _read_rules(path)
    _check_numbers(rules, path)
    return _of_rules(rules, length, _pad_of(rules), rules.get_vocab_size())


def _read_rules(path: Path) -> Any:
    from tokenizers import Tokenizer as Rules

    try:
        return Rules.from_buffer(files.read_bytes(path))
    except UserError:
        raise
    except Exception as error:  # The library raises no more specific type.
        raise UserError(f"vocabulary {path} is no tokenizer.json: {error}") from error


def _check_numbers(rules: Any, place: Path) -> None:
    """Raises a `UserError` for numbers of pieces that no table of vectors has."""
    piece, number = max(rules.get_vocab().items(), key=lambda one: one[1], default=("", 0))
    if number >= _MOST_PIECES:
        raise UserError(
            f"vocabulary {place}: {piece[:99]!r} has the number {number}; is it damaged?"
        )


def _pad_of(rules: Any, told: Any = None) -> int:
    """Returns the number of the token that pads.

    told: the token as another file has it, a text or a section with the text as its `content`.
    """
    name = told.get("content") if isinstance(told, Mapping) else told
    numbers = [
        rules.token_to_id(name) if isinstance(name, str) else None,
        (rules.padding or {}).get("pad_id"),
        *map(rules.token_to_id, ("[PAD]", "<pad>", "<|endoftext|>")),
    ]
    return next((number for number in numbers if number is not None), 0)


def _of_rules(
    rules: Any, length: int, pad: int, vocab_size: int, *, in_front: bool = False
) -> "_Tokenizer":
    # The library truncates so that the special tokens around a text fit.
    rules.enable_truncation(length)
    rules.no_padding()

    def rows(texts: list[str]) -> list[list[int]]:
        found = rules.encode_batch(texts)
        return [_padded(one.ids, length, pad, in_front=in_front) for one in found]

    return _Tokenizer(vocab_size, length, rows, rules.decode)


def _sentence_piece(path: Path, length: int) -> "_Tokenizer":
    """Returns a tokenizer into pieces and the end token, which also pads.

    The last token is always the end token, as in SigLIP.
    """
    import sentencepiece

    content = files.read_bytes(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError) as error:
        raise UserError(f"vocabulary {path} is no SentencePiece model: {error}") from error
    end = model.eos_id()
    if end < 0:
        raise UserError(f"vocabulary {path} has no end-of-text piece; train it with eos_id")

    def rows(texts: list[str]) -> list[list[int]]:
        return [_padded(ids[: length - 1], length, end) for ids in model.encode(texts)]

    return _Tokenizer(model.vocab_size(), length, rows, model.decode)


def _beside_weights(folder: Path, length: int) -> Tokenizer:
    """Returns the tokenizer of a folder of transformers or open_clip.

    It is a `spiece.model` (SigLIP), a `tokenizer.json`, or the `vocab.json` and `merges.txt` of
    CLIP. Texts are first cleaned like those that the model learned from; see `_cleaning`.

    Raises:
      UserError: there is no such file, or one that cannot be read.
    """
    told = _json(folder / "tokenizer_config.json")
    pieces, rules = folder / "spiece.model", folder / "tokenizer.json"
    clean = _cleaning(folder, told.get("tokenizer_class"))
    if pieces.is_file():
        found = _sentence_piece(pieces, length)
    elif rules.is_file() or (folder / "merges.txt").is_file():
        read = _read_rules(rules) if rules.is_file() else _clip_rules(folder)
        _check_numbers(read, folder)
        pad = told.get("pad_token") or _json(folder / "special_tokens_map.json").get("pad_token")
        in_front = told.get("padding_side") == "left"
        found = _of_rules(
            read, length, _pad_of(read, pad), read.get_vocab_size(), in_front=in_front
        )
    else:
        raise UserError(
            f"{folder} has no tokenizer beside the weights; put its tokenizer.json there, or its"
            " spiece.model, or its vocab.json and merges.txt"
        )

    def rows(texts: list[str]) -> list[list[int]]:
        return found.rows([clean(text) for text in texts])

    def text_of(ids: list[int]) -> str:
        return found.text(ids).replace(_WORD_END, " ").strip()

    return found._replace(rows=rows, text=text_of)


def _json(path: Path) -> Mapping[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _clip_rules(folder: Path) -> Any:
    """Returns the rules of CLIP's byte pairs (Radford et al. 2021, section 2.4)."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Rules

    start, end = "<|startoftext|>", "<|endoftext|>"
    names = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    for name in names:
        files.check_regular(name)
    try:
        pairs = models.BPE.from_file(*names, unk_token=end, end_of_word_suffix=_WORD_END)
    except Exception as error:  # The library raises no more specific type.
        raise UserError(f"{folder}: vocab.json and merges.txt are not CLIP's: {error}") from error
    rules = Rules(pairs)
    numbers = [rules.token_to_id(mark) for mark in (start, end)]
    if None in numbers:
        raise UserError(f"{folder}: vocab.json has no {start} and {end}; is it CLIP's?")
    rules.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    rules.decoder = decoders.ByteLevel()
    rules.add_special_tokens([start, end])
    rules.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, numbers[0]), (end, numbers[1])]
    )
    return rules


_WORD_END = "</w>"
"""The mark of the last piece of a word in CLIP's vocabulary."""


def _cleaning(folder: Path, tokenizer_class: Any) -> Callable[[str], str]:
    """Returns the change of a text before it is tokenized.

    SigLIP learned from texts in lower case without punctuation, and SigLIP 2 from texts in lower
    case (Tschannen et al. 2025, section 2.1), but Gemma's tokenizer keeps capitals. open_clip's
    config names the change. All other tokenizers have it among their own rules.

    Raises:
      UserError: open_clip's config names an unknown change.
    """
    place = folder / OPEN_CLIP
    stored = _json(place)
    if stored:
        with files.reading(place):
            text = stored.get("model_cfg", {}).get("text_cfg", {})
            told = text.get("tokenizer_kwargs") or {}
            default = "whitespace" if text.get("hf_tokenizer_name") else "lower"
            clean = _CLEANINGS.get(told.get("clean", default))
            unknown = [key for key in told if key != "clean"]
        if unknown or clean is None:
            raise UserError(f"{place}: {told!r} for texts is not read")
        return clean
    if tokenizer_class == "SiglipTokenizer":
        return _without_punctuation
    is_gemma = str(tokenizer_class).startswith(("Gemma", "Siglip2"))
    return str.lower if is_gemma else str


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _without_punctuation(text: str) -> str:
    return _spaced(text.lower().translate(str.maketrans("", "", string.punctuation)))


_CLEANINGS: Mapping[str, Callable[[str], str]] = {
    "whitespace": _spaced,
    "lower": lambda text: _spaced(text).lower(),
    "canonicalize": lambda text: _without_punctuation(text.replace("_", " ")),
}
