"""Settings of the allocator behind XLA's CPU client, glibc's malloc."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# In bytes. Below the smallest, glibc has a list for each size and searches nothing.
_SMALLEST_GAP, _LARGEST_GAP = 1024, 2**24


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that a step frees for the next step.

    On CPUs XLA allocates the temporary arrays of a step with malloc, from many threads. By default
    each thread's arena returns them to the kernel, and blocks above 32 MiB are always returned,
    whatever the threshold is. The kernel then provides them again page by page at the next step,
    which takes a quarter of the time of a small model's step, and a third of ViT-Ti/16's. With
    these settings there is one arena, no block has its own mapping, and nothing is returned.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # Another C library, another allocator.
        return
    for parameter, value in (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, -1),
    ):
        mallopt(parameter, value)


_taken: list[int] = []
"""The blocks that `tidy_heap` has allocated."""


class _Mallinfo2(ctypes.Structure):
    """glibc's statistics of its heap, in bytes; `keepcost` is the free space at its end."""

    _fields_ = (("others", ctypes.c_size_t * 9), ("keepcost", ctypes.c_size_t))


def tidy_heap() -> None:
    """Returns free memory to the kernel and allocates the gaps between the blocks in use.

    Compiling leaves tens of thousands of gaps of all sizes. malloc searches those of about the size
    that it needs while the threads of a step, and those that decode images, wait for it: a step of
    the digits' model took 1.3 times as long in the process that had compiled it as in one that
    loaded it. Call this before the first step, because later gaps are reused from step to step.
    Another call frees the gaps first.

    Call this after an evaluation, too. Its arrays lie where those of a step have been, so that the
    next step takes other memory, and the process would keep both.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _Mallinfo2
    except (OSError, AttributeError):  # Another C library, or one before 2.33.
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    while _taken:
        libc.free(_taken.pop())
    libc.malloc_trim(0)
    end_of_gaps = libc.sbrk(0) - libc.mallinfo2().keepcost
    size = _LARGEST_GAP
    while size >= _SMALLEST_GAP:
        block = libc.malloc(size)
        if block and block < end_of_gaps:
            _taken.append(block)
            continue
        libc.free(block)
        size = size * 7 // 8
