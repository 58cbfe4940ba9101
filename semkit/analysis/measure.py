"""What is measured, with its interval: robustness, stability, protection, correlation; rows are plain dicts.

The published definitions were not all available; robustness and stability are as defined here, after Liu et al.,
AAAI 2024. Both are negative losses: the higher, the less the perturbation does.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import nn

from semkit.images.augment import Augment, FlipCrop, Identity
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count
from semkit.nets.engine import engine_of, predict
from semkit.nets.weights import drawing
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform


def learner(radius: float) -> str:
    """ERM, or AT with its training radius in levels."""
    return f"AT {radius:g}/255" if radius else "ERM"


def trained_by(row: dict) -> str:
    """How a row's learner was trained: its column `learner`, else by its training radius."""
    return row.get("learner") or learner(row["training_radius"])


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds and its Student-t interval, mean -+ t * std / sqrt(n).

    With one value low and high are nan: one seed has no spread.
    """
    values = np.asarray(values, float)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, float("nan"), float("nan")
    half = stdtrit(n - 1, (1 + confidence) / 2) * (values.std(ddof=1) / np.sqrt(n))
    return mean, mean - float(half), mean + float(half)


def blocked_difference(
    values: Sequence[Sequence[float]], more: Sequence[int], less: Sequence[int], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high): the mean of columns `more` less that of columns `less`, with the seed as block.

    values [S, C]: a line for each seed, a column for each treatment. The model is value = seed + treatment + residual:

        residual = values - mean of its seed - mean of its column + mean of all
        s2 = sum(residual ** 2) / ((S - 1) * (C - 1))
        half = t((S - 1) * (C - 1)) * sqrt(s2 * (1 / len(more) + 1 / len(less)) / S)

    All columns together estimate one residual, so t has (S - 1) * (C - 1) degrees of freedom in place of
    the S - 1 of `interval`. This holds if the effect itself varies no more between seeds than the residual. With C = 2
    it is `interval` of the paired differences. Raises ValueError for fewer than 2 seeds or a column on both sides.
    """
    values, more, less = np.asarray(values, float), list(more), list(less)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"values must be [seeds, treatments] with 2 or more of each, got shape {values.shape}")
    if not more or not less or set(more) & set(less):
        raise ValueError(f"more and less must name different columns, got {more} and {less}")
    seeds, columns = values.shape
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    freedom = (seeds - 1) * (columns - 1)
    error = np.sqrt((residual**2).sum() / freedom * (1 / len(more) + 1 / len(less)) / seeds)
    mean, half = values[:, more].mean() - values[:, less].mean(), stdtrit(freedom, (1 + confidence) / 2) * error
    return float(mean), float(mean - half), float(mean + half)


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
    """
    return decide(*interval(values)[1:], margin)


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's coefficient of n pairs, each as (value, low, high) with a 95 % bootstrap interval."""

    pearson: tuple[float, float, float]
    spearman: tuple[float, float, float]
    n: int


def correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Correlation:
    """The Correlation of x and y over resampled pairs (percentile bootstrap).

    Raises ValueError for fewer than 4 pairs or where all of x or of y is one value.
    """
    from scipy import stats  # half a second that importing semkit need not pay

    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"a correlation needs 4 pairs or more, got {len(x)} and {len(y)} values")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("a correlation needs values that differ")

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


def losses(
    model: nn.Module,
    images: ImageSet,
    perturbation: Perturbation = Clean(),
    *,
    augment: Augment = Identity(),
    draws: int = 1,
    seed: int = 0,
    batch: int = 500,
) -> torch.Tensor:
    """Cross-entropy L(f(a), y) in eval mode with a = perturbation(t(x)), [draws, N] for N images.

    Every draw has its own t ~ augment and its own randomness of the perturbation.
    The same seed gives the same losses, also of a net with injected noise, whose stream does not move on.
    """
    engine = engine_of(model)
    images = images.to(engine.device)
    found = torch.empty(check_count(draws, "draws", 1), len(images))
    with drawing(model, engine.generator(seed, "losses, injected noise")):
        for draw, start in itertools.product(range(draws), range(0, len(images), batch)):
            part, generator = slice(start, start + batch), engine.generator(seed, "losses", draw, start)
            x, y = images.batch(part)
            x = engine.images(x)
            x = augment.apply(x, augment.draw(len(x), x.shape[2:], generator))
            a = perturbation(model, x, y, generator)
            found[draw, part] = F.cross_entropy(predict(model, a), y, reduction="none").float().cpu()
    return found


def robustness(model: nn.Module, images: ImageSet, radius: float = 4, *, steps: int = 10, **how) -> float:
    """-E_t max over |a - t(x)| <= radius of L(f(a), y), the maximum found by PGD of `steps` steps.

    With a surrogate f: on held-out clean images the surrogate's robustness, on protected images that of the noise.
    """
    return -float(losses(model, images, PGD(radius, steps), **{"augment": FlipCrop(), **how}).mean())


def stability(model: nn.Module, images: ImageSet, radius: float = 4, *, draws: int = 8, **how) -> tuple[float, float]:
    """(-E_t E_u L(f(t(x) + u), y), the variance of L over the draws averaged over images), u uniform within radius.

    Raises ValueError for draws < 2, which have no variance.
    """
    check_count(draws, "draws", 2)
    found = losses(model, images, Uniform(radius), **{"augment": FlipCrop(), **how}, draws=draws)
    return -float(found.mean()), float(found.var(0).mean())


def losses_along(model: nn.Module, images: ImageSet, radii: Sequence[float], *, steps: int = 10, **how) -> list[dict]:
    """Rows {"direction": "random" or "adversarial", "radius": r, "loss": mean loss} as the perturbation grows."""
    rows = []
    for radius in radii:
        for direction, perturbation in (("random", Uniform(radius)), ("adversarial", PGD(radius, steps))):
            loss = float(losses(model, images, perturbation, **how).mean())
            rows.append({"direction": direction, "radius": radius, "loss": loss})
    return rows


def cosine(noise: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[N]: the cosine of the angle between two noises [N,C,H,W] of every image: 1 if alike, about 0 if unrelated."""
    return F.cosine_similarity(noise.flatten(1).double(), other.flatten(1).double())


def protection(rows: Sequence[dict], method: str, training_radius: float) -> list[float]:
    """For every seed, the accuracy of the learner on clean images less that of the one on protected ones, of 1.

    Raises ValueError where a seed has several such rows, of different learners or countermeasures.
    """

    def by_seed(of: str) -> dict[int, float]:
        found = [row for row in rows if row["training_radius"] == training_radius and row["method"] == of]
        last = {row["seed"]: row["last"] for row in found}
        if len(last) < len(found):
            ways = dict.fromkeys(", ".join((trained_by(row), row.get("countermeasure") or "none")) for row in found)
            raise ValueError(
                f"a seed has several rows of {of} at training radius {training_radius:g} ({'; '.join(ways)}): "
                f"pass those of one learner and one countermeasure"
            )
        return last

    clean, mine = by_seed("clean"), by_seed(method)
    return [clean[seed] - mine[seed] for seed in sorted(clean.keys() & mine.keys())]


def protection_for_passes(rows: Sequence[dict], images: int) -> list[dict]:
    """A row for every noise, of a method and a seed: what it cost and what it protects from.

        passes: of its crafting, for each of the `images`
        ERM, AT 4/255, ...: points of accuracy that a learner so trained ends below one on clean images, same seed

    Rows as of study.grid; learners without one on clean images beside them are left out.
    """
    clean = {(row["seed"], row["training_radius"]): row["last"] for row in rows if row["method"] == "clean"}
    made = {}
    for row in rows:
        method, seed, of = row["method"], row["seed"], (row["seed"], row["training_radius"])
        if method != "clean" and of in clean:
            new = {"method": method, "seed": seed, "passes": row["noise_passes"] / images}
            points = 100 * (clean[of] - row["last"])
            made.setdefault((method, seed), new)[learner(row["training_radius"])] = points
    return list(made.values())


def paired(noise_rows: Sequence[dict], learner_rows: Sequence[dict], training_radius: float) -> list[dict]:
    """The noise rows, each with the `protection` that its noise gave at the training radius: joined by method and seed.

        protection = accuracy of the learner on clean images - accuracy of the learner on this noise's, of 1

    Left out are noises that lack one of these two learners. Rows as of designs.noise_rows and of study.grid.
    """
    at_radius = [row for row in learner_rows if row["training_radius"] == training_radius]
    last = {(row["method"], row["seed"]): row["last"] for row in at_radius}
    both = [(row, last.get(("clean", row["seed"])), last.get((row["method"], row["seed"]))) for row in noise_rows]
    return [{**row, "protection": clean - mine} for row, clean, mine in both if None not in (clean, mine)]
