"""Noise files from and to other formats, told apart by suffix.

Only .safetensors keeps recipe, fingerprint and class names; the others hold the bare values. Levels survive every
way there and back, bit by bit.
"""

import difflib
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from semkit.images.files import atomic_write, one_line, shown
from semkit.images.storage import blocks
from semkit.protections import foreign
from semkit.protections.noise import Noise, NoiseError, load, save

UNITS = ("auto", "levels", "fraction")
LARGEST = 128.5 / 255  # what rounds to int8's last level, as a fraction of 1


def _unit(array: np.ndarray, unit: str) -> str:
    """Whether `array` holds levels or fractions of 1, from its dtype and largest |value|; NoiseError if unclear."""
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
    # Floats that small would, as levels, all be about nothing; so they are fractions.
    return "fraction" if largest <= LARGEST else "levels"


def from_array(array: np.ndarray, *, unit: str = "auto", class_wise: bool = False, source: str = "array") -> Noise:
    """The Noise in `array` [N,C,H,W] or [N,H,W,3], with the largest |level| as its radius.

        levels = round(array) for integers or unit "levels", round(255 * array) for unit "fraction"

    "auto" takes floats up to .5 as fractions of 1, beyond 1 as levels. [N,H,W,3] is known by its last axis, where the
    second is neither 1 nor 3. The recipe says what was found. Raises NoiseError for other dtypes, shapes and ranges.
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


def _reader(read_array: Callable[[Path], np.ndarray]) -> Callable[..., Noise]:
    """A reader of Noise from a reader of arrays, with one NoiseError line for whatever goes wrong."""

    def read(path: Path, **options) -> Noise:
        try:
            with warnings.catch_warnings(action="ignore"):
                array = read_array(path)
            return from_array(array, source=shown(path.name), **options)
        except NoiseError as error:
            raise NoiseError(f"{shown(path)}: {error}") from None
        except Exception as error:  # a stranger's file breaks its parser in any way
            if isinstance(error, OSError) and error.errno:  # the system's, not the parser's: permission denied
                raise NoiseError(f"{shown(error.filename or path)}: {error.strerror}") from None
            raise NoiseError(f"{shown(path)} is damaged or of another format: {one_line(error)}") from error

    return read


def _writer(write_levels: Callable) -> Callable[[Noise, Path], None]:
    """A writer of Noise that leaves a whole file or none, from a writer of levels to an open file."""

    def write(noise: Noise, path: Path) -> None:
        # Made in memory, because torch and numpy do not tell why a file could not be written.
        write_levels(noise.levels.detach().cpu(), content := io.BytesIO())
        atomic_write(path, content.getvalue())

    return write


def _write_folder(noise: Noise, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the destination, then swapped in; what stood there leaves with the temporary folder.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".noise-") as temporary:
        fresh, old = Path(temporary, "fresh"), Path(temporary, "old")
        fresh.mkdir()
        foreign.write_pngs(noise.levels.detach().cpu(), fresh)
        if os.path.lexists(folder):
            os.rename(folder, old)
        os.rename(fresh, folder)


# Suffix -> (path, unit, class_wise) -> Noise, and (Noise, path) -> None; a folder has no suffix.
FORMATS = {
    ".safetensors": (lambda path, unit, class_wise: load(path), save),
    ".pkl": (_reader(foreign.read_pickle), _writer(foreign.write_pickle)),
    ".pickle": (_reader(foreign.read_pickle), _writer(foreign.write_pickle)),
    ".pt": (_reader(foreign.read_torch), _writer(foreign.write_torch)),
    ".npy": (_reader(foreign.read_numpy), _writer(foreign.write_npy)),
    ".npz": (_reader(foreign.read_numpy), _writer(foreign.write_npz)),
    "": (_reader(foreign.read_pngs), _write_folder),
}


def _path(name: str | Path) -> Path:
    if not os.fspath(name):  # Path("") is the current folder
        raise NoiseError("the name of a noise file is empty")
    return Path(name)


def _format(path: Path) -> tuple[Callable[..., Noise], Callable[[Noise, Path], None]]:
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix not in FORMATS:
        near = difflib.get_close_matches(suffix, FORMATS, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(filter(None, FORMATS))
        raise NoiseError(f"{shown(path)}: unknown kind of noise file{hint}; known: {known}, a folder of PNGs")
    return FORMATS[suffix]


def read(path: str | Path, *, radius: float | None = None, unit: str = "auto", class_wise: bool = False) -> Noise:
    """The Noise in a file of any of FORMATS, or in a folder of PNGs 0.png to n.png (pixels - 128).

    radius in levels (default: the file's own, else its largest |level|); unit and class_wise as in `from_array`,
    for files that do not say it themselves. Raises NoiseError for anything unreadable or beyond the radius.
    """
    path = _path(path)
    reader, _ = _format(path)
    if not path.is_file() and not path.is_dir():
        raise NoiseError(f"{shown(path)}: no such file or folder")
    found = reader(path, unit=unit, class_wise=class_wise)
    return found if radius is None else replace(found, radius=radius)


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise NoiseError(f"{shown(path)} exists already: pass overwrite to replace it")
    try:
        if path.is_dir():
            if path.suffix.lower() in FORMATS and path.suffix:
                raise NoiseError("it is a folder, and the name is that of a file")
            foreign.check_pngs(path)
        elif path.exists() and not path.is_file():
            raise NoiseError("it is neither a file nor a folder")
    except NoiseError as error:
        raise NoiseError(f"{shown(path)} will not be replaced: {error}") from None


def write(noise: Noise, path: str | Path, *, overwrite: bool = False) -> None:
    """`noise` as a file of the format that the suffix names, or without one as a folder of lossless PNGs.

    .pt holds float32 levels / 255; .pkl, .pickle, .npy and .npz (key noise) int8 levels; the PNG of an image, RGB or
    grey, levels + 128. Raises NoiseError where something exists already, OSError where nothing can be written.
    """
    path = _path(path)
    _, writer = _format(path)
    _check_free(path, overwrite)
    try:
        writer(noise, path)
    except OSError as error:
        raise OSError(f"{shown(path)} could not be written: {error.strerror or one_line(error)}") from error


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    radius: float | None = None,
    unit: str = "auto",
    class_wise: bool = False,
    overwrite: bool = False,
) -> Noise:
    """The Noise read from `src` (see `read`) and written to `dst` (see `write`).

    Raises NoiseError for a bad source or destination and OSError for a full disk; nothing is left half-written.
    """
    _format(_path(dst))  # before the reading, which may take long
    _check_free(Path(dst), overwrite)
    found = read(src, radius=radius, unit=unit, class_wise=class_wise)
    write(found, dst, overwrite=overwrite)
    return found
