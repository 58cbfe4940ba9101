"""What a probe runs is what work runs: the same shapes, with the list that it will have."""

from collections import Counter

import pytest
import torch

from semkit import flat, models, prediction
from semkit.augment import Cutout, FlipCrop, Identity, ResizedCrop
from semkit.engine import Engine
from semkit.presets import craft_recipe, learn_recipe

LAYOUTS = torch.channels_last, torch.contiguous_format
AUGMENTS = Identity(), FlipCrop(2), Cutout(3), ResizedCrop(8)


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("augment", AUGMENTS, ids=lambda t: type(t).__name__)
def test_the_later_gradients_of_a_probe_come_from_its_list(augment, layout, samples, monkeypatch):
    made, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *given, **how: made.append(build(*given, **how)) or made[-1])
    monkeypatch.setattr(flat, "_calls", Counter())
    engine = Engine("cpu", "float32", layout=layout)
    images, first, later, training = prediction._probed("tiny", 3, 12, 4, samples, augment, engine)
    assert images == 100 * 4 * max(1, samples) and min(first, later, training) > 0
    called = {shape for _, shape in flat._calls}  # without a list
    assert called == set(made[0].flat.written) and len(called) == 1


def test_of_a_learner_that_makes_no_gradients_none_is_timed(monkeypatch):
    monkeypatch.setattr(prediction, "_speeds", {})
    monkeypatch.setattr(flat, "_calls", Counter())
    engine, erm = Engine("cpu", "float32"), learn_recipe("quick")
    seconds = prediction.seconds([erm], 20, 3, 8, engine)
    [(images, first, later, training)] = prediction._speeds.values()
    assert (images, first, later) == (0, 0, 0) and not flat._calls
    assert seconds == erm.cost(20).training * training > 0


def test_seconds_are_of_all_recipes_and_none_where_a_probe_is_needed_and_not_wanted(monkeypatch):
    engine, sem, at = (
        Engine("cpu", "float32"),
        craft_recipe("sem", "quick"),
        learn_recipe("quick", perturbation_radius=4),
    )
    key = lambda recipe, net, samples: (net, 3, 8, 20, samples, recipe.augment, engine)  # noqa: E731
    monkeypatch.setattr(prediction, "_speeds", {key(sem, sem.surrogate, 1): (0, 9.0, 2.0, 1.0)})
    assert prediction.seconds([sem, at], 20, 3, 8, engine, probe=False) is None
    prediction._speeds[key(at, at.model, 0)] = 10**9, 3.0, 9.0, 0.0
    passes, more = sem.cost(20), at.cost(20)
    expected = 2 * passes.input_gradient + passes.training + 3 * more.input_gradient
    assert prediction.seconds([sem, at], 20, 3, 8, engine, probe=False) == expected
