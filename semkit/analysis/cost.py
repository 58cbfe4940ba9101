"""What work will cost before it is done: passes by its recipes, seconds by a short probe of their nets."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from semkit.images.augment import Augment
from semkit.nets import models
from semkit.nets.engine import Engine, Passes, count_passes, input_gradient, together, train_step
from semkit.protections.crafting import CraftRecipe, noise_step
from semkit.training.learning import LearnRecipe

ENOUGH = 0.5  # seconds after which a round is not timed once more
_speeds: dict[tuple, tuple[float, float]] = {}  # of this process: seconds an image, of input gradients and training


def _all_of(recipes: Iterable[CraftRecipe | LearnRecipe], n: int) -> Iterator[tuple[CraftRecipe | LearnRecipe, int]]:
    """Every recipe with the number of its images: n, and those of the trainings that learners begin with, once."""
    begun = {}
    for recipe in recipes:
        yield recipe, n
        if first := getattr(recipe, "pretrained", None):
            begun[id(first.made)] = first
    for first in begun.values():
        yield from _all_of([first.recipe], len(first.images))


def cost(recipes: Iterable[CraftRecipe | LearnRecipe], n: int) -> Passes:
    """The passes of all these recipes, each for n images."""
    costs = [recipe.cost(images) for recipe, images in _all_of(recipes, n)]
    return Passes(sum(one.input_gradient for one in costs), sum(one.training for one in costs))


def seconds(
    recipes: Iterable[CraftRecipe | LearnRecipe], n: int, classes: int, size: int, engine: Engine, *, probe: bool = True
) -> float | None:
    """The seconds that all these recipes will take at most, each for n images of a side of `size` pixels.

    Each net is probed once in a process for an augmentation and what it sees at once: batch, side, samples. Without
    `probe` the answer is None where one was not.
    """
    total = 0.0
    for recipe, images in _all_of(recipes, n):
        passes, batch = recipe.cost(images), min(recipe.sgd.batch, images)
        if isinstance(recipe, CraftRecipe):
            net, samples = recipe.surrogate, recipe.at_once
        else:
            net, samples = recipe.model, 0 if passes.input_gradient else None
        key = net, classes, size, batch, samples, recipe.augment, engine
        if key not in _speeds:
            if not probe:
                return None
            _speeds[key] = _probed(*key)
        gradient, training = _speeds[key]
        total += passes.input_gradient * gradient + passes.training * training
    return total


def _probed(
    net: str, classes: int, size: int, batch: int, samples: int | None, augment: Augment, engine: Engine
) -> tuple[float, float]:
    """Time one net: (seconds an image of a noise step, seconds an image of a training step), as crafting runs them.

    With samples=0 the first is a plain input gradient, with None it is 0.
    """
    model = engine.prepare(models.build(net, classes, size=augment.output_size(size)))
    optimizer, generator = torch.optim.SGD(model.parameters(), 0.0), engine.generator(0)
    x = engine.images(torch.zeros((batch, 3, size, size), dtype=torch.uint8))
    y = torch.zeros(batch, dtype=torch.int64, device=engine.device)

    def view() -> torch.Tensor:
        return augment.apply(x, augment.draw(batch, x.shape[2:], generator)).contiguous(memory_format=engine.layout)

    seen = view()
    times = min(samples, together(model, seen)) if samples else 1
    recipe = CraftRecipe(samples=times, augment=augment)

    def gradient():
        noise_step(model, x, y, torch.zeros_like(x), recipe, generator) if samples else input_gradient(model, seen, y)

    def training():
        train_step(model, optimizer, view(), y)

    with count_passes():  # these are no part of the work
        if samples is None:
            return 0.0, _timed(training, device=engine.device)[0] / batch
        noise, trained = _timed(gradient, training, device=engine.device)
    return noise / (batch * times), trained / batch


def _timed(*runs: Callable[[], None], device: str) -> list[float]:
    """Seconds of the fastest call of each, in turn in two to four rounds; the first one warms up."""
    rounds = []
    while len(rounds) < 2 or (len(rounds) < 4 and sum(map(sum, rounds)) < ENOUGH):
        rounds.append([])
        for run in runs:
            began = time.perf_counter()
            run()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            rounds[-1].append(time.perf_counter() - began)
    return [min(times) for times in zip(*rounds[1:], strict=True)]
