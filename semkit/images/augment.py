"""Batched, differentiable random augmentation t ~ T, drawn for each image independently.

    drawn = augment.draw(n, size, generator)     random numbers for n images of size (height, width)
    x = augment.apply(x, drawn)                  t(x), x [n,3,height,width]

Drawing and applying are separate, so that a view can be applied again. Images of side s come out with side
augment.output_size(s).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from semkit.images.picture import through_jpeg
from semkit.images.pixels import box, check_count, settle, through_levels


class Augment:
    """Base of all augmentations; this one does nothing."""

    def output_size(self, size: int) -> int:
        """The side of the result, for images of side `size`."""
        return size

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        """The random numbers that `apply` needs for n images of this size (height, width), an entry an image."""
        return ()

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        """t(x), from x [N,C,H,W] and its draws."""
        return x


@dataclass(frozen=True)
class Identity(Augment):
    """No augmentation: t(x) = x."""


@dataclass(frozen=True)
class FlipCrop(Augment):
    """Random horizontal flip, then zero-padding by `pad` and a random crop back to the image's size.

        apply(x, (flip, top, left))[n, c, i, j] = pad(flip(x))[n, c, i + top[n], j + left[n]]

    x [N,C,H,W] of any dtype; one gather for the whole batch.

    >>> augment, x = FlipCrop(pad=2), torch.rand(5, 3, 8, 8)
    >>> augment.apply(x, augment.draw(5, (8, 8), torch.Generator())).shape
    torch.Size([5, 3, 8, 8])
    """

    pad: int = 4
    flip: bool = True

    def __post_init__(self):
        settle(self, pad=check_count)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        device = generator.device
        flip = (torch.rand(n, generator=generator, device=device) < 0.5) & self.flip
        top, left = (torch.randint(0, 2 * self.pad + 1, (n,), generator=generator, device=device) for _ in range(2))
        return flip, top, left

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        return _FlipCrop.apply(x, *drawn, self.pad)


class _FlipCrop(torch.autograd.Function):
    """FlipCrop.apply; its gradient is a flip and crop of the padded incoming gradient, which needs no scatter."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, flip: torch.Tensor, top: torch.Tensor, left: torch.Tensor, pad: int):
        ctx.save_for_backward(flip, 2 * pad - top, torch.where(flip, left, 2 * pad - left))
        ctx.pad = pad
        return _flipped_and_cropped(x, flip, top, left, pad)

    @staticmethod
    def backward(ctx, slope: torch.Tensor):
        return _flipped_and_cropped(slope, *ctx.saved_tensors, ctx.pad), None, None, None, None


def _flipped_and_cropped(x, flip, top, left, pad: int) -> torch.Tensor:
    n, c, h, w = x.shape
    # Rows of C channels, and one row of zeros for all pixels outside: one gather, whose result is channels_last.
    table, outside = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, c), x.new_zeros(1, c)]), n * h * w
    i = top[:, None] + torch.arange(-pad, h - pad, device=x.device)
    j = left[:, None] + torch.arange(-pad, w - pad, device=x.device)
    first = torch.arange(n, device=x.device)[:, None] * h
    i = torch.where((i >= 0) & (i < h), (first + i) * w, outside)
    j = torch.where((j >= 0) & (j < w), torch.where(flip[:, None], w - 1 - j, j), outside)
    short = torch.int32 if outside < 2**30 else torch.int64  # half the memory
    index = (i.to(short)[:, :, None] + j.to(short)[:, None, :]).clamp_(max=outside)
    return table.index_select(0, index.flatten()).view(n, h, w, c).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ResizedCrop(Augment):
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
        low, high = map(math.log, self.ratio)
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


class Around(Augment):
    """Base of augmentations that change the images before or after another augmentation, `first`.

    apply(x, (drawn, own)) = after(first.apply(before(x, own), drawn), own)
    """

    first: Augment

    def output_size(self, size: int) -> int:
        return self.first.output_size(size)

    def draw(self, n: int, size: tuple[int, int], generator: torch.Generator) -> tuple:
        """(first's draws, own draws)."""
        drawn = self.first.draw(n, size, generator)
        return drawn, self.own(n, tuple(map(self.output_size, size)), generator)

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        return self.after(self.first.apply(self.before(x, drawn[1]), drawn[0]), drawn[1])

    def own(self, n: int, size: tuple[int, int], generator: torch.Generator):
        """The random numbers for n images that `first` makes of this size, an entry an image."""
        raise NotImplementedError

    def before(self, x: torch.Tensor, own) -> torch.Tensor:
        """The input of `first`, from x [N,C,H,W] in [0,1]."""
        return x

    def after(self, x: torch.Tensor, own) -> torch.Tensor:
        """The result, from the output x of `first`."""
        return x


def luma(x: torch.Tensor) -> torch.Tensor:
    """Luma of x [N,3,H,W]: .299 R + .587 G + .114 B, [N,1,H,W]."""
    return (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)[:, None, None]).sum(1, keepdim=True)


@dataclass(frozen=True)
class Grey(Augment):
    """Grey-scale: all three channels become the luma, .299 R + .587 G + .114 B."""

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        return luma(x).expand_as(x)


@dataclass(frozen=True)
class GaussianBlur(Augment):
    """Blur with the Gaussian of 3 x 3 pixels, 1/4 1/2 1/4 down and across; mirrored at the border."""

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
        return (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4


def each_picture(images: torch.Tensor, change: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    """Apply `change` to each of the uint8 images [N,3,H,W], as an array [H,W,3]."""
    done = torch.empty_like(images)
    for i, image in enumerate(images):
        levels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        done[i] = torch.from_numpy(change(levels)).permute(2, 0, 1)
    return done


@dataclass(frozen=True)
class JPEG(Augment):
    """JPEG of this quality, 1 to 95, each image through Pillow's codec; straight-through.

    Forward it is what Pillow decodes, backward the identity, because the codec has a zero gradient almost everywhere.
    x [N,3,H,W] in [0,1], rounded to 8 bits first.
    """

    quality: int = 10

    def __post_init__(self):
        settle(self, quality=partial(check_count, least=1, most=95))

    def apply(self, x: torch.Tensor, drawn: tuple) -> torch.Tensor:
        codec = partial(through_jpeg, quality=self.quality)
        decoded = through_levels(x, lambda levels: each_picture(levels, codec))
        return decoded + (x - x.detach())  # the value of `decoded`, the gradient of x


@dataclass(frozen=True)
class OneOf(Around):
    """The augmentation `first`, then for each image one of `ways`, all equally likely.

    With it the noise is crafted, and the surrogate trained, on images after a countermeasure. Images are clipped to
    [0,1] after `first`, because a trainer stores them so.

    >>> augment, x = OneOf((Identity(), Grey())), torch.rand(5, 3, 8, 8)
    >>> augment.apply(x, augment.draw(5, (8, 8), torch.Generator())).shape
    torch.Size([5, 3, 8, 8])
    """

    ways: tuple[Augment, ...]
    first: Augment = FlipCrop()

    def own(self, n: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        """Which way [N] each image goes."""
        return torch.randint(len(self.ways), (n,), generator=generator, device=generator.device)

    def after(self, x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        x = box(x)
        changed = x.clone()
        for k, way in enumerate(self.ways):
            changed[own == k] = way.apply(x[own == k], ())
        return changed


def as_one(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate batches; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
