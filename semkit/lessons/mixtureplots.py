"""The theory of class-wise filters drawn: two dimensions as a picture, and the accuracies over all of them."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from semkit.analysis.plots import legend
from semkit.lessons.mixtures import Mixture, accuracies, bayes_rule

DIMENSIONS = (1, 2, 3, 5, 8, 13, 20, 32, 50)
# Column of mixtures.accuracies -> its label, colour, marker and line.
LINES = {
    "on_protected": ("protected data's rule\non protected data", "#009E73", "^", "-."),
    "clean": ("clean data's rule\non clean data", "#000000", "o", "-"),
    "on_clean": ("protected data's rule\non clean data", "#D55E00", "D", "-"),
}
CLASSES = {1: ("#0072B2", "+", "y = +1"), -1: ("#E69F00", "x", "y = \N{MINUS SIGN}1")}
SHOWN = 300  # points of a picture


@lru_cache(maxsize=1024)
def _accuracies(d: int, norm: float, a_minus: float, a_plus: float) -> dict:
    return accuracies(d, norm, a_minus, a_plus)


def mixture_rows(norm: float, a_minus: float, a_plus: float, dimensions: Sequence[int] = DIMENSIONS) -> list[dict]:
    """A row of mixtures.accuracies for every dimension."""
    return [_accuracies(d, norm, a_minus, a_plus) for d in dimensions]


def draw_mixture(axes, norm: float, a_minus: float, a_plus: float, *, seed: int = 0) -> None:
    """Clean points in two dimensions, where either class's filtered points lie, and the two rules' borders."""
    mixture = Mixture(2, norm, a_minus, a_plus)
    x, y = mixture.draw(SHOWN, seed)
    reach = max(3.5, norm + 2.5)
    side = np.linspace(-reach, reach, 161)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    a, b, c = bayes_rule(mixture)
    score = (((grid @ a) * grid).sum(1) + grid @ b + c).reshape(len(side), -1)
    for label, (colour, marker, name) in CLASSES.items():
        mine = x[y == label]
        axes.plot(*mine.T, marker, color=colour, ms=4, alpha=0.7, label=f"clean, {name}")
        _ellipse(axes, mixture, label, colour)
    axes.contour(side, side, score, [0], colors="#D55E00", linewidths=2)
    axes.plot([], [], color="#D55E00", lw=2, label="protected data's rule")
    axes.plot(side, -side, color="black", lw=1, label="clean data's rule")
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="first value", ylabel="second value")
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)


def _ellipse(axes, mixture: Mixture, label: int, colour: str) -> None:
    """Two standard deviations of a class's filtered points."""
    a = mixture.a_plus if label > 0 else mixture.a_minus
    matrix = np.array([[1, a], [a, 1]])
    turn = np.linspace(0, 2 * np.pi, 100)
    points = label * matrix @ mixture.mu + 2 * np.stack([np.cos(turn), np.sin(turn)], 1) @ matrix
    axes.plot(*points.T, color=colour, lw=1, ls="--", label=f"filtered, {CLASSES[label][2]} (2 s.d.)")


def draw_dimensions(axes, rows: Sequence[dict], at: int | None = None) -> None:
    """Accuracies over the dimension, rows as of mixture_rows; `at`: a dimension to point out."""
    for column, (label, colour, marker, ls) in LINES.items():
        values = [100 * row[column] for row in rows]
        axes.plot([row["d"] for row in rows], values, color=colour, marker=marker, ls=ls, ms=5, label=label)
    if at is not None:
        axes.axvline(at, color="0.4", lw=1, ls=":", label=f"d = {at}")
    axes.set(xscale="log", ylim=(45, 102), xlabel="dimension d", ylabel="accuracy (%)")
    axes.set(xticks=[1, 2, 5, 10, 20, 50], xticklabels=["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    legend(axes)
