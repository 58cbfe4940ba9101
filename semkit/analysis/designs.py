"""The designed experiments behind the lessons: sets of recipes that differ in one thing, and what their noises are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import pandas as pd

from semkit.analysis.measure import cosine, losses_along, robustness, stability
from semkit.analysis.study import crafted_surrogate
from semkit.countermeasures.registry import COUNTERMEASURES, BySpare, learner_after
from semkit.images.imageset import Split
from semkit.nets.cache import as_dict
from semkit.nets.lab import Lab
from semkit.protections.base import Recipe
from semkit.protections.crafting import CraftRecipe
from semkit.protections.cuda import ClassFilters, CleanPart
from semkit.protections.recipes import craft_recipe
from semkit.training.learning import LearnRecipe
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform
from semkit.training.presets import lasting, learn_recipe

Crafts = Mapping[str, Recipe | None]
METHODS = ("clean", "em", "sem")  # of a sweep that names none
RADIUS = 4  # levels, at which robustness and stability are measured
ALONG, LOOKED_AT = (0, 1, 2, 4, 6, 8), 200  # radii in levels, and protected images, of loss_rows


def pairs(preset: str, size: int) -> Crafts:
    """Nine recipes, {none, random, adversarial} on the noise side x on the surrogate side, alike in all else.

    Named "noise side/surrogate side"; SEM is random/adversarial, REM adversarial/adversarial. With "clean" beside them.
    """
    base = craft_recipe("sem", preset, size=size)
    sides = {"none": Clean(), "random": base.noise_side, "adversarial": base.surrogate_side}
    crafts = {
        f"{noise}/{surrogate}": replace(base, noise_side=sides[noise], surrogate_side=sides[surrogate])
        for noise, surrogate in product(sides, sides)
    }
    return {"clean": None, **crafts}


def noise_sides(preset: str, size: int) -> Crafts:
    """One surrogate recipe, SEM's, under noise sides from none over random to adversarial ones, of growing radius."""
    base = craft_recipe("sem", preset, size=size)
    pgd = base.surrogate_side
    sides: list[Perturbation] = [Clean(), *(Uniform(r) for r in (2, 4, 8))]
    sides += [PGD(r, steps, r * pgd.step_size / pgd.radius) for r, steps in ((2, 2), (4, 1), (4, 2), (8, 2))]

    def name(side: Perturbation) -> str:
        kind = {Clean: "none", Uniform: "random", PGD: "adversarial"}[type(side)]
        return f"{kind} {side.radius:g}" + (f" x{side.steps}" if isinstance(side, PGD) else "")

    return {"clean": None, **{name(side): replace(base, noise_side=side) for side in sides}}


def sides_alone(preset: str, size: int) -> Crafts:
    """EM and SEM as the preset has them, and between them EM's sides, none and none, in all else SEM's recipe.

    So what SEM owes to its perturbations is told from what it owes to steps, samples and curriculum.
    """
    em, sem = (craft_recipe(method, preset, size=size) for method in ("em", "sem"))
    like_sem = replace(sem, noise_side=Clean(), surrogate_side=Clean())
    return {"clean": None, "em": em, "em, SEM's recipe": like_sem, "sem": sem}


def budgets(preset: str, size: int) -> Crafts:
    """SEM at falling cost, named "noise steps x EOT samples".

    plain: the published noise step and ascent, from random starts and without a curriculum, 61 passes for every image
    that the surrogate trains on. The others are warm-started, with the preset's curriculum and shorter ascent.
    """
    base, published = (craft_recipe("sem", name, size=size) for name in (preset, "paper"))
    half = replace(base.sgd, steps=base.sgd.steps // 2)
    return {
        "clean": None,
        "plain": replace(published, surrogate=base.surrogate, augment=base.augment, sgd=base.sgd),
        f"{base.steps} x {base.samples}": base,
        f"1 x {base.samples}": replace(base, steps=1),
        f"1 x {base.samples}, half the training": replace(base, steps=1, sgd=half),
        "1 x 1, half the training": replace(base, steps=1, samples=1, sgd=half),
    }


def cuda(preset: str, size: int) -> Crafts:
    """Class-wise filters of two strengths."""
    return {"clean": None, "cuda .3": ClassFilters(), "cuda .5": ClassFilters(strength=0.5)}


def cuda_controls(preset: str, size: int) -> Crafts:
    """Class-wise filters, and one filter for all classes."""
    return {"clean": None, "cuda .3": ClassFilters(), "one filter": ClassFilters(assignment="one")}


def cuda_parts(preset: str, size: int) -> Crafts:
    """Four images in five of every class filtered, the fifth clean; and those fifths alone."""
    return {"clean": None, "80% filtered": ClassFilters(fraction=0.8), "the other 20% alone": CleanPart(0.8)}


def cuda_defences(preset: str, size: int) -> Crafts:
    """Filtered and clean images, for the learners of LEARNERS."""
    return {"cuda .3": ClassFilters(), "clean": None}


DESIGNS: dict[str, Callable[[str, int], Crafts]] = {
    "pairs": pairs, "noise-sides": noise_sides, "sides-alone": sides_alone, "budgets": budgets, "cuda": cuda,
    "cuda-controls": cuda_controls, "cuda-parts": cuda_parts, "cuda-defences": cuda_defences,
}  # fmt: skip


LEARNERS = {  # design -> the countermeasures of its learners, in place of training radii
    "cuda-defences": ("randomblur", "smoothing", "finetune", "lastlayer", "at-l2", "dat"),
}


def learners_after(
    names: Sequence[str], preset: str, size: int, split: Split, steps: int | None = None
) -> dict[str, LearnRecipe]:
    """The preset's ERM learner after each of these countermeasures, by its label.

    Attacks and fine-tuning train for as many steps as the preset's AT, and PGD ascends as there. Countermeasures that
    need clean images are left out if split.spare is None. steps: of every learner and of the pretraining, None for the
    preset's.
    """

    def recipe(radius: float, norm: str = "linf") -> LearnRecipe:
        made = learn_recipe(preset, perturbation_radius=radius, norm=norm, size=size)
        return lasting(made, steps) if steps else made

    learners = {}
    for name in names:
        if not split.spare and isinstance(COUNTERMEASURES[name], BySpare):
            continue
        made = learner_after(recipe(0), [name], len(split.train.classes), split.spare)
        if isinstance(made.perturbation, PGD):
            made = recipe(made.perturbation.radius, made.perturbation.norm)
        short = made.perturbation.passes or made.pretrained
        learners[COUNTERMEASURES[name].label] = lasting(made, recipe(4).sgd.steps) if short else made
    return learners


def reference_recipe(preset: str, size: int) -> CraftRecipe:
    """The recipe whose surrogate looks at all noises alike: SEM's."""
    return craft_recipe("sem", preset, size=size)


def noise_rows(
    split: Split,
    crafts: Crafts,
    *,
    seeds: Sequence[int] = (0,),
    reference: CraftRecipe | None = None,
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of noises: every recipe x seed, measured at RADIUS levels with PGD-10 and 8 draws.

    surrogate_robustness: of the surrogate on the clean test images. noise_robustness, noise_stability, noise_variance:
    of the protected images under the surrogate that made them; reference_*: under the one that `reference` makes with
    the same seed. cosine: mean over images, with the noise of the next seed; nan with one seed.
    """
    lab, rows, noises = lab or Lab(), [], {}
    for seed, (method, recipe) in product(seeds, crafts.items()):
        if recipe is None or recipe.net is None:
            continue
        job = lab.doing(f"{method} noise, seed {seed}")
        noise, surrogate = crafted_surrogate(split.train, recipe, seed=seed, lab=job)
        noises[method, seed] = noise.levels
        protected = split.train.with_noise(noise.levels)
        of = {"noise": surrogate}
        if reference:
            of["reference"] = crafted_surrogate(split.train, reference, seed=seed, lab=job)[1]
        told = as_dict(recipe)
        row = {"method": method, "seed": seed, **{side: told.get(side) for side in ("noise_side", "surrogate_side")}}
        row["surrogate_robustness"] = robustness(surrogate, split.test, RADIUS)
        for name, model in of.items():
            row[f"{name}_robustness"] = robustness(model, protected, RADIUS)
            row[f"{name}_stability"], row[f"{name}_variance"] = stability(model, protected, RADIUS)
        rows.append(row)
    for row in rows:
        following = seeds[(seeds.index(row["seed"]) + 1) % len(seeds)]
        alike = cosine(noises[row["method"], row["seed"]], noises[row["method"], following])
        row["cosine"] = float(alike.mean()) if len(seeds) > 1 else float("nan")
    return pd.DataFrame(rows)


def loss_rows(
    split: Split,
    crafts: Crafts,
    *,
    seeds: Sequence[int] = (0,),
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of losses along random and adversarial directions: every recipe x seed x direction x radius of ALONG.

    measure.losses_along of LOOKED_AT protected images, under the surrogate that made their noise.
    """
    found = {}
    for seed, (method, recipe) in product(seeds, crafts.items()):
        if recipe is None or recipe.net is None:
            continue
        job = (lab or Lab()).doing(f"{method} noise, seed {seed}")
        noise, surrogate = crafted_surrogate(split.train, recipe, seed=seed, lab=job)
        protected = split.train.with_noise(noise.levels).limit(LOOKED_AT)
        found[method, seed] = losses_along(surrogate, protected, ALONG)
    return pd.concat(found, names=["method", "seed"]).droplevel(-1).reset_index()
