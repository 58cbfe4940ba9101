"""The noise container: int8 levels with their radius, recipe and data set, in one safetensors file."""

import json
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from semkit import __version__
from semkit.images.files import atomic_write, one_line, shown
from semkit.images.pixels import check_radius
from semkit.images.storage import blocks


class NoiseError(ValueError):
    """A noise, or a file of it, that is not what it should be; the message is one line."""


@dataclass(frozen=True, eq=False)
class Noise:
    """Noise of a whole set: `levels` int8 [N,C,H,W] in pixel levels, C 1 or 3, |levels| <= `radius`.

    recipe: how it was made, anything that JSON can hold. fingerprint: of the images, labels and order it was made
    for, None if unknown (imported noise). version: of the kit that made it. class_wise: row k belongs to class k,
    not to image k. Raises NoiseError for anything else.
    """

    levels: torch.Tensor = field(repr=False)
    radius: float
    recipe: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    classes: tuple[str, ...] = ()
    version: str = __version__
    class_wise: bool = False

    def __post_init__(self):
        _check_levels(self.levels)
        try:
            object.__setattr__(self, "radius", check_radius(self.radius))
        except ValueError as error:
            raise NoiseError(str(error)) from None
        try:
            # Through JSON and back, so that a saved and loaded recipe equals the one that was given.
            object.__setattr__(self, "recipe", json.loads(json.dumps(self.recipe, allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise NoiseError(f"the recipe must be what JSON can hold: {one_line(error)}") from None
        _check_record(self)
        object.__setattr__(self, "classes", tuple(self.classes))
        # Not levels.abs(): the absolute value of the int8 -128 is -128.
        largest = max(abs(int(extreme)) for extreme in self.levels.aminmax())
        if largest > self.radius:
            raise NoiseError(f"noise reaches {largest} levels, its radius is {self.radius:g}: correct one of them")
        if self.class_wise and self.classes and len(self.classes) != len(self.levels):
            raise NoiseError(f"class-wise noise has {len(self.levels)} rows for {len(self.classes)} classes")


def _check_levels(levels: torch.Tensor) -> None:
    if not isinstance(levels, torch.Tensor) or levels.dtype != torch.int8:
        kind = getattr(levels, "dtype", type(levels).__name__)
        raise NoiseError(f"noise must be an int8 tensor of pixel levels, got {kind}: round it with to_levels")
    if levels.dim() != 4 or levels.shape[1] not in (1, 3) or not levels.numel():
        raise NoiseError(f"noise must be N x C x H x W with C 1 or 3 and nothing empty, got {tuple(levels.shape)}")


def _check_record(noise: Noise) -> None:
    if not isinstance(noise.recipe, dict) or not isinstance(noise.class_wise, bool):
        raise NoiseError("noise needs a dict as recipe and True or False as class_wise")
    if not isinstance(noise.classes, tuple | list) or not all(isinstance(name, str) for name in noise.classes):
        raise NoiseError("noise needs its class names as a tuple of texts")
    if not isinstance(noise.version, str) or not isinstance(noise.fingerprint, str | None):
        raise NoiseError("noise needs a text as version, and a text or None as fingerprint")


RECORD = tuple(f.name for f in fields(Noise) if f.name != "levels")


def save(noise: Noise, path: str | Path) -> None:
    """`noise` as a safetensors file: key "noise", everything else as one JSON text under metadata "semkit".

    The same noise gives the same bytes; an existing file is replaced at the end or left alone.
    Raises OSError where nothing can be written.
    """
    record = json.dumps({name: getattr(noise, name) for name in RECORD}, sort_keys=True)
    levels = noise.levels.detach().cpu().contiguous()

    def content(file):
        mode = os.stat(file.name).st_mode  # safetensors makes a new file, which only its owner may read
        try:  # by name: safetensors writes a whole file, from the tensor's own memory
            save_file({"noise": levels}, file.name, metadata={"semkit": record})
            os.chmod(file.name, mode)
        except SafetensorError as error:
            code = os.name == "posix" and re.search(r"os error (\d+)", str(error))
            raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(one_line(error))) from error

    atomic_write(path, content)


def load(path: str | Path, *, images=None) -> Noise:
    """The Noise that `save` wrote to `path`; its levels are mapped from the file, not read into memory.

    Checks dtype, shape and radius and, where `images` (an ImageSet) is given, that the noise was made for them.
    Raises NoiseError that says which check failed.
    """
    try:
        return _load(path, images)
    except NoiseError as error:
        raise NoiseError(f"{shown(path)}: {error}") from None


def _load(path: str | Path, images) -> Noise:
    try:
        open(path, "rb").close()  # safetensors says "no such file" of one that may not be read
        with safe_open(path, framework="pt") as file:
            if "noise" not in file.keys():
                raise NoiseError("no tensor named noise in it")
            levels, record = file.get_tensor("noise"), (file.metadata() or {}).get("semkit")
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise NoiseError(f"not a readable safetensors file: {reason}") from error
    if record is None:
        raise NoiseError("no semkit metadata in it, so its radius is unknown: this file was not written by semkit")
    try:
        record = json.loads(record)
        record = {name: record[name] for name in RECORD}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise NoiseError(f"its semkit metadata is damaged: {type(error).__name__} {one_line(error)}") from error
    noise = Noise(levels, **record)
    if images is not None:
        check_fits(noise, images)
    return noise


def check_fits(noise: Noise, images) -> None:
    """Raises NoiseError unless `noise` was made for `images` (has .images [N,C,H,W] and .fingerprint).

    Noise without a fingerprint (imported) is held against the shape alone.
    """
    first = 1 if noise.class_wise else 0
    shape, wanted = tuple(noise.levels.shape[first:]), tuple(images.images.shape[first:])
    if shape != wanted:
        raise NoiseError(f"this noise has the shape {shape}, the images {wanted}: pass the set it was made for")
    if noise.fingerprint not in (None, images.fingerprint):
        raise NoiseError(
            f"this noise was crafted for other images (fingerprint {noise.fingerprint[:8]}.. against "
            f"{images.fingerprint[:8]}..): craft again or pass the set it was made for"
        )


def _pairs(noise: Noise, images: torch.Tensor):
    """Blocks (levels, images), both int16: noise levels and pixel levels subtract without wrapping around."""
    if images.dtype != torch.uint8 or images.shape != noise.levels.shape:
        raise NoiseError(
            f"noise {tuple(noise.levels.shape)} needs uint8 images of that shape, got {images.dtype} "
            f"{tuple(images.shape)}" + (": expand class-wise noise by the labels first" if noise.class_wise else "")
        )
    for part in blocks(images):
        x = images[part].to(torch.int16)
        yield noise.levels[part].to(x.device, torch.int16), x


def effective(noise: Noise, images: torch.Tensor) -> torch.Tensor:
    """The noise that is left after clipping to the box, clip(images + levels, 0, 255) - images, as int8 [N,C,H,W].

    This is what a learner meets and what is measured; images uint8 [N,C,H,W]. Raises NoiseError for other shapes.
    """
    return torch.cat([levels.clamp(-x, 255 - x).to(torch.int8) for levels, x in _pairs(noise, images)])


def clipped_fraction(noise: Noise, images: torch.Tensor) -> float:
    """The share of values in [0, 1] whose noise the box cuts: the mean of (effective != levels).

    images uint8 [N,C,H,W]. Raises NoiseError for other shapes.
    """
    cut = sum(int((levels.clamp(-x, 255 - x) != levels).count_nonzero()) for levels, x in _pairs(noise, images))
    return cut / noise.levels.numel()


def mean_effective(noise: Noise, images: torch.Tensor) -> float:
    """The mean of |effective| in levels, without holding it.

    images uint8 [N,C,H,W]. Raises NoiseError for other shapes.
    """
    left = sum(int(levels.clamp(-x, 255 - x).abs().sum()) for levels, x in _pairs(noise, images))
    return left / noise.levels.numel()


def expand(class_noise: Noise, labels: torch.Tensor) -> Noise:
    """The sample-wise Noise of class-wise noise: levels [K,C,H,W], labels [N] in 0..K-1 -> levels[labels] [N,C,H,W].

    Raises NoiseError for sample-wise noise, whose rows belong to images and mean nothing under a label.
    """
    if not class_noise.class_wise:
        raise NoiseError("this noise is sample-wise: row i belongs to image i and must not be indexed by labels")
    labels = torch.as_tensor(labels)
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool or not len(labels):
        raise NoiseError(f"labels must be whole numbers [N], got {labels.dtype} {tuple(labels.shape)}")
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0 or high >= len(class_noise.levels):
        raise NoiseError(f"labels run from {low} to {high}, the noise has classes 0 to {len(class_noise.levels) - 1}")
    levels = class_noise.levels[labels.long().to(class_noise.levels.device)]
    return replace(class_noise, levels=levels, class_wise=False)
