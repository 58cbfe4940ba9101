"""A sweep: the runs of a grid, what they take, and the files that are written of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from semkit.analysis.cost import passes_of, seconds_of
from semkit.analysis.measure import loss_rows, noise_rows, rise_rows
from semkit.analysis.report import table, write_report, write_rows
from semkit.analysis.study import crafted_noise, grid, grid_recipes
from semkit.app.progress import duration
from semkit.images.imageset import ImageSet, Split
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.base import NoiseRecipe, Recipe
from semkit.protections.methods import METHODS
from semkit.training.learning import LearnRecipe


def cost_in_words(recipes: Sequence[Recipe | LearnRecipe], train: ImageSet, engine: Engine, seeds: int) -> str:
    """The passes and the time that these recipes take, each once for every seed."""
    n, classes, size = len(train), len(train.classes), train.images.shape[-1]
    seconds = seeds * seconds_of(recipes, n, classes, size, engine)
    return f"{seeds * passes_of(recipes, n).total:,} passes on {engine.device}, at most about {duration(seconds)}"


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, as study.grid takes them. preset: what rows and title call their preset."""

    split: Split
    crafts: Mapping[str, Recipe | None]
    learners: Mapping[float | str, LearnRecipe]
    countermeasures: Sequence[str]
    seeds: Sequence[int]
    preset: str

    def recipes(self) -> list[Recipe | LearnRecipe]:
        """What is run for each seed. Raises ValueError for a countermeasure that cannot be applied."""
        return grid_recipes(self.split, self.crafts, self.learners, self.countermeasures)

    def in_words(self, engine: Engine) -> str:
        """How many runs there are and what they take."""
        train, seeds = self.split.train, len(self.seeds)
        times = f"{len(self.countermeasures)} countermeasures x " if self.countermeasures else ""
        return (
            f"{train!r}, {len(self.split.test)} test images: {len(self.crafts)} methods x {times}{len(self.learners)} "
            f"ways x {seeds} seeds in {engine.precision}, {cost_in_words(self.recipes(), train, engine, seeds)}"
        )

    def write(self, out: Path, lab: Lab, reference: NoiseRecipe | None = None) -> tuple[pd.DataFrame, str]:
        """(rows, their table) of the grid: rows.csv, table.md and, where there is one, figure.png are written to `out`.

        reference: noise.csv and losses.csv of every noise too, held against this recipe, and rises.csv of the learners
        that no countermeasure changed.
        """
        how, recipes = dict(seeds=self.seeds, lab=lab), (self.split, self.crafts)
        counters, rises = dict(countermeasures=self.countermeasures), bool(reference) and not self.countermeasures
        rows = self._named(grid(*recipes, self.learners, keep_nets=rises, **counters, **how))
        text = table(rows)
        write_report(out, rows, text, self.figure(rows, lab))
        if reference:
            write_rows(self._named(noise_rows(*recipes, reference=reference, **how)), out / "noise.csv")
            write_rows(self._named(loss_rows(*recipes, **how)), out / "losses.csv")
        if rises:
            write_rows(self._named(rise_rows(*recipes, self.learners, **how)), out / "rises.csv")
        return rows, text

    def _named(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows.insert(0, "preset", self.preset)
        return rows

    def figure(self, rows: pd.DataFrame, lab: Lab):
        """The Figure of a sweep of countermeasures or of named methods that add noise; None for any other."""
        from semkit.analysis import figures  # matplotlib takes a second that the other commands need not pay

        train = self.split.train
        seeds = f"{len(self.seeds)} seed" + "s" * (len(self.seeds) > 1)
        title = f"{train.name}: {len(train)} training images, {self.preset} preset, {seeds}"
        about = dict(title=title, chance=1 / len(train.classes))
        if self.countermeasures:
            return figures.countermeasures_figure(rows, **about)
        filtered = [name for name, recipe in self.crafts.items() if recipe and recipe.radius is None]
        if filtered or not self.crafts.keys() <= METHODS.keys():
            return None
        place = [train.labels.tolist().index(k) for k in range(min(6, len(train.classes)))]
        made = {
            method: crafted_noise(train, recipe, seed=self.seeds[0], lab=lab)[0].levels[place]
            for method, recipe in self.crafts.items() if recipe
        }  # fmt: skip
        radius = max((recipe.radius for recipe in self.crafts.values() if recipe), default=0)
        return figures.protection_figure(rows, train.images[place], made, radius=radius, **about)
