"""Countermeasures at every load: augmentations around another one, `first`, the learner's crop and flip."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from semkit.countermeasures.pixelwise import dct_matrix
from semkit.images.augment import Augment, FlipCrop
from semkit.images.pixels import check_share, seeded, to_float
from semkit.protections.cuda import blur

PLUS = ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0))  # the four neighbours of a pixel


@dataclass(frozen=True)
class Around:
    """Base of augmentations that change the images before or after another augmentation, `first`.

    apply(x, (drawn, own)) = after(first.apply(before(x, own), drawn), own)
    """

    first: Augment = FlipCrop()

    def output_size(self, size: int) -> int:
        return self.first.output_size(size)

    def draw(self, n: int, size: tuple[int, int], generator: Generator) -> tuple:
        """(first's draws, own draws)."""
        drawn = self.first.draw(n, size, generator)
        return drawn, self.own(n, tuple(map(self.output_size, size)), generator)

    def apply(self, x: Tensor, drawn: tuple) -> Tensor:
        return self.after(self.first.apply(self.before(x, drawn[1]), drawn[0]), drawn[1])

    def own(self, n: int, size: tuple[int, int], generator: Generator):
        """The random numbers for n images that `first` makes of this size, an entry an image."""
        raise NotImplementedError

    def before(self, x: Tensor, own) -> Tensor:
        """x [N,C,H,W] in [0,1] as `first` gets it."""
        return x

    def after(self, x: Tensor, own) -> Tensor:
        """The result, of what `first` made of it."""
        return x


@dataclass(frozen=True)
class TrivialAugment(Around):
    """A random operation of random strength for each image, by torchvision in 8-bit levels on the CPU.

    Source: Müller & Hutter, ICCV 2021 (the wide space).
    """

    def own(self, n: int, size: tuple[int, int], generator: Generator) -> Tensor:
        """A seed for each image."""
        return torch.randint(2**62, (n,), generator=generator, device=generator.device)

    def after(self, x: Tensor, own: Tensor) -> Tensor:
        from torchvision.transforms import v2  # takes two seconds to import

        trivial, levels = v2.TrivialAugmentWide(), (255 * x).round().clamp(0, 255).to("cpu", torch.uint8)
        for i, seed in enumerate(own.tolist()):
            with seeded(seed):
                levels[i] = trivial(levels[i])
        return torch.empty_like(x).copy_(to_float(levels))


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

    centre: float = 2.5
    spread: float = 0.1
    kept: float = 0.3

    def __post_init__(self):
        object.__setattr__(self, "kept", check_share(self.kept, "kept"))

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
