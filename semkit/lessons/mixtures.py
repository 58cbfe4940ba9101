"""Why class-wise convolution protects: two Gaussian classes with a filter each, and the Bayes rule between them.

Source: Sadasivan et al., CUDA, CVPR 2023. The accuracies are computed exactly here; the paper bounds them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.special import ndtr

from semkit.analysis.canvas import Figure, legend, new_figure, reference, titled
from semkit.analysis.pictures import gallery_figure
from semkit.images.pixels import check_count, check_nonnegative
from semkit.images.shapes import embedded
from semkit.lessons.answers import check_tensor, checker, drawn
from semkit.lessons.latent import share_of
from semkit.protections.cuda import blur, class_filters

TILT = 0.15  # angle of the line of integration to the imaginary axis, in radians
REACH, STEP = 26, 0.01  # points on it: log r from -REACH to REACH
DIMENSIONS = (1, 2, 3, 5, 8, 13, 20, 32, 50)
LINES = {  # column of `accuracies` -> label, colour, marker, line style
    "on_protected": ("protected data's rule\non protected data", "#009E73", "^", "-."),
    "clean": ("clean data's rule\non clean data", "#000000", "o", "-"),
    "on_clean": ("protected data's rule\non clean data", "#D55E00", "D", "-"),
}
CLASSES = {1: ("#0072B2", "+", "y = +1"), -1: ("#E69F00", "x", "y = \N{MINUS SIGN}1")}


@dataclass(frozen=True)
class Mixture:
    """Classes y = +1 and -1, equally often: clean x ~ N(y mu, I_d), protected A_y x ~ N(y A_y mu, A_y^2).

        mu = norm / sqrt(d) (1, ..., 1),   A_y x = x convolved with (a_y, 1, a_y), zeros beyond its ends

    A_y is tridiagonal Toeplitz; a_y is a_plus for class +1 and a_minus for class -1, both in [0, 0.5], where A_y is
    positive. Raises ValueError for another a, d < 1 or a negative norm.
    """

    d: int
    norm: float
    a_minus: float
    a_plus: float

    def __post_init__(self):
        check_count(self.d, "the dimension d", 1)
        check_nonnegative(self.norm, "norm")
        for name, a in (("a_minus", self.a_minus), ("a_plus", self.a_plus)):
            if not 0 <= a <= 0.5:
                raise ValueError(f"{name} must be in [0, 0.5], got {a:g}")

    @property
    def mu(self) -> np.ndarray:
        return np.full(self.d, self.norm / math.sqrt(self.d))

    def matrix(self, y: int) -> np.ndarray:
        """A_y [d,d], the filter of class y: 1 on the diagonal and a_y beside it."""
        a = self.a_plus if y > 0 else self.a_minus
        return np.eye(self.d) + a * (np.eye(self.d, k=1) + np.eye(self.d, k=-1))

    def draw(self, n: int, seed: int | np.random.Generator = 0) -> tuple[np.ndarray, np.ndarray]:
        """Draw n clean points x [n,d] and their classes y [n]."""
        rng = np.random.default_rng(seed)
        y = rng.choice((-1, 1), n)
        return y[:, None] * self.mu + rng.standard_normal((n, self.d)), y

    def protect(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Filter each clean x [n,d] with the filter of its class y [n]."""
        padded = np.pad(x, ((0, 0), (1, 1)))
        a = np.where(y > 0, self.a_plus, self.a_minus)[:, None]
        return x + a * (padded[:, :-2] + padded[:, 2:])


def bayes_rule(mixture: Mixture) -> tuple[np.ndarray, np.ndarray, float]:
    """(A [d,d], b [d], c): on protected data class +1 is more likely where x'Ax + b'x + c > 0.

        A = A_-^-2 - A_+^-2,   b = 2 (A_-^-1 + A_+^-1) mu,   c = 2 (ln det A_- - ln det A_+)

    x'Ax + b'x + c is twice the log likelihood ratio.
    """
    minus, plus = (np.linalg.inv(mixture.matrix(y)) for y in (-1, 1))
    c = 2 * (np.linalg.slogdet(plus).logabsdet - np.linalg.slogdet(minus).logabsdet)
    return minus @ minus - plus @ plus, 2 * (minus + plus) @ mixture.mu, float(c)


def decide(rule: tuple[np.ndarray, np.ndarray, float], x: np.ndarray) -> np.ndarray:
    """The class [n], +1 or -1, of each x [n,d] by a rule (A, b, c)."""
    a, b, c = rule
    return np.where(((x @ a) * x).sum(1) + x @ b + c > 0, 1, -1)


def probability_positive(quadratic: np.ndarray, linear: np.ndarray, constant: float) -> float:
    """P(S > 0) to about 1e-9 for S = sum_i (quadratic_i z_i^2 + linear_i z_i) + constant, z ~ N(0, I); 1/2 if S = 0.

        P = phi / pi + 1/pi integral over r > 0 of Im M(r e^(i phi)) / r,   M(s) = E e^(sS)
        M(s) = e^(s constant) prod_i (1 - 2 s quadratic_i)^(-1/2) exp(s^2 linear_i^2 / (2 (1 - 2 s quadratic_i)))

    phi = pi / 2 is the inversion of Gil-Pelaez (Biometrika 1951), which Imhof (Biometrika 1961) uses for such forms.
    Tilted a little to the side where M decays exponentially, sums over evenly spaced log r converge exponentially.
    """
    mean, scale = constant + quadratic.sum(), math.sqrt(2 * quadratic @ quadratic + linear @ linear)
    if abs(mean) >= 40 * scale:  # no scale at all, or a probability below 1e-10
        return (1 + float(np.sign(mean))) / 2
    w, squares, k = quadratic / scale, (linear / scale) ** 2, constant / scale
    farthest = k - np.divide(squares, 4 * w, out=np.zeros_like(w), where=w != 0).sum()  # M(s) ~ e^(s farthest)
    phi = np.pi / 2 + TILT * np.sign(farthest)
    s = np.exp(np.arange(-REACH, REACH, STEP) + 1j * phi)
    log_m = s * k
    for each, square in zip(w, squares, strict=True):
        left = 1 - 2 * s * each
        log_m += s * s * square / (2 * left) - np.log(left) / 2
    return float(np.clip((phi + STEP * np.exp(log_m).imag.sum()) / np.pi, 0, 1))


def accuracy(mixture: Mixture, *, protected: bool) -> float:
    """Accuracy of the Bayes rule of protected data, on protected or on clean data.

    Points of a class are m + S z with z ~ N(0, I), so the rule is a quadratic form in z, and in the basis of its
    eigenvectors a sum over independent coordinates: see probability_positive.
    """
    (a, b, c), right = bayes_rule(mixture), []
    for y in (1, -1):
        s = mixture.matrix(y) if protected else np.eye(mixture.d)
        m = y * s @ mixture.mu
        quadratic, q = np.linalg.eigh(s @ a @ s)
        right.append(probability_positive(y * quadratic, y * (q.T @ s @ (2 * a @ m + b)), y * (c + (a @ m + b) @ m)))
    return sum(right) / 2


def sampled(mixture: Mixture, samples: int = 200_000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """{"clean", "on_clean", "on_protected"}: Monte Carlo estimates of `accuracies`, each with its standard error.

    Points are drawn and filtered, and the rules applied to them, without the closed form. One hit and one miss are
    added for the error, so that it is never 0.
    """
    check_count(samples, "samples", 1)
    rng, rule, hits = np.random.default_rng(seed), bayes_rule(mixture), [0, 0, 0]
    clean_rule = np.zeros((mixture.d, mixture.d)), mixture.mu, 0.0
    batch = max(1, 2**21 // mixture.d)
    for start in range(0, samples, batch):
        x, y = mixture.draw(min(batch, samples - start), rng)
        given = decide(clean_rule, x), decide(rule, x), decide(rule, mixture.protect(x, y))
        hits = [n + int((classes == y).sum()) for n, classes in zip(hits, given, strict=True)]
    return {name: share_of(n, samples) for name, n in zip(("clean", "on_clean", "on_protected"), hits, strict=True)}


def accuracies(d: int, norm: float, a_minus: float, a_plus: float, *, samples: int = 0, seed: int = 0) -> dict:
    """A row: d, norm, a_minus, a_plus, and the accuracies

        clean: the clean data's rule sign(mu'x) on clean data, Phi(norm)
        on_clean, on_protected: the protected data's Bayes rule on clean and on protected data

    With samples > 0 also Monte Carlo estimates and standard errors: clean_sampled, clean_error, and so on.
    Raises ValueError as Mixture does.

    >>> row = accuracies(10, 1, 0, 0.5)
    >>> round(row["clean"], 2), round(row["on_clean"], 2)
    (0.84, 0.51)
    """
    mixture = Mixture(d, norm, a_minus, a_plus)
    row = {
        "d": d, "norm": norm, "a_minus": a_minus, "a_plus": a_plus, "clean": float(ndtr(norm)),
        "on_clean": accuracy(mixture, protected=False), "on_protected": accuracy(mixture, protected=True),
    }  # fmt: skip
    for name, (share, error) in (sampled(mixture, samples, seed) if samples else {}).items():
        row |= {f"{name}_sampled": share, f"{name}_error": error}
    return row


_closed_form = lru_cache(maxsize=1024)(accuracies)  # the panel asks for the same dimensions again and again


def _draw_plane(axes, mixture: Mixture, points: int = 300) -> None:
    """Draw clean points in the plane, the filtered classes as ellipses of two standard deviations, and both rules."""
    x, y = mixture.draw(points)
    reach = max(3.5, mixture.norm + 2.5)
    side, turn = np.linspace(-reach, reach, 161), np.linspace(0, 2 * np.pi, 100)
    for label, (colour, marker, name) in CLASSES.items():
        axes.plot(*x[y == label].T, marker, color=colour, ms=4, alpha=0.7, label=f"clean, {name}")
        matrix = mixture.matrix(label)
        rim = label * matrix @ mixture.mu + 2 * np.stack([np.cos(turn), np.sin(turn)], 1) @ matrix
        axes.plot(*rim.T, color=colour, lw=1, ls="--", label=f"filtered, {name} (2 s.d.)")
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    a, b, c = bayes_rule(mixture)
    score = ((grid @ a) * grid).sum(1) + grid @ b + c
    axes.contour(side, side, score.reshape(len(side), -1), [0], colors="#D55E00", linewidths=2)
    axes.plot([], [], color="#D55E00", lw=2, label="protected data's rule")
    axes.plot(side, -side, color="black", lw=1, label="clean data's rule")
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="first value", ylabel="second value")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)


def _draw_dimensions(axes, rows: Sequence[dict], at: int) -> None:
    """Draw rows of `accuracies` over the dimension; at: a dimension to mark."""
    for column, (label, colour, marker, ls) in LINES.items():
        values = [100 * row[column] for row in rows]
        axes.plot([row["d"] for row in rows], values, color=colour, marker=marker, ls=ls, ms=5, label=label)
    reference(axes.axvline, at, f"d = {at}")
    axes.set(xscale="log", ylim=(45, 102), xlabel="dimension d", ylabel="accuracy (%)")
    axes.set(xticks=[1, 2, 5, 10, 20, 50], xticklabels=["1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    legend(axes)


def mixture_figure(d: int, norm: float, a_minus: float, a_plus: float) -> Figure:
    """Two Gaussian classes with class-wise filters: left in two dimensions, right the accuracies over the dimension.

    >>> mixture_figure(10, norm=1, a_minus=0, a_plus=0.5)
    <Figure size 1000x460 with 2 Axes>
    """
    figure = new_figure(10, 4.6)
    panels = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_plane(panels[0], Mixture(2, norm, a_minus, a_plus))
    _draw_dimensions(panels[1], [_closed_form(each, norm, a_minus, a_plus) for each in DIMENSIONS], at=d)
    title = f"|μ| = {norm:g}, filters (a, 1, a) with a = {a_minus:g} and {a_plus:g}"
    return titled(figure, title, panels, ["two dimensions", "more dimensions"])


def filters_figure(filters: torch.Tensor, classes: Sequence[str], *, title: str) -> Figure:
    """The filter of every class, [K,k,k], from 0 as black to 1 as white.

    >>> filters_figure(class_filters("a private key", 2), ["cat", "dog"], title="Filters")
    <Figure size 450x185 with 2 Axes>
    """
    levels = (255 * filters).round().to(torch.uint8)[:, None]
    return gallery_figure(dict(zip(classes, levels, strict=True)), columns=len(classes), title=title)


@checker(
    "Each value of the copy is a weighted sum of 3 x 3 values of the original: an equation each, with nine unknowns.",
    "torch.nn.functional.unfold(original[None].double(), 3, padding=1) has the neighbours, nine lines a channel.",
    "torch.linalg.lstsq(neighbours, values).solution, viewed as 3 x 3, turned by flip(0, 1), divided by its max.",
)
def check_recovered(recovered: Callable) -> str:
    """Whether recovered(original, copy) is the filter [3,3], largest entry 1, that made the copy, to two digits.

    original, copy: uint8 [3,H,W], the copy as cuda.convolve_set makes it.

    >>> check_recovered(lambda original, copy: torch.eye(3, dtype=torch.float64))
    not yet, because entries are off by up to 0.96
    """
    image, kernel = embedded(2, 1).train.images[1, :, 4:26], class_filters("an exercise", 1)[0]
    conv = blur(image[None].double(), kernel[None])[0]
    mine = recovered(image.clone(), (255 * conv / conv.amax()).round().byte())
    check_tensor(mine, kernel)

    def is_mine(other: torch.Tensor) -> bool:
        return bool((mine - other).abs().max() < 0.02)

    def gray(filters: torch.Tensor) -> torch.Tensor:
        return (255 * filters[None].clamp(0, 1)).round().byte()

    with drawn(gray(kernel), gray(mine)):
        turned = is_mine(kernel.flip(0, 1)) or is_mine(kernel.flip(0, 1) * mine.max())
        assert not turned, "the filter is turned round, because unfold lists neighbours as a cross-correlation does"
        assert not is_mine(kernel.T), "lines and columns of the filter are exchanged"
        assert not is_mine(kernel * mine.max()) or is_mine(kernel), (
            f"the largest entry is {float(mine.max()):.3g}: the copy was divided by its largest value, so divide by max"
        )
        assert is_mine(kernel), f"entries are off by up to {float((mine - kernel).abs().max()):.2g}"
    return "one original beside its copy gives away the filter of the whole class"
