"""Countermeasures at every load: augmentations around another one, `first`, the learner's crop and flip."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from semkit.countermeasures.pixelwise import dct_matrix
from semkit.images.augment import Around, Augment, FlipCrop, luma
from semkit.images.pixels import check_count, check_share, seeded, settle, through_levels
from semkit.protections.cuda import blur

PLUS = ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0))  # the four neighbours of a pixel


@dataclass(frozen=True)
class Cutout(Around):
    """The augmentation `first`, then a grey square around a random pixel of each image, clipped at the border.

    side: of the square, in pixels. Grey is 1/2, which the nets centre to 0. Source: DeVries & Taylor, 2017.
    """

    side: int = 16
    first: Augment = FlipCrop()

    def __post_init__(self):
        settle(self, side=partial(check_count, least=1))

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> tuple:
        """(top, left) of the squares, [N] each."""
        corners = (torch.randint(0, side, (n,), generator=generator, device=generator.device) for side in size)
        return tuple(corner - self.side // 2 for corner in corners)

    def after(self, x: Tensor, own: tuple) -> Tensor:
        def within(start: Tensor, side: int) -> Tensor:
            place = torch.arange(side, device=x.device) - start[:, None]
            return (place >= 0) & (place < self.side)

        rows, columns = (within(start, side) for start, side in zip(own, x.shape[2:], strict=True))
        return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hues of x [N,3,H,W], those of image n by turns[n] [N] of the colour circle.

    Each pixel keeps its greatest and least value:

        hue, in sixths of the circle = (G - B) / c where R is the greatest, 2 + (B - R) / c, 4 + (R - G) / c
        channel = greatest - c min(k, 4 - k) within [0, 1],  k = (5, 3, 1) + hue mod 6,  c = greatest - least
    """
    (r, g, b), high, low = x.unbind(1), x.amax(1), x.amin(1)
    c = high - low
    wide = torch.where(c > 0, c, 1)
    hue = torch.where(high == r, (g - b) / wide, torch.where(high == g, 2 + (b - r) / wide, 4 + (r - g) / wide))
    hue = hue + 6 * turns[:, None, None]
    k = torch.stack([(start + hue) % 6 for start in (5, 3, 1)], 1)
    return high[:, None] - c[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


@dataclass(frozen=True)
class ColorJitter(Around):
    """The augmentation `first`, then random brightness, contrast, saturation and hue for each image.

        x <- b x;  x <- c x + (1 - c) mean luma(x);  x <- s x + (1 - s) luma(x);  x <- turned(x, h), each within [0, 1]

    b ~ U(1 - brightness, 1 + brightness), c and s likewise, h ~ U(-hue, hue) in turns of the colour circle. The order
    is fixed; torchvision's ColorJitter draws the order and the factors, once for a whole batch. Raises ValueError for a
    share outside 0 to 1 and a hue outside 0 to 1/2.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    first: Augment = FlipCrop()

    def __post_init__(self):
        settle(self, **dict.fromkeys(("brightness", "contrast", "saturation"), check_share))
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is 0 to 0.5, in turns of the colour circle, got {self.hue!r}")

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> Tensor:
        """b, c, s and h of each image, [4,N]."""
        spans = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue], device=generator.device)
        u = 2 * torch.rand(4, n, generator=generator, device=generator.device) - 1
        return u * spans[:, None] + torch.tensor([1, 1, 1, 0], device=u.device)[:, None]

    def after(self, x: Tensor, own: Tensor) -> Tensor:
        brightness, contrast, saturation, turns = own.to(x.dtype)

        def blended(other: Tensor, share: Tensor) -> Tensor:
            return torch.lerp(other, x, share[:, None, None, None]).clamp(0, 1)

        x = blended(torch.zeros_like(x), brightness)
        x = blended(luma(x).mean((2, 3), keepdim=True).expand_as(x), contrast)
        x = blended(luma(x).expand_as(x), saturation)
        return turned(x, turns)


@dataclass(frozen=True)
class TrivialAugment(Around):
    """A random operation of random strength for each image, by torchvision in 8-bit levels on the CPU.

    Source: Müller & Hutter, ICCV 2021 (the wide space).
    """

    first: Augment = FlipCrop()

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> Tensor:
        """A seed for each image."""
        return torch.randint(2**62, (n,), generator=generator, device=generator.device)

    def after(self, x: Tensor, own: Tensor) -> Tensor:
        from torchvision.transforms import v2  # takes two seconds to import

        trivial = v2.TrivialAugmentWide()

        def change(levels: Tensor) -> Tensor:
            for image, seed in zip(levels, own.tolist(), strict=True):
                with seeded(seed):
                    image.copy_(trivial(image))
            return levels

        return through_levels(x, change)


def plasma(u: Tensor, roughness: Tensor) -> Tensor:
    """Plasma fractals [N,C,S,S] in 0 to 1 by the diamond-square algorithm, of random numbers u in 0 to 1; S = 2^k + 1.

    The corners are u. Every level halves the grid: a new point is (1 - s) mean of its four neighbours + s u, with s the
    roughness [N] to the power of the level. At the border three neighbours count.
    """
    stride, scale = u.shape[-1] - 1, 1.0
    roughness, plus = roughness.view(-1, 1, 1, 1), u.new_tensor(PLUS)[None, None]
    grid = u[..., ::stride, ::stride]
    while stride > 1:
        stride, scale = stride // 2, scale * roughness
        fresh = u[..., ::stride, ::stride]
        wide, side = torch.zeros_like(fresh), torch.arange(fresh.shape[-1], device=u.device)
        wide[..., ::2, ::2] = grid
        wide[..., 1::2, 1::2] = torch.lerp(F.avg_pool2d(grid, 2, 1), fresh[..., 1::2, 1::2], scale)
        sums = F.conv2d(wide.flatten(0, 1)[:, None], plus, padding=1).view_as(wide)
        counts = F.conv2d(torch.ones_like(wide[:1, :1]), plus, padding=1)
        between = (side[:, None] + side) % 2 == 1
        grid = torch.where(between, torch.lerp(sums / counts, fresh, scale), wide)
    return grid


@dataclass(frozen=True)
class Plasma(Around):
    """UEraser's colour changes: plasma brightness, plasma contrast and a shuffle of the channels, each with chance 1/2.

        x <- box(x + i (2 F - 1)),  i ~ U(.5, 1);   x <- box(1/2 + 4 F' (x - 1/2));   x <- x[:, permuted]

    F, F': plasma fractals of roughness ~ U(.3, .7), one for each channel. Source: Qin et al., UEraser, 2023.
    """

    first: Augment = FlipCrop()

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> tuple:
        """(two random grids, roughness and intensity, which of the three changes are made, an order of channels)."""
        how, side = dict(generator=generator, device=generator.device), 2 ** (max(2, *size) - 2).bit_length() + 1
        grids, numbers = torch.rand(n, 2, 3, side, side, **how), torch.rand(n, 3, **how)
        return grids, numbers, torch.rand(n, 3, **how) < 0.5, torch.rand(n, 3, **how).argsort(1)

    def after(self, x: Tensor, own: tuple) -> Tensor:
        grids, numbers, made, order = own
        height, width = x.shape[2:]
        bright, contrast = (
            plasma(grids[:, i].to(x), 0.3 + 0.4 * numbers[:, i].to(x))[..., :height, :width] for i in range(2)
        )
        intensity = (0.5 + 0.5 * numbers[:, 2]).to(x)[:, None, None, None]
        first, second, third = (made[:, i, None, None, None] for i in range(3))
        x = torch.where(first, (x + intensity * (2 * bright - 1)).clamp(0, 1), x)
        x = torch.where(second, (0.5 + 4 * contrast * (x - 0.5)).clamp(0, 1), x)
        return torch.where(third, x.gather(1, order[:, :, None, None].expand_as(x)), x)


@dataclass(frozen=True)
class Coin(Around):
    """COIN: move each pixel by a random offset of up to `reach` pixels, the same for all channels.

        x[i, j] <- x at (i + u, j + v), bilinear, wrapped at the border;   u, v ~ U(-reach, reach) for every pixel

    reach 2 is the published severity 4. Source: Li et al., AAAI 2025.
    """

    first: Augment = FlipCrop()
    reach: float = 2.0

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> Tensor:
        """The offsets down and to the right, [N,2,H,W]."""
        return self.reach * (2 * torch.rand(n, 2, *size, generator=generator, device=generator.device) - 1)

    def after(self, x: Tensor, own: Tensor) -> Tensor:
        (height, width), flat = x.shape[2:], x.flatten(2)
        places = (torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device))
        i, j = (offset.to(x.dtype) + place for offset, place in zip(own.unbind(1), places, strict=True))
        top, left = i.floor(), j.floor()

        def at(rows: Tensor, columns: Tensor) -> Tensor:
            index = (rows.long() % height * width + columns.long() % width).flatten(1)[:, None]
            return flat.gather(2, index.expand_as(flat)).view_as(x)

        down, right = (i - top)[:, None], (j - left)[:, None]
        above, below = (torch.lerp(at(rows, left), at(rows, left + 1), right) for rows in (top, top + 1))
        return torch.lerp(above, below, down)


@dataclass(frozen=True)
class Sharpened(Around):
    """RSK with a low-pass: sharpen each image by a random kernel and keep its lowest frequencies, then crop and flip.

        kernel: centre c ~ N(centre, spread), its four neighbours -N((c - 1) / 4, spread), the corners 0
        x <- box(kernel * x);   x <- box(the lowest `kept` of the rows and of the columns of DCT(x));   x <- first(x)

    The image is mirrored at its border, so that its size stays: the released code loses a pixel on every side.
    Source: Kim & Sandoval-Segura, Learning from Convolution-based Unlearnable Datasets, 2024.
    """

    first: Augment = FlipCrop()
    centre: float = 2.5
    spread: float = 0.1
    kept: float = 0.3

    def __post_init__(self):
        settle(self, kept=check_share)

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> Tensor:
        """Five normal numbers an image."""
        return torch.randn(n, 5, generator=generator, device=generator.device)

    def kernels(self, normal: Tensor) -> Tensor:
        """The kernels [N,3,3] of normal numbers [N,5]."""
        kernels = normal.new_zeros(len(normal), 3, 3)
        centre = self.centre + self.spread * normal[:, 0]
        around = ((centre - 1) / 4)[:, None] + self.spread * normal[:, 1:]
        kernels[:, 1, 1], kernels[:, (0, 1, 1, 2), (1, 0, 2, 1)] = centre, -around
        return kernels

    def before(self, x: Tensor, own: Tensor) -> Tensor:
        sharp = blur(F.pad(x, [1] * 4, mode="reflect"), self.kernels(own))[..., 1:-1, 1:-1].clamp(0, 1)
        down, across = (dct_matrix(side).to(x)[: int(self.kept * side)] for side in x.shape[2:])
        return (down.T @ (down @ sharp @ across.T) @ across).clamp(0, 1)
