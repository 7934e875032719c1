"""Training steps of other libraries, and the protocol by which they are asked."""

import io
import json
import sys

import flax_step
import pytest
import timm_step
from serving import UserMistake, serve

BIG_VISION = """
import flax.linen as nn

class _Model(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, image, *, train=False):
        return nn.Dense(self.num_classes)(image.mean(axis=(1, 2))), {}

def Model(num_classes, *, variant, pool_type):
    {"S/16": None}[variant]
    return _Model(num_classes)
"""

VISION_TRANSFORMER = """
import flax.linen as nn

class VisionTransformer(nn.Module):
    num_classes: int
    hidden_size: int
    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(self.num_classes)(nn.Dense(self.hidden_size)(image.mean(axis=(1, 2))))
"""


def test_every_request_is_answered_with_seconds():
    answers = io.StringIO()

    def prepare(model, batch_size):
        assert (model, batch_size) == ("vit_b16", "2")
        return lambda steps: 0.5 * steps

    serve(prepare, ["vit_b16", "2"], io.StringIO("4\n6\n"), answers)
    ready, *seconds = map(json.loads, answers.getvalue().splitlines())
    assert ready >= 0
    assert seconds == [2.0, 3.0]


def test_a_mistake_is_answered_with_its_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answers = io.StringIO()
    serve(timm_step.prepare, ["vit_ti16", "2", "float32"], io.StringIO("1\n"), answers)
    assert "pip install -e '.[bench]'" in json.loads(answers.getvalue())


def test_timms_names():
    assert timm_step.timm_name("vit_ti16") == "vit_tiny_patch16_224"
    assert timm_step.timm_name("vit_b32") == "vit_base_patch32_224"
    with pytest.raises(UserMistake, match="compares plain ViTs"):
        timm_step.timm_name("mixer_b16")


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """A folder with modules of both JAX codebases, in small; their import leaves no trace."""
    files = {
        "big_vision/big_vision/models/vit.py": BIG_VISION,
        "vision_transformer/vit_jax/models_vit.py": VISION_TRANSFORMER,
        "vision_transformer/vit_jax/configs/models.py": (
            "MODEL_CONFIGS = {'ViT-Ti_16': {'hidden_size': 4}}"
        ),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ours = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "vit_jax"}
    for name in ours:  # Its package has the name of ours.
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in list(sys.modules):
        if name.split(".")[0] in ("big_vision", "vit_jax"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("codebase", "model"), [("big_vision", "vit_s16"), ("vision_transformer", "vit_ti16")]
)
def test_models_of_the_jax_codebases_train(codebase, model, checkouts):
    arguments = [codebase, str(checkouts / codebase), model, "2", "float32"]
    assert flax_step.prepare(*arguments)(1) > 0


@pytest.mark.parametrize(
    ("codebase", "model", "dtype", "message"),
    [
        ("big_vision", "vit_b16", "float32", "big_vision has no ViT of size B/16"),
        ("big_vision", "vit_s16", "bfloat16", "float32 alone"),
        ("big_vision", "mixer_s16", "float32", "compares plain ViTs"),
        ("vision_transformer", "vit_g14", "float32", "no model ViT-g_14"),
        ("vision_transformer", "vit_ti16", "bfloat16", "float32 alone"),
    ],
)
def test_what_the_jax_codebases_do_not_train(codebase, model, dtype, message, checkouts):
    with pytest.raises(UserMistake, match=message):
        flax_step.build(codebase, str(checkouts / codebase), model, dtype)


def test_a_folder_without_the_codebase(tmp_path, checkouts):
    with pytest.raises(UserMistake, match="give the folder that was cloned"):
        flax_step.build("big_vision", str(tmp_path / "elsewhere"), "vit_s16", "float32")


@pytest.mark.interop
def test_timms_own_step():
    pytest.importorskip("torch", reason="needs the extra `bench`")
    assert timm_step.prepare("vit_ti16", "2", "float32")(1) > 0
    with pytest.raises(UserMistake, match="timm has no model vit_tiny_patch32_224"):
        timm_step.prepare("vit_ti32", "2", "float32")
