"""Statistics of rows: intervals, decisions on claims, reliability and power, correlation, protection paired by seed.

Rows are a DataFrame with a row for each run, as `study.grid` and `report.read_rows` give it; a list of dicts will do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import fdtrc, ndtr, stdtrit

Rows = pd.DataFrame | Sequence[dict]
ONE_SIDE = 0.975  # the quantile at which a 95 % interval ends


def learner(radius: float) -> str:
    """ERM, or AT with its training radius in levels.

    >>> learner(0), learner(4)
    ('ERM', 'AT 4/255')
    """
    return f"AT {radius:g}/255" if radius else "ERM"


def trained_by(rows: pd.DataFrame) -> pd.Series:
    """How each row's learner was trained: its column `learner`, else by its training radius."""
    by_radius = rows["training_radius"].map(learner).astype(str)
    return by_radius.where(rows["learner"].isna(), rows["learner"]) if "learner" in rows else by_radius


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds and its 95 % Student-t interval, mean -+ t * std / sqrt(n).

    With one value low and high are nan: one seed has no spread. Raises ValueError for none, and for a table of values.

    >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an interval is of one value or more, one for each seed, got an array {values.shape}")
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, float("nan"), float("nan")
    half = stdtrit(n - 1, ONE_SIDE) * (values.std(ddof=1) / np.sqrt(n))
    return mean, mean - float(half), mean + float(half)


def _blocks(values: Sequence[Sequence[float]]) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"values must be [seeds, treatments] with 2 or more of each, got shape {values.shape}")
    return values


def _residual(values: np.ndarray) -> tuple[float, int]:
    """(s2, its degrees of freedom) of values [S, C] under the model value = seed + treatment + residual."""
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    return float((residual**2).sum() / freedom), freedom


def blocked_difference(
    values: Sequence[Sequence[float]], more: Sequence[int], less: Sequence[int]
) -> tuple[float, float, float]:
    """(mean, low, high): the mean of columns `more` less that of `less` with its 95 % interval, seeds as blocks.

    values [S, C]: a line for each seed, a column for each treatment. The model is value = seed + treatment + residual:

        residual = values - mean of its seed - mean of its column + mean of all
        s2 = sum(residual ** 2) / ((S - 1) * (C - 1))
        half = t((S - 1) * (C - 1)) * sqrt(s2 * (1 / len(more) + 1 / len(less)) / S)

    All columns together estimate one residual, so t has (S - 1) * (C - 1) degrees of freedom in place of
    the S - 1 of `interval`. This holds if the effect itself varies no more between seeds than the residual. With C = 2
    it is `interval` of the paired differences. Raises ValueError for fewer than 2 seeds or a column on both sides.

    >>> [round(end, 2) for end in blocked_difference([[1, 3], [2, 5], [4, 6]], [1], [0])]
    [2.33, 0.9, 3.77]
    """
    values, more, less = _blocks(values), list(more), list(less)
    if not more or not less or set(more) & set(less):
        raise ValueError(f"more and less must name different columns, got {more} and {less}")
    s2, freedom = _residual(values)
    error = np.sqrt(s2 * (1 / len(more) + 1 / len(less)) / len(values))
    mean, half = values[:, more].mean() - values[:, less].mean(), stdtrit(freedom, ONE_SIDE) * error
    return float(mean), float(mean - half), float(mean + half)


def reliability(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(F, p, reliability): whether treatments differ by more than their seeds scatter, and how far their means over the
    seeds can be relied on, of values [S, C], a line for each seed, a column for each treatment.

        F = S * var(means of the columns) / s2;  reliability = 1 - 1 / F, at least 0

    p: of F, with the seed as block; s2 as of blocked_difference. reliability: the share of the means' variance that is
    not scatter of the seeds. Raises ValueError for fewer than 2 seeds or treatments.

    >>> [round(number, 2) for number in reliability([[1, 3], [2, 5], [4, 6]])]
    [49.0, 0.02, 0.98]
    """
    values = _blocks(values)
    seeds, columns = values.shape
    s2, freedom = _residual(values)
    f = float(seeds * values.mean(0).var(ddof=1) / s2) if s2 else float("inf")
    return f, float(fdtrc(columns - 1, freedom, f)), max(0.0, 1 - 1 / f) if f else 0.0


def attenuated(correlation: float, reliabilities: tuple[float, float]) -> float:
    """The correlation that is expected of two measured variables: the true one * sqrt(product of reliabilities).

    Source: Spearman 1904.

    >>> round(attenuated(-1, (0.25, 0.29)), 2)
    -0.27
    """
    return correlation * float(np.sqrt(np.prod(reliabilities)))


def power(correlation: float, n: int, reliabilities: tuple[float, float] = (1, 1)) -> float:
    """The probability that n pairs show a true correlation as one of its sign that differs from 0.

        power = P(N(atanh(|attenuated(correlation, reliabilities)|), 1 / (n - 3)) > atanh(critical r of n pairs))

    Fisher's approximation. Raises ValueError for fewer than 4 pairs.

    >>> round(power(-1, 8, (0.25, 0.29)), 2)
    0.09
    """
    if n < 4:
        raise ValueError(f"a correlation needs 4 pairs or more, got {n}")
    t, seen = stdtrit(n - 2, ONE_SIDE), min(abs(attenuated(correlation, reliabilities)), 1 - 1e-12)
    critical = t / np.sqrt(n - 2 + t * t)  # the smallest |r| that differs from 0 in Student's two-sided 5 % test
    return float(ndtr((np.arctanh(seen) - np.arctanh(critical)) * np.sqrt(n - 3)))


def decide(low: float, high: float, margin: str) -> str:
    """Whether an interval supports the claim that the value is above ("> 0") or below ("< 1.5") a margin.

    "supported" if all of [low, high] is on the claim's side, "contradicted" if all of it is on the other side or on the
    margin, else "undecided". An interval of nan, of one seed, decides nothing. Raises ValueError for another margin.

    >>> decide(-4.4, 6.9, "< 1.5")
    'undecided'
    """
    side, _, number = margin.partition(" ")
    try:
        bar = float(number)
    except ValueError:
        bar = float("nan")
    if side not in ("<", ">") or not np.isfinite(bar):
        raise ValueError(f"a margin is written '> 0' or '< 1.5', got {margin!r}")
    inside, outside = (high < bar, low >= bar) if side == "<" else (low > bar, high <= bar)
    return "supported" if inside else "contradicted" if outside else "undecided"


def verdict(values: Sequence[float], margin: str = "> 0") -> str:
    """What the 95 % interval of the mean decides: decide(low, high, margin) of interval(values).

    values: one a seed, for a comparison the differences paired by seed.

    >>> verdict([5.6, 5.8, 5.7]), verdict([5.6, 5.8, -1.0])
    ('supported', 'undecided')
    """
    return decide(*interval(values)[1:], margin)


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's coefficient of n pairs, each as (value, low, high) with a 95 % bootstrap interval."""

    pearson: tuple[float, float, float]
    spearman: tuple[float, float, float]
    n: int

    def __str__(self) -> str:
        lines = (("Pearson", self.pearson), ("Spearman", self.spearman))
        text = "".join(f"{name} {v:.2f}\n[{low:.2f}, {high:.2f}]\n" for name, (v, low, high) in lines)
        return text + f"n = {self.n}"


def correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Correlation:
    """The Correlation of x and y, with percentile intervals over resampled pairs (bootstrap).

    Raises ValueError for fewer than 4 pairs, for nan and inf, and if x or y is constant.

    >>> correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).spearman[0]
    0.8
    """
    from scipy import stats  # half a second that importing semkit need not pay

    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"a correlation needs 4 pairs or more, got {len(x)} and {len(y)} values")
    if not (0 < np.ptp(x) < np.inf and 0 < np.ptp(y) < np.inf):  # nor nan
        raise ValueError("a correlation needs finite values that differ")
    picked = np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))
    picked = picked[(np.ptp(x[picked], 1) > 0) & (np.ptp(y[picked], 1) > 0)]  # one pair repeated has no correlation

    def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))

    def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))

    def with_interval(coefficient: Callable) -> tuple[float, float, float]:
        bounds = np.quantile(coefficient(x[picked], y[picked]), (0.025, 0.975))
        return float(coefficient(x, y)), *(float(bound) for bound in bounds)

    return Correlation(with_interval(pearson), with_interval(spearman), len(x))


def protection(rows: Rows, method: str, training_radius: float) -> pd.Series:
    """What a method costs a learner, by seed: its accuracy of 1 trained on clean images less that on protected ones.

    Seeds that lack one of the two are left out. Raises ValueError for rows of several learners or countermeasures, and
    for several rows of one seed.

    >>> rows = pd.DataFrame({"method": ["clean", "em"], "training_radius": 0, "seed": 0, "last": [0.75, 0.25]})
    >>> protection(rows, "em", 0).to_dict()
    {0: 0.5}
    """
    rows = pd.DataFrame(rows)
    rows = rows[(rows["training_radius"] == training_radius) & rows["method"].isin(["clean", method])]
    ways = trained_by(rows) + ", " + (rows["countermeasure"].fillna("none") if "countermeasure" in rows else "none")
    if ways.nunique() > 1 or rows.duplicated(["method", "seed"]).any():
        raise ValueError(
            f"several rows of {method} or clean images have the same seed and training radius {training_radius:g} "
            f"({'; '.join(ways.unique())}): pass those of one learner and one countermeasure"
        )
    last = rows.pivot(index="seed", columns="method", values="last")
    last = last.reindex(columns=list(dict.fromkeys(["clean", method]))).dropna()
    return (last["clean"] - last[method]).rename("protection")


def paired(noise_rows: Rows, learner_rows: Rows, training_radius: float) -> pd.DataFrame:
    """Join noises with protection: the noise rows, with the `protection` of their method and seed at a training radius.

    Noises without it are left out. Rows as of measure.noise_rows and of study.grid. Raises what protection raises.

        sk.paired(sk.read_rows(f"{folder}/noise.csv"), sk.read_rows(f"{folder}/rows.csv"), 4)
    """
    noises = pd.DataFrame(noise_rows)
    found = {method: protection(learner_rows, method, training_radius) for method in noises["method"].unique()}
    return noises.merge(pd.concat(found, names=["method"]).reset_index(), on=["method", "seed"])


def protection_for_passes(rows: Rows, images: int) -> pd.DataFrame:
    """Cost and protection of noises, a row for each method and seed.

        passes: of crafting, per image of `images`
        ERM, AT 4/255, ...: protection from a learner so trained, in points of accuracy; nan without rows of it

    Rows as of study.grid. Raises what protection raises.

        sk.statistics.protection_for_passes(sk.read_rows("results/frontier/rows.csv"), images=4000)
    """
    rows = pd.DataFrame(rows)
    noisy, radii = rows[rows["method"] != "clean"], rows["training_radius"].unique()
    points = {
        (method, learner(r)): 100 * protection(rows, method, r) for method in noisy["method"].unique() for r in radii
    }
    found = pd.concat(points, names=["method", "learner"]).unstack("learner", sort=False).rename_axis(columns=None)
    found.insert(0, "passes", noisy.groupby(["method", "seed"])["noise_passes"].first() / images)
    return found.reset_index()
