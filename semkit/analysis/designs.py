"""The designed experiments behind the lessons: sets of recipes that differ in one thing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from semkit.analysis.measure import PARTS, Crafts, noise_part
from semkit.countermeasures.registry import COUNTERMEASURES, BySpare, learner_after
from semkit.images.augment import Augment, FlipCrop, Identity
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import to_levels
from semkit.nets.engine import Passes, count_passes
from semkit.nets.lab import Lab
from semkit.protections.base import CleanPart, Crafted, NoiseRecipe, PartlyProtected, Recipe
from semkit.protections.crafting import CraftRecipe, noise_of_batch
from semkit.protections.cuda import ClassFilters
from semkit.protections.methods import PROTECTIONS, craft_recipe, large_batches
from semkit.training.perturb import NFGSM, PGD, Clean, Perturbation, Uniform
from semkit.training.recipes import SGD, LearnRecipe, lasting, learn_recipe

METHODS = ("clean", "em", "sem")  # of a sweep that names none
AGES = (1 / 6, 1 / 2, 1)  # of the learners of `stability`, as shares of the preset's AT steps


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


@dataclass(frozen=True)
class FrozenRecipe(NoiseRecipe):
    """Noise that one frozen net makes from zero: `steps` noise steps against the surrogate of `judge`, which learns
    nothing from it.

    The recipe judge trains the net, once a seed with lab.cache, and says the radius. noise_side, steps, samples and
    augment as in CraftRecipe; step_size is 2 * radius / steps. No state is saved while a noise is crafted.
    """

    judge: CraftRecipe
    noise_side: Perturbation = Clean()
    steps: int = 20
    samples: int = 1
    augment: Augment = FlipCrop()

    @property
    def radius(self) -> float:
        return self.judge.radius

    @property
    def net(self) -> str:
        return self.judge.net

    @property
    def sgd(self) -> SGD:
        return self.judge.sgd

    @property
    def noise_step(self) -> CraftRecipe:
        """The recipe of a noise step against the frozen net."""
        budget = dict(steps=self.steps, samples=self.samples, step_size=2 * self.radius / self.steps, start="zero")
        return replace(self.judge, noise_side=self.noise_side, augment=self.augment, class_wise=False, **budget)

    @property
    def at_once(self) -> int:
        return self.noise_step.at_once

    def cost(self, n: int) -> Passes:
        return Passes(n * self.steps * self.samples * (1 + self.noise_side.passes))

    def craft(self, images: ImageSet, *, seed: int, lab: Lab, **_) -> Crafted:
        lab, recipe, batch = lab.doing("crafting noise"), self.noise_step, self.sgd.batch
        model = self.judge.crafted(images, seed=seed, lab=lab)[2].eval()
        images, parts, began = images.to(lab.engine.device), [], time.monotonic()
        with count_passes() as passes:
            for start in range(0, len(images), batch):
                x, y = images.batch(slice(start, start + batch))
                x, generator = lab.engine.images(x), lab.engine.generator(seed, "frozen", start)
                delta = noise_of_batch(model, x, y, torch.zeros_like(x), recipe, generator)
                parts.append(to_levels(delta).clamp(-int(self.radius), int(self.radius)).cpu())
                lab.report(min(start + batch, len(images)), len(images), {"passes": passes.total})
        return Crafted(torch.cat(parts), model, passes=passes, seconds=time.monotonic() - began)


def frozen_judge(preset: str, size: int, judge: CraftRecipe | None = None, **budget) -> Crafts:
    """Noise against one frozen net a seed, SEM's surrogate: no noise side, PGD of growing radius, two random ones.

    judge: the recipe of that net, None for the preset's SEM. budget: fields of FrozenRecipe.
    """
    judge = judge or reference_recipe(preset, size)
    sides = {"none 0": Clean()} | {f"adversarial {r}": PGD(r, 5, r / 4) for r in (1, 2, 4, 6, 8)}
    sides |= {f"random {r}": Uniform(r) for r in (4, 8)}
    return {"clean": None, **{name: FrozenRecipe(judge, side, **budget) for name, side in sides.items()}}


def stability(preset: str, size: int) -> Crafts:
    """The noise sides none, random (SEM) and adversarial (REM) under an adversarial surrogate side."""
    return {name: made for name, made in pairs(preset, size).items() if not name.endswith(("/none", "/random"))}


@dataclass(frozen=True)
class PartRecipe(NoiseRecipe):
    """One of measure.PARTS of the noise that the recipe `whole` makes with the same seed.

    Crafting `whole` is its only cost; with lab.cache that noise is crafted once for all parts.
    """

    whole: CraftRecipe
    part: str

    @property
    def radius(self) -> float:
        return self.whole.radius

    def craft(self, images: ImageSet, *, seed: int, lab: Lab, **_) -> Crafted:
        return Crafted(noise_part(self.whole.crafted(images, seed=seed, lab=lab)[0].levels, self.part))


def noise_parts(preset: str, size: int) -> Crafts:
    """EM and SEM, and each part of their noise alone: low and high frequencies, grey and colour.

    >>> list(noise_parts("demo", 32))[:4]
    ['clean', 'em', 'em, low', 'em, high']
    """
    crafts: dict[str, Recipe | None] = {"clean": None}
    for method in ("em", "sem"):
        whole = craft_recipe(method, preset, size=size)
        crafts |= {method: whole, **{f"{method}, {part}": PartRecipe(whole, part) for part in PARTS}}
    return crafts


def sides_alone(preset: str, size: int) -> Crafts:
    """EM, SEM, and SEM's recipe with EM's sides, none and none.

    This separates the effect of SEM's perturbations from that of its steps, samples and curriculum.
    """
    em, sem = (craft_recipe(method, preset, size=size) for method in ("em", "sem"))
    like_sem = replace(sem, noise_side=Clean(), surrogate_side=Clean())
    return {"clean": None, "em": em, "em, SEM's recipe": like_sem, "sem": sem}


def frontier(preset: str, size: int) -> Crafts:
    """SEM for ever fewer passes, named "noise steps x EOT samples"; sem is the preset's, the last half of its training.

    plain: the published noise step and ascent, from random starts and without a curriculum, 61 passes for every image
    that the surrogate trains on. The others start warm, with the preset's curriculum and a shorter ascent; N-FGSM: one
    step of it, from random noise of twice its radius. All but the last two have the batches of `large_batches`.
    """
    sem, published = (craft_recipe("sem", name, size=size) for name in (preset, "paper"))
    large = large_batches(preset, size=size)
    return {
        "clean": None,
        "plain": replace(published, surrogate=sem.surrogate, augment=sem.augment, sgd=large.sgd),
        f"{large.steps} x {large.samples}": large,
        f"{2 * large.steps} x 1": replace(large, steps=2 * large.steps, samples=1),
        f"{large.steps} x 1, N-FGSM": replace(large, samples=1, surrogate_side=NFGSM(large.surrogate_side.radius)),
        "sem": sem,
        "sem, half": lasting(sem, sem.sgd.steps // 2),
    }


def partly(preset: str, size: int) -> Crafts:
    """SEM on growing shares of every class, and beside each the clean rest alone: what does the protected part add?"""
    sem, shares = craft_recipe("sem", preset, size=size), (20, 40, 60, 80, 90)
    mixtures = {f"{share}% protected": PartlyProtected(sem, share / 100) for share in shares}
    rests = {f"the other {100 - share}% alone": CleanPart(share / 100) for share in shares}
    return {"clean": None, "sem": sem, **mixtures, **rests}


def achromatic(preset: str, size: int) -> Crafts:
    """From SEM to sem-grey and to sem-jpeg by one change at a time, and two controls without SEM's perturbations.

    Named "noise steps x EOT samples" where the recipe is `methods.large_batches` or that without colour.
    """
    names = ("sem", "sem-grey", "sem-jpeg", "em-grey", "random-grey")
    made = {name: PROTECTIONS[name].recipe(preset, size=size) for name in names}
    large, grey, jpeg = large_batches(preset, size=size), made["sem-grey"], made["sem-jpeg"]
    few, many = (f"{of.steps} x {of.samples}" for of in (large, grey))
    parts = {
        f"sem, {few}": large,
        f"sem, {many}": replace(large, steps=grey.steps, samples=grey.samples),
        f"sem-grey, {few}": replace(large, colour=0),
        "sem-jpeg, noise side": replace(jpeg, surrogate_augment=large.augment),
        "sem-jpeg, colour": replace(jpeg, colour=1),
    }
    return {"clean": None, **made, **parts}


def colours(preset: str, size: int) -> Crafts:
    """SEM, as of `methods.large_batches`, under growing colour budgets, from achromatic to free."""
    shares = (0, 0.125, 0.25, 0.5, 1)
    made = {f"colour {share:g}": large_batches(preset, size=size, colour=share) for share in shares}
    return {"clean": None, **made}


def knobs(preset: str, size: int) -> Crafts:
    """SEM's recipe over noise radius, surrogate steps, of an eighth to twice the preset's, and perturbation radius.

    Named by the three: the demo preset's own is "8-600-4". At perturbation radius 0 it has EM's sides.
    """
    made: Crafts = {"clean": None}
    for radius, share, around in product((2, 4, 8, 12, 16), (1 / 8, 1 / 4, 1 / 2, 1, 2), (0, 4)):
        recipe = craft_recipe("sem", preset, radius=radius, perturbation_radius=around, size=size)
        steps = round(share * recipe.sgd.steps)
        made[f"{radius}-{steps}-{around}"] = lasting(recipe, steps)
    return made


FILTERED: dict[str, Crafts] = {  # designs of class-wise filters, the same at every preset and size
    "cuda": {"clean": None, "cuda .3": ClassFilters(), "cuda .5": ClassFilters(strength=0.5)},
    "cuda-controls": {"clean": None, "cuda .3": ClassFilters(), "one filter": ClassFilters(assignment="one")},
    "cuda-parts": {  # four images in five of every class filtered, the fifth clean; and those fifths alone
        "clean": None, "80% filtered": PartlyProtected(ClassFilters(), 0.8), "the other 20% alone": CleanPart(0.8),
    },
    "cuda-defences": {"cuda .3": ClassFilters(), "clean": None},
}  # fmt: skip
DESIGNS: dict[str, Callable[[str, int], Crafts]] = {
    "pairs": pairs, "noise-sides": noise_sides, "sides-alone": sides_alone,
    **{name: lambda preset, size, crafts=crafts: dict(crafts) for name, crafts in FILTERED.items()},
    # Long and without augmentation, because its random views undo what the inner ascent brings: only then does
    # hardening make noise more robust, at 8 levels with every dose.
    "frozen-judge": frozen_judge, "frozen-judge-long": partial(frozen_judge, steps=60, augment=Identity()),
    "stability": stability, "parts": noise_parts,
    "achromatic": achromatic, "colours": colours, "partial": partly, "map": knobs, "frontier": frontier,
}  # fmt: skip
DEFENCES = ("randomblur", "smoothing", "finetune", "lastlayer", "at-l2", "dat")


def learners_after(
    names: Sequence[str], preset: str, size: int, split: Split, steps: int | None = None
) -> dict[str, LearnRecipe]:
    """The preset's ERM learner after each of these countermeasures, by its label.

    Attacks and fine-tuning train for as many steps as the preset's AT. Countermeasures that need clean images are left
    out if split.spare is None. steps: of every learner and of the pretraining, None for the preset's.
    """

    def recipe(radius: float) -> LearnRecipe:
        made = learn_recipe(preset, perturbation_radius=radius, size=size)
        return lasting(made, steps) if steps else made

    learners = {}
    for name in names:
        if not split.spare and isinstance(COUNTERMEASURES[name], BySpare):
            continue
        made = learner_after(recipe(0), [name], split.train, split.spare)
        short = made.perturbation.passes or made.pretrained
        learners[COUNTERMEASURES[name].label] = lasting(made, recipe(4).sgd.steps) if short else made
    return learners


def learners_by_age(preset: str, size: int, split: Split, steps: int | None = None) -> dict[str, LearnRecipe]:
    """The preset's AT learner, stopped by its schedule at each of AGES; steps: of the oldest one."""
    made = learn_recipe(preset, perturbation_radius=4, size=size)
    ages = [round(share * (steps or made.sgd.steps)) or 1 for share in AGES]
    return {f"AT 4/255, {age} steps": lasting(made, age) for age in ages}


LEARNERS: dict[str, Callable[..., dict[str, LearnRecipe]]] = {  # design -> its learners, in place of training radii
    "cuda-defences": partial(learners_after, DEFENCES), "stability": learners_by_age,
}  # fmt: skip


def reference_recipe(preset: str, size: int) -> CraftRecipe:
    """The recipe of the surrogate that judges all noises alike: SEM's."""
    return craft_recipe("sem", preset, size=size)
