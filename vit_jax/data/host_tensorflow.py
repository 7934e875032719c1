"""TensorFlow without accelerators: `from vit_jax.data.host_tensorflow import tf`.

JAX uses the accelerators. TensorFlow allocates all memory of a GPU when it initializes it, so this
module, the only one of the package that imports TensorFlow, hides the accelerators from it.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# oneDNN only accelerates TensorFlow's own neural networks, and logs two messages at every start.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

__all__ = ["tf"]
