"""Figures of rows, one function each: rows in (a DataFrame or a list of dicts), a matplotlib Figure out."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns

from semkit.analysis import canvas
from semkit.analysis.canvas import Figure, new_figure, styles, titled
from semkit.analysis.pictures import draw_rows, strip_rows
from semkit.analysis.statistics import Correlation, Rows, interval, learner
from semkit.analysis.study import crafted_noise
from semkit.countermeasures import registry
from semkit.images.imageset import ImageSet
from semkit.nets.lab import Lab
from semkit.protections.base import Recipe
from semkit.protections.methods import DEFAULT, METHODS

PAIR = "noise side/surrogate side"
ACCURACY = "accuracy on clean test images (%)"


def _draw_accuracy(axes, rows: Rows, chance: float | None) -> None:
    rows = pd.DataFrame(rows).assign(last=lambda rows: 100 * rows["last"])
    radii = sorted(rows["training_radius"].unique())
    canvas.draw_points(axes, rows, "training_radius", "last", joined=True, native_scale=True)
    axes.set(xticks=radii, xticklabels=["0\n(ERM)" if r == 0 else f"{r:g}" for r in radii])
    axes.set_xlabel("learner's training radius (levels of 255)")
    axes.grid(axis="y", alpha=0.3)
    canvas.chance_line(axes.axhline, chance)
    axes.set(ylim=(0, 100), ylabel=ACCURACY)
    canvas.legend(axes, PAIR if rows["method"].str.contains("/").any() else None)


def accuracy_figure(rows: Rows, *, chance: float | None = None, title: str) -> Figure:
    """Clean test accuracy over the learner's training radius, a line a method, 95 % intervals over seeds.

    >>> rows = pd.DataFrame({"method": ["clean", "em"], "training_radius": 0, "seed": 0, "last": [0.9, 0.4]})
    >>> sk.accuracy_figure(rows, chance=0.1, title="Protection by EM")
    <Figure size 800x400 with 1 Axes>
    """
    figure = new_figure(8, 4)
    _draw_accuracy(figure.subplots(), rows, chance)
    return titled(figure, title)


def sweep_figure(rows: pd.DataFrame, train: ImageSet, crafts: Mapping[str, Recipe | None], lab: Lab) -> Figure | None:
    """The figure of a sweep of countermeasures, or of named methods that add noise; None for any other.

    rows: with the columns of study.grid and `preset`. Of methods: left the images, protected images and noise, drawn
    from -radius to +radius of its own recipes; right the accuracy of learners over their training radius.
    """
    seeds = rows["seed"].unique()
    many = f"{len(seeds)} seed" + "s" * (len(seeds) > 1)
    title = f"{train.name}: {len(train)} training images, {rows['preset'][0]} preset, {many}"
    chance = 1 / len(train.classes)
    if "countermeasure" in rows:
        return countermeasures_figure(rows, chance=chance, title=title)
    makers = {method: recipe for method, recipe in crafts.items() if recipe}
    if any(recipe.radius is None for recipe in makers.values()) or not crafts.keys() <= METHODS.keys():
        return None
    place = [train.labels.tolist().index(k) for k in range(min(6, len(train.classes)))]
    made = {
        method: crafted_noise(train, recipe, seed=int(seeds[0]), lab=lab)[0].levels[place]
        for method, recipe in makers.items()
    }
    radius = max((recipe.radius for recipe in makers.values()), default=0)
    figure = new_figure(12, 4.6)
    left, right = figure.subfigures(1, 2)
    draw_rows(left, strip_rows(train.images[place], made, radius))
    _draw_accuracy(right.subplots(), rows, chance)
    return titled(figure, title)


def points_by_place(rows: pd.DataFrame, value: str, place: str, names: Sequence[str], *, by: str) -> tuple:
    """(figure, panels, their values of column `by`): a line a name in column `place`, a point a method at its value."""
    groups = list(rows.groupby(by, sort=False))
    figure = new_figure(2.5 + min(11, 5.5 * len(groups)), 1.6 + 0.42 * len(names))
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (_, mine) in zip(panels, groups, strict=True):
        canvas.draw_points(axes, mine, value, place, order=names)
        axes.set(ylabel=None)
        axes.grid(axis="x", alpha=0.3)
        axes.get_legend().remove()
    return figure, panels, [name for name, _ in groups]


def countermeasures_figure(rows: Rows, *, chance: float | None = None, title: str) -> Figure:
    """Clean test accuracy after each countermeasure, points with 95 % intervals, a panel a training radius.

    The countermeasures stand in the order of their registry.

    >>> row = {"method": "em", "training_radius": 0, "countermeasure": "jpeg", "last": 0.4}
    >>> sk.countermeasures_figure([row], chance=0.1, title="JPEG")
    <Figure size 800x202 with 1 Axes>
    """
    rows = pd.DataFrame(rows).sort_values("training_radius", kind="stable")
    rows = rows.assign(last=100 * rows["last"])
    names = sorted(rows["countermeasure"].unique(), key=registry.place_of)
    figure, panels, radii = points_by_place(rows, "last", "countermeasure", names, by="training_radius")
    for axes in panels:
        canvas.chance_line(axes.axvline, chance)
        axes.set(xlim=(0, 100), xlabel=ACCURACY)
    panels[0].set_yticks(range(len(names)), map(registry.label_of, names))
    canvas.legend(panels[-1])
    return titled(figure, title, panels, [learner(radius) for radius in radii])


def rises_figure(rows: Rows, *, title: str) -> Figure:
    """How much each perturbation raises the loss on protected images, points with 95 % intervals, a panel a learner.

    Rows as of measure.rise_rows.

    >>> row = {"method": "em", "learner": "ERM", "perturbation": "random", "rise": 0.1}
    >>> sk.rises_figure([row], title="Rises of the loss")
    <Figure size 800x202 with 1 Axes>
    """
    rows = pd.DataFrame(rows)
    names = list(rows["perturbation"].unique())
    figure, panels, learners = points_by_place(rows, "rise", "perturbation", names, by="learner")
    for axes in panels:
        canvas.reference(axes.axvline, 0, "no rise")
        axes.set_xlabel("rise of the learner's loss (nats)")
    canvas.legend(panels[-1])
    return titled(figure, title, panels, learners)


def scatter_figure(
    rows: Rows,
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    correlation: Correlation | None = None,
    means: bool = True,
    title: str,
) -> Figure:
    """A point a row at its columns x and y: a marker a method, and in rows with seeds a colour a seed.

    Seeds have a thin least-squares line each. means: the mean of a method over its seeds too, black, with the 95 %
    intervals of both columns. The correlation with its intervals stands beside the axes.

    >>> rows = pd.DataFrame({"method": "em", "x": [0, 1, 2], "y": [5, 3, 4]})
    >>> sk.scatter_figure(rows, x="x", y="y", xlabel="robustness (nats)", ylabel="protection (points)", title="EM")
    <Figure size 800x460 with 1 Axes>
    """
    rows, figure = pd.DataFrame(rows), new_figure(8, 4.6)
    axes, look = figure.subplots(), styles(rows["method"].unique())
    marks = dict(zip(look, "os^DvPX*<>" * len(look), strict=False))
    seeds = dict(zip(rows["seed"].unique() if "seed" in rows else (), canvas.SPARE, strict=False))
    colours = seeds or {method: style["color"] for method, style in look.items()}
    how = dict(hue="seed" if seeds else "method", palette=colours, style="method", markers=marks)
    sns.scatterplot(rows, x=x, y=y, s=35, alpha=0.7, linewidth=0, ax=axes, **how)
    for seed, colour in seeds.items():
        mine = rows[rows["seed"] == seed].sort_values(x)
        if mine[x].nunique() > 1:
            axes.plot(mine[x], np.polyval(np.polyfit(mine[x], mine[y], 1), mine[x]), color=colour, lw=0.8, alpha=0.6)
    for method, mine in rows.groupby("method", sort=False) if means and seeds else ():
        across, up = (interval(mine[column]) for column in (x, y))
        ends = [[mean - low] for mean, low, _ in (up, across)]
        axes.errorbar(across[0], up[0], *ends, capsize=3, lw=1, fmt=marks[method], color="0.2", ms=5, alpha=0.7)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    canvas.legend(axes)
    if correlation:
        text = canvas.minus(str(correlation))
        axes.text(1.02, 0, text, transform=axes.transAxes, va="bottom", fontsize="small")
    return titled(figure, title)


def losses_figure(rows: Rows, *, log: bool = False, title: str) -> Figure:
    """Loss over the radius of a perturbation: its worst case (solid) and a random one (dashed), a colour a method.

    Rows with method, direction, radius, loss; several (seeds) of the same radius give a mean and a 95 % band, on the
    log scale those of the logarithms, since an interval of losses near zero would reach below zero.

        sk.losses_figure(sk.read_rows("results/shapes-methods/losses.csv"), title="Losses")
    """
    rows = pd.DataFrame(rows)
    figure = new_figure(8, 4)
    axes = figure.subplots()
    axes.set_yscale("log" if log else "linear")  # seaborn takes means and intervals on the scale of the axis
    for direction, ls, name in (("adversarial", "-", "worst case"), ("random", "--", "random")):
        canvas.draw_lines(axes, rows[rows["direction"] == direction], "radius", "loss", ls=ls, label=f"{{}}, {name}")
    axes.set(xlabel="radius of the perturbation (levels of 255)", ylabel="cross-entropy loss (nats)")
    canvas.legend(axes, "noise, perturbation")
    return titled(figure, title)


def lines_figure(
    rows: Rows,
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    points: tuple[str, str] | None = None,
    log: bool = False,
    names: str | None = None,
    title: str,
) -> Figure:
    """Column y over column x, a line a method, 95 % bands over the rows of the same x; log: of the axis x, with
    a tick at every x.

    names: the column whose text stands above the points of each x.
    points: the columns of an estimate of the same quantity and of its standard error; where rows have them, their mean
    is a point beside the line, with two standard errors to both sides.

    >>> rows = pd.DataFrame({"method": "em", "step": [0, 1, 2], "loss": [2.3, 1.1, 0.4]})
    >>> sk.lines_figure(rows, x="step", y="loss", xlabel="step", ylabel="loss (nats)", title="Loss")
    <Figure size 800x400 with 1 Axes>
    """
    rows = pd.DataFrame(rows)
    figure = new_figure(8, 4)
    axes = figure.subplots()
    canvas.draw_lines(axes, rows, x, y, **({"marker": ""} if points else {}))
    look = styles(rows["method"].unique())
    for (method, place), found in rows.dropna(subset=points or ()).groupby(["method", x]) if points else ():
        bar = 2 * np.linalg.norm(found[points[1]]) / len(found)
        axes.errorbar(place, found[points[0]].mean(), bar, capsize=3, ms=5, **look[method] | {"ls": ""})
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        values = sorted(rows[x].unique())
        axes.set_xscale("log")
        axes.set_xticks(values, [f"1/{1 / value:g}" if value < 1 else f"{value:g}" for value in values])
        axes.minorticks_off()
    for place, name in rows.groupby(x)[names].first().items() if names else ():
        where = dict(transform=axes.get_xaxis_transform(), rotation=90, ha="center", va="top")
        axes.text(place, 0.97, name, fontsize="small", color="0.3", **where)
    canvas.legend(axes)
    return titled(figure, title)


def map_figure(found: Mapping, at: Sequence[float], mine: pd.DataFrame) -> tuple[Figure, str, str]:
    """Accuracy over the noise radius, as measured nearest to `at`: (figure, what it says there, picture of the noise).

    found: a map as semkit.lessons.page reads it. at: a value of each of its knobs: noise radius, surrogate steps and
    perturbation radius. mine: further means in % over the radius `ρu`, drawn as stars.
    """
    (radii, *_), cells, told = found["knobs"].values(), found["cells"], []
    radius, steps, around = near = [
        min(known, key=lambda value: abs(np.log((value + 1) / (to + 1))))
        for known, to in zip(found["knobs"].values(), at, strict=True)
    ]
    figure = new_figure(7.5, 2.8)
    axes = figure.subplots()
    for name, colour, line in (("ERM", "#0072B2", "-"), ("AT 4/255", "#D55E00", "--")):
        points = pd.DataFrame([cells[f"{r}-{steps}-{around}"][name] for r in radii], radii, ["y", "low", "high"])
        off = (points["y"] - points["low"], points["high"] - points["y"])
        axes.errorbar(radii, points["y"], off, color=colour, ls=line, marker="o", ms=4, capsize=3, label=name)
        clean, (y, low, high) = cells["clean"][name]["y"], points.loc[radius]
        axes.axhline(clean, color=colour, ls=":", lw=1, label=f"{name}, no noise")
        axes.plot(mine["ρu"], mine[name].astype(float), "*", ms=12, mec="black", color=colour)
        told.append(f"{name} {y:.1f} %" + f" [{low:.1f}, {high:.1f}]" * (low == low) + f", without noise {clean:.1f} %")
    axes.axvline(at[0], color="0.6", lw=1)
    axes.set(xscale="log", xlim=(0.9, 36), ylim=(0, 100), xlabel="radius ρu (levels of 255)", ylabel="accuracy (%)")
    axes.set_xticks([1, *radii, 32], [1, *radii, 32])
    axes.minorticks_off()
    canvas.legend(axes)
    where = f"at radius ρu {radius}, ρa {around} and {steps} surrogate steps"
    text = f"{'Measured' if near == [*at] else 'Nearest measured'} {where}: {'; '.join(told)}"
    return figure, text, cells[f"{radius}-{steps}-{around}"].get("strip", "")


def draw_right(axes, right: Mapping[int, tuple[float, float]], total: int, method: str = DEFAULT) -> None:
    """A surrogate's accuracy over its steps. right: step -> (on images with noise, without)."""
    for place, (name, look) in enumerate({"with their noise": method, "without": "clean"}.items()):
        axes.plot(list(right), [100 * pair[place] for pair in right.values()], ms=4, label=name, **styles([look])[look])
    axes.set(xlim=(0, total), ylim=(0, 100), xlabel="step", ylabel="surrogate right (%)")
    axes.grid(alpha=0.3)
    canvas.legend(axes, "images")


def progress_figure(losses: Mapping[int, float], right: Mapping[int, tuple[float, float]], total: int) -> Figure:
    """Progress of crafting in `total` steps: the surrogate's loss, and its accuracy with noise and without."""
    figure = new_figure(5.4, 3.8)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(losses.keys(), losses.values(), color="#0072B2", lw=1)
    upper.set(xlim=(0, total), ylim=(0, 1.1 * max(losses.values())), ylabel="surrogate's loss (nats)")
    upper.grid(alpha=0.3)
    draw_right(lower, right, total)
    return figure
