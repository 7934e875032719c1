"""The example notebooks: valid, without outputs, and, by a soak test, executed."""

import ast
import inspect
import json
import operator
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax import models

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        check_calls(ast.parse("".join(cell["source"])))
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def check_calls(code):
    """Calls of the package name what is there, with arguments that it takes."""
    for call in ast.walk(code):
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if name.startswith("vit_jax."):
            function = operator.attrgetter(name.removeprefix("vit_jax."))(vit_jax)
            named = dict.fromkeys(one.arg for one in call.keywords if one.arg)
            inspect.signature(function).bind_partial(*call.args, **named)


def test_there_is_a_notebook_for_each_wish():
    assert {path.stem for path in NOTEBOOKS} == {
        "attention_and_features", "finetune_and_export", "own_photos", "start", "tpu"
    }  # fmt: skip
    readme = (NOTEBOOKS[0].parents[1] / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"examples/{path.name}" not in readme] == []


def test_a_name_of_a_released_model_fetches_its_weights(tmp_path, monkeypatch):
    asked = []

    def build(name, **options):
        asked.append((name, options))
        model = models.build("vit_ti16", width=8, depth=1, num_heads=1)
        return model, model.init(jax.random.key(0), np.zeros((1, 224, 224, 3)))["params"]

    monkeypatch.setattr(vit_jax, "build", build)
    monkeypatch.setenv("VIT_JAX_EXAMPLE_DIR", os.fspath(tmp_path))
    monkeypatch.setenv("VIT_JAX_EXAMPLE_MODEL", "facebook/dinov2-small")
    (path,) = (path for path in NOTEBOOKS if path.stem == "attention_and_features")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells[:3]:
        exec("".join(cell["source"]), names)
    assert asked == [("facebook/dinov2-small", {"pretrained": True, "image_size": 224})]
    exec("".join(cells[-1]["source"]), names)
    assert names["unit"].shape == (3, 8)


@pytest.mark.soak
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("VIT_JAX_EXAMPLE_DIR", os.fspath(tmp_path))
    monkeypatch.setenv("VIT_JAX_EXAMPLE_STEPS", "10")
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(nbformat.read(path, 4), timeout=900, resources=place).execute()
