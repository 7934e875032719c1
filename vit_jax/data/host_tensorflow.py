"""TensorFlow without accelerators: `from vit_jax.data.host_tensorflow import tf`.

JAX uses the accelerators. TensorFlow allocates all memory of a GPU when it initializes it, so this
module, the only one of the package that imports TensorFlow, hides the accelerators from it.
"""

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# oneDNN only accelerates TensorFlow's own neural networks, and logs two messages at every start.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")


def call_stablehlo(exported: Any, arguments: Sequence[Any]) -> Sequence[Any]:
    """Returns the outputs of a `jax.export.Exported` program, called by the op XlaCallModule.

    arguments: tensors or variables for the program's flat arguments. Dimensions of the outputs that
    are symbols in the program are unknown.
    """
    from tensorflow.compiler.tf2xla.python import xla  # The op is not among `tf.raw_ops`.

    avals = exported.out_avals
    shapes = [[side if isinstance(side, int) else None for side in aval.shape] for aval in avals]
    return xla.call_module(
        [arguments[i] for i in exported.module_kept_var_idx],
        version=exported.calling_convention_version,
        module=exported.mlir_module_serialized,
        Tout=[tf.as_dtype(aval.dtype) for aval in avals],
        Sout=[tf.TensorShape(shape) for shape in shapes],
        platforms=[platform.upper() for platform in exported.platforms],
    )


__all__ = ["call_stablehlo", "tf"]
