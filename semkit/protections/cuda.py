"""Class-wise convolution (CUDA): a filter per class, made from a private key, that a net learns in place of content.

Unlike noise, a convolution is not bounded by a radius: a value may move by any number of levels.
Source: Sadasivan et al., CUDA, CVPR 2023.
"""

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count, check_fraction, one_of, parse_count, settle, to_float
from semkit.nets.lab import Lab
from semkit.protections.base import Change, Option, Protection, Recipe

KEY_LENGTH = 8  # characters, at least
LARGEST_KERNEL = 255
ASSIGNMENTS = ("own", "one", "permuted")
BOUND = "no radius bounds a convolution"


def _uniforms(key: str, label: int, size: int) -> np.ndarray:
    """size^2 + 1 numbers U[0, 1), of the key and nothing else: SHAKE-256, so the same wherever it runs."""
    stream = hashlib.shake_256(f"semkit class filter\0{size}\0{label}\0{key}".encode("utf-8", "surrogatepass"))
    return (np.frombuffer(stream.digest(8 * (size * size + 1)), "<u8") >> 11) / 2.0**53


def class_filters(key: str, classes: int, *, size: int = 3, strength: float = 0.3) -> torch.Tensor:
    """[classes,size,size], float64: the filter of every class.

        entries ~ U(0, strength), one of them, at random, 1

    The key decides them and cannot be computed from them. They are as secret as the key: whoever has them, or
    some originals beside their protected copies, can undo much of the protection. A class's filter does not depend on
    how many classes there are; another size or key gives other ones, another strength scales them.
    Raises ValueError for a key below 8 characters, a size outside 2 to 255, and a strength outside (0, 1].

    >>> class_filters("a private key", 10).shape
    torch.Size([10, 3, 3])
    """
    if not isinstance(key, str) or len(key.strip()) < KEY_LENGTH:
        raise ValueError(f"the key must have {KEY_LENGTH} characters at least")
    check_count(classes, "classes", 1)
    check_count(size, "kernel", 2, LARGEST_KERNEL)
    check_fraction(strength, "strength")
    u = np.stack([_uniforms(key, label, size) for label in range(classes)])
    filters = strength * u[:, :-1]
    filters[np.arange(classes), (u[:, -1] * size * size).astype(int)] = 1
    return torch.from_numpy(filters.reshape(-1, size, size))


def check_kernel(k: int, width: int, height: int) -> None:
    """Raises ValueError for a kernel larger than the image."""
    if k > min(height, width):
        raise ValueError(f"a kernel of {k} x {k} is larger than the image, {width} x {height}")


def blur(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """x [N,C,H,W] filtered by filters [N,k,k], all channels of an image alike; the same shape.

        full[n, c, i, j] = sum over a, b of filters[n, a, b] x[n, c, i - a, j - b],   x = 0 outside the image
        result = the central H x W of full

    A true convolution, not the cross-correlation that nets call one; with zeros outside it is a Toeplitz matrix, as in
    the theory (semkit.lessons.mixtures). An even k reaches one pixel further up and left.
    Raises ValueError for a kernel larger than the image.
    """
    (height, width), k = x.shape[-2:], filters.shape[-1]
    check_kernel(k, width, height)
    padded, weights = F.pad(x, (k // 2, (k - 1) // 2) * 2), filters.to(x)[:, None, None, None]
    # k * k products of whole batches: as quick as torch's convolution, whose copies in float64 take k * k the memory.
    blurred = torch.zeros_like(x)
    for a, b in product(range(k), range(k)):
        top, left = k - 1 - a, k - 1 - b
        blurred = blurred.addcmul_(weights[..., a, b], padded[..., top : top + height, left : left + width])
    return blurred


def convolve(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """blur(x, filters) of x >= 0 divided by its maximum over channels and pixels; black images stay black."""
    blurred = blur(x, filters)
    return blurred / blurred.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _filtered(images: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """round(255 convolve(images / 255)) of uint8 images [N,C,H,W].

    In float64: with the 8 digits of float32 one value in 100,000 hangs on the order in which a processor sums.
    """
    return (255 * convolve(to_float(images, torch.float64), filters)).round().to(torch.uint8)


def convolve_set(images: ImageSet, filters: torch.Tensor) -> ImageSet:
    """The set with each image filtered by the filter of its label.

    Values are rounded to 8 bits. Computed on the CPU, so that the bytes do not depend on where the images are. The
    change is not bounded by a radius. Raises ValueError for fewer filters than classes and a kernel larger than the
    images.

    >>> convolve_set(sk.shapes.embedded(20, 10).train, class_filters("a private key", 10))
    ImageSet('shapes', 20 images of 32x32, 10 classes)
    """
    if len(filters) < len(images.classes):
        raise ValueError(f"{len(images.classes)} classes need as many filters, got {len(filters)}")
    labels = images.labels.cpu()
    return images.changed(lambda pixels, part: _filtered(pixels.cpu(), filters[labels[part]]))


def convolve_picture(image: Image.Image, kernel: torch.Tensor) -> Image.Image:
    """The image (mode L, LA, RGB or RGBA) filtered by a kernel [k,k] at its own size; mode and alpha are kept.

    A trainer who resizes a photograph to far fewer pixels undoes a k x k kernel, unless k is larger than the ratio of
    the sizes. Raises ValueError for a kernel larger than the image.
    """
    bands = image.split()
    colours = len(bands) - image.mode.endswith("A")
    planes = torch.from_numpy(np.stack([np.asarray(band) for band in bands[:colours]]))
    filtered = _filtered(planes[None], kernel[None])[0].numpy()
    result = Image.merge(image.mode, [*map(Image.fromarray, filtered), *bands[colours:]])
    result.info = dict(image.info)
    return result


@dataclass(frozen=True)
class ClassFilters(Recipe):
    """CUDA as a recipe: the filters of class_filters.

    assignment: "own"; as controls "one", class 0's filter for all classes, or "permuted", each class that of the next.
    key: private, in no repr, file or message. Pictures are changed with a key only; sets without one, for a
    measurement, with a key that anyone can make from the seed.
    Raises ValueError as class_filters does, and for an unknown assignment.
    """

    kernel: int = 3
    strength: float = 0.3
    assignment: str = "own"
    key: str | None = field(default=None, repr=False)

    method = "cuda"

    def __post_init__(self):
        settle(self, assignment=one_of(*ASSIGNMENTS))
        self.filters(2)

    def filters(self, classes: int, seed: int = 0) -> torch.Tensor:
        """[classes,k,k]: the filter of every class."""
        key = f"semkit seed {seed}" if self.key is None else self.key
        own = class_filters(key, classes, size=self.kernel, strength=self.strength)
        return {"own": own, "one": own[:1].expand_as(own), "permuted": own.roll(-1, 0)}[self.assignment]

    def apply(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> tuple[ImageSet, dict]:
        """(the set as convolve_set filters it, {})."""
        return convolve_set(images, self.filters(len(images.classes), seed)), {}

    def change(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> Change:
        """Every picture by the filter of its class. Raises ValueError without a key."""
        if self.key is None:
            raise ValueError("pictures are filtered with a private key: ClassFilters(key=...)")
        filters = self.filters(len(images.classes))
        told = {"radius": None, "bound": f"{BOUND}: a value may move by any number of levels"}
        return Change(lambda i, original: convolve_picture(original, filters[images.labels[i]]), told)

    def tests(self, images: ImageSet, *, seed: int = 0) -> dict[str, ImageSet]:
        """{"own": ..., "permuted": ...}: test images filtered as their class was, or as the next class; {} where one
        filter is for all.
        """
        if self.assignment != "own":
            return {}
        others = {name: replace(self, assignment=name) for name in ("own", "permuted")}
        return {name: other.apply(images, seed=seed)[0] for name, other in others.items()}

    def check_size(self, width: int, height: int) -> None:
        """Raises ValueError for a picture smaller than the kernel."""
        check_kernel(self.kernel, width, height)


KEY = Option(
    "key", None,
    f"private key, {KEY_LENGTH} characters or more. Typed here it stays in the shell's history and is seen in the list "
    "of processes: better put it into the environment variable SEMKIT_KEY",
    private=True,
)  # fmt: skip
KERNEL = Option("kernel", 3, "filters are K x K pixels", partial(parse_count, name="K", least=2), "K")
STRENGTH = Option("strength", 0.3, "largest entry of a filter besides its one of 1", float)
CUDA = Protection(
    "CUDA", ("#CC79A7", "v", "-"), lambda preset, *, size=32, **own: ClassFilters(**own), (KEY, KERNEL, STRENGTH), BOUND
)
