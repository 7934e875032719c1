"""A config key as the schema describes it: default, meaning, range, and effect on resume."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

FREE, WARNED, FIXED = "free", "warned", "fixed"


@dataclass(frozen=True)
class Key:
    """One config key.

    Attributes:
      default: the value if no config sets the key; its type is the key's type.
      on_resume: the effect of a changed value on a workdir that has a checkpoint: "free" is silent,
        "warned" resumes and tells what changed, "fixed" refuses.
      doc: the meaning, in sentences.
      kind: "plain"; "duration" (an int, or a text with a unit; or a list of these); "open" (a
        section that its owner checks); "pattern" (a regular expression); "place" (a file, a folder
        or the name of a dataset). Patterns and places never name code.
      exceptions: for open sections, the keys whose `on_resume` differs from the section's.
      at_least, above, at_most, below: the range of a number.
      also: values outside the range that are allowed, too.
      choices: the texts that are allowed; () allows every text.
      of: the type of the entries of a list.
      aliases: earlier names of the key, which configs may still use.
    """

    default: Any
    on_resume: str
    doc: str
    kind: str = "plain"
    exceptions: Mapping[str, str] = field(default_factory=dict)
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    of: Any = None
    aliases: tuple[str, ...] = ()

    def range(self) -> str:
        """Returns the range in words, such as "at least 0 and below 1"; "" for no range."""
        bounds = [
            f"{words} {bound}"
            for words, bound in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return ", or ".join([" and ".join(bounds), *map(str, self.also)]) if bounds else ""

    def contains(self, number: float | Fraction) -> bool:
        """Returns whether a finite number is in the range."""
        return number in self.also or (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def duration(default: int | str | list, on_resume: str, doc: str, **options: Any) -> Key:
    """Returns a key whose value is a duration, or a list of them."""
    return Key(default, on_resume, doc, kind="duration", **options)


def open_section(default: dict, on_resume: str, doc: str, **exceptions: str) -> Key:
    """Returns a section whose keys its owner checks."""
    return Key(default, on_resume, doc, kind="open", exceptions=exceptions)


def pattern(default: str, on_resume: str, doc: str) -> Key:
    """Returns a key whose value is a regular expression."""
    return Key(default, on_resume, doc, kind="pattern")


def patterns(on_resume: str, doc: str, **options: Any) -> Key:
    """Returns a key whose value is a list of regular expressions."""
    return Key([], on_resume, doc, kind="pattern", of=str, **options)


def place(default: str, on_resume: str, doc: str) -> Key:
    """Returns a key whose value is a file, a folder or the name of a dataset."""
    return Key(default, on_resume, doc, kind="place")
