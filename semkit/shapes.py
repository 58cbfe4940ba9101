"""The embedded images: ten shapes in any pose, size and colour, among clutter. Generated, seeded, labelled by what one sees."""

import numpy as np
import torch

from semkit.imageset import ImageSet, Split

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


def _colours(rng, n):
    return rng.uniform(0.1, 0.9, (n, 1, 1, 3))


def _mask(f, u, v, scale):
    """Coverage in [0, 1] of each pixel, the edge one pixel wide. scale [n,1,1]: half the shape's width in pixels."""
    return np.clip(0.5 - f(u, v) * scale, 0, 1)[..., None]


def _frame(rng, n, size, low, high, stretch):
    scale = rng.uniform(low, high, (n, 1, 1))
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    room = size / 2 - 0.9 * scale
    cx, cy = (size / 2 - 0.5 + room * rng.uniform(-1, 1, (n, 1, 1)) for _ in range(2))
    y, x = np.mgrid[:size, :size]
    dx, dy = (x - cx) / scale, (y - cy) / scale
    aspect = np.exp(rng.uniform(-stretch, stretch, (n, 1, 1)))
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return u * aspect, v / aspect, scale


def _waves(rng, n, size, amplitude):
    """A smooth random field: a few plane waves a channel."""
    y, x = np.mgrid[:size, :size] / size
    field = np.zeros((n, size, size, 3))
    for _ in range(4):
        k = rng.normal(0, 2.0, (2, n, 1, 1, 3))
        phase = rng.uniform(0, 2 * np.pi, (n, 1, 1, 3))
        field += np.sin(2 * np.pi * (k[0] * x[..., None] + k[1] * y[..., None]) + phase)
    return field * amplitude / 2


def draw(labels, rng, size=32, contrast=(0.2, 0.5), scale=(5, 10), stretch=0.25, waves=0.12, clutter=3, grain=0.03):
    n = len(labels)
    image = _colours(rng, n) + _waves(rng, n, size, waves)
    blob = lambda u, v: np.hypot(u, v) - 1
    for _ in range(clutter):
        u, v, s = _frame(rng, n, size, 1, 3.5, 0.8)
        image += _mask(blob, u, v, s) * rng.uniform(-.35, .35, (n, 1, 1, 3))
    u, v, s = _frame(rng, n, size, *scale, stretch)
    mask = np.zeros((n, size, size, 1))
    for k, f in enumerate(SHAPES.values()):
        i = labels == k
        mask[i] = _mask(f, u[i], v[i], s[i])
    # A step of random hue and given length away from the background, towards the middle of the box.
    step = rng.normal(size=(n, 1, 1, 3))
    step *= rng.uniform(*contrast, (n, 1, 1, 1)) / np.abs(step).max(-1, keepdims=True)
    back = image.mean((1, 2), keepdims=True)
    step = np.where((back + step > 0.95) | (back + step < 0.05), -step, step)
    image += mask * step + rng.normal(0, grain, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def shapes(n_train: int = 2000, n_test: int = 1000, seed: int = 0) -> Split:
    """The embedded set: n_train and n_test images of 32 pixels, ten classes in turn; the same seed, the same images."""
    sets = []
    for part, n in enumerate((n_train, n_test)):
        labels = np.arange(n) % len(SHAPES)
        images = draw(labels, np.random.default_rng((seed, part)))
        sets.append(ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels), CLASSES, "shapes"))
    return Split(*sets)
