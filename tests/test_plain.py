"""The plain reference against the engine, in float64 and fed the same random draws; with twins that must not agree."""

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

from semkit.analysis import plain
from semkit.images.augment import FlipCrop
from semkit.images.pixels import LEVEL, uniform
from semkit.nets import models
from semkit.nets.engine import Engine, train_step
from semkit.protections.crafting import CraftRecipe
from semkit.training.perturb import PGD, Clean, Uniform

craft = import_module("semkit.protections.crafting")  # the package's own name `craft` is the function
ENGINE = Engine("cpu", "float64")
SIDES = {"EM": Clean(), "SEM": Uniform(4), "REM": PGD(4, 3, 1.1)}


def recipe_of(side):
    return CraftRecipe(noise_side=side, steps=2, samples=3, augment=FlipCrop(2))


def nets():
    """The same net twice, its batch statistics far from a batch's own: prepared by the engine, and as it is."""
    model, generator = models.small(3, widths=(4, 8)).double(), torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.3, 2, generator=generator)
            module.weight.data.uniform_(0.5, 2, generator=generator)
    return ENGINE.prepare(copy.deepcopy(model)), model


def batch(n=6, size=8):
    """Images with a third of their values at or near black or white, where the box cuts; labels."""
    levels = torch.randint(-100, 356, (n, 3, size, size), generator=torch.Generator().manual_seed(2))
    return ENGINE.images(levels.clamp(0, 255).to(torch.uint8)), torch.arange(n) % 3


def apart(side, **changed):
    """The largest difference in delta after one noise step of both from noise that fills the ball.

    changed: what is different in the recipe of the plain one.
    """
    (fast, slow), (x, y), recipe = nets(), batch(), recipe_of(side)
    delta = uniform(x, 8 * LEVEL, torch.Generator().manual_seed(3))
    other = replace(recipe, **changed)
    ours = craft.noise_step(fast, x, y, delta, recipe, ENGINE.generator(5))
    reference = plain.noise_step(slow, x, y, delta, other, plain.draws(other, x, ENGINE.generator(5)))
    return (ours - reference).abs().max().item()


@pytest.mark.parametrize("method", SIDES)
def test_a_noise_step_is_the_engines(method):
    assert apart(SIDES[method]) <= 1e-12


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("EM", dict(samples=2)),
        ("EM", dict(step_size=1.5)),
        ("EM", dict(augment=FlipCrop(3))),
        ("SEM", dict(noise_side=Uniform(5))),
        ("SEM", dict(noise_side=PGD(4, 1, 1.1))),
        ("REM", dict(noise_side=PGD(4, 2, 1.1))),
        ("REM", dict(noise_side=PGD(4, 3, 1.3))),
    ],
    ids=str,
)
def test_another_recipe_does_not_agree(method, changed):
    assert apart(SIDES[method], **changed) > 1e-4


@pytest.mark.parametrize("method", SIDES)
def test_the_noise_of_a_batch_is_the_engines(method):
    (fast, slow), (x, y), recipe = nets(), batch(), recipe_of(SIDES[method])
    ours = craft.noise_of_batch(fast, x, y, torch.zeros_like(x), recipe, ENGINE.generator(5))
    generator = ENGINE.generator(5)
    start = reference = uniform(x, recipe.radius * LEVEL, generator)
    for _ in range(recipe.steps):
        reference = plain.noise_step(slow, x, y, reference, recipe, plain.draws(recipe, x, generator))
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    assert (ours - start).abs().max() > 1e-3


@pytest.mark.parametrize("method", SIDES)
def test_two_steps_of_training_are_the_engines(method):
    (fast, slow), (x, y), side, t = nets(), batch(), SIDES[method], FlipCrop(2)
    ours, theirs = (torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4) for model in (fast, slow))
    for step in range(2):
        generator = ENGINE.generator(step)
        z = t.apply(x, t.draw(len(x), x.shape[2:], generator))
        loss = train_step(fast, ours, side(fast, z, y, generator), y)
        drawn = plain.draw(t, side, x, ENGINE.generator(step))
        assert loss == pytest.approx(plain.train_step(slow, theirs, x, y, side, t.pad, drawn), rel=1e-9)
    state, expected = fast.state_dict(), slow.state_dict()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=1e-9)
    start = nets()[1].state_dict()
    assert max((expected[name] - start[name]).abs().max().item() for name in expected) > 1e-2


def test_a_view_is_the_flipped_padded_and_cut_image():
    image = torch.arange(6.0).view(1, 2, 3)
    assert plain.view(image, False, 1, 1, 1).tolist() == image.tolist()
    assert plain.view(image, True, 2, 0, 1).tolist() == [[[0, 5, 4], [0, 0, 0]]]
