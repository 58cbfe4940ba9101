"""Where tensors are: in memory, in a mapped file that is read as needed, in a safetensors file with a record."""

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semkit.images.files import atomic_write, one_line
from semkit.images.pixels import check_name

HOLDS = ("auto", "memory", "disk")
SHARE = 8  # a set in memory takes at most an eighth of what is free, because its noise and copies take as much each
BLOCK = 1 << 20  # bytes of a set that are processed at once, so that temporary copies stay small


@dataclass(frozen=True)
class Storage:
    """Where loaded sets are kept; results do not depend on it.

    hold: "memory", "disk", or "auto": memory for sets that are small compared to what is free, else disk.
    folder: for files on disk, by default the system's temporary folder. Raises ValueError for another word.
    """

    hold: str = "auto"
    folder: str | os.PathLike | None = None

    def __post_init__(self):
        check_name(self.hold, HOLDS, "storage")

    def scratch(self, size: int) -> Path | None:
        """The folder for a set of `size` bytes, the nearest existing one at or above `folder`; None for memory."""
        if self.hold == "memory":
            return None
        if self.hold == "auto" and ((free := free_memory()) is None or size <= free // SHARE):
            return None
        folder = Path(self.folder or tempfile.gettempdir()).absolute()
        return next(place for place in (folder, *folder.parents) if place.is_dir())


AUTO = Storage()


def free_memory() -> int | None:
    """Bytes of memory that this process can still take; None on systems other than Linux.

    The minimum of what is left of the machine, of the control groups (containers) and of the limits (ulimit).
    """
    if not (info := Path("/proc/meminfo")).exists():
        return None
    own = Path("/proc/self/cgroup")
    group = re.search(r"^0::/(.*)$", own.read_text() if own.exists() else "", re.MULTILINE)
    groups = left_in_groups(Path("/sys/fs/cgroup"), group[1] if group else "")
    return max(0, min([1024 * _number("MemAvailable:", info), *groups, *_left_in_limits()]))


def _number(name: str, path: Path) -> int:
    """The number after `name` at the beginning of a line of the file."""
    return int(re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)[1])


def _left_in_limits() -> list[int]:
    import resource  # not on every system, but on those with /proc

    limits, status = {"VmSize:": resource.RLIMIT_AS, "VmData:": resource.RLIMIT_DATA}, Path("/proc/self/status")
    most = {used: resource.getrlimit(limit)[0] for used, limit in limits.items()}
    return [n - 1024 * _number(used, status) for used, n in most.items() if n != resource.RLIM_INFINITY]


def left_in_groups(root: Path, name: str) -> list[int]:
    """Bytes left in each control group from root/name up to root that has a limit; cached files count as free."""
    left, group = [], root / name
    for at in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
        limit = at / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            used = int((at / "memory.current").read_text()) - _number("inactive_file", at / "memory.stat")
            left.append(int(most) - used)
    return left


def zeros(shape, dtype: torch.dtype, scratch: Path | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
    """A tensor of zeros on `device`, or mapped from a file in the folder `scratch`.

    The file has no name, so nothing of it is left when the tensor is gone, even after a kill. Its room is reserved at
    once: a full disk raises OSError here, and does not crash the process later.
    """
    size = math.prod(shape) * dtype.itemsize
    if scratch is None or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        if size > shutil.disk_usage(scratch).free:  # else other programs would meet a full disk for a moment
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
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # on file systems that cannot reserve
                raise
    for start in range(0, size, BLOCK):
        file.write(bytes(min(BLOCK, size - start)))
    file.flush()


def blocks(values: torch.Tensor | np.ndarray) -> Iterator[slice]:
    """Slices of the rows of [N,...], of at most BLOCK bytes but at least one row each."""
    rows = max(1, BLOCK // max(1, values[:1].nbytes))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def rows(source: torch.Tensor, index: torch.Tensor, scratch: Path | None = None) -> torch.Tensor:
    """A copy of source[index], on the device of `source` or mapped from a file in `scratch` (see zeros)."""
    index = index.to(source.device)
    if scratch is None:
        return source[index]
    made = zeros((len(index), *source.shape[1:]), source.dtype, scratch)
    for part in blocks(made):
        made[part] = source[index[part]]
    return made


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], record: dict) -> None:
    """Write tensors as safetensors, whole or not at all; record: JSON in the metadata "semkit". Raises OSError."""
    tensors = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    metadata = {"semkit": json.dumps(record, sort_keys=True)}

    def content(file):
        mode = os.stat(file.name).st_mode  # safetensors replaces the file by one that only its owner may read
        try:  # by name, because safetensors then writes from the tensors' own memory, without a copy
            save_file(tensors, file.name, metadata=metadata)
            os.chmod(file.name, mode)
        except SafetensorError as error:
            code = os.name == "posix" and re.search(r"os error (\d+)", str(error))
            raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(one_line(error))) from error

    atomic_write(path, content)


def read_tensors(path: str | Path, fields: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, mapped from the file, and these fields of the record) that write_tensors wrote; raises ValueError."""
    try:
        open(path, "rb").close()  # of a file without permission, safetensors says that it is missing
        with safe_open(path, framework="pt") as file:
            tensors, record = {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"not a readable safetensors file: {reason}") from error
    if "semkit" not in record:
        raise ValueError("no semkit metadata in it: this file was not written by semkit")
    try:
        record = json.loads(record["semkit"])
        return tensors, {name: record[name] for name in fields}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its semkit metadata is damaged: {type(error).__name__} {one_line(error)}") from error


NO_MEMORY = (
    "not enough memory", "cannot allocate memory", "can't allocate memory", "out of memory", "bad_alloc",
    "alloc_failed", "could not create a prim",  # oneDNN's, which has no other reason with the nets here
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that the memory of the machine or the GPU ran out."""
    message = str(error).lower()  # no regular expression, because compiling one takes memory
    of_torch = isinstance(error, RuntimeError) and any(words in message for words in NO_MEMORY)
    return isinstance(error, MemoryError) or of_torch
