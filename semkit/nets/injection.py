"""Channel-wise noise injection: a net whose weights are drawn anew at every forward pass, in training and at test.

    W' = W + alpha[c] * n,  n ~ N(0, std(W)^2)      c: output channel, std over all weights of the layer

alpha is trained with the weights, from START on and without weight decay. Source: Rakin et al., RSR (robust sparse
regularisation), after He et al., CVPR 2019 (parametric noise injection, one alpha a layer there).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

START = 0.25  # alpha before training
LAYERS = (nn.Conv2d, nn.Linear)


class ChannelNoise(nn.Module):
    """The parametrization W -> W + alpha[c] * n of a weight W [C_out, ...].

    stream: the seed of the next draw, a part of the net's state: a saved net goes on with the draws that it would have
    made. Torch's global generator is left alone. std(W) gets no gradient.
    """

    def __init__(self, weight: torch.Tensor, start: float, stream: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((len(weight), *[1] * (weight.dim() - 1)), start).to(weight))
        self.register_buffer("stream", torch.tensor(stream))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(weight.device).manual_seed(int(self.stream))
        self.stream += 1
        n = torch.empty_like(weight, requires_grad=False).normal_(generator=generator) * weight.detach().std()
        return weight + self.alpha * n


def _injected(model: nn.Module) -> list[ChannelNoise]:
    return [module for module in model.modules() if isinstance(module, ChannelNoise)]


def alphas(model: nn.Module) -> list[nn.Parameter]:
    """The strengths of a net's injected noise, one tensor [C_out, 1, ...] a layer; none for a net without."""
    return [noise.alpha for noise in _injected(model)]


def with_noise_injection(model: nn.Module, seed: int = 0, start: float = START) -> nn.Module:
    """The model, with noise injected into the weights of every convolution and linear layer, in place.

    The same seed gives the same draws. Such a net is never folded (nets.folding), because its weights differ at every pass.
    Raises ValueError for a negative start, and for a net that has injected noise or is pruned already.
    """
    if not 0 <= start < float("inf"):
        raise ValueError(f"start must be a finite number >= 0, got {start!r}")
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError("noise is injected once, and before a net is pruned: build the net anew")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        stream = int(torch.randint(2**31, (), generator=generator))
        noise = ChannelNoise(layer.weight, start, stream)
        parametrize.register_parametrization(layer, "weight", noise, unsafe=True)  # safe: it would try a draw
    return model


@contextlib.contextmanager
def drawing(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Inside the block the net's injected noise follows `generator`; afterwards it goes on from where it was.

    So what is measured is the same twice, and measuring changes no training.
    """
    noises = _injected(model)
    before = [int(noise.stream) for noise in noises]
    for noise in noises:
        noise.stream.fill_(torch.randint(2**31, (), generator=generator, device=generator.device).item())
    try:
        yield
    finally:
        for noise, stream in zip(noises, before, strict=True):
            noise.stream.fill_(stream)
