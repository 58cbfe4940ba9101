"""What the craft panel runs and remembers, without widgets: settings, cost, the run itself, and the history of runs."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from semkit.analysis import figures, pictures
from semkit.analysis.canvas import as_html
from semkit.analysis.cost import passes_of
from semkit.analysis.report import cell
from semkit.analysis.statistics import learner
from semkit.analysis.study import crafted_noise, learned_row
from semkit.images.files import atomic_write, read_json, shown
from semkit.images.imageset import ImageSet, Split, stratified_limit
from semkit.images.pixels import add_noise
from semkit.nets.engine import count_passes
from semkit.nets.lab import Lab, key
from semkit.protections.crafting import CraftRecipe
from semkit.protections.methods import craft_recipe, label_of
from semkit.protections.noise import Noise
from semkit.training.learning import accuracy
from semkit.training.recipes import LearnRecipe, lasting, learn_recipe

TRAINING_RADII = (0, 4)  # of the learners: ERM and AT
LEARNERS = tuple(map(learner, TRAINING_RADII))
KNOBS = ("recipe", "ρu", "ρa", "surrogate steps", "noise steps", "samples")
MEASURED = ("passes", "seconds", "PSNR", *LEARNERS)
# How runs are sorted: column -> whether the smallest comes first. The lower a learner ends, the better the noise.
SORTED = {"run": False, "passes": True, "seconds": True, "PSNR": False} | dict.fromkeys(LEARNERS, True)
VISIBLE = 30  # dB of PSNR: below it noise is often seen; noise of 8 levels in every value has 30.1 dB


@dataclass(frozen=True)
class Settings:
    """What a run does: it crafts noise by `recipe`, then trains `learners`, training radius -> recipe."""

    method: str
    recipe: CraftRecipe
    learners: dict[int, LearnRecipe]

    def __str__(self) -> str:
        made = self.recipe
        return (
            f"{self.name}, radius {made.radius:g}, perturbation radius {made.surrogate_side.radius:g}; "
            f"{made.sgd.steps} surrogate steps, noise steps x draws: {made.steps} x {made.samples}"
        )

    @property
    def name(self) -> str:
        """What the recipe is: its method, if both sides are the method's, else EM's sides in the method's recipe."""
        own, mine = ((type(of.noise_side), type(of.surrogate_side)) for of in (craft_recipe(self.method), self.recipe))
        return label_of(self.method) if own == mine else f"{label_of('em')} in {label_of(self.method)}'s recipe"

    @property
    def knobs(self) -> dict:
        """What was set, by the KNOBS of the table of runs."""
        made = self.recipe
        values = self.name, made.radius, made.surrogate_side.radius, made.sgd.steps, made.steps, made.samples
        return dict(zip(KNOBS, values, strict=True))

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

    Milestones move with the surrogate steps.
    """
    recipe = craft_recipe(method, preset, radius=radius, perturbation_radius=perturbation_radius, size=size)
    recipe = lasting(recipe, surrogate_steps or recipe.sgd.steps)
    budget = dict(steps=noise_steps or recipe.steps, samples=samples or recipe.samples)
    radii = TRAINING_RADII if learners else ()
    return Settings(
        method, replace(recipe, **budget),
        {r: learn_recipe(preset, perturbation_radius=r, size=size) for r in radii},
    )  # fmt: skip


def _psnr(square: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared change of 8-bit values."""
    return 10 * math.log10(255**2 / square) if square else math.inf


def visible(radius: float) -> str:
    """A note that noise of this radius may be seen, because its PSNR may be below VISIBLE; else ""."""
    least = _psnr(radius**2)
    note = f"at radius {radius:g} PSNR may fall to {least:.1f} dB: below {VISIBLE} dB noise is often visible"
    return note if least < VISIBLE else ""


@dataclass(frozen=True)
class Made:
    """What a run of one seed has made so far: the noise, the seconds it took, the rows of learners."""

    settings: Settings
    seed: int
    noise: Noise
    seconds: float
    rows: tuple[dict, ...] = ()


def run(split: Split, what: Settings, *, seed: int = 0, before: int = 0, lab: Lab | None = None) -> Iterator[Made]:
    """Craft the noise and train the learners of `what`: what is made so far, after the noise and after each learner.

    The metrics of lab.on_step include "done", the passes so far: `before` and those of this run. With lab.cache a
    stopped run goes on where it was when it is called again.
    """
    lab, n, done = lab or Lab(), len(split.train), before

    def told(job: str, step: int, total: int, metrics: dict):
        return lab.on_step and lab.on_step(job, step, total, {**metrics, "done": done + metrics["passes"]})

    counting = replace(lab, on_step=told)
    noise, cost = crafted_noise(split.train, what.recipe, seed=seed, lab=counting.doing(f"crafting, seed {seed}"))
    made, done = Made(what, seed, noise, cost["seconds"]), done + what.recipe.cost(n).total
    yield made
    sets = {what.method: split.train.with_noise(noise.levels), "clean": split.train}
    for (radius, recipe), (method, train) in product(what.learners.items(), sets.items()):
        kind = "clean" if method == "clean" else "protected"
        job = counting.doing(f"{learner(radius)} on {kind} images, seed {seed}")
        row = learned_row(train, split.test, recipe, seed=seed, lab=job)
        made = replace(made, rows=(*made.rows, {"method": method, "training_radius": radius, "seed": seed, **row}))
        done += recipe.cost(n).total
        yield made


def record(made: Made, split: Split, images: str, preset: str, progress: "Progress") -> dict:
    """The record of a run for the history: first of its noise, then of its learners. images: the name of the split.

    of: a hash of images and recipe, the same for all seeds. passes, seconds: of the noise. PSNR: in dB, of up to 2,000
    images. strip, curves: HTML. ERM, AT 4/255, and both with " clean" after them: accuracies of 1.
    """
    train, recipe, levels = split.train, made.settings.recipe, made.noise.levels
    known = {"of": key(learned_row.__module__, train.fingerprint, recipe), "seed": made.seed}
    if made.rows:
        clean = [" clean" * (row["method"] == "clean") for row in made.rows]
        return known | {learner(r["training_radius"]) + of: r["last"] for r, of in zip(made.rows, clean, strict=True)}
    few = train.images[:2000].cpu()
    change = add_noise(few, levels[:2000].cpu()).float() - few
    caption = f"{train.name}, {len(train)} images, {preset} preset, seed {made.seed}: {made.settings}"
    return known | made.settings.knobs | {
        "images": images, "passes": recipe.cost(len(train)).total, "seconds": made.seconds,
        "PSNR": _psnr(float((change**2).mean())), "strip": strip_html(train, levels, made.settings, caption),
        "curves": progress.html(max(progress.losses)) if progress.losses else None,
    }  # fmt: skip


@dataclass(frozen=True)
class History:
    """All runs so far as records. folder: where each record is a file, so that all kernels know it; None: nowhere."""

    folder: Path | None
    files: Mapping[str, dict] = field(default_factory=dict)  # name, by the time -> record

    @classmethod
    def opened(cls, lab: Lab, preset: str) -> "History":
        """The runs of this preset, engine and code that lab.cache has. Raises ValueError for a damaged record."""
        if lab.cache is None:
            return cls(None)
        by = key(learned_row.__module__, preset, lab.engine.settings(), CraftRecipe(), LearnRecipe())
        return cls(Path(lab.cache) / f"panel-{by}").updated()

    def updated(self) -> "History":
        """The history with what other kernels have written since. Raises ValueError for a damaged record."""
        there = self.folder.glob("*.json") if self.folder else ()
        new = {path.name: _read(path) for path in there if path.name not in self.files}
        return replace(self, files=dict(sorted({**self.files, **new}.items())))

    def adding(self, new: dict) -> "History":
        """The history with one more record, if it is new; each is a separate file, because other kernels write too."""
        new = {name: value for name, value in new.items() if value is not None}
        if any(new.items() <= old.items() for old in self.records):
            return self
        name = f"{time.time_ns()}-{new['of']}.json"
        if self.folder:
            atomic_write(self.folder / name, json.dumps(new).encode())
        return replace(self, files={**self.files, name: new})

    @property
    def records(self) -> list[dict]:
        return [*self.files.values()]

    def has(self, images: str, what: Settings) -> bool:
        """Whether one of its runs has these images and settings."""
        return any(({"images": images} | what.knobs).items() <= old.items() for old in self.records)

    @property
    def seeds(self) -> pd.DataFrame:
        """A line for each run and seed; `run` numbers the runs as they began. What later records lack stays."""
        names = "images", *KNOBS, *MEASURED, *(f"{name} clean" for name in LEARNERS), "strip", "curves"
        every = pd.DataFrame(self.records, columns=["of", "seed", *names])
        every = every.groupby(["of", "seed"], sort=False).last().reset_index()
        return every.assign(run=every["of"].factorize()[0] + 1)

    def table(self, by: str = "run") -> pd.DataFrame:
        """A line for each run, sorted by a column of SORTED: means over its seeds, PSNR in dB, accuracies in %."""
        runs = self.seeds.groupby("run")
        table = runs[["images", *KNOBS]].first().assign(seeds=runs.size())
        table[[*MEASURED]] = runs[[*MEASURED]].mean()
        table[[*LEARNERS]] *= 100
        return table.reset_index().sort_values(by, ascending=SORTED[by], kind="stable").convert_dtypes()

    def alike(self, images: str, what: Settings) -> pd.DataFrame:
        """The lines of table() that differ from these images and settings in the noise radius at most."""
        table, wanted = self.table(), {"images": images} | what.knobs
        return table[(table[[*wanted]] == pd.Series(wanted)).drop(columns="ρu").all(axis=1)]


def _read(path: Path) -> dict:
    try:
        found = read_json(path)
        return found | {"of": found["of"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{shown(path)} is damaged; delete it, and its run is made again") from error


def strip_html(images: ImageSet, noise: torch.Tensor, what: Settings, caption: str) -> str:
    """The first image of up to 5 classes, the same image protected, and its noise int8 [N,3,H,W]."""
    labels = images.labels.tolist()
    place = [labels.index(label) for label in dict.fromkeys(labels)][:5]
    radius, name = what.recipe.radius, what.name
    noises = {name.replace(" in ", " in\n"): noise[place].cpu()}
    figure = pictures.strip_figure(images.images[place].cpu(), noises, radius=radius)
    alt = f"{len(place)} images, the same with {name} noise, and the noise: ±{radius:g} levels as black and white"
    return as_html(figure, alt, caption)


def measured_html(found: Mapping, now: Settings, mine: pd.DataFrame) -> str:
    """What the map `found` (page.mapped) has nearest to these settings; mine: runs of History.alike, beside it."""
    at = now.recipe.radius, now.recipe.sgd.steps, now.recipe.surrogate_side.radius
    figure, told, strip = figures.map_figure(found, at, mine)
    image = f'<img alt="Protected images above their noise" style="width:16em" src="{strip}">' if strip else ""
    caption = found["recipe"] + " Stars: your runs with the other knobs as they are." * bool(mine["ERM"].count())
    drawn = f"<div style='max-width:750px'>{as_html(figure, told, caption)}</div>"  # a longer caption moves nothing
    return f"{told}<div style='display:flex;flex-wrap:wrap;align-items:flex-start'>{drawn}{image}</div>"


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
        with count_passes():  # a separate counter, because a look is no part of the run
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


def page(table: pd.DataFrame, caption: str, **how) -> str:
    """A table as HTML with a caption; how: of DataFrame.to_html."""
    caption = f'<caption style="white-space:nowrap">{caption}</caption>'
    html = table.to_html(na_rep="", border=0, **how).replace("<thead>", f"{caption}<thead>", 1)
    return html.replace("<table ", '<table cellpadding="4" style="text-align:right" ', 1)


def cells(values: pd.Series) -> str:
    """Accuracies of 1, or "…" where none is known."""
    return cell(values.dropna()) if values.notna().any() else "…"


def accuracies_html(seeds: pd.DataFrame) -> str:
    """What learners reach on clean test images, and the protection, paired by seed; seeds: those of one run."""
    found = {}
    for name in LEARNERS:
        clean, protected = seeds[f"{name} clean"], seeds[name]
        lines = {"clean images": clean, "protected images": protected, "protection (points)": clean - protected}
        found[name] = {of: cells(values.astype(float)) for of, values in lines.items()}
    table = pd.DataFrame(found).rename_axis(index=None, columns="trained on")
    return page(table, "accuracy on clean test images (%)")
