"""How far protected images are from their originals: largest change, what a resize leaves of the noise, SSIM."""

import hostile
import numpy as np
import pytest
import torch
from PIL import Image

from semkit.images.picture import apply_noise, difference, noise_survival, ssim

RNG = np.random.default_rng(0)
RGB = Image.fromarray(hostile.pixels(RNG, 24, 16))
RGBA = Image.fromarray(hostile.pixels(RNG, 24, 16, 4))


def test_difference_says_what_does_not_match():
    shifted = Image.fromarray(np.asarray(RGBA) + np.uint8([0, 0, 0, 1]))
    for other, message in (
        (RGBA.crop((0, 0, 9, 9)), "the original has 24x16 pixels, the protected image 9x9"),
        (RGB, "the original has mode RGBA, the protected image RGB"),
        (shifted, "the alpha channels differ"),
    ):
        with pytest.raises(ValueError, match=message):
            difference(RGBA, other)
    assert difference(RGBA, RGBA) == 0
    one = np.asarray(RGB).copy()
    one[5, 6, 1] ^= 1
    assert difference(RGB, Image.fromarray(one)) == 1


def test_survival():
    noise = np.kron(RNG.choice([-8, 8], (3, 16, 16)), np.ones((2, 2))).astype(np.int8)
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    assert noise_survival(grey, apply_noise(grey, noise, 8), noise) == pytest.approx((1, 1))
    large = grey.resize((120, 90))
    correlation, share = noise_survival(large, apply_noise(large, noise, 8), noise)
    assert 0.97 < correlation < 1 and 0.7 < share < 1
    # Better than what a bilinear enlargement alone would leave.
    planes = [Image.fromarray(plane).resize((120, 90), Image.Resampling.BILINEAR) for plane in noise.astype(np.float32)]
    plain = np.stack([np.asarray(plane) for plane in planes])
    plain = Image.fromarray(np.moveaxis(128 + np.rint(plain), 0, -1).astype(np.uint8))
    assert noise_survival(large, plain, noise) < (correlation, share)
    assert noise_survival(grey, grey, noise) == (0, 0)
    assert noise_survival(grey, grey, 0 * noise) == (0, 0)


@pytest.mark.parametrize(("height", "width"), [(11, 11), (20, 14)])
def test_ssim_is_its_formula_written_as_a_loop(height, width):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (2, height, width)).astype(np.uint8)
    y = (x + rng.normal(0, 20, x.shape)).clip(0, 255).astype(np.uint8)
    bell = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(bell, bell) / np.outer(bell, bell).sum()
    wide = [np.pad(z.astype(float), ((0, 0), (5, 5), (5, 5)), "reflect") for z in (x, y)]
    values = []
    for channel, i, j in np.ndindex(x.shape):
        a, b = (z[channel, i : i + 11, j : j + 11] for z in wide)
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
        both = (window * (a - ma) * (b - mb)).sum()
        top = (2 * ma * mb + 2.55**2) * (2 * both + 7.65**2)
        values.append(top / ((ma**2 + mb**2 + 2.55**2) * (va + vb + 7.65**2)))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert ssim(x, y) == pytest.approx(np.mean(values), abs=1e-9) and ssim(y, x) == pytest.approx(ssim(x, y))
    assert ssim(x, x) == pytest.approx(1) and ssim(x, 255 - x) < ssim(x, y)
