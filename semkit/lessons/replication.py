"""Lesson 5: is robustness of noise related to protection, and could these measurements tell?"""

from collections.abc import Sequence

import pandas as pd

from semkit.analysis.canvas import Figure
from semkit.analysis.figures import scatter_figure
from semkit.analysis.statistics import correlation, reliability

MEASURES = {
    "noise_robustness": "noise robustness (nats)",
    "noise_loss": "loss of the judge without perturbation (nats)",
}


def judged(losses: pd.DataFrame, radius: float) -> pd.DataFrame:
    """The noises of losses without augmentation, rows as of measure.loss_rows, as rows for sk.paired:

        noise_robustness = -(loss at the worst perturbation of `radius` levels); noise_loss: the same loss at 0 levels

    Raises KeyError if the losses lack the radius.

        sk.replication.judged(sk.read_rows("../results/frozen-judge-long/losses.csv"), 8)
    """
    worst = losses[losses["direction"] == "adversarial"]
    at = worst.pivot(index=["method", "seed"], columns="radius", values="loss")
    measured = pd.DataFrame({"noise_loss": at[0], "noise_robustness": -at[radius]})
    return worst[["method", "seed"]].drop_duplicates().merge(measured.reset_index())


def within_seed(points: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The points with the mean of its seed taken out of each number in `columns`: the seed as a block.

    >>> rows = pd.DataFrame({"seed": [0, 0, 1, 1], "x": [1.0, 3, 10, 12]})
    >>> sk.replication.within_seed(rows, ["x"]).x.tolist()
    [-1.0, 1.0, -1.0, 1.0]
    """
    numbers = points[list(columns)]
    return points.assign(**(numbers - numbers.groupby(points["seed"]).transform("mean")))


def related(
    points: pd.DataFrame, learner: str, view: str, title: str, measure: str = "noise_robustness"
) -> tuple[Figure, str, str]:
    """Protection under `learner` over a column of MEASURES, rows as of sk.paired: (figure, alternative text, caption).

    view: "all points", or "within a seed", which also shows the mean of every noise side with 95 % intervals.
    """
    inside, points = view == "within a seed", points.assign(protection=100 * points["protection"])
    if inside:
        points = within_seed(points, [measure, "protection"])
    found = correlation(points[measure], points["protection"])
    names = {"xlabel": MEASURES[measure], "ylabel": f"protection under {learner} (points)"}
    if inside:
        names = {axis: f"{name}, less its seed's mean" for axis, name in names.items()}
    what = f"{title}, {learner}, {view}"
    figure = scatter_figure(points, x=measure, y="protection", correlation=found, means=inside, title=what, **names)
    told = ", ".join(str(found).split("\n"))
    how = "Black: means over seeds with 95 % intervals." if inside else "Thin lines: each seed's own trend."
    return figure, f"Protection over {MEASURES[measure]}. {what}: {told}", f"{what}; n = {len(points)}. {how}"


def reliable(points: pd.DataFrame, column: str) -> dict[str, float]:
    """F, p and reliability of the noise sides' means of a column, over seeds; a row of the lesson's table."""
    f, p, of_mean = reliability(points.pivot(index="seed", columns="method", values=column).to_numpy())
    return {"F": round(f, 1), "p": round(p, 3), "reliability": round(of_mean, 2)}
