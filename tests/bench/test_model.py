"""The step of a named model on made-up images, and how it is set beside other libraries'."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax.__main__ import main
from vit_jax.bench import model as bench_model
from vit_jax.bench import peers as bench_peers
from vit_jax.bench import torch_step
from vit_jax.bench.flax_step import FlaxStep
from vit_jax.errors import UserError

WITHOUT_TENSORFLOW = """
import json, sys

sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # Importing them fails.
from vit_jax.bench import model as bench_model

case = bench_model.Case("vit_ti32", 2, "float32")
print(json.dumps(bench_model.bench_model(case, [], steps=1, rounds=1)))
"""


class Peer:
    """Takes three times a tenth of a second a step."""

    compile_seconds = 2.0

    def __init__(self, name, model, batch_size, dtype):
        self.name = name.partition(":")[0]

    def seconds(self, steps):
        return 0.3 * steps

    def close(self):
        pass


class Ours:
    """Takes a tenth of a second a step of a million products and sums."""

    compile_seconds, flops, num_devices = 1.0, 1_000_000, 2

    def __init__(self, case):
        pass

    def seconds(self, steps):
        return 0.1 * steps


def test_ratios_and_shares(monkeypatch):
    monkeypatch.setattr(bench_model, "OurStep", Ours)
    monkeypatch.setattr(bench_peers, "PeerStep", Peer)
    monkeypatch.setattr(bench_model, "matmul_rate", lambda _: 20e6)
    case = bench_model.Case("vit_ti16", 16, "float32")
    found = bench_model.bench_model(case, ["timm-compile", "big_vision:/a/checkout"])
    assert found["big_vision_ratio"] == pytest.approx(3)
    assert found["images_per_sec"] == pytest.approx(160)
    assert found["timm_compile_ratio"] == pytest.approx(3)
    assert found["timm_compile_compile_seconds"] == 2
    # 10 MFLOP/s of twice 20.
    assert found["matmul_fraction"] == pytest.approx(0.25)


def test_the_step_of_a_model_without_tensorflow(request):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW],
        check=False,
        capture_output=True,
        env=os.environ | {"XLA_FLAGS": ""},
        text=True,
        cwd=request.config.rootpath,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["images_per_sec"] == pytest.approx(2 / found["step_seconds"])
    assert found["matmul_fraction"] > 0
    assert "mfu" not in found


def test_timms_names():
    assert torch_step.timm_name("vit_ti16") == "vit_tiny_patch16_224"
    assert torch_step.timm_name("vit_b32") == "vit_base_patch32_224"
    with pytest.raises(UserError, match="compares plain ViTs"):
        torch_step.timm_name("mixer_b16")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step"], "give --config=FILE, or for `bench step` --model=NAME"),
        (["input", "--model=vit_ti16"], "--model goes with `bench step`"),
        (["step", "--model=vit_ti16", "--against=tim"], "did you mean 'timm'?"),
        (["step", "--model=vit_ti16", "--against=big_vison:/x"], "did you mean 'big_vision'?"),
        (["step", "--model=vit_ti16", "--against=big_vision"], "give the folder of its checkout"),
        (["step", "--model=vit_tee16"], "model 'vit_tee16' is not known"),
        (["step", "--model=vit"], "not a whole image model"),
        (["step", "--model=vit_ti16", "--model.unrol=2"], "did you mean 'unroll'?"),
        (["input", "--config=c.py", "--model.unroll=2"], "write --config.model.FIELD"),
        (["step", "--config=c.py", "--batch=2"], "write --config.batch_size"),
        (["step", "--config=c.py", "--dtype=bfloat16"], "write --config.model.dtype"),
        (["step", "--model=mixer_b16", "--against=timm"], "compares plain ViTs"),
    ],
)
def test_what_cannot_be_measured(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answers = io.StringIO()
    bench_peers.serve(["timm", "vit_ti16", "2", "float32"], io.StringIO(), answers)
    assert "pip install -e '.[bench]'" in json.loads(answers.getvalue())


def test_a_peer_is_asked_and_answers(monkeypatch):
    class Steps:
        first_seconds = 7.0

        def __init__(self, name, batch_size, dtype, compiled):
            assert (name, batch_size, dtype, compiled) == ("vit_b16", 2, "float32", True)

        def seconds(self, steps):
            return 0.5 * steps

    monkeypatch.setattr(torch_step, "TorchStep", Steps)
    answers = io.StringIO()
    arguments = ["timm-compile", "vit_b16", "2", "float32"]
    bench_peers.serve(arguments, io.StringIO("4\n6\n"), answers)
    answers.seek(0)
    monkeypatch.setattr(bench_peers.subprocess, "Popen", lambda *_, **__: Process(answers))
    peer = bench_peers.PeerStep("timm-compile", "vit_ti16", 2, "float32")
    assert [peer.compile_seconds, peer.seconds(4), peer.seconds(6)] == [7.0, 2.0, 3.0]
    with pytest.raises(RuntimeError, match="timm-compile ended"):
        peer.seconds(1)


class Process:
    """A process that has said all it will."""

    def __init__(self, answers):
        self.stdin, self.stdout = io.StringIO(), answers


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


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """Where modules of both JAX codebases lie, in small; what imports them leaves no trace."""
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
    monkeypatch.setattr(vit_jax, "__path__", list(vit_jax.__path__))
    yield tmp_path
    for name in list(sys.modules):
        if name.startswith(("big_vision", "vit_jax.models_vit", "vit_jax.configs")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("peer", "model"), [("big_vision", "vit_s16"), ("vision_transformer", "vit_ti16")]
)
def test_models_of_the_jax_codebases_train(peer, model, checkouts):
    step = FlaxStep(peer, str(checkouts / peer), model, 2, "float32")
    before = jax.device_get(step._state[0])
    assert step.seconds(1) > 0
    assert jax.tree.map(np.shape, step._state[0]) == jax.tree.map(np.shape, before)
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, step._state[0], before))))


@pytest.mark.parametrize(
    ("peer", "model", "dtype", "message"),
    [
        ("big_vision", "vit_b16", "float32", "big_vision has no ViT of size B/16"),
        ("big_vision", "vit_s16", "bfloat16", "float32 alone"),
        ("big_vision", "mixer_s16", "float32", "compares plain ViTs"),
        ("vision_transformer", "vit_g14", "float32", "no model ViT-g_14"),
        ("vision_transformer", "vit_ti16", "bfloat16", "float32 alone"),
    ],
)
def test_what_the_jax_codebases_do_not_train(peer, model, dtype, message, checkouts):
    with pytest.raises(UserError, match=message):
        FlaxStep(peer, str(checkouts / peer), model, 2, dtype)


def test_a_folder_without_the_codebase(tmp_path, checkouts):
    with pytest.raises(UserError, match="give the folder that was cloned"):
        FlaxStep("big_vision", str(tmp_path / "elsewhere"), "vit_s16", 2, "float32")


@pytest.mark.interop
def test_timms_own_step():
    pytest.importorskip("torch", reason="needs the extra `bench`")
    peer = bench_peers.PeerStep("timm", "vit_ti16", 2, "float32")
    assert peer.seconds(1) > 0
    peer.close()
    with pytest.raises(UserError, match="timm has no model vit_tiny_patch32_224"):
        bench_peers.PeerStep("timm", "vit_ti32", 2, "float32")
