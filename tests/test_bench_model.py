"""The step of a named model on made-up images, and how it is set beside other libraries'."""

import json
import os
import subprocess
import sys

import pytest

from vit_jax import bench_model, bench_peers
from vit_jax.__main__ import main
from vit_jax.errors import UserError

WITHOUT_TENSORFLOW = """
import json, sys

sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # Importing them fails.
from vit_jax import bench_model

case = bench_model.Case("vit_ti32", 2, "float32")
print(json.dumps(bench_model.bench_model(case, [], steps=1, rounds=1)))
"""


class Peer:
    """Takes three times a tenth of a second a step."""

    compile_seconds = 2.0

    def __init__(self, name, model, batch_size, dtype):
        self.name = name

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
    found = bench_model.bench_model(case, ["timm-compile"])
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
    assert bench_peers.timm_name("vit_ti16") == "vit_tiny_patch16_224"
    assert bench_peers.timm_name("vit_b32") == "vit_base_patch32_224"
    with pytest.raises(UserError, match="compares plain ViTs"):
        bench_peers.timm_name("mixer_b16")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step"], "give --config=FILE, or for `bench step` --model=NAME"),
        (["input", "--model=vit_ti16"], "--model goes with `bench step`"),
        (["step", "--model=vit_ti16", "--against=tim"], "did you mean 'timm'?"),
        (["step", "--model=vit_tee16"], "model 'vit_tee16' is not known"),
        (["step", "--model=vit"], "not a whole image model"),
        (["step", "--model=mixer_b16", "--against=timm"], "compares plain ViTs"),
    ],
)
def test_what_cannot_be_measured(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(bench_peers.multiprocessing, "get_context", lambda _: Threads)
    assert main(["bench", "step", "--model=vit_ti16", "--against=timm"]) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


class Threads:
    """Stands for a context of processes: this one's modules are what they would import."""

    @staticmethod
    def Pipe():
        import multiprocessing

        return multiprocessing.Pipe()

    class Process:
        def __init__(self, target, args, daemon):
            self.start = lambda: target(*args)

        def terminate(self):
            pass

        def join(self):
            pass
