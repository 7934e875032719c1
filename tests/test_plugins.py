"""Plug-ins are found by name and checked to be some; values of users against annotations."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vit_jax import models, optim, tasks
from vit_jax.data import ops, sources
from vit_jax.errors import UserError, quoted
from vit_jax.optim import schedules
from vit_jax.optim.rule import RULES
from vit_jax.plugins import check_fields, check_known, fits

KINDS = (RULES, schedules.SCHEDULES, tasks.TASKS, models.registry.MODELS, sources.SOURCES, ops.OPS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
@pytest.mark.parametrize(
    "name", ["os:system", "math:pi", "subprocess:Popen", "pathlib:Path", "functools:partial"]
)
def test_what_is_imported_is_checked_before_it_is_called(kind, name):
    with pytest.raises(UserError, match=f"is no {kind.what}.*; write package.module:"):
        kind.find(name, "config.key")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
@pytest.mark.parametrize(
    "name",
    [
        *(":", ":b", "a:", "..:x", ".a:b", "os:", "os:.", "os:path.", "\0:x", "é:x", "\ud800:x"),
        *("a" * 5000 + ":b", "a." * 3000 + "a:b", "no such name", "", "a\nb"),
    ],
    ids=range(16),
)
def test_any_text_as_a_name_gives_one_line(kind, name):
    with pytest.raises(UserError) as error:
        kind.find(name, "config.key")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2500


@given(st.text(), st.sampled_from(["", ":", "os:", "vit_jax."]))
def test_any_other_text_gives_one_line(text, before):
    for kind in KINDS:
        with contextlib.suppress(UserError):
            kind.find(before + text)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_every_name_is_found(kind):
    for name in kind.names():
        assert kind.find(name) is not None


def test_a_near_name_is_suggested_whatever_its_case():
    with pytest.raises(UserError, match="'Adamv' is no optimizer; did you mean"):
        RULES.find("Adamv", "config.optim.name")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("1 / 0", r"ZeroDivisionError: division by zero, .*broken\.py:1\)"),
        ("def f(:", r"SyntaxError: .*\); write package"),
        ("import nowhere_at_all", r"No module named 'nowhere_at_all'"),
        ("raise SystemExit(3)", r"SystemExit: 3"),
        ("def f(): pass", r"module 'broken' has no such name; did you mean 'f'"),
    ],
)
def test_a_module_that_fails_is_told_in_one_line(tmp_path, monkeypatch, body, reason):
    (tmp_path / "broken.py").write_text(body + "\n")
    monkeypatch.chdir(tmp_path)  # Modules of the current folder are found.
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=reason) as error:
        RULES.find("broken:ff", "config.optim.name")
    assert "\n" not in str(error.value)


def test_a_rule_must_return_one():
    with pytest.raises(UserError, match="no_rule' is no optimizer: its result is of type int"):
        optim.rule.load_rule(f"{__name__}:no_rule", {}, blocks="x")


def no_rule():
    return 3


def test_unknown_names_and_keys_are_told_in_the_same_words():
    with pytest.raises(UserError, match=r"^config\.total is unknown; did you mean 'totals'\?$"):
        check_known("total", ["totals"], "config.total")
    with pytest.raises(UserError, match=r"^--to=hg is no format; valid: npz, timm$"):
        check_known("hg", ["timm", "npz"], "--to=hg", "format")
    with pytest.raises(UserError, match=r"^x is unknown; see there$"):
        check_known(3, ["timm", "npz"], "x", otherwise="see there")


def test_values_are_quoted_on_one_line_and_cut():
    assert quoted("a\nb") == r"'a\nb'"
    assert "\n" not in quoted(ConfigDict({"a": {"b": 1}}))
    assert len(quoted("x" * 10_000)) < 250


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
