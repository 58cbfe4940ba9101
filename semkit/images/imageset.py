"""Labelled images as tensors: ImageSet and Split, their seeded parts, their fingerprint."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from semkit.images import storage
from semkit.images.pixels import add_noise, check_count


def _ranks(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's rank [N] in a random order of its class, and the size [N] of its class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
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
    check_count(n, "limit", 1)
    if n >= len(labels):
        return torch.arange(len(labels))
    if n < (classes := len(labels.unique())):
        raise ValueError(f"limit must be at least the number of classes, {classes}, got {n}")
    ranks, sizes = _ranks(labels.cpu(), seed)
    return (ranks / sizes.double()).argsort(stable=True)[:n].sort().values


def check_fraction(fraction: float) -> float:
    """`fraction` if it is above 0 and at most 1; raises ValueError otherwise."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    return fraction


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
        images, labels = self.images, self.labels
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

    def take(self, index) -> "ImageSet":
        """The images at `index`: a tensor or list of indices, a mask, or a slice."""
        everything = torch.arange(len(self))
        index = everything[index.cpu() if isinstance(index, torch.Tensor) else index]
        if index.equal(everything):
            return self
        files = tuple(self.files[i] for i in index.tolist()) if self.files else ()
        images = storage.rows(self.images, index, self.scratch)
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
        if noise.dtype != torch.int8 or noise.shape != self.images.shape:
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
        images = storage.zeros(self.images.shape, torch.uint8, self.scratch, self.images.device)
        for part in storage.blocks(images):
            images[part] = change(self.images[part], part)
        return replace(self, images=images)

    def to(self, device: str | torch.device) -> "ImageSet":
        """The set on `device`. Images that are streamed or too large for the GPU stay; batches move one by one."""
        device = torch.device(device)
        many = device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // storage.SHARE
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
