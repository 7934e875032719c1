"""Texts of users are shown, and never obeyed."""

import io
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vit_jax.errors import visible
from vit_jax.tracking.console import Progress
from vit_jax.tracking.plain_text import distinct, one_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\t and\u2028more", "two lines and more"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("\udc80\ufffe\x9b", r"\udc80\ufffe\x9b"),
        ("$5 \\x <b> كلب 👨\u200d👩 é", "$5 \\x <b> كلب 👨\u200d👩 é"),
        ("", ""),
    ],
)
def test_what_would_act_is_shown(text, expected):
    assert one_line(text) == expected


def test_long_texts_are_cut():
    assert one_line("abcdef", 4) == "abc…"
    assert one_line("abcd", 4) == "abcd"


@given(st.text())
@example("\x1b]0;title\x07")
def test_nothing_is_left_that_a_terminal_obeys(text):
    for shown in (visible(text), one_line(text)):
        assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, shown))
        shown.encode()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@given(st.text())
@example("\x1b[2J\x1b[31m\u202e\udc80")
def test_messages_and_notes_have_no_escape_codes_of_others(text):
    """All that reaches the terminal besides the text are codes of our own."""
    for stream in (Terminal(), io.StringIO()):
        progress = Progress(10, 0, stream)
        progress.message(text)
        progress.update(5, {}, note=text)
        progress.message(text)
        progress.close()
        written = stream.getvalue()
        for own in ("\x1b[K", "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[36m"):
            written = written.replace(own, "")
        controls = {char for char in written if unicodedata.category(char) in ("Cc", "Cs")}
        assert controls <= {"\n", "\r"}


def test_equal_names_get_their_numbers():
    assert distinct(["cat", "dog", "a\nb", "cat", "a b"]) == (
        *("cat (0)", "dog", "a b (2)", "cat (3)", "a b (4)"),
    )


@given(st.lists(st.sampled_from(["a", "a (0)", "a (1)", "a (1) (2)", "b"]), max_size=5))
def test_no_two_names_are_equal_then(names):
    found = distinct(names)
    assert len(set(found)) == len(names)
    assert all(line.startswith(name) for name, line in zip(names, found, strict=True))
