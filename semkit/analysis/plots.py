"""Rows drawn into axes that the caller made, with one look: colours, markers, intervals, legends."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, product

import numpy as np

from semkit.analysis.measure import Correlation, interval, learner, protection
from semkit.protections.registry import label_of

# Okabe and Ito's colours, told apart by colour-blind readers; markers and lines say it again.
STYLE = {
    "clean": ("#000000", "o", "-"),
    "em": ("#0072B2", "s", "--"),
    "sem": ("#D55E00", "D", "-"),
    "rem": ("#009E73", "^", "-."),
}
SIDES = {"none": "em", "random": "sem", "adversarial": "rem"}  # and the published method with that noise side
PUBLISHED = {"none/none": "EM+EOT", "random/adversarial": "SEM", "adversarial/adversarial": "REM"}
PAIR = "noise side/surrogate side"


def noise_side(method: str) -> str:
    """none, random or adversarial, where the name tells it ("sem", "random/none", "random 4"), else the name."""
    published = {method: side for side, method in SIDES.items()}
    told = re.match(r"(none|random|adversarial)(?=/| \d|$)", method)
    return told[0] if told else published.get(method, method)


def styles(methods: Iterable[str]) -> dict[str, dict]:
    """Method -> its color, marker and ls. A pair "noise side/surrogate side": marker and line by its noise side.

    A pair's colour tells its surrogate side; any other method's its noise side, where the name tells one.
    """
    spare = "#CC79A7", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#000000"
    colours, markers = cycle(spare), cycle("os^DvPX*<>")

    def style(method: str) -> tuple[str, str, str]:
        first, _, second = method.partition("/")
        if first in SIDES and second in SIDES:
            return STYLE[SIDES[second]][0], *STYLE[SIDES[first]][1:]
        if method in STYLE or method in SIDES:
            return STYLE[SIDES.get(method, method)]
        side = noise_side(method)
        return STYLE[SIDES[side]][0] if side in SIDES else next(colours), next(markers), "-"

    return {method: dict(zip(("color", "marker", "ls"), style(method), strict=True)) for method in methods}


def minus(text: str) -> str:
    """The text with typographic minus signs, as matplotlib writes them."""
    return text.replace("-", "\N{MINUS SIGN}")


def by_method(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Method -> its rows, in the order of the rows."""
    return {m: [row for row in rows if row["method"] == m] for m in dict.fromkeys(row["method"] for row in rows)}


def summary(rows: Sequence[dict], by: str, value: str) -> np.ndarray:
    """[4,K]: the K values of column `by`; the mean of column `value` over the rows of each, and its 95 % interval."""
    keys = sorted({row[by] for row in rows})
    return np.array([(key, *interval([row[value] for row in rows if row[by] == key])) for key in keys]).T


def reference(axes, height: float, label: str) -> None:
    """A dotted level line to compare with."""
    axes.axhline(height, color="0.4", lw=1, ls=":", label=label)


def legend(axes, title: str | None = None) -> None:
    """The legend of the axes, right of them, where it hides nothing; dotted lines of reference come last."""
    references = [line for line in axes.lines if line.get_linestyle() == ":"]
    handles = sorted(axes.get_legend_handles_labels()[0], key=lambda handle: handle in references)
    where = dict(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    axes.legend(handles=handles, title=title, fontsize="small", title_fontsize="small", alignment="left", **where)


def _accuracy(axes, methods: Iterable[str], chance: float | None) -> None:
    if chance is not None:
        reference(axes, 100 * chance, f"chance ({100 * chance:.3g} %)")
    axes.set(ylim=(0, 100), ylabel="accuracy on clean test images (%)")
    axes.grid(axis="y", alpha=0.3)
    legend(axes, PAIR if any("/" in method for method in methods) else None)


def line(axes, x, mean, low, high, color: str, **style) -> None:
    """A line through the means, in the band of their intervals."""
    axes.plot(x, mean, color=color, ms=4, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)


def draw_accuracies(axes, rows: Sequence[dict], chance: float | None = None) -> None:
    """Clean test accuracy over the learner's training radius, a line a method, 95 % intervals over seeds."""
    methods, radii = by_method(rows), sorted({row["training_radius"] for row in rows})
    look = styles(methods)
    for place, (method, mine) in enumerate(methods.items()):
        r, mean, low, high = summary(mine, "training_radius", "last")
        # Shifted sideways a little, so that intervals at the same radius do not hide each other.
        shift = (place - (len(methods) - 1) / 2) * max(radii[-1] - radii[0], 1) / 80
        error = 100 * np.array([mean - low, high - mean])
        axes.errorbar(r + shift, 100 * mean, error, capsize=3, ms=5, label=label_of(method), **look[method])
    axes.set(xticks=radii, xticklabels=["0\n(ERM)" if r == 0 else f"{r:g}" for r in radii])
    axes.set(xlabel="learner's training radius (levels of 255)")
    _accuracy(axes, methods, chance)


def draw_curves(panels: Sequence, rows: Sequence[dict], chance: float | None = None) -> None:
    """Learning curves into one axes a training radius: accuracy over the learner's steps, 95 % bands over seeds."""
    look = styles(by_method(rows))
    for axes, radius in zip(panels, sorted({row["training_radius"] for row in rows}), strict=True):
        for method, mine in by_method([row for row in rows if row["training_radius"] == radius]).items():
            points = [{"step": step, "accuracy": 100 * a} for row in mine for step, a in row["curve"]]
            line(axes, *summary(points, "step", "accuracy"), label=label_of(method), **look[method])
        _accuracy(axes, look, chance)
        axes.set_title(learner(radius), fontsize="medium")
        axes.set_xlabel("learner's step")
        if axes is not panels[-1]:
            axes.get_legend().remove()
    for axes in panels[1:]:
        axes.set_ylabel(None)


def grid_cells(rows: Sequence[dict], training_radius: float) -> tuple[np.ndarray, np.ndarray]:
    """(protection in points [3,3], half its 95 % interval [3,3]), noise side x surrogate side; nan without rows."""
    pairs = product(SIDES, SIDES)
    found = [protection(rows, f"{noise}/{surrogate}", training_radius) for noise, surrogate in pairs]
    cells = np.array([interval(values) if values else (np.nan,) * 3 for values in found]).reshape(3, 3, 3)
    return 100 * cells[..., 0], 100 * (cells[..., 2] - cells[..., 0])


def _cell(rows: Sequence[dict], pair: str, mean: float, half: float) -> str:
    passes = max(row.get("noise_passes", 0) for row in rows if row["method"] == pair)
    value = minus(f"{round(mean, 1) + 0:.1f}") + ("" if np.isnan(half) else f" ± {half:.1f}")  # + 0: no -0.0
    cost = passes and (f"{passes / 1e6:.1f} M passes" if passes >= 1e6 else f"{passes / 1e3:.0f} k passes")
    return "\n".join(text for text in (PUBLISHED.get(pair), value, cost) if text)


def _heat(axes, rows: Sequence[dict], means: np.ndarray, halves: np.ndarray, scale: tuple[float, float]):
    image = axes.imshow(means, cmap="cividis", vmin=scale[0], vmax=scale[1])
    for (i, noise), (j, surrogate) in product(enumerate(SIDES), enumerate(SIDES)):
        if not np.isnan(means[i, j]):
            light = np.dot(image.cmap(image.norm(means[i, j]))[:3], (0.3, 0.59, 0.11))
            text = _cell(rows, f"{noise}/{surrogate}", means[i, j], halves[i, j])
            where = dict(ha="center", va="center", fontsize="small")
            axes.text(j, i, text, color="black" if light > 0.45 else "white", **where)
    axes.set(xticks=range(3), xticklabels=SIDES, yticks=range(3), yticklabels=SIDES, xlabel="surrogate side")
    axes.tick_params(length=0)
    return image


def draw_grid(panels: Sequence, rows: Sequence[dict]):
    """A heat table of protection into one axes a training radius; returns the image whose scale of colours all share.

    Rows as of study.grid, methods "noise side/surrogate side" and "clean". Raises ValueError where a radius has none.
    """
    radii = sorted({row["training_radius"] for row in rows})
    tables = [grid_cells(rows, radius) for radius in radii]
    values = np.array([means for means, _ in tables])
    if np.isnan(values).all((1, 2)).any():
        raise ValueError('protection needs rows of "clean" and of pairs like "none/adversarial", of the same seeds')
    scale = min(0, np.nanmin(values)), max(1, np.nanmax(values))
    for axes, radius, table in zip(panels, radii, tables, strict=True):
        image = _heat(axes, rows, *table, scale)
        clean = [100 * row["last"] for row in by_method(rows)["clean"] if row["training_radius"] == radius]
        axes.set_title(f"{learner(radius)}, clean images: {np.mean(clean):.0f} %", fontsize="medium")
    panels[0].set_ylabel("noise side")
    for axes in panels[1:]:
        axes.set_yticklabels(())
    return image


def _name_some(axes, rows: Sequence[dict], x: str, y: str) -> None:
    """The names of the methods beside their outermost points, where they touch no point and no other name."""
    axes.get_xlim()  # settles the limits

    def inside(some: Sequence[dict]) -> np.ndarray:  # in units of the axes
        return axes.transLimits.transform([(row[x], row[y]) for row in some])

    taken = inside(rows)
    for method, mine in by_method(rows).items():
        name = label_of(method)
        width, own = 0.015 * len(name), inside(mine)
        for side, outermost in ((1, own[:, 0].argmax()), (-1, own[:, 0].argmin())):
            near = own[outermost] + (0.015 * side, 0)
            box = near + np.array([[min(0, width * side), -0.035], [max(0, width * side), 0.035]])
            hit = ((taken > box[0]) & (taken < box[1])).all(1).any()
            if not hit and box.min() > 0 and box.max() < 1:
                where = dict(xycoords="axes fraction", ha="left" if side > 0 else "right", va="center")
                axes.annotate(name, near, color="0.3", fontsize="small", **where)
                taken = np.vstack([taken, np.linspace(box[0], box[1], 20) * (1, 0) + (0, near[1])])
                break


def correlation_text(found: Correlation) -> str:
    """Both coefficients, each with its interval, and n."""
    lines = (("Pearson", found.pearson), ("Spearman", found.spearman))
    text = "".join(f"{name} {v:.2f}\n[{low:.2f}, {high:.2f}]\n" for name, (v, low, high) in lines)
    return minus(text) + f"n = {found.n}"


def draw_scatter(axes, rows: Sequence[dict], x: str, y: str, found: Correlation | None = None) -> None:
    """A point a row at its columns x and y; its look by the column `family`, else by the noise side of its method.

    Methods are named where there is room. `found` is written beside the axes.
    """
    points = [(row.get("family") or noise_side(row["method"]), row[x], row[y]) for row in rows]
    for family, look in styles(dict.fromkeys(name for name, *_ in points)).items():
        mine = np.array([place for name, *place in points if name == family])
        axes.plot(*mine.T, **{**look, "ls": ""}, ms=6, alpha=0.8, label=family)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    legend(axes, "noise side")
    _name_some(axes, rows, x, y)
    if found:
        axes.text(1.02, 0, correlation_text(found), transform=axes.transAxes, va="bottom", fontsize="small")


def draw_losses(axes, rows: Sequence[dict], log: bool = False) -> None:
    """Loss over the radius of the perturbation, a colour a method: random directions dashed, adversarial ones solid.

    With more than one row (seed) a radius: their mean in the band of its 95 % interval. On the log scale both are of
    the logarithms, so the mean is the geometric one: an interval of losses near zero would reach below zero.
    """
    if log:
        rows = [{**row, "loss": np.log(row["loss"])} for row in rows]
    look = styles(by_method(rows))
    for method, mine in by_method(rows).items():
        for direction in sorted({row["direction"] for row in mine}):
            along = [row for row in mine if row["direction"] == direction]
            style = {**look[method], "ls": "--" if direction == "random" else "-"}
            radius, *loss = summary(along, "radius", "loss")
            loss = np.exp(loss) if log else loss
            line(axes, radius, *loss, label=f"{label_of(method)}, {direction}", **style)
    axes.set(xlabel="radius of the perturbation (levels of 255)", ylabel="cross-entropy loss (nats)")
    axes.set_yscale("log" if log else "linear")
    axes.grid(alpha=0.3)
    legend(axes)


def draw_lines(axes, rows: Sequence[dict], x: str, y: str, points: tuple[str, str] | None = None) -> None:
    """Column y over column x, a line a method in the band of its 95 % interval over the rows of the same x.

    points: the columns of an estimate of the same quantity and of its standard error; where rows have them, their mean
    is drawn as a point a method and x with two standard errors to both sides.
    """
    look = styles(by_method(rows))
    for method, mine in by_method(rows).items():
        style = look[method]
        line(axes, *summary(mine, x, y), **style | {"marker": "" if points else style["marker"]}, label=method)
        estimated = [row for row in mine if points and row.get(points[0]) is not None]
        for value in sorted({row[x] for row in estimated}):
            found = np.array([(row[points[0]], row[points[1]]) for row in estimated if row[x] == value])
            bar = 2 * np.linalg.norm(found[:, 1]) / len(found)
            axes.errorbar(value, found[:, 0].mean(), bar, capsize=3, ms=5, **style | {"ls": ""})
    axes.grid(alpha=0.3)
    legend(axes)


def draw_progress(left, right, losses: Mapping[int, float], shares: Mapping[int, tuple[float, float]]) -> None:
    """The surrogate's loss by step on the left, and on the right the shares of images that it labels rightly."""
    left.plot(losses.keys(), losses.values(), color="#0072B2", lw=1)
    left.set(ylim=(0, 1.1 * max(losses.values())), ylabel="surrogate's loss (nats)")
    for place, (name, method) in enumerate({"with their noise": "sem", "without": "clean"}.items()):
        color, marker, ls = STYLE[method]
        values = [100 * pair[place] for pair in shares.values()]
        right.plot(list(shares), values, color=color, marker=marker, ls=ls, ms=4, label=name)
    right.set(ylim=(0, 100), ylabel="surrogate right (%)")
    right.legend(title="images", fontsize="small", title_fontsize="small", loc="best")
