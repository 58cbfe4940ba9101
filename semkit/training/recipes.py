"""Recipes of learners: SGD and its schedule, LearnRecipe, and the presets."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from semkit.images.augment import Augment, FlipCrop, ResizedCrop
from semkit.images.imageset import ImageSet
from semkit.images.loading import resized
from semkit.images.pixels import check_count, check_name, check_nonnegative, check_radius, check_share, settle
from semkit.nets.engine import Engine, Passes
from semkit.nets.models import LARGE
from semkit.nets.weights import alphas
from semkit.training.objectives import Objective, Plain
from semkit.training.perturb import PGD, Clean, Perturbation

PRESETS = ("quick", "demo", "lesson", "paper")
STRIDE1 = "resnet18_stride1"  # what the released code runs on ImageNet's 224 pixels


@dataclass(frozen=True)
class SGD:
    """Steps of SGD with momentum, for the surrogate and the learners.

    The rate falls by 10 at each milestone; without milestones it rises linearly over the first `warmup` share of the
    steps and then falls linearly to zero. Raises ValueError for steps < 1, batch < 2, a warmup outside [0, 1], and an
    lr, momentum or weight_decay that is negative or not finite.

    >>> [round(SGD(steps=4, warmup=0.5).rate(step), 3) for step in range(4)]
    [0.025, 0.075, 0.075, 0.025]
    """

    steps: int = 5000
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()
    warmup: float = 0.15

    def __post_init__(self):
        settle(self, steps=partial(check_count, least=1), batch=partial(check_count, least=2), warmup=check_share)
        settle(self, lr=check_nonnegative, momentum=check_nonnegative, weight_decay=check_nonnegative)
        object.__setattr__(self, "milestones", tuple(self.milestones))

    def rate(self, step: int) -> float:
        """The learning rate of step 0 .. steps-1."""
        if self.milestones:
            return self.lr * 0.1 ** sum(step >= m for m in self.milestones)
        done = (step + 0.5) / self.steps
        if done < self.warmup:
            return self.lr * (done / self.warmup)
        return self.lr * ((1 - done) / (1 - self.warmup))

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """The optimizer of all parameters; the strengths of injected noise (weights.alphas) have no weight decay."""
        free = alphas(model)
        decayed = [p for p in model.parameters() if not any(p is other for other in free)]
        groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}] if free else decayed
        return torch.optim.SGD(groups, self.lr, self.momentum, weight_decay=self.weight_decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the optimizer to the learning rate of a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)

    def batches(self, n: int, seed: int, engine: Engine, start: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, indices) for the steps start .. steps-1, in a new order of 0 .. n-1 every epoch.

        The last, smaller batch of an epoch is dropped. The order depends on the seed and the epoch alone, so a resumed
        run sees the same batches. Raises ValueError for n < 2, because batch-norm needs 2 images.
        """
        if n < 2:
            raise ValueError(f"training needs 2 images or more, got {n}")
        batch = min(self.batch, n)
        each = n // batch
        order, of_epoch = None, None
        for step in range(start, self.steps):
            epoch, place = divmod(step, each)
            if epoch != of_epoch:
                generator = engine.generator(seed, "order", epoch)
                order, of_epoch = torch.randperm(n, generator=generator, device=generator.device), epoch
            yield step, order[place * batch : (place + 1) * batch]


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A net to start from: a learner trained by `recipe` on `images` (learning.pretrained_weights trains it).

    Every seed of the learner gets a net pretrained with that seed. last_layer: only the last layer is trained further
    (linear probe).
    """

    images: ImageSet
    recipe: "LearnRecipe"
    last_layer: bool = False

    def __repr__(self) -> str:
        return f"Pretrained({self.images.fingerprint[:24]}, {self.recipe}" + ", last_layer=True" * self.last_layer + ")"


@dataclass(frozen=True)
class LearnRecipe:
    """How a learner is trained; the defaults are SEM's and REM's released protocol for ERM.

    perturbation: Clean() is empirical risk minimisation (ERM), PGD(r) adversarial training (AT) at radius r.
    objective: the loss; Plain() is the cross-entropy on the perturbed images, Trades() and Mart() use clean ones too.
    evaluations: how often the test accuracy is taken, evenly spread and at the end.
    pretrained: a net to start from, None for fresh weights.

    >>> sk.LearnRecipe(sk.PGD(4), model="tiny", sgd=sk.SGD(steps=100, batch=50)).cost(1000).total
    55000
    """

    perturbation: Perturbation = Clean()
    model: str = "resnet18"
    sgd: SGD = SGD(steps=40_000, batch=128, milestones=(16_000, 32_000))
    augment: Augment = FlipCrop()
    evaluations: int = 20
    objective: Objective = Plain()
    pretrained: Pretrained | None = None

    at_once = 0  # samples of an image in one pass: its input gradients are plain ones

    def __post_init__(self):
        settle(self, evaluations=partial(check_count, least=1))

    @property
    def net(self) -> str:
        """The name of the net; protection recipes have the same attribute."""
        return self.model

    def cost(self, n: int) -> Passes:
        """The passes of a training on n images."""
        visits = self.sgd.steps * min(self.sgd.batch, n)
        return Passes(visits * self.perturbation.passes, visits * self.objective.passes)

    def tested(self, images: ImageSet) -> ImageSet:
        """Test images at the training size: larger ones are cropped to their centre, smaller ones resized."""
        have = images.images.shape[2:]
        side = self.augment.output_size(have[-1])
        if side == have[-1]:
            return images
        return images.centre(side) if side <= min(have) else resized(images, side)

    def further(self, model: nn.Module, test: ImageSet, seed: int) -> dict:
        """More columns for the learner's row: the numbers of its perturbation, and the seed of its pretrained net."""
        numbers = self.perturbation.further(model, self.tested(test))
        return {"pretrained_seed": seed, **numbers} if self.pretrained else numbers


def attack(radius: float, steps: int, norm: str = "linf") -> PGD:
    """PGD whose steps together cross the ball: 10 steps of radius / 5 as released, larger ones if there are fewer.

    >>> attack(4, 2).step_size, attack(4, 10).step_size
    (2.4, 0.8)
    """
    return PGD(radius, steps, radius * max(0.2, 1.2 / steps) or None, norm)  # radius 0 has no step


def learn_recipe(
    preset: str = "lesson",
    *,
    perturbation_radius: float = 0,
    norm: str = "linf",
    learner: str | None = None,
    size: int = 32,
) -> LearnRecipe:
    """The LearnRecipe of a preset: ERM at perturbation_radius 0, else adversarial training at that radius, in levels.

    paper: the released protocol of SEM and REM; from 64 pixels on that for the ImageNet subset. Raises ValueError for
    unknown names.

    >>> sk.learn_recipe("demo", perturbation_radius=4).perturbation
    PGD(radius=4.0, steps=2, step_size=2.4, norm='linf', random_start=True)
    """
    check_name(preset, PRESETS, "preset")
    radius = check_radius(perturbation_radius, "perturbation_radius")
    large, perturbation = preset == "paper" and size >= LARGE, Clean()
    if large and radius:
        perturbation = PGD(radius, 8, radius / 4, norm)
    elif radius:
        perturbation = attack(radius, {"quick": 1, "demo": 2, "lesson": 2, "paper": 10}[preset], norm)
    # A lesson's ERM takes more steps than its AT, because one of AT costs three times as much.
    recipe = {
        "quick": LearnRecipe(model="tiny", sgd=SGD(steps=10, batch=32), evaluations=2),
        "demo": LearnRecipe(model="tiny", sgd=SGD(steps=600 if radius else 700, batch=64), evaluations=5),
        "lesson": LearnRecipe(model="tiny", sgd=SGD(steps=930 if radius else 2400, batch=64), evaluations=10),
        "paper": LearnRecipe(model=STRIDE1, augment=ResizedCrop(224)) if large else LearnRecipe(),
    }[preset]
    return replace(recipe, perturbation=perturbation, model=learner or recipe.model)


def lasting(recipe, steps: int):
    """A recipe, of a learner or of noise, with another number of steps; its milestones move along.

    >>> lasting(learn_recipe("paper"), 400).sgd.milestones
    (160, 320)
    """
    share = steps / recipe.sgd.steps
    milestones = tuple(round(share * milestone) for milestone in recipe.sgd.milestones)
    return replace(recipe, sgd=replace(recipe.sgd, steps=steps, milestones=milestones))
