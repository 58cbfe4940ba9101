"""Perturbations of an image before the loss. EM, REM, SEM, adversarial training and robust accuracy differ only here.

    x_adv = perturbation(model, x, y, generator)      x [N,C,H,W] in [0,1], y [N] -> x_adv, the same shape

A call is perturbation.apply(model, x, y, drawn), with all its randomness in drawn = perturbation.draw(x, generator).
With target=p, class probabilities [N,classes], PGD ascends KL(p || f(x')) in place of CE(f(x'), y): p are the model's
own predictions at x (Trades), or the labels of mixed images (Mixed).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor, nn

from semkit.images import pixels
from semkit.images.imageset import ImageSet
from semkit.images.pixels import LEVEL, NORMS, check_count, check_radius, check_step_size, one_of, settle
from semkit.nets.engine import input_gradient

TOLERANCE = 1e-3  # of the box, because augmentations round


class Perturbation:
    """Base of all perturbations; this one does nothing. radius: in pixel levels. passes: input gradients per image.

    whole_batch: True if the change of an image depends on the other images of its batch.
    """

    radius: float = 0.0
    passes: int = 0
    whole_batch = False

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """The random numbers that `apply` needs, one row per image of x; by default none, [N,C,H,0]."""
        return x[..., :0]

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        """The perturbed images, from x and their draws."""
        return x

    def scaled(self, share: float) -> "Perturbation":
        """The same perturbation at `share` of its radius and step size."""
        return replace(self, radius=self.radius * share) if self.radius else self

    def at(self, progress: float) -> "Perturbation":
        """The perturbation at this share of a learner's training, 0 to 1; most stay the same."""
        return self

    def learn(self, logits: Tensor, y: Tensor) -> None:
        """Called with the training net's logits [N,classes] at the perturbed images, for perturbations that adapt."""

    def further(self, model: nn.Module, test: ImageSet) -> dict[str, float]:
        """Further numbers for the row of a learner trained with this, by name; most have none."""
        return {}

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator | None = None, target: Tensor | None = None
    ) -> Tensor:
        low, high = x.aminmax()
        if not (x.is_floating_point() and low > -TOLERANCE and high < 1 + TOLERANCE):
            raise ValueError(f"x must be floats in [0, 1], got {x.dtype} from {float(low):g} to {float(high):g}")
        return self.apply(model, x, y, self.draw(x, generator), target)


@dataclass(frozen=True)
class Clean(Perturbation):
    """No perturbation: x itself. ERM, EM and clean accuracy.

    >>> Clean().radius, Clean().passes
    (0.0, 0)
    """


@dataclass(frozen=True)
class Uniform(Perturbation):
    """Random perturbation box(x + u), u uniform in the ball of `radius` levels: one draw, no gradient (SEM).

    Source: Liu et al., AAAI 2024.

    >>> Uniform(4)(None, torch.zeros(1, 3, 2, 2), None).max() <= 4 / 255
    tensor(True)
    """

    radius: float = 4
    norm: str = "linf"

    def __post_init__(self):
        settle(self, radius=check_radius, norm=one_of(*NORMS))

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """u, shaped x."""
        return pixels.random_point(x, self.radius * LEVEL, self.norm, generator)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        return (x + drawn).clamp_(0, 1)


@dataclass(frozen=True)
class PGD(Perturbation):
    """Projected gradient ascent on the cross-entropy, in eval mode, inside the ball and the box.

        x_adv <- box(x + project(x_adv + step_size * direction(grad CE(f(x_adv), y)) - x))

    radius and step_size in pixel levels, also for l2 and l1 (l2 radius 0.5 on the [0,1] scale is 127.5 levels);
    step_size defaults to radius / 5. x [N,C,H,W] in [0,1], y [N] -> x_adv, same shape.
    Raises ValueError for radii that look like fractions. Source: Madry et al., ICLR 2018.

    >>> PGD(4)
    PGD(radius=4.0, steps=10, step_size=0.8, norm='linf', random_start=True)
    """

    radius: float = 4
    steps: int = 10
    step_size: float | None = None
    norm: str = "linf"
    random_start: bool = True

    def __post_init__(self):
        settle(self, radius=check_radius, steps=check_count, norm=one_of(*NORMS))
        size = self.radius / 5 if self.step_size is None else check_step_size(self.step_size)
        object.__setattr__(self, "step_size", size)

    @property
    def passes(self) -> int:
        """Input gradients per image."""
        return self.steps if self.radius else 0

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """The start of the ascent as an offset from x."""
        if not (self.radius and self.random_start):
            return torch.zeros_like(x)
        return pixels.random_point(x, self.radius * LEVEL, self.norm, generator)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        if not self.radius:
            return x
        radius, step_size = self.radius * LEVEL, self.step_size * LEVEL
        x, goal = x.detach(), y if target is None else target
        x_adv = (x + drawn).clamp_(0, 1)
        for _ in range(self.steps):
            moved = pixels.ascent_direction(self.gradient(model, x_adv, goal), self.norm).mul_(step_size)
            # In place, so that the images of a step stay in the processor's cache.
            x_adv = pixels.project(moved.add_(x_adv).sub_(x), radius, self.norm).add_(x).clamp_(0, 1)
        return x_adv

    def scaled(self, share: float) -> "PGD":
        return replace(self, radius=self.radius * share, step_size=self.step_size * share)

    def gradient(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The gradient that a step follows: engine.input_gradient at x."""
        return input_gradient(model, x, y)


@dataclass(frozen=True)
class EOT(PGD):
    """PGD that follows the mean gradient of `draws` passes in every step, for nets that draw noise of their own.

        x_adv <- box(x + project(x_adv + step_size * direction(mean of draws of grad CE(f(x_adv), y)) - x))

    With one draw such a net looks more robust than it is, because its gradient is noisy. Source: Athalye et al., ICML
    2018 (expectation over transformation). Raises ValueError for draws < 1.

    >>> EOT(8, 10, draws=4).passes
    40
    """

    draws: int = 8

    def __post_init__(self):
        super().__post_init__()
        settle(self, draws=partial(check_count, least=1))

    @property
    def passes(self) -> int:
        """Input gradients per image."""
        return self.draws * super().passes

    def gradient(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean of `draws` gradients at x."""
        return sum(super(EOT, self).gradient(model, x, y) for _ in range(self.draws)) / self.draws


@dataclass(frozen=True)
class NFGSM(Perturbation):
    """One step of ascent from random noise of twice the radius, not projected onto the ball (N-FGSM).

        z = box(x + u),  u ~ U(-2 radius, 2 radius);   x_adv = box(z + radius * sign(grad CE(f(z), y)))

    So x_adv is up to three times the radius from x. Source: de Jorge et al., NeurIPS 2022.
    """

    radius: float = 4

    def __post_init__(self):
        settle(self, radius=check_radius)

    @property
    def passes(self) -> int:
        """Input gradients per image."""
        return 1 if self.radius else 0

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """u, shaped x."""
        return pixels.random_point(x, 2 * self.radius * LEVEL, "linf", generator)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        if not self.radius:
            return x
        z = (x.detach() + drawn).clamp_(0, 1)
        uphill = input_gradient(model, z, y if target is None else target).sign_()
        return uphill.mul_(self.radius * LEVEL).add_(z).clamp_(0, 1)


def shrunk(perturbation: Perturbation, share: float) -> Perturbation:
    """The perturbation with `share` of its radius and step size; Clean() where less than half a level is left."""
    if share >= 1 or not perturbation.radius:
        return perturbation
    return Clean() if perturbation.radius * share < 0.5 else perturbation.scaled(share)
