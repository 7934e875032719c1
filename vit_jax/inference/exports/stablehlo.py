"""StableHLO through `jax.export`, with the weights beside it: for JAX on CPU, GPU and TPU.

`jax.export` keeps programs loadable for at least six months; the weights are plain safetensors.
"""

from pathlib import Path

import jax.export
import numpy as np
import safetensors.numpy

from vit_jax.inference.exports import Format, Run
from vit_jax.inference.program import Program

_PROGRAM = "program.stablehlo"
_WEIGHTS = "weights.safetensors"


def _write(program: Program, folder: Path) -> None:
    (folder / _PROGRAM).write_bytes(program.exported.serialize())
    safetensors.numpy.save_file(dict(program.weights), folder / _WEIGHTS)


def _open(folder: Path) -> Run:
    loaded = jax.export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
    weights = jax.device_put(safetensors.numpy.load_file(folder / _WEIGHTS))
    call = jax.jit(loaded.call)

    def run(inputs: np.ndarray) -> dict[str, np.ndarray]:
        return jax.device_get(call(weights, inputs))

    return run


FORMAT = Format(
    label="StableHLO",
    write=_write,
    open=_open,
    usage=f"""\
import jax
import jax.export
import safetensors.numpy

with open("{_PROGRAM}", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
weights = safetensors.numpy.load_file("{_WEIGHTS}")
outputs = jax.jit(program.call)(weights, INPUT)
""",
)
