"""`python -m vit_jax.launch.child PARENT ARGUMENTS...` starts a run that ends with its parent.

Without this, a run could continue to occupy the accelerators unnoticed after its parent has ended.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # From Linux's prctl.h.


def end_with(parent: int) -> None:
    """Requests SIGTERM, on which a run saves and ends, for the time when `parent` has ended."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except AttributeError:  # Not Linux.
        return
    if os.getppid() != parent:  # The parent has already ended.
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = ["vit_jax", *sys.argv[2:]]
    runpy.run_module("vit_jax", run_name="__main__", alter_sys=True)
