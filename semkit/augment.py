"""Batched, differentiable random augmentation: every image draws its own flip and crop."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from semkit.pixels import check_count


@dataclass(frozen=True)
class Identity:
    """No augmentation: x comes back as it is."""

    def output_size(self, size: int) -> int:
        return size

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        return ()

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        return x


@dataclass(frozen=True)
class FlipCrop:
    """Random horizontal flip, then zero-padding by `pad` and a random crop back to the image's size.

        apply(x, (flip, top, left))[n, c, i, j] = pad(flip(x))[n, c, i + top[n], j + left[n]]

    x [N,C,H,W] of any dtype; one gather for the whole batch, so gradients flow through it.
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self):
        object.__setattr__(self, "pad", check_count(self.pad, "pad"))

    def output_size(self, size: int) -> int:
        return size

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        device = generator.device
        flip = (torch.rand(n, generator=generator, device=device) < 0.5) & self.flip
        top, left = (torch.randint(0, 2 * self.pad + 1, (n,), generator=generator, device=device) for _ in range(2))
        return flip, top, left

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        flip, top, left = drawn
        n, c, h, w = x.shape
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *[self.pad] * 4))
        rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        i = top[:, None] + rows
        j = left[:, None] + columns
        # Flipping the image before padding symmetrically is reading the padded one from the right.
        j = torch.where(flip[:, None], w + 2 * self.pad - 1 - j, j)
        high, wide = h + 2 * self.pad, w + 2 * self.pad
        index = (torch.arange(n, device=x.device)[:, None, None] * high + i[:, :, None]) * wide + j[:, None, :]
        # Rows of C channels: one gather, and the result lies in channels_last memory.
        return padded.reshape(-1, c).index_select(0, index.flatten()).view(n, h, w, c).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ResizedCrop:
    """Random horizontal flip and a random part of the image, resized to `size` (RandomResizedCrop, bilinear).

    The part's area is `scale` of the image, its aspect ratio log-uniform in `ratio`; both are cut to fit.
    x [N,C,H,W] floats -> [N,C,size,size].
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def output_size(self, size: int) -> int:
        return self.size

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        u = torch.rand(5, n, generator=generator, device=generator.device)
        area = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
        low, high = (torch.tensor(r, device=u.device).log() for r in self.ratio)
        aspect = (low + u[1] * (high - low)).exp() * size[0] / size[1]
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        # Centre of the part in [-1, 1], the frame that affine_grid uses.
        across, down = (1 - width) * (2 * u[2] - 1), (1 - height) * (2 * u[3] - 1)
        return torch.where(u[4] < 0.5, -width, width), height, across, down

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        width, height, across, down = (d.to(x.dtype) for d in drawn)
        zero = torch.zeros_like(width)
        theta = torch.stack([torch.stack([width, zero, across], 1), torch.stack([zero, height, down], 1)], 1)
        grid = F.affine_grid(theta, [len(x), x.shape[1], self.size, self.size], align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Cutout:
    """The augmentation `first`, then a grey square around a random pixel of every image, cut at the border.

    side: of the square, in pixels. Grey is 1/2, which the nets see as 0. Source: DeVries & Taylor, 2017.
    """

    side: int = 16
    first: Identity | FlipCrop | ResizedCrop = FlipCrop()

    def __post_init__(self):
        object.__setattr__(self, "side", check_count(self.side, "side", 1))

    def output_size(self, size: int) -> int:
        return self.first.output_size(size)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        drawn = self.first.draw(n, size, generator)
        seen = [self.output_size(side) for side in size]
        corners = (torch.randint(0, side, (n,), generator=generator, device=generator.device) for side in seen)
        return drawn, *(corner - self.side // 2 for corner in corners)

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        before, top, left = drawn
        x = self.first.apply(x, before)

        def within(start: torch.Tensor, side: int) -> torch.Tensor:
            place = torch.arange(side, device=x.device) - start[:, None]
            return (place >= 0) & (place < self.side)

        rows, columns = (within(start, side) for start, side in zip((top, left), x.shape[2:], strict=True))
        return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)


Augment = Identity | FlipCrop | ResizedCrop | Cutout
