"""Image files: the only module that finds, decodes and encodes them."""

import os
import posixpath
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from semkit.pixels import check_radius

# What torchvision's ImageFolder takes for an image, and GIF. WebP, GIF and TIFF files give their first frame.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Pillow decides by content; without this list a PostScript file named .jpg would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MODES = ("L", "LA", "RGB", "RGBA")
SPLITS = ("test", "val", "valid", "validation")
_LARGEST_PROFILE = 1 << 20  # bytes; Pillow refuses to read a PNG with a larger colour profile

_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message is one line with its name and the reason."""


def shown(path: str | os.PathLike) -> str:
    """The path as one printable line, whatever bytes its name holds."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image of a file, upright, in mode L, LA, RGB or RGBA.

    EXIF orientation applied; palettes, CMYK, YCbCr, LAB -> RGB, with A if anything can be transparent; 1 bit -> L;
    16-bit grey v -> round(v / 257); the first frame of several. Metadata is dropped but for a colour profile.
    Raises UnreadableImage.
    """
    # Not only Pillow's own errors: on broken files its parsers raise whatever they run into.
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise ValueError("not a file" if os.path.exists(path) else "no such file")
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            image = _canonical(image)
            return image.transpose(upright) if upright is not None else image
    except UnidentifiedImageError:
        reason = "not in an image format that semkit reads" if os.path.getsize(path) else "the file is empty"
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise UnreadableImage(f"{shown(path)}: {' '.join(reason.split())}")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF does not make the pixels unreadable
        return 1


def _canonical(image: Image.Image) -> Image.Image:
    if image.mode.startswith("F"):
        raise ValueError("32-bit float pixels have no fixed scale")
    profile = image.info.get("icc_profile") if image.mode not in ("CMYK", "YCbCr", "LAB") else None
    if image.mode.startswith("I"):
        result = Image.fromarray(_from_16_bit(np.asarray(image)))
    else:
        kind = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        result = image.convert(kind + "A" if image.has_transparency_data else kind)
    result.info = {"icc_profile": profile} if profile and len(profile) <= _LARGEST_PROFILE else {}
    return result


def _from_16_bit(levels: np.ndarray) -> np.ndarray:
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"grey levels from {levels.min()} to {levels.max()} do not fit 16 bits")
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


@dataclass(frozen=True)
class Listing:
    """The files below a folder, as sorted relative names with '/'.

    images: of every class (a sub-folder, perhaps empty). loose: image files outside any sub-folder.
    ignored: all other files that are not hidden, and folders ('name/') that were left because a link leads back there.
    """

    images: dict[str, tuple[str, ...]]
    loose: tuple[str, ...]
    ignored: tuple[str, ...]


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its suffix, upper or lower case."""
    return name.lower().endswith(SUFFIXES)


def find_images(folder: str | os.PathLike) -> Listing:
    """The Listing of a folder whose immediate sub-folders are the classes; links are followed, hidden names are not.

    Raises OSError for folders that cannot be listed.
    """
    root = Path(folder)
    images, loose, ignored = {}, [], []
    for name in sorted(n for n in os.listdir(root) if not n.startswith(".")):
        if (root / name).is_dir():
            images[name], others = _walk(root, name)
            ignored += others
        else:
            (loose if is_image_name(name) else ignored).append(name)
    return Listing(images, tuple(loose), tuple(ignored))


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


def split_folders(folder: str | os.PathLike) -> tuple[str, str] | None:
    """The names of the sub-folders train and test (or val, valid, validation), in any case; None without both."""
    found = {p.name.lower(): p.name for p in sorted(Path(folder).iterdir(), reverse=True) if p.is_dir()}
    test = next((found[name] for name in SPLITS if name in found), None)
    return (found["train"], test) if "train" in found and test else None


def output_names(names: Iterable[str]) -> dict[str, str]:
    """Relative image name -> relative PNG name, no two the same.

    a.jpg -> a.png; names that would meet, also in upper and lower case or as a folder, stay whole: a.jpg -> a.jpg.png.
    Raises ValueError if a folder has even that name.
    """
    outputs = {name: posixpath.splitext(name)[0] + ".png" for name in names}
    folders = {_alike(str(parent)) for name in outputs for parent in PurePosixPath(name).parents}
    while True:  # a name that stays whole may meet one that was shortened
        taken = Counter(map(_alike, outputs.values()))
        meeting = [n for n, out in outputs.items() if taken[_alike(out)] > 1 or _alike(out) in folders]
        if all(outputs[n] == n + ".png" for n in meeting):
            break
        outputs.update((n, n + ".png") for n in meeting)
    for name in meeting:
        if _alike(outputs[name]) in folders:
            raise ValueError(f"no name for the PNG of {shown(name)}: {shown(outputs[name])} is a folder")
    return outputs


def _alike(name: str) -> str:
    """The same text for names that some file systems take for one."""
    return unicodedata.normalize("NFC", name.casefold())


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes `content`, or what content(file) writes, so that `path` holds all of it or what it held before.

    Makes parent folders. After an error or Ctrl-C nothing is left; what a kill leaves, the next try overwrites.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A hash, not the name itself: with anything added to it, a long name would be too long.
    temporary = path.with_name(f".{sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = os.fspath(path)  # the name that a user knows
        raise


def write_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes an image of mode L, LA, RGB or RGBA losslessly and atomically; raises ValueError for other modes."""
    _check_mode(image)
    atomic_write(path, lambda file: image.save(file, "PNG"))


def _check_mode(image: Image.Image) -> None:
    if image.mode not in MODES:
        raise ValueError(f"an image of mode {', '.join(MODES)} is needed, got {image.mode}")


def _resized(planes: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """float32 planes [C,h,w] -> [C,H,W] for size = (W, H), widened filters (antialias) where they shrink."""
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, resample)) for plane in planes])


# What is left of +-8 noise of a short crafting run at 32 px (46 % at the limit) after 120x90 or 500x375 pixels and the
# way back, as its correlation with the noise and the share of its mean |noise|: nearest .95-.96, .82; bilinear .93,
# .79; bicubic .95, .81; Lanczos .95, .81; bicubic with 1 correction .97, .83; with 3 .98, .85; with 10 .985, .86.
_CORRECTIONS = 3


def fit_noise(noise: np.ndarray, size: tuple[int, int], radius: float) -> np.ndarray:
    """int8 noise [3,h,w] at the size (width, height) of an image: int8 [3,height,width], |noise| <= radius.

        u <- clip(up(noise), radius);  three times  u <- clip(u + up(noise - down(u)), radius);  round(u)

    `down` is the bilinear resize with antialias of a trainer, so `u` is what looks like `noise` after it.
    """
    limit = min(int(check_radius(radius)), 127)
    if noise.dtype != np.int8 or noise.ndim != 3 or noise.shape[0] != 3:
        raise ValueError(f"int8 noise of shape (3, height, width) is needed, got {noise.dtype} {noise.shape}")
    small = (noise.shape[2], noise.shape[1])
    if small == tuple(size):
        return noise.clip(-limit, limit)
    wanted = noise.astype(np.float32)
    fitted = _resized(wanted, size, Image.Resampling.BICUBIC).clip(-limit, limit)
    for _ in range(_CORRECTIONS):
        missing = wanted - _resized(fitted, small, Image.Resampling.BILINEAR)
        fitted = (fitted + _resized(missing, size, Image.Resampling.BICUBIC)).clip(-limit, limit)
    return np.rint(fitted).astype(np.int8)


def apply_noise(image: Image.Image, noise: np.ndarray, radius: float) -> Image.Image:
    """clip(image + fit_noise(noise), 0, 255) in the image's own mode and size; alpha is kept.

    Grey images take the mean of the three noise channels, rounded. Raises ValueError for other modes and shapes.
    """
    _check_mode(image)
    fitted = fit_noise(noise, image.size, radius)
    if image.mode in ("L", "LA"):
        fitted = np.rint(fitted.mean(0, keepdims=True)).astype(np.int8)
    pixels = np.array(image)
    colour = pixels.reshape(*pixels.shape[:2], -1)[..., : len(fitted)]
    colour[...] = (colour.astype(np.int16) + np.moveaxis(fitted, 0, -1)).clip(0, 255)
    result = Image.fromarray(pixels)
    result.info = dict(image.info)
    return result


def difference(original: Image.Image, protected: Image.Image) -> int:
    """max |protected - original| over all pixels and channels, in levels.

    Raises ValueError if sizes, modes or alpha channels are not the same.
    """
    if original.size != protected.size:
        sizes = ["x".join(map(str, image.size)) for image in (original, protected)]
        raise ValueError(f"the original has {sizes[0]} pixels, the protected image {sizes[1]}")
    if original.mode != protected.mode:
        raise ValueError(f"the original has mode {original.mode}, the protected image {protected.mode}")
    apart = np.abs(np.asarray(original).astype(np.int16) - np.asarray(protected))
    if original.mode.endswith("A"):
        if apart[..., -1].any():
            raise ValueError("the alpha channels differ")
    return int(apart.max())


def working_image(image: Image.Image, size: int) -> np.ndarray:
    """The image as a trainer sees it: uint8 RGB [3,size,size], alpha dropped, bilinear with antialias."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0))


def noise_survival(original: Image.Image, protected: Image.Image, noise: np.ndarray) -> tuple[float, float]:
    """What a trainer's resize leaves of int8 noise [3,size,size]: (correlation with it, share of its mean |noise|).

    (0, 0) for noise that is zero; correlation 0 if what is left, or the noise, does not vary.
    """
    if not noise.any():
        return 0.0, 0.0
    size, wanted = noise.shape[-1], noise.astype(np.float64)
    left = working_image(protected, size).astype(np.float64) - working_image(original, size)
    share = float(np.abs(left).mean() / np.abs(wanted).mean())
    if left.std() == 0 or wanted.std() == 0:
        return 0.0, share
    return float(np.corrcoef(left.ravel(), wanted.ravel())[0, 1]), share
