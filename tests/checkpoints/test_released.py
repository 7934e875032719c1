"""Choosing a file of the AugReg release from its index."""

import csv
import json

import pytest
from golden_cases import GOLDEN

from vit_jax import models
from vit_jax.checkpoints import released
from vit_jax.errors import UserError

INDEX = GOLDEN / "vision_transformer" / "augreg_index.csv"
SELECTED = json.loads(INDEX.with_suffix(".json").read_text())["selected"]


@pytest.mark.parametrize("name", SELECTED)
def test_selects_what_the_reference_selects(name):
    assert released.select(name, released.read_index(INDEX)) == SELECTED[name]


def test_unknown_models_and_other_tables(tmp_path):
    with pytest.raises(UserError, match="did you mean 'Ti_16'"):
        released.select("Ti_61", released.read_index(INDEX))
    (tmp_path / "index.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column 'ds'"):
        released.read_index(tmp_path / "index.csv")
    row = dict.fromkeys(released.COLUMNS, "high") | {"ds": "i21k", "filename": "B_16-x"}
    (tmp_path / "index.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(UserError, match="no number"):
        released.select("B_16", released.read_index(tmp_path / "index.csv"))
    with pytest.raises(UserError, match="the index is broken at 'high'"):
        released.finetuned(released.read_index(tmp_path / "index.csv"))


def test_chosen_files_are_of_models_of_ours():
    for row in released.CHOSEN:
        stem = row.file.split("-")[0]
        assert models.find(row.model) == row.model == models.find(stem)
        assert f"--{row.dataset}-" in row.file
        assert f"-{row.pretraining}-" in row.file
        assert row.file.endswith(f"-res_{row.resolution}")
    tests = [row.test for row in released.CHOSEN]
    assert tests == sorted(tests, reverse=True)


def test_queries_of_an_index_against_the_table_itself():
    with INDEX.open() as file:
        table = list(csv.DictReader(file))
    wanted = [
        row
        for row in table
        if (row["name"], row["ds"], row["adapt_ds"]) == ("S/32", "i21k", "cifar100")
    ]
    wanted.sort(key=lambda row: float(row["adapt_final_val"]), reverse=True)
    assert len(wanted) > 5
    found = released.query(
        released.finetuned(released.read_index(INDEX)),
        model=["S/32"],
        pretraining="i21k",
        dataset="cifar100",
    )
    assert [row.file for row in found] == [row["adapt_filename"] for row in wanted]
    assert found[0].validation == pytest.approx(100 * float(wanted[0]["adapt_final_val"]))
    assert found[0].test == pytest.approx(100 * float(wanted[0]["adapt_final_test"]))
    assert {row.model for row in found} == {"vit_s32"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"dataset": "imagenet2021"}, "did you mean 'imagenet2012'"),
        ({"pretraining": "i22k"}, "did you mean 'i21k'"),
        ({"resolution": 225}, "resolution 225; valid: 384"),
        ({"model": ["vit_b17"]}, "'vit_b17' is unknown"),
        ({"model": ["vit_h14"]}, "no released checkpoint with model vit_h14"),
    ],
)
def test_what_is_not_there_is_named(wanted, message):
    with pytest.raises(UserError, match=message):
        released.query(released.CHOSEN, **wanted)
