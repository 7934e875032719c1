"""The step of a named model on made-up images, and how it is set beside other libraries'."""

import json
import os
import subprocess
import sys

import pytest

from vit_jax.__main__ import main
from vit_jax.bench import model as bench_model

WITHOUT_TENSORFLOW = """
import json, sys

sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # Importing them fails.
from vit_jax.bench import model as bench_model

case = bench_model.Case("vit_ti32", 2, "float32")
print(json.dumps(bench_model.bench_model(case, [], steps=1, rounds=1)))
"""


class Other:
    """Takes three times a tenth of a second for a step."""

    ready_seconds = 2.0

    @classmethod
    def of_step(cls, name, model, batch_size, dtype):
        other = cls()
        other.name = name.partition(":")[0]
        return other

    def seconds(self, steps):
        return 0.3 * steps

    def close(self):
        pass


class Ours:
    """Takes a tenth of a second a step of a million products and sums."""

    compile_seconds, flops, num_devices, device_bytes = 1.0, 1_000_000, 2, 4096

    def __init__(self, config):
        self.batch_size = config.batch_size

    def seconds(self, steps):
        return 0.1 * steps


def test_ratios_and_shares(monkeypatch):
    monkeypatch.setattr(bench_model, "OurStep", Ours)
    monkeypatch.setattr(bench_model, "Rival", Other)
    monkeypatch.setattr(bench_model, "matmul_rate", lambda _: 20e6)
    case = bench_model.Case("vit_ti16", 16, "float32")
    found = bench_model.bench_model(case, ["timm-compile", "big_vision:/a/checkout"])
    assert found["big_vision_ratio"] == pytest.approx(3)
    assert found["images_per_sec"] == pytest.approx(160)
    assert found["timm_compile_ratio"] == pytest.approx(3)
    assert found["timm_compile_compile_seconds"] == 2
    # 10 MFLOP/s of twice 20.
    assert found["matmul_fraction"] == pytest.approx(0.25)


@pytest.mark.soak
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["step"], "give --config=FILE, or for `bench step` --model=NAME"),
        (["input", "--model=vit_ti16"], "--model goes with `bench step`"),
        (["step", "--model=vit_ti16", "--against=tim"], "did you mean 'timm'?"),
        (["step", "--model=vit_ti16", "--against=big_vison:/x"], "did you mean 'big_vision'?"),
        (["step", "--model=vit_ti16", "--against=big_vision"], "give the folder of its checkout"),
        (["step", "--model=vit_tee16"], "model 'vit_tee16' is unknown"),
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
