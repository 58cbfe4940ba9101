"""Rows as people read them: the table, the rows as CSV, the figure."""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from semkit.analysis.cost import passes_of, seconds_of
from semkit.analysis.designs import loss_rows, noise_rows
from semkit.analysis.measure import interval, trained_by
from semkit.analysis.study import crafted_noise, grid, grid_recipes
from semkit.images.files import atomic_write, shown
from semkit.images.imageset import Split
from semkit.nets.lab import Lab
from semkit.protections.protection import NoiseRecipe, Recipe
from semkit.protections.registry import METHODS, label_of
from semkit.training.learning import LearnRecipe


def cell(values: Sequence[float]) -> str:
    """Accuracies of 1 as their mean in % and half its 95 % interval; "-" without any.

    >>> cell([0.5, 0.6])
    '55.0 ± 63.5'
    """
    if not values:
        return "-"
    mean, _, high = interval(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * (high - mean):.1f}" if len(values) > 1 else "")


def table(rows: Sequence[dict]) -> str:
    """Rows of a sweep in Markdown: a line a method (and countermeasure), a column a way to train, accuracy in %.

    ± half the 95 % interval over seeds. Rows that tell noise_seconds get a column of them.
    """
    timed = all("noise_seconds" in row for row in rows)
    ways = list(dict.fromkeys(map(trained_by, sorted(rows, key=lambda row: row["training_radius"]))))
    heads = ["trained on", *ways, *["noise made in"] * timed]
    lines = [heads]
    for method, first in dict.fromkeys((row["method"], row.get("countermeasure")) for row in rows):
        mine = [row for row in rows if (row["method"], row.get("countermeasure")) == (method, first)]
        cells = [cell([row["last"] for row in mine if trained_by(row) == way]) for way in ways]
        seconds = max(row.get("noise_seconds", 0) for row in mine)
        name = ", ".join((label_of(method), *[first] * (first not in (None, "none"))))
        lines.append([name, *cells, *[f"{seconds:.0f} s" if seconds else "-"] * timed])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first line the heads; the columns are padded to one width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def write_rows(rows: Sequence[dict], path: Path) -> None:
    """The rows as CSV, a line a learner; what a row lacks is empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The rows of a CSV that write_rows wrote: numbers, curves and None as such, all else as text.

    Raises ValueError where there is no such file.
    """
    if not Path(path).exists():
        raise ValueError(f"no rows at {shown(path)}; they are in the folder results of semkit's repository")

    def value(text: str):
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    with open(path, newline="") as lines:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(lines)]


def write_sweep(
    split: Split,
    out: Path,
    crafts: Mapping[str, Recipe | None],
    learners: Mapping[float | str, LearnRecipe],
    *,
    seeds: Sequence[int],
    preset: str,
    lab: Lab,
    reference: NoiseRecipe | None = None,
    countermeasures: Sequence[str] = (),
    say: Callable[[str], object] = print,
) -> tuple[str, list[dict]]:
    """(table, rows) of a grid: rows.csv, table.md and, for named methods that add noise, figure.png go to `out`.

    reference: noise.csv and losses.csv too, of designs.noise_rows and loss_rows, held against this recipe.
    countermeasures: as of study.grid, drawn instead of the images. Finished runs are kept in out/runs.
    """
    lab, engine = replace(lab, cache=out / "runs"), lab.engine
    how = dict(seeds=seeds, lab=lab)
    recipes = grid_recipes(split, crafts, learners, countermeasures)
    n, size = len(split.train), split.train.images.shape[-1]
    passes = len(seeds) * passes_of(recipes, n).total
    seconds = len(seeds) * seconds_of(recipes, n, len(split.train.classes), size, engine)
    times = f"{len(countermeasures)} countermeasures x " if countermeasures else ""
    say(
        f"{split.train!r}, {len(split.test)} test images: {len(crafts)} methods x {times}{len(learners)} ways x "
        f"{len(seeds)} seeds, {passes:,} passes, at most about {seconds / 60:.1f} min on {engine.device} in "
        f"{engine.precision}"
    )
    rows = [{"preset": preset, **row} for row in grid(split, crafts, learners, countermeasures=countermeasures, **how)]
    text = table(rows)
    write_rows(rows, out / "rows.csv")
    atomic_write(out / "table.md", (text + "\n").encode())
    if reference:
        measured = noise_rows(split, crafts, reference=reference, **how)
        write_rows([{"preset": preset, **row} for row in measured], out / "noise.csv")
        write_rows([{"preset": preset, **row} for row in loss_rows(split, crafts, **how)], out / "losses.csv")
    if countermeasures:
        _write_countermeasures(split, out, rows)
    elif crafts.keys() <= METHODS.keys() and all(one is None or one.radius is not None for one in crafts.values()):
        _write_figure(split, out, crafts, rows, seeds[0], lab)
    return text, rows


def _title(split: Split, rows: Sequence[dict]) -> str:
    seeds = len({row["seed"] for row in rows})
    title = f"{split.train.name}: {len(split.train)} training images, {rows[0]['preset']} preset, {seeds} seed"
    return title + "s" * (seeds > 1)


def _write_countermeasures(split: Split, out: Path, rows: Sequence[dict]) -> None:
    from semkit.analysis import figures

    chance = 1 / len(split.train.classes)
    figures.save(figures.countermeasures_figure(rows, chance=chance, title=_title(split, rows)), out / "figure.png")


def _write_figure(split: Split, out: Path, crafts, rows: Sequence[dict], seed: int, lab: Lab) -> None:
    from semkit.analysis import figures  # matplotlib takes a second that the other commands need not pay

    place = [split.train.labels.tolist().index(k) for k in range(min(6, len(split.train.classes)))]
    made = {
        method: crafted_noise(split.train, recipe, seed=seed, lab=lab)[0].levels[place]
        for method, recipe in crafts.items() if recipe
    }  # fmt: skip
    figure = figures.protection_figure(
        rows, split.train.images[place], made, radius=8, title=_title(split, rows), chance=1 / len(split.train.classes)
    )
    figures.save(figure, out / "figure.png")
