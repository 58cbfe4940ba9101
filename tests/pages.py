"""Memory that is held for certain, where a new tensor may lie in what an earlier test has freed; works elsewhere."""

import mmap
import os
import signal
from functools import partial
from pathlib import Path

from semkit.nets.engine import keep_freed


def fresh_pages(size: int) -> mmap.mmap:
    """`size` bytes in pages fresh from the kernel, each one touched; they go with the object."""
    held = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, mmap.PAGESIZE):
        held[start] = 1
    return held


def saying_where(path: Path) -> dict:
    """A work that writes the number of its process, and whether that was asked to keep what it frees (0: no)."""
    return {"a work": lambda: path.write_text(f"{os.getpid()} {keep_freed.cache_info().currsize}")}


def killed_at_work():
    """A work at which its process is killed, as the system does where memory ends."""
    return {"a work": partial(os.kill, os.getpid(), signal.SIGKILL)}
