"""The noise of a whole set: int8 levels with radius, recipe and data set, in one safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semkit import __version__
from semkit.images.files import check_fields, one_line, read_tensors, shown, write_tensors
from semkit.images.imageset import blocks
from semkit.images.pixels import check_radius

UNITS = ("auto", "levels", "fraction")
LARGEST = 128.5 / 255  # the largest fraction of 1 that rounds to a level of int8
# The fields of a noise file besides the radius, with their types.
KINDS = {"recipe": dict, "fingerprint": str | None, "classes": list[str], "version": str, "class_wise": bool}


class NoiseError(ValueError):
    """An invalid noise or noise file; the message is one line."""


def check_noise_radius(radius: float, name: str = "radius") -> float:
    """`radius` as a float if noise in whole int8 levels can have it: 0, or 1 to 127; raises ValueError otherwise."""
    radius = check_radius(radius, name)
    if 0 < radius < 1:
        raise ValueError(f"{name} must be 1 level at least, because noise is stored in whole levels, got {radius:g}")
    if radius > 127:
        raise ValueError(f"{name} must be at most 127 levels, which is what int8 noise holds, got {radius:g}")
    return radius


@dataclass(frozen=True, eq=False)
class Noise:
    """Noise of a whole set: int8 [N,C,H,W] in pixel levels, C 1 or 3, |levels| <= radius.

    recipe: how it was made, a dict of JSON values. fingerprint: of the ImageSet it was made for, None for imported
    noise. version: of the kit that made it. class_wise: row k belongs to class k; for images, use levels[labels].
    Raises NoiseError for values that do not fit together.

    >>> Noise(torch.full((2, 3, 4, 4), -8, dtype=torch.int8), radius=8).radius
    8.0
    """

    levels: torch.Tensor = field(repr=False)
    radius: float
    recipe: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    classes: tuple[str, ...] = ()
    version: str = __version__
    class_wise: bool = False

    def __post_init__(self):
        if not isinstance(self.levels, torch.Tensor) or self.levels.dtype != torch.int8:
            kind = getattr(self.levels, "dtype", type(self.levels).__name__)
            raise NoiseError(f"noise must be an int8 tensor of pixel levels, got {kind}: round it with to_levels")
        shape = tuple(self.levels.shape)
        if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
            raise NoiseError(f"noise must be N x C x H x W with C 1 or 3 and nothing empty, got {shape}")
        try:
            object.__setattr__(self, "radius", check_radius(self.radius))
        except ValueError as error:
            raise NoiseError(str(error)) from None
        try:
            # Through JSON and back, so that the recipe equals itself after saving and loading.
            object.__setattr__(self, "recipe", json.loads(json.dumps(self.recipe, allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise NoiseError(f"the recipe must be what JSON can hold: {one_line(error)}") from None
        classes = list(self.classes) if isinstance(self.classes, tuple) else self.classes
        try:
            check_fields({**{name: getattr(self, name) for name in KINDS}, "classes": classes}, KINDS)
        except ValueError as error:
            raise NoiseError(f"not noise: {error}") from None
        object.__setattr__(self, "classes", tuple(classes))
        # Not levels.abs(): the absolute value of the int8 -128 is -128.
        largest = max(abs(int(extreme)) for extreme in self.levels.aminmax())
        if largest > self.radius:
            raise NoiseError(f"noise reaches {largest} levels, its radius is {self.radius:g}: correct one of them")
        if self.class_wise and self.classes and len(self.classes) != len(self.levels):
            raise NoiseError(f"class-wise noise has {len(self.levels)} rows for {len(self.classes)} classes")


def _unit(array: np.ndarray, unit: str) -> str:
    """The unit of an array, "levels" or "fraction", by its dtype and largest |value|; raises NoiseError if unclear."""
    if unit not in UNITS:
        raise NoiseError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise NoiseError("the file holds values that are not finite")
    if array.dtype.kind == "i" or unit != "auto":
        return "levels" if array.dtype.kind == "i" else unit
    largest = max(-low, high)
    if LARGEST < largest <= 1:
        raise NoiseError(f"floats up to {largest:g} may be levels or fractions of 1: say unit levels or fraction")
    # Levels that small would all be about zero; so these are fractions.
    return "fraction" if largest <= LARGEST else "levels"


def from_array(array: np.ndarray, *, unit: str = "auto", class_wise: bool = False, source: str = "array") -> Noise:
    """Noise from an array [N,C,H,W] or [N,H,W,3], with the largest |level| as its radius.

        levels = round(array) for integers or unit "levels", round(255 * array) for unit "fraction"

    unit "auto": floats up to .5 are fractions of 1, floats beyond 1 are levels. An array is [N,H,W,3] if its last axis
    is 3 and its second neither 1 nor 3. The recipe says what was assumed. Raises NoiseError for other arrays.

    >>> from_array(np.full((1, 3, 2, 2), 8 / 255)).radius
    8.0
    """
    if array.dtype.kind not in "if":
        raise NoiseError(f"{array.dtype} values are no noise, which has a sign: these may be images")
    if array.ndim != 4 or not array.size:
        raise NoiseError(f"an array of shape {array.shape} is not noise N x C x H x W")
    unit = _unit(array, unit)
    layout = "NHWC" if array.shape[3] == 3 and array.shape[1] not in (1, 3) else "NCHW"
    array = array.transpose(0, 3, 1, 2) if layout == "NHWC" else array
    levels = np.empty(array.shape, np.int8)
    for part in blocks(array):
        block = array[part].astype(np.float64) * (255 if unit == "fraction" else 1)
        block = np.rint(block)  # to the nearest level: a cast alone would pull every value towards 0
        if block.min() < -128 or block.max() > 127:
            raise NoiseError(f"values from {block.min():g} to {block.max():g} levels go beyond -128 to 127")
        levels[part] = block
    radius = max(-int(levels.min()), int(levels.max()))
    recipe = {"imported": {"file": source, "layout": layout, "unit": unit}}
    return Noise(torch.from_numpy(levels), radius, recipe, class_wise=class_wise)


def save(noise: Noise, path: str | Path) -> None:
    """Write noise as safetensors: key "noise", everything else as JSON in the metadata "semkit".

    The same noise gives the same bytes. An existing file is replaced whole or not at all. Raises OSError.
    """
    write_tensors(path, {"noise": noise.levels}, {name: getattr(noise, name) for name in ("radius", *KINDS)})


def load(path: str | Path, *, images=None) -> Noise:
    """Load the Noise that `save` wrote; its levels are mapped from the file, not read into memory.

    Checks dtype, shape and radius and, given images (an ImageSet), that the noise was made for them.
    Raises NoiseError that says which check failed.

        noise = sk.noise.load("OUT/noise.safetensors", images=split.train)
    """
    try:
        tensors, record = read_tensors(path, ("radius", *KINDS))
        if "noise" not in tensors:
            raise NoiseError("no tensor named noise in it")
        noise = Noise(tensors["noise"], **record)
        if images is not None:
            check_fits(noise, images)
        return noise
    except ValueError as error:
        raise NoiseError(f"{shown(path)}: {error}") from None


def check_fits(noise: Noise, images) -> None:
    """Raise NoiseError unless the noise was made for images (an ImageSet); imported noise is checked by shape alone."""
    first = 1 if noise.class_wise else 0
    shape, wanted = tuple(noise.levels.shape[first:]), tuple(images.images.shape[first:])
    if shape != wanted:
        raise NoiseError(f"this noise has the shape {shape}, the images {wanted}: pass the set it was made for")
    if noise.fingerprint not in (None, images.fingerprint):
        raise NoiseError(
            f"this noise was crafted for other images (fingerprint {noise.fingerprint[:8]}.. against "
            f"{images.fingerprint[:8]}..): craft again or pass the set it was made for"
        )


def clipped(noise: Noise, images: torch.Tensor) -> dict[str, float]:
    """What the box leaves of a noise, as reports tell it, of images uint8 [N,C,H,W] of the noise's shape:

    effective = clip(images + levels, 0, 255) - images
    clipped_fraction: the share of values with effective != levels; mean_effective_noise: mean |effective| in levels
    """
    cut = total = 0
    for part in blocks(images):
        x = images[part].to(torch.int16)  # so that differences do not wrap around
        levels = noise.levels[part].to(x.device, torch.int16)
        effective = levels.clamp(-x, 255 - x)
        cut, total = cut + int((effective != levels).sum()), total + int(effective.abs().sum())
    n = images.numel()
    return {"clipped_fraction": round(cut / n, 4), "mean_effective_noise": round(total / n, 3)}
