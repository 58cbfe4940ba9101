"""The error-minimising noise of a whole set: the noise step and the surrogate step, alternating."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from semkit import models
from semkit.augment import Augment, FlipCrop
from semkit.engine import Engine, Passes, count_passes, input_gradient, train_step
from semkit.perturb import PGD, Perturbation, Uniform
from semkit.pixels import LEVEL, box, check_count, check_radius, to_levels, uniform
from semkit.schedule import SGD

STARTS = ("random", "zero", "warm")


@dataclass(frozen=True)
class CraftRecipe:
    noise_side: Perturbation = Uniform(4)
    surrogate_side: Perturbation = PGD(4)
    radius: float = 8
    step_size: float = 1.6
    steps: int = 10
    samples: int = 5
    start: str = "random"
    class_wise: bool = False
    augment: Augment = FlipCrop()
    surrogate: str = "resnet18"
    sgd: SGD = field(default=SGD(milestones=(2000, 4000)))

    def __post_init__(self):
        check_radius(self.radius)
        check_count(self.steps, "steps")
        check_count(self.samples, "samples", 1)
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")


def noise_step(model, x, y, delta, recipe, generator):
    gradient = torch.zeros_like(delta)
    for _ in range(recipe.samples):
        leaf = delta.detach().requires_grad_()
        drawn = recipe.augment.draw(len(x), x.shape[2:], generator)
        with torch.enable_grad():
            z = recipe.augment.apply(box(x + leaf), drawn)
        a = recipe.noise_side(model, z.detach(), y, generator)
        gradient += torch.autograd.grad(z, leaf, input_gradient(model, a, y))[0]
    radius = recipe.radius * LEVEL
    return (delta - recipe.step_size * LEVEL * gradient.sign()).clamp(-radius, radius)


def noise_of_batch(model, x, y, stored, recipe, generator):
    if recipe.start == "random":
        delta = uniform(x, recipe.radius * LEVEL, generator)
    else:
        delta = stored if recipe.start == "warm" else torch.zeros_like(x)
    for _ in range(recipe.steps):
        delta = noise_step(model, x, y, delta, recipe, generator)
    return to_levels(delta)


def craft(images, labels, classes, recipe, *, seed=0, engine=Engine(), on_step=None):
    t0 = time.time()
    model = engine.prepare(models.build(recipe.surrogate, classes, seed))
    opt = recipe.sgd.optimizer(model)
    noise = torch.zeros(images.shape, dtype=torch.int8)
    with count_passes() as passes:
        for step, index in recipe.sgd.batches(len(images), seed, engine):
            g = engine.generator(seed, "step", step)
            x, y = engine.images(images[index]), labels[index]
            delta = noise_of_batch(model, x, y, engine.images(noise[index]), recipe, g)
            noise[index] = delta
            z = recipe.augment.apply(box(x + engine.images(delta)), recipe.augment.draw(len(x), x.shape[2:], g))
            recipe.sgd.set_rate(opt, step)
            loss = train_step(model, opt, recipe.surrogate_side(model, z, y, g), y)
            if on_step: on_step(step, recipe.sgd.steps, loss)
        for i in range(0, len(images), 256):
            index = slice(i, i + 256)
            g = engine.generator(seed, "final", i)
            x, y = engine.images(images[index]), labels[index]
            noise[index] = noise_of_batch(model, x, y, engine.images(noise[index]), recipe, g)
    return noise, model, passes, time.time() - t0
