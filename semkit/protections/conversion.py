"""Noise files of other formats, named by their suffix: numpy pickles, .pt, .npy, .npz and folders of PNGs.

They hold the values alone; only .safetensors keeps recipe, fingerprint and class names. Converting there and back gives
the same levels. Files are not trusted: no code that a file names is run.
"""

import io
import os
import pickle
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from semkit.images.files import atomic_write, one_line, shown
from semkit.images.pixels import hint_at
from semkit.protections.noise import Noise, NoiseError, from_array, load, save

COMMENT = "semkit noise: levels + 128"  # in every PNG that is written
# What a pickled array names, in numpy 1 and 2: protocol 5 uses _frombuffer, 0 to 2 carry the bytes as text.
ALLOWED = r"numpy\.(_?core\.(multiarray\._reconstruct|numeric\._frombuffer)|ndarray|dtype)|_codecs\.encode"


class _Noted:
    """A call that a pickle asks for, with its arguments and state: recorded, never made."""

    def __init__(self, name: str, args: tuple = ()):
        self.name, self.args, self.state = name, args, ()

    def __call__(self, *args):
        return _Noted(self.name, args)

    def __setstate__(self, state):
        self.state = state


# The opcodes of pickled arrays. None of dicts and sets, because hashing a key of nested tuples can take for ever.
OPCODES = """
    PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""


# Python's own unpickler, because the one in C accepts every opcode and allocates whatever the file asks for.
class _Reader(pickle._Unpickler):
    dispatch: ClassVar = {n: pickle._Unpickler.dispatch[n] for n in (getattr(pickle, o)[0] for o in OPCODES.split())}

    def find_class(self, module, name):
        if not re.fullmatch(ALLOWED, f"{module}.{name}"):
            asked = shown(f"{module}.{name}"[:80])
            raise NoiseError(f"the pickle asks for {asked}, which is refused: only numpy arrays of numbers are read")
        return _Noted(name)


def _dtype(noted: _Noted) -> np.dtype:
    code = noted.args[0]
    if not re.fullmatch(r"[<>=|]?[iufb][1248]", code):
        raise NoiseError(f"the pickle holds dtype {shown(code[:20])}: only numpy arrays of numbers are read")
    # state is (version, byte order, ...)
    return np.dtype(code).newbyteorder(noted.state[1] if noted.state else "=")


def _bytes(data) -> bytes:
    if isinstance(data, _Noted) and data.name == "encode" and data.args[1:] == ("latin1",):
        data = data.args[0]
    return data.encode("latin1") if isinstance(data, str) else data


def _read_pickle(path: Path) -> np.ndarray:
    """The array of numbers that numpy 1 or 2 pickled in protocol 0 to 5; nothing that the file names is run."""
    with open(path, "rb") as file:
        try:
            noted = _Reader(file, encoding="latin1").load()  # latin1: Python 2 pickled bytes as its str
        except KeyError:
            raise NoiseError("the pickle holds more than one numpy array of numbers, or is damaged") from None
    kind = noted.name if isinstance(noted, _Noted) else type(noted).__name__
    if kind == "_frombuffer":
        data, dtype, shape, order, *axes = noted.args
    elif kind == "_reconstruct":
        _, shape, dtype, fortran, data = noted.state
        order, axes = "F" if fortran else "C", []
    else:
        raise NoiseError(f"the pickle holds {kind[:40]}, not one numpy array")
    array = np.frombuffer(_bytes(data), _dtype(dtype))
    if order == "K":  # axes in another order than in memory: transposed after reading
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


def _write_pickle(levels: torch.Tensor, file: BinaryIO) -> None:
    """Write the levels as a pickled int8 array, for numpy 1 and 2."""
    data = pickle.dumps(levels.numpy(), protocol=3)
    # The old name of numpy's module, which both find; its first occurrence is before the data.
    file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))


def _read_torch(path: Path) -> np.ndarray:
    """The only tensor in a file of torch.save, alone or in a dict."""
    with open(path, "rb") as file:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError):  # torch's own message is to load it unsafely
            raise NoiseError("the file is damaged, or asks for more than tensors, which is refused") from None
    held = list(held.values()) if isinstance(held, dict) else [held]
    tensors = [value.detach() for value in held if isinstance(value, torch.Tensor)]
    if len(tensors) != 1:
        raise NoiseError(f"the file holds {len(tensors)} tensors: save the noise tensor alone")
    [tensor] = tensors
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # stride 0: a small file of endless noise
        raise NoiseError("the tensor is larger than what the file holds: save its .contiguous()")
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _read_numpy(path: Path) -> np.ndarray:
    """The array of an .npy file, or the only one of an .npz file."""
    with open(path, "rb") as file:  # np.load, given a path, leaves a damaged .npz open
        held = np.load(file, allow_pickle=False)
        if isinstance(held, np.ndarray):
            return held
        with held:
            if len(held.files) != 1:
                raise NoiseError(f"the file holds {len(held.files)} arrays: save the noise array alone")
            return held[held.files[0]]


def _png(path: Path) -> np.ndarray:
    """The int8 levels [C,H,W] = pixels - 128 of an 8-bit PNG, RGB or grey."""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            mode, pixels = image.mode, np.moveaxis(np.atleast_3d(np.asarray(image)), 2, 0)
    except Exception:  # on broken files Pillow's parsers raise errors of any kind
        raise NoiseError(f"{path.name} is damaged, or no PNG") from None
    if mode not in ("RGB", "L") or content[24] != 8:  # bits per channel: Pillow would cut 16 to 8 without a word
        raise NoiseError(f"{path.name} is not 8-bit RGB or grey")
    return (pixels - np.int16(128)).astype(np.int8)


def _read_pngs(folder: Path) -> np.ndarray:
    """The int8 levels [N,C,H,W] = pixels - 128 of the PNGs 0.png to n.png, zeros in front allowed."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if odd := [p.name for p in paths if not re.fullmatch(r"[0-9]{1,12}\.png", p.name) or not p.is_file()]:
        raise NoiseError(f"the folder holds {shown(min(odd))}, not just noise as 0.png to n.png")
    if not paths:
        raise NoiseError("the folder is empty: it holds no noise as 0.png to n.png")
    paths.sort(key=lambda path: int(path.stem))
    for i, path in enumerate(paths):
        if int(path.stem) != i:
            raise NoiseError(f"the folder lacks {i}.png or holds it twice")
    levels = [_png(path) for path in paths]
    if len({one.shape for one in levels}) > 1:
        raise NoiseError("the folder holds images of several sizes, so they are no noise")
    return np.stack(levels)


def _write_pngs(levels: torch.Tensor, folder: Path) -> None:
    """Write levels + 128 as the 8-bit PNGs 0.png to n.png, zeros in front, in place of what the folder holds."""
    digits, about = len(str(len(levels) - 1)), PngInfo()
    about.add_text("Comment", COMMENT)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the destination, then swapped in; the old folder goes with the temporary one.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".noise-") as temporary:
        fresh, old = Path(temporary, "fresh"), Path(temporary, "old")
        fresh.mkdir()
        for i, one in enumerate(levels):
            pixels = np.moveaxis((one.to(torch.int16) + 128).to(torch.uint8).numpy(), 0, 2)
            image = Image.fromarray(pixels[..., 0] if len(one) == 1 else pixels)
            image.save(fresh / f"{i:0{digits}}.png", pnginfo=about)
        if os.path.lexists(folder):
            os.rename(folder, old)
        os.rename(fresh, folder)


def _is_ours(path: Path) -> bool:
    """Whether a file is a PNG that _write_pngs wrote; photos may have the same name and size."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Comment") == COMMENT
    except Exception:  # on broken files Pillow's parsers raise errors of any kind
        return False


# Suffix -> (path -> array, (int8 levels, open file) -> None). On broken files readers raise whatever a library raises.
FOREIGN = {
    ".pkl": (_read_pickle, _write_pickle),
    ".pickle": (_read_pickle, _write_pickle),
    ".pt": (_read_torch, lambda levels, file: torch.save(levels.float() / 255, file)),
    ".npy": (_read_numpy, lambda levels, file: np.save(file, levels.numpy())),
    ".npz": (_read_numpy, lambda levels, file: np.savez(file, noise=levels.numpy())),
}
FORMATS = (".safetensors", *FOREIGN, "")  # a folder of PNGs has no suffix


def _read_foreign(path: Path, suffix: str, unit: str, class_wise: bool) -> Noise:
    """The Noise in a file of another format; every error is a NoiseError of one line."""
    try:
        with warnings.catch_warnings(action="ignore"):
            array = FOREIGN[suffix][0](path) if suffix else _read_pngs(path)
        return from_array(array, unit=unit, class_wise=class_wise, source=shown(path.name))
    except NoiseError as error:
        raise NoiseError(f"{shown(path)}: {error}") from None
    except Exception as error:  # on a broken file parsers raise errors of any kind
        if isinstance(error, OSError) and error.errno:  # the system's, not the parser's: permission denied
            raise NoiseError(f"{shown(error.filename or path)}: {error.strerror}") from None
        raise NoiseError(f"{shown(path)} is damaged or of another format: {one_line(error)}") from error


def _named(name: str | Path) -> tuple[Path, str]:
    """(path, the one of FORMATS that it names); raises NoiseError with the nearest one."""
    if not os.fspath(name):  # Path("") is the current folder
        raise NoiseError("the name of a noise file is empty")
    path = Path(name)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix not in FORMATS:
        known = (*filter(None, FORMATS), "a folder of PNGs")
        raise NoiseError(f"{shown(path)}: unknown kind of noise file; {hint_at(suffix, known)}")
    return path, suffix


def read(path: str | Path, *, radius: float | None = None, unit: str = "auto", class_wise: bool = False) -> Noise:
    """Read noise from a file of any of FORMATS, or from a folder of PNGs 0.png to n.png (pixels - 128).

    radius in levels (default: the file's own, else its largest |level|). unit and class_wise: of foreign files, see
    from_array. Raises NoiseError for anything unreadable or beyond the radius.
    """
    path, suffix = _named(path)
    if not path.is_file() and not path.is_dir():
        raise NoiseError(f"{shown(path)}: no such file or folder")
    found = load(path) if suffix == ".safetensors" else _read_foreign(path, suffix, unit, class_wise)
    return found if radius is None else replace(found, radius=radius)


def _check_free(path: Path, overwrite: bool) -> None:
    """Raise NoiseError unless nothing is at `path`, or only what convert may have written and may overwrite."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise NoiseError(f"{shown(path)} exists already: pass overwrite to replace it")
    reason = ""
    if path.is_dir():
        others = [name for name in sorted(os.listdir(path)) if not _is_ours(path / name)]
        if path.suffix.lower() in FOREIGN or path.suffix.lower() == ".safetensors":
            reason = "it is a folder, and the name is that of a file"
        elif others:
            reason = (
                f"it holds {shown(others[0])}, which semkit convert did not write; remove it, or name another folder"
            )
    elif path.exists() and not path.is_file():
        reason = "it is neither a file nor a folder"
    if reason:
        raise NoiseError(f"{shown(path)} will not be replaced: {reason}")


def write(noise: Noise, path: str | Path, *, overwrite: bool = False) -> None:
    """Write noise as a file of the format that the suffix names, or without a suffix as a folder of lossless PNGs.

    .pt holds float32 levels / 255; .pkl, .pickle, .npy and .npz (key noise) int8 levels; the PNG of an image, RGB or
    grey, levels + 128. Raises NoiseError if something exists there, OSError if nothing can be written.
    """
    path, suffix = _named(path)
    _check_free(path, overwrite)
    try:
        if suffix == ".safetensors":
            save(noise, path)
        elif suffix:  # made in memory, because torch and numpy do not say why a file could not be written
            FOREIGN[suffix][1](noise.levels.detach().cpu(), content := io.BytesIO())
            atomic_write(path, content.getvalue())
        else:
            _write_pngs(noise.levels.detach().cpu(), path)
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
    """Convert a noise file: read `src` (see read), write `dst` (see write); returns the Noise.

        sk.convert("noise.npy", "noise.safetensors", unit="levels")

    Raises NoiseError for a bad source or destination, OSError for a full disk; nothing is left half-written.
    """
    _check_free(_named(dst)[0], overwrite)  # before the reading, which may take long
    found = read(src, radius=radius, unit=unit, class_wise=class_wise)
    write(found, dst, overwrite=overwrite)
    return found
