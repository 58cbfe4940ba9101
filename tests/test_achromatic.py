"""Achromatic noise: its budgets, its step, and what of it survives a trainer's countermeasures."""

import json
from dataclasses import replace

import pytest
import torch
from photos import image_set, make_photos

from semkit.__main__ import main
from semkit.analysis.survival import noise_left
from semkit.countermeasures.pixelwise import grayscale, jpeg
from semkit.images.augment import FlipCrop, Identity
from semkit.images.imageset import ImageSet
from semkit.images.loading import load
from semkit.nets import models
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab, as_dict
from semkit.protections.crafting import CraftRecipe, craft, noise_step
from semkit.protections.methods import PROTECTIONS, RandomGrey, craft_recipe, large_batches
from semkit.protections.noise import load as load_noise
from semkit.training.perturb import Clean
from semkit.training.recipes import SGD, attack

LAB = Lab(Engine("cpu", "float32"))


def short(recipe, **changes):
    """The recipe with four surrogate steps."""
    return replace(recipe, sgd=SGD(steps=4, batch=16), **changes)


def spread(noise):
    """The largest difference between the channels of a pixel's noise, in levels."""
    low, high = noise.int().aminmax(dim=1)
    return int((high - low).max())


@pytest.mark.parametrize("start", ["zero", "random", "warm"])
@pytest.mark.parametrize("method", ["em-grey", "sem-grey", "sem-jpeg"])
def test_achromatic_noise_is_the_same_in_red_green_and_blue_and_within_its_radius(method, start):
    recipe = PROTECTIONS[method].recipe("quick", size=8, radius=7.5)
    noise = craft(image_set(12), short(recipe, start=start), lab=LAB).noise
    assert spread(noise) == 0 and noise.abs().max() == 7 and noise.min() < 0 < noise.max()


@pytest.mark.parametrize("colour", [0.1, 0.25, 0.5])
def test_a_colour_budget_limits_how_far_the_channels_differ(colour):
    noise = craft(image_set(24, size=16), short(craft_recipe("sem", "quick", colour=colour)), lab=LAB).noise
    assert 0 < spread(noise) <= 2 * colour * 8 + 1 and noise.abs().max() <= 8  # rounding adds up to a level


def test_an_achromatic_step_is_that_of_a_noise_with_one_channel():
    recipe = CraftRecipe(noise_side=Clean(), samples=2, colour=0, augment=Identity(), surrogate="tiny")
    model = LAB.engine.prepare(models.build("tiny", 3, 1)).eval()
    x, y = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 0])
    grey = torch.zeros(4, 1, 16, 16, requires_grad=True)
    torch.nn.functional.cross_entropy(model(x + grey), y).backward()
    got = noise_step(model, x, y, torch.zeros_like(x), recipe, torch.Generator())
    assert torch.allclose(got, (-1.6 / 255 * grey.grad.sign()).expand_as(got), atol=1e-9)


@pytest.mark.whole
def test_grey_noise_survives_grey_scale_and_jpeg_where_coloured_noise_does_not():
    images = load("shapes", limit=64).train
    left = {}
    for method in ("sem", "sem-grey"):
        noise = craft(images, short(PROTECTIONS[method].recipe("quick")), lab=LAB).noise
        left[method] = [noise_left(images.images, noise, change) for change in (grayscale, jpeg)]
    assert left["sem"][0] < 0.6 and left["sem-grey"][0] > 0.95
    assert left["sem-grey"][1] > 1.5 * left["sem"][1]


def test_a_recipe_says_its_budget_and_its_views():
    recipe = PROTECTIONS["sem-jpeg"].recipe("lesson")
    ways = "(Identity(), Grey(), GaussianBlur(), JPEG(quality=10))"
    assert as_dict(recipe)["augment"] == f"OneOf(ways={ways}, first=FlipCrop(pad=4, flip=True))"
    assert as_dict(recipe)["colour"] == 0 and recipe.cost(4000) == large_batches().cost(4000)
    grey = PROTECTIONS["sem-grey"].recipe
    large = large_batches(radius=4, perturbation_radius=2, colour=0)
    assert large.sgd.batch == 4 * craft_recipe("sem").sgd.batch and large.surrogate_side == attack(2, 2)
    assert (large.steps, large.samples, large.step_size) == (2, 2, 1.5)
    assert large_batches(perturbation_radius=0).surrogate_side == Clean()
    assert grey("lesson", radius=4, perturbation_radius=2) == replace(large, steps=4, samples=1)
    assert grey("paper") == craft_recipe("sem", "paper", colour=0)
    with pytest.raises(ValueError, match="colour is a share, 0 to 1, got 8"):
        craft_recipe("sem", colour=8)


def test_a_folder_is_protected_with_the_colour_that_was_asked_for(tmp_path, capsys):
    photos, out = make_photos(tmp_path / "photos", 8), tmp_path / "out"
    how = ["protect", str(photos), str(out), "--preset", "quick", "--size", "8", "--method"]
    assert main([*how, "sem-grey", "--colour", "0.25"]) == 0 and main(["check", str(photos), str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["recipe"]["colour"] == 0.25
    assert 0 < spread(load_noise(out / "noise.safetensors").levels) <= 5
    capsys.readouterr()
    for wrong, words in (
        (["sem-grey", "--colour", "8"], "colour is a share, 0 to 1, got"),
        (["sem", "--colour", "0.5"], "--colour: not for --method sem"),
    ):
        try:
            code = main([*how, *wrong])
        except SystemExit as end:
            code = end.code
        assert code == 2 and words in capsys.readouterr().err


def test_the_surrogate_may_have_an_augmentation_of_its_own():
    images, recipe = image_set(16, size=16), short(craft_recipe("em", "quick"), augment=FlipCrop(2))
    first = craft(images, recipe, lab=LAB)
    same = craft(images, replace(recipe, surrogate_augment=FlipCrop(2)), lab=LAB)
    other = craft(images, replace(recipe, surrogate_augment=Identity()), lab=LAB)
    assert first.losses == same.losses and torch.equal(first.noise, same.noise)
    assert first.losses[0] != other.losses[0]


def test_the_random_control_has_one_pattern_of_grey_squares_for_each_class():
    images = ImageSet(torch.zeros(6, 3, 10, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 1, 0]), ("a", "b"))
    noise, cost, net = RandomGrey(radius=6).crafted(images, seed=1, lab=LAB)
    levels = noise.levels
    assert spread(levels) == 0 and set(levels.unique().tolist()) == {-6, 6} and cost["passes"] == 0 and net is None
    assert torch.equal(levels[0], levels[2]) and torch.equal(levels[1], levels[4])
    assert not torch.equal(levels[0], levels[1])
    assert torch.equal(levels[0, 0, :4, :4], levels[0, 0, :1, :1].expand(4, 4)) and len(levels[:, 0].unique(dim=1)) > 1
    other = RandomGrey(radius=6).crafted(images, seed=2, lab=LAB)[0].levels
    assert not torch.equal(other, levels)
    with pytest.raises(ValueError, match="radius must be at most 127 levels"):
        RandomGrey(radius=128)
