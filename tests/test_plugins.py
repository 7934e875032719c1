"""Values of users against annotations of the code."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.plugins import check_fields, fits


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (np.int64(3), int),
        (3, float),
        (False, bool),
        ("gelu", str),
        (16, int | Sequence[int]),
        ([16, 8], int | Sequence[int]),
        ((0.5, 1.0), tuple[float, ...]),
        ([1, "a"], tuple[int, str]),
        (None, str | None),
        ({"name": 0.5}, Mapping[str, float]),
        (ConfigDict({"name": 0.5}), Mapping[str, float]),
        (print, Callable[[int], int]),
    ],
)
def test_what_fits(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("16x16", int | Sequence[int]),
        (1.5, int),
        (True, int),
        (1, bool),
        ("0.5", float),
        (3, str),
        ("ab", Sequence[str]),
        ([1, "a"], Sequence[int]),
        ([1, 2, 3], tuple[int, int]),
        ({"name": "a"}, Mapping[str, float]),
        (None, int),
    ],
)
def test_what_does_not(value, hint):
    assert not fits(value, hint)


@dataclasses.dataclass
class Owner:
    patch_size: int | Sequence[int]
    dtype: "NowhereToBeFound"  # noqa: F821
    rate: float = 0.0


def test_annotations_that_cannot_be_resolved_check_nothing():
    check_fields(Owner, {"patch_size": "x"}, "config.model.")


def test_the_message_says_what_to_write():
    resolved = dataclasses.make_dataclass("Resolved", [("patch_size", int | Sequence[int])])
    with pytest.raises(UserError) as error:
        check_fields(resolved, {"patch_size": "16x16"}, "config.model.")
    assert str(error.value) == (
        "config.model.patch_size='16x16': write a whole number or a list of whole numbers"
    )
