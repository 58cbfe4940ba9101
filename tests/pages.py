"""Memory that is held for certain, where a new tensor may lie in what an earlier test has freed."""

import mmap


def fresh_pages(size: int) -> mmap.mmap:
    """`size` bytes in pages fresh from the kernel, each one touched; they go with the object."""
    held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, mmap.PAGESIZE):
        held[start] = 1
    return held
