"""A run of ten thousand steps with evaluations and saves: memory, files and threads stay flat."""

import json
import os
import subprocess
import sys

import pytest

EVALUATIONS, SAVES = 50, 100

TEN_THOUSAND_STEPS = f"""
import json, os, sys
from pathlib import Path

from vit_jax import config as config_lib
from vit_jax.parallel import processes
from vit_jax.training.loop import train

class Notes:
    def __init__(self, workdir):
        self.workdir, self.found = Path(workdir), []

    def on_evaluate(self, step, metrics):
        self.found.append({{
            "step": step,
            "MiB": int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "checkpoints": len(os.listdir(self.workdir / "checkpoints")) if step > 200 else 0,
        }})

workdir, npz = sys.argv[1:]
processes.setup("", "default")
config = config_lib.load(f"tests/tiny.py:npz={{npz}},steps=10_000")
config.unlock()
config.eval.every, config.checkpoint.every, config.log.every = {EVALUATIONS}, {SAVES}, 10
notes = Notes(workdir)
train(config_lib.validate(config), workdir, callbacks=[notes])
print(json.dumps(notes.found))
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_steps_leave_nothing_behind(request, tmp_path, digits_npz):
    done = subprocess.run(
        [sys.executable, "-c", TEN_THOUSAND_STEPS, str(tmp_path), str(digits_npz)],
        check=False,
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
        env={**os.environ, "XLA_FLAGS": "", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    notes = json.loads(done.stdout.splitlines()[-1])
    print(*notes[:: len(notes) // 10], notes[-1], sep="\n")  # For `-s`.
    assert len(notes) == 10_000 // EVALUATIONS
    early, late = notes[len(notes) // 10 : len(notes) // 2], notes[len(notes) // 2 :]
    grown = {name: max(n[name] for n in late) - max(n[name] for n in early) for name in notes[0]}
    assert grown["MiB"] < 30  # Of about a thousand.
    assert grown["files"] <= 2
    assert grown["threads"] <= 2
    assert grown["checkpoints"] <= 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
