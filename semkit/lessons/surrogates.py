"""Lesson 3: whose robustness protects. Noises and their parts, and the nine pairs of a noise and a surrogate side.

Rows are those of the designs `pairs` and `parts`. A pair is named "noise side/surrogate side".
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product

import numpy as np
import pandas as pd
import torch
from torch import nn

from semkit.analysis.canvas import SPARE, Figure, legend, minus, new_figure, reference
from semkit.analysis.designs import pairs
from semkit.analysis.measure import CUT, LOOKED_AT, PARTS, losses, noise_part, part_share
from semkit.analysis.pictures import draw_rows, rescaled
from semkit.analysis.statistics import blocked_difference, decide, interval, learner, protection
from semkit.analysis.study import learned_net
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import to_levels
from semkit.nets.engine import engine_of
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe, noise_of_batch
from semkit.protections.methods import PUBLISHED, SIDES, label_of
from semkit.training.perturb import Clean
from semkit.training.recipes import LearnRecipe

Drawn = tuple[Figure, str, str]  # figure, alternative text, caption, as a panel takes it
PAIRS = [f"{noise}/{surrogate}" for noise, surrogate in product(SIDES, SIDES)]
WHOLE = ("whole", *PARTS)
STEPS = 20  # of `written`: enough to cross the radius and back


# --- noises and their parts


def draw_noises(images: torch.Tensor, noises: Mapping[str, torch.Tensor], period: float | None = None) -> Drawn:
    """Images uint8 [N,3,H,W] and below them noises int8 [N,3,H,W], each with the share of its low frequencies.

    period: only the low part of each noise is drawn, waves of so many pixels and longer.
    """
    cut, rows = 1 / period if period else CUT, {"image": images}
    low = {label_of(name): part_share(noise, "low", cut) for name, noise in noises.items()}
    for (label, share), noise in zip(low.items(), noises.values(), strict=True):
        rows[f"{label}\n{share:.0%} low"] = rescaled(noise_part(noise, "low", cut) if period else noise, 8)
    figure = new_figure(1.4 + 0.75 * len(images), 0.2 + 0.8 * len(rows))
    draw_rows(figure, rows)
    told = "; ".join(f"{label} {share:.0%}" for label, share in low.items())
    what = f"waves of {1 / cut:g} pixels and longer"
    alt = f"{len(images)} images and {'the low part of ' if period else ''}their noises. Energy in {what}: {told}"
    return figure, alt, f"Black, grey, white: noise of {minus('-8')}, 0, +8 levels. Low: {what}, share of the energy."


def written(model: nn.Module, images: ImageSet, radius: int = 8, seed: int = 0) -> torch.Tensor:
    """Noise int8 [N,3,H,W] that lowers this net's loss, by STEPS noise steps of EM from zero; the net is not trained.

    delta <- clip(delta - 2 * radius / STEPS * sign(grad L(f(t(x + delta)), y)), radius)
    """
    recipe = CraftRecipe(
        Clean(), Clean(), radius=radius, step_size=2 * radius / STEPS, steps=STEPS, samples=1, start="zero"
    )
    engine = engine_of(model)
    x, y = images.to(engine.device).batch(slice(None))
    x = engine.images(x)
    return to_levels(noise_of_batch(model, x, y, torch.zeros_like(x), recipe, engine.generator(seed, "written"))).cpu()


def net_rows(
    split: Split, recipes: Mapping[str, LearnRecipe], *, seeds: Iterable[int] = (0,), lab: Lab | None = None
) -> pd.DataFrame:
    """Rows of net, seed, accuracy, part, loss and energy: a net's loss on images with each part of its own noise.

    Every net is trained on clean images and frozen; its noise is for LOOKED_AT of them. part: "none" (no noise),
    "whole" or one of measure.PARTS. loss: mean in nats. energy: the part's share.
    """
    images, rows = split.train.limit(LOOKED_AT), []
    for seed, (name, recipe) in product(seeds, recipes.items()):
        row, net = learned_net(split.train, split.test, recipe, seed=seed, lab=lab)
        noise = written(net, images)
        parts = {"none": (torch.zeros_like(noise), 0.0), "whole": (noise, 1.0)}
        parts |= {part: (noise_part(noise, part), part_share(noise, part)) for part in PARTS}
        for part, (one, energy) in parts.items():
            loss = float(losses(net, images.with_noise(one)).mean())
            told = {"net": name, "seed": seed, "accuracy": row["last"]}
            rows.append({**told, "part": part, "loss": loss, "energy": energy})
    return pd.DataFrame(rows)


def lowered(rows: pd.DataFrame, net: str) -> pd.DataFrame:
    """The fall of this net's loss by each part alone, as a share of that by the whole noise: a line a seed.

    (loss without noise - loss with the part) / (loss without noise - loss with the whole);  rows as of `net_rows`
    """
    loss = rows[rows["net"] == net].pivot(index="seed", columns="part", values="loss")
    fall = loss.rsub(loss["none"], axis=0)
    return fall.div(fall["whole"], axis=0)[list(PARTS)]


def draw_nets(rows: pd.DataFrame) -> Drawn:
    """What each part of its own noise does to a net, in % of the whole, a dot a seed; a panel a net."""
    panels, told, what = {}, [], "part of the net's own noise, its share of the energy"
    for net, mine in rows.groupby("net", sort=False):
        share, energy = 100 * lowered(rows, net), mine.groupby("part")["energy"].mean()
        told.append(f"{net}: {', '.join(f'{part} {value:.0f} %' for part, value in share.mean().items())}")
        names = {part: f"{part}\n{energy[part]:.0%}" for part in PARTS}
        panels[f"{net}: {mine['accuracy'].mean():.0%} right"] = share.rename(columns=names)
    figure = _dots_figure([panels], what, "fall of the loss (% of the whole's)")
    alt = f"How far each part of its own noise lowers a net's loss. {'; '.join(told)}"
    return figure, alt, f"Dots: {rows['seed'].nunique()} seeds. In titles: accuracy on clean test images."


# --- parts that learners are trained on


def draw_parts(rows: pd.DataFrame, noises: Mapping[str, torch.Tensor]) -> Drawn:
    """Protection by each part alone, a dot a seed and their mean; a panel for each learner and method.

    rows: of the design `parts`. noises: method -> its noise, for the share of the energy below each part.
    """
    kinds = rows[rows["method"].isin(noises)].drop_duplicates(["training_radius", "method"])
    panels, told = {}, []
    for radius, method in kinds[["training_radius", "method"]].to_numpy():
        there = set(rows[rows["training_radius"] == radius]["method"])
        names = {part: method if part == "whole" else f"{method}, {part}" for part in WHOLE}
        points = {part: 100 * protection(rows, name, radius) for part, name in names.items() if name in there}
        title = f"{label_of(method)}, {learner(radius)}"
        told.append(f"{title}: {', '.join(f'{part} {value.mean():.0f}' for part, value in points.items())}")
        shares = {part: 1 if part == "whole" else part_share(noises[method], part) for part in points}
        panels[title] = pd.DataFrame({f"{part}\n{shares[part]:.0%}": value for part, value in points.items()})
    figure = _dots_figure([panels], "part of the noise, its share of the energy", "protection (points)")
    return figure, f"Protection by parts of noise, mean points. {'; '.join(told)}", _recipe(rows)


def _dots_figure(
    lines: Sequence[Mapping[str, pd.DataFrame]], xlabel: str, ylabel: str, *, joined: bool = False
) -> Figure:
    """Lines of panels, title -> points: a dot for each seed (row) and column, and the column's mean as a dash.

    joined: a thin line joins the dots of a seed.
    """
    figure = new_figure(1.2 + 2.6 * len(lines[0]), 0.6 + 2.8 * len(lines))
    grid = figure.subplots(len(lines), len(lines[0]), sharex="col", sharey="row", squeeze=False)
    for axes, (title, points) in zip(grid.flat, chain(*(panels.items() for panels in lines)), strict=True):
        for colour, (seed, values) in zip(SPARE, points.iterrows(), strict=False):
            axes.plot(range(len(values)), values, "o-" if joined else "o", color=colour, lw=0.8, ms=5, label=f"{seed}")
        axes.plot(range(points.shape[1]), points.mean(), "_", color="0.1", ms=18, mew=2, label="mean")
        reference(axes.axhline, 0, "zero")
        axes.set(xlim=(-0.5, points.shape[1] - 0.5), xticks=range(points.shape[1]), xticklabels=list(points))
        axes.set_title(title, fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    figure.supxlabel(xlabel, fontsize="medium")
    legend(grid[0, -1], "seed")
    return figure


def _recipe(rows: pd.DataFrame) -> str:
    presets = " and ".join(rows["preset"].str.partition(",")[0].unique())  # without what a run set otherwise
    return f"Preset {presets}, {rows['seed'].nunique()} seeds; accuracy on clean test images."


# --- the nine pairs


def costs(preset: str, n: int, unit: float = 1e3, size: int = 32) -> pd.DataFrame:
    """Passes of the nine recipes for n images, in units: a line a noise side, a column a surrogate side.

    >>> costs("quick", 100).loc["random"].tolist()  # in thousands
    [1.2, 1.2, 1.5]
    """
    made = pairs(preset, size)
    cells = [[made[f"{noise}/{surrogate}"].cost(n).total / unit for surrogate in SIDES] for noise in SIDES]
    table = pd.DataFrame(cells, pd.Index(SIDES, name="noise side"), pd.Index(SIDES, name="surrogate side"))
    return table.round(1)


def protections(rows: pd.DataFrame, training_radius: float) -> pd.DataFrame:
    """Points of accuracy that each pair takes from a learner: a line a seed, a column a pair of PAIRS."""
    return 100 * pd.DataFrame({name: protection(rows, name, training_radius) for name in PAIRS})


def _with(side: int, kind: str) -> list[int]:
    """The indices in PAIRS of the pairs with this kind on the noise side (0) or the surrogate side (1)."""
    return [at for at, name in enumerate(PAIRS) if name.split("/")[side] == kind]


COMPARED = {  # what is asked of the nine columns: the mean of some less the mean of others
    "an adversarial surrogate side": (_with(1, "adversarial"), _with(1, "none")),
    "a random noise side": (_with(0, "random"), _with(0, "none")),
    "an adversarial noise side": (_with(0, "adversarial"), _with(0, "none")),
}


def by_seed(points: pd.DataFrame, compared: str) -> pd.Series:
    """Points of protection that one of COMPARED adds, for each seed; points as of `protections`.

    >>> by_seed(pd.DataFrame([[0, 1, 2, 3, 4, 5, 6, 7, 8]], columns=PAIRS), "a random noise side").tolist()
    [3.0]
    """
    more, less = COMPARED[compared]
    return points.iloc[:, more].mean(axis=1) - points.iloc[:, less].mean(axis=1)


def effects(points: pd.DataFrame) -> pd.DataFrame:
    """Rows of compared, analysis, mean, low, high and decision: what each of COMPARED adds, analysed in two ways.

    "t over the seeds": one difference a seed. "seed as block": all nine columns, see statistics.blocked_difference.
    """
    rows = []
    for name, of in COMPARED.items():
        found = {"t over the seeds": interval(by_seed(points, name)), "seed as block": blocked_difference(points, *of)}
        for analysis, (mean, low, high) in found.items():
            decision = decide(low, high, "> 0")
            rows.append(dict(compared=name, analysis=analysis, mean=mean, low=low, high=high, decision=decision))
    return pd.DataFrame(rows)


def draw_pairs(rows: pd.DataFrame) -> Drawn:
    """Protection of the nine pairs: a line of panels a learner, a panel a noise side."""
    lines, told = [], []
    for radius in sorted(rows["training_radius"].unique(), reverse=True):
        points, panels = protections(rows, radius), {}
        for noise in SIDES:
            names = {f"{noise}/{side}": f"{side}\n{PUBLISHED.get(f'{noise}/{side}', '')}" for side in SIDES}
            panels[f"{learner(radius)}, noise side {noise}"] = points[list(names)].rename(columns=names)
        lines.append(panels)
        means = ", ".join(f"{name} {value:.0f}" for name, value in points.mean().items())
        told.append(f"{learner(radius)}: {means}")
    figure = _dots_figure(lines, "surrogate side", "protection (points)", joined=True)
    return figure, f"Protection of nine pairs, mean points. {'; '.join(told)}", _recipe(rows)


def draw_effects(points: Mapping[str, pd.DataFrame]) -> Drawn:
    """What each of COMPARED adds, a panel a learner: its seeds as dots, and the intervals of both analyses."""
    figure, told, looks = new_figure(9.2, 2.9), [], {"t over the seeds": ("0.5", "o"), "seed as block": ("0.1", "s")}
    panels = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    places = np.arange(len(COMPARED))
    for axes, (name, table) in zip(panels, points.items(), strict=True):
        found = effects(table)
        told += [f"{name}, {row.compared}, {row.analysis}: {row.decision}" for row in found.itertuples()]
        for below, (analysis, (colour, marker)) in enumerate(looks.items()):
            mean, low, high = found.loc[found["analysis"] == analysis, ["mean", "low", "high"]].to_numpy().T
            how = dict(fmt=marker, color=colour, capsize=3, label=analysis)
            axes.errorbar(mean, places + 0.2 * below, xerr=(mean - low, high - mean), **how)
        seeds = np.array([by_seed(table, compared) for compared in COMPARED])
        axes.plot(seeds.T.ravel(), np.tile(places - 0.2, seeds.shape[1]), "x", color="0.3", label="a seed")
        axes.axvline(0, color="0.4", lw=1, ls=":")
        axes.set_title(name, fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(places, COMPARED)
    panels[0].invert_yaxis()
    figure.supxlabel("points of protection, beyond none on that side", fontsize="medium")
    legend(panels[-1])
    return figure, "; ".join(told), "Bars: 95 % intervals."


def beats(points: pd.DataFrame, one: str, other: str) -> bool:
    """Whether `one` measurably protects more than `other`: all of its 95 % interval, seed as block, is above zero.

    points: protection, a line a seed and a column a recipe.

    >>> beats(pd.DataFrame({"A": [10, 11, 12], "B": [1, 3, 2]}), "A", "B")
    True
    """
    if one == other:
        return False
    names = list(points)
    return decide(*blocked_difference(points, [names.index(one)], [names.index(other)])[1:], "> 0") == "supported"


def objection(points: pd.DataFrame, passes: Mapping[str, float], budget: float, recipe: str) -> str:
    """What speaks against a recipe; empty if it is affordable, not beaten, and no cheaper one is as good.

    >>> points = pd.DataFrame({"A": [10, 11, 12], "B": [1, 3, 2]})
    >>> objection(points, {"A": 5, "B": 1}, 3, "A")
    'A costs 5 passes and the budget is 3'
    """
    if recipe not in points:
        return f"{recipe!r} is none of {', '.join(points)}"
    if passes[recipe] > budget:
        return f"{recipe} costs {passes[recipe]:,} passes and the budget is {budget:,}"
    paid = [name for name in points if passes[name] <= budget]
    if better := [name for name in paid if beats(points, name, recipe)]:
        gain = points[better[0]].mean() - points[recipe].mean()
        return f"{better[0]} protects {gain:.1f} points more than {recipe}, measurably, and the budget pays for it"
    for name in paid:
        if passes[name] < passes[recipe] and not any(beats(points, other, name) for other in paid):
            return f"{name} costs less than {recipe}, and nothing that the budget pays for measurably beats it"
    return ""
