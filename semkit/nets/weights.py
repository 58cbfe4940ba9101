"""Changes to the weights of a net: batch-norm folding, injected noise, an L1 penalty, pruning masks."""

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import get_total_norm, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_weights

from semkit.images.files import one_line
from semkit.images.pixels import check_share

START = 0.25  # alpha before training
TRACING = threading.Lock()  # one tracer at a time, because tracing patches methods of nn.Module


class _Tracer(fx.Tracer):
    """Trace only the calls of this thread, because fx shows a tracer the calls of all modules in the process."""

    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class Folded:
    """model(x) in eval mode, with every conv -> batch-norm pair run as one convolution.

        weight <- weight * gamma / sqrt(variance + eps)
        bias   <- beta + (bias - mean) * gamma / sqrt(variance + eps)

    x [N,C,H,W] -> logits [N,classes]. The folded weights are computed anew when a weight or a running statistic of the
    model has changed. They are updated in place, so call backward before the weights change.
    dtype: of the folded weights; with bfloat16, autocast has nothing to convert at each call.
    why_not: why the model cannot be traced, else None; it then runs as it is.
    compiled: run through torch.compile, which takes seconds at the first call and for every new shape. If compiling
    fails, a warning says so once, not_compiled holds the reason, and the net runs uncompiled.

        folded = Folded(model.eval())
        logits = folded(x)
    """

    def __init__(self, model: nn.Module, compiled: bool = False, dtype: torch.dtype | None = None):
        self.model, self.dtype, self.why_not, self.not_compiled = model, dtype, None, None
        self.pairs, self.state, self.run = [], None, None
        self.sources = [*model.parameters(), *model.buffers()]
        try:
            with TRACING:
                traced = _Tracer().trace(model)
            self.graph = fx.GraphModule(model, traced, type(model).__name__)
        except Exception as error:  # the model's forward may raise anything when it gets a symbol
            self.why_not, self.compiled = one_line(error), False
            if compiled:
                self._run_uncompiled("the net cannot be traced")
            return
        self._fold()
        self.graph.recompile()
        self.compiled = compiled

    def _run_uncompiled(self, why: str) -> None:
        self.compiled, self.not_compiled = False, why
        warnings.warn(f"torch.compile failed, the net runs uncompiled: {why}", stacklevel=1)

    def _fold(self) -> None:
        graph = self.graph.graph
        calls = [node.target for node in graph.nodes]
        for node in list(graph.nodes):
            module = self._module(node)
            if type(module) is nn.ReLU and len(node.args[0].users) == 1:
                node.op, node.target = "call_function", F.relu  # not in place, because that is slow with autograd
            before = node.args[0] if isinstance(module, nn.BatchNorm2d) else None
            conv = self._module(before)
            if type(conv) is not nn.Conv2d or len(before.users) > 1 or calls.count(before.target) > 1:
                continue
            fused = copy.deepcopy(conv)
            fused.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
            fused = fused.to(self.dtype).requires_grad_(False)
            self.pairs.append((conv, module, fused))
            self.graph.set_submodule(before.target, fused)  # in the traced graph only: the model keeps its own
            node.replace_all_uses_with(before)
            graph.erase_node(node)

    def _module(self, node: object) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.graph.get_submodule(node.target) if getattr(node, "op", None) == "call_module" else None

    @torch.no_grad()
    def _read(self) -> tuple[int, float]:
        """A number pair that changes with every weight and running statistic: torch's count of writes, the total norm.

        The norm is for writes through .data, which are not counted.
        """
        values = [source for source in self.sources if source.is_floating_point()]
        return sum(source._version for source in self.sources), get_total_norm(values).item() if values else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the folded weights anew if a weight or running statistic has changed."""
        state = self._read()
        if state == self.state:
            return
        for conv, norm, fused in self.pairs:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            fused.weight.copy_(weight)
            fused.bias.copy_(bias)
        self.state = state

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.why_not is not None:
            return self.model(x)
        self.refresh()
        if not self.compiled:
            return self.graph(x)
        try:
            if self.run is None:
                self.run = torch.compile(self.graph)
            return self.run(x)
        except Exception as error:
            logits = self.graph(x)  # raises where the net itself is at fault
            self._run_uncompiled(one_line(error))
            return logits


class ChannelNoise(nn.Module):
    """Channel-wise noise injection: every forward pass, in training and at test, draws the weights anew.

        W' = W + alpha[c] * n,  n ~ N(0, std(W)^2)      c: output channel, std over all weights of the layer

    W [C_out,...]. alpha [C_out,1,...] is trained with the weights, without weight decay; std(W) gets no gradient.
    stream: the seed of the next draw. It is part of the state dict, so a loaded net goes on with the same draws.
    Source: Rakin et al., RSR, 2019, after He et al., CVPR 2019 (parametric noise injection, one alpha a layer).
    """

    def __init__(self, weight: torch.Tensor, stream: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((len(weight), *[1] * (weight.dim() - 1)), START).to(weight))
        self.register_buffer("stream", torch.tensor(stream))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(weight.device).manual_seed(int(self.stream))
        self.stream += 1
        n = torch.empty_like(weight, requires_grad=False).normal_(generator=generator) * weight.detach().std()
        return weight + self.alpha * n


class Mask(nn.Module):
    """The parametrization W -> mask * W of a pruned layer: a masked weight is zero in every pass."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def alphas(model: nn.Module) -> list[nn.Parameter]:
    """The strengths of the injected noise, one tensor [C_out,1,...] per layer; [] for a net without it."""
    return [noise.alpha for noise in model.modules() if isinstance(noise, ChannelNoise)]


def with_noise_injection(model: nn.Module, seed: int = 0) -> nn.Module:
    """Inject ChannelNoise into every convolution and linear layer, in place; returns the model.

    The seed decides the draws. Batch-norm is not folded in such a net, because its weights differ at every pass.
    Raises ValueError for a net that already has injected noise or masks.
    """
    if any(parametrize.is_parametrized(layer) for layer in _layers(model)):
        raise ValueError("noise is injected once, and before a net is pruned: build the net anew")
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(model):
        stream = int(torch.randint(2**31, (), generator=generator))
        noise = ChannelNoise(layer.weight, stream)
        parametrize.register_parametrization(layer, "weight", noise, unsafe=True)  # the safe way would make a draw
    return model


@contextlib.contextmanager
def drawing(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Inside the with-block, injected noise is drawn from `generator`; afterwards its own stream goes on.

    So a measurement gives the same result twice and does not change the training.
    """
    noises = [module for module in model.modules() if isinstance(module, ChannelNoise)]
    before = [int(noise.stream) for noise in noises]
    for noise in noises:
        noise.stream.fill_(torch.randint(2**31, (), generator=generator, device=generator.device).item())
    try:
        yield
    finally:
        for noise, stream in zip(noises, before, strict=True):
            noise.stream.fill_(stream)


def check_sparsity(value: float) -> float:
    """`value` as a float if it is a sparsity, a share of the weights in [0, 1); raises ValueError otherwise."""
    if check_share(value, "sparsity") == 1:
        raise ValueError("a sparsity of 1 leaves no weight: write a share below 1")
    return float(value)


def _mask(layer: nn.Module) -> Mask | None:
    parts = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else []
    return next((part for part in parts if isinstance(part, Mask)), None)


def _masked(layer: nn.Module) -> torch.Tensor:
    weight = layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight
    return weight if (mask := _mask(layer)) is None else mask(weight)


def layer_weights(model: nn.Module) -> list[torch.Tensor]:
    """The weights of every convolution and linear layer, with their masks, without injected noise.

    >>> [list(w.shape) for w in layer_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2)))]
    [[8, 3, 3, 3], [2, 8]]
    """
    return [_masked(layer) for layer in _layers(model)]


def lasso(model: nn.Module) -> torch.Tensor:
    """The L1 penalty: the sum of |W| over all layer_weights(model), a scalar with its graph."""
    return sum(weight.abs().sum() for weight in layer_weights(model))


def sparsity(model: nn.Module) -> float:
    """The share of layer weights that are masked.

    >>> sparsity(pruned(nn.Linear(10, 2), 0.85))
    0.85
    """
    masks = [mask.mask for layer in _layers(model) if (mask := _mask(layer)) is not None]
    masked = sum(int((mask == 0).sum()) for mask in masks)
    return masked / sum(weight.numel() for weight in layer_weights(model))


def pruned(model: nn.Module, share: float) -> nn.Module:
    """Global magnitude pruning: a copy of the model whose round(share * number) smallest layer weights are masked.

    Smallest in |W| over all layers, so weights that are masked already come first. Training keeps the masks.
    Raises ValueError for a share outside [0, 1). Source: Han et al., NeurIPS 2015, by torch.nn.utils.prune.

    >>> int((pruned(nn.Linear(10, 2), 0.5).weight == 0).sum())
    10
    """
    model = copy.deepcopy(model)
    sizes = [weight.detach().abs() for weight in layer_weights(model)]
    flat = torch.cat([size.flatten() for size in sizes])
    smallest = prune.L1Unstructured(round(check_sparsity(share) * len(flat)))
    masks = smallest.compute_mask(flat, torch.ones_like(flat)).split([size.numel() for size in sizes])
    for layer, size, mask in zip(_layers(model), sizes, masks, strict=True):
        if (old := _mask(layer)) is not None:
            old.mask.copy_(mask.view_as(size))
        else:
            made = Mask(mask.view_as(size))
            parametrize.register_parametrization(layer, "weight", made, unsafe=True)  # the safe way would make a draw
    engine = getattr(model, "engine", None)
    return engine.prepare(model) if engine else model
