"""Settings of the allocator behind XLA's CPU client, glibc's malloc."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# In bytes. Up to the smallest, glibc has a list for each size, and nothing to look through.
_SMALLEST_GAP, _LARGEST_GAP = 1024, 2**24


def keep_freed_memory() -> None:
    """Tells glibc to keep what a step frees, for the next one.

    On CPUs XLA allocates a step's temporaries with malloc, from many threads. By default each
    thread's arena gives them back to the kernel, and blocks above 32 MiB always go back, whatever
    the threshold for them says; the kernel faults them in again, page by page, at the next step.
    That is a quarter of the time of a small model's step, and a third of ViT-Ti/16's. So there is
    one arena, no block is mapped on its own, and nothing is trimmed.
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
"""Where the gaps are that `fill_heap_gaps` has taken."""


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heap, in bytes; `keepcost` is free at the end of it."""

    _fields_ = (("others", ctypes.c_size_t * 9), ("keepcost", ctypes.c_size_t))


def fill_heap_gaps() -> None:
    """Takes what compiling has left free between blocks that are in use.

    Those are tens of thousands of gaps of all sizes. malloc looks through the ones of about the
    size that it needs while the threads of a step, and those that decode images, wait for it: a
    step of the digits' model took 1.3 times as long in the process that had compiled it as where it
    was loaded. To be called before the first step, because later gaps are what a step leaves for
    the next one. They stay in memory, as they would have; another call gives them back first.
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
    end_of_gaps = libc.sbrk(0) - libc.mallinfo2().keepcost
    size = _LARGEST_GAP
    while size >= _SMALLEST_GAP:
        block = libc.malloc(size)
        if block and block < end_of_gaps:
            _taken.append(block)
            continue
        libc.free(block)
        size = size * 7 // 8
