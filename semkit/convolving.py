"""The convolutions of a folded net: small maps laid side by side, and what a processor's bfloat16 units do best.

Everything here gives the sums of torch's own convolution and of its gradient at the input, some added up and rounded
in another order.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
SUMMED = ONEDNN and ONEDNN._convolution_pointwise.binary  # a convolution and an addition in one

ONE = [1, 1]


def has_own() -> bool:
    """Whether oneDNN is there and computes in bfloat16 on this processor."""
    return ONEDNN is not None and ONEDNN._is_mkldnn_bf16_supported()


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list, padding: list, added: Tensor | None):
    """conv(x) + added, in bfloat16 rounded once: oneDNN adds while it has the sums at hand."""
    if added is None:
        return aten.convolution(x, weight, bias, stride, padding, ONE, False, [0, 0], 1)
    return SUMMED(x, added, weight, bias, padding, stride, ONE, 1, "add", 1.0, None, [], None)


def turned(weight: Tensor) -> Tensor:
    """[O,C,h,w] -> [C,O,h,w]: the weight of the convolution that is the gradient, at its input, of one of stride 1."""
    return weight.flip(2, 3).transpose(0, 1)


def quartered(weight: Tensor) -> Tensor:
    """[O,C,3,3] -> [4C,O,2,2]: of the convolution that gives the gradient, at its input, of one of stride 2, padding 1.

    Four pixels of the input, 2 x 2, for each of the output: a pixel in an even row has met the kernel's middle row, one
    in an odd row the last row there and the first of the next pixel below.
    """
    taps = F.pad(weight.permute(1, 2, 3, 0), (0, 0, 0, 1, 0, 1))  # [C, row, column, O], the last row and column zeros
    where = torch.tensor([1, 3, 2, 0], device=weight.device)  # of a pixel in an even row: here, below; in an odd row
    taps = taps.index_select(1, where).index_select(2, where).unflatten(2, (2, 2)).unflatten(1, (2, 2))
    return taps.permute(1, 3, 0, 2, 4, 5).flatten(0, 2).permute(0, 3, 1, 2)


def from_quarters(slope: Tensor, back: Tensor) -> Tensor:
    """The gradient at the input [N,C,2h,2w] of a convolution as `quartered` says, from that of its output [N,O,h,w]."""
    (n, _, h, w), c = slope.shape, len(back) // 4
    quarters = convolved(slope, back, None, ONE, ONE, None)[:, :, 1:, 1:].permute(0, 2, 3, 1)
    return quarters.unflatten(3, (2, 2 * c)).transpose(2, 3).reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def with_corners(kept: Tensor, slope: Tensor, weight: Tensor, stride: int) -> Tensor:
    """kept + the gradient, at its input, of a 1x1 convolution that looks at one pixel in stride x stride."""
    total = kept.clone()
    corners = total.permute(0, 2, 3, 1)[:, ::stride, ::stride]
    corners += (slope.permute(0, 2, 3, 1).reshape(-1, len(weight)) @ weight.flatten(1)).view(corners.shape)
    return total


class _Convolution(torch.autograd.Function):
    """convolved(...); and x again for whoever else looks at it, so that its two gradients are added here."""

    @staticmethod
    def forward(ctx, x, added, weight, bias, back, conv, keep):
        ctx.conv, ctx.added = conv, added is not None
        ctx.save_for_backward(x, weight, back)
        ctx.set_materialize_grads(False)
        y = convolved(x, weight, bias, [*conv.stride], [*conv.padding], added)
        return (y, x) if keep else y

    @staticmethod
    @once_differentiable
    def backward(ctx, slope, kept=None):
        if slope is None:
            return kept, *6 * [None]
        gradient = ctx.conv.gradient(*ctx.saved_tensors, slope, kept)
        return gradient, slope if ctx.added else None, *5 * [None]


class Convolution(nn.Conv2d):
    """A convolution with a bias that may have the sum of its result and another tensor to make, and its input to keep.

    Kernels of 3 with padding 1 lay small feature maps side by side in one wide one, columns of zeros between them:

        conv(x)[n] = conv(wide)[n // 16][..., its columns]

    Processors with matrix units take the pixels of a row together, and a row of 4 leaves most of the unit idle: 512
    channels of 4 x 4 take half the time so.

    For bfloat16 on a processor its own gradient at the input; `back` is the weight of the convolution that makes it.
    """

    MOST, WIDTH, CHANNELS = 16, 4, 256  # of maps side by side: how many, how narrow, with how many channels at least
    QUARTERED = 48  # channels of the input up to which a gradient of stride 2 is faster in quarters

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype | None = None, native: bool = False):
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, bias=True, padding_mode=conv.padding_mode, device=conv.weight.device,
            dtype=dtype or conv.weight.dtype,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty_like(conv.weight, dtype=dtype), requires_grad=False)  # in its layout
        self.requires_grad_(False)
        plain = self.dilation == (1, 1) and self.groups == 1 and self.padding_mode == "zeros"
        plain = plain and not isinstance(self.padding, str) and self.stride[0] == self.stride[1]
        self.plain = plain and all(pad < size for pad, size in zip(self.padding, self.kernel_size, strict=True))
        self.native = self.plain and native and self.weight.dtype == torch.bfloat16
        back = self._back(self.weight)
        laid = None if back is None else back.contiguous(memory_format=torch.channels_last)
        self.register_buffer("back", laid, persistent=False)

    def write(self, weight: Tensor, bias: Tensor) -> None:
        """Takes these values, in the memory it has: compiled code, lists of operations and CUDA graphs read that."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        if self.back is not None:
            self.back.copy_(self._back(self.weight))

    def _back(self, weight: Tensor) -> Tensor | None:
        make = turned if self.stride == (1, 1) else None
        if (self.stride, self.kernel_size, self.padding) == ((2, 2), (3, 3), (1, 1)):
            make = quartered if self.in_channels <= self.QUARTERED else None
        if not (self.native and make):
            return None
        return make(weight.detach())

    def gradient(self, x: Tensor, weight: Tensor, back: Tensor | None, slope: Tensor, kept: Tensor | None) -> Tensor:
        """The gradient at x [N,C,H,W] from that at the result, plus `kept`, if any."""
        (stride, _), height, width = self.stride, *x.shape[2:]
        if stride == 1:
            padding = [size - 1 - pad for size, pad in zip(self.kernel_size, self.padding, strict=True)]
            return convolved(slope, back, None, ONE, padding, kept)
        if kept is not None and self.kernel_size == (1, 1) and self.padding == (0, 0):
            return with_corners(kept, slope, weight, stride)
        if back is not None and height % 2 == width % 2 == 0:
            gradient = from_quarters(slope, back)
        else:
            how = (None, [*self.stride], [*self.padding], ONE, False, [0, 0], 1, [True, False, False])
            gradient = aten.convolution_backward(slope, x, weight, *how)[0]
        return gradient if kept is None else gradient + kept

    def forward(self, x: Tensor, added: Tensor | None = None, keep: bool = False):
        """conv(x) + added [N,O,h,w]; with `keep` also an x for whoever else looks at it."""
        x = x.to(self.weight.dtype, memory_format=torch.channels_last) if self.native else x
        beside = self._beside(x)
        if self.native and not beside and (added is None or self._fits(x, added)):
            return self._own(x, added, keep)
        y = self._side_by_side(x) if beside else self._own(x) if self.native else super().forward(x)
        y = y if added is None else y + added
        return (y, x) if keep else y

    def _own(self, x: Tensor, added: Tensor | None = None, keep: bool = False):
        return _Convolution.apply(x, added, self.weight, self.bias, self.back, self, keep)

    def _fits(self, x: Tensor, added: Tensor) -> bool:
        """Whether `added` is in bfloat16 and has the shape of conv(x)."""
        sides = zip(x.shape[2:], self.padding, self.kernel_size, strict=True)
        shape = [(side + 2 * pad - size) // self.stride[0] + 1 for side, pad, size in sides]
        return added.dtype == self.weight.dtype and added.shape == (len(x), self.out_channels, *shape)

    def _beside(self, x: Tensor) -> bool:
        stride, (h, w) = self.stride[0], x.shape[2:]
        fits = self.plain and (self.kernel_size, self.padding) == ((3, 3), (1, 1)) and h % stride == w % stride == 0
        return fits and w <= self.WIDTH * stride and self.in_channels >= self.CHANNELS and not x.is_cuda

    def _side_by_side(self, x: Tensor) -> Tensor:
        (n, c, h, w), stride = x.shape, self.stride[0]
        many = math.gcd(n, self.MOST)
        maps = x.permute(0, 2, 3, 1).reshape(n // many, many, h, w, c).transpose(1, 2)
        # As many columns of zeros as the stride, so that every map begins where the kernel stops.
        wide = F.pad(maps, (0, 0, 0, stride)).view(n // many, h, many * (w + stride), c).permute(0, 3, 1, 2)
        y = self._own(wide) if self.native else super().forward(wide)
        y = y.permute(0, 2, 3, 1).view(n // many, h // stride, many, w // stride + 1, -1)[:, :, :, : w // stride]
        return y.transpose(1, 2).reshape(n, h // stride, w // stride, -1).permute(0, 3, 1, 2)
