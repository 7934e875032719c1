"""The gaps that compiling leaves in the heap are filled before the first step."""

import platform
import subprocess
import sys
import textwrap

import pytest

GAPS = textwrap.dedent("""
    import ctypes

    from vit_jax.parallel import host_memory

    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(5000) for _ in range(1000)]
    gaps = set(blocks[::2])
    for gap in gaps:
        libc.free(gap)

    host_memory.tidy_heap()
    again = [libc.malloc(5000) for _ in range(1000)]
    assert len(gaps & set(again)) < 10
    for block in again:
        libc.free(block)

    # What is free beside a gap is one with it, once the gap is given back: fewer blocks fill both.
    for block in blocks[1::2]:
        libc.free(block)
    num_taken = len(host_memory._taken)
    host_memory.tidy_heap()
    assert len(host_memory._taken) < num_taken - 250
""")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="gaps are those of glibc's heap")
def test_gaps_are_taken_and_given_back_by_the_next_call():
    """In a process whose heap nothing else changes meanwhile."""
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
