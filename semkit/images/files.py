"""Files: the images below a folder, the names of their PNGs, files written whole or not at all, JSON and tensors."""

import errno
import json
import os
import posixpath
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from secrets import token_hex
from types import GenericAlias, UnionType
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # torch is imported where it is needed, because semkit --help needs none
    import torch

# The suffixes of torchvision's ImageFolder, and GIF. Of several frames the first is read.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
LONGEST = 255  # bytes of a file's name


def shown(path: str | os.PathLike) -> str:
    """The path as one printable line, whatever bytes its name holds."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """The message of an error on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42), duration(210)
    ('42 s', '3.5 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def is_image_name(name: str) -> bool:
    """Whether a file has the suffix of an image, in upper or lower case."""
    return name.lower().endswith(SUFFIXES)


def find_images(folder: str | os.PathLike) -> tuple[dict[str, tuple[str, ...]], list[str], list[str]]:
    """List a folder whose immediate sub-folders are the classes: (images, loose, ignored), relative names with '/'.

    images: class -> its image files, perhaps none. loose: image files outside any sub-folder. ignored: other files, and
    folders ('name/') to which a link leads back. Links are followed; hidden names are left out. Raises OSError.
    """
    root = Path(folder)
    images, loose, ignored = {}, [], []
    for name in sorted(n for n in os.listdir(root) if not n.startswith(".")):
        if (root / name).is_dir():
            images[name], others = _walk(root, name)
            ignored += others
        else:
            (loose if is_image_name(name) else ignored).append(name)
    return images, loose, ignored


def _walk(root: Path, name: str) -> tuple[tuple[str, ...], list[str]]:
    def stop(error):
        raise error

    images, ignored = [], []
    seen = {os.path.realpath(root)}  # every real folder once: link loops end here
    for path, folders, files in os.walk(root / name, followlinks=True, onerror=stop):
        below = Path(path).relative_to(root).as_posix()
        if (real := os.path.realpath(path)) in seen:
            ignored.append(below + "/")
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith("."):
                (images if is_image_name(file) else ignored).append(f"{below}/{file}")
    return tuple(sorted(images)), sorted(ignored)


def output_names(names: Iterable[str]) -> dict[str, str]:
    """Name the PNG of each image: relative name -> relative PNG name, all different.

    Names that would collide, also by case or with a folder, keep their suffix: a.jpg -> a.jpg.png. Raises ValueError if
    a folder has even that name, or if it is longer than file systems allow.

    >>> output_names(["cat/a.jpg", "cat/b.jpg", "cat/b.png"])
    {'cat/a.jpg': 'cat/a.png', 'cat/b.jpg': 'cat/b.jpg.png', 'cat/b.png': 'cat/b.png.png'}
    """
    outputs = {name: posixpath.splitext(name)[0] + ".png" for name in names}
    folders = {_alike(str(parent)) for name in outputs for parent in PurePosixPath(name).parents}
    while True:  # a name that keeps its suffix may be that of another file
        taken = Counter(map(_alike, outputs.values()))
        meeting = [n for n, out in outputs.items() if taken[_alike(out)] > 1 or _alike(out) in folders]
        if all(outputs[n] == n + ".png" for n in meeting):
            break
        outputs.update((n, n + ".png") for n in meeting)
    for name in meeting:
        if _alike(outputs[name]) in folders:
            raise ValueError(f"no name for the PNG of {shown(name)}: {shown(outputs[name])} is a folder")
    for name, output in outputs.items():
        if len(os.fsencode(posixpath.basename(output))) > LONGEST:
            raise ValueError(
                f"no name for the PNG of {shown(name)}: with .png after it, it is too long; rename the file"
            )
    return outputs


def _alike(name: str) -> str:
    """A key that is equal for names that some file systems treat as the same: by case, or by Unicode form."""
    return unicodedata.normalize("NFC", name.casefold())


def lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed or its process ends.

    Raises BlockingIOError if another process has locked it, and another OSError on a file system without locks.
    """
    if os.name == "nt":
        import msvcrt

        try:
            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)  # behind the content, because nobody may read a locked byte
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            raise BlockingIOError from None
        finally:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def temporary_file(folder: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file .semkit-*.tmp in `folder`, open for writing; removed at the end, unless it was renamed.

    It is locked while it is open, so remove_leftovers knows that its process is alive.
    """
    # The name of the file to be written is not in it: with anything added, a long name would be too long.
    path = Path(folder) / f".semkit-{token_hex(8)}.tmp"
    try:
        with open(path, "xb") as file:
            with suppress(OSError):  # a file system without locks
                lock(file)
            yield file
    finally:
        with suppress(OSError):
            path.unlink()


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content`, or what content(file) writes, so that `path` holds all of it or what it held before.

    Makes parent folders. Of several writers the last to finish wins. An error or Ctrl-C leaves nothing; a kill leaves a
    hidden file, which remove_leftovers removes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_file(path.parent) as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.close()  # may raise for a full disk
            os.replace(file.name, path)
    except OSError as error:
        if error.errno:
            error.filename = os.fspath(path)  # the name that a user knows
        raise


def writable(folder: str | os.PathLike) -> None:
    """Make the folder if it is missing. Raises OSError if nothing can be written to it: before the work, not after."""
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "nothing can be written to this folder", os.fspath(folder))


def read_json(path: str | os.PathLike) -> object:
    """Read a JSON file. Raises ValueError, without the path, if it is not a file or not JSON."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait forever
        raise ValueError("not a file")
    try:
        return json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_fields(values: object, kinds: Mapping[str, type | UnionType | GenericAlias]) -> dict:
    """`values` if it is a JSON object whose fields have the `kinds`: types, unions, or list[str]; numbers below 2**63.

    Raises ValueError that names the first field that is missing or of another kind.
    """
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{name} is missing")
        if not _is_of(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r:.40}")
    return values


def _is_of(value: object, kind: type | UnionType | GenericAlias) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if isinstance(value, bool):  # an int to Python
        return kind is bool
    return isinstance(value, kind) and (not isinstance(value, int | float) or abs(value) < 2**63)  # neither inf nor nan


def remove_leftovers(folder: str | os.PathLike, age: float = 1) -> None:
    """Remove the .semkit-* files below `folder` that processes left which were killed.

    A file stays while its process is alive, and if it was written to in the last `age` seconds: for a moment after it
    is made, and before it is renamed, it is not locked.
    """
    for path in Path(folder).rglob(".semkit-*"):
        with suppress(OSError):  # locked, or renamed meanwhile
            if path.stat().st_mtime <= time.time() - age:
                with open(path, "r+b") as file:
                    lock(file)
                path.unlink()


def write_tensors(path: str | Path, tensors: Mapping[str, "torch.Tensor"], record: dict) -> None:
    """Write tensors as safetensors, whole or not at all; record: JSON in the metadata "semkit". Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    metadata = {"semkit": json.dumps(record, sort_keys=True)}

    def content(file):
        mode = os.stat(file.name).st_mode  # safetensors replaces the file by one that only its owner may read
        try:  # by name, because safetensors then writes from the tensors' own memory, without a copy
            save_file(tensors, file.name, metadata=metadata)
            os.chmod(file.name, mode)
        except SafetensorError as error:
            code = os.name == "posix" and re.search(r"os error (\d+)", str(error))
            raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(one_line(error))) from error

    atomic_write(path, content)


def read_tensors(path: str | Path, fields: Iterable[str]) -> tuple[dict[str, "torch.Tensor"], dict]:
    """(tensors, mapped from the file, and these fields of the record) that write_tensors wrote; raises ValueError."""
    from safetensors import SafetensorError, safe_open

    if os.path.exists(path) and not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise ValueError("not a readable safetensors file: it is no file")
    try:
        open(path, "rb").close()  # of a file without permission, safetensors says that it is missing
        with safe_open(path, framework="pt") as file:
            tensors, record = {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"not a readable safetensors file: {reason}") from error
    if "semkit" not in record:
        raise ValueError("no semkit metadata in it: this file was not written by semkit")
    try:
        record = json.loads(record["semkit"])
        return tensors, {name: record[name] for name in fields}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its semkit metadata is damaged: {type(error).__name__} {one_line(error)}") from error


NO_MEMORY = (
    "not enough memory", "cannot allocate memory", "can't allocate memory", "out of memory", "bad_alloc",
    "alloc_failed", "could not create a prim",  # oneDNN's, which has no other reason with the nets here
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that the memory of the machine or the GPU ran out."""
    message = str(error).lower()  # no regular expression, because compiling one takes memory
    of_torch = isinstance(error, RuntimeError) and any(words in message for words in NO_MEMORY)
    return isinstance(error, MemoryError) or of_torch
