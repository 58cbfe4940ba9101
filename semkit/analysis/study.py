"""Runs of crafting and learning, kept in lab.cache, and grids of them."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from semkit.analysis.measure import trained_by
from semkit.countermeasures.images import counter
from semkit.countermeasures.training import Gaussian, Smoothed
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import check_count
from semkit.nets import models
from semkit.nets.cache import Store, as_dict, as_json, as_weights, kept
from semkit.nets.engine import Engine, how_run
from semkit.nets.lab import Lab
from semkit.nets.models import load_net, save_net
from semkit.protections.crafting import CraftRecipe, craft
from semkit.protections.cuda import filtered_tests
from semkit.protections.noise import Noise, load, save
from semkit.training.bullettrain import KINDS
from semkit.training.learning import Learned, LearnRecipe, accuracy, fit

NO_NOISE = {"passes": 0, "seconds": 0.0, "engine": None}
COST = {"passes": int, "seconds": float | int, "engine": str}  # field -> its type, of a kept crafting's cost
ROW = {
    "last": float | int, "best": float | int, "curve": list, "passes": int, "learner_seconds": float | int,
    "engine": str,
}  # fmt: skip
MadeBy = CraftRecipe | Callable[[ImageSet, int], ImageSet] | None  # noise, another protection, or none


def _crafted(images: ImageSet, recipe: CraftRecipe, seed: int, lab: Lab, every: float) -> tuple[Noise, dict, nn.Module]:
    """(noise, its cost, the surrogate) of a crafting, all three kept."""

    def make(state: Path | None):
        done = craft(images, recipe, seed=seed, lab=lab, checkpoint=state, every=every)
        made = {**as_dict(recipe), "seed": seed, "precision": lab.engine.precision}
        noise = Noise(done.noise, recipe.radius, made, images.fingerprint, images.classes)
        cost = {"passes": done.passes.total, "seconds": round(done.seconds, 1), "engine": how_run(done.surrogate)}
        return noise, cost, done.surrogate

    def surrogate() -> nn.Module:
        seen = recipe.augment.output_size(images.images.shape[-1])
        return lab.engine.prepare(models.build(recipe.surrogate, len(images.classes), seed, size=seen))

    stores = (
        Store(".safetensors", save, lambda path: _of_recipe(load(path, images=images), recipe)),
        as_json(COST),
        as_weights(surrogate),
    )
    return kept(lab, "noise", (images.fingerprint, recipe, seed), make, *stores)


def _of_recipe(noise: Noise, recipe: CraftRecipe) -> Noise:
    """`noise`, if its metadata says that this recipe made it; raises ValueError otherwise."""
    other = [name for name, value in as_dict(recipe).items() if noise.recipe.get(name) != value]
    if other or noise.class_wise or noise.radius != recipe.radius:
        raise ValueError(f"noise of another recipe: {', '.join(other) or 'its radius or rows'}")
    return noise


def crafted_noise(
    images: ImageSet, recipe: CraftRecipe, *, seed: int = 0, lab: Lab | None = None, checkpoint_every: float = 20
) -> tuple[Noise, dict]:
    """The noise of `recipe` for the images, and its cost {"passes": ..., "seconds": ..., "engine": how_run(surrogate)}.

    With lab.cache the noise is taken from there if it is there, resumed if it was interrupted, and kept; the state of
    an unfinished run is saved every checkpoint_every seconds. Raises ValueError for a damaged file in the cache.

        noise, cost = sk.crafted_noise(split.train, sk.craft_recipe("sem", "demo"), lab=sk.Lab(cache=sk.runs_folder()))
    """
    noise, cost, _ = _crafted(images, recipe, seed, lab or Lab(), checkpoint_every)
    return noise, cost


def crafted_surrogate(
    images: ImageSet, recipe: CraftRecipe, *, seed: int = 0, lab: Lab | None = None
) -> tuple[Noise, nn.Module]:
    """The noise of `recipe` and the surrogate that made it, in eval mode; both kept with lab.cache."""
    noise, _, surrogate = _crafted(images, recipe, seed, lab or Lab(), 20)
    return noise, surrogate.eval()


def training_set(train: ImageSet, made_by: MadeBy, *, seed: int = 0, lab: Lab | None = None) -> tuple[ImageSet, dict]:
    """The images that a learner is given, and the cost of their noise as of crafted_noise, {} where there is none.

    made_by: a CraftRecipe adds its noise; anything else, such as ClassFilters, is called as made_by(train, seed); None
    leaves the images as they are.
    """
    if isinstance(made_by, CraftRecipe):
        noise, cost = crafted_noise(train, made_by, seed=seed, lab=lab)
        return train.with_noise(noise.levels), cost
    return made_by(train, seed) if made_by else train, {}


def _learned(train: ImageSet, test: ImageSet, recipe: LearnRecipe, also: Mapping, seed: int, lab: Lab) -> tuple:
    """(row, trained net) of a learner that no countermeasure is left to apply to."""
    mined = []

    def watch(what, step, total, metrics):
        if shares := [round(metrics[kind], 4) for kind in KINDS if kind in metrics]:
            mined.append(shares)
        return lab.on_step and lab.on_step(what, step, total, metrics)

    done = fit(train, test, recipe, seed=seed, lab=replace(lab, on_step=watch))
    row = _learner_row(done)
    row |= {f"on_{name}": accuracy(done.model, recipe.tested(images)) for name, images in also.items()}
    if recipe.pretrained:
        row["pretrained_seed"] = seed
    if mined:
        row |= {"average": done.mined.average, "mined": mined}
    if isinstance(recipe.perturbation, Gaussian):
        row["smoothed"] = accuracy(Smoothed(done.model, recipe.perturbation), recipe.tested(test))
    return row, done.model


def _learner_row(done: Learned) -> dict:
    return {
        "last": done.last, "best": done.best, "curve": [list(point) for point in done.curve],
        "passes": done.passes.total, "learner_seconds": round(done.seconds, 1), "engine": how_run(done.model),
    }  # fmt: skip


def learned_row(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    countermeasures: Sequence[str] = (),
    also: Mapping[str, ImageSet] | None = None,
    seed: int = 0,
    lab: Lab | None = None,
) -> dict:
    """A learner's row: last and best test accuracy, the curve [[step, accuracy]], passes, seconds, engine.how_run.

    countermeasures: names in COUNTERMEASURES, applied to `train` first, in this order. also: further test sets by name;
    the final model's accuracy on each is in the row as on_NAME.
    A learner that goes on from a pretrained net has `pretrained_seed`, the seed which that net was trained with.
    A learner of Gaussian noise has its accuracy as Smoothed in the row too, as `smoothed`; one of BulletTrain has
    `average`, which sets the threshold after the training, and `mined`, [[outlier, boundary, robust]]: the shares of
    every batch.
    With lab.cache the row is taken from there if it is there, and kept. Raises ValueError for a damaged file there.
    """
    lab, also = lab or Lab(), also or {}
    train, recipe = counter(train, recipe, countermeasures, lab.engine)
    others = [(name, images.fingerprint) for name, images in also.items()]
    parts = (train.fingerprint, test.fingerprint, recipe, seed, others)
    return kept(lab, "learner", parts, lambda _: _learned(train, test, recipe, also, seed, lab)[:1], as_json(ROW))[0]


def as_net(recipe: LearnRecipe, train: ImageSet, engine: Engine) -> Store:
    """A Store of the nets that `recipe` trains on `train`."""
    seen = recipe.augment.output_size(train.images.shape[-1])

    def write(model: nn.Module, path: Path) -> None:
        save_net(model, path, net=recipe.model, classes=train.classes, size=seen)

    return Store(".safetensors", write, lambda path: load_net(path, engine))


def learned_net(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    file: Path | None = None,
    seed: int = 0,
    lab: Lab | None = None,
) -> tuple[dict, nn.Module]:
    """(row, the trained net) of a learner, both kept with lab.cache; the net is in eval mode and frozen.

    file: where the net is saved as well, for `load_net`, `semkit learn --net` and the transform's external net.
    """
    lab, parts = lab or Lab(), (train.fingerprint, test.fingerprint, recipe, seed)
    stores = as_json(ROW), as_net(recipe, train, lab.engine)
    row, model = kept(lab, "net", parts, lambda _: _learned(train, test, recipe, {}, seed, lab), *stores)
    if file:
        stores[1].save(model, file)
    return row, model.eval().requires_grad_(False)


def grid_recipes(
    crafts: Mapping[str, MadeBy],
    learners: Mapping[float | str, LearnRecipe],
    countermeasures: Sequence[str] = (),
) -> list[CraftRecipe | LearnRecipe]:
    """What a grid runs for each seed, if nothing of it is in the cache."""
    made = [recipe for recipe in crafts.values() if isinstance(recipe, CraftRecipe)]
    return made + [*learners.values()] * len(crafts) * max(1, len(countermeasures))


def grid(
    split: Split,
    crafts: Mapping[str, MadeBy],
    learners: Mapping[float | str, LearnRecipe],
    *,
    countermeasures: Sequence[str] = (),
    seeds: Iterable[int] | int = (0,),
    lab: Lab | None = None,
) -> list[dict]:
    """Rows of learners: every way to make the images x learner x seed, the images of a seed made with that seed.

    crafts: the name of a row's method -> what makes its images. learners: a row's training radius, or the name in its
    column `learner`, -> its recipe. countermeasures: where given, every learner after each of them, which a row's
    `countermeasure` names. seeds: the seeds, or how many: 3 is 0, 1, 2. Rows of ClassFilters have accuracies on
    filtered test images too.
    """
    lab, rows = lab or Lab(), []
    seeds = range(check_count(seeds, "seeds", 1)) if isinstance(seeds, int) else seeds
    for seed, (method, made_by) in itertools.product(seeds, crafts.items()):
        train, noise_cost = training_set(split.train, made_by, seed=seed, lab=lab.doing(f"{method} noise, seed {seed}"))
        also = filtered_tests(split.test, made_by, seed)
        firsts = [{"countermeasure": name} for name in countermeasures] or [{}]
        for first, (name, learn_by) in itertools.product(firsts, learners.items()):
            named = {"learner": name} if isinstance(name, str) else {}
            row = {"method": method, **first, "training_radius": learn_by.perturbation.radius, "seed": seed, **named}
            job = lab.doing(", ".join((method, *first.values(), trained_by(row), f"seed {seed}")))
            row |= learned_row(
                train, split.test, learn_by, countermeasures=tuple(first.values()), also=also, seed=seed, lab=job
            )
            rows.append(row | {f"noise_{name}": value for name, value in (NO_NOISE | noise_cost).items()})
    return rows
