"""What work will cost: a sum over its recipes, from one probe of each net."""

import os
from pathlib import Path

import pytest
import torch
from pages import fresh_pages
from photos import image_set

from semkit.analysis.cost import passes_of, peak_memory, probe, seconds_of
from semkit.countermeasures.augmentations import Cutout
from semkit.images.augment import FlipCrop, Identity, ResizedCrop
from semkit.nets.engine import Engine, count_passes
from semkit.protections.methods import craft_recipe
from semkit.training.recipes import learn_recipe

ENGINE = Engine("cpu", "float32")
SEM, ERM, AT = craft_recipe("sem", "quick"), learn_recipe("quick"), learn_recipe("quick", perturbation_radius=4)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("augment", [Identity(), FlipCrop(2), Cutout(3), ResizedCrop(8)], ids=repr)
def test_every_net_can_be_probed_as_crafting_runs_it(augment, layout, samples):
    engine = Engine("cpu", "float32", layout=layout)
    with count_passes() as passes:
        gradient, training = probe("tiny", 3, 12, 4, samples, augment, engine)
    assert gradient > 0 and training > 0 and passes.total == 0


def test_a_learner_that_makes_no_gradients_is_probed_for_its_training_steps_alone():
    gradient, training = probe("tiny", 3, 8, 4, None, FlipCrop(), ENGINE)
    assert gradient == 0 and training > 0


def test_seconds_are_of_all_recipes_and_none_where_a_probe_is_needed_and_not_wanted():
    train = image_set(20, size=9)  # a size of no other test here

    def seconds(*recipes, may_probe=False):
        return seconds_of(recipes, train, ENGINE, may_probe=may_probe)

    sem = seconds(SEM, may_probe=True)
    assert seconds(SEM) == sem > 0
    assert seconds(ERM) is None and seconds(SEM, ERM) is None
    both = seconds(SEM, ERM, may_probe=True)
    assert seconds(SEM, ERM) == both > sem
    assert seconds(SEM, SEM, ERM) == pytest.approx(sem + both)


def test_passes_are_of_all_recipes():
    expected = SEM.cost(20).total + 2 * AT.cost(20).total
    assert passes_of([SEM, AT, AT], 20).total == expected


def test_peak_memory_rises_with_what_is_held_and_never_falls():
    before, pages = peak_memory(), Path("/proc/self/statm")
    now = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0
    held = fresh_pages(before - now + 2**26)  # up to the peak, and 64 MiB beyond
    after = peak_memory()
    assert 2**25 < after - before < 2**27 or not now
    del held
    assert peak_memory() > after - 2**22  # the kernel counts pages in batches
