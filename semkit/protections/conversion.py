"""Noise files from and to other formats, told apart by suffix.

Only .safetensors keeps recipe, fingerprint and class names; the others hold the bare values. Levels survive every
way there and back, bit by bit.
"""

import difflib
import io
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from semkit.images.files import atomic_write, one_line, shown
from semkit.images.storage import blocks
from semkit.protections import foreign
from semkit.protections.noise import Noise, NoiseError, load, save

UNITS = ("auto", "levels", "fraction")
LARGEST = 128.5 / 255  # the largest fraction of 1 that rounds to a level of int8
_PICKLE = foreign.read_pickle, foreign.write_pickle
# Suffix -> (path -> array, (int8 levels, open file) -> None).
FOREIGN = {
    ".pkl": _PICKLE, ".pickle": _PICKLE, ".pt": (foreign.read_torch, foreign.write_torch),
    ".npy": (foreign.read_numpy, foreign.write_npy), ".npz": (foreign.read_numpy, foreign.write_npz),
}  # fmt: skip
FORMATS = (".safetensors", *FOREIGN, "")  # a folder of PNGs has no suffix


def _unit(array: np.ndarray, unit: str) -> str:
    """ "levels" or "fraction": what an array holds, by its dtype and largest |value|; raises NoiseError if unclear."""
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

    unit "auto": floats up to .5 are fractions of 1, beyond 1 levels. [N,H,W,3] is told by its last axis, if the second
    is neither 1 nor 3. The recipe says what was found. Raises NoiseError for other dtypes, shapes and ranges.

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


def _read_foreign(path: Path, suffix: str, unit: str, class_wise: bool) -> Noise:
    """The Noise in a foreign file, with one NoiseError line for whatever goes wrong."""
    try:
        with warnings.catch_warnings(action="ignore"):
            array = FOREIGN[suffix][0](path) if suffix else foreign.read_pngs(path)
        return from_array(array, unit=unit, class_wise=class_wise, source=shown(path.name))
    except NoiseError as error:
        raise NoiseError(f"{shown(path)}: {error}") from None
    except Exception as error:  # on a broken file parsers raise errors of any kind
        if isinstance(error, OSError) and error.errno:  # the system's, not the parser's: permission denied
            raise NoiseError(f"{shown(error.filename or path)}: {error.strerror}") from None
        raise NoiseError(f"{shown(path)} is damaged or of another format: {one_line(error)}") from error


def _write_folder(noise: Noise, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the destination, then swapped in; the old folder goes with the temporary one.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".noise-") as temporary:
        fresh, old = Path(temporary, "fresh"), Path(temporary, "old")
        fresh.mkdir()
        foreign.write_pngs(noise.levels.detach().cpu(), fresh)
        if os.path.lexists(folder):
            os.rename(folder, old)
        os.rename(fresh, folder)


def _path(name: str | Path) -> Path:
    if not os.fspath(name):  # Path("") is the current folder
        raise NoiseError("the name of a noise file is empty")
    return Path(name)


def _format(path: Path) -> str:
    """The one of FORMATS that a path names; raises NoiseError with the nearest one."""
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix not in FORMATS:
        near = difflib.get_close_matches(suffix, FORMATS, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        known = ", ".join(filter(None, FORMATS))
        raise NoiseError(f"{shown(path)}: unknown kind of noise file{hint}; known: {known}, a folder of PNGs")
    return suffix


def read(path: str | Path, *, radius: float | None = None, unit: str = "auto", class_wise: bool = False) -> Noise:
    """Read noise from a file of any of FORMATS, or from a folder of PNGs 0.png to n.png (pixels - 128).

    radius in levels (default: the file's own, else its largest |level|). unit and class_wise: of foreign files, see
    from_array. Raises NoiseError for anything unreadable or beyond the radius.
    """
    path = _path(path)
    suffix = _format(path)
    if not path.is_file() and not path.is_dir():
        raise NoiseError(f"{shown(path)}: no such file or folder")
    found = load(path) if suffix == ".safetensors" else _read_foreign(path, suffix, unit, class_wise)
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
    """Write noise as a file of the format that the suffix names, or without a suffix as a folder of lossless PNGs.

    .pt holds float32 levels / 255; .pkl, .pickle, .npy and .npz (key noise) int8 levels; the PNG of an image, RGB or
    grey, levels + 128. Raises NoiseError if something exists there, OSError if nothing can be written.
    """
    path = _path(path)
    suffix = _format(path)
    _check_free(path, overwrite)
    try:
        if suffix == ".safetensors":
            save(noise, path)
        elif suffix:  # made in memory, because torch and numpy do not say why a file could not be written
            FOREIGN[suffix][1](noise.levels.detach().cpu(), content := io.BytesIO())
            atomic_write(path, content.getvalue())
        else:
            _write_folder(noise, path)
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
    """Convert a noise file: read `src` (see read), write it to `dst` (see write); returns the Noise.

    Raises NoiseError for a bad source or destination, OSError for a full disk; nothing is left half-written.
    """
    _format(_path(dst))  # before the reading, which may take long
    _check_free(Path(dst), overwrite)
    found = read(src, radius=radius, unit=unit, class_wise=class_wise)
    write(found, dst, overwrite=overwrite)
    return found
