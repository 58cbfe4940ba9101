"""Where the pixels of a set are: in memory, or in a file without a name that is mapped, and read as it is needed."""

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HOLDS = ("auto", "memory", "disk")
SHARE = 8  # images take at most this part of the memory that is free: noise and protected copies take as much each
BLOCK = 1 << 20  # bytes of a set that are handled at once, so that temporary copies stay small however large it is


@dataclass(frozen=True)
class Storage:
    """Where sets that are read in go: "memory", "disk" (files in `folder`, else the system's temporary folder), or
    "auto": memory if they are small beside what is free, disk if not. The results are the same.

    Raises ValueError for another word.
    """

    hold: str = "auto"
    folder: str | os.PathLike | None = None

    def __post_init__(self):
        if self.hold not in HOLDS:
            raise ValueError(f"images are held in one of {', '.join(HOLDS)}, got {self.hold!r}")

    def scratch(self, size: int) -> Path | None:
        """The folder for a set of `size` bytes, None for memory; the nearest that exists above `folder`."""
        free = free_memory()
        small = free is None or size <= free // SHARE
        if self.hold == "memory" or (self.hold == "auto" and small):
            return None
        folder = Path(self.folder or tempfile.gettempdir()).absolute()
        return next(place for place in (folder, *folder.parents) if place.is_dir())


AUTO = Storage()


def free_memory() -> int | None:
    """Bytes that this machine, and the control groups and limits (ulimit) of this process, have left; None where the
    system does not say.
    """
    info, own = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if not info.exists():
        return None
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())[1])
    group = re.search(r"^0::/(.*)$", own.read_text() if own.exists() else "", re.MULTILINE)
    return max(0, min([free, *left_in_groups(Path("/sys/fs/cgroup"), group[1] if group else ""), *_left_in_limits()]))


def _left_in_limits() -> list[int]:
    import resource  # not on every system, but where /proc is

    left, status = [], Path("/proc/self/status").read_text()
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        if (most := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            left.append(most - 1024 * int(re.search(rf"{used}:\s+(\d+) kB", status)[1]))
    return left


def left_in_groups(root: Path, name: str) -> list[int]:
    """Bytes left in each control group from root/name up to root that has a limit; cached files count as free."""
    left = []
    for at in (root / name, *(root / name).parents):
        limit = at / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            cached = re.search(r"^inactive_file (\d+)$", (at / "memory.stat").read_text(), re.MULTILINE)
            left.append(int(text) - int((at / "memory.current").read_text()) + int(cached[1]))
        if at == root:
            break
    return left


def zeros(shape, dtype: torch.dtype, scratch: Path | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
    """A tensor of zeros: on `device`, or mapped from a file in the folder `scratch` that goes when the tensor does.

    The file has no name, so that not even a kill leaves it, and all its room from the start: a full disk is an OSError
    here, not a crash when it is written.
    """
    size = math.prod(shape) * dtype.itemsize
    if scratch is None or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        if size > shutil.disk_usage(scratch).free:  # asked first, so that others do not find a full disk meanwhile
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=scratch, prefix=".semkit-", suffix=".tmp") as file:
            _reserve(file, size)
            mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
    except OSError as error:
        error.filename = os.fspath(scratch)
        raise
    return torch.from_numpy(mapped).view(dtype).view(tuple(shape))


def _reserve(file, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what some file systems say
                raise
    for start in range(0, size, BLOCK):
        file.write(bytes(min(BLOCK, size - start)))
    file.flush()


def blocks(values: torch.Tensor | np.ndarray) -> Iterator[slice]:
    """Slices of the rows of [N,...], BLOCK bytes each at most, a row at least."""
    rows = max(1, BLOCK // max(1, values[:1].nbytes))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def fits(size: int, device: str | torch.device) -> bool:
    """Whether `size` bytes of images are few beside what is free on a GPU; True for the processor, where they are."""
    device = torch.device(device)
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // SHARE


def rows(source: torch.Tensor, index: torch.Tensor, scratch: Path | None = None) -> torch.Tensor:
    """source[index], new: on its device, or in `scratch` as `zeros` has it."""
    index = index.to(source.device)
    if scratch is None:
        return source[index]
    made = zeros((len(index), *source.shape[1:]), source.dtype, scratch)
    for part in blocks(made):
        made[part] = source[index[part]]
    return made


NO_MEMORY = (
    "not enough memory", "cannot allocate memory", "can't allocate memory", "out of memory", "bad_alloc",
    "alloc_failed", "could not create a prim",  # oneDNN's, whose nets here have no other reason
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python or torch says when there is no memory left, the machine's or the GPU's."""
    said = str(error).lower()  # no regular expression: to compile one takes memory
    told = isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
    return isinstance(error, MemoryError) or told
