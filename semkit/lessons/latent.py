"""When robustness costs accuracy: labels come from k latent factors, images have d >= k pixels, rules are linear.

The gap between the best standard and the best robust accuracy closes as k / d falls: Javanmard and Mehrabi, Adversarial
robustness for latent models, 2021 (arXiv:2110.11950). It depends on how W grows; see `latent_model`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, owens_t

from semkit.images.pixels import check_count, check_name, check_nonnegative
from semkit.lessons.answers import checker

LABELS = ("mixture", "probit")
CONTRASTS = ("pixel", "factor")
RATIOS = (1, 1 / 4, 1 / 16, 1 / 64)
DECADES, GRID = 6, 241  # ridges tried: so far beyond the singular values on both sides, and so many


@dataclass(frozen=True, eq=False)
class Latent:
    """Images x = W z in R^d of latent factors z in R^k, W [d,k] of full rank, with labels y = +1 or -1 by mu [k]:

        "mixture": y = +1 or -1 equally often, z ~ N(y mu, I)
        "probit":  z ~ N(0, I), P(y = +1 | z) = Phi(mu'z), a generalised linear model

    Raises ValueError for shapes that do not fit, k = 0, k > d, mu = 0, unknown labels, or a W of lower rank.
    """

    W: np.ndarray
    mu: np.ndarray
    labels: str = "mixture"

    def __post_init__(self):
        if self.W.ndim != 2 or self.mu.shape != self.W.shape[1:] or not 1 <= self.W.shape[1] <= self.W.shape[0]:
            shapes = f"{list(self.W.shape)} and {list(self.mu.shape)}"
            raise ValueError(f"W must be [d,k] and mu [k] with 1 <= k <= d, got {shapes}")
        if not self.mu.any():
            raise ValueError("mu must not be 0, because then nothing tells the classes apart")
        check_name(self.labels, LABELS, "labels")

    @cached_property
    def basis(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(U [d,k], s [k], V'mu [k]) of the singular value decomposition W = U diag(s) V'."""
        u, s, vt = np.linalg.svd(self.W, full_matrices=False)
        if not s[-1] > 1e-12 * s[0]:
            raise ValueError("W must have full rank")
        return u, s, vt @ self.mu

    def draw(self, n: int, seed: int | np.random.Generator = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draw n images x [n,d] and their labels y [n]."""
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((n, len(self.mu)))
        if self.labels == "mixture":
            y = rng.choice((-1, 1), n)
            z += y[:, None] * self.mu
        else:
            y = np.where(z @ self.mu + rng.standard_normal(n) > 0, 1, -1)
        return z @ self.W.T, y


def latent_model(
    d: int, k: int, *, norm: float = 2.0, labels: str = "mixture", contrast: str = "pixel", seed: int = 0
) -> Latent:
    """A Latent with entries of W from N(0, 1/k) (contrast "pixel") or N(0, 1/d) ("factor"), and |mu| = norm.

    The contrast is what stays fixed while k / d varies, and decides what happens to the gap.
    "pixel": every pixel has standard deviation 1 about its class mean for every k, because contrast belongs to images
    and not to the number of factors behind them. The singular values of W are about sqrt(d/k) (1 +- sqrt(k/d)). At
    fixed d, epsilon and |mu|, and so at fixed standard accuracy, fewer factors share the same contrast, each is longer
    in relation to epsilon, and the gap falls to 0 as about epsilon sqrt(k/d).
    "factor", the control: every factor has length 1 in pixels for every k, the singular values are 1 +- sqrt(k/d), and
    the gap stays at about Phi(norm) - Phi(norm - epsilon). So it is the growth of W that closes the gap.
    If d grows and k does not, "pixel" closes the gap at fixed epsilon; with epsilon ~ sqrt(d), the same change of every
    pixel, it depends on k alone. Raises ValueError unless 1 <= k <= d and norm > 0.

    >>> latent_model(256, 64).W.shape
    (256, 64)
    """
    k, d = check_count(k, "the latent dimension k", 1), check_count(d, "the dimension d", 1)
    if not 0 < norm < math.inf:
        raise ValueError(f"norm must be a finite number > 0, got {norm:g}")
    check_name(contrast, CONTRASTS, "contrast")
    W = np.random.default_rng(seed).standard_normal((d, k)) / math.sqrt(k if contrast == "pixel" else d)
    return Latent(W, np.full(k, norm / math.sqrt(k)), labels)


def accuracy(model: Latent, theta: np.ndarray, epsilon: float = 0.0) -> float:
    """Accuracy of the rule sign(theta'x) under attacks that move x by a length of epsilon.

        a = theta'W mu / |W'theta|,   r = epsilon |theta| / |W'theta|
        mixture: Phi(a - r)
        probit:  Phi(-r) + 2 T(r, a / sqrt(1 + |mu|^2 - a^2)),   T Owen's function

    epsilon: l2, in the unit of x. theta = 0 is a constant answer, 1/2. Raises ValueError if W'theta = 0 only.
    Source of T: Owen, Annals of Mathematical Statistics 1956.

    >>> round(accuracy(Latent(np.eye(2), np.array([1.0, 0.0])), np.array([1.0, 0.0]), 0.5), 3)  # Phi(1 - 0.5)
    0.691
    """
    if not theta.any():
        return 0.5
    phi = model.W.T @ theta
    if not phi.any():
        raise ValueError("theta'x is 0 for every x")
    noise = np.linalg.norm(phi)
    return float(_accuracy(model, phi @ model.mu / noise, epsilon * np.linalg.norm(theta) / noise))


def _accuracy(model: Latent, a: np.ndarray, r: np.ndarray) -> np.ndarray:
    if model.labels == "mixture":
        return ndtr(a - r)
    return ndtr(-r) + 2 * owens_t(r, a / np.sqrt(1 + model.mu @ model.mu - a * a))


def rule(model: Latent, ridge: float) -> np.ndarray:
    """theta [d] ~ (W W' + ridge I)^-1 W mu, of length 1; for every epsilon the best rule is one of these.

    Because accuracy grows with a and falls with r (see `accuracy`), and on the convex set of theta with |W'theta| <= 1
    and |theta| <= t the largest a is at a theta of this form, by Lagrange. ridge = 0 is best without attack.

    >>> rule(Latent(np.diag([1, 0.1]), np.array([1.0, 0.0])), ridge=0)
    array([1., 0.])
    """
    u, s, mu = model.basis
    theta = u @ (mu * s / (s * s + ridge))
    return theta / np.linalg.norm(theta)


def _ridges(model: Latent, n: int) -> np.ndarray:
    """0 and n - 1 ridges, evenly spaced in their logarithm, over all sizes that make a difference."""
    s = model.basis[1]
    least, most = (2 * np.log10(v) for v in (s[-1], s[0]))
    return np.r_[0, np.logspace(max(least, most - 2 * DECADES) - DECADES, most + DECADES, n - 1)]


def _along(model: Latent, epsilon: float, ridges: np.ndarray) -> np.ndarray:
    """accuracy(model, rule(model, ridge), epsilon) of every ridge, in the basis of the singular vectors."""
    _, s, mu = model.basis
    thetas = mu * s / (s * s + ridges[:, None])  # and phis, below, in the bases U and V
    phis = thetas * s
    noise, lengths = np.linalg.norm(phis, axis=1), np.linalg.norm(thetas, axis=1)
    return _accuracy(model, phis @ mu / noise, epsilon * lengths / noise)


def best(model: Latent, epsilon: float = 0.0) -> tuple[np.ndarray, float]:
    """(theta, accuracy) of the linear rule with the best accuracy under attacks of length epsilon (0: standard).

    Where no rule is better than a constant answer, accuracy 1/2, theta is 0: for the mixture, where epsilon >= |W mu|.
    Raises ValueError for a negative epsilon.

    >>> round(best(Latent(np.eye(2), np.array([1.0, 0.0])), 0.5)[1], 3)
    0.691
    """
    check_nonnegative(epsilon, "epsilon")
    ridges = _ridges(model, GRID)
    i = int(_along(model, epsilon, ridges).argmax())
    ridge = ridges[i]
    if 0 < i:
        low, high = np.log(ridges[max(1, i - 1)]), np.log(ridges[min(i + 1, GRID - 1)])
        less = lambda log: -_along(model, epsilon, np.exp([log]))[0]  # noqa: E731
        ridge = math.exp(minimize_scalar(less, bounds=(low, high), method="bounded").x)
    theta = rule(model, ridge)
    found = accuracy(model, theta, epsilon)
    return (theta, found) if found > 0.5 else (np.zeros(len(model.W)), 0.5)


def trade_off(model: Latent, epsilon: float, points: int = 61) -> pd.DataFrame:
    """Rows of rules from the best standard to the most cautious one: ridge, and accuracies standard and robust.

    Up to the best robust rule this is the Pareto front of linear rules; rules beyond it are worse in both.

    >>> trade_off(latent_model(64, 16), 0.5).round(2).iloc[0].to_dict()
    {'ridge': 0.0, 'standard': 0.98, 'robust': 0.96}
    """
    ridge = _ridges(model, points)
    accuracies = {"standard": _along(model, 0, ridge), "robust": _along(model, epsilon, ridge)}
    return pd.DataFrame({"ridge": ridge, **accuracies})


def share_of(hits: int, n: int) -> tuple[float, float]:
    """(hits / n, its standard error); a hit and a miss are added for the error, so that it is never 0."""
    share = (hits + 1) / (n + 2)
    return hits / n, math.sqrt(share * (1 - share) / n)


def sampled(
    model: Latent, theta: np.ndarray, epsilon: float = 0.0, *, samples: int = 20_000, seed: int | Sequence[int] = 0
) -> tuple[float, float]:
    """Monte Carlo (accuracy, standard error) of sign(theta'x) on images moved by -y epsilon theta / |theta|.

    theta = 0 answers +1.
    """
    check_count(samples, "samples", 1)
    rng, hits = np.random.default_rng(seed), 0
    against = epsilon * theta / max(np.linalg.norm(theta), np.finfo(float).tiny)
    batch = max(1, 2**22 // len(theta))
    for start in range(0, samples, batch):
        x, y = model.draw(min(batch, samples - start), rng)
        hits += int((np.where((x - y[:, None] * against) @ theta >= 0, 1, -1) == y).sum())
    return share_of(hits, samples)


def gaps(
    d: int,
    epsilon: float,
    *,
    ratios: Sequence[float] = RATIOS,
    norm: float = 2.0,
    labels: str = "mixture",
    contrast: str = "pixel",
    samples: int = 0,
    seeds: Sequence[int] = (0,),
) -> pd.DataFrame:
    """Rows of what robustness costs, one for each ratio k / d and each seed, which draws its own W, with the accuracies

        standard: the best rule without attack        robust: the best rule under attack, attacked
        cautious: the latter without attack           gap: standard - robust

    With samples > 0 also Monte Carlo estimates and standard errors: standard_sampled, standard_error, and so on.
    Raises ValueError unless ratio * d is a whole number from 1 to d.

    >>> list(gaps(64, 0.5)["k"])
    [64, 16, 4, 1]
    """
    rows = []
    for ratio, seed in product(ratios, seeds):
        model = latent_model(d, ratio * d, norm=norm, labels=labels, contrast=contrast, seed=seed)
        k = len(model.mu)
        (plain, standard), (guarded, robust) = best(model), best(model, epsilon)
        row = {
            "labels": labels, "contrast": contrast, "d": d, "k": k, "ratio": k / d, "epsilon": epsilon, "norm": norm,
            "seed": seed, "standard": standard, "robust": robust, "cautious": accuracy(model, guarded),
            "gap": standard - robust,
        }  # fmt: skip
        of = {"standard": (plain, 0), "robust": (guarded, epsilon), "cautious": (guarded, 0)} if samples else {}
        for i, (name, what) in enumerate(of.items()):
            row[f"{name}_sampled"], row[f"{name}_error"] = sampled(model, *what, samples=samples, seed=(seed, k, i))
        rows.append(row)
    rows = pd.DataFrame(rows)
    if samples:
        rows["gap_sampled"] = rows["standard_sampled"] - rows["robust_sampled"]
        rows["gap_error"] = np.hypot(rows["standard_error"], rows["robust_error"])
    return rows


@checker(
    "For y = +1 theta'x is normal: its mean is theta'W mu; which vector makes its standard deviation?",
    "theta'W z varies by |W'theta|. An attack of length epsilon moves theta'x by at most epsilon |theta|.",
    "ndtr of (mean less the attack's move), divided by the standard deviation.",
)
def check_robust_accuracy(robust_accuracy: Callable) -> str:
    """Whether robust_accuracy(theta, W, mu, epsilon) is the accuracy of sign(theta'x) on the mixture x = W z.

        Phi((theta'W mu - epsilon |theta|) / |W'theta|),   z ~ N(y mu, I), x moved by a length of epsilon

    theta [d], W [d,k], mu [k].

    >>> check_robust_accuracy(lambda theta, W, mu, epsilon: 0.5)
    not yet, because without attack it is Phi(theta'W mu / |W'theta|) = 0.924
    """
    made = latent_model(12, 4, norm=1.5, seed=1)
    W, mu, theta = made.W, made.mu, 3 * rule(made, 5.0)
    mine = {epsilon: robust_accuracy(theta.copy(), W.copy(), mu.copy(), epsilon) for epsilon in (0, 0.8, 9)}
    wanted = {epsilon: accuracy(made, theta, epsilon) for epsilon in mine}
    assert all(np.ndim(value) == 0 for value in mine.values()), "it returns an array: the accuracy is one number"
    noise, length = np.linalg.norm(W.T @ theta), np.linalg.norm(theta)
    score = theta @ W @ mu

    def is_mine(epsilon: float, share: float) -> bool:
        return abs(mine[epsilon] - ndtr(share)) < 1e-6

    assert not is_mine(0, score / length), "theta'x varies by |W'theta| about its mean, not by |theta|"
    assert not is_mine(0, score / noise**2), "it divides by the variance: divide by the standard deviation |W'theta|"
    assert abs(mine[0] - wanted[0]) < 1e-6, f"without attack it is Phi(theta'W mu / |W'theta|) = {wanted[0]:.3f}"
    assert mine[0.8] < mine[0] - 1e-9, "the accuracy does not fall under attack: the attack takes from the score"
    assert not is_mine(0.8, (score - 0.8) / noise), "a move of length epsilon changes theta'x by epsilon times |theta|"
    assert not is_mine(0.8, score / noise - 0.8), "the attack's reach is not divided by |W'theta|, as the score is"
    assert not is_mine(0.8, (score - 0.8 * np.abs(theta).sum()) / noise), (
        "|theta| is the l2 length, and this is the l1 one"
    )
    assert abs(mine[0.8] - wanted[0.8]) < 1e-6, f"with epsilon 0.8 it is {wanted[0.8]:.3f}, not {mine[0.8]:.3f}"
    assert abs(mine[9] - wanted[9]) < 1e-6, "it never falls below 1/2: a long attack turns nearly every answer round"
    return "what the factors add up to, less what the attack reaches, both in standard deviations"
