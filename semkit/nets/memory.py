"""What the C library does with memory that torch frees: glibc is asked to keep it and not to give it back."""

import ctypes
import functools
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST = 2**25, 2**31 - 1  # blocks mapped by themselves from here on, the most that glibc takes; free bytes kept
THEIRS = "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"


@functools.cache
def keep_freed() -> bool:
    """Whether this process keeps from now on what it frees: False without glibc, or where the user's environment has
    THEIRS.

    Every pass of a net frees its activations. glibc gives the top of the heap back to the system as it grows, and the
    next pass gets it again page by page, each one zeroed: thousands of page faults a pass, a sixth of a small net's
    time and more. What is held at most hardly changes; nothing of it is given back before the process ends.
    """
    if any(name in os.environ for name in THEIRS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST[0]) and mallopt(M_TRIM_THRESHOLD, LARGEST[1]))
