"""Class-wise convolution (CUDA): a filter per class, made from a private key, that a net learns in place of content.

Unlike noise, a convolution is not bounded by a radius: a value may move by any number of levels.
Source: Sadasivan et al., CUDA, CVPR 2023.
"""

import hashlib
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from semkit.imageset import ImageSet, stratified_limit
from semkit.pixels import check_count, to_float

KEY_LENGTH = 8  # characters, at least
BATCH = 256
ASSIGNMENTS = ("own", "one", "permuted")


def _uniforms(key: str, label: int, size: int) -> np.ndarray:
    """size^2 + 1 numbers U[0, 1), of the key and nothing else: SHAKE-256, so the same wherever it runs."""
    stream = hashlib.shake_256(f"semkit class filter\0{size}\0{label}\0{key}".encode("utf-8", "surrogatepass"))
    return (np.frombuffer(stream.digest(8 * (size * size + 1)), "<u8") >> 11) / 2.0**53


def class_filters(
    key: str, classes: int, *, size: int = 3, strength: float = 0.3, assignment: str = "own"
) -> torch.Tensor:
    """[classes,size,size], float64: the filter of every class.

        entries ~ U(0, strength), one of them, at random, 1

    They follow from the key, which is in nothing that comes back. They are as secret as the key: whoever has them, or
    some originals beside their protected copies, can undo much of the protection. A class's filter does not depend on
    how many classes there are; another size or key gives other ones, another strength scales them.
    assignment: "own"; as controls "one", class 0's filter for all, or "permuted", each class that of the next.
    Raises ValueError for a key below 8 characters, size < 2, a strength outside (0, 1], an unknown assignment, and
    "permuted" for a single class.
    """
    if not isinstance(key, str) or len(key.strip()) < KEY_LENGTH:
        raise ValueError(f"the key must have {KEY_LENGTH} characters at least")
    check_count(classes, "classes", 1)
    check_count(size, "kernel", 2)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength:g}")
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
    if assignment == "permuted" and classes == 1:
        raise ValueError("a single class has no other class's filter to take")
    u = np.stack([_uniforms(key, label, size) for label in range(classes)])
    filters = strength * u[:, :-1]
    filters[np.arange(classes), (u[:, -1] * size * size).astype(int)] = 1
    whose = {"own": np.arange(classes), "one": np.zeros(classes, int), "permuted": np.roll(np.arange(classes), -1)}
    return torch.from_numpy(filters.reshape(-1, size, size)[whose[assignment]])


def convolve(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """x [N,C,H,W] >= 0, filtered by filters [N,k,k], all channels of an image alike, and divided by its maximum.

        full[n, c, i, j] = sum over a, b of filters[n, a, b] x[n, c, i - a, j - b],   x = 0 outside the image
        blurred = the central H x W of full,   result = blurred / max over c, i, j of blurred

    A true convolution, not the cross-correlation that nets call one; with zeros outside it is a Toeplitz matrix, as in
    the theory (semkit.mixtures). An even k reaches one pixel further up and left. Black images stay black.
    Raises ValueError for a kernel larger than the image.
    """
    (height, width), k = x.shape[-2:], filters.shape[-1]
    if k > min(height, width):
        raise ValueError(f"a kernel of {k} x {k} is larger than the image, {width} x {height}")
    padded = F.pad(x, (k // 2, (k - 1) // 2) * 2).transpose(0, 1)
    # Images as channels of one depthwise convolution; flipped, for conv2d correlates.
    weight = filters.to(x).flip(-2, -1)[:, None]
    blurred = F.conv2d(padded, weight, groups=len(x)).transpose(0, 1)
    return blurred / blurred.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _filtered(images: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """round(255 convolve(images / 255)) of uint8 images [N,C,H,W]."""
    return (255 * convolve(to_float(images), filters)).round().to(torch.uint8)


def convolve_set(images: ImageSet, filters: torch.Tensor, *, fraction: float = 1.0, seed: int = 0) -> ImageSet:
    """The set with `fraction` of every class filtered, each image by the filter of its label; the others unchanged.

    Values are rounded to 8 bits. Computed on the CPU, so that the bytes do not depend on where the images are. The
    change is not bounded by a radius. fraction: at least an image of every class, chosen by the seed.
    Raises ValueError for fewer filters than classes, a kernel larger than the images, or a fraction outside (0, 1].
    """
    if len(filters) < len(images.classes):
        raise ValueError(f"{len(images.classes)} classes need as many filters, got {len(filters)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction:g}")
    labels, pixels = images.labels.cpu(), images.images.cpu().clone()
    n = max(len(labels.unique()), round(fraction * len(labels)))
    for part in stratified_limit(labels, n, seed).split(BATCH):
        pixels[part] = _filtered(pixels[part], filters[labels[part]])
    return replace(images, images=pixels.to(images.images.device))


def convolve_picture(image: Image.Image, kernel: torch.Tensor) -> Image.Image:
    """The image (mode L, LA, RGB or RGBA) filtered by a kernel [k,k] at its own size; mode and alpha are kept.

    What a k x k kernel does to a photograph is gone after a trainer's resize to far fewer pixels, unless k is larger
    than the ratio of the sizes. Raises ValueError for a kernel larger than the image.
    """
    pixels = np.array(image)
    colours = len(image.getbands()) - image.mode.endswith("A")
    colour = pixels.reshape(*pixels.shape[:2], -1)[..., :colours]
    planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(colour, -1, 0)))
    colour[...] = np.moveaxis(_filtered(planes[None], kernel[None])[0].numpy(), 0, -1)
    result = Image.fromarray(pixels)
    result.info = dict(image.info)
    return result
