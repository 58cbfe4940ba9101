"""Fifteen common corruptions at five severities, for images of about 32 x 32 pixels, by formulas of this kit.

Kinds and strengths follow Hendrycks and Dietterich, ICLR 2019. Frost, snow, fog and glass are generated here, so
accuracies compare with each other, but not with those on the published files.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from semkit.images.augment import JPEG
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count, check_name, check_seed, drawn_seed, to_float

BATCH = 256
Draws = Sequence[Generator]  # one generator for each image of a batch


def _normal(generators: Draws, *shape: int) -> Tensor:
    """[N,*shape] of N(0, 1), row n from generator n."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _uniform(generators: Draws, *shape: int) -> Tensor:
    """[N,*shape] of U(0, 1), row n from generator n."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators])


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter every channel of x [N,C,H,W] with kernel [k,k], scaled to sum 1; edges repeat."""
    n, c, h, w = x.shape
    pad = len(kernel) // 2
    padded = F.pad(x.reshape(n * c, 1, h, w), [pad] * 4, mode="replicate")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None]).view(n, c, h, w)


def _distances(reach: int) -> Tensor:
    line = torch.arange(-reach, reach + 1.0)
    return (line[:, None] ** 2 + line**2).sqrt()


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    return _blur(x, (-(_distances(math.ceil(3 * sigma)) ** 2) / (2 * sigma**2)).exp())


def _moved(x: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Sample x at positions moved by (right, down), in pixels, [N,H,W] or [N,1,1]; bilinear, edges repeat."""
    h, w = x.shape[2:]
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    across, along = (2 * (j + right) + 1) / w - 1, (2 * (i + down) + 1) / h - 1
    grid = torch.stack([across.expand(len(x), h, w), along.expand(len(x), h, w)], -1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _streaked(x: Tensor, length: float, angle: Tensor) -> Tensor:
    """Motion blur: the mean of x along a line of `length` pixels at each image's angle [N]."""
    places = torch.linspace(-length / 2, length / 2, 2 * math.ceil(length) + 1)
    right, down = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return sum(_moved(x, t * right, t * down) for t in places) / len(places)


def _clouds(x: Tensor, decay: float, generators: Draws) -> Tensor:
    """Random clouds [N,1,H,W] in [0,1]: octaves of smooth noise, each finer one weaker by the factor `decay`."""
    h, w = x.shape[2:]
    total = torch.zeros(len(x), 1, h, w)
    for octave in range(1, max(2, int(math.log2(min(h, w))) + 1)):
        coarse = _uniform(generators, 1, 2**octave, 2**octave)
        total += F.interpolate(coarse, (h, w), mode="bicubic", align_corners=False) / decay**octave
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low).clamp(min=1e-6)


def gaussian_noise(x: Tensor, sigma: float, generators: Draws) -> Tensor:
    """x + sigma * n, n normal."""
    return x + sigma * _normal(generators, *x.shape[1:])


def shot_noise(x: Tensor, photons: float, generators: Draws) -> Tensor:
    """Poisson(photons * x) / photons."""
    counts = [torch.poisson(photons * image, generator) for image, generator in zip(x, generators, strict=True)]
    return torch.stack(counts) / photons


def impulse_noise(x: Tensor, share: float, generators: Draws) -> Tensor:
    """A share of the values is set to black or to white, each equally often."""
    u = _uniform(generators, *x.shape[1:])
    return torch.where(u < share / 2, 0.0, torch.where(u > 1 - share / 2, 1.0, x))


def defocus_blur(x: Tensor, radius: float, generators: Draws) -> Tensor:
    """The mean over a disk of `radius` pixels with a soft edge."""
    return _blur(x, (radius + 0.5 - _distances(math.ceil(radius))).clamp(0, 1))


def glass_blur(x: Tensor, how: tuple[float, float], generators: Draws) -> Tensor:
    """Gaussian blur, each pixel taken from up to `reach` pixels away, Gaussian blur again."""
    sigma, reach = how
    right, down = reach * (2 * _uniform(generators, 2, *x.shape[2:]).transpose(0, 1) - 1)
    return _gaussian(_moved(_gaussian(x, sigma), right, down), sigma)


def motion_blur(x: Tensor, length: float, generators: Draws) -> Tensor:
    """The mean over a line of `length` pixels in a random direction."""
    return _streaked(x, length, math.pi * _uniform(generators))


def zoom_blur(x: Tensor, most: float, generators: Draws) -> Tensor:
    """The mean over zooms into the middle from 1 to `most`."""
    h, w = x.shape[2:]
    i, j = torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")
    zooms = torch.linspace(1, most, 7).tolist()
    return sum(_moved(x, (1 / z - 1) * j[None], (1 / z - 1) * i[None]) for z in zooms) / len(zooms)


def snow(x: Tensor, how: tuple[float, float], generators: Draws) -> Tensor:
    """A paler image with flakes: a share of the pixels turns white, blurred along the wind."""
    share, pale = how
    flakes = (_uniform(generators, 1, *x.shape[2:]) < share).to(x)
    flakes = _streaked(flakes, 3, math.pi * (0.25 + 0.5 * _uniform(generators)))
    grey = (1.5 * x.mean(1, keepdim=True) + 0.5).clamp(max=1)
    return (1 - pale) * x + pale * torch.maximum(x, grey) + 2 * flakes


def frost(x: Tensor, how: tuple[float, float], generators: Draws) -> Tensor:
    """A darker image plus bluish needles, which are the ridges of random clouds."""
    keep, ice = how
    ridges = (1 - (2 * _clouds(x, 1.4, generators) - 1).abs()) ** 3
    return keep * x + ice * ridges * torch.tensor([0.85, 0.95, 1.0])[:, None, None]


def fog(x: Tensor, how: tuple[float, float], generators: Draws) -> Tensor:
    """Random clouds added, then rescaled: (x + thick * clouds) * max / (max + thick)."""
    thick, decay = how
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + thick * _clouds(x, decay, generators)) * brightest / (brightest + thick)


def brightness(x: Tensor, more: float, generators: Draws) -> Tensor:
    """The largest channel of each pixel raised by `more`; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)


def contrast(x: Tensor, keep: float, generators: Draws) -> Tensor:
    """Less contrast about each channel's mean: mean + keep * (x - mean)."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + keep * (x - mean)


def elastic_transform(x: Tensor, how: tuple[float, float], generators: Draws) -> Tensor:
    """Every pixel moved by a random field, about `far` pixels long and smooth over `sigma` pixels."""
    far, sigma = how
    field = _gaussian(_normal(generators, 2, *x.shape[2:]), sigma)
    field = far * field / field.std((2, 3), keepdim=True).clamp(min=1e-6)
    return _moved(x, field[:, 0], field[:, 1])


def pixelate(x: Tensor, share: float, generators: Draws) -> Tensor:
    """Shrunk to `share` of the side by area means, and enlarged again to blocks."""
    h, w = x.shape[2:]
    small = F.interpolate(x, (max(1, int(h * share)), max(1, int(w * share))), mode="area")
    return F.interpolate(small, (h, w), mode="nearest")


def jpeg_compression(x: Tensor, quality: int, generators: Draws) -> Tensor:
    """Encoded as JPEG at this quality and decoded again."""
    return JPEG(quality).apply(x, ())


SEVERITIES: dict[Callable, tuple] = {
    gaussian_noise: (0.04, 0.06, 0.08, 0.09, 0.10),
    shot_noise: (500, 250, 100, 75, 50),
    impulse_noise: (0.01, 0.02, 0.03, 0.05, 0.07),
    defocus_blur: (0.6, 0.9, 1.2, 1.6, 2.0),
    glass_blur: ((0.3, 0.7), (0.4, 0.9), (0.4, 1.2), (0.5, 1.5), (0.6, 2.0)),
    motion_blur: (2, 3, 4, 5, 6.5),
    zoom_blur: (1.06, 1.11, 1.16, 1.21, 1.26),
    snow: ((0.01, 0.1), (0.02, 0.15), (0.03, 0.2), (0.045, 0.25), (0.06, 0.3)),
    frost: ((1.0, 0.2), (0.95, 0.3), (0.9, 0.4), (0.85, 0.5), (0.75, 0.6)),
    fog: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1.0, 2), (1.5, 1.75)),
    brightness: (0.05, 0.1, 0.15, 0.2, 0.3),
    contrast: (0.75, 0.5, 0.4, 0.3, 0.15),
    elastic_transform: ((0.6, 3), (0.9, 3), (1.2, 2.5), (1.5, 2.5), (1.8, 2)),
    pixelate: (0.92, 0.85, 0.79, 0.7, 0.58),
    jpeg_compression: (80, 65, 58, 50, 40),
}
KINDS = {function.__name__: function for function in SEVERITIES}


def corrupted(images: ImageSet, kind: str, severity: int, *, seed: int = 0) -> ImageSet:
    """The set with every image corrupted, at severity 0 (unchanged) to 5 (worst); the same seed gives the same bytes.

    An image's draws depend on the seed, the kind and its index in the set, not on the severity or the other images.
    Raises ValueError for an unknown kind or severity.
    """
    check_name(kind, tuple(KINDS), "corruption")
    if check_count(severity, "severity", 0, 5) == 0:
        return images
    function, made = KINDS[kind], images.zeros()
    stream = torch.Generator().manual_seed(check_seed(seed) * 1_000_003 + list(KINDS).index(kind))
    for start in range(0, len(images), BATCH):
        x = to_float(images.images[start : start + BATCH].cpu())
        generators = [torch.Generator().manual_seed(drawn_seed(stream)) for _ in x]
        y = function(x, SEVERITIES[function][severity - 1], generators)
        made[start : start + BATCH] = (255 * y).round().clamp(0, 255).byte()
    name = f"{images.name}, {kind} {severity}"
    return replace(images, images=made, name=name)
