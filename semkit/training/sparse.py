"""Sparse nets: the lasso that shrinks weights, and pruning by threshold with masks that training keeps.

What is pruned are the weights of convolutions and linear layers, the smallest of the whole net first; biases and norms
stay. A masked weight is zero in every pass, whatever noise is injected into the others.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from semkit.nets.injection import LAYERS


def check_sparsity(value: float) -> float:
    """`value` as a float if it is a share of weights to do without, in [0, 1); raises ValueError otherwise."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = None
    if share is None or not 0 <= share < 1:
        raise ValueError(f"sparsity must be a share of the weights in [0, 1), got {value!r}; write 0.85 for 85 %")
    return share


class Mask(nn.Module):
    """The parametrization W -> mask * W."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, LAYERS))


def _mask(layer: nn.Module) -> Mask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((part for part in layer.parametrizations.weight if isinstance(part, Mask)), None)


def weights(model: nn.Module) -> list[torch.Tensor]:
    """The weights of every convolution and linear layer: masked where they are pruned, without injected noise."""

    def kept(layer: nn.Module) -> torch.Tensor:
        whole = layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight
        mask = _mask(layer)
        return whole if mask is None else mask(whole)

    return [kept(layer) for layer in _layers(model)]


def lasso(model: nn.Module) -> torch.Tensor:
    """The sum of |W| over all weights(model), with its gradient."""
    return sum(weight.abs().sum() for weight in weights(model))


def sparsity(model: nn.Module) -> float:
    """The share of weights that are masked, of all weights of convolutions and linear layers."""
    masks = [mask.mask for layer in _layers(model) if (mask := _mask(layer)) is not None]
    gone = sum(int((mask == 0).sum()) for mask in masks)
    return gone / sum(weight.numel() for weight in weights(model))


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy of the model without the `share` of its weights that is smallest in size, over all layers at once.

    Exactly round(share * number of weights) are masked; what is masked already goes first. Raises ValueError for a
    share outside [0, 1). Source of the rule: Han et al., NeurIPS 2015; torch.nn.utils.prune makes the choice.
    """
    count = round(check_sparsity(share) * sum(weight.numel() for weight in weights(model)))
    model = copy.deepcopy(model)
    before = [weight.detach().abs() for weight in weights(model)]
    sizes = torch.cat([size.flatten() for size in before])
    masks = prune.L1Unstructured(count).compute_mask(sizes, torch.ones_like(sizes)).split([s.numel() for s in before])
    for layer, size, mask in zip(list(_layers(model)), before, masks, strict=True):
        if (old := _mask(layer)) is not None:
            old.mask.copy_(mask.view_as(size))
        else:
            made = Mask(mask.view_as(size))
            parametrize.register_parametrization(layer, "weight", made, unsafe=True)  # safe: it would try a draw
    engine = getattr(model, "engine", None)
    return engine.prepare(model) if engine else model
