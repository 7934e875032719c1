"""Formats as plug-ins: each is recognized by itself alone, and a new one is one file."""

import json
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN
from models_to_save import build

from vit_jax import checkpoints
from vit_jax.__main__ import main
from vit_jax.checkpoints import FORMATS
from vit_jax.checkpoints.source import Source
from vit_jax.errors import UserError

# Written by this package with `to`, or recorded from the package that defines the format.
SAVED = [("token", "npz"), ("map", "big_vision"), ("bit", "bit"), ("mixer", "npz"), ("token", "hf"),
         ("hybrid", "npz"), ("token", "timm"), ("mixer", "timm"), ("token", "orbax")]  # fmt: skip
RECORDED = {
    "interop/timm_swiglu.safetensors": "timm",
    "interop/torch_training.pth": "timm",
    "interop/hf_pooler": "hf",
    "interop/hf_classifier/model.safetensors": "hf",
    "vision_transformer/lit_texttransformer.params.npz": "npz",
    "vision_transformer/lit_bert.params.npz": "npz",
    "big_vision/vit_tok_learn_rep24_params.npz": "big_vision",
    "workdir_v1": "orbax",
    "workdir_v1/checkpoints/4": "orbax",
}


def formats_of(path):
    with Source.open(path) as source:
        return [name for name in FORMATS.names() if FORMATS.find(name).matches(source)]


@pytest.mark.parametrize(("name", "to"), SAVED)
def test_what_is_written_is_recognized_as_one_format(tmp_path, name, to):
    model, params, images = build(name)
    path = tmp_path / f"c{FORMATS.find(to).ending}"
    checkpoints.save(params, model, path, to, image_size=images.shape[1:3])
    assert formats_of(path) == [to]


@pytest.mark.parametrize("path", RECORDED)
def test_recorded_files_are_recognized_as_one_format(path):
    assert formats_of(GOLDEN / path) == [RECORDED[path]]


def test_a_folder_of_timm_is_read_by_its_config(tmp_path):
    model, params, _ = build("token")
    checkpoints.save(params, model, tmp_path / "c.safetensors", "timm")
    (tmp_path / "hub").mkdir()
    shutil.move(tmp_path / "c.safetensors", tmp_path / "hub/model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3}}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    assert formats_of(tmp_path / "hub") == ["timm"]
    back = checkpoints.load(tmp_path / "hub", model)
    jax.tree.map(np.testing.assert_array_equal, back, params)


# One file of somebody else's: arrays of .npz under the names of this package.
PLUGIN = """
    import numpy as np

    from vit_jax.checkpoints.formats import Format
    from vit_jax.checkpoints.weights import Weights, from_params


    def read(source):
        with np.load(source.path) as stored:
            return Weights(arrays=dict(stored), format="plain npz")


    def write(path, params, model, image_size):
        np.savez(path, **from_params(params, model))
        return f"wrote {path} at {image_size}"


    FORMAT = Format(
        label="plain npz",
        matches=lambda source: False,
        read=read,
        write=write,
        expresses=frozenset({"a ViT", "class token"}),
        ending=".plain.npz",
    )
    OTHER = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "plain_format.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plain_format", raising=False)
    return "plain_format:FORMAT"


def test_a_format_from_outside_is_one_file(tmp_path, plugin):
    model, params, _ = build("token")
    path = tmp_path / "c.plain.npz"
    assert checkpoints.save(params, model, path, plugin, image_size=12) == f"wrote {path} at 12"
    back = checkpoints.load(path, model, format=plugin)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(UserError, match="no format known here"):
        checkpoints.load(path, model)
    with pytest.raises(UserError, match=r"ends in \.plain\.npz"):
        checkpoints.save(params, model, tmp_path / "c.npz", plugin)
    with pytest.raises(UserError, match="plain_format:FORMAT has no place for mean pooling"):
        checkpoints.save({}, build("mean")[0], path, plugin)
    with pytest.raises(UserError, match="plain_format:OTHER' is no checkpoint format"):
        checkpoints.load(path, model, format="plain_format:OTHER")
    (tmp_path / "cut.plain.npz").write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is broken or cut short"):
        checkpoints.load(tmp_path / "cut.plain.npz", model, format=plugin)


def test_convert_takes_formats_from_outside(tmp_path, plugin, capsys):
    model, params, _ = build("token")
    checkpoints.save(params, model, tmp_path / "c.npz", "npz")
    places = [str(tmp_path / name) for name in ("c.npz", "d.plain.npz", "e.npz")]
    assert main(["convert", *places[:2], f"--to={plugin}"]) == 0
    back = ["--from=plain_format:FORMAT", "--to=npz", "--model.class_token_position=true"]
    assert main(["convert", *places[1:], *back]) == 0
    capsys.readouterr()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(places[2], model), params)
    for given, words in (
        ("--to=tim", "--to='tim' is no checkpoint format; did you mean 'timm'?"),
        ("--to=nowhere:F", "--to='nowhere:F' cannot be imported"),
        ("--to=plain_format:OTHER", "is no checkpoint format; write package.module:FORMAT"),
    ):
        assert main(["convert", *places[:2], given]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_help_lists_the_formats_without_loading_them():
    code = (
        "import sys, contextlib\n"
        "from vit_jax.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['convert', '--help'])\n"
        "print([name for name in ('jax', 'orbax', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert "big_vision, bit, hf, npz, open_clip, orbax, timm, or package.module:FORMAT" in text
    assert text.endswith("[]")
