"""ONNX, for ONNX Runtime and what else reads it."""

from pathlib import Path

import numpy as np

from vit_jax.inference.exports import Format, Run
from vit_jax.inference.program import Program

_FILE = "model.onnx"
_WEIGHTS = "weights.bin"
_MOST_BYTES = 1_500_000_000
"""A file of ONNX holds less than 2 GiB. Larger weights go into a file beside it."""


def _write(program: Program, folder: Path) -> None:
    import onnx

    from vit_jax.inference.exports import _onnx_graph, _onnx_operators

    model = _onnx_graph.translate(
        program.traced,
        program.weights,
        program.name,
        program.output_names,
        _onnx_operators.OPERATORS,
    )
    is_large = sum(array.nbytes for array in program.weights.values()) > _MOST_BYTES
    onnx.save_model(model, str(folder / _FILE), save_as_external_data=is_large, location=_WEIGHTS)


def _open(folder: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / _FILE), providers=["CPUExecutionProvider"])
    (given,), names = session.get_inputs(), [one.name for one in session.get_outputs()]

    def run(inputs: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {given.name: inputs}), strict=True))

    return run


FORMAT = Format(
    label="ONNX",
    write=_write,
    open=_open,
    usage=f"""\
import onnxruntime

session = onnxruntime.InferenceSession("{_FILE}")
found = session.run(None, {{session.get_inputs()[0].name: INPUT}})
outputs = dict(zip([output.name for output in session.get_outputs()], found))
""",
    needs=("onnx", "onnxruntime"),
    extra="onnx",
)
