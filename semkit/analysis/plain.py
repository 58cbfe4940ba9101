"""The noise step and the training step in plain PyTorch, one sample and one image after another: short, slow, and easy
to check. `speed` times the engine against it, and tests use it as an oracle: the same draws give the same results.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.images.pixels import LEVEL, box, uniform
from semkit.protections.crafting import CraftRecipe
from semkit.training.perturb import Clean, Perturbation


def plain_views(x: Tensor, drawn: tuple, pad: int) -> Tensor:
    """FlipCrop(pad).apply(x, drawn), one image after another: [N,C,H,W] -> [N,C,H,W]."""
    views = []
    for image, flip, top, left in zip(x, *(numbers.tolist() for numbers in drawn), strict=True):
        padded = F.pad(image.flip(2) if flip else image, (pad,) * 4)
        views.append(padded[:, top : top + x.shape[2], left : left + x.shape[3]])
    return torch.stack(views)


def plain_perturbed(model: nn.Module, x: Tensor, y: Tensor, side: Perturbation, generator: Generator) -> Tensor:
    """Clean: x; Uniform: a random point of the max-norm ball and box; PGD: the end of its ascent from such a point.

    x [N,C,H,W] in [0,1], y [N] -> the same shape. The model stays in its mode. Source: Madry et al., ICLR 2018.
    """
    if isinstance(side, Clean):
        return x
    radius = side.radius * LEVEL
    x_adv = box(x + uniform(x, radius, generator))
    for _ in range(side.passes):
        x_adv.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
        x_adv = x_adv.detach() + side.step_size * LEVEL * slope.sign()
        x_adv = box(torch.minimum(torch.maximum(x_adv, x - radius), x + radius))
    return x_adv


def plain_noise_step(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, recipe: CraftRecipe, generator: Generator
) -> Tensor:
    """crafting.noise_step, one sample after another: x [N,C,H,W] in [0,1], y [N], delta [N,C,H,W] -> the next delta.

    Leaves the model in eval mode. Source: Liu et al., AAAI 2024.
    """
    model.eval()
    delta = delta.detach().requires_grad_()
    total = torch.zeros_like(delta)
    for _ in range(recipe.samples):
        drawn = recipe.augment.draw(len(x), x.shape[2:], generator)
        z = box(plain_views(x + delta, drawn, recipe.augment.pad))
        a = plain_perturbed(model, z.detach(), y, recipe.noise_side, generator)
        straight_through = z + (a - z).detach()
        total += torch.autograd.grad(F.cross_entropy(model(straight_through), y), delta)[0]
    radius = recipe.radius * LEVEL
    return (delta.detach() - recipe.step_size * LEVEL * total.sign()).clamp(-radius, radius)


def plain_train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, side: Perturbation, generator: Generator
) -> float:
    """One step of adversarial training on x [N,C,H,W] in [0,1], y [N]; returns the loss before it.

    The perturbation is made in eval mode, the step in train mode. Source: Madry et al., ICLR 2018.
    """
    x_adv = plain_perturbed(model.eval(), x, y, side, generator)
    optimizer.zero_grad()
    loss = F.cross_entropy(model.train()(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.item()
