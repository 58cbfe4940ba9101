"""One image: read from its file and written back, with noise at its own size, through JPEG, at the size of nets."""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from semkit.images.files import atomic_write, shown
from semkit.images.pixels import check_radius

# Pillow decides by content; without this list a PostScript file named .jpg would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MODES = ("L", "LA", "RGB", "RGBA")
_LARGEST_PROFILE = 1 << 20  # bytes; Pillow refuses to read a PNG with a larger colour profile
BYTES_PER_PIXEL = 16  # peak memory of reading, protecting, writing and measuring an image
_STRIP = 1 << 18  # pixels of a large image that are processed at once


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message is one line with its name and the reason."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """Decode an image file, upright, to mode L, LA, RGB or RGBA.

    Palettes, CMYK, YCbCr and LAB -> RGB, with A if anything can be transparent; 1 bit -> L; 16-bit grey v ->
    round(v / 257). 16-bit colours, and 16-bit grey with alpha (-> RGBA), keep the high byte, which is all that Pillow
    gives. The first of several frames. EXIF orientation is applied; of the metadata only a colour profile is kept.
    Raises UnreadableImage. On a damaged TIFF libtiff adds a line of its own on stderr: it is not caught, because that
    would take the whole process's stderr away, from other threads too.
    """
    # Pillow's parsers raise any kind of error for broken files.
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait forever
            raise ValueError("not a file" if os.path.exists(path) else "no such file")
        with _opened(path) as image:
            image.load()
            _turn_upright(image)
            return _canonical(image)
    except UnidentifiedImageError:
        reason = "not in an image format that semkit reads" if os.path.getsize(path) else "the file is empty"
    except OSError as error:
        reason = error.strerror or str(error)
    except MemoryError:  # the file may be fine
        raise MemoryError(shown(path)) from None
    except Exception as error:
        reason = str(error) or "the file is damaged"
    raise UnreadableImage(f"{shown(path)}: {' '.join(reason.split())}")


def stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """(width, height) as stored, before the image is turned upright; nothing is decoded."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    # A file object, because Pillow maps an uncompressed TIFF that it opens by name, and then scrambles the rows of
    # orientations 5 to 8.
    with (
        warnings.catch_warnings(action="ignore"),
        open(path, "rb") as file,
        Image.open(file, formats=FORMATS) as image,
    ):
        yield image


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # broken EXIF does not make the pixels unreadable
        pass


def _canonical(image: Image.Image) -> Image.Image:
    if image.mode.startswith("F"):
        raise ValueError("32-bit float pixels have no fixed scale")
    profile = image.info.get("icc_profile") if image.mode not in ("CMYK", "YCbCr", "LAB") else None
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        result = Image.fromarray(_from_16_bit(levels))
        if "transparency" in image.info:  # a level, which Pillow does not turn into alpha
            hole = levels == image.info["transparency"]
            result.putalpha(Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    else:
        kind = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        result = image.convert(kind + "A" if image.has_transparency_data else kind)
    result.info = {"icc_profile": profile} if profile else {}
    return result


def _from_16_bit(levels: np.ndarray) -> np.ndarray:
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"grey levels from {levels.min()} to {levels.max()} do not fit 16 bits")
    wide = levels.astype(np.uint32)
    wide += 128
    wide //= 257
    return wide.astype(np.uint8)


def write_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write an image of mode L, LA, RGB or RGBA as PNG, whole or not at all; raises ValueError for other modes.

    Its colour profile is written too; one above 1 MiB is left out, with a warning.
    """
    _check_mode(image)
    profile = image.info.get("icc_profile")
    if profile and len(profile) > _LARGEST_PROFILE:
        warnings.warn(
            f"{shown(path)}: its colour profile of {len(profile) / (1 << 20):.1f} MiB is left out, because many "
            "programs refuse a PNG with more than 1 MiB",
            stacklevel=2,
        )
        profile = None
    atomic_write(path, lambda file: image.save(file, "PNG", icc_profile=profile))


def through_jpeg(levels: np.ndarray, quality: int) -> np.ndarray:
    """Compress uint8 [H,W,3] as JPEG of this quality, with colour at half resolution, and decode it again."""
    Image.fromarray(levels).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.array(Image.open(file))


def each_picture(images: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    """Apply `change` to each of the uint8 images [N,3,H,W], as an array [H,W,3]."""
    done = torch.empty_like(images)
    for i, image in enumerate(images):
        levels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        done[i] = torch.from_numpy(change(levels)).permute(2, 0, 1)
    return done


def _check_mode(image: Image.Image) -> None:
    if image.mode not in MODES:
        raise ValueError(f"an image of mode {', '.join(MODES)} is needed, got {image.mode}")


def _resized(plane: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Resize a float32 plane [h,w] to size = (W, H), with antialias where it shrinks."""
    return np.asarray(Image.fromarray(plane).resize(size, resample))


def _strips(length: int, across: int) -> Iterator[slice]:
    """Slices of `length` rows or columns, each with about _STRIP of the pixels that are `across` long."""
    step = max(1, _STRIP // across)
    return (slice(start, start + step) for start in range(0, length, step))


def bands(*images: Image.Image) -> Iterator[tuple[Image.Image, ...]]:
    """Cut images of one size into the same bands of rows, so that large photos need little memory."""
    width, height = images[0].size
    for rows in _strips(height, width):
        box = (0, rows.start, width, min(rows.stop, height))
        yield tuple(image.crop(box) for image in images)


# What is left of +-8 noise of a short crafting run at 32 px (46 % at the limit) after 120x90 or 500x375 pixels and the
# way back, as its correlation with the noise and the share of its mean |noise|: nearest .95-.96, .82; bilinear .93,
# .79; bicubic .95, .81; Lanczos .95, .81; bicubic with 1 correction .97, .83; with 3 .98, .85; with 10 .985, .86.
_CORRECTIONS = 3
_UP, _DOWN = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def _fitted_plane(wanted: np.ndarray, size: tuple[int, int], limit: int) -> np.ndarray:
    """One channel of fit_noise: float32 [h,w] -> int8 [height,width]; only `fitted` is as large as the image."""
    (width, height), (h, w) = size, wanted.shape
    fitted, missing = np.zeros((height, width), np.float32), wanted
    for correction in range(1 + _CORRECTIONS):
        if correction:
            # Pillow resizes rows first, then columns: strips of each give the same values as the whole.
            narrow = [_resized(p, (w, len(p)), _DOWN) for p in (fitted[rows] for rows in _strips(height, width))]
            missing = wanted - _resized(np.concatenate(narrow), (w, h), _DOWN)
        wide = _resized(missing, (width, h), _UP)
        for columns in _strips(width, height):
            part = fitted[:, columns]
            part += _resized(wide[:, columns], (part.shape[1], height), _UP)
            np.clip(part, -limit, limit, out=part)
    return np.rint(fitted, out=fitted).astype(np.int8)


def _fitted_planes(noise: np.ndarray, size: tuple[int, int], radius: float) -> Iterator[np.ndarray]:
    limit = min(int(check_radius(radius)), 127)
    if noise.dtype != np.int8 or noise.ndim != 3 or noise.shape[0] != 3:
        raise ValueError(f"int8 noise of shape (3, height, width) is needed, got {noise.dtype} {noise.shape}")
    if noise.shape[1:] == size[::-1]:
        yield from noise.clip(-limit, limit)
    else:
        for plane in noise.astype(np.float32):
            yield _fitted_plane(plane, size, limit)


def fit_noise(noise: np.ndarray, size: tuple[int, int], radius: float) -> np.ndarray:
    """Enlarge int8 noise [3,h,w] to the size (width, height) of an image: int8 [3,height,width], |noise| <= radius.

        u <- clip(up(noise), radius);  three times  u <- clip(u + up(noise - down(u)), radius);  round(u)

    `down` is the usual resize of a trainer, bilinear with antialias: down(u) is about `noise`.

    >>> fit_noise(np.full((3, 8, 8), 5, np.int8), (20, 10), radius=8).shape
    (3, 10, 20)
    """
    return np.stack(list(_fitted_planes(noise, tuple(size), radius)))


def apply_noise(image: Image.Image, noise: np.ndarray, radius: float) -> Image.Image:
    """Protect one image: clip(image + fit_noise(noise), 0, 255) in its own mode and size; alpha is kept.

    Grey images get the mean of the three noise channels, rounded. Raises ValueError for other modes and shapes.
    """
    _check_mode(image)
    planes = _fitted_planes(noise, image.size, radius)
    if image.mode in ("L", "LA"):
        planes = [(sum(plane.astype(np.int16) for plane in planes) + 1) // 3]  # a third is never half-way: rounded
    pixels = np.array(image)
    colour = pixels.reshape(*pixels.shape[:2], -1)
    for channel, plane in enumerate(planes):
        colour[..., channel] = (colour[..., channel] + plane.astype(np.int16)).clip(0, 255)
    result = Image.fromarray(pixels)
    result.info = dict(image.info)
    return result


def working_image(image: Image.Image, size: int) -> np.ndarray:
    """The image as a net sees it: uint8 RGB [3,size,size], alpha dropped, bilinear with antialias."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.moveaxis(np.asarray(image), -1, 0))
