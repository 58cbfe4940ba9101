"""Recipes of learners: the paper preset letter by letter, names, learning rates, and the order of the images."""

import itertools

import pytest
import torch

from semkit.images.augment import FlipCrop, ResizedCrop
from semkit.nets.engine import Engine
from semkit.protections.crafting import CraftRecipe
from semkit.protections.cuda import ClassFilters
from semkit.protections.methods import craft_recipe, sweep_recipes
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import PRESETS, SGD, LearnRecipe, learn_recipe

ENGINE = Engine("cpu", "float32")
ATTACK, LARGE_ATTACK = PGD(4, 10, 0.8), PGD(4, 7, 1)
SMALL = dict(
    radius=8, step_size=1.6, steps=10, samples=5, start="random", class_wise=False, fade_in=0, ramp=0,
    augment=FlipCrop(pad=4, flip=True), surrogate="resnet18",
    sgd=SGD(steps=5000, batch=128, lr=0.1, momentum=0.9, weight_decay=5e-4, milestones=(2000, 4000)),
)  # fmt: skip
LARGE = dict(
    radius=8, step_size=2, steps=7, samples=4, start="random", class_wise=False, fade_in=0, ramp=0,
    augment=ResizedCrop(224), surrogate="resnet18_stride1",
    sgd=SGD(steps=3000, batch=128, lr=0.1, momentum=0.9, weight_decay=5e-4, milestones=(1200, 2400)),
)  # fmt: skip
LEARNING = SGD(steps=40_000, batch=128, lr=0.1, momentum=0.9, weight_decay=5e-4, milestones=(16_000, 32_000))


@pytest.mark.parametrize(("size", "fields", "attack"), [(32, SMALL, ATTACK), (256, LARGE, LARGE_ATTACK)])
def test_paper_crafts_by_the_released_recipe(size, fields, attack):
    sides = {"sem": (Uniform(4), attack), "rem": (attack, attack), "em": (Clean(), Clean())}
    for method, (noise_side, surrogate_side) in sides.items():
        expected = CraftRecipe(noise_side=noise_side, surrogate_side=surrogate_side, **fields)
        assert craft_recipe(method, "paper", size=size) == expected, method


@pytest.mark.parametrize(("fields", "words"), [
    ({"steps": -1}, "steps must be a whole number >= 0, got -1"),
    ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
    ({"start": "cold"}, "start must be one of random, zero, warm, got 'cold'"),
    ({"fade_in": 1.5}, "fade_in is a share, 0 to 1, got 1.5"),
    ({"ramp": -0.1}, "ramp is a share, 0 to 1, got -0.1"),
    ({"class_wise": True}, "class-wise noise is carried from batch to batch: write start='warm'"),
    ({"radius": 128}, "radius must be at most 127 levels"),
])  # fmt: skip
def test_a_crafting_that_cannot_be_is_one_line(fields, words):
    with pytest.raises(ValueError) as error:
        CraftRecipe(**fields)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_method_is_what_its_name_says_at_every_preset(preset):
    sides = {"em": (Clean, Clean), "rem": (PGD, PGD), "sem": (Uniform, PGD)}
    for (method, kinds), size in itertools.product(sides.items(), (32, 256)):
        made = craft_recipe(method, preset, size=size)
        assert (type(made.noise_side), type(made.surrogate_side)) == kinds


def test_papers_image_passes_are_the_published_counts():
    n = 50_000  # 61 and 561 a training step of 128 images, and one more noise pass over the set
    for method, noise_passes in (("sem", 50), ("rem", 550)):
        made = craft_recipe(method, "paper").cost(n)
        assert made.total == 5000 * 128 * (noise_passes + 10 + 1) + n * noise_passes
    assert learn_recipe("paper", perturbation_radius=4).cost(n).total == 40_000 * 128 * 11


def test_paper_learns_by_the_released_protocol():
    assert learn_recipe("paper") == LearnRecipe(Clean(), "resnet18", LEARNING, FlipCrop(4, True), 20)
    assert learn_recipe("paper", perturbation_radius=2).perturbation == PGD(2, 10, 0.4)
    large = learn_recipe("paper", perturbation_radius=4, size=256)
    assert (large.perturbation, large.augment, large.model) == (PGD(4, 8, 1), ResizedCrop(224), "resnet18_stride1")


@pytest.mark.parametrize("preset", PRESETS)
def test_radii_and_nets_are_those_asked_for(preset):
    made = craft_recipe("sem", preset, radius=12, perturbation_radius=6, surrogate="small")
    assert (made.radius, made.noise_side.radius, made.surrogate_side.radius, made.surrogate) == (12, 6, 6, "small")
    assert craft_recipe("sem", preset, class_wise=True).start == "warm"
    learned = learn_recipe(preset, perturbation_radius=3, norm="l2", learner="small")
    assert (learned.perturbation.radius, learned.perturbation.norm, learned.model) == (3, "l2", "small")


@pytest.mark.parametrize(("preset", "size"), [*itertools.product(PRESETS, [32]), ("paper", 256)])
def test_at_perturbation_radius_0_a_method_perturbs_nothing(preset, size):
    images = torch.rand(2, 3, 8, 8)
    for method in ("em", "rem", "sem"):
        made = craft_recipe(method, preset, perturbation_radius=0, size=size)
        for side in (made.noise_side, made.surrogate_side):
            assert side(None, images, torch.zeros(2, dtype=int), torch.Generator()).equal(images) and side.passes == 0


def test_a_sweeps_recipes_are_the_presets():
    crafts, learners = sweep_recipes(("clean", "rem"), (0, 4), "demo")
    assert crafts == {"clean": None, "rem": craft_recipe("rem", "demo")}
    assert learners == {r: learn_recipe("demo", perturbation_radius=r) for r in (0, 4)}


def test_a_sweep_takes_other_nets_where_a_method_has_one():
    crafts, learners = sweep_recipes(("clean", "rem", "cuda"), (4,), surrogate="small", learner="conv4")
    assert crafts["rem"] == craft_recipe("rem", surrogate="small")
    assert crafts | {"rem": None} == {"clean": None, "rem": None, "cuda": ClassFilters()}
    assert learners == {4: learn_recipe(perturbation_radius=4, learner="conv4")}
    with pytest.raises(ValueError, match="no surrogate in clean, cuda: leave the surrogate small out"):
        sweep_recipes(("clean", "cuda"), (4,), surrogate="small")


@pytest.mark.parametrize("make", [craft_recipe, lambda _, preset: learn_recipe(preset)])
def test_an_unknown_preset_is_met_with_the_nearest(make):
    with pytest.raises(ValueError, match="unknown preset 'lessons'; did you mean lesson"):
        make("sem", "lessons")


@pytest.mark.parametrize("radius", ["eight", None, 8 / 255])
def test_a_radius_that_is_none_is_refused_by_name(radius):
    for make in (craft_recipe, learn_recipe):
        with pytest.raises(ValueError, match=r"^perturbation_radius"):
            make(perturbation_radius=radius)
    with pytest.raises(ValueError, match=r"^radius"):
        craft_recipe(radius=radius)
    assert craft_recipe(radius="8") == craft_recipe(radius=8)


def test_noise_of_less_than_a_level_is_refused_not_made_of_zeros():
    with pytest.raises(ValueError, match=r"radius must be 1 level at least, .* got 0\.9"):
        CraftRecipe(radius=0.9)
    with pytest.raises(ValueError, match="radius must be 1 level at least to change 8-bit images, got 0"):
        craft_recipe("sem", "quick", radius=0)
    assert CraftRecipe(radius=0).radius == 0 and CraftRecipe(radius=1).radius == 1


# -- SGD ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "words"), [
    ({"steps": -1}, "steps must be a whole number >= 1, got -1"),
    ({"batch": 1}, "batch must be a whole number >= 2, got 1"),
    ({"lr": -0.1}, "lr must be a finite number >= 0, got -0.1"),
    ({"momentum": float("nan")}, "momentum must be a finite number >= 0, got nan"),
    ({"weight_decay": float("inf")}, "weight_decay must be a finite number >= 0, got inf"),
    ({"warmup": 1.5}, "warmup is a share, 0 to 1, got 1.5"),
])  # fmt: skip
def test_a_descent_that_cannot_be_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SGD(**fields)


def test_without_milestones_the_rate_is_a_triangle():
    sgd = SGD(steps=100, lr=0.2, warmup=0.2)
    rates = [sgd.rate(step) for step in range(100)]
    assert rates == pytest.approx([0.2 * min((s + 0.5) / 20, (99.5 - s) / 80) for s in range(100)])
    assert 15 < rates.index(max(rates)) < 25 and max(rates) <= 0.2


def test_without_a_warmup_the_rate_only_falls_and_with_nothing_else_it_only_rises():
    falling, rising = ([SGD(steps=4, lr=0.8, warmup=share).rate(step) for step in range(4)] for share in (0, 1))
    assert falling == pytest.approx([0.7, 0.5, 0.3, 0.1]) and rising == pytest.approx([0.1, 0.3, 0.5, 0.7])


def test_at_every_milestone_the_rate_falls_by_ten():
    sgd = SGD(steps=6, lr=0.1, milestones=(2, 4))
    assert [sgd.rate(step) for step in range(6)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    weights = torch.nn.Linear(1, 1)
    optimizer = sgd.optimizer(weights)
    sgd.set_rate(optimizer, 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rate_of_every_preset_comes_down(preset):
    made = [craft_recipe(method, preset, size=size) for method in ("em", "rem", "sem") for size in (32, 256)]
    made += [learn_recipe(preset, perturbation_radius=radius) for radius in (0, 4)]
    for sgd in (recipe.sgd for recipe in made):
        rates = [sgd.rate(step) for step in range(sgd.steps)]
        assert max(rates) <= sgd.lr
        if sgd.milestones:
            assert 0 < rates[-1] < sgd.lr / 40
        else:  # a line that reaches zero half a step after the last one
            assert rates[-1] == pytest.approx(sgd.lr * 0.5 / sgd.steps / (1 - sgd.warmup))


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own():
    batches = [index for _, index in SGD(steps=9, batch=4).batches(14, 5, ENGINE)]
    epochs = [torch.cat(batches[first : first + 3]).tolist() for first in (0, 3, 6)]
    assert all(len(index) == 4 for index in batches)  # two images a time are left over, others each time
    assert all(len(set(epoch)) == 12 for epoch in epochs) and set(itertools.chain(*epochs)) == set(range(14))
    assert len({tuple(epoch) for epoch in epochs}) == 3 and all(sorted(epoch) != epoch for epoch in epochs)


def test_a_resumed_run_sees_the_batches_it_would_have_seen():
    sgd = SGD(steps=9, batch=4)
    whole = [(step, index.tolist()) for step, index in sgd.batches(14, 5, ENGINE)]
    assert [(step, index.tolist()) for step, index in sgd.batches(14, 5, ENGINE, start=4)] == whole[4:]
