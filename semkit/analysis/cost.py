"""The cost of runs: passes from the recipes, seconds from a short probe, peak memory, floating-point operations."""

import re
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from semkit.images.augment import Augment
from semkit.images.files import duration
from semkit.images.imageset import ImageSet
from semkit.nets import models
from semkit.nets.engine import Engine, Passes, batches_per_pass, count_passes, input_gradient, train_step
from semkit.protections.base import Recipe
from semkit.protections.crafting import CraftRecipe, noise_step
from semkit.training.recipes import LearnRecipe

Work = Recipe | LearnRecipe
_probed: dict[tuple, tuple[float, float]] = {}  # what `probe` returned in this process, by its arguments


def _with_pretraining(recipes: Iterable[Work], n: int) -> Iterator[tuple[Work, int]]:
    """Each recipe with its image count n; each judge of noises, and with its own count each pretraining, once."""
    pretrainings, recipes = {}, list(recipes)
    judges = dict.fromkeys(recipe.judge for recipe in recipes if hasattr(recipe, "judge"))
    for recipe in (*recipes, *judges):
        yield recipe, n
        if first := getattr(recipe, "pretrained", None):
            pretrainings[id(first.images), first.recipe] = first
    for first in pretrainings.values():
        yield from _with_pretraining([first.recipe], len(first.images))


def passes_of(recipes: Iterable[Work], n: int) -> Passes:
    """The image passes of all recipes together, each for n images.

    >>> passes_of([sk.craft_recipe("em", "quick")], 20).total
    640
    """
    costs = [recipe.cost(images) for recipe, images in _with_pretraining(recipes, n)]
    return Passes(sum(one.input_gradient for one in costs), sum(one.training for one in costs))


def seconds_of(recipes: Iterable[Work], train: ImageSet, engine: Engine, *, may_probe: bool = True) -> float | None:
    """Estimate the seconds that all recipes take for these images, from above.

        sum over recipes of passes * seconds per image, as `probe` measures them

    Each net is probed once per process. With may_probe=False the result is None if a net has not been probed yet.
    """
    total, classes, size = 0.0, len(train.classes), train.images.shape[-1]
    for recipe, images in _with_pretraining(recipes, len(train)):
        passes = recipe.cost(images)
        if not passes.total:  # a protection without a net
            continue
        batch, samples = min(recipe.sgd.batch, images), recipe.at_once if passes.input_gradient else None
        key = recipe.net, classes, size, batch, samples, recipe.augment, engine
        if key not in _probed:
            if not may_probe:
                return None
            _probed[key] = probe(*key)
        gradient, training = _probed[key]
        total += passes.input_gradient * gradient + passes.training * training
    return total


def in_words(recipes: list[Work], train: ImageSet, engine: Engine, seeds: int) -> str:
    """The passes and the time that these recipes take, each once for every seed, in words."""
    passes, seconds = seeds * passes_of(recipes, len(train)).total, seeds * seconds_of(recipes, train, engine)
    return f"{passes:,} passes on {engine.device}, at most about {duration(seconds)}"


def probe(
    net: str, classes: int, size: int, batch: int, samples: int | None, augment: Augment, engine: Engine
) -> tuple[float, float]:
    """Time a net: seconds per image of an input gradient and of a training step, at this batch and size.

    samples: EOT samples of the noise step whose gradient is timed; 0: a plain input gradient; None: no gradient, 0 s.
    """
    model = engine.prepare(models.build(net, classes, size=augment.output_size(size)))
    optimizer, generator = torch.optim.SGD(model.parameters(), 0.0), engine.generator(0)
    x = engine.images(torch.zeros((batch, 3, size, size), dtype=torch.uint8))
    y = torch.zeros(batch, dtype=torch.int64, device=engine.device)

    def view() -> torch.Tensor:
        return augment.apply(x, augment.draw(batch, x.shape[2:], generator)).contiguous(memory_format=engine.layout)

    at_once = min(samples, batches_per_pass(model, view())) if samples else 1
    recipe = CraftRecipe(samples=at_once, augment=augment)
    step = partial(noise_step, model, x, y, torch.zeros_like(x), recipe, generator)
    gradient = step if samples else partial(input_gradient, model, view(), y)
    with count_passes():  # a separate counter, because these passes are no part of the work
        noise = 0.0 if samples is None else _fastest(gradient, engine.device)
        training = _fastest(lambda: train_step(model, optimizer, view(), y), engine.device)
    return noise / (batch * at_once), training / batch


def gradient_flops(net: str, n: int) -> float:
    """Floating-point operations of the input gradient of n images of 32 px: twice those of the forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # loads much of torch that other costs need not

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.build(net, 10).eval()(torch.zeros(1, 3, 32, 32))
    return 2.0 * n * counter.get_total_flops()


def clock(device: str) -> float:
    """The time in seconds once the device has done all its work."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the faster of two calls, after one that warms up."""
    return min(timeit.repeat(run, timer=partial(clock, device), repeat=3, number=1)[1:])


def peak_memory(device: str = "cpu") -> int:
    """The peak memory of this process in bytes, on its GPU if `device` is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    import resource  # not on Linux, where it includes the peak of the process that started this one

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
