"""One image: read from its file and written back, with noise at its own size, at the size of nets; how it changed."""

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

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
SAMPLE = 200  # images of a set for which SSIM and survival are computed
CENTRE = 256  # SSIM is computed on the central 256 pixels of larger images, because it is slow on photos
WINDOW = 11


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message is one line with its name and the reason."""


def read_image(path: str | os.PathLike) -> Image.Image:
    """Decode an image file, upright, to mode L, LA, RGB or RGBA.

    Palettes, CMYK, YCbCr and LAB -> RGB, with A if anything can be transparent; 1 bit -> L; 16-bit grey v ->
    round(v / 257). 16-bit colours, and 16-bit grey with alpha (-> RGBA), keep the high byte, which is all that Pillow
    gives. The first of several frames. EXIF orientation is applied; of the metadata only a colour profile is kept.
    Raises UnreadableImage. For a damaged TIFF libtiff also writes a line to stderr, which is left alone, because
    catching it would take stderr away from other threads too.
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
    with warnings.catch_warnings(action="ignore"), open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
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


def _changes(original: Image.Image, protected: Image.Image, mode: str) -> Iterator[np.ndarray]:
    """protected - original, both converted to `mode`: int32 [rows,width,...], in bands of rows to spare memory."""
    width, height = original.size
    for rows in _strips(height, width):
        box = (0, rows.start, width, min(rows.stop, height))
        before, after = (np.asarray(one.crop(box).convert(mode)).astype(np.int32) for one in (original, protected))
        yield after - before


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


def fit_noise(noise: np.ndarray, size: tuple[int, int], radius: float) -> np.ndarray:
    """Enlarge int8 noise [3,h,w] to the size (width, height) of an image: int8 [3,height,width], |noise| <= radius.

        u <- clip(up(noise), radius);  three times  u <- clip(u + up(noise - down(u)), radius);  round(u)

    `down` is the usual resize of a trainer, bilinear with antialias: down(u) is about `noise`.

    >>> fit_noise(np.full((3, 8, 8), 5, np.int8), (20, 10), radius=8).shape
    (3, 10, 20)
    """
    limit = min(int(check_radius(radius)), 127)
    if noise.dtype != np.int8 or noise.ndim != 3 or noise.shape[0] != 3:
        raise ValueError(f"int8 noise of shape (3, height, width) is needed, got {noise.dtype} {noise.shape}")
    if noise.shape[1:] == tuple(size)[::-1]:
        return noise.clip(-limit, limit)
    fitted = np.empty((3, *size[::-1]), np.int8)
    for plane, wanted in zip(fitted, noise.astype(np.float32), strict=True):
        plane[...] = _fitted_plane(wanted, size, limit)
    return fitted


def apply_noise(image: Image.Image, noise: np.ndarray, radius: float) -> Image.Image:
    """Protect one image: clip(image + fit_noise(noise), 0, 255) in its own mode and size; alpha is kept.

    Grey images get the mean of the three noise channels, rounded. Raises ValueError for other modes and shapes.
    """
    _check_mode(image)
    planes = fit_noise(noise, image.size, radius)
    if image.mode in ("L", "LA"):
        planes = [(planes.sum(0, dtype=np.int16) + 1) // 3]  # a third is never half-way: rounded
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


def difference(original: Image.Image, protected: Image.Image) -> int:
    """max |protected - original| over all pixels and channels, in levels.

    Raises ValueError if sizes, modes or alpha channels differ.
    """
    if original.size != protected.size:
        sizes = ["x".join(map(str, image.size)) for image in (original, protected)]
        raise ValueError(f"the original has {sizes[0]} pixels, the protected image {sizes[1]}")
    if original.mode != protected.mode:
        raise ValueError(f"the original has mode {original.mode}, the protected image {protected.mode}")
    largest = 0
    for apart in _changes(original, protected, original.mode):
        if original.mode.endswith("A") and apart[..., -1].any():
            raise ValueError("the alpha channels differ")
        largest = max(largest, int(np.abs(apart).max()))
    return largest


def noise_survival(original: Image.Image, protected: Image.Image, noise: np.ndarray) -> tuple[float, float]:
    """How much of int8 noise [3,size,size] is left after a resize to size x size: (correlation, share of mean |noise|).

    (0, 0) for zero noise. The correlation is 0 if the noise, or what is left of it, is constant.
    """
    if not noise.any():
        return 0.0, 0.0
    size, wanted = noise.shape[-1], noise.astype(np.float64)
    left = working_image(protected, size).astype(np.float64) - working_image(original, size)
    share = float(np.abs(left).mean() / np.abs(wanted).mean())
    if left.std() == 0 or wanted.std() == 0:
        return 0.0, share
    return float(np.corrcoef(left.ravel(), wanted.ravel())[0, 1]), share


def ssim(x: np.ndarray | torch.Tensor, y: np.ndarray | torch.Tensor) -> float:
    """Structural similarity of two images [C,H,W] in levels 0..255, at least 11 pixels wide and high.

        SSIM = mean of (2 mx my + a) (2 cxy + b) / ((mx^2 + my^2 + a) (vx + vy + b)),  a = 2.55^2, b = 7.65^2

    mx, vx, cxy: mean, variance and covariance under a Gaussian window of 11 pixels, sigma 1.5, around every pixel; the
    images are reflected at their edges. Source: Wang et al., IEEE TIP 2004.

    >>> ssim(np.zeros((3, 16, 16)), np.zeros((3, 16, 16)))
    1.0
    """
    from scipy.ndimage import gaussian_filter  # half a second that importing semkit need not pay

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean = partial(gaussian_filter, sigma=1.5, radius=WINDOW // 2, mode="mirror", axes=(1, 2))
    mx, my, a, b = mean(x), mean(y), 2.55**2, 7.65**2
    vx, vy, cxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float(((2 * mx * my + a) * (2 * cxy + b) / ((mx**2 + my**2 + a) * (vx + vy + b))).mean())


def _centre(image: Image.Image) -> np.ndarray:
    width, height = image.size
    left, top = max(0, (width - CENTRE) // 2), max(0, (height - CENTRE) // 2)
    part = image.crop((left, top, min(left + CENTRE, width), min(top + CENTRE, height)))
    return np.moveaxis(np.asarray(part.convert("RGB")), -1, 0)


class Quality:
    """Quality of a protected set of `count` images: PSNR over all of them, SSIM and survival over about SAMPLE."""

    def __init__(self, count: int):
        self._every = max(1, count // SAMPLE)
        self._seen = self._unchanged = self._squares = self._values = 0
        self._ssim, self._survival = [], []
        self.largest = 0  # change of any value so far, in levels

    def add(self, original: Image.Image, protected: Image.Image, noise: np.ndarray | None = None) -> None:
        """Add an original and its protected image; noise: int8 [3,size,size] that was fitted to it, if any."""
        squares, width, height = 0, *original.size
        for apart in _changes(original, protected, "RGB"):
            self.largest = max(self.largest, int(np.abs(apart).max()))
            squares += int((apart**2).sum(dtype=np.int64))
        self._squares, self._values = self._squares + squares, self._values + 3 * width * height
        self._unchanged += squares == 0
        if self._seen % self._every == 0:
            if min(original.size) >= WINDOW:
                self._ssim.append(ssim(_centre(original), _centre(protected)))
            if noise is not None and noise.any():
                self._survival.append(noise_survival(original, protected, noise))
        self._seen += 1

    def report(self) -> dict:
        """The numbers for a report; None where there is no image to measure."""
        psnr = 10 * math.log10(255**2 * self._values / self._squares) if self._squares else None
        correlation, share = np.mean(self._survival, axis=0).tolist() if self._survival else (None, None)
        survival = {"noise_correlation": _rounded(correlation, 3), "noise_share": _rounded(share, 3)}
        similar = float(np.mean(self._ssim)) if self._ssim else None
        return {
            "unchanged_files": self._unchanged, "psnr_db": _rounded(psnr, 2), "ssim": _rounded(similar, 4),
            "after_resize_to_working_size": survival,
        }  # fmt: skip


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
