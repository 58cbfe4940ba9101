"""Each exercise's checker passes the solution and names what is wrong with a broken twin."""

from dataclasses import replace

import numpy as np
import torch
from checks import both_tests

from semkit.images.pixels import LEVEL, box
from semkit.lessons import exercises
from semkit.training.perturb import PGD, Clean, Uniform


def right_protected(images, delta):
    return (images + 255 * delta).round().clamp(0, 255).to(torch.uint8)


def in_place(images, delta):
    images.copy_(right_protected(images, delta))
    return images


BROKEN_PROTECTED = {
    "tensor": lambda images, delta: None,
    "in place": in_place,
    "float32": lambda images, delta: (images + 255 * delta).round().clamp(0, 255),
    "the shape": lambda images, delta: right_protected(images, delta)[:1],
    "wrapped around": lambda images, delta: (images.int() + (255 * delta).round().int()).remainder(256).byte(),
    "negative half": lambda images, delta: right_protected(images, delta.clamp(0, 1)),
    "round to the nearest": lambda images, delta: (images + 255 * delta).clamp(0, 255).to(torch.uint8),
}


def right_stability(loss, x, radius, draws):
    return -sum(loss(Uniform(radius)(None, x, None)) for _ in range(draws)) / draws


def with_u(u):
    """The solution, with u(x, radius) in place of the uniform draw."""
    return lambda loss, x, radius, draws: -sum(loss(u(x, radius)) for _ in range(draws)) / draws


def one_u(loss, x, radius, draws):
    a = Uniform(radius)(None, x, None)
    return -sum(loss(a) for _ in range(draws)) / draws


def one_number(loss, x, radius, draws):
    return -sum(loss(box(x + 0.9 * radius * LEVEL * (-1) ** draw)) for draw in range(draws)) / draws


BROKEN_STABILITY = {
    "5 times, not 1 times": lambda loss, x, radius, draws: -loss(Uniform(radius)(None, x, None)),
    "not images": with_u(lambda x, radius: Uniform(radius)(None, x, None)[0]),
    "clip them": with_u(lambda x, radius: x + radius * LEVEL * (2 * torch.rand_like(x) - 1)),
    "one level is 1/255": with_u(lambda x, radius: box(x + radius * (2 * torch.rand_like(x) - 1))),
    "both sides": with_u(lambda x, radius: box(x + radius * LEVEL * torch.rand_like(x))),
    "the radius is 4": with_u(lambda x, radius: box(x - radius * LEVEL * torch.rand_like(x))),
    "from pixel to pixel": one_number,
    "fresh u": one_u,
    "minus the mean": lambda *asked: -right_stability(*asked),
}


def right_step_passes(recipe):
    return recipe.steps * recipe.samples * (1 + recipe.noise_side.passes) + recipe.surrogate_side.passes + 1


def swapped_sides(recipe):
    other = replace(recipe, noise_side=recipe.surrogate_side, surrogate_side=recipe.noise_side)
    return right_step_passes(other)


BROKEN_STEP_PASSES = {
    "2 passes, not None": lambda recipe: None,
    "one to train the surrogate": lambda recipe: right_step_passes(recipe) - 1,
    "with `samples` passes": lambda recipe: right_step_passes(replace(recipe, samples=1)),
    "on top, once": swapped_sides,
    "takes no pass": lambda recipe: right_step_passes(recipe) + (recipe.noise_side != Clean()),
    "for every sample": lambda recipe: 51 + 10 * (recipe.surrogate_side != Clean()) - 49 * (recipe.steps == 1),
    "its own number": lambda recipe: right_step_passes(recipe) + 10 * (recipe.surrogate_side == PGD(4, 7)),
}


def without_line(v, z, degree=1):
    return v - np.polyval(np.polyfit(z, v, degree), z)


def right_partial(x, y, z):
    return np.corrcoef(without_line(x, z), without_line(y, z))[0, 1]


def through_the_origin(x, y, z):
    return np.corrcoef(*(v - z * (v @ z) / (z @ z) for v in (x, y)))[0, 1]


BROKEN_PARTIAL = {
    "return one number": lambda x, y, z: np.corrcoef(without_line(x, z), without_line(y, z)),
    "one number, not": lambda x, y, z: None,
    "plain correlation": lambda x, y, z: np.corrcoef(x, y)[0, 1],
    "one of the two only": lambda x, y, z: np.corrcoef(without_line(x, z), y)[0, 1],
    "of the two only": lambda x, y, z: np.corrcoef(x, without_line(y, z))[0, 1],
    "has slope and": through_the_origin,
}


def right_moved(before, after):
    return int((after.int() - before.int()).abs().max())


BROKEN_MOVED = {
    "it returns nothing": lambda before, after: None,
    "one number": lambda before, after: (after.int() - before.int()).abs(),
    "6, not 2.75": lambda before, after: (after.int() - before.int()).abs().float().mean(),
    "a share of 255": lambda before, after: (after.int() - before.int()).abs().max() / 255,
    "fall as well as rise": lambda before, after: (after.int() - before.int()).max(),
    "uint8 wraps": lambda before, after: (after - before).max(),
    "here it is 0": lambda before, after: 7 - 7 * (before == after).all() + 7,
}


def sem_step_with(
    draw=lambda z, recipe: recipe.noise_side(None, z, None),
    direction=lambda slopes: torch.stack(slopes).sum(0).sign(),
    unit=LEVEL,
    start=lambda x, delta: box(x + delta),
    end=lambda delta, radius: delta.clamp(-radius, radius),
):
    """The solution, or a twin of it with one part replaced."""

    def sem_step(gradient, x, delta, recipe):
        z = start(x, delta)
        slopes = [gradient(draw(z, recipe)) for _ in range(recipe.samples)]
        return end(delta - recipe.step_size * unit * direction(slopes), recipe.radius * LEVEL)

    return sem_step


def one_draw(gradient, x, delta, recipe):
    a = recipe.noise_side(None, box(x + delta), None)
    return sem_step_with(draw=lambda z, _: a)(gradient, x, delta, recipe)


right_sem_step = sem_step_with()
BROKEN_SEM_STEP = {
    "3 times, not 1": lambda gradient, x, delta, recipe: right_sem_step(gradient, x, delta, replace(recipe, samples=1)),
    "is asked at": sem_step_with(start=lambda x, delta: box(x + delta)[0]),
    "leave .0, 1.": sem_step_with(draw=lambda z, recipe: z + 4 * LEVEL * (2 * torch.rand_like(z) - 1)),
    "take it around x . delta": sem_step_with(start=lambda x, delta: x),
    "within 4 levels": sem_step_with(draw=lambda z, recipe: Uniform(recipe.radius)(None, z, None)),
    "nothing random": sem_step_with(draw=lambda z, recipe: z),
    "fresh": one_draw,
    "return the new delta": sem_step_with(end=lambda delta, radius: None),
    "climbs": sem_step_with(unit=-LEVEL),
    "left the radius": sem_step_with(end=lambda delta, radius: delta),
    "the first draw": sem_step_with(direction=lambda slopes: slopes[0].sign()),
    "the last draw": sem_step_with(direction=lambda slopes: slopes[-1].sign()),
    "vote of the signs": sem_step_with(direction=lambda slopes: torch.stack(slopes).sign().sum(0).sign()),
    "one level is 1/255": sem_step_with(unit=1, end=lambda delta, radius: delta.clamp(-8, 8)),
    "no further": sem_step_with(direction=lambda slopes: torch.stack(slopes).sum(0)),
}

CASES = [
    (exercises.check_protected, right_protected, BROKEN_PROTECTED),
    (exercises.check_stability, right_stability, BROKEN_STABILITY),
    (exercises.check_step_passes, right_step_passes, BROKEN_STEP_PASSES),
    (exercises.check_partial, right_partial, BROKEN_PARTIAL),
    (exercises.check_moved, right_moved, BROKEN_MOVED),
    (exercises.check_sem_step, right_sem_step, BROKEN_SEM_STEP),
]

test_a_checker_passes_the_solution, test_a_checker_says_what_is_wrong = both_tests(CASES)
