"""The embedded images: ten shapes among clutter, at random places, sizes and colours; drawn from a seed."""

import functools

import numpy as np
import torch

from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import check_seed

SIZE = 32
# More variety and clutter and less contrast make the shapes slower to learn.
CONTRAST = (0.42, 0.82)  # the largest step of a channel from the background, on the [0, 1] scale
SCALE = (9, 13)  # half the width of a shape in pixels
TURN, STRETCH = 0.35, 0.2  # largest rotation in radians, largest log of the stretch
WAVES, CLUTTER = 0.08, 2  # amplitude of the background's waves, number of its ellipses
HAZE = 0.25  # share of grey blended over the picture: less contrast, so noise of a given radius counts for more
# Each shape is the set f <= 0 in its own frame, where it fills about [-1, 1] x [-1, 1].
SHAPES = {
    "bar": lambda u, v: np.maximum(np.abs(u) - 1.1, np.abs(v) - 0.3),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - 0.5, v)),
    "cross": lambda u, v: np.minimum(
        np.maximum(np.abs(u) - 0.3, np.abs(v) - 1), np.maximum(np.abs(v) - 0.3, np.abs(u) - 1)
    ),
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "dots": lambda u, v: np.minimum(np.hypot(u - 0.6, v), np.hypot(u + 0.6, v)) - 0.42,
    "half disc": lambda u, v: np.maximum(np.hypot(u, v + 0.4) - 1.1, -v - 0.4),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.22,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "star": lambda u, v: np.hypot(u, v) - (0.72 + 0.36 * np.cos(5 * np.arctan2(v, u))),
    "triangle": lambda u, v: np.maximum(-v, np.maximum(0.87 * u + 0.5 * v, -0.87 * u + 0.5 * v)) - 0.55,
}
CLASSES = tuple(SHAPES)


def _between(rng: np.random.Generator, n: int, low: float, high: float, channels: int = 0) -> np.ndarray:
    """A uniform draw for each image, [n,1,1] or [n,1,1,channels], which broadcasts over its pixels."""
    shape = (n, 1, 1, channels) if channels else (n, 1, 1)
    return rng.uniform(low, high, shape).astype(np.float32)


def _frame(rng, n: int, scale: tuple[float, float], turn: float, stretch: float):
    """(u, v, half): each pixel's coordinates in the frame of a randomly placed shape, and half its width in pixels."""
    half = _between(rng, n, *scale)
    across, down = (SIZE / 2 - 0.5 + (SIZE / 2 - 0.9 * half) * _between(rng, n, -1, 1) for _ in range(2))
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    dx, dy, angle = (x - across) / half, (y - down) / half, _between(rng, n, -turn, turn)
    aspect = np.exp(_between(rng, n, -stretch, stretch))
    return (dx * np.cos(angle) + dy * np.sin(angle)) * aspect, (dy * np.cos(angle) - dx * np.sin(angle)) / aspect, half


def _cover(f, u, v, half) -> np.ndarray:
    """The share [n,SIZE,SIZE,1] of each pixel that the shape covers, its edge one pixel wide."""
    return np.clip(0.5 - f(u, v) * half, 0, 1)[..., None]


def _background(rng, n: int) -> np.ndarray:
    """A colour, two plane waves over it, and CLUTTER faint ellipses."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) / SIZE
    image = _between(rng, n, 0.15, 0.85, 3) + np.zeros((n, SIZE, SIZE, 3), np.float32)
    for _ in range(2):
        kx, ky, phase = (2 * np.pi * _between(rng, n, -3, 3) for _ in range(3))
        image += np.sin(kx * x + ky * y + phase)[..., None] * _between(rng, n, -WAVES, WAVES, 3)
    for _ in range(CLUTTER):
        u, v, half = _frame(rng, n, (1, 3.5), np.pi, 0.8)
        image += _cover(lambda u, v: np.hypot(u, v) - 1, u, v, half) * _between(rng, n, -0.3, 0.3, 3)
    return image


def _drawn(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 images [n,SIZE,SIZE,3] of the shapes that labels [n] name."""
    n = len(labels)
    image = _background(rng, n)
    u, v, half = _frame(rng, n, SCALE, TURN, STRETCH)
    cover = np.zeros((n, SIZE, SIZE, 1), np.float32)
    for k, f in enumerate(SHAPES.values()):
        mine = labels == k
        cover[mine] = _cover(f, u[mine], v[mine], half[mine])
    step = rng.normal(size=(n, 1, 1, 3)).astype(np.float32)
    step *= _between(rng, n, *CONTRAST, 1) / np.abs(step).max(-1, keepdims=True)
    middle = image.mean((1, 2), keepdims=True)
    image += cover * np.where(np.abs(middle + step - 0.5) > 0.5, -step, step)  # towards the side with room
    image += rng.normal(0, 0.01, image.shape)
    image = (1 - HAZE) * image.clip(0, 1) + HAZE / 2
    return (image * 255).round().astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _pixels(n: int, seed: int, part: int) -> torch.Tensor:
    """uint8 images [n,3,SIZE,SIZE], the classes in turn; cached, because a thousand take half a second."""
    images = _drawn(np.arange(n) % len(SHAPES), np.random.default_rng((check_seed(seed), part)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def embedded(n_train: int = 1000, n_test: int = 1000, seed: int = 0) -> Split:
    """The embedded images, the ten classes in turn; the seed decides every image.

    Every call returns new tensors, so images may be changed in place.

    >>> embedded(20, 10).train.labels.bincount().tolist()
    [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    parts = enumerate((n_train, n_test))
    return Split(*(
        ImageSet(_pixels(n, seed, part).clone(), torch.arange(n) % len(SHAPES), CLASSES, "shapes") for part, n in parts
    ))  # fmt: skip
