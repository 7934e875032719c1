"""TensorFlow's SavedModel, for TensorFlow and TF Serving.

The op XlaCallModule of TensorFlow calls the program, which is StableHLO for CPU, GPU and TPU. The
weights are variables.
"""

from pathlib import Path

import numpy as np

from vit_jax.inference.exports import Format, Run
from vit_jax.inference.program import Program


def _write(program: Program, folder: Path) -> None:
    from vit_jax.data.host_tensorflow import call_stablehlo, tf

    names = sorted(program.weights)  # The order in which JAX flattens them.
    module = tf.Module()
    module.parameters = [tf.Variable(program.weights[name], trainable=False) for name in names]

    def call(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        found = call_stablehlo(program.exported, [*module.parameters, inputs])
        return dict(zip(program.output_names, found, strict=True))

    shape = [program.batch, *program.input.shape[1:]]
    spec = tf.TensorSpec(shape, program.input.dtype, program.name)
    module.call = tf.function(call, input_signature=[spec], autograph=False)
    tf.saved_model.save(module, str(folder), {"serving_default": module.call})


def _open(folder: Path) -> Run:
    from vit_jax.data.host_tensorflow import tf

    loaded = tf.saved_model.load(str(folder))

    def run(inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {name: x.numpy() for name, x in loaded.call(tf.constant(inputs)).items()}

    return run


FORMAT = Format(
    label="a SavedModel",
    write=_write,
    open=_open,
    usage="""\
import tensorflow as tf

model = tf.saved_model.load(".")
outputs = model.call(tf.constant(INPUT))
""",
    needs=("tensorflow",),
    extra="export",
)
