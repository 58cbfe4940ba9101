"""Runs of crafting and learning, kept in lab.cache, and grids of them."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from torch import nn

from semkit.analysis.cluster import Group, spread
from semkit.analysis.statistics import learner
from semkit.countermeasures.registry import check_list, counter, learner_after
from semkit.images.files import writable
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import check_count, check_seed
from semkit.nets.engine import how_run
from semkit.nets.lab import Lab, as_json, as_net, kept
from semkit.nets.models import load_net
from semkit.protections.base import NoiseRecipe, Recipe
from semkit.protections.noise import Noise
from semkit.training.learning import accuracy, fit
from semkit.training.recipes import LearnRecipe

NO_NOISE = {"passes": 0, "seconds": 0.0, "engine": None}
ROW = {
    "last": float | int, "best": float | int, "curve": list, "passes": int, "learner_seconds": float | int,
    "engine": str,
}  # fmt: skip
SPARSE = {"pretrained_seed": "Int64"}  # whole numbers that only some rows of a grid have


def crafted_noise(
    images: ImageSet, recipe: NoiseRecipe, *, seed: int = 0, lab: Lab | None = None
) -> tuple[Noise, dict]:
    """Craft the noise of `recipe`: (noise, its cost {"passes", "seconds", "engine": how_run(surrogate)}).

    With lab.cache the noise is read from there if it was crafted before, and kept there otherwise. The state of an
    unfinished run is saved too, and the run resumed. Raises ValueError for a damaged file in the cache.

        noise, cost = sk.crafted_noise(split.train, sk.craft_recipe("sem", "demo"), lab=sk.Lab(cache=sk.runs_folder()))
    """
    noise, cost, _ = recipe.crafted(images, seed=seed, lab=lab)
    return noise, cost


def crafted_surrogate(
    images: ImageSet, recipe: NoiseRecipe, *, seed: int = 0, lab: Lab | None = None
) -> tuple[Noise, nn.Module]:
    """Craft the noise of `recipe`: (noise, surrogate).

    The surrogate is frozen and in eval mode. Both are kept with lab.cache.

        noise, surrogate = sk.crafted_surrogate(split.train, sk.craft_recipe("sem", "demo"))
    """
    noise, _, surrogate = recipe.crafted(images, seed=seed, lab=lab)
    return noise, surrogate.eval().requires_grad_(False)


def _learned(train: ImageSet, test: ImageSet, recipe: LearnRecipe, also: Mapping, seed: int, lab: Lab) -> tuple:
    """Train a learner: (its row, its net). Countermeasures have been applied."""
    done = fit(train, test, recipe, seed=seed, lab=lab)
    row = {
        "last": done.last, "best": done.best, "curve": [list(point) for point in done.curve],
        "passes": done.passes.total, "learner_seconds": round(done.seconds, 1), "engine": how_run(done.model),
    }  # fmt: skip
    row |= {f"on_{name}": accuracy(done.model, recipe.tested(images)) for name, images in also.items()}
    if done.mined.counts:
        mined = [[round(count / sum(counts), 4) for count in counts] for counts in done.mined.counts]
        row |= {"average": done.mined.average, "mined": mined}
    return row | recipe.further(done.model, test, seed), done.model


def learned_row(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    countermeasures: Sequence[str] = (),
    also: Mapping[str, ImageSet] | None = None,
    spare: ImageSet | None = None,
    keep_net: bool = False,
    seed: int = 0,
    lab: Lab | None = None,
) -> dict:
    """Train a learner and return its row: last and best test accuracy, the curve [[step, accuracy]], passes, seconds,
    engine.how_run.

    countermeasures: names in COUNTERMEASURES, applied to `train` first, in this order. also: further test sets by name,
    whose accuracies are in the row as on_NAME. spare: clean images for countermeasures that need some.
    The row also has the numbers of recipe.further, such as `smoothed` and `pretrained_seed`. A row of BulletTrain has
    `average`, which sets the threshold after the training, and `mined`, [[outlier, boundary, robust]] of every batch.
    With lab.cache the row is read from there, or kept; keep_net: the net too, for learned_net. Raises ValueError for a
    damaged file there.

        row = sk.learned_row(split.train, split.test, sk.learn_recipe("demo"), countermeasures=["jpeg"])
    """
    lab, also = lab or Lab(), also or {}
    train, recipe = counter(train, recipe, countermeasures, lab.engine, spare)
    return _kept(train, test, recipe, also, seed, lab, keep_net)[0]


def _kept(
    train: ImageSet, test: ImageSet, recipe: LearnRecipe, also: Mapping, seed: int, lab: Lab, keep_net: bool
) -> tuple:
    """What _learned returns, the net only with keep_net, kept with lab.cache."""
    others = [(name, images.fingerprint) for name, images in also.items()]
    parts = (train.fingerprint, test.fingerprint, recipe, check_seed(seed), others)
    stores = (as_json(ROW), *([as_net(recipe, train, lab.engine)] if keep_net else []))
    made = partial(_learned, train, test, recipe, also, seed, lab)
    return kept(lab, "learner", parts, lambda _: made()[: len(stores)], *stores)


def learned_net(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    file: Path | None = None,
    seed: int = 0,
    lab: Lab | None = None,
) -> tuple[dict, nn.Module]:
    """Train a learner: (its row, the net in eval mode and frozen); both kept with lab.cache.

    file: where the net is saved as well, for `load_net`, `purifier=FILE` and `semkit transform`. Raises ValueError if
    there is a file that is no net.

        row, net = sk.learned_net(split.train, split.test, sk.learn_recipe("demo"), file=Path("net.safetensors"))
    """
    lab = lab or Lab()
    if file:  # raises for what is not ours to overwrite, and where nothing can be written
        load_net(file, lab.engine) if Path(file).exists() else writable(Path(file).parent)
    row, model = _kept(train, test, recipe, {}, seed, lab, True)
    if file:
        as_net(recipe, train, lab.engine).save(model, file)
    return row, model.eval().requires_grad_(False)


def grid_recipes(
    split: Split,
    crafts: Mapping[str, Recipe | None],
    learners: Mapping[float | str, LearnRecipe],
    countermeasures: Sequence[str] = (),
) -> list[Recipe | LearnRecipe]:
    """The recipes that a grid runs for each seed if the cache is empty. Raises ValueError for what it cannot run."""
    made = [recipe for recipe in crafts.values() if recipe]
    firsts = [(name,) for name in check_list(countermeasures)] or [()]
    for _ in crafts:
        train = replace(split.train)  # a new object, because pretraining on protected images is made for each craft
        made += [learner_after(recipe, first, train, split.spare) for first in firsts for recipe in learners.values()]
    return made


def grid(
    split: Split,
    crafts: Mapping[str, Recipe | None],
    learners: Mapping[float | str, LearnRecipe],
    *,
    countermeasures: Sequence[str] = (),
    keep_nets: bool = False,
    seeds: Iterable[int] | int = (0,),
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Train learners on protected images, and return their rows: protection x countermeasure x learner x seed.

    crafts: method -> its recipe, None for clean images; a seed's noise is crafted with that seed. learners: training
    radius, or a name for the column `learner` -> recipe. countermeasures: each learner is trained after each of them,
    named in the column `countermeasure`; split.spare is for those that need clean images. seeds: the seeds, or how
    many: 3 is 0, 1, 2. keep_nets: as keep_net of learned_row. A seed or countermeasure named twice is made once.
    A row has the columns of learned_row, the accuracies on the recipe's own test sets and the cost of its noise;
    columns that only other rows have are nan. With lab.workers or lab.scheduler, workers make the runs and keep them in
    lab.cache.

        rows = sk.grid(split, *sk.sweep_recipes(["clean", "sem"], [0, 4], "demo"), seeds=3)
    """
    grid_recipes(split, crafts, learners, countermeasures)  # raises before anything is made
    seeds = map(check_seed, seeds) if isinstance(seeds, Iterable) else range(check_count(seeds, "seeds", 1))
    lab, rows, countermeasures, seeds = lab or Lab(), [], dict.fromkeys(countermeasures), dict.fromkeys(seeds)
    if lab.workers or lab.scheduler:
        alone = partial(grid, split, keep_nets=keep_nets, lab=Lab(lab.engine, lab.cache and Path(lab.cache).resolve()))
        spread(_runs(alone, crafts, learners, [(name,) for name in countermeasures] or [()], seeds), lab)
    for seed, (method, made_by) in itertools.product(seeds, crafts.items()):
        job = lab.doing(f"{method} noise, seed {seed}")
        train, noise_cost = made_by.apply(split.train, seed=seed, lab=job) if made_by else (split.train, {})
        also = made_by.tests(split.test, seed=seed) if made_by else {}
        firsts = [{"countermeasure": name} for name in countermeasures] or [{}]
        for first, (name, learn_by) in itertools.product(firsts, learners.items()):
            named = {"learner": name} if isinstance(name, str) else {}
            row = {"method": method, **first, "training_radius": learn_by.perturbation.radius, "seed": seed, **named}
            way = name if named else learner(row["training_radius"])
            job = lab.doing(", ".join((method, *first.values(), way, f"seed {seed}")))
            row |= learned_row(
                train, split.test, learn_by, countermeasures=tuple(first.values()), also=also, spare=split.spare,
                keep_net=keep_nets, seed=seed, lab=job,
            )  # fmt: skip
            rows.append(row | {f"noise_{name}": value for name, value in (NO_NOISE | noise_cost).items()})
    found = pd.DataFrame(rows)
    return found.astype({name: kind for name, kind in SPARSE.items() if name in found})


def _runs(alone: Callable, crafts: Mapping, learners: Mapping, firsts: Sequence, seeds: Iterable) -> Iterator[Group]:
    """The runs of a grid, each as its own call of grid: the noise of a method and seed, and the rows that need it."""
    for seed, (method, made_by) in itertools.product(seeds, crafts.items()):
        made = partial(alone, {method: made_by}, seeds=(seed,))
        rows = itertools.product(firsts, learners.items())
        yield (
            partial(made, {}) if made_by and made_by.radius is not None else None,
            [partial(made, {name: recipe}, countermeasures=first) for first, (name, recipe) in rows],
        )
