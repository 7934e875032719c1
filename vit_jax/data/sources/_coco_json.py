"""The common structure of COCO's JSON files: lists of entries, each with an id of its own."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vit_jax.data import files
from vit_jax.errors import UserError

ID, NUMBER = (int, str), (int, float)
"""The types of ids and of numbers, for `sections`. True and False are neither."""

FLAG = (int, bool)
_TOO_LARGE = 2**63

Kinds = Mapping[str, type | tuple[type, ...]]


def sections(
    path: Path, text: str, wanted: Mapping[str, Kinds], form: str, optional: Kinds | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Returns the lists of a COCO file. Checks that each entry has the required keys.

    Args:
      path: the file, for messages; `text` is its content.
      wanted: the name of each list, and the type of each key that its entries must have.
      form: the name of the COCO format, such as `instances`, for messages.
      optional: the types of keys that entries may have.

    Raises:
      UserError: the file is not JSON, or lacks one of the lists or keys.
    """
    stored = files.parse_json(path, text)
    for section, keys in wanted.items():
        entries = stored.get(section) if isinstance(stored, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f"{files.shown(path)} has no list {section!r}; is it COCO's {form} format?"
            )
        kinds = {**keys, **(optional or {})}
        for number, entry in enumerate(entries):
            for key in keys:
                if not isinstance(entry, dict) or key not in entry:
                    raise UserError(f"{files.shown(path)}: {section}[{number}] has no {key!r}")
            for key, kind in kinds.items():
                if key in entry and not _fits(entry[key], kind):
                    raise UserError(
                        f"{files.shown(path)}: {section}[{number}] has {key} {as_json(entry[key])}"
                    )
    return stored


def check_unique(path: Path, stored: Mapping[str, list[dict]], section: str, key: str) -> None:
    """Raises a `UserError` if two entries of a list have the same value of `key`.

    Boxes or captions of one entry would otherwise be assigned to the other. Entries without `key`
    are ignored.
    """
    seen: dict[Any, int] = {}
    for number, entry in enumerate(stored[section]):
        value = entry.get(key)
        if isinstance(value, int | str | float) and seen.setdefault(value, number) != number:
            raise UserError(
                f"{files.shown(path)}: {section}[{number}] and {section}[{seen[value]}] have the"
                f" same {key} {as_json(value)}"
            )


def check_listed(path: Path, number: int, kind: str, found: Any, listed: Collection[Any]) -> None:
    """Raises a `UserError` unless the image or category of an annotation is listed."""
    if found in listed:
        return
    as_text = isinstance(found, str) and found in {str(one) for one in listed}
    as_number = isinstance(found, int) and str(found) in listed
    hint = " (ids are written as numbers in one place, as texts in another)"
    raise UserError(
        f"{files.shown(path)}: annotations[{number}] is of {kind} {as_json(found)}, which is not"
        f" listed{hint if as_text or as_number else ''}"
    )


def as_json(value: Any) -> str:
    """Returns a value as JSON, as it appears in the file, for a message."""
    return files.shown(json.dumps(value))


def is_number(value: Any) -> bool:
    """Returns whether a value is a number that NumPy can represent. Booleans are not numbers."""
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    if kind is NUMBER:
        return is_number(value)
    return isinstance(value, kind) and (kind is FLAG or not isinstance(value, bool))
