"""Measures this package on one NVIDIA GPU, in turns with timm: `benchmarks/gpu.sh` calls it.

Correctness comes first: if a check fails, no speed is measured. Each measurement runs in a process
of its own, which frees all memory at its end, and its result is written at once. A second call goes
on where the first stopped, for the same code, device, packages and sizes; exit code 75 says that
something is left.
"""

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_steps
import gpu_table
from gpu_steps import TINY, Measured, Sizes, Skipped

from vit_jax.bench.machine import describe_machine
from vit_jax.errors import Interrupted
from vit_jax.storage import write_atomically
from vit_jax.version import current_commit

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm", "tensorflow", "tensorflow-cpu")
SECONDS = 465
"""The time of one call; what is under way then is ended, and measured again by the next call."""

LEAST_SECONDS = 30
"""No measurement begins with less time left."""


def measurements(sizes: Sizes) -> dict[str, Callable[[Sizes, Measured], dict[str, Any]]]:
    """Returns all measurements by name, in their order: checks, then what is wanted most."""
    found = {
        "float32_outputs": gpu_checks.goldens,
        "bfloat16": gpu_checks.bfloat16,
        "fused_attention": gpu_checks.fused_attention,
    }
    for model in sizes.models:
        found[gpu_steps.name_of(model, sizes)] = functools.partial(gpu_steps.compared, model)
    found |= {"mae_b16": gpu_steps.mae, "dinov2_s14": gpu_steps.dinov2, "host": gpu_steps.host}
    for model in sizes.models:
        found[f"{model}_largest"] = functools.partial(gpu_steps.largest, model)
        found[f"{model}_largest_timm"] = functools.partial(gpu_steps.largest_of_timm, model)
    return found


class Record:
    """The file of results: one run for each combination of code, device, packages and sizes."""

    def __init__(self, path: Path, machine: Mapping[str, Any], sizes: Sizes):
        self._path = path
        self._facts = {
            "code": _code(),
            "sizes": sizes.name,
            "machine": dict(machine),
            "packages": _packages(),
        }

    def run(self) -> dict[str, Any]:
        """Returns the run of this record's facts, as it is in the file now."""
        return self._of(self._runs())

    def note(self, name: str, result: Mapping[str, Any]) -> None:
        """Adds the result of one measurement to the file, and draws the table beside it anew."""
        runs = self._runs()
        run = self._of(runs)
        if run not in runs:
            runs.append(run)
        run["measured"][name] = dict(result)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, (json.dumps({"runs": runs}, indent=1) + "\n").encode())
        table = gpu_table.markdown(run) + "\n"
        write_atomically(self._path.with_suffix(".md"), table.encode())

    def _runs(self) -> list[dict[str, Any]]:
        return json.loads(self._path.read_text())["runs"] if self._path.exists() else []

    def _of(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        for run in runs:
            if self._facts.items() <= run.items():
                return run
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return {**self._facts, "commit": current_commit(), "date": today, "measured": {}}


def measure(name: str, sizes: Sizes, record: Record) -> None:
    """Takes one measurement in this process and notes its result, or why there is none."""
    started = time.perf_counter()
    try:
        result = measurements(sizes)[name](sizes, record.run()["measured"])
    except Skipped as reason:
        result = {"skipped": str(reason)}
    except gpu_checks.Wrong as error:
        result = {"wrong": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    record.note(name, {**result, "took_seconds": round(time.perf_counter() - started, 1)})


def measure_all(
    sizes: Sizes, record: Record, seconds: float, take: Callable[[str, float], None]
) -> int:
    """Takes the measurements that are missing, as long as there is time; returns the exit code.

    take: takes one measurement by its name, in so many seconds at most.
    """
    deadline = time.monotonic() + seconds
    for name in measurements(sizes):
        measured = record.run()["measured"]
        if not {"error", "wrong"}.isdisjoint(measured.get(name, ["error"])):
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                print(f"no time is left for {name} and what follows; call again", flush=True)
                return Interrupted.exit_code
            take(name, left)
            measured = record.run()["measured"]
            print(f"{name}: {json.dumps(measured.get(name, 'ran out of time'))}", flush=True)
        if "wrong" in measured.get(name, ()):
            print(f"error: {measured[name]['wrong']}; no speed is measured", file=sys.stderr)
            return 1
    failed = [name for name, result in measured.items() if "error" in result]
    missing = [name for name in measurements(sizes) if name not in measured]
    return Interrupted.exit_code if missing else int(bool(failed))


def in_child(out: Path, record: Record, name: str, seconds: float) -> None:
    """Takes one measurement in a process of its own, which ends when its time is up."""
    command = [sys.executable, __file__, f"--only={name}", f"--out={out}"]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    finally:
        if child.poll() is None:  # The process of timm is of the same group.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if code:
        record.note(name, {"error": f"its process ended with {code}"})


def _code() -> str:
    """Returns a checksum of the code that is measured, which also tells uncommitted changes."""
    found = hashlib.sha256()
    for folder in ("vit_jax", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _packages() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _machine_by_child() -> dict[str, Any]:
    """Returns what the device is, while this process takes no memory of it."""
    done = subprocess.run(
        [sys.executable, __file__, "--describe"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"), metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="Tiny sizes, all in this process.")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S")
    parser.add_argument("--only", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.describe:
        print(json.dumps(describe_machine()))
        return 0
    sizes = TINY if arguments.tiny else Sizes()
    if arguments.tiny or arguments.only:
        record = Record(arguments.out, describe_machine(), sizes)

        def take(name: str, _: float) -> None:
            measure(name, sizes, record)
    else:
        machine = _machine_by_child()
        if machine["platform"] != "gpu":
            print(
                f"error: JAX finds a {machine['platform']} and no GPU; add --tiny", file=sys.stderr
            )
            return 2
        record = Record(arguments.out, machine, sizes)
        take = functools.partial(in_child, arguments.out, record)
    if arguments.only:
        measure(arguments.only, sizes, record)
        return 0
    code = measure_all(sizes, record, arguments.seconds, take)
    print(f"{arguments.out}, and the table in {arguments.out.with_suffix('.md')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
