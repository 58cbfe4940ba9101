"""The eval-mode net that most passes run: batch-norm folded into the convolution before it, compiled if asked."""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


class SideBySide(nn.Conv2d):
    """A convolution that lays small feature maps side by side in one wide one, columns of zeros between them.

        conv(x)[n] = conv(wide)[n // 16][..., its columns]

    The same sums. Processors with matrix units take the pixels of a row together, and a row of 4 leaves most of the
    unit idle: 512 channels of 4 x 4 take half the time so. For kernel 3 and padding 1; others as ever.
    """

    MOST, WIDTH, CHANNELS = 16, 4, 256

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        stride, many = self.stride[0], math.gcd(n, self.MOST)
        shape = (self.stride, self.kernel_size, self.padding, self.dilation, self.groups, self.padding_mode)
        fits = shape == ((stride, stride), (3, 3), (1, 1), (1, 1), 1, "zeros") and h % stride == w % stride == 0
        if not fits or w > self.WIDTH * stride or c < self.CHANNELS or x.is_cuda:
            return super().forward(x)
        maps = x.permute(0, 2, 3, 1).reshape(n // many, many, h, w, c).transpose(1, 2)
        # As many columns of zeros as the stride, so that every map begins where the kernel stops.
        wide = F.pad(maps, (0, 0, 0, stride)).view(n // many, h, many * (w + stride), c)
        y = super().forward(wide.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y.view(n // many, h // stride, many, w // stride + 1, -1)[:, :, :, : w // stride].transpose(1, 2)
        return y.reshape(n, h // stride, w // stride, -1).permute(0, 3, 1, 2)


class Folded:
    """model(x) in eval mode with every conv -> batch-norm pair as one convolution; follows the model's weights.

        weight * gamma / sqrt(variance + eps);  beta + (bias - mean) * gamma / sqrt(variance + eps)

    It follows what torch counts in a tensor's _version: optimizers, load_state_dict, in-place operations, passes in
    train mode. Not counted are writes through .data, fused optimizers in eval mode, and a tensor put in another's
    place: Engine.prepare the model anew after those. `why_not` says why a model could not be traced; it then runs as
    it is. compiled: through torch.compile, which takes seconds at the first call and at every new shape, and then is
    faster; where it fails it warns, once, and the traced graph runs as it is. dtype: what the folded weights are kept
    in, so that autocast has nothing to round at every call.
    """

    def __init__(self, model: nn.Module, compiled: bool = False, dtype: torch.dtype | None = None):
        self.model, self.dtype, self.pairs, self.why_not = model, dtype, [], None
        self.sources = [*model.parameters(), *model.buffers()]
        self.version = None
        try:
            self.graph = fx.symbolic_trace(model)
        except Exception as error:  # whatever a model's own forward raises when it meets a symbol
            self.why_not = " ".join(str(error).split())[:200]
            return
        self._fold()
        self.run = torch.compile(self.graph) if compiled else self.graph

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has the net, and has not failed."""
        return self.why_not is None and self.run is not self.graph

    def _fold(self) -> None:
        modules = dict(self.graph.named_modules())
        for node in list(self.graph.graph.nodes):
            relu = node.op == "call_module" and type(modules[node.target]) is nn.ReLU
            if relu and len(node.args[0].users) == 1:
                # Not in place as the module may be: autograd keeps books of what is written over, and is slow at it.
                node.op, node.target = "call_function", F.relu
            norm = modules.get(node.target) if node.op == "call_module" else None
            before = node.args[0] if node.args else None
            conv = modules.get(before.target) if getattr(before, "op", None) == "call_module" else None
            if not (isinstance(norm, nn.BatchNorm2d) and type(conv) is nn.Conv2d and len(before.users) == 1):
                continue
            fused = SideBySide(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                conv.groups, bias=True, padding_mode=conv.padding_mode, device=conv.weight.device,
                dtype=self.dtype or conv.weight.dtype,
            ).requires_grad_(False)  # fmt: skip
            self.pairs.append((conv, norm, fused))
            # The traced graph has its own containers: the model keeps its convolution.
            self.graph.set_submodule(before.target, fused)
            node.replace_all_uses_with(before)
            self.graph.graph.erase_node(node)
        self.graph.recompile()

    @torch.no_grad()
    def refresh(self) -> None:
        """New folded weights if any weight or running statistic was written to since the last time."""
        version = sum(t._version for t in self.sources)
        if version == self.version:
            return
        for conv, norm, fused in self.pairs:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            # The parameters stay: compiled code holds them.
            fused.weight.data, fused.bias.data = weight.to(fused.weight.dtype), bias.to(fused.bias.dtype)
        self.version = version

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.why_not is not None:
            return self.model(x)
        self.refresh()
        if not self.compiled:
            return self.graph(x)
        try:
            return self.run(x)
        except torch._dynamo.exc.TorchDynamoException as error:  # the compiler's own, a missing C++ one among them
            warnings.warn(f"torch.compile failed, the net runs uncompiled: {_first_line(error)}", stacklevel=2)
            self.run = self.graph
            return self.graph(x)
