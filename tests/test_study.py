"""Kept runs: found again at once, never taken for one another, and complete rows."""

import ast
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from photos import image_set, image_split

import semkit
from semkit.analysis.cost import passes_of
from semkit.analysis.report import as_objects
from semkit.analysis.study import crafted_noise, crafted_surrogate, grid, grid_recipes, learned_net, learned_row
from semkit.countermeasures.trainers import Gaussian, Smoothed
from semkit.images.augment import Identity
from semkit.nets.engine import Engine, predict
from semkit.nets.lab import Lab, key
from semkit.protections.base import CleanPart, PartlyProtected
from semkit.protections.crafting import CraftRecipe, Interrupted, craft
from semkit.protections.cuda import ClassFilters, class_filters, convolve_set
from semkit.protections.methods import sweep_recipes
from semkit.protections.noise import load, save
from semkit.training.bullettrain import KINDS, BulletTrain
from semkit.training.learning import accuracy, fit
from semkit.training.objectives import Trades
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import SGD, LearnRecipe, Pretrained, learn_recipe

ENGINE = Engine("cpu", "float32")
CRAFT = CraftRecipe(Uniform(4), PGD(4, 1), steps=1, samples=1, surrogate="tiny", sgd=SGD(steps=4, batch=8))
LEARN = LearnRecipe(model="tiny", sgd=SGD(steps=4, batch=8), evaluations=2)


def stamps(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def never(*_):
    raise AssertionError("this run was kept and must not be made again")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The cache of noise and of a learner, to be read only."""
    split, folder = image_split(20), tmp_path_factory.mktemp("kept")
    crafted_noise(split.train, CRAFT, lab=Lab(ENGINE, folder))
    learned_row(split.train, split.test, LEARN, lab=Lab(ENGINE, folder))
    return folder


@pytest.fixture
def kept_runs(pristine, tmp_path):
    """A copy of that cache."""
    return shutil.copytree(pristine, tmp_path / "kept")


def test_a_second_call_is_the_kept_result_and_touches_no_file(tmp_path):
    split, how = image_split(20), {"lab": Lab(ENGINE, tmp_path)}
    noise, cost = crafted_noise(split.train, CRAFT, **how)
    row = learned_row(split.train, split.test, LEARN, **how)
    before = stamps(tmp_path)
    assert sorted(name.partition("-")[0] + name[name.rindex(".") :] for name in before) == [
        "learner.json", "noise.json", "noise.safetensors", "noise.weights",
    ]  # fmt: skip
    again, cost_again = crafted_noise(split.train, CRAFT, lab=Lab(ENGINE, tmp_path, never))
    assert torch.equal(again.levels, noise.levels) and again.recipe == noise.recipe and cost_again == cost
    assert learned_row(split.train, split.test, LEARN, lab=Lab(ENGINE, tmp_path, never)) == row
    assert stamps(tmp_path) == before


def test_a_learner_of_noise_is_judged_on_noisy_copies_too():
    split, recipe = image_split(classes=3), replace(LEARN, perturbation=Gaussian())
    row = learned_row(split.train, split.test, recipe, lab=Lab(ENGINE))
    model = fit(split.train, split.test, recipe, lab=Lab(ENGINE)).model
    assert row["smoothed"] == accuracy(Smoothed(model, Gaussian()), split.test)
    assert row["last"] == accuracy(model, split.test)
    assert "smoothed" not in learned_row(split.train, split.test, LEARN, lab=Lab(ENGINE))


def test_without_a_cache_the_result_is_the_same(tmp_path):
    split = image_split(20)
    kept, _ = crafted_noise(split.train, CRAFT, lab=Lab(ENGINE, tmp_path))
    assert torch.equal(kept.levels, crafted_noise(split.train, CRAFT, lab=Lab(ENGINE))[0].levels)


def other_images():
    images = image_set(20)
    pixels = images.images.clone()
    pixels[7, 0, 0, 0] ^= 1
    return {
        "one pixel": replace(images, images=pixels),
        "one label": replace(images, labels=images.labels.clone().index_fill_(0, torch.tensor([4]), 1)),
        "another order": images.take(torch.arange(19, -1, -1)),
        "one image fewer": images.take(slice(19)),
    }


@pytest.mark.parametrize("change", ["seed", "precision", *other_images()])
def test_whatever_changes_the_result_is_another_run(kept_runs, change):
    split, files = image_split(20), len(stamps(kept_runs))
    engine = Engine("cpu", "float64") if change == "precision" else ENGINE
    how = {"seed": int(change == "seed"), "lab": Lab(engine, kept_runs)}
    images = other_images().get(change, split.train)
    crafted_noise(images, CRAFT, **how)
    learned_row(images, split.test, LEARN, **how)
    assert len(stamps(kept_runs)) == 2 * files


def test_a_seed_of_arange_is_the_kept_run_of_that_number(kept_runs):
    before, split = stamps(kept_runs), image_split(20)
    [seed] = np.arange(1)
    assert crafted_noise(split.train, CRAFT, seed=seed, lab=Lab(ENGINE, kept_runs))[0].recipe["seed"] == 0
    learned_row(split.train, split.test, LEARN, seed=seed, lab=Lab(ENGINE, kept_runs, never))
    assert stamps(kept_runs) == before


def test_a_file_of_ones_own_is_not_overwritten_by_a_net(tmp_path):
    images, mine = image_set(16), tmp_path / "thesis.txt"
    mine.write_text("three years of work")
    with pytest.raises(ValueError, match="is no net that semkit can read"):
        learned_net(images, images, LEARN, file=mine, lab=Lab(ENGINE, on_step=never))
    assert mine.read_text() == "three years of work"
    for _ in range(2):  # a net may be saved again
        learned_net(images, images, LEARN, file=tmp_path / "net.safetensors", lab=Lab(ENGINE, tmp_path))


def test_what_cannot_be_kept_is_not_made_first(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FileExistsError):
        learned_row(*itertools.repeat(image_set(16), 2), LEARN, lab=Lab(ENGINE, tmp_path / "cache", never))


def test_images_changed_in_place_are_another_run(tmp_path):
    split, how = image_split(20), {"lab": Lab(ENGINE, tmp_path)}
    crafted_noise(split.train, CRAFT, **how)
    learned_row(split.train, split.test, LEARN, **how)
    files = len(stamps(tmp_path))
    split.train.images[3, 0, 0, 0] ^= 1
    noise, _ = crafted_noise(split.train, CRAFT, **how)
    row = learned_row(split.train, split.test, LEARN, **how)
    assert len(stamps(tmp_path)) == 2 * files
    assert torch.equal(noise.levels, craft(split.train, CRAFT, lab=Lab(ENGINE)).noise)
    assert row["curve"] == [list(p) for p in fit(split.train, split.test, LEARN, lab=Lab(ENGINE)).curve]


STUDY = "semkit.analysis.study"
RUNS = {  # what is made -> the module that makes it, and its recipe
    "learner": "STUDY", "noise": "'semkit.protections.base', sk.craft_recipe('sem')",
    "lesson": "'semkit.lessons.savings'", "notebook's own": "'__main__'",
}  # fmt: skip


@pytest.mark.whole
def test_changed_code_makes_new_runs_of_what_runs_it_and_finds_the_other_ones(tmp_path):
    shutil.copytree(Path(semkit.__file__).parent, tmp_path / "semkit", ignore=shutil.ignore_patterns("__pycache__"))
    keys = ", ".join(f"key({of})" for of in RUNS.values())
    text = f"import semkit as sk; from semkit.nets.lab import key; STUDY = {STUDY!r}; print([{keys}])"

    def names(*changed: str) -> dict[str, str]:
        for path in changed:
            with (tmp_path / "semkit" / path).open("a") as file:
                file.write("# changed\n")
        said = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
        return dict(zip(RUNS, ast.literal_eval(said.stdout.decode()), strict=True))

    before = names()
    assert before["learner"] == key(STUDY)  # wherever the package lies
    drawn = names("analysis/figures.py", "lessons/mixtures.py", "app/cli.py")
    assert [of for of in RUNS if drawn[of] != before[of]] == ["notebook's own"]
    crafted = names("protections/crafting.py")
    assert [of for of in RUNS if crafted[of] != drawn[of]] == ["noise", "lesson", "notebook's own"]
    countered = names("countermeasures/pixelwise.py")
    assert [of for of in RUNS if countered[of] != crafted[of]] == ["learner", "lesson", "notebook's own"]


def test_learners_tested_on_other_images_are_other_runs(tmp_path):
    for seed in (1, 2):
        learned_row(image_set(20), image_set(10, seed=seed), LEARN, lab=Lab(ENGINE, tmp_path))
    assert len(stamps(tmp_path)) == 2


CRAFT_CHANGES = {
    "noise_side": PGD(4), "surrogate_side": PGD(4, 2), "radius": 7, "step_size": 1.5, "steps": 2, "samples": 2,
    "start": "zero", "class_wise": True, "augment": Identity(), "surrogate": "small", "sgd": SGD(steps=5, batch=8),
    "fade_in": 0.5, "ramp": 0.5, "colour": 0.5, "surrogate_augment": Identity(),
}  # fmt: skip
LEARN_CHANGES = {
    "perturbation": PGD(4, 1), "model": "small", "sgd": SGD(steps=4, batch=8, lr=0.2), "augment": Identity(),
    "evaluations": 3, "objective": Trades(), "pretrained": Pretrained(image_set(8), LEARN),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "changes"), [(CRAFT, CRAFT_CHANGES), (LEARN, LEARN_CHANGES)])
def test_every_field_of_a_recipe_is_part_of_the_name_of_a_run(recipe, changes):
    assert set(changes) == {field.name for field in fields(recipe)}, "a new field needs a line here"
    recipe = replace(recipe, start="warm") if recipe is CRAFT else recipe
    names = {key(STUDY, replace(recipe, **{name: value})) for name, value in changes.items()}
    assert len({key(STUDY, recipe), *names}) == len(changes) + 1


@pytest.mark.parametrize("lost", ["noise*.safetensors", "noise*.json", "noise*.weights"])
def test_a_run_that_lost_a_file_is_made_again_and_is_the_same(tmp_path, lost):
    images, how = image_set(20), {"lab": Lab(ENGINE, tmp_path)}
    noise, surrogate = crafted_surrogate(images, CRAFT, **how)
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    (gone,) = tmp_path.glob(lost)
    gone.unlink()
    again, same = crafted_surrogate(images, CRAFT, **how)
    assert torch.equal(again.levels, noise.levels)
    assert all(torch.equal(value, surrogate.state_dict()[name]) for name, value in same.state_dict().items())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == files
    assert crafted_noise(images, CRAFT, lab=Lab(ENGINE, tmp_path, never))[1]["passes"] == CRAFT.cost(20).total


def test_a_damaged_surrogate_that_is_deleted_as_told_is_made_again(tmp_path):
    images, how = image_set(20), {"lab": Lab(ENGINE, tmp_path)}
    crafted_surrogate(images, CRAFT, **how)
    (path,) = tmp_path.glob("noise*.weights")
    path.write_bytes(b"what is this")
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*; delete it to make it again"):
        crafted_surrogate(images, CRAFT, lab=Lab(ENGINE, tmp_path, never))
    path.unlink()
    assert crafted_surrogate(images, CRAFT, **how) and path.exists()


@pytest.mark.parametrize("kind", ["noise*.safetensors", "noise*.json", "learner*.json"])
def test_a_damaged_kept_file_is_named_and_not_used(kept_runs, kind):
    split, lab = image_split(20), Lab(ENGINE, kept_runs, never)
    (path,) = kept_runs.glob(kind)
    for damage in (b"", path.read_bytes()[:-1], b"\xff\xfe\0 what is this"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*; delete it to make it again"):
            if kind.startswith("noise"):
                crafted_noise(split.train, CRAFT, lab=lab)
            else:
                learned_row(split.train, split.test, LEARN, lab=lab)


@pytest.mark.parametrize("kind", ["noise*.safetensors", "noise*.json", "noise*.weights", "learner*.json"])
@pytest.mark.parametrize(
    "content", ["[1]", "null", "{}", "[" * 100_000, '{"passes": "x"}', None], ids=lambda c: str(c)[:5]
)
def test_a_kept_file_of_another_kind_is_named_and_not_used(kept_runs, kind, content):
    split, lab = image_split(20), Lab(ENGINE, kept_runs, never)
    (path,) = kept_runs.glob(kind)
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*; delete it to make it again"):
        crafted_surrogate(split.train, CRAFT, lab=lab)
        learned_row(split.train, split.test, LEARN, lab=lab)


@pytest.mark.parametrize("other", ["louder", "another recipe", "class-wise"])
def test_kept_noise_of_another_recipe_is_named_and_not_used(kept_runs, other):
    (path,) = kept_runs.glob("noise*.safetensors")
    noise = load(path)
    if other == "louder":
        noise = replace(noise, levels=torch.full_like(noise.levels, 60), radius=60)
    elif other == "another recipe":
        noise = replace(noise, recipe={**noise.recipe, "samples": 5})
    else:
        noise = replace(noise, levels=noise.levels[:2], class_wise=True)
    save(noise, path)
    with pytest.raises(ValueError, match=f"{path.name} is damaged .noise of another recipe.*; delete it to make it"):
        crafted_noise(image_set(20), CRAFT, lab=Lab(ENGINE, kept_runs, never))


def test_a_stopped_learner_is_not_kept(tmp_path):
    split = image_split(20)
    with pytest.raises(Interrupted):
        learned_row(split.train, split.test, LEARN, lab=Lab(ENGINE, tmp_path, lambda what, step, *_: step == 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_kept_surrogate_is_the_one_that_made_the_noise(tmp_path, precision):
    engine = Engine("cpu", precision)
    images, how = image_set(20), {"lab": Lab(engine, tmp_path)}
    noise, kept = crafted_surrogate(images, CRAFT, **how)
    made = craft(images, CRAFT, lab=Lab(engine))
    assert torch.equal(noise.levels, made.noise) and not kept.training
    for name, value in made.surrogate.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    again = crafted_surrogate(images, CRAFT, lab=Lab(engine, tmp_path, never))[1]
    x = engine.images(images.images)
    assert torch.equal(predict(again, x), predict(made.surrogate, x))


@pytest.mark.whole
def test_every_seed_of_a_fine_tuned_learner_has_a_pretrained_net_of_its_own_and_its_row_says_so():
    split, before = image_split(20), image_set(20, seed=7)
    still = replace(LEARN, sgd=SGD(steps=1, batch=8, lr=0.0))
    every = Pretrained(before, LEARN)
    learners = {"every": every, "last": replace(every, last_layer=True)}
    learners = {name: replace(still, pretrained=begun) for name, begun in learners.items()}
    rows = grid(split, {"clean": None}, {**learners, "fresh": LEARN}, seeds=(0, 1), lab=Lab(ENGINE))
    assert [row["pretrained_seed"] for row in as_objects(rows)] == [0, 0, None, 1, 1, None]
    first, second = (fit(before, before, LEARN, seed=seed, lab=Lab(ENGINE)).model for seed in (0, 1))
    assert not torch.equal(first[-1].weight, second[-1].weight)
    last = rows[rows["learner"] == "last"]["last"]
    assert list(last) == [accuracy(model, split.test) for model in (first, second)]
    once = passes_of(grid_recipes(split, {"clean": None}, learners), 20).total
    assert once == LEARN.cost(20).total + 2 * still.cost(20).total  # one pretraining for both learners


@pytest.mark.whole
def test_a_grid_has_a_row_for_every_method_radius_and_seed_made_as_it_says(tmp_path):
    split, told = image_split(20), set()
    recipes = sweep_recipes(("clean", "sem"), (0, 4), "quick")
    how = {"seeds": (0, 1)}
    rows = grid(split, *recipes, lab=Lab(ENGINE, tmp_path, lambda what, *_: told.add(what) and False), **how)
    runs = rows[["seed", "method", "training_radius"]].itertuples(index=False, name=None)
    assert list(runs) == list(itertools.product((0, 1), ("clean", "sem"), (0, 4)))
    for row in rows.to_dict("records"):
        assert row["last"] == row["curve"][-1][1] <= row["best"]
        assert (row["noise_passes"] > 0) == (row["method"] != "clean")
        assert row["passes"] == learn_recipe("quick", perturbation_radius=row["training_radius"]).cost(20).total
    spent = rows["passes"].sum() + rows["noise_passes"][::2].sum()
    assert passes_of(grid_recipes(split, *recipes), 20).total * 2 == spent
    jobs = ("sem noise", *(f"{method}, {kind}" for method in ("clean", "sem") for kind in ("ERM", "AT 4/255")))
    assert told == {f"{job}, seed {seed}" for job in jobs for seed in (0, 1)}
    before = stamps(tmp_path)
    pd.testing.assert_frame_equal(grid(split, *recipes, lab=Lab(ENGINE, tmp_path, never), **how), rows)
    assert stamps(tmp_path) == before


def test_a_row_of_a_grid_is_the_learner_on_noisy_training_and_clean_test_images(tmp_path):
    split = image_split(20)
    rows = grid(split, *sweep_recipes(["em"], [0], "quick"), seeds=[3], lab=Lab(ENGINE, tmp_path))
    (path,) = tmp_path.glob("noise*.safetensors")
    noise = load(path, images=split.train)
    assert noise.recipe["noise_side"] == repr(Clean())
    done = fit(split.train.with_noise(noise.levels), split.test, learn_recipe("quick"), seed=3, lab=Lab(ENGINE))
    assert list(rows["curve"]) == [[list(point) for point in done.curve]]


def test_a_grid_of_filters_is_learners_on_filtered_images_tested_on_filtered_ones_too(tmp_path):
    split, how = image_split(20), {"lab": Lab(ENGINE, tmp_path)}
    crafts = {"clean": None, "cuda": ClassFilters(), "one": ClassFilters(assignment="one"), "rest": CleanPart(0.5)}
    rows = grid(split, crafts, {"ours": LEARN}, seeds=[3], **how)
    of = rows.set_index("method")
    filters = class_filters("semkit seed 3", 2)
    done = fit(convolve_set(split.train, filters), split.test, LEARN, seed=3, lab=Lab(ENGINE))
    assert of.at["cuda", "curve"] == [list(point) for point in done.curve] and of.at["cuda", "learner"] == "ours"
    for name, tested in (("own", filters), ("permuted", filters.roll(-1, 0))):
        filtered = convolve_set(split.test, tested)
        assert of.at["cuda", f"on_{name}"] == accuracy(done.model, filtered)
    assert of.loc[["clean", "one", "rest"], "on_own"].isna().all()
    rest, _ = CleanPart(0.5).apply(split.train, seed=3)
    half, _ = PartlyProtected(ClassFilters(), 0.5).apply(split.train, seed=3)
    untouched = (half.images == split.train.images).flatten(1).all(1)
    assert torch.equal(rest.images, split.train.images[untouched]) and len(rest) == 10
    again = grid(split, crafts, {"ours": LEARN}, seeds=[3], lab=Lab(ENGINE, tmp_path, never))
    pd.testing.assert_frame_equal(again, rows)
    assert passes_of(grid_recipes(split, crafts, {"ours": LEARN}), 20).total == rows["passes"].sum()


def test_a_row_of_bullettrain_has_what_its_batches_were_made_of(tmp_path):
    split, told = image_split(20), []
    recipe = replace(LEARN, perturbation=BulletTrain(PGD(4, 2), PGD(4, 1)))
    how, watched = dict(seed=3, lab=Lab(ENGINE, tmp_path)), Lab(ENGINE, tmp_path, lambda *step: told.append(step[3]))
    row = learned_row(split.train, split.test, recipe, seed=3, lab=watched)
    assert row["mined"] == [[round(metrics[kind], 4) for kind in KINDS] for metrics in told]
    assert row["average"] == fit(split.train, split.test, recipe, seed=3, lab=Lab(ENGINE)).mined.average > 0
    assert learned_row(split.train, split.test, recipe, **how) == row
    assert not {"mined", "average"} & set(learned_row(split.train, split.test, LEARN, **how))


def test_seeds_may_be_how_many():
    split, how = image_split(20), {"lab": Lab(ENGINE)}
    assert list(grid(split, {"clean": None}, {0: LEARN}, seeds=2, **how)["seed"]) == [0, 1]
    with pytest.raises(ValueError, match="seeds must be a whole number >= 1, got 0"):
        grid(split, {"clean": None}, {0: LEARN}, seeds=0, **how)


def test_a_run_named_twice_is_one_row_and_no_narrower_interval():
    split, how = image_split(20), {"lab": Lab(ENGINE), "countermeasures": ["bitdepth", "none", "bitdepth"]}
    rows = grid(split, {"clean": None}, {0: LEARN}, seeds=[1, 0, 1], **how)
    assert list(zip(rows["seed"], rows["countermeasure"], strict=True)) == [
        (seed, name) for seed in (1, 0) for name in ("bitdepth", "none")
    ]
