"""The places that TPU slices come from, one file each; `launcher` of a file is its plug-in.

It takes (slices, shell, poll), and returns a `vit_jax.launch.launcher.Launcher`.
"""

from vit_jax.launch.slices import Slices
from vit_jax.plugins import Kind

BACKENDS = Kind("backend", __name__, "launcher", "package.module:function")


def usual(slices: Slices) -> str:
    """Returns the backend for slices of a type: Cloud TPU, or Compute Engine where it stops.

    The Cloud TPU API serves v2 to v6e (docs.cloud.google.com/tpu/docs/queued-resources).
    """
    shape = slices.shape
    return "compute_engine" if shape and not shape.tpu.runtime else "cloud_tpu"
