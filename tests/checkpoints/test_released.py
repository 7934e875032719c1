"""Choosing a file of the AugReg release from its index."""

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
    (tmp_path / "index.csv").write_text("ds,final_val,filename\ni21k,high,B_16-x\n")
    with pytest.raises(UserError, match="no number"):
        released.select("B_16", released.read_index(tmp_path / "index.csv"))


def test_released_names_are_models_of_ours():
    for entry in released.RELEASED:
        assert models.find(entry.name) == entry.name == models.find(entry.stem)
