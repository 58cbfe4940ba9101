"""Lesson 2: a film of error-minimising noise, and whether learners read the noise or the picture."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product

import pandas as pd
import torch
from torch import nn

from semkit.analysis import canvas
from semkit.analysis.figures import draw_right, points_by_place
from semkit.analysis.pictures import draw_rows, rescaled
from semkit.analysis.statistics import learner
from semkit.analysis.study import crafted_surrogate, learned_net
from semkit.images.files import read_tensors, write_tensors
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import add_noise, to_levels
from semkit.lessons.craftrun import Progress
from semkit.nets.engine import engine_of
from semkit.nets.lab import Lab, Store, kept
from semkit.protections.crafting import CraftRecipe, craft, noise_of_batch
from semkit.protections.methods import craft_recipe
from semkit.training.learning import accuracy
from semkit.training.recipes import learn_recipe

SHOWN = 6  # images of a film
GREY = 128


# --- noise arising


@dataclass
class Film:
    """Error-minimising noise over the steps of its surrogate, and what the surrogate gets right.

    images: the training images. every: steps from frame to frame.
    frames: step -> noise int8 [SHOWN,C,H,W] of the first images. progress.right: step -> what the surrogate labels
    rightly, as a share of some 200 images with their noise and of the same without.
    """

    images: ImageSet
    recipe: CraftRecipe
    every: int
    frames: dict[int, torch.Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def look(self, what: str, step: int, total: int, metrics: dict) -> None:
        """Keep a frame of the first and of every `every`-th step of the surrogate: an on_step of crafting."""
        if (step == 1 or step % self.every == 0) and step <= self.recipe.sgd.steps:
            self.frames[step] = metrics["noise"][:SHOWN].cpu().clone()
            self.progress.look(step, metrics["surrogate"], self.images, metrics["noise"])

    def draw(self, frame: int) -> tuple[canvas.Figure, str, str]:
        """Figure, alternative text and caption of one frame: the images, their noise, and the surrogate until then."""
        steps = list(self.frames)[: frame + 1]
        noise = self.frames[steps[-1]]
        images = self.images.images[: len(noise)].cpu()
        figure = self._beside_curves({"original": images, **self._rows(images, noise)}, steps)
        with_noise, without = (f"{100 * share:.0f} %" for share in self.progress.right[steps[-1]])
        told = f"Step {steps[-1]}: the surrogate labels {with_noise} rightly with noise, {without} without"
        return figure, told, f"{told}. First {len(noise)} images; shares of 200."

    def strip(self, frames: int = 8, images: int = 2) -> canvas.Figure:
        """Some frames side by side, each with the first images protected and their noise; beside them the curves."""
        steps = list(self.frames)
        chosen = [steps[round(k * (len(steps) - 1) / (frames - 1))] for k in range(frames)]
        rows = {}
        for k in range(images):
            noise = torch.stack([self.frames[step][k] for step in chosen])
            rows |= self._rows(self.images.images[k].cpu(), noise, f"image {k + 1}")
        return self._beside_curves(rows, steps, [f"step {step}" for step in chosen])

    def _rows(self, images: torch.Tensor, noise: torch.Tensor, of: str = "") -> dict:
        radius, whose = self.recipe.radius, f"{of}'s " if of else ""
        told = f"{whose}noise: ±{radius:g}\nas black, white"
        return {f"{of} protected".strip(): add_noise(images, noise), told: rescaled(noise, radius)}

    def _beside_curves(self, rows: dict, steps: list[int], heads: Iterable[str] = ()) -> canvas.Figure:
        columns = len(next(iter(rows.values())))
        figure = canvas.new_figure(5 + 0.85 * columns, 0.4 + 0.85 * len(rows))
        left, right = figure.subfigures(1, 2, width_ratios=(1.2 + 0.85 * columns, 3.8))
        draw_rows(left, rows)
        for axes, head in zip(left.axes, heads, strict=False):
            axes.set_title(head, fontsize="small")
        draw_right(right.subplots(), {step: self.progress.right[step] for step in steps}, self.recipe.sgd.steps, "em")
        return figure


def filmed(images: ImageSet, recipe: CraftRecipe, *, every: int = 20, seed: int = 0, lab: Lab | None = None) -> Film:
    """The Film of crafting noise by `recipe`; it and the noise are kept with lab.cache.

    film = sk.unlearnable.filmed(split.train, sk.craft_recipe("em", "demo"))
    """
    lab, film = lab or Lab(), Film(images, recipe, every)

    def make(_):
        looked_at = replace(lab, on_step=film.look)
        crafted_surrogate(images, recipe, seed=seed, lab=looked_at)
        if not film.frames:  # the noise was kept before, without a film
            craft(images, recipe, seed=seed, lab=looked_at)
        return (({str(step): frame for step, frame in film.frames.items()}, {"right": film.progress.right}),)

    store = Store(
        ".safetensors", lambda made, path: write_tensors(path, *made), lambda path: read_tensors(path, ["right"])
    )
    ((frames, told),) = kept(lab, "film", (images.fingerprint, recipe, every, seed), make, store)
    film.progress.right = {int(step): tuple(shares) for step, shares in told["right"].items()}
    film.frames = {step: frames[str(step)] for step in film.progress.right}
    return film


# --- noise or picture?


def noise_towards(surrogate: nn.Module, images: ImageSet, labels: torch.Tensor, recipe: CraftRecipe) -> torch.Tensor:
    """Noise int8 [N,C,H,W] that lowers a trained surrogate's loss on the images for these labels, from zero."""
    engine, made = engine_of(surrogate), []
    generator, recipe = engine.generator(0, "towards"), replace(recipe, start="zero", steps=20)
    for part in torch.arange(len(images)).split(recipe.sgd.batch):
        x = engine.images(images.images[part])
        made.append(noise_of_batch(surrogate, x, labels[part].to(x.device), torch.zeros_like(x), recipe, generator))
    return to_levels(torch.cat(made)).cpu()


def readings(surrogate: nn.Module, test: ImageSet, recipe: CraftRecipe) -> dict[str, ImageSet]:
    """Test images by name that tell whether a learner reads the noise or the picture.

    The noise is the surrogate's, made for the test images: for their own class, and for the next one. The labels are
    those of the pictures; in the last set, the same images as in the third, those of the noise.

        shown = sk.unlearnable.readings(surrogate, split.test, sk.craft_recipe("em", "demo"))
        {name: sk.accuracy(learner, images) for name, images in shown.items()}
    """
    other = (test.labels + 1) % len(test.classes)
    own, wrong = (noise_towards(surrogate, test, labels, recipe) for labels in (test.labels, other))
    misled = test.with_noise(wrong)
    return {
        "clean test images": test,
        "with noise of their class": test.with_noise(own),
        "with noise of another class": misled,
        "noise of their class over grey": replace(test, images=torch.full_like(test.images, GREY)).with_noise(own),
        "another class: answers the noise": replace(misled, labels=other),
    }


def reading_rows(
    split: Split, *, preset: str = "demo", seeds: Iterable[int] = range(3), tests: int = 500, lab: Lab | None = None
) -> pd.DataFrame:
    """Rows of accuracy, `right`, on each of `readings`, of learners of clean and of EM images, ERM and AT 4.

    The first `tests` test images, stratified; everything of a seed is made with that seed.
    """
    rows, recipe = [], craft_recipe("em", preset)
    for seed in seeds:
        noise, surrogate = crafted_surrogate(split.train, recipe, seed=seed, lab=lab)
        shown = readings(surrogate, split.test.limit(tests), recipe)
        sets = {"clean": split.train, "em": split.train.with_noise(noise.levels)}
        for (method, train), radius in product(sets.items(), (0, 4)):
            learn = learn_recipe(preset, perturbation_radius=radius)
            _, net = learned_net(train, split.test, learn, seed=seed, lab=lab)
            of = dict(method=method, training_radius=radius, seed=seed)
            rows += [{**of, "shown": name, "right": accuracy(net, images)} for name, images in shown.items()]
    return pd.DataFrame(rows)


def readings_figure(rows: pd.DataFrame, *, chance: float, title: str) -> canvas.Figure:
    """Accuracy on each of `readings`.

    Means with 95 % intervals, a panel for each training radius.

        sk.unlearnable.readings_figure(sk.read_rows("rows.csv"), chance=0.1, title="Noise or picture?")
    """
    rows = rows.assign(right=100 * rows["right"]).sort_values("training_radius", kind="stable")
    names = list(rows["shown"].unique())
    figure, panels, radii = points_by_place(rows, "right", "shown", names, by="training_radius")
    for axes in panels:
        canvas.chance_line(axes.axvline, chance)
        axes.set(xlim=(-1, 101), xlabel="right (%)")
    canvas.legend(panels[-1], "trained on")
    return canvas.titled(figure, title, panels, [learner(radius) for radius in radii])
