"""Labelled images as tensors, in memory or streamed from disk: ImageSet, Split, their seeded parts, their storage."""

import errno
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from semkit.images.pixels import add_noise, check_count, check_fraction, check_name, check_seed, check_tensor

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


def taken(source: torch.Tensor, index: torch.Tensor, scratch: Path | None = None) -> torch.Tensor:
    """A copy of source[index], on the device of `source` or mapped from a file in `scratch` (see zeros)."""
    index = index.to(source.device)
    if scratch is None:
        return source[index]
    made = zeros((len(index), *source.shape[1:]), source.dtype, scratch)
    for part in blocks(made):
        made[part] = source[index[part]]
    return made


def _ranks(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's rank [N] in a random order of its class, and the size [N] of its class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(check_seed(seed)))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - starts[labels[order]]
    return ranks, counts[labels]


def stratified_limit(labels: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """Choose n images: sorted indices, every class in its share and at least once; all if n >= N.

    labels [N]. Raises ValueError if n is below the number of classes.

    >>> stratified_limit(torch.tensor([0, 0, 0, 0, 1, 1]), 3).tolist()
    [2, 3, 5]
    """
    n = check_count(n, "limit", 1)
    if n >= len(labels):
        return torch.arange(len(labels))
    if n < (classes := len(labels.unique())):
        raise ValueError(f"limit must be at least the number of classes, {classes}, got {n}")
    ranks, sizes = _ranks(labels.cpu(), seed)
    return (ranks / sizes.double()).argsort(stable=True)[:n].sort().values


def stratified_share(labels: torch.Tensor, fraction: float, seed: int = 0) -> torch.Tensor:
    """Choose `fraction` of every class, at least one image: sorted indices.

    Raises ValueError for a fraction outside (0, 1].
    """
    n = round(check_fraction(fraction) * len(labels))
    return stratified_limit(labels, max(len(labels.unique()), n), seed)


def stratified_split(labels: torch.Tensor, test_share: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide images: indices of train and test, round(test_share * size) of every class as test, at least one in each.

    Raises ValueError if test_share is not in (0, 1), or if a class has a single image.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share:g}")
    ranks, sizes = _ranks(labels.cpu(), seed)
    if (sizes < 2).any():
        raise ValueError(f"class {labels[sizes.argmin()]} has a single image: one is needed to train, one to test")
    in_test = ranks < (sizes * test_share).round().clamp(min=1).minimum(sizes - 1)
    return (~in_test).nonzero()[:, 0], in_test.nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images: images uint8 [N,3,H,W], labels int64 [N] into `classes`; files: relative names, or ().

    scratch: for a streamed set, the folder of the mapped files of its images and of everything made from them.
    Raises ValueError if the fields do not agree.

    >>> sk.ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), ("cat", "dog"))
    ImageSet('images', 2 images of 8x8, 2 classes)
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    name: str = "images"
    files: tuple[str, ...] = ()
    scratch: Path | None = None

    def __post_init__(self):
        images, labels = check_tensor(self.images, "images"), check_tensor(self.labels, "labels")
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "files", tuple(self.files))
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 [N,3,H,W], got {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(f"labels must be 0 to {len(self.classes) - 1}, got {labels.min()} to {labels.max()}")
        if self.files and len(self.files) != len(images):
            raise ValueError(f"{len(images)} images, but {len(self.files)} file names")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[2:]))
        held = ", streamed" if self.scratch else ""
        return f"ImageSet({self.name!r}, {len(self)} images of {size}, {len(self.classes)} classes{held})"

    @property
    def held(self) -> str:
        """Where the images are: "resident" in memory, or "streamed" from disk."""
        return "streamed" if self.scratch else "resident"

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of shape, labels and image bytes, in their order.

        Computed at every use, because images may have been changed in place.
        """
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for part in (self.labels, self.images):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()

    def zeros(self, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Zeros where the set is, on its device or mapped from a file; shape: by default that of the images."""
        return zeros(self.images.shape if shape is None else shape, dtype, self.scratch, self.images.device)

    def take(self, index) -> "ImageSet":
        """The images at `index`: a tensor or list of indices, a mask, or a slice."""
        everything = torch.arange(len(self))
        index = everything[index.cpu() if isinstance(index, torch.Tensor) else index]
        if index.equal(everything):
            return self
        files = tuple(self.files[i] for i in index.tolist()) if self.files else ()
        images = taken(self.images, index, self.scratch)
        return replace(self, images=images, labels=self.labels[index.to(self.labels.device)], files=files)

    def batch(self, index: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(images uint8, labels) at `index`, a slice or a tensor on the labels' device; images may be elsewhere."""
        place = index if isinstance(index, slice) else index.to(self.images.device)
        return self.images[place], self.labels[index]

    def limit(self, n: int | None, seed: int = 0) -> "ImageSet":
        """n images in their order, every class in its share and at least once; self if n is None or n >= N."""
        return self if n is None else self.take(stratified_limit(self.labels, n, seed))

    def with_noise(self, noise: torch.Tensor) -> "ImageSet":
        """The protected set: clip(images + noise, 0, 255) for int8 noise [N,3,H,W] in levels."""
        if check_tensor(noise, "noise").dtype != torch.int8 or noise.shape != self.images.shape:
            raise ValueError(
                f"noise must be int8 {list(self.images.shape)} as the images are, got {noise.dtype} {list(noise.shape)}"
            )
        return self.changed(lambda images, part: add_noise(images, noise[part].to(images.device)))

    def centre(self, side: int) -> "ImageSet":
        """The central side x side pixels of every image; a view, not a copy."""
        top, left = ((have - side) // 2 for have in self.images.shape[2:])
        return replace(self, images=self.images[:, :, top : top + side, left : left + side])

    def changed(self, change: Callable[[torch.Tensor, slice], torch.Tensor]) -> "ImageSet":
        """The set with every block of images replaced by change(images[part], part), stored where the set is."""
        images = self.zeros()
        for part in blocks(images):
            images[part] = change(self.images[part], part)
        return replace(self, images=images)

    def to(self, device: str | torch.device) -> "ImageSet":
        """The set on `device`. Images that are streamed or too large for the GPU stay; batches move one by one."""
        device = torch.device(device)
        many = device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // SHARE
        images = self.images if self.scratch or many else self.images.to(device)
        return replace(self, images=images, labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Split:
    """A train and a test ImageSet with the same classes.

    skipped: relative names of files that could not be read. ignored: names of files that are not images of a class.
    spare: further clean images, for a trainer who has some, or None.

        split = sk.load("shapes")
        split.train, split.test
    """

    train: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    spare: ImageSet | None = None


def not_among(images: ImageSet, others: ImageSet) -> list[int]:
    """Indices of the images that are not, byte for byte, among `others`."""
    taken = {image.numpy().tobytes() for image in others.images.cpu()}
    return [i for i, image in enumerate(images.images.cpu()) if image.numpy().tobytes() not in taken]


def limit_test(split: Split, n: int | None) -> Split:
    """The split with n test images; the other ones are `spare`, at most as many as there are training images.

    With n None, or at least all test images, the split itself.
    """
    if n is None or n >= len(split.test):
        return split
    kept = stratified_limit(split.test.labels, n)
    others = torch.ones(len(split.test), dtype=torch.bool)
    others[kept] = False
    return replace(split, test=split.test.take(kept), spare=split.test.take(others).limit(len(split.train)))
