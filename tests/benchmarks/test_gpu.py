"""The benchmark of a GPU, with tiny sizes on a CPU, and how it goes on where it stopped."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_checks
import gpu_steps
import gpu_table
import pytest

from vit_jax import data, tasks
from vit_jax.bench import machine
from vit_jax.types import DataInfo

OURS = {
    "step_seconds": 0.1,
    "images_per_sec": 2560.0,
    "matmul_fraction": 0.55,
    "device_bytes": 3 * 2**30,
    "compile_seconds": 21.0,
    "timm_time_ratio": 1.25,
}


@pytest.fixture
def without(monkeypatch):
    """As where torch and TensorFlow are not installed."""
    find_spec = importlib.util.find_spec
    missing = ("torch", "tensorflow")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )


@pytest.fixture
def one_compile(monkeypatch):
    """Compiles the first step alone, to save time; a soak test below compiles all."""
    compiled = []

    class Step(gpu_steps.OurStep):
        def __init__(self, config):
            if compiled and config.model.get("attention") != "cudnn":  # Which is refused.
                source = data.expect(config.data)
                tasks.build(config.task, config.model, DataInfo(source.spec, source.num_classes))
                self.batch_size, self.num_devices, self.flops = config.batch_size, 1, 10**9
                self.state_bytes, self.device_bytes, self.compile_seconds = 1000, 9000, 1.0
                self.seconds = lambda steps: 0.1 * steps
            else:
                super().__init__(config)
                compiled.append(config)

    def bfloat16(sizes, measured):
        return gpu_checks._within({"outputs": 0.01}, gpu_checks.BFLOAT16, "vit_b16", 1)

    monkeypatch.setattr(gpu_checks, "bfloat16", bfloat16)
    monkeypatch.setattr(gpu_steps, "OurStep", Step)
    monkeypatch.setattr(machine, "MATMULS", {"cpu": (64, 1)})


@pytest.mark.usefixtures("one_device", "without", "one_compile")
def test_everything_is_measured_once(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "gpu.json"
    assert gpu.main(["--tiny", f"--out={out}", "--seconds=0"]) == 75
    assert not out.exists()
    assert gpu.main(["--tiny", f"--out={out}"]) == 0
    (run,) = json.loads(out.read_text())["runs"]
    measured = run["measured"]
    names = list(gpu.measurements(gpu_steps.TINY))
    assert list(measured) == names
    for name in ("float32_outputs", "bfloat16", "fused_attention"):
        assert measured[name]["errors"], measured[name]
    compared = measured["vit_s16_4"]
    assert compared["xla"]["device_bytes"] > compared["xla"]["state_bytes"] > 0
    assert "needs an NVIDIA GPU" in compared["cudnn"]["skipped"]
    assert compared["timm"]["skipped"] == "torch is not installed"
    assert measured["vit_s16_largest"]["batch_size"] > 4
    for name in ("vit_s16_4", "vit_s16_largest", "mae_b16", "dinov2_s14"):
        (key,) = {"xla", "auto"} & measured[name].keys()
        assert measured[name][key]["images_per_sec"] > 0
    assert measured["vit_s16_largest_timm"]["skipped"] == "torch is not installed"
    assert measured["host"]["skipped"] == "tensorflow is not installed"
    table = out.with_suffix(".md").read_text()
    assert "- vit_s16_4, timm: not measured: torch is not installed." in table
    assert "| vit_s16_4 | 4 | ours, XLA's attention |" in table

    # What failed is measured again, and nothing else; with other code, all.
    measured["mae_b16"] = {"error": "RuntimeError"}
    del measured["host"]
    out.write_text(json.dumps({"runs": [run]}))
    taken = []

    def measure(name, sizes, record):
        taken.append(name)
        record.note(name, {"skipped": "by the test"})

    monkeypatch.setattr(gpu, "measure", measure)
    assert gpu.main(["--tiny", f"--out={out}"]) == 0
    assert taken == ["mae_b16", "host"]
    monkeypatch.setattr(gpu, "_code", lambda: "other")
    taken.clear()
    assert gpu.main(["--tiny", f"--out={out}"]) == 0
    assert taken == names
    assert len(json.loads(out.read_text())["runs"]) == 2


def test_no_speed_is_measured_where_results_are_wrong(tmp_path, monkeypatch, capsys):
    def wrong(sizes, measured):
        raise gpu_checks.Wrong("bit: outputs are off by 2, more than 5e-05")

    monkeypatch.setattr(gpu_checks, "goldens", wrong)
    out = tmp_path / "gpu.json"
    for _ in range(2):
        assert gpu.main(["--tiny", f"--out={out}"]) == 1
        assert "off by 2, more than 5e-05; no speed is measured" in capsys.readouterr().err
    (run,) = json.loads(out.read_text())["runs"]
    assert list(run["measured"]) == ["float32_outputs"]


def test_a_measurement_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(sizes, measured):
        raise RuntimeError("the device\nis gone")

    def fine(sizes, measured):
        return {"images_per_sec": 1.0}

    monkeypatch.setattr(gpu, "measurements", lambda _: {"mae_b16": broken, "other": fine})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", f"--out={out}"]) == 1
    (run,) = json.loads(out.read_text())["runs"]
    assert run["measured"]["mae_b16"]["error"] == "RuntimeError: the device"
    assert run["measured"]["other"]["images_per_sec"] == 1


@pytest.mark.parametrize(
    ("script", "results"),
    [
        ("import time; time.sleep(60)", {}),
        ("raise SystemExit(9)", {"mae_b16": {"error": "its process ended with 9"}}),
    ],
)
def test_a_process_that_hangs_or_dies(script, results, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(script)
    monkeypatch.setattr(gpu, "__file__", str(child))
    record = gpu.Record(tmp_path / "gpu.json", {"device": "none"}, gpu_steps.Sizes())
    gpu.in_child(tmp_path / "gpu.json", record, "mae_b16", 0.3 if not results else 20)
    assert record.run()["measured"] == results


def test_without_a_gpu_only_tiny_sizes_are_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_machine_by_child", lambda: {"device": "cpu", "platform": "cpu"})
    assert gpu.main([f"--out={tmp_path / 'gpu.json'}"]) == 2
    assert "no GPU; add --tiny" in capsys.readouterr().err


def test_the_largest_batch_is_a_multiple_that_fits():
    numbers = {"device_bytes": 10e9, "state_bytes": 2e9}  # 8 GB of 256 images.
    assert gpu_steps.fitting(numbers, 256, 40 * 10**9) == 1088  # (36 - 2) GB.
    assert gpu_steps.fitting(numbers, 256, 10**12) == 8 * 256
    assert gpu_steps.fitting(numbers, 256, 10**9) == 64


def test_the_table_tells_what_was_measured_and_what_not():
    run = {
        "machine": {"device": "NVIDIA H200"},
        "date": "2026-11-30",
        "commit": "abcdef0123456789",
        "packages": {"jax": "0.11.2"},
        "sizes": "full",
        "measured": {
            "bfloat16": {"errors": {"outputs": 0.003}, "bounds": {"outputs": 0.02}},
            "vit_b16_256": {"batch_size": 256, "cudnn": OURS, "timm": {"skipped": "no torch"}},
            "host": {"skipped": "tensorflow is not installed"},
        },
    }
    lines = gpu_table.markdown(run).splitlines()
    assert lines[0].startswith("NVIDIA H200, 2026-11-30, commit abcdef012345, jax 0.11.2")
    row = "| vit_b16_256 | 256 | ours, cuDNN's attention | 2,560 | 55% |  | 3.0 | 21 | 1.25 |"
    assert row in lines
    assert "- bfloat16, outputs: off by 3.0e-03, within 2.0e-02." in lines
    assert "- vit_b16_256, timm: not measured: no torch." in lines
    assert "- host: not measured: tensorflow is not installed." in lines


def test_the_script_says_what_is_missing(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a line >&2\necho \"No module named 'flax'\" >&2\nexit 1\n")
    python.chmod(0o755)
    environment = os.environ | {"VIT_JAX_PYTHON": str(python), "GPU_WHEELS": str(tmp_path)}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {python} cannot import vit_jax (No module named 'flax')")


@pytest.mark.gpu
def test_one_measurement_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "gpu.json"
    record = gpu.Record(out, gpu._machine_by_child(), gpu_steps.Sizes())
    gpu.in_child(out, record, "fused_attention", 300)
    assert record.run()["measured"]["fused_attention"]["errors"]


WITHOUT = """
import sys

for name in ("tensorflow", "tensorflow_datasets", "array_record", "numba", "pyarrow", "sklearn",
             "tensorboardX", "jinja2", "tokenizers", "sentencepiece"):
    sys.modules[name] = None  # Importing it fails.
sys.path.insert(0, sys.argv[1])
import gpu, gpu_steps

importlib_find = gpu_steps.importlib.util.find_spec
gpu_steps.importlib.util.find_spec = (
    lambda name: None if name in ("torch", "tensorflow") else importlib_find(name)
)
sys.exit(gpu.main(["--tiny", f"--out={sys.argv[2]}"]))
"""


@pytest.mark.soak
def test_only_the_base_packages_are_needed(tmp_path, request):
    benchmarks = request.config.rootpath / "benchmarks"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(benchmarks), str(tmp_path / "gpu.json")],
        check=False,
        capture_output=True,
        env=os.environ | {"XLA_FLAGS": ""},
        text=True,
        cwd=request.config.rootpath,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert run["measured"]["host"]["skipped"] == "tensorflow is not installed"
    assert not [name for name, result in run["measured"].items() if "error" in result]
