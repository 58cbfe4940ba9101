"""The recipe of gradient descent: rates that fall to nothing, fresh orders in which every image comes once an epoch."""

import itertools

import pytest
import torch

from semkit.nets.engine import Engine
from semkit.protections.methods import craft_recipe
from semkit.training.recipes import PRESETS, SGD, learn_recipe

ENGINE = Engine("cpu", "float32")


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
        assert max(rates) <= sgd.lr and 0 < rates[-1] < sgd.lr / 40


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
