"""The lessons' designs differ in what they say and in nothing else; their noise rows are what measure says."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from photos import image_set, image_split

from semkit.analysis.designs import (
    ALONG,
    DESIGNS,
    LEARNERS,
    budgets,
    learners_after,
    loss_rows,
    noise_rows,
    noise_sides,
    pairs,
    sides_alone,
)
from semkit.analysis.measure import cosine, losses_along, robustness, stability
from semkit.analysis.report import read_rows
from semkit.analysis.statistics import protection_for_passes
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.crafting import craft
from semkit.protections.recipes import craft_recipe
from semkit.training.perturb import PGD, Clean, Uniform

ENGINE = Engine("cpu", "float32")


@pytest.mark.parametrize("preset", ["demo", "lesson", "paper"])
def test_the_nine_pairs_hold_the_three_published_ones_and_differ_in_their_sides_only(preset):
    made, sem = pairs(preset, 32), craft_recipe("sem", preset)
    assert made.pop("clean") is None and len(made) == 9
    assert made["random/adversarial"] == sem
    assert made["adversarial/adversarial"] == replace(sem, noise_side=craft_recipe("rem", preset).noise_side)
    assert made["none/none"] == replace(sem, noise_side=Clean(), surrogate_side=Clean())
    assert len(set(made.values())) == 9
    same = {"noise_side": Clean(), "surrogate_side": Clean()}
    assert {replace(recipe, **same) for recipe in made.values()} == {replace(sem, **same)}


def test_the_budgets_are_the_published_step_and_cheaper_ones_under_one_training():
    made, sem, published = budgets("lesson", 32), craft_recipe("sem", "lesson"), craft_recipe("sem", "paper")
    plain, half = made["plain"], made["1 x 2, half the training"]
    assert made["2 x 2"] == sem and made["1 x 2"] == replace(sem, steps=1)
    same = {"surrogate": sem.surrogate, "sgd": sem.sgd}
    assert plain == replace(published, **same)
    assert half.sgd.steps == sem.sgd.steps // 2 and replace(half, sgd=sem.sgd) == made["1 x 2"]
    assert made["1 x 1, half the training"] == replace(half, samples=1)
    each = {name: recipe.cost(4000).total for name, recipe in made.items() if recipe}
    assert list(each.values()) == sorted(each.values(), reverse=True)
    assert 4 * each["2 x 2"] <= each["plain"]


ROWS = read_rows(Path(__file__).parents[1] / "results/cifar10-budgets/rows.csv")
BUDGETS = protection_for_passes(ROWS, 4000)


def test_the_lesson_takes_a_ninth_of_the_plain_recipes_passes():
    passes = BUDGETS.groupby("method")["passes"].first()
    assert 9 * passes["2 x 2"] <= passes["plain"]
    assert passes["2 x 2"] == craft_recipe("sem", "lesson").cost(4000).total / 4000


def test_the_noise_sides_share_the_surrogate_recipe_and_grow():
    made, sem = noise_sides("demo", 32), craft_recipe("sem", "demo")
    assert made.pop("clean") is None
    assert {replace(recipe, noise_side=Clean()) for recipe in made.values()} == {replace(sem, noise_side=Clean())}
    assert made["random 4"] == sem and made["none 0"].noise_side == Clean()
    assert [made[f"random {r}"].noise_side for r in (2, 4, 8)] == [Uniform(2), Uniform(4), Uniform(8)]
    step = sem.surrogate_side.step_size / 4
    assert made["adversarial 8 x2"].noise_side == PGD(8, 2, 8 * step)


def test_sides_alone_puts_ems_sides_into_sems_recipe():
    made = sides_alone("lesson", 32)
    assert list(made) == ["clean", "em", "em, SEM's recipe", "sem"] and made["clean"] is None
    assert (made["em"], made["sem"]) == tuple(craft_recipe(method, "lesson") for method in ("em", "sem"))
    between = made["em, SEM's recipe"]
    assert replace(made["sem"], noise_side=between.noise_side, surrogate_side=between.surrogate_side) == between
    assert (between.noise_side, between.surrogate_side) == (made["em"].noise_side, made["em"].surrogate_side)


def test_noise_rows_are_the_measures_of_every_noise(tmp_path):
    split = image_split(20)
    quick = craft_recipe("sem", "quick")
    crafts = {"clean": None, "sem": quick, "em": replace(quick, noise_side=Clean(), surrogate_side=Clean())}
    rows = noise_rows(split, crafts, seeds=(0, 1), reference=quick, lab=Lab(ENGINE, tmp_path))
    assert rows[["seed", "method"]].values.tolist() == [[0, "sem"], [0, "em"], [1, "sem"], [1, "em"]]
    made = {(m, s): craft(split.train, crafts[m], seed=s, lab=Lab(ENGINE)) for m in ("sem", "em") for s in (0, 1)}
    for row in rows.to_dict("records"):
        mine, sem = made[row["method"], row["seed"]], made["sem", row["seed"]]
        protected, other = split.train.with_noise(mine.noise), made[row["method"], 1 - row["seed"]]
        assert row["surrogate_robustness"] == robustness(mine.surrogate, split.test, 4)
        assert row["noise_robustness"] == robustness(mine.surrogate, protected, 4)
        assert row["reference_robustness"] == robustness(sem.surrogate, protected, 4)
        assert (row["noise_stability"], row["noise_variance"]) == stability(mine.surrogate, protected, 4)
        assert row["cosine"] == pytest.approx(float(cosine(mine.noise, other.noise).mean()))
    assert not torch.equal(made["sem", 0].noise, made["em", 0].noise)


def test_one_seed_has_no_other_to_compare_with(tmp_path):
    split, quick = image_split(20), craft_recipe("sem", "quick")
    rows = noise_rows(split, {"sem": quick}, lab=Lab(ENGINE, tmp_path))
    assert len(rows) == 1 and rows["cosine"].isna().all() and "reference_robustness" not in rows


def test_loss_rows_are_the_losses_of_every_noise_under_its_own_surrogate(tmp_path):
    split, quick = image_split(20), craft_recipe("sem", "quick")
    rows = loss_rows(split, {"clean": None, "sem": quick}, seeds=(0, 1), lab=Lab(ENGINE, tmp_path))
    assert len(rows) == 2 * 2 * len(ALONG) and set(rows["method"]) == {"sem"}
    made = craft(split.train, quick, seed=1, lab=Lab(ENGINE))
    protected = split.train.with_noise(made.noise)
    along = losses_along(made.surrogate, protected, ALONG)
    mine = rows[rows["seed"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine[["method", "seed", *along]], along.assign(method="sem", seed=1)[[*mine]])


def test_every_design_has_unprotected_images_to_compare_with():
    assert all(design("quick", 32)["clean"] is None for design in DESIGNS.values())


def test_fine_tuning_goes_on_from_one_net_with_all_layers_or_the_last_one_alone():
    spare, names = image_set(20), LEARNERS["cuda-defences"]
    made = learners_after(names, "quick", 32, replace(image_split(), spare=spare))
    every, last = made["fine-tuned"], made["last layer"]
    assert (every.pretrained.last_layer, last.pretrained.last_layer) == (False, True)
    assert repr(replace(last.pretrained, last_layer=False)) == repr(every.pretrained)
    assert replace(last, pretrained=every.pretrained) == every and every.pretrained.images is spare
    assert made.keys() - learners_after(names, "quick", 32, image_split()).keys() == {"fine-tuned", "last layer"}
