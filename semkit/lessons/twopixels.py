"""Error-minimising noise by hand: a world of two pixels in closed form, and a loss over one coordinate of noise.

The world: y = +1 or -1 equally often; pixel 1 ~ N(y, 1) is the content; each quiet pixel ~ N(0, SPREAD^2) has none.
Noise moves each pixel by at most `radius`. Linear models score an image by w'x and answer its sign. No torch.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, ndtr

from semkit.analysis.canvas import Figure, minus, new_figure, reference
from semkit.lessons.answers import checker

SPREAD = 0.1  # standard deviation of a quiet pixel
RHOS = (0, 0.1, 0.2, 0.3, 0.4, 0.5)  # AT radii of `compared`
DECAY = 0.01  # of the regression's weights, because classes that noise separates would make them infinite
PIT, VALLEY = (-1, 0.9, 0.18), (1, 0.6, 0.6)  # place, depth and width of the landscape's two minima
REACH = 2  # noise on the landscape is within +-REACH

# Colours, markers and lines as in all figures; these three without the recipes, which take torch.
LOOK = {"EM": ("#0072B2", "s", "-"), "SEM": ("#D55E00", "D", "--"), "REM": ("#009E73", "^", "-.")}
TAKES = {"EM": "EM: L", "SEM": "SEM: its mean", "REM": "REM: its maximum"}
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#CC79A7")  # of images in draw_compared
CLASSES = {1: ("#E69F00", "o"), -1: ("#56B4E9", "^")}


# --- two pixels


def weights(rho: float, radius: float = 0.5, quiet: int = 1) -> np.ndarray:
    """Weights [1 + quiet] of the best linear learner under adversarial training (AT) of radius rho, up to a factor.

        shift = (1 + radius, radius, ..., radius), the mean of y x over images with error-minimising noise
        w     = max(shift - rho, 0) / variance

    rho 0: standard training (ERM). radius 0: clean images. Raises ValueError where one of them is negative.

    >>> weights(0.5)  # AT of the noise's radius: the quiet pixel is worth nothing
    array([1., 0.])
    """
    if min(rho, radius) < 0:
        raise ValueError(f"rho and radius must be >= 0, got {rho:g} and {radius:g}")
    shift = np.r_[1 + radius, np.full(quiet, radius)]
    return np.maximum(shift - rho, 0) / _spreads(quiet) ** 2


def right(w: np.ndarray) -> float:
    """Accuracy of the weights w [1 + quiet] on clean test images: Phi(w_1 / |spread w|), 1/2 for w = 0.

    >>> round(right(np.array([1.0, 0.0])), 3)
    0.841
    """
    noise = np.linalg.norm(w * _spreads(len(w) - 1))
    return float(ndtr(w[0] / noise)) if noise else 0.5


def accuracy(rho: float, radius: float = 0.5, quiet: int = 1) -> float:
    """Accuracy on clean test images of the learner with `weights`.

    >>> [round(sk.twopixels.accuracy(rho), 3) for rho in (0, 0.25, 0.5)]
    [0.613, 0.673, 0.841]
    """
    return right(weights(rho, radius, quiet))


def _spreads(quiet: int) -> np.ndarray:
    return np.r_[1, np.full(quiet, SPREAD)]


def draw(n: int, quiet: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n clean images x [n, 1 + quiet] and their labels y [n], +1 or -1.

    >>> [part.shape for part in draw(5)]
    [(5, 2), (5,)]
    """
    rng = np.random.default_rng(seed)
    y = rng.choice((-1, 1), n)
    x = rng.standard_normal((n, 1 + quiet)) * _spreads(quiet)
    x[:, 0] += y
    return x, y


def sampled(w: np.ndarray, n: int = 20_000, seed: int = 1) -> tuple[float, float]:
    """(accuracy, its standard error) of the weights w on n clean test images, by Monte-Carlo.

    >>> [round(number, 2) for number in sampled(np.array([1.0, 0.0]), n=2000)]
    [0.84, 0.01]
    """
    x, y = draw(n, len(w) - 1, seed)
    share = float((y * (x @ w) > 0).mean())
    return share, float(np.sqrt(share * (1 - share) / n))


def em_noise(y: np.ndarray, w: np.ndarray, radius: float = 0.5) -> np.ndarray:
    """Error-minimising noise [n, pixels] of a linear surrogate with weights w: delta = radius * y * sign(w).

    It raises the score y w'x as far as the radius allows, so it minimises every loss that falls with the score.

    >>> em_noise(np.array([1, -1]), np.array([2.0, -0.1]))
    array([[ 0.5, -0.5],
           [-0.5,  0.5]])
    """
    return radius * y[:, None] * np.sign(w)


def fitted(x: np.ndarray, y: np.ndarray, rho: float = 0.0) -> np.ndarray:
    """Weights [pixels] of robust logistic regression, AT of radius rho whose inner maximum is in closed form.

        min over w of mean log(1 + exp(-(y w'x - rho |w|_1))) + DECAY / 2 * |spread w|^2

    The decay shortens w and leaves its direction. |w|_1 is smooth in w = p - q with p, q >= 0.

    >>> round(right(fitted(*draw(2000))), 2)
    0.84
    """
    spread = (y[:, None] * x).std(0)
    sides = np.hstack([y[:, None] * x - rho, -y[:, None] * x - rho]) / np.tile(spread, 2)

    def loss(pq: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sides @ pq
        slope = -(expit(-margin) @ sides) / len(y)
        return np.logaddexp(0, -margin).mean() + DECAY / 2 * pq @ pq, slope + DECAY * pq

    start = np.zeros(sides.shape[1])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    p, q = np.split(found.x, 2)
    return (p - q) / spread


def crafted(x: np.ndarray, y: np.ndarray, rho: float = 0.0, radius: float = 0.5, rounds: int = 3) -> np.ndarray:
    """Noise [n, pixels] of alternating minima: the surrogate is fitted to x + delta, then delta is made anew.

    rho: AT radius of the surrogate, 0 for EM. Starts without noise.

    >>> np.unique(crafted(*draw(1000))).tolist()
    [-0.5, 0.5]
    """
    delta = np.zeros_like(x)
    for _ in range(rounds):
        delta = em_noise(y, fitted(x + delta, y, rho), radius)
    return delta


def compared(cases: dict[str, tuple[float, int]], n: int = 20_000, seed: int = 0) -> pd.DataFrame:
    """A row for each case, name -> (radius, quiet), and each rho of RHOS: closed form and simulation.

    exact: `accuracy`. sampled, error: its weights on n test images. regression: `fitted` to n training images, `right`.

    >>> compared({"two pixels": (0.5, 1)}, n=200)["exact"].round(2).tolist()
    [0.61, 0.63, 0.65, 0.7, 0.77, 0.84]
    """
    rows = []
    for name, (radius, quiet) in cases.items():
        x, y = draw(n, quiet, seed)
        x += em_noise(y, np.ones(1 + quiet), radius)
        for rho in RHOS:
            share, error = sampled(weights(rho, radius, quiet), n, seed + 1)
            row = dict(images=name, radius=radius, quiet=quiet, rho=rho, exact=accuracy(rho, radius, quiet))
            rows.append(row | dict(sampled=share, error=error, regression=right(fitted(x, y, rho))))
    return pd.DataFrame(rows)


# --- a landscape


def landscape(d: np.ndarray) -> np.ndarray:
    """L(d), the loss over noise d: 1 - sum of depth exp(-((d - place) / width)^2 / 2) over PIT and VALLEY.

    >>> landscape(np.array([-1, 1])).round(2)
    array([0.1, 0.4])
    """
    return 1 - sum(depth * np.exp(-(((d - place) / width) ** 2) / 2) for place, depth, width in (PIT, VALLEY))


def over_window(d: np.ndarray, window: float, of: Callable = np.mean) -> np.ndarray:
    """of L(d + u) over u from -window / 2 to window / 2, for each d: np.mean as in SEM, np.max as in REM.

    >>> over_window([-1, 1], 0.5, np.max).round(2).tolist()  # in the pit the maximum is higher than in the valley
    [0.66, 0.45]
    """
    return of(landscape(np.asarray(d)[..., None] + window * np.linspace(-0.5, 0.5, 201)), axis=-1)


def chosen(window: float) -> dict[str, float]:
    """The noise of each method: EM minimises L, SEM its mean and REM its maximum over the window.

    >>> {method: "pit" if d < 0 else "valley" for method, d in sk.twopixels.chosen(0.5).items()}
    {'EM': 'pit', 'SEM': 'pit', 'REM': 'valley'}
    """
    d = np.linspace(-REACH, REACH, 401)
    return {method: float(d[curve.argmin()]) for method, curve in _curves(d, window).items()}


def _curves(d: np.ndarray, window: float) -> dict[str, np.ndarray]:
    return {"EM": landscape(d), "SEM": over_window(d, window), "REM": over_window(d, window, np.max)}


# --- drawings: (Figure, alternative text, caption), as a panel takes it


def draw_world(radius: float, rho: float, n: int = 400) -> tuple[Figure, str, str]:
    """n training images with noise and n clean test images, with the line where the learner's answer changes.

    >>> draw_world(0.5, 0)[2]
    'Noise of radius 0.5, learner ERM; 400 images each, accuracy in closed form.'
    """
    w, (x, y) = weights(rho, radius), draw(n, seed=2)
    score = f"{100 * accuracy(rho, radius):.1f} % right"
    drawn = {
        "training images with noise": (x + em_noise(y, np.ones(2), radius), y),
        f"clean test images: {score}": draw(n, seed=3),
    }
    figure = new_figure(8, 3.6)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (name, (images, labels)) in zip(panels, drawn.items(), strict=True):
        for label, (colour, marker) in CLASSES.items():
            how = dict(color=colour, marker=marker, label=minus(f"y = {label:+d}"))
            axes.scatter(*images[labels == label].T, s=14, lw=0, **how)
        axes.axline((0, 0), (w[1], -w[0]), color="0.1", lw=1.5, label="answer changes")
        axes.set(xlim=(-5, 5), ylim=(-1, 1), xlabel="pixel 1 (content)")
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("pixel 2 (quiet)")
    _legend(panels[1])
    learner = f"AT of radius {rho:g}" if rho else "ERM"
    alt = f"Points of two classes with noise and without, and the line where the learner's answer changes: {score}"
    return figure, alt, f"Noise of radius {radius:g}, learner {learner}; {n} images each, accuracy in closed form."


def _legend(axes) -> None:
    where = dict(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    axes.legend(**where, frameon=False, fontsize="small")


def draw_compared(rows: pd.DataFrame) -> tuple[Figure, str, str]:
    """Accuracy over the learner's AT radius, from rows of `compared`: closed form, Monte-Carlo and regression.

    >>> draw_compared(compared({"two pixels": (0.5, 1)}, n=200))[1]
    'Accuracy over rho. two pixels: from 61 to 84 %'
    """
    figure, rhos, told = new_figure(8, 4), np.linspace(0, max(RHOS), 101), []
    axes = figure.subplots()
    cases = rows.groupby(["images", "radius", "quiet"], sort=False)
    for colour, ((name, radius, quiet), mine) in zip(COLOURS, cases, strict=False):
        exact = [100 * accuracy(rho, radius, quiet) for rho in rhos]
        axes.plot(rhos, exact, color=colour, lw=1.5, label=name)
        axes.errorbar(mine["rho"], 100 * mine["sampled"], 300 * mine["error"], color=colour, ls="", capsize=4)
        axes.plot(mine["rho"], 100 * mine["regression"], "x", color=colour)
        told.append(f"{name}: from {exact[0]:.0f} to {exact[-1]:.0f} %")
    reference(axes.axhline, 50, "chance (50 %)")
    axes.set(xlabel="rho, radius of adversarial training (0: ERM)", ylabel="accuracy on clean test images (%)")
    axes.grid(alpha=0.3)
    _legend(axes)
    how = (
        "Lines: closed form. Bars: Monte-Carlo, 3 standard errors. Crosses: adversarially trained logistic regression."
    )
    return figure, f"Accuracy over rho. {'; '.join(told)}", how


def draw_landscape(window: float, *more: float) -> tuple[Figure, str, str]:
    """L, its mean and its maximum over the window, and the minimum that each method takes; a panel for each window.

    >>> draw_landscape(0.5)[2]
    'Window 0.5: EM the pit, SEM the pit, REM the valley.'
    """
    windows = window, *more
    figure, d, told = new_figure(8, 3.8), np.linspace(-REACH, REACH, 401), []
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for axes, window in zip(panels, windows, strict=True):
        for method, curve in _curves(d, window).items():
            colour, marker, line = LOOK[method]
            how = dict(color=colour, ls=line, marker=marker, markevery=[curve.argmin()], ms=8, label=TAKES[method])
            axes.plot(d, curve, lw=1.5, **how)
        axes.plot([-window / 2, window / 2], [1.06, 1.06], "|-", color="0.4", ms=8, lw=1, label="the window")
        for name, (place, *_) in (("pit", PIT), ("valley", VALLEY)):
            axes.text(place, 0.02, name, color="0.4", fontsize="small", ha="center")
        axes.set(xlabel="noise d", ylim=(0, 1.12))
        axes.set_title(f"window {window:g}", fontsize="medium")
        axes.grid(alpha=0.3)
        taken = [f"{method} the {'pit' if at < 0 else 'valley'}" for method, at in chosen(window).items()]
        told.append(f"Window {window:g}: {', '.join(taken)}.")
    panels[0].set_ylabel("loss L(d)")
    _legend(panels[-1])
    return figure, f"A loss with a deep pit and a wide valley. {' '.join(told)}", " ".join(told)


# --- the exercise


@checker(
    "The score of an image is y w'x. Which way must pixel i move to raise it, if w[i] is negative and y is +1?",
    "Every pixel goes as far as it may: the size of w[i] does not matter, its sign does.",
    "y has a value for each image and w one for each pixel: y[:, None] * np.sign(w) has shape [n, pixels].",
)
def check_noise(noise: Callable) -> str:
    """Whether noise(y, w, radius) is the error-minimising noise [n, pixels] of a linear surrogate.

        delta = radius * y * sign(w),   y [n] of +1 and -1, w [pixels] without zeros

    >>> check_noise(lambda y, w, radius: radius * np.sign(w))
    not yet, because it returns the shape (3,): a line for each image and a column for each pixel are (5, 3)
    """
    y, w, radius = np.array([1, -1, -1, 1, 1]), np.array([1.5, -0.02, 50.0]), 0.3
    mine = noise(y.copy(), w.copy(), radius)
    shape = np.shape(mine)
    assert shape == (5, 3), (
        f"it returns the shape {shape}: a line for each image and a column for each pixel are (5, 3)"
    )
    mine, rise = np.asarray(mine), y * (mine @ w)
    assert not (rise < 0).all(), "it lowers every score y w'x: error-minimising noise raises it"
    assert (rise > 0).all(), "it lowers some scores y w'x: where y is -1 the noise must point the other way"
    reach = np.abs(mine).max()
    assert reach <= radius + 1e-9, f"it moves a pixel by {reach:g}: the radius is {radius:g}"
    short = np.abs(mine).min(0) < radius - 1e-9
    assert not short.any(), f"pixel {short.argmax() + 1} moves by less than the radius: only the sign of w counts"
    assert np.allclose(mine, em_noise(y, w, radius)), "a pixel moves against its weight: the direction is y * sign(w)"
    return "the same noise for all images of a class, and in every pixel, however small its weight"
