"""How far protected images are from their originals, and what of the noise outlives a trainer's resize."""

import math

import numpy as np
import torch
from PIL import Image

from semkit.images.picture import bands, noise_survival

SAMPLE = 200  # images on which SSIM and survival are taken
CENTRE = 256  # SSIM looks at the central 256 pixels of larger images: it is slow on photographs
WINDOW = 11


def ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """The structural similarity of two images [C,H,W] in levels 0..255, 11 pixels wide and high at least.

    Source: Wang et al., IEEE TIP 2004, by torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    return float(structural_similarity_index_measure(x.float()[None], y.float()[None], data_range=255.0))


def _colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.int32)


def _centre(image: Image.Image) -> torch.Tensor:
    width, height = image.size
    left, top = max(0, (width - CENTRE) // 2), max(0, (height - CENTRE) // 2)
    part = image.crop((left, top, min(left + CENTRE, width), min(top + CENTRE, height)))
    return torch.from_numpy(np.array(part.convert("RGB"))).permute(2, 0, 1)


class Quality:
    """PSNR over all pairs that are added; SSIM and noise survival over about SAMPLE of the `count` that will be."""

    def __init__(self, count: int):
        self._every = max(1, count // SAMPLE)
        self._seen = self._unchanged = self._squares = self._values = 0
        self._ssim, self._survival = [], []
        self.largest = 0  # change of a value so far, in levels

    def add(self, original: Image.Image, protected: Image.Image, noise: np.ndarray | None = None) -> None:
        """One pair, and the int8 noise [3,size,size] that was fitted to it, if it was noise."""
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
        """The numbers, None where there was nothing to take them on."""
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
