"""What becomes of memory that was freed."""

from __future__ import annotations

import ctypes

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it asks for next.

    The C library gives large blocks back at once, and each of their pages costs a page fault and
    4 KiB of zeros when it is asked for again: a training step on a CPU asks for gigabytes.

    Returns:
        Whether the C library can: glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
