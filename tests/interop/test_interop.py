"""Exports for timm and transformers are loaded by timm and transformers themselves.

pip install -e '.[interop,test]'
pytest -m interop tests/interop
"""

import functools
import types

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN, load_timm
from models_to_save import MODELS, build
from real_packages import import_packages

from vit_jax import checkpoints
from vit_jax.checkpoints import loading
from vit_jax.checkpoints.fit.inference import infer_model
from vit_jax.errors import UserError

pytestmark = pytest.mark.interop

timm, transformers = import_packages()
torch = pytest.importorskip("torch", reason="needs the extra `interop`")

ENDINGS = {"npz": ".npz", "timm": ".safetensors", "hf": ""}
PAIRS = [
    (name, to)
    for name, row in MODELS.items()
    for to in row[3].split()
    if to in ("timm", "hf") or (to == "npz" and row[0].startswith(("vit", "bit")))
]
# Kinds whose npz timm does not read as they are, and whose text offers no call.
NO_CALL = ("representation", "unpooled", "no_encoder")


def run_call(text):
    """Runs the printed statements; `model` is what they made."""
    line = text.splitlines()[-1].partition(": ")[2]
    names = {"timm": timm, "transformers": transformers, "functools": functools}
    exec(line, names)
    return names["model"].eval()


@pytest.mark.parametrize(("name", "to"), [p for p in PAIRS if p[0] not in NO_CALL or p[1] != "npz"])
def test_equal_logits(tmp_path, name, to):
    model, params, images = build(name)
    text = checkpoints.save(
        params, model, tmp_path / f"c{ENDINGS[to]}", to, image_size=images.shape[1:3]
    )
    expected = jax.jit(model.apply)({"params": params}, images)
    expected = np.asarray(getattr(expected, "pooled", expected))
    with torch.no_grad():
        out = run_call(text)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    actual = logits_of(out).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def timm_kinds():
    """The stored models of timm that have a config."""
    return sorted(path.parent.name for path in (GOLDEN / "timm_tiny").glob("*/config.json"))


@pytest.mark.parametrize("kind", timm_kinds())
def test_timms_own_models_go_back_to_timm(tmp_path, kind):
    stored, path = load_timm(kind), GOLDEN / "timm_tiny" / kind
    weights = loading.read_weights(path)
    model = infer_model(weights)
    size = stored["images"].shape[1:3]
    params, _ = loading.fit(weights, model, str(path), image_size=size, take=True)
    if kind in NOT_WRITTEN:
        with pytest.raises(UserError, match="timm has no place for"):
            checkpoints.save(params, model, tmp_path / "c.safetensors", "timm", image_size=size)
        return
    text = checkpoints.save(params, model, tmp_path / "c.safetensors", "timm", image_size=size)
    with torch.no_grad():
        images = stored["images"].transpose(0, 3, 1, 2)
        actual = run_call(text)(torch.from_numpy(np.ascontiguousarray(images))).numpy()
    largest = np.abs(stored["outputs"]).max()
    np.testing.assert_allclose(actual, stored["outputs"], rtol=0, atol=1e-5 * largest)


# Scale and shift in place of norms, and a stem of convolutions whose batch norms are folded.
NOT_WRITTEN = ("resmlp_12_224", "vit_base_mci_224")


def logits_of(out):
    if hasattr(out, "logits"):
        return out.logits
    return out.last_hidden_state[:, 0] if hasattr(out, "last_hidden_state") else out


@pytest.mark.parametrize("name", NO_CALL)
def test_no_call_is_offered_that_would_be_wrong(tmp_path, name):
    model, params, _ = build(name)
    text = checkpoints.save(params, model, tmp_path / "c.npz", "npz", image_size=12)
    assert "create_model" not in text


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_files(tmp_path, wrapper):
    """`.bin` and `.pth`: the same arrays as `.safetensors`, and bfloat16 is read."""
    model, params, _ = build("token")
    text = checkpoints.save(params, model, tmp_path / "c.safetensors", "timm")
    state = run_call(text).state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "c.pth")
    back = checkpoints.load(tmp_path / "c.pth", model)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    half = {name: x.bfloat16() for name, x in state.items()}
    torch.save(half, tmp_path / "half.bin", _use_new_zipfile_serialization=False)
    back = checkpoints.load(tmp_path / "half.bin", model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2), back, params)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("this must never be printed",)


def test_torch_files_run_no_code(tmp_path, capsys):
    model, _, _ = build("token")
    for content in (Malicious(), {"head.weight": Malicious()}, types.SimpleNamespace(a=1)):
        torch.save(content, tmp_path / "c.pth")
        with pytest.raises(UserError, match=r"not a state dict|holds no arrays"):
            checkpoints.load(tmp_path / "c.pth", model)
    assert "never" not in capsys.readouterr().out
