"""The lessons' designs differ in what they say and in nothing else; rows of their noises are what measure says."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from photos import image_set, image_split
from torch.nn.functional import cross_entropy

from semkit.analysis.cost import passes_of
from semkit.analysis.designs import (
    DEFENCES,
    DESIGNS,
    LEARNERS,
    FrozenRecipe,
    frozen_judge,
    learners_after,
    noise_parts,
    noise_sides,
    pairs,
    sides_alone,
)
from semkit.analysis.measure import (
    ALONG,
    cosine,
    loss_rows,
    losses,
    losses_along,
    noise_part,
    noise_rows,
    rise_rows,
    robustness,
    stability,
)
from semkit.analysis.report import read_rows
from semkit.analysis.statistics import protection_for_passes
from semkit.analysis.study import crafted_surrogate, grid
from semkit.countermeasures.registry import COUNTERMEASURES
from semkit.images.augment import FlipCrop, Identity
from semkit.images.imageset import Split
from semkit.lessons.craftrun import settings
from semkit.nets.engine import Engine, predict
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.methods import craft_recipe
from semkit.training.learning import fit
from semkit.training.perturb import NFGSM, PGD, Clean, Uniform
from semkit.training.recipes import SGD, attack, lasting, learn_recipe

ENGINE = Engine("cpu", "float32")
ERM = learn_recipe("quick")
SMALL, SHORT = Split(image_set(10), image_set(8, seed=1)), lasting(craft_recipe("sem", "quick"), 4)


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


def test_the_frontier_saves_one_thing_after_the_other_down_to_the_preset_at_a_twentieth_of_the_published_passes():
    made, sem, published = (
        DESIGNS["frontier"]("lesson", 32),
        craft_recipe("sem", "lesson"),
        craft_recipe("sem", "paper"),
    )
    clean, plain, two, *cheaper = made.values()
    assert clean is None and plain == replace(published, surrogate="tiny", sgd=SGD(steps=930, batch=64))
    assert two == replace(sem, surrogate_side=attack(4, 2), steps=2, samples=2, step_size=3, sgd=plain.sgd)
    single, half = replace(two, samples=1, surrogate_side=NFGSM(4)), SGD(steps=1116, batch=16)
    assert cheaper == [replace(two, steps=4, samples=1), single, sem, replace(sem, sgd=half)]
    cost = [recipe.cost(4000).total for recipe in (plain, two, *cheaper)]
    assert cost == sorted(cost, reverse=True) and 20 * cost[-2] <= cost[0]


def test_the_rows_of_the_frontier_cost_what_the_recipes_cost():
    rows = read_rows(Path(__file__).parents[1] / "results/frontier/rows.csv")
    passes = protection_for_passes(rows, 4000).groupby("method")["passes"].first()
    made = {
        name: recipe.cost(4000).total / 4000 for name, recipe in DESIGNS["frontier"]("lesson", 32).items() if recipe
    }
    assert passes.to_dict() == made


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


def test_parts_are_of_the_noise_that_the_same_seed_makes_and_take_no_passes_of_their_own(tmp_path):
    split, made, lab = image_split(20), noise_parts("quick", 32), Lab(ENGINE, tmp_path)
    assert list(made)[:3] == ["clean", "em", "em, low"] and len(made) == 11
    assert (made["em"], made["sem"]) == tuple(craft_recipe(method, "quick") for method in ("em", "sem"))
    whole, _, _ = made["sem"].crafted(split.train, seed=1, lab=lab)
    kept = Lab(ENGINE, tmp_path, lambda what, *_: pytest.fail(f"{what}: the whole noise was kept"))
    for part in ("low", "high", "grey", "colour"):
        recipe = made[f"sem, {part}"]
        noise, cost, _ = recipe.crafted(split.train, seed=1, lab=kept)
        assert torch.equal(noise.levels, noise_part(whole.levels, part)) and noise.radius == 8
        assert cost["passes"] == recipe.cost(20).total == 0


@pytest.mark.whole
def test_shares_of_sem_images_are_of_one_noise_a_seed_which_is_crafted_once(tmp_path):
    made, split, lab = DESIGNS["partial"]("quick", 32), image_split(20), Lab(ENGINE, tmp_path)
    assert made["sem"] == craft_recipe("sem", "quick") and len(made) == 12
    whole, cost = made["sem"].apply(split.train, seed=1, lab=lab)
    kept = Lab(ENGINE, tmp_path, lambda what, *_: pytest.fail(f"{what}: the whole noise was kept"))
    for share in (20, 40, 60, 80, 90):
        mixture, told = made[f"{share}% protected"].apply(split.train, seed=1, lab=kept)
        rest, _ = made[f"the other {100 - share}% alone"].apply(split.train, seed=1)
        clean = (mixture.images == split.train.images).flatten(1).all(1)
        assert told == cost and len(rest) == clean.sum() == 20 * (100 - share) // 100
        assert torch.equal(mixture.images[~clean], whole.images[~clean])
    assert passes_of([recipe for recipe in made.values() if recipe], 20).total == cost["passes"]


@pytest.mark.whole
def test_noise_rows_are_the_measures_of_every_noise(tmp_path):
    lab, em = Lab(ENGINE, tmp_path), replace(SHORT, noise_side=Clean(), surrogate_side=Clean())
    crafts = {"clean": None, "sem": SHORT, "em": em}
    rows = noise_rows(SMALL, crafts, seeds=(0, 1), reference=SHORT, lab=lab)
    assert rows[["seed", "method"]].values.tolist() == [[0, "sem"], [0, "em"], [1, "sem"], [1, "em"]]
    made = {(m, s): crafted_surrogate(SMALL.train, crafts[m], seed=s, lab=lab) for m in ("sem", "em") for s in (0, 1)}
    for row in rows.to_dict("records"):
        (noise, surrogate), (other, _) = (made[row["method"], seed] for seed in (row["seed"], 1 - row["seed"]))
        protected = SMALL.train.with_noise(noise.levels)
        assert row["surrogate_robustness"] == robustness(surrogate, SMALL.test, 4)
        assert row["noise_robustness"] == robustness(surrogate, protected, 4)
        assert row["reference_robustness"] == robustness(made["sem", row["seed"]][1], protected, 4)
        judge = made["sem", 1 - row["seed"]][1]
        assert row["other_robustness"] == robustness(judge, protected, 4)
        assert row["other_loss"] == float(losses(judge, protected, augment=FlipCrop()).mean())
        assert row["noise_loss"] < -row["noise_robustness"]
        assert (row["noise_stability"], row["noise_variance"]) == stability(surrogate, protected, 4)
        assert row["cosine"] == pytest.approx(float(cosine(noise.levels, other.levels).mean()))
    assert not torch.equal(made["sem", 0][0].levels, made["em", 0][0].levels)


@pytest.mark.whole
def test_a_noise_is_measured_once_and_measuring_can_be_stopped_between_two(tmp_path):
    crafts = {"sem": SHORT}
    with pytest.raises(Interrupted, match="stopped while measuring noise, 1 of 2"):
        noise_rows(SMALL, crafts, seeds=(0, 1), lab=Lab(ENGINE, tmp_path, lambda what, *_: what == "measuring noise"))
    (measured,) = tmp_path.glob("measured-*.json")
    changed = {**json.loads(measured.read_text()), "noise_stability": 7.0}
    measured.write_text(json.dumps(changed))
    rows = noise_rows(SMALL, crafts, seeds=(0, 1), lab=Lab(ENGINE, tmp_path))
    assert rows["noise_stability"][0] == 7 != rows["noise_stability"][1]


@pytest.mark.whole
def test_one_seed_has_no_other_to_compare_with(tmp_path):
    rows = noise_rows(SMALL, {"sem": SHORT}, lab=Lab(ENGINE, tmp_path))
    assert len(rows) == 1 and rows["cosine"].isna().all() and "reference_robustness" not in rows
    judged = noise_rows(SMALL, {"sem": SHORT}, reference=SHORT, lab=Lab(ENGINE, tmp_path))
    assert judged["reference_loss"].notna().all() and "other_loss" not in judged


@pytest.mark.whole
def test_loss_rows_are_the_losses_of_every_noise_under_its_own_surrogate(tmp_path):
    lab = Lab(ENGINE, tmp_path)
    rows = loss_rows(SMALL, {"clean": None, "sem": SHORT}, seeds=(0, 1), lab=lab)
    assert len(rows) == 2 * 2 * len(ALONG) and set(rows["method"]) == {"sem"}
    noise, surrogate = crafted_surrogate(SMALL.train, SHORT, seed=1, lab=lab)
    along = losses_along(surrogate, SMALL.train.with_noise(noise.levels), ALONG)
    mine = rows[rows["seed"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine[["method", "seed", *along]], along.assign(method="sem", seed=1)[[*mine]])


def test_losses_without_noise_that_a_surrogate_made_are_one_line():
    with pytest.raises(ValueError, match="none of these recipes adds noise that a surrogate made"):
        loss_rows(image_split(20), {"clean": None})


def loss_at(net, images, u=0):
    return float(cross_entropy(predict(net, ENGINE.images(images.images) + u), images.labels))


@pytest.mark.whole
def test_rises_are_of_the_learners_loss_under_perturbations_of_several_nets(tmp_path):
    split, lab = SMALL, Lab(ENGINE, tmp_path)
    crafts, young = {"clean": None, "sem": SHORT}, lasting(learn_recipe("quick", perturbation_radius=4), 4)
    learners = {4: young, "ERM": lasting(ERM, 4)}
    grid(split, crafts, learners, keep_nets=True, seeds=(0, 1), lab=lab)
    trained = Lab(ENGINE, tmp_path, lambda what, *_: pytest.fail(f"{what}: its net was kept"))
    rows = rise_rows(split, crafts, learners, seeds=(0, 1), lab=trained)
    kinds = ["random", "generation-time", "another surrogate's", "evaluation-time"]
    assert rows["perturbation"].tolist() == 4 * kinds and set(rows["method"]) == {"sem"}
    assert rows["learner"].tolist()[:8] == 4 * ["4"] + 4 * ["ERM"] and set(rows["training_radius"]) == {0, 4}
    noise, surrogate = crafted_surrogate(split.train, SHORT, seed=1, lab=lab)
    protected = split.train.with_noise(noise.levels)
    learner = fit(protected, split.test, learners[4], seed=1, lab=Lab(ENGINE)).model
    x, moved = ENGINE.images(protected.images), {}
    for kind, by in {
        "generation-time": surrogate,
        "another surrogate's": crafted_surrogate(split.train, SHORT, seed=0, lab=lab)[1],
        "evaluation-time": learner,
    }.items():
        moved[kind] = PGD(4)(by, x, protected.labels, ENGINE.generator(1, "rise")) - x
    mine = rows[(rows["seed"] == 1) & (rows["learner"] == "4")].set_index("perturbation")
    for kind, u in moved.items():
        assert mine["loss"][kind] == pytest.approx(loss_at(learner, protected, u), rel=1e-5)
        assert mine["rise"][kind] == pytest.approx(mine["loss"][kind] - loss_at(learner, protected), rel=1e-4)
        assert mine["cosine"][kind] == pytest.approx(float(cosine(u, moved["evaluation-time"]).mean()), rel=1e-4)
    assert mine["rise"].idxmax() == "evaluation-time"


def test_without_another_seed_there_is_no_other_surrogate(tmp_path):
    rows = rise_rows(SMALL, {"sem": SHORT}, {0: lasting(ERM, 4)}, lab=Lab(ENGINE, tmp_path))
    assert rows["perturbation"].tolist() == ["random", "generation-time", "evaluation-time"]


def test_a_frozen_judge_differs_in_the_noise_side_only_and_the_dose_grows():
    made = frozen_judge("demo", 32)
    assert made.pop("clean") is None
    assert {replace(recipe, noise_side=Clean()) for recipe in made.values()} == {
        FrozenRecipe(craft_recipe("sem", "demo"))
    }
    doses = {name: recipe.noise_side for name, recipe in made.items()}
    assert [doses[f"adversarial {r}"] for r in (1, 2, 4, 6, 8)] == [PGD(r, 5, r / 4) for r in (1, 2, 4, 6, 8)]
    assert (doses["none 0"], doses["random 4"], doses["random 8"]) == (Clean(), Uniform(4), Uniform(8))
    assert frozen_judge("demo", 32, SHORT)["none 0"] == FrozenRecipe(SHORT)


def test_a_frozen_judge_learns_nothing_from_the_noise_that_is_made_against_it(tmp_path):
    split, lab = image_split(20), Lab(ENGINE, tmp_path)
    recipe = FrozenRecipe(SHORT, PGD(4, 2), steps=5, samples=2)
    judge = crafted_surrogate(split.train, recipe.judge, seed=1, lab=lab)[1]
    noise, cost, net = recipe.crafted(split.train, seed=1, lab=lab)
    assert all(torch.equal(value, judge.state_dict()[name]) for name, value in net.state_dict().items())
    assert cost["passes"] == recipe.cost(20).total == 20 * 5 * 2 * 3
    assert 4 <= noise.levels.abs().max() <= 8 == noise.radius
    protected = split.train.with_noise(noise.levels)
    assert losses(judge, protected).mean() < losses(judge, split.train).mean()
    again, _, _ = recipe.crafted(split.train, seed=1, lab=Lab(ENGINE, tmp_path, lambda *_: pytest.fail("was kept")))
    assert torch.equal(again.levels, noise.levels)
    assert not torch.equal(replace(recipe, steps=4).crafted(split.train, seed=1, lab=lab)[0].levels, noise.levels)


@pytest.mark.whole
def test_noise_withstands_that_radius_of_pgd_best_which_it_was_crafted_against(tmp_path):
    split, judge, found = image_split(20), lasting(craft_recipe("sem", "quick"), 8), {}
    for side in (Clean(), PGD(4, 5, 1), PGD(8, 5, 2)):
        noise, surrogate = crafted_surrogate(
            split.train, FrozenRecipe(judge, side, steps=60, augment=Identity()), lab=Lab(ENGINE, tmp_path)
        )
        protected = split.train.with_noise(noise.levels)
        found[side.radius] = {r: float(losses(surrogate, protected, PGD(r)).mean()) for r in (0, 4, 8)}
    for radius in found:
        assert min(found, key=lambda crafted_against: found[crafted_against][radius]) == radius


def test_a_judge_is_counted_once_for_all_its_noises():
    recipes = [recipe for recipe in frozen_judge("quick", 32).values() if recipe]
    each = sum(recipe.cost(20).total for recipe in recipes)
    assert passes_of(recipes, 20).total == each + craft_recipe("sem", "quick").cost(20).total


def test_learners_of_several_ages_differ_in_their_steps_only():
    made = LEARNERS["stability"]("demo", 32, image_split())
    whole = learn_recipe("demo", perturbation_radius=4)
    assert {name: recipe.sgd.steps for name, recipe in made.items()} == {
        f"AT 4/255, {n} steps": n for n in (100, 300, 600)
    }
    assert {replace(recipe, sgd=whole.sgd) for recipe in made.values()} == {whole}
    shorter = LEARNERS["stability"]("demo", 32, image_split(), 60)
    assert [recipe.sgd.steps for recipe in shorter.values()] == [10, 30, 60]


def test_every_design_has_unprotected_images_to_compare_with():
    assert all(design("quick", 32)["clean"] is None for design in DESIGNS.values())


def test_a_design_that_somebody_changes_is_whole_for_the_next():
    for design in DESIGNS.values():
        design("quick", 32).clear()
        assert "clean" in design("quick", 32)


def test_fine_tuning_goes_on_from_one_net_with_all_layers_or_the_last_one_alone():
    spare, names = image_set(20), DEFENCES
    made = learners_after(names, "quick", 32, replace(image_split(), spare=spare))
    every, last = made["fine-tuned"], made["last layer"]
    assert (every.pretrained.last_layer, last.pretrained.last_layer) == (False, True)
    assert repr(replace(last.pretrained, last_layer=False)) == repr(every.pretrained)
    assert replace(last, pretrained=every.pretrained) == every and every.pretrained.images is spare
    assert made["AT L2 0.5"].perturbation == COUNTERMEASURES["at-l2"].change() == PGD(127.5, 10, norm="l2")
    assert made.keys() - learners_after(names, "quick", 32, image_split()).keys() == {"fine-tuned", "last layer"}


def test_the_map_has_what_the_panels_knobs_ask_for():
    made = DESIGNS["map"]("demo", 32)
    assert len(made) == 1 + 5 * 5 * 2 and made["8-600-4"] == craft_recipe("sem", "demo")
    for knobs in ("2-75-0", "16-1200-4"):
        radius, steps, around = map(int, knobs.split("-"))
        asked = settings("sem", "demo", radius=radius, surrogate_steps=steps, perturbation_radius=around)
        assert made[knobs] == asked.recipe
    assert made["2-75-0"].noise_side == made["2-75-0"].surrogate_side == Clean()
    assert made["8-600-0"] == sides_alone("demo", 32)["em, SEM's recipe"]
