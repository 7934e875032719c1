"""Measures the time from the start of a run to its first step."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

IMPORTS = (
    "import jax, flax, optax, orbax.checkpoint, tensorflow, tensorflow_datasets\n"
    "import vit_jax.training.loop"
)
"""The imports of a training run on a TFDS dataset."""


def bench_start(
    config_spec: str, overrides: Mapping[str, str], rounds: int = 3
) -> dict[str, float]:
    """Measures the time of a second start to its first step, against its imports alone.

    Both are whole processes, run in turns; one start before them fills the compilation cache.
    """
    _seconds_to_first_step(config_spec, overrides)
    imports, first_steps = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
        imports.append(time.perf_counter() - started)
        first_steps.append(_seconds_to_first_step(config_spec, overrides))
    return {
        "import_seconds": statistics.median(imports),
        "first_step_seconds": statistics.median(first_steps),
        "first_step_over_imports": statistics.median(
            step / alone for step, alone in zip(first_steps, imports, strict=True)
        ),
    }


def _seconds_to_first_step(config_spec: str, overrides: Mapping[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vit_jax", "train", f"--config={config_spec}",
                f"--workdir={Path(folder) / 'run'}",
                *(f"--config.{key}={value}" for key, value in overrides.items()),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - started
                process.kill()
                process.communicate()
                return seconds
        process.wait()
        raise RuntimeError(f"the run ended before its first step: {''.join(said[-3:])}")
