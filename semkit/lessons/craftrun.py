"""The run behind the craft panel, without its widgets: its settings, what it will cost, the run, what it shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import pandas as pd
import torch
from torch import nn

from semkit.analysis import figures
from semkit.analysis.canvas import as_html
from semkit.analysis.cost import passes_of, seconds_of
from semkit.analysis.statistics import Rows, learner
from semkit.analysis.study import crafted_noise, learned_row
from semkit.images.imageset import ImageSet, Split, stratified_limit
from semkit.nets.engine import Engine, count_passes
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe
from semkit.protections.methods import label_of
from semkit.protections.noise import Noise
from semkit.protections.recipes import craft_recipe
from semkit.training.learning import LearnRecipe, accuracy
from semkit.training.perturb import Clean
from semkit.training.presets import lasting, learn_recipe

TRAINING_RADII = (0, 4)  # of the learners: ERM and AT


@dataclass(frozen=True)
class Settings:
    """What a run does: noise by `recipe`, and `learners`, if any, by training radius."""

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
        """All that is run: learners see clean and protected images."""
        return [self.recipe, *2 * list(self.learners.values())]

    def passes(self, n: int) -> int:
        """The passes of the whole run for n images."""
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
    """The Settings of a method at a preset, with another budget where one is given.

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
    """The seconds that the run will take at most; None where a net's speed is not known yet and not to be measured."""
    train = split.train
    what = len(train), len(train.classes), train.images.shape[-1]
    return seconds_of(run.recipes, *what, engine, may_probe=measure)


def _trained_on(method: str) -> str:
    return label_of(method) if method == "clean" else f"{label_of(method)}-protected images"


@dataclass(frozen=True)
class Made:
    """What a run has made so far: its noise, and the learners' rows on clean and on protected images."""

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
    """All that `what` says; on_made is told after the noise and after every learner.

    lab.on_step has in its metrics "done", the passes of the whole run so far. A run that was stopped goes on from there
    with the same call, if there is a cache.
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
    """The seconds as people read them: "12 s", "3.4 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def numbers(metrics: dict, passes: int, seconds: float) -> str:
    """How far a run of `passes` is after `seconds`, by the metrics that it told."""
    accuracy = metrics.get("accuracy")
    reached = "" if accuracy is None else f", accuracy {100 * accuracy:.1f} %"
    return f"loss {metrics['loss']:.2f}{reached}; {metrics['done']:,} of {passes:,} passes after {duration(seconds)}"


def accuracies(rows: Rows) -> str:
    """Rows of a grid as a sentence, means over seeds: the alternative text of their figure."""
    means = pd.DataFrame(rows).groupby(["method", "training_radius"], sort=False)["last"].mean()
    found = [f"{label_of(method)} {learner(r)} {100 * mean:.0f} %" for (method, r), mean in means.items()]
    return f"Accuracy on clean test images: {', '.join(found)}"


def strip_html(images: ImageSet, noise: torch.Tensor, what: Settings, caption: str) -> str:
    """The first image of up to 8 classes, protected and not, and the noise int8 [N,3,H,W] between them."""
    labels = images.labels.tolist()
    place = [labels.index(label) for label in dict.fromkeys(labels)][:8]
    radius, name = what.recipe.radius, label_of(what.method)
    figure = figures.strip_figure(images.images[place].cpu(), {what.method: noise[place].cpu()}, radius=radius)
    alt = f"{len(place)} images, the same with {name} noise, and the noise: ±{radius:g} levels as black and white"
    return as_html(figure, alt, caption)


@dataclass
class Progress:
    """What is seen of a crafting under way, by step: the surrogate's loss, and now and then what it labels rightly.

    That is two shares of 1, of training images with their noise and of the same images without. The surrogate is
    trained on protected images only, so the difference is what it has from the noise: a hint at protection, for nearly
    nothing. Protection itself is what fresh learners lose.
    """

    losses: dict[int, float] = field(default_factory=dict)
    right: dict[int, tuple[float, float]] = field(default_factory=dict)

    def look(self, step: int, surrogate: nn.Module, images: ImageSet, noise: torch.Tensor) -> None:
        """Tests the surrogate on some 200 of the images, with their noise int8 [N,C,H,W] and without."""
        index = stratified_limit(images.labels, max(200, len(images.classes)))
        clean = images.take(index)
        with count_passes():  # a look is no part of the run
            sets = clean.with_noise(noise[index].cpu()), clean
            self.right[step] = tuple(accuracy(surrogate, one) for one in sets)

    def html(self, total: int) -> str:
        """Both as curves over the `total` steps."""
        step, loss = list(self.losses.items())[-1]
        alt, caption = f"The surrogate's loss, {loss:.2f} at step {step} of {total}", ""
        if self.right:
            protected, clean = (f"{100 * share:.0f} %" for share in list(self.right.values())[-1])
            alt = f"{alt}; it labels {protected} of images with noise rightly, {clean} of the same without"
            caption = "Trained on images with noise only: where the lines part, the surrogate has learned the noise."
        return as_html(figures.progress_figure(self.losses, self.right, total), alt, caption)


def table_html(made: Made) -> str:
    """What learners reach and the protection, clean less protected accuracy, as far as they are there."""
    found = {(row["method"], row["training_radius"]): 100 * row["last"] for row in made.rows}
    radii, method = made.settings.learners, made.settings.method

    def line(head: str, values: Sequence[float | None]) -> str:
        cells = "".join(f"<td>{'…' if value is None else f'{value:.1f}'}</td>" for value in values)
        return f'<tr align="right"><th scope="row" align="left">{head}</th>{cells}</tr>'

    clean, mine = ([found.get((of, r)) for r in radii] for of in ("clean", method))
    lost = [None if None in pair else pair[0] - pair[1] for pair in zip(clean, mine, strict=True)]
    heads = "".join(f'<th scope="col">{learner(r)}</th>' for r in radii)
    return (
        '<table cellpadding="4" style="line-height:1.3"><caption style="white-space:nowrap">'
        "accuracy on clean test images (%), one seed</caption>"
        f'<tr><th scope="col" align="left">trained on</th>{heads}</tr>{line(_trained_on("clean"), clean)}'
        f"{line(_trained_on(method), mine)}{line('protection (points)', lost)}</table>"
    )
