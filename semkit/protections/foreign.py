"""Arrays in files of strangers, read without trusting them: numpy pickles, .pt, .npy, .npz and folders of PNGs.

Readers: path -> numpy array; they raise NoiseError, or whatever error a library raises on a broken file.
Writers: int8 levels [N,C,H,W] and an open file, or a folder.
"""

import io
import os
import pickle
import re
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from semkit.images.files import shown
from semkit.protections.noise import NoiseError

COMMENT = "semkit noise: levels + 128"  # in every PNG that is written
# The names under which numpy 1 and 2 pickle an array: protocol 5 uses _frombuffer, 0 to 2 carry the bytes as text.
ALLOWED = {
    "numpy.core.multiarray._reconstruct": "reconstruct",
    "numpy._core.multiarray._reconstruct": "reconstruct",
    "numpy.core.numeric._frombuffer": "frombuffer",
    "numpy._core.numeric._frombuffer": "frombuffer",
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
}


class _Noted:
    """What a pickle asks to call or make, with arguments and state: recorded, never carried out."""

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


# Python's own unpickler, because the one in C accepts every opcode and allocates whatever the file asks for; and
# pickletools, which could list the opcodes, fails on strings of Python 2 before Python 3.12.8.
class _Reader(pickle._Unpickler):
    dispatch: ClassVar = {n: pickle._Unpickler.dispatch[n] for n in (getattr(pickle, o)[0] for o in OPCODES.split())}

    def find_class(self, module, name):
        if f"{module}.{name}" not in ALLOWED:
            asked = shown(f"{module}.{name}"[:80])
            raise NoiseError(f"the pickle asks for {asked}, which is refused: only numpy arrays of numbers are read")
        return _Noted(ALLOWED[f"{module}.{name}"])


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


def read_pickle(path: Path) -> np.ndarray:
    """The array of numbers that numpy 1 or 2 pickled in protocol 0 to 5; nothing that the file names is run."""
    with open(path, "rb") as file:
        try:
            noted = _Reader(file, encoding="latin1").load()  # latin1: Python 2 pickled bytes as its str
        except KeyError:
            raise NoiseError("the pickle holds more than one numpy array of numbers, or is damaged") from None
    kind = noted.name if isinstance(noted, _Noted) else type(noted).__name__
    if kind == "frombuffer":
        data, dtype, shape, order, *axes = noted.args
    elif kind == "reconstruct":
        _, shape, dtype, fortran, data = noted.state
        order, axes = "F" if fortran else "C", []
    else:
        raise NoiseError(f"the pickle holds {kind[:40]}, not one numpy array")
    array = np.frombuffer(_bytes(data), _dtype(dtype))
    if order == "K":  # axes in another order than in memory: transposed after reading
        return array.reshape(shape).transpose(*axes)
    return array.reshape(shape, order=order)


def write_pickle(levels: torch.Tensor, file: BinaryIO) -> None:
    """Write the levels as a pickled int8 array, for numpy 1 and 2."""
    data = pickle.dumps(levels.numpy(), protocol=3)
    # The old name of numpy's module, which both find; its first occurrence is before the data.
    file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))


def read_torch(path: Path) -> np.ndarray:
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


def write_torch(levels: torch.Tensor, file: BinaryIO) -> None:
    """Write levels / 255 as a float32 tensor."""
    torch.save(levels.float() / 255, file)


def read_numpy(path: Path) -> np.ndarray:
    """The array of an .npy file, or the only one of an .npz file."""
    with open(path, "rb") as file:  # np.load, given a path, leaves a damaged .npz open
        held = np.load(file, allow_pickle=False)
        if isinstance(held, np.ndarray):
            return held
        with held:
            if len(held.files) != 1:
                raise NoiseError(f"the file holds {len(held.files)} arrays: save the noise array alone")
            return held[held.files[0]]


def write_npy(levels: torch.Tensor, file: BinaryIO) -> None:
    """Write the levels as an int8 .npy file."""
    np.save(file, levels.numpy(), allow_pickle=False)


def write_npz(levels: torch.Tensor, file: BinaryIO) -> None:
    """Write the levels as the int8 array `noise` of an .npz file."""
    np.savez(file, noise=levels.numpy())


def _png_names(folder: Path) -> list[str]:
    """The names 0.png to n.png in order, zeros in front allowed; raises NoiseError if one is missing or others are."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    if odd := [n for n in names if not re.fullmatch(r"[0-9]{1,12}\.png", n) or not (folder / n).is_file()]:
        raise NoiseError(f"the folder holds {shown(min(odd))}, not just noise as 0.png to n.png")
    names.sort(key=lambda name: int(name[:-4]))
    for i, name in enumerate(names):
        if int(name[:-4]) != i:
            raise NoiseError(f"the folder lacks {i}.png or holds it twice")
    return names


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


def read_pngs(folder: Path) -> np.ndarray:
    """The int8 levels [N,C,H,W] = pixels - 128 of the PNGs 0.png to n.png."""
    levels = [_png(folder / name) for name in _png_names(folder)]
    if not levels:
        raise NoiseError("the folder is empty: it holds no noise as 0.png to n.png")
    if len({one.shape for one in levels}) > 1:
        raise NoiseError("the folder holds images of several sizes, so they are no noise")
    return np.stack(levels)


def check_pngs(folder: Path) -> None:
    """Raise NoiseError unless the folder is empty or holds nothing but PNGs that write_pngs wrote.

    Only those may be replaced: photos may have the same names and sizes.
    """
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if not re.fullmatch(r"[0-9]{1,12}\.png", name) or not path.is_file():
            raise NoiseError(f"the folder holds {shown(name)}, not just noise as 0.png to n.png")
        if path.is_symlink():
            raise NoiseError(f"{name} is a link")
        try:
            with Image.open(path, formats=["PNG"]) as image:
                ours = image.info.get("Comment") == COMMENT
        except Exception:  # on broken files Pillow's parsers raise errors of any kind
            raise NoiseError(f"{name} is damaged, or no PNG") from None
        if not ours:
            raise NoiseError(f"{name} was not written by semkit convert; remove the folder yourself, or name another")


def write_pngs(levels: torch.Tensor, folder: Path) -> None:
    """Write levels + 128 as the 8-bit PNGs 0.png to n.png, zeros in front, with a comment that says so."""
    digits, about = len(str(len(levels) - 1)), PngInfo()
    about.add_text("Comment", COMMENT)
    for i, one in enumerate(levels):
        pixels = np.moveaxis((one.to(torch.int16) + 128).to(torch.uint8).numpy(), 0, 2)
        image = Image.fromarray(pixels[..., 0] if len(one) == 1 else pixels)
        image.save(folder / f"{i:0{digits}}.png", pnginfo=about)
