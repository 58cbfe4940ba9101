"""Numbers and tensors in, matplotlib figures out; the only module that imports matplotlib."""

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semkit.files import atomic_write
from semkit.measure import LABEL, interval

# Okabe and Ito's colours, told apart by colour-blind readers; markers say it again.
STYLE = {
    "clean": ("#000000", "o", "-"),
    "em": ("#0072B2", "s", "--"),
    "sem": ("#D55E00", "D", "-"),
    "rem": ("#009E73", "^", "-."),
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches, that belongs to no window and to no global state: safe in any thread."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _picture(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def draw_accuracies(axes, rows: Sequence[dict], chance: float | None = None) -> None:
    """Clean test accuracy over the learner's training radius, a line a method, 95 % intervals over seeds."""
    methods = [m for m in STYLE if any(row["method"] == m for row in rows)]
    radii = sorted({row["training_radius"] for row in rows})
    for place, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        values = [[row["last"] for row in mine if row["training_radius"] == r] for r in radii]
        shown = [(r, *interval(v)) for r, v in zip(radii, values, strict=True) if v]
        r, mean, low, high = np.array(shown).T
        error = np.nan_to_num([mean - low, high - mean])
        colour, marker, line = STYLE[method]
        # Shifted sideways a little, so that intervals at the same radius do not hide each other.
        shift = 0.05 * (place - (len(methods) - 1) / 2)
        style = dict(color=colour, marker=marker, ls=line, capsize=3, label=LABEL[method])
        axes.errorbar(r + shift, 100 * mean, 100 * error, **style)
    if chance is not None:
        axes.axhline(100 * chance, color="0.6", lw=1, ls=":")
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color="0.4")
        axes.annotate("chance", (1, 100 * chance), (-2, 2), **where)
    axes.set(xticks=radii, xticklabels=["0\n(ERM)" if r == 0 else f"{r:g}" for r in radii], ylim=(0, 100))
    axes.set(xlabel="learner's training radius (levels of 255)", ylabel="accuracy on clean test images (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def draw_strip(figure, originals: torch.Tensor, noises: dict[str, torch.Tensor], radius: float) -> None:
    """A grid: a row of uint8 originals [N,3,H,W], then for each method the protected images and the rescaled noise."""
    rows = [("original", originals)]
    for method, noise in noises.items():
        protected = (originals.to(torch.int16) + noise).clamp(0, 255).to(torch.uint8)
        grey = (127.5 + noise.float() * 127.5 / radius).round().clamp(0, 255).to(torch.uint8)
        label = LABEL.get(method, method)
        rows += [(f"{label}:\nprotected", protected), (f"{label}: noise\n±{radius:g} → ±127", grey)]
    axes = figure.subplots(len(rows), len(originals), squeeze=False)
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for place, picture in zip(line, pictures, strict=True):
            place.imshow(_picture(picture), interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")


def strip_figure(originals: torch.Tensor, noises: dict[str, torch.Tensor], *, radius: float) -> Figure:
    """Originals uint8 [N,3,H,W], and for each method's int8 noise the protected images and the rescaled noise."""
    figure = new_figure(1 + 0.9 * len(originals), 0.9 * (1 + 2 * len(noises)))
    draw_strip(figure, originals, noises, radius)
    return figure


def protection_figure(
    rows: Sequence[dict],
    originals: torch.Tensor,
    noises: dict[str, torch.Tensor],
    *,
    radius: float,
    title: str,
    chance: float,
) -> Figure:
    """Left the images, protected images and noise; right the accuracy of learners over their training radius."""
    figure = new_figure(11, 4.4)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    draw_strip(left, originals, noises, radius)
    draw_accuracies(right.subplots(), rows, chance)
    figure.suptitle(title, fontsize="medium")
    return figure


def _bytes(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def as_html(figure: Figure, alt: str) -> str:
    """The figure as an HTML <img> with the alternative text that a notebook's own picture output would drop."""
    picture = base64.b64encode(_bytes(figure, "png", 100)).decode()
    return f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{picture}"></figure>'


def save(figure: Figure, path: str | Path) -> None:
    """The figure as a file at print quality; the suffix of the path says the format."""
    atomic_write(path, _bytes(figure, Path(path).suffix[1:], 200))
