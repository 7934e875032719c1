"""Texts of users (names of classes and files, captions), made safe to show.

A name may hold anything: line breaks, escape codes that a terminal obeys, marks that reverse the
direction of what follows, halves of characters from file names that are no UTF-8.
"""

import unicodedata

_ELLIPSIS = "…"


def visible(text: str) -> str:
    r"""Returns `text` with everything that would act, and not show, as an escape such as `\x1b`.

    These are control characters (line breaks and tabs among them), marks that override the
    direction of text, halves of surrogate pairs and code points that are no characters.
    """
    return "".join(char.encode("unicode_escape").decode() if _acts(char) else char for char in text)


def one_line(text: str, limit: int = 0) -> str:
    """Returns `text` on one line, with single spaces, every character visible.

    limit: a longer text is cut to this many characters, the last of them an ellipsis; 0 is none.
    """
    text = visible(" ".join(text.split()))
    return text[: limit - 1] + _ELLIPSIS if 0 < limit < len(text) else text


def _acts(char: str) -> bool:
    if char.isascii():
        return not char.isprintable()
    code = ord(char)
    return (
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(char) in _OVERRIDES
        or code & 0xFFFE == 0xFFFE
        or 0xFDD0 <= code <= 0xFDEF
    )


_OVERRIDES = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
