"""TensorFlow for the host alone: `from vit_jax.data.host_tensorflow import tf`.

The accelerators belong to JAX. TensorFlow claims whole GPUs as soon as it initialises them, so they
are hidden from it here, the one place where this package imports it.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Only speeds up TensorFlow's own neural networks, and announces itself twice on every start.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

__all__ = ["tf"]
