"""`python -m vit_jax.launch.child PARENT ARGUMENTS...`: a run that does not outlive its parent.

Left alone it would hold the accelerators, and no one would know.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # From Linux's prctl.h.


def end_with(parent: int) -> None:
    """Asks for SIGTERM, on which a run saves and ends, once the process `parent` is gone."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except AttributeError:  # Not Linux.
        return
    if os.getppid() != parent:  # Gone already.
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = ["vit_jax", *sys.argv[2:]]
    runpy.run_module("vit_jax", run_name="__main__", alter_sys=True)
