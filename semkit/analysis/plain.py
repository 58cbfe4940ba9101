"""The noise step and adversarial training the obvious way: what the engine is held against, in results and in time.

float32 as torch makes it, contiguous memory, the model as it is, every image augmented by itself in Python, one sample
after another. Same mathematics as `craft` and `learn`, for the max-norm, random starts and FlipCrop. Random draws come
from outside, so that both can be given the same ones.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semkit.images.augment import FlipCrop
from semkit.images.pixels import LEVEL, box
from semkit.protections.crafting import CraftRecipe
from semkit.training.perturb import Clean, Perturbation

Draw = tuple[tuple, Tensor | None]  # (flip, top, left) of every image, and where its perturbation starts


def draw(augment: FlipCrop, side: Perturbation, like: Tensor, generator: torch.Generator) -> Draw:
    """What one sample takes from `generator`, in the order in which the engine takes it; shaped `like` [N,C,H,W]."""
    drawn = augment.draw(len(like), like.shape[2:], generator)
    if isinstance(side, Clean):
        return drawn, None
    radius = side.radius * LEVEL
    return drawn, torch.empty_like(like).uniform_(-radius, radius, generator=generator)


def draws(recipe: CraftRecipe, like: Tensor, generator: torch.Generator) -> Iterator[Draw]:
    """The draws of one noise step, one after another as they are asked for."""
    for _ in range(recipe.samples):
        yield draw(recipe.augment, recipe.noise_side, like, generator)


def view(image: Tensor, flip: bool, top: int, left: int, pad: int) -> Tensor:
    """One image's own flip and crop, [C,H,W] -> [C,H,W]: pad(flip(image))[:, top : top + H, left : left + W]."""
    image = image.flip(2) if flip else image
    return F.pad(image, (pad,) * 4)[:, top : top + image.shape[1], left : left + image.shape[2]]


def views(x: Tensor, drawn: tuple, pad: int) -> Tensor:
    """Every image of x [N,C,H,W] as its own draw shows it, one at a time."""
    numbers = zip(*(d.tolist() for d in drawn), strict=True)
    return torch.stack([view(image, *mine, pad) for image, mine in zip(x, numbers, strict=True)])


def perturbed(model: nn.Module, z: Tensor, y: Tensor, side: Perturbation, offset: Tensor | None) -> Tensor:
    """z itself, box(z + offset), or the end of PGD's ascent from there, as the side asks; model as it is."""
    if offset is None:
        return z
    radius, a = side.radius * LEVEL, box(z + offset)
    for _ in range(side.passes):
        a.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(model(a), y), a)[0]
        a = a.detach() + side.step_size * LEVEL * slope.sign()
        a = box(torch.minimum(torch.maximum(a, z - radius), z + radius))
    return a


def noise_step(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, recipe: CraftRecipe, draws: Iterable[Draw]
) -> Tensor:
    """craft.noise_step for these draws, one a sample: x [N,C,H,W] in [0,1], y [N], delta [N,C,H,W] -> the next delta.

    Leaves the model in eval mode. Source: Liu et al., AAAI 2024.
    """
    model.eval()
    delta = delta.detach().requires_grad_()
    total = torch.zeros_like(delta)
    for drawn, offset in draws:
        z = box(views(x + delta, drawn, recipe.augment.pad))
        a = perturbed(model, z.detach(), y, recipe.noise_side, offset)
        straight_through = z + (a - z).detach()
        total += torch.autograd.grad(F.cross_entropy(model(straight_through), y), delta)[0]
    radius = recipe.radius * LEVEL
    return (delta.detach() - recipe.step_size * LEVEL * total.sign()).clamp(-radius, radius)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, side: Perturbation, pad: int, drawn: Draw
) -> float:
    """One step of adversarial training (AT) on x [N,C,H,W], y [N]; returns the loss before it.

        a = perturbed(t(x)), in eval mode;  one step of `optimizer` on CE(f(a), y), in train mode

    With noise x + delta as x it is the surrogate's step. Source: Madry et al., ICLR 2018.
    """
    model.eval()
    a = perturbed(model, views(x, drawn[0], pad), y, side, drawn[1])
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(a), y)
    loss.backward()
    optimizer.step()
    return loss.item()
