"""Runs of crafting and learning, each kept under the hash of all it depends on: a second call is instant."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from semkit.analysis.measure import trained_by
from semkit.countermeasures.images import counter
from semkit.countermeasures.training import Gaussian, Smoothed
from semkit.images.files import atomic_write, check_fields, one_line, read_json, shown
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import check_count
from semkit.nets import models
from semkit.nets.engine import Engine, how_run
from semkit.nets.models import load_net, save_net
from semkit.protections.crafting import CraftRecipe, Interrupted, craft
from semkit.protections.cuda import filtered_tests
from semkit.protections.noise import Noise, load, save
from semkit.training.bullettrain import KINDS
from semkit.training.learning import LearnRecipe, accuracy, fit

OnStep = Callable[[str, int, int, dict], bool | None]  # on_step(what, step, total, metrics)
NO_NOISE = {"passes": 0, "seconds": 0.0, "engine": None}
# The kinds of what is kept of a crafting, and of a learner.
COST = {"passes": int, "seconds": float | int, "engine": str}
ROW = {
    "last": float | int, "best": float | int, "curve": list, "passes": int, "learner_seconds": float | int,
    "engine": str,
}  # fmt: skip
MadeBy = CraftRecipe | Callable[[ImageSet, int], ImageSet] | None  # noise, another protection, or none


def runs_folder() -> Path:
    """Where the notebooks keep finished runs: $SEMKIT_RUNS, else ~/.cache/semkit/runs."""
    return Path(os.environ.get("SEMKIT_RUNS") or Path.home() / ".cache" / "semkit" / "runs")


def _code() -> str:
    """A hash of this package's source files."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(repr((path.relative_to(folder).as_posix(), path.read_bytes())).encode())
    return digest.hexdigest()[:24]


CODE = _code()  # taken when the package is imported: of the code that runs here, whatever becomes of the files


def as_dict(recipe) -> dict:
    """A recipe's fields as JSON can hold them; a perturbation is its own text, "PGD(radius=4, ...)"."""
    plain = (str, int, float, bool, type(None))
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    return {k: v if isinstance(v, plain) else repr(v) for k, v in values.items()}


def key(*parts) -> str:
    """The name of a run: a hash of everything that its result depends on, this package's code among it."""
    return hashlib.sha256(repr((CODE, torch.__version__, *parts)).encode()).hexdigest()[:24]


def _kept(path: Path, read: Callable):
    """read(path) for a file of the cache; a damaged one is named, not made again behind the user's back."""
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        return read(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{shown(path)} is damaged ({one_line(error)}); delete it to make it again") from error


def _stem(images: ImageSet, recipe: CraftRecipe, seed: int, engine: Engine, cache: Path) -> Path:
    return Path(cache) / f"noise-{key(images.fingerprint, recipe, seed, engine.settings())}"


def crafted_noise(
    images: ImageSet,
    recipe: CraftRecipe,
    *,
    seed: int = 0,
    engine: Engine | None = None,
    cache: Path | None = None,
    on_step: Callable | None = None,
    checkpoint_every: float = 20,
) -> tuple[Noise, dict]:
    """The noise of `recipe` for the images, and {"passes": ..., "seconds": ..., "engine": how_run(surrogate)}.

    With a cache folder, taken from there if it is there, resumed if it was interrupted, and kept; the state of an
    unfinished run is saved every checkpoint_every seconds. A run that lacks one of its files, noise, cost or surrogate,
    is made again. Raises ValueError for a damaged file in the cache.
    """
    engine = engine or Engine()
    stem = None if cache is None else _stem(images, recipe, seed, engine, cache)
    if stem and all(path.exists() for path in _files(stem)):
        noise, cost, _ = _files(stem)
        return (
            _kept(noise, lambda path: _of_recipe(load(path, images=images), recipe)),
            _kept(cost, lambda path: check_fields(read_json(path), COST)),
        )
    state = stem and stem.with_suffix(".state")
    done = craft(images, recipe, seed=seed, engine=engine, on_step=on_step, checkpoint=state, every=checkpoint_every)
    made = {**as_dict(recipe), "seed": seed, "precision": engine.precision}
    noise = Noise(done.noise, recipe.radius, made, images.fingerprint, images.classes)
    cost = {"passes": done.passes.total, "seconds": round(done.seconds, 1), "engine": how_run(done.surrogate)}
    if stem:
        noise_file, cost_file, weights_file = _files(stem)
        atomic_write(cost_file, json.dumps(cost).encode())
        weights = {name: value.contiguous() for name, value in done.surrogate.state_dict().items()}
        atomic_write(weights_file, safetensors.torch.save(weights))
        save(noise, noise_file)
        state.unlink(missing_ok=True)
    return noise, cost


def _of_recipe(noise: Noise, recipe: CraftRecipe) -> Noise:
    """`noise`, if it says of itself that this recipe made it; raises ValueError otherwise."""
    other = [name for name, value in as_dict(recipe).items() if noise.recipe.get(name) != value]
    if other or noise.class_wise or noise.radius != recipe.radius:
        raise ValueError(f"noise of another recipe: {', '.join(other) or 'its radius or rows'}")
    return noise


def _files(stem: Path) -> tuple[Path, Path, Path]:
    """The files of a finished run: its noise, its cost and its surrogate's weights."""
    surrogate = stem.with_name(stem.name.replace("noise", "surrogate"))
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json"), surrogate.with_suffix(".safetensors")


def crafted_surrogate(
    images: ImageSet,
    recipe: CraftRecipe,
    *,
    seed: int = 0,
    engine: Engine | None = None,
    cache: Path,
    on_step: Callable | None = None,
) -> tuple[Noise, nn.Module]:
    """The noise of `recipe` and the surrogate that made it, both kept in the cache folder."""
    engine = engine or Engine()
    noise, _ = crafted_noise(images, recipe, seed=seed, engine=engine, cache=cache, on_step=on_step)
    seen = recipe.augment.output_size(images.images.shape[-1])
    model = models.build(recipe.surrogate, len(images.classes), seed, size=seen).to(engine.dtype)
    _, _, weights = _files(_stem(images, recipe, seed, engine, cache))
    model.load_state_dict(_kept(weights, safetensors.torch.load_file))
    return noise, engine.prepare(model).eval()


def training_set(
    train: ImageSet,
    made_by: MadeBy,
    *,
    seed: int = 0,
    engine: Engine | None = None,
    cache: Path | None = None,
    on_step: Callable | None = None,
) -> tuple[ImageSet, dict]:
    """The images that a learner is given, and what crafted_noise tells of their noise, {} where it made none.

    made_by: a CraftRecipe adds its noise; anything else, such as ClassFilters, is called as made_by(train, seed); None
    leaves the images as they are.
    """
    if isinstance(made_by, CraftRecipe):
        noise, cost = crafted_noise(train, made_by, seed=seed, engine=engine, cache=cache, on_step=on_step)
        return train.with_noise(noise.levels), cost
    return made_by(train, seed) if made_by else train, {}


def kept_json(make: Callable[[], list | dict], cache: Path | None, kind: str, *parts, engine: Engine):
    """make(), which JSON can hold; taken from the cache folder if it was made of the same parts before, and kept.

    Raises ValueError for a damaged file in the cache.
    """
    path = None if cache is None else Path(cache) / f"{kind}-{key(*parts, engine.settings())}.json"
    if path and path.exists():
        return _kept(path, read_json)
    made = make()
    if path:
        atomic_write(path, json.dumps(made).encode())
    return made


def _learner(train: ImageSet, test: ImageSet, recipe: LearnRecipe, seed: int, engine: Engine, *others) -> str:
    return f"learner-{key(train.fingerprint, test.fingerprint, recipe, seed, engine.settings(), *others)}"


def learned_row(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    countermeasures: Sequence[str] = (),
    also: Mapping[str, ImageSet] | None = None,
    net: Path | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    cache: Path | None = None,
    on_step: Callable | None = None,
) -> dict:
    """A learner's row: last and best test accuracy, the curve [[step, accuracy]], passes, seconds, engine.how_run.

    countermeasures: names in countermeasures.COUNTERMEASURES, applied to `train` first, in this order. also: further
    test sets by name; the final model's accuracy on each is in the row as on_NAME. net: a file for the trained net.
    A learner that goes on from a pretrained net has `pretrained_seed`, the seed which that net was trained with.
    A learner of Gaussian noise has its accuracy as Smoothed in the row too, as `smoothed`; one of BulletTrain has
    `average`, which sets the threshold after the training, and `mined`, [[outlier, boundary, robust]]: the shares of
    every batch.
    With a cache folder, the row is taken from there if it (and the net) is there, and kept. Raises ValueError for a
    damaged file in the cache.
    """
    engine, also = engine or Engine(), also or {}
    train, recipe = counter(train, recipe, countermeasures, engine)
    others = [(name, images.fingerprint) for name, images in also.items()]
    path = None if cache is None else Path(cache) / f"{_learner(train, test, recipe, seed, engine, *others)}.json"
    if path and path.exists() and (net is None or net.exists()):
        return _kept(path, lambda path: check_fields(read_json(path), ROW))
    stopped, mined = False, []

    def watch(step, total, metrics):
        nonlocal stopped
        if shares := [round(metrics[kind], 4) for kind in KINDS if kind in metrics]:
            mined.append(shares)
        stopped = bool(on_step and on_step(step, total, metrics))
        return stopped

    done = fit(train, test, recipe, seed=seed, engine=engine, on_step=watch)
    if stopped:
        raise Interrupted("stopped while a learner was trained; finished runs are kept")
    row = {
        "last": done.last, "best": done.best, "curve": [list(point) for point in done.curve],
        "passes": done.passes.total, "learner_seconds": round(done.seconds, 1), "engine": how_run(done.model),
        **{f"on_{name}": accuracy(done.model, recipe.tested(images), engine=engine) for name, images in also.items()},
    }  # fmt: skip
    if recipe.pretrained:
        row["pretrained_seed"] = seed
    if mined:
        row |= {"average": done.mined.average, "mined": mined}
    if isinstance(recipe.perturbation, Gaussian):
        row["smoothed"] = accuracy(Smoothed(done.model, recipe.perturbation), recipe.tested(test), engine=engine)
    if net:
        seen = recipe.augment.output_size(train.images.shape[-1])
        save_net(done.model, net, net=recipe.model, classes=train.classes, size=seen)
    if path:
        atomic_write(path, json.dumps(row).encode())
    return row


def learned_net(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    seed: int = 0,
    engine: Engine | None = None,
    cache: Path,
    on_step: Callable | None = None,
) -> tuple[dict, nn.Module]:
    """(row, the trained net) of a learner, both kept in the cache folder; the net is frozen."""
    engine = engine or Engine()
    path = Path(cache) / f"{_learner(train, test, recipe, seed, engine)}.safetensors"
    row = learned_row(train, test, recipe, net=path, seed=seed, engine=engine, cache=cache, on_step=on_step)
    return row, load_net(path, engine)


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
    engine: Engine | None = None,
    cache: Path | None = None,
    on_step: OnStep | None = None,
) -> list[dict]:
    """Rows of learners: every way to make the images x learner x seed, the images of a seed made with that seed.

    crafts: the name of a row's method -> what makes its images. learners: a row's training radius, or the name in its
    column `learner`, -> its recipe. countermeasures: where given, every learner after each of them, which a row's
    `countermeasure` names. seeds: the seeds, or how many: 3 is 0, 1, 2. Rows of ClassFilters have accuracies on
    filtered test images too.
    """
    engine, rows = engine or Engine(), []
    seeds = range(check_count(seeds, "seeds", 1)) if isinstance(seeds, int) else seeds
    for seed, (method, made_by) in itertools.product(seeds, crafts.items()):
        how = dict(seed=seed, engine=engine, cache=cache)
        told = on_step and partial(on_step, f"{method} noise, seed {seed}")
        train, noise_cost = training_set(split.train, made_by, on_step=told, **how)
        also = filtered_tests(split.test, made_by, seed)
        firsts = [{"countermeasure": name} for name in countermeasures] or [{}]
        for first, (name, learn_by) in itertools.product(firsts, learners.items()):
            named = {"learner": name} if isinstance(name, str) else {}
            row = {"method": method, **first, "training_radius": learn_by.perturbation.radius, "seed": seed, **named}
            told = on_step and partial(on_step, ", ".join((method, *first.values(), trained_by(row), f"seed {seed}")))
            row |= learned_row(
                train, split.test, learn_by, countermeasures=tuple(first.values()), also=also, on_step=told, **how
            )
            rows.append(row | {f"noise_{name}": value for name, value in (NO_NOISE | noise_cost).items()})
    return rows
