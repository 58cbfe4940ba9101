"""What the craft panel runs, without widgets: settings, cost, the run itself, and its pictures and table as HTML."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import pandas as pd
import torch
from torch import nn

from semkit.analysis import figures, pictures
from semkit.analysis.canvas import as_html
from semkit.analysis.cost import passes_of, seconds_of
from semkit.analysis.statistics import Rows, learner
from semkit.analysis.study import crafted_noise, learned_row
from semkit.images.imageset import ImageSet, Split, stratified_limit
from semkit.nets.engine import Engine, count_passes
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe
from semkit.protections.methods import craft_recipe, label_of
from semkit.protections.noise import Noise
from semkit.training.learning import accuracy
from semkit.training.perturb import Clean
from semkit.training.recipes import LearnRecipe, lasting, learn_recipe

TRAINING_RADII = (0, 4)  # of the learners: ERM and AT


@dataclass(frozen=True)
class Settings:
    """What a run does: it crafts noise by `recipe`, then trains `learners`, by training radius, if there are any."""

    method: str
    recipe: CraftRecipe
    learners: dict[int, LearnRecipe]

    def __str__(self) -> str:
        recipe = self.recipe
        return (
            f"{label_of(self.method)}, radius {recipe.radius:g}, noise side {recipe.noise_side}, surrogate side "
            f"{recipe.surrogate_side}, surrogate steps {recipe.sgd.steps}, noise steps {recipe.steps}, EOT samples "
            f"{recipe.samples}"
        )

    @property
    def recipes(self) -> list[CraftRecipe | LearnRecipe]:
        """All recipes of the run; each learner is trained twice, on clean and on protected images."""
        return [self.recipe, *2 * list(self.learners.values())]

    def passes(self, n: int) -> int:
        """Passes of the whole run for n images."""
        return passes_of(self.recipes, n).total


def settings(
    method: str,
    preset: str,
    *,
    radius: float = 8,
    perturbation_radius: float = 4,
    surrogate_steps: int | None = None,
    noise_steps: int | None = None,
    samples: int | None = None,
    learners: bool = False,
    size: int = 32,
) -> Settings:
    """The Settings of a method at a preset; steps and samples that are given replace those of the preset.

    At perturbation_radius 0 both sides are Clean(), whatever the method. Milestones move with the surrogate steps.
    """
    recipe = craft_recipe(method, preset, radius=radius, perturbation_radius=perturbation_radius or 1, size=size)
    if not perturbation_radius:
        recipe = replace(recipe, noise_side=Clean(), surrogate_side=Clean())
    recipe = lasting(recipe, surrogate_steps or recipe.sgd.steps)
    budget = dict(steps=noise_steps or recipe.steps, samples=samples or recipe.samples)
    radii = TRAINING_RADII if learners else ()
    return Settings(
        method, replace(recipe, **budget),
        {r: learn_recipe(preset, perturbation_radius=r, size=size) for r in radii},
    )  # fmt: skip


def seconds(run: Settings, split: Split, engine: Engine, *, measure: bool = False) -> float | None:
    """Seconds that the run takes at most; None if a net has not been timed yet and measure is False."""
    train = split.train
    what = len(train), len(train.classes), train.images.shape[-1]
    return seconds_of(run.recipes, *what, engine, may_probe=measure)


def _trained_on(method: str) -> str:
    return label_of(method) if method == "clean" else f"{label_of(method)}-protected images"


@dataclass(frozen=True)
class Made:
    """What a run has made so far: the noise, and the learners' rows on clean and on protected images."""

    settings: Settings
    noise: Noise
    rows: tuple[dict, ...] = ()


def run(
    split: Split,
    what: Settings,
    *,
    seed: int = 0,
    lab: Lab | None = None,
    on_made: Callable[[Made], object] = lambda made: None,
) -> Made:
    """Craft the noise and train the learners of `what`; on_made(made) is called after the noise and after each learner.

    The metrics of lab.on_step include "done", the passes of the whole run so far. With lab.cache a stopped run goes on
    where it was when it is called again.
    """
    lab = lab or Lab()
    n, done = len(split.train), 0

    def told(job: str, step: int, total: int, metrics: dict):
        return lab.on_step and lab.on_step(job, step, total, {**metrics, "done": done + metrics["passes"]})

    counting = replace(lab, on_step=told)

    name = label_of(what.method)
    noise, _ = crafted_noise(split.train, what.recipe, seed=seed, lab=counting.doing(f"{name} noise"))
    made, done = Made(what, noise), what.recipe.cost(n).total
    on_made(made)
    sets = {what.method: split.train.with_noise(noise.levels), "clean": split.train}
    for (radius, recipe), (method, train) in product(what.learners.items(), sets.items()):
        job = counting.doing(f"{learner(radius)} on {_trained_on(method)}")
        row = learned_row(train, split.test, recipe, seed=seed, lab=job)
        made = replace(made, rows=(*made.rows, {"method": method, "training_radius": radius, "seed": seed, **row}))
        done += recipe.cost(n).total
        on_made(made)
    return made


def duration(seconds: float) -> str:
    """Seconds for people: "12 s", "3.4 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def numbers(metrics: dict, passes: int, seconds: float) -> str:
    """One line on a run of `passes` after `seconds`: loss, accuracy if known, passes done."""
    accuracy = metrics.get("accuracy")
    reached = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
    return f"loss {metrics['loss']:.2f}{reached}; {metrics['done']:,} of {passes:,} passes after {duration(seconds)}"


def accuracies(rows: Rows) -> str:
    """Rows of a grid in one sentence, means over seeds: the alternative text of their figure."""
    means = pd.DataFrame(rows).groupby(["method", "training_radius"], sort=False)["last"].mean()
    found = [f"{label_of(method)} {learner(r)} {100 * mean:.0f} %" for (method, r), mean in means.items()]
    return f"Accuracy on clean test images: {', '.join(found)}"


def strip_html(images: ImageSet, noise: torch.Tensor, what: Settings, caption: str) -> str:
    """The first image of up to 8 classes, the same image protected, and its noise int8 [N,3,H,W]."""
    labels = images.labels.tolist()
    place = [labels.index(label) for label in dict.fromkeys(labels)][:8]
    radius, name = what.recipe.radius, label_of(what.method)
    figure = pictures.strip_figure(images.images[place].cpu(), {what.method: noise[place].cpu()}, radius=radius)
    alt = f"{len(place)} images, the same with {name} noise, and the noise: ±{radius:g} levels as black and white"
    return as_html(figure, alt, caption)


@dataclass
class Progress:
    """Curves of an unfinished crafting: the surrogate's loss by step, and now and then its accuracy.

    right: step -> (accuracy on training images with their noise, accuracy on the same images without). The surrogate is
    trained on protected images only, so the difference comes from the noise: a hint at protection that costs next to
    nothing. Protection itself is measured on fresh learners.
    """

    losses: dict[int, float] = field(default_factory=dict)
    right: dict[int, tuple[float, float]] = field(default_factory=dict)

    def look(self, step: int, surrogate: nn.Module, images: ImageSet, noise: torch.Tensor) -> None:
        """Measure the surrogate on about 200 of the images, with their noise int8 [N,C,H,W] and without."""
        index = stratified_limit(images.labels, max(200, len(images.classes)))
        clean = images.take(index)
        with count_passes():  # a counter of its own, because a look is no part of the run
            sets = clean.with_noise(noise[index].cpu()), clean
            self.right[step] = tuple(accuracy(surrogate, one) for one in sets)

    def html(self, total: int) -> str:
        """The curves over `total` steps, as HTML."""
        step, loss = list(self.losses.items())[-1]
        alt, caption = f"The surrogate's loss, {loss:.2f} at step {step} of {total}", ""
        if self.right:
            protected, clean = (f"{100 * share:.0f} %" for share in list(self.right.values())[-1])
            alt = f"{alt}; it labels {protected} of images with noise rightly, {clean} of the same without"
            caption = "Trained on images with noise only: where the lines part, the surrogate has learned the noise."
        return as_html(figures.progress_figure(self.losses, self.right, total), alt, caption)


def table_html(made: Made) -> str:
    """What learners reach, and the protection, clean less protected accuracy, as far as they are known."""
    radii, method = list(made.settings.learners), made.settings.method
    rows = pd.DataFrame(made.rows, columns=["method", "training_radius", "last"]).astype({"last": float})
    table = 100 * rows.pivot(index="method", columns="training_radius", values="last")
    table = table.reindex(index=["clean", method], columns=radii)
    table.loc["protection (points)"] = table.loc["clean"] - table.loc[method]
    table = table.rename(index={of: _trained_on(of) for of in ("clean", method)}, columns=learner)
    page = table.rename_axis(index=None, columns="trained on").to_html(
        float_format="{:.1f}".format, na_rep="…", border=0
    )
    caption = '<caption style="white-space:nowrap">accuracy on clean test images (%), one seed</caption>'
    return page.replace("<thead>", f"{caption}<thead>", 1)
