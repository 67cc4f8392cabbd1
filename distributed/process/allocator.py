"""Keeps freed memory in the process. Each step then gets pages that it used before, instead of new ones from the kernel.

glibc returns large blocks to the kernel when they are freed; the kernel must map and zero them again in the next step. On CPUs
that takes a quarter of a training step. See mallopt(3).
"""

import ctypes

from distributed.topology import allocator_is_configured

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed_memory() -> None:
    """Tell the C library not to return memory to the kernel. Settings in the environment, and other libraries, are left alone.

    Threads share one arena, because the arenas of threads are unmapped whenever they become empty.
    """
    if allocator_is_configured():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_ARENA_MAX, 1)
