"""One image: decoded from its file and written back, noise on it at whatever size it has, what JPEG leaves of it."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from semkit.files import atomic_write, shown
from semkit.pixels import check_radius

# Pillow decides by content; without this list a PostScript file named .jpg would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MODES = ("L", "LA", "RGB", "RGBA")
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


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image of a file, upright, in mode L, LA, RGB or RGBA.

    EXIF orientation applied; palettes, CMYK, YCbCr, LAB -> RGB, with A if anything can be transparent; 1 bit -> L;
    16-bit grey v -> round(v / 257); of 16-bit colours, and of grey with alpha, which becomes RGBA, the high byte, all
    that Pillow gives; the first frame of several. Metadata is dropped but for a colour profile.
    Raises UnreadableImage.
    """
    # Not only Pillow's own errors: on broken files its parsers raise whatever they run into.
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise ValueError("not a file" if os.path.exists(path) else "no such file")
        with _opened(path) as image:
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


def stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) of an image file that read_image can read, before it is turned upright; nothing is decoded."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    # Pillow gets a file object, because it maps an uncompressed TIFF that it opens by name, and then scrambles the rows
    # of orientations 5 to 8.
    with (
        warnings.catch_warnings(action="ignore"),
        open(path, "rb") as file,
        Image.open(file, formats=FORMATS) as image,
    ):
        yield image


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


def write_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes an image of mode L, LA, RGB or RGBA losslessly and atomically; raises ValueError for other modes."""
    _check_mode(image)
    atomic_write(path, lambda file: image.save(file, "PNG"))


def through_jpeg(levels: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [H,W,3] as JPEG of the given quality, colour at half resolution, and back."""
    Image.fromarray(levels).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.array(Image.open(file))


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
