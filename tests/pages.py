"""Memory that is held for certain: a new tensor may lie in what an earlier test has freed and the process kept."""

import mmap
import os
from pathlib import Path

from semkit.memory import keep_freed


def fresh_pages(size: int) -> mmap.mmap:
    """`size` bytes in pages fresh from the kernel, each one touched; they go with the object."""
    held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, mmap.PAGESIZE):
        held[start] = 1
    return held


def saying_where(path: Path) -> dict:
    """A work that writes the number of its process, and whether that was asked to keep what it frees (0: no)."""
    return {"a work": lambda: path.write_text(f"{os.getpid()} {keep_freed.cache_info().currsize}")}
