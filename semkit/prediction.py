"""What work will cost before it is done: passes by its recipes, seconds by a short probe of their nets."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from semkit import models
from semkit.craft import CraftRecipe
from semkit.engine import Engine, Passes, count_passes, evaluating, input_gradient, together, train_step
from semkit.flat import CALLS_BEFORE
from semkit.learn import LearnRecipe

ENOUGH = 0.5  # seconds after which a pass is not timed once more
_speeds: dict[tuple, tuple[int, float, float, float]] = {}  # of this process


def _all_of(recipes: Iterable[CraftRecipe | LearnRecipe], n: int) -> Iterator[tuple[CraftRecipe | LearnRecipe, int]]:
    """Every recipe with the number of its images: n, and those of the trainings that learners begin with, once."""
    begun = {}
    for recipe in recipes:
        yield recipe, n
        if first := getattr(recipe, "pretrained", None):
            begun[id(first)] = first
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

    Each net is probed once in a process, at the batch and side that it sees; without `probe` the answer is None where
    one was not.
    """
    total = 0.0
    for recipe, images in _all_of(recipes, n):
        crafts = isinstance(recipe, CraftRecipe)
        net, samples = (recipe.surrogate, recipe.at_once) if crafts else (recipe.model, 1)
        passes, batch = recipe.cost(images), min(recipe.sgd.batch, images)
        key = net, classes, recipe.augment.output_size(size), batch, samples, engine
        if key not in _speeds:
            if not probe:
                return None
            _speeds[key] = _probed(*key)
        before, first, later, training = _speeds[key]
        at_first = min(passes.input_gradient, before)
        total += at_first * first + (passes.input_gradient - at_first) * later + passes.training * training
    return total


def _probed(
    net: str, classes: int, side: int, batch: int, samples: int, engine: Engine
) -> tuple[int, float, float, float]:
    """Images until an input gradient has a list, seconds an image before and then, and of a training pass.

    samples: of a batch, as many as the engine gives the net at once make a pass.
    """
    model = engine.prepare(models.build(net, classes, size=side))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x = engine.images(torch.zeros((batch, 3, side, side), dtype=torch.uint8))
    y = torch.zeros(batch, dtype=torch.int64, device=engine.device)
    times = min(samples, together(model, x))
    views, labels = torch.cat([x] * times), y.repeat(times)
    with count_passes():  # these are no part of the work
        first = later = _fastest(lambda: input_gradient(model, views, labels), views)
        if model.flat and not model.folded.compiled:
            with evaluating(model):
                model.flat.write(views, labels)
            later = _fastest(lambda: input_gradient(model, views, labels), views)
        return CALLS_BEFORE * len(views), first, later, _fastest(lambda: train_step(model, optimizer, x, y), x)


def _fastest(run: Callable, x: torch.Tensor) -> float:
    """Seconds an image of the fastest of two to four calls; the first one warms up."""
    times = []
    while len(times) < 2 or (len(times) < 4 and sum(times) < ENOUGH):
        began = time.perf_counter()
        run()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - began)
    return min(times[1:]) / len(x)
