"""Measures loading of a large checkpoint: time and memory beside those of reading its file.

    python benchmarks/loading.py [--model=vit_g14] [--folder=/tmp]

Writes random weights of the model as `.safetensors` in timm's names, then in a process of its own
for each reads the file's bytes, and loads it as parameters. Prints seconds, of wall clock and of
CPU, and the growth of the largest memory as a share of the file's size.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import time

import flax.linen as nn
import jax
import numpy as np

from vit_jax import checkpoints, models


def write(name: str, path: pathlib.Path) -> None:
    """Writes random weights, in the layout that timm's files have."""
    model = models.build(name, num_classes=1000)
    key = jax.random.key(0)
    example = models.example_input(model, 224, 3)
    shapes = jax.eval_shape(model.init, key, example)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), nn.meta.unbox(shapes))
    checkpoints.save(params, model, path, "timm")


def read_bytes(path: pathlib.Path) -> object:
    """Returns the content of a file."""
    return path.read_bytes()


def load(path: pathlib.Path, name: str) -> object:
    """Returns the parameters of the model in a file."""
    return checkpoints.load(path, models.build(name, num_classes=1000))


def peak() -> int:
    """Returns the largest memory of this process so far, in bytes (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def measure(way: str, path: pathlib.Path, name: str) -> None:
    """Prints the seconds and the growth of memory of one way."""
    if way == "load":  # Start-up is before the clock: the backend, and what formats import.
        jax.eval_shape(lambda: jax.random.key(0))
        for format in checkpoints.FORMATS.names():
            checkpoints.FORMATS.find(format)
    before, start, worked = peak(), time.perf_counter(), time.process_time()
    kept = read_bytes(path) if way == "read" else load(path, name)
    seconds = time.perf_counter() - start
    worked = time.process_time() - worked
    share = (peak() - before) / path.stat().st_size
    print(
        f"{way}: {seconds:.1f} s, {worked:.1f} s of CPU, {share:.3f} of the file in memory",
        flush=True,
    )
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_g14")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp"))
    parser.add_argument("--way", choices=("read", "load"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.folder / f"{arguments.model}.safetensors"
    if arguments.way:
        measure(arguments.way, path, arguments.model)
        return
    if not path.exists():
        write(arguments.model, path)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")
    for _ in range(3):
        for way in ("read", "load"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--way={way}"], check=True)


if __name__ == "__main__":
    main()
