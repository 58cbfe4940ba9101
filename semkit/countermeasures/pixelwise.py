"""Countermeasures on the stored images: uint8 [N,3,H,W] -> the same shape. Values are rounded, not truncated."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from semkit.images.augment import each_picture
from semkit.images.picture import through_jpeg
from semkit.images.pixels import check_count, to_float

BATCH = 1000  # images that are floats at one time


def jpeg(images: Tensor, quality: int = 10) -> Tensor:
    """Compress each image as JPEG of this quality, 1 to 95, with colour at half resolution, and decode it again.

    Source: Liu et al., Image Shortcut Squeezing, ICML 2023.
    """
    check_count(quality, "quality", 1, 95)
    return each_picture(images, lambda levels: through_jpeg(levels, quality))


def webp(images: Tensor, quality: int = 10) -> Tensor:
    """Compress each image as lossy WebP of this quality, 1 to 100, and decode it again."""

    def through(levels: np.ndarray) -> np.ndarray:
        Image.fromarray(levels).save(file := io.BytesIO(), "WEBP", quality=quality)
        return np.array(Image.open(file).convert("RGB"))

    return each_picture(images, through)


def resize(images: Tensor, percent: int = 50) -> Tensor:
    """Resize each image to this percentage of its side, 1 to 100, and back to its size, bicubic with antialias."""
    height, width = images.shape[2:]
    small = [max(1, round(side * percent / 100)) for side in (width, height)]

    def there_and_back(levels: np.ndarray) -> np.ndarray:
        resized = Image.fromarray(levels).resize(small, Image.Resampling.BICUBIC)
        return np.array(resized.resize((width, height), Image.Resampling.BICUBIC))

    return each_picture(images, there_and_back)


def grayjpeg(images: Tensor, quality: int = 10) -> Tensor:
    """grayscale, then jpeg: grey images have no colour noise for JPEG to keep. Source: Liu et al., ICML 2023."""
    return jpeg(grayscale(images), quality)


def grayscale(images: Tensor) -> Tensor:
    """Set all three channels to the luma .299 R + .587 G + .114 B. Source: Liu et al., ICML 2023."""
    red, green, blue = images.to(torch.int32).unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16  # Pillow's fixed point
    return luma.to(torch.uint8)[:, None].expand_as(images).contiguous()


def bitdepth(images: Tensor, bits: int = 2) -> Tensor:
    """Round each value to the nearest of 2^bits evenly spaced ones from 0 to 255.

    The published countermeasure cuts the lower bits off (posterise), which also darkens the images. Source: Liu et al.,
    ICML 2023.
    """
    step = 255 / (2 ** check_count(bits, "bits", 1, 8) - 1)
    return ((images / step).round() * step).round().to(torch.uint8)


def _smooth(images: Tensor, weights: Sequence[int]) -> Tensor:
    """Filter by integer `weights` down and across, divided by their sum; mirrored at the border."""
    from scipy import ndimage  # half a second that importing semkit need not pay

    total, area = images.cpu().numpy().astype(np.int32), sum(weights) ** 2
    for axis in (2, 3):
        total = ndimage.correlate1d(total, weights, axis, mode="mirror")
    return torch.from_numpy(((total + area // 2) // area).astype(np.uint8)).to(images.device)


def mean(images: Tensor) -> Tensor:
    """Blur with the mean of 3 x 3 pixels, as in REM's and SEM's code."""
    return _smooth(images, (1, 1, 1))


def gaussian(images: Tensor) -> Tensor:
    """Blur with the Gaussian of 3 x 3 pixels, 1/4 1/2 1/4 down and across (sigma .85; sigma .1 would do nothing)."""
    return _smooth(images, (1, 2, 1))


def median(images: Tensor) -> Tensor:
    """Replace each value by the median of 3 x 3 pixels; border pixels are repeated outside."""
    from scipy import ndimage

    done = ndimage.median_filter(images.cpu().numpy(), (1, 1, 3, 3), mode="nearest")
    return torch.from_numpy(done).to(images.device)


def bilateral(images: Tensor, diameter: int = 9, sigma_colour: float = 75, sigma_space: float = 75) -> Tensor:
    """Blur with the mean of the pixels in a circle, weighted by similarity: edges stay. As in REM's and SEM's code.

        weight = exp(-distance^2 / 2 sigma_space^2 - (|R - R'| + |G - G'| + |B - B'|)^2 / 2 sigma_colour^2)

    Distances in pixels, colours in levels; mirrored at the border. Source: Tomasi & Manduchi, ICCV 1998.
    """
    (height, width), radius = images.shape[2:], diameter // 2

    def blurred(part: Tensor) -> Tensor:
        x, padded = part.float(), F.pad(part.float(), [radius] * 4, mode="reflect")
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for down in range(-radius, radius + 1):
            reach = math.isqrt(radius**2 - down**2)
            for right in range(-reach, reach + 1):
                top, left = radius + down, radius + right
                there = padded[..., top : top + height, left : left + width]
                apart = (there - x).abs().sum(1, keepdim=True)
                squared = down**2 + right**2
                weight = (-squared / (2 * sigma_space**2) - apart**2 / (2 * sigma_colour**2)).exp()
                total, weights = total + weight * there, weights + weight
        return (total / weights).round().to(torch.uint8)

    return torch.cat([blurred(part) for part in images.split(BATCH)])


def linear_softmax(x: Tensor, labels: Tensor, steps: int = 100) -> Tensor:
    """Fit a bias-free linear softmax classifier by L-BFGS from 0: x [N,D], labels [N] in K classes -> weights [K,D].

    Their mean over the classes, which a softmax does not see, is subtracted: the rank is K - 1.
    """
    weights = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights.T, labels)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach() - weights.detach().mean(0)


def projection(images: Tensor, labels: Tensor, steps: int = 100) -> Callable[[Tensor], Tensor]:
    """Fit an orthogonal projection: it removes the subspace that a linear classifier of the images [N,3,H,W] uses.

        W = linear_softmax(pixels, labels),   x <- x - Q Q' (x - mean),   Q an orthonormal base of W's rows

    Removes linearly separable noise, and the linear part of the content too. The mean image stays, which is this kit's
    choice: without it the images only shift by a constant image, but many values are clipped at 0.
    Source: Sandoval-Segura et al., NeurIPS 2023.
    """
    x = to_float(images).flatten(1)
    _, sizes, rows = torch.linalg.svd(linear_softmax(x, labels, steps), full_matrices=False)
    base, middle = rows[sizes > 1e-5 * sizes[0]], x.mean(0)

    def change(images: Tensor) -> Tensor:
        x = to_float(images).flatten(1)
        projected = x - (x - middle) @ base.T @ base
        return (projected * 255).round().clamp(0, 255).to(torch.uint8).view_as(images)

    return change


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [n,n], float64: coefficients = D values, values = D' coefficients."""
    from scipy import fft

    return torch.from_numpy(fft.dct(np.eye(n), axis=0, norm="ortho"))


def denoiser(images: Tensor, labels: Tensor, sigma: int = 43) -> Callable[[Tensor], Tensor]:
    """Fit a linear denoiser: it adds Gaussian noise of sigma levels, then applies a Wiener filter.

        z = DCT(x + sigma n - mean),   x <- mean + IDCT(C (C + sigma^2 I)^-1 z)

    C: the covariance [3,3] of the images' colours at each frequency, which decides the filter. The labels are not
    used. AVATAR adds noise of 43 levels (step 100 of 1,000) and denoises with a diffusion model, which keeps more of
    the image: this stand-in needs no net. Source: Dolatabadi et al., AVATAR, 2023.
    """
    down, across = (dct_matrix(side).to(images.device, torch.float32) for side in images.shape[2:])
    middle = sum(part.sum(0, dtype=torch.float32) for part in images.split(BATCH)) / len(images)
    total = torch.zeros(*images.shape[2:], 3, 3, dtype=torch.float64, device=images.device)
    for part in images.split(BATCH):
        z = (down @ (part - middle) @ across.T).permute(2, 3, 1, 0)
        total += z @ z.mT
    covariance = total / len(images)
    noisy = covariance + sigma**2 * torch.eye(3, dtype=torch.float64, device=images.device)
    gain = (covariance @ torch.linalg.pinv(noisy, hermitian=True)).float()

    def change(images: Tensor) -> Tensor:
        generator, done = torch.Generator(images.device).manual_seed(0), torch.empty_like(images)
        for part, out in zip(images.split(BATCH), done.split(BATCH), strict=True):
            noise = torch.randn(part.shape, generator=generator, device=images.device)
            z = down @ (part + sigma * noise - middle) @ across.T
            left = torch.einsum("hwcd,ndhw->nchw", gain, z)
            out.copy_((down.T @ left @ across + middle).round().clamp(0, 255))
        return done

    return change
