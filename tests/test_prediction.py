"""Seconds that work will take: a sum over its recipes, from a probe of each net."""

import pytest
import torch

from semkit.analysis import cost as prediction
from semkit.images.augment import Cutout, FlipCrop, Identity, ResizedCrop
from semkit.nets.engine import Engine
from semkit.protections.presets import craft_recipe, learn_recipe


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("augment", [Identity(), FlipCrop(2), Cutout(3), ResizedCrop(8)], ids=repr)
def test_every_net_can_be_probed_as_crafting_runs_it(augment, layout, samples):
    engine = Engine("cpu", "float32", layout=layout)
    gradient, training = prediction._probed("tiny", 3, 12, 4, samples, augment, engine)
    assert gradient > 0 and training > 0


def test_a_learner_that_makes_no_gradients_takes_its_training_steps_alone(monkeypatch):
    monkeypatch.setattr(prediction, "_speeds", {})
    engine, erm = Engine("cpu", "float32"), learn_recipe("quick")
    seconds = prediction.seconds([erm], 20, 3, 8, engine)
    [(gradient, training)] = prediction._speeds.values()
    assert gradient == 0 and seconds == erm.cost(20).training * training > 0


def test_seconds_are_of_all_recipes_and_none_where_a_probe_is_needed_and_not_wanted(monkeypatch):
    engine, sem, at = (
        Engine("cpu", "float32"),
        craft_recipe("sem", "quick"),
        learn_recipe("quick", perturbation_radius=4),
    )
    key = lambda recipe, net, samples: (net, 3, 8, 20, samples, recipe.augment, engine)  # noqa: E731
    monkeypatch.setattr(prediction, "_speeds", {key(sem, sem.surrogate, 1): (2.0, 1.0)})
    assert prediction.seconds([sem, at], 20, 3, 8, engine, probe=False) is None
    prediction._speeds[key(at, at.model, 0)] = 3.0, 0.0
    passes, more = sem.cost(20), at.cost(20)
    expected = 2 * passes.input_gradient + passes.training + 3 * more.input_gradient
    assert prediction.seconds([sem, at], 20, 3, 8, engine, probe=False) == expected
