"""How far protected images are from their originals, and how much of the noise a resize leaves."""

import math
from functools import partial

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from semkit.images.picture import bands, working_image

SAMPLE = 200  # images of a set for which SSIM and survival are computed
CENTRE = 256  # SSIM is computed on the central 256 pixels of larger images, because it is slow on photos
WINDOW = 11


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
    for before, after in bands(original, protected):
        apart = np.abs(np.asarray(before).astype(np.int16) - np.asarray(after))
        if original.mode.endswith("A") and apart[..., -1].any():
            raise ValueError("the alpha channels differ")
        largest = max(largest, int(apart.max()))
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
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean = partial(gaussian_filter, sigma=1.5, radius=WINDOW // 2, mode="mirror", axes=(1, 2))
    mx, my, a, b = mean(x), mean(y), 2.55**2, 7.65**2
    vx, vy, cxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    return float(((2 * mx * my + a) * (2 * cxy + b) / ((mx**2 + my**2 + a) * (vx + vy + b))).mean())


def _colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.int32)


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
        for before, after in bands(original, protected):
            apart = _colours(after) - _colours(before)
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
