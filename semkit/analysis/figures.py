"""Numbers and tensors in, matplotlib figures out: a function a figure, for notebooks and files."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from semkit.analysis import dots, pictures, plots
from semkit.analysis.canvas import Figure, new_figure
from semkit.analysis.canvas import save as save  # these two for notebooks, which take all they draw with from here
from semkit.analysis.canvas import show as show
from semkit.analysis.measure import Correlation
from semkit.analysis.patterns import class_means
from semkit.lessons import mixtureplots, spareplots, sparseplots


def _titled(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, fontsize="medium")
    return figure


def _radii(rows: Sequence[dict]) -> int:
    return len({row["training_radius"] for row in rows})


def strip_figure(originals: torch.Tensor, noises: Mapping[str, torch.Tensor], *, radius: float) -> Figure:
    """Originals uint8 [N,3,H,W], and for each method's int8 noise the protected images and the rescaled noise."""
    figure = new_figure(1.2 + 0.9 * len(originals), 0.2 + 0.9 * (1 + 2 * len(noises)))
    pictures.draw_strip(figure, originals, noises, radius)
    return figure


def images_figure(rows: Mapping[str, torch.Tensor], *, title: str) -> Figure:
    """A labelled row of images for each uint8 [N,3,H,W]; all N alike."""
    count = max(len(images) for images in rows.values())
    figure = new_figure(1.6 + 0.9 * count, 0.4 + 0.9 * len(rows))
    pictures.draw_images(figure, rows)
    return _titled(figure, title)


def filters_figure(filters: torch.Tensor, classes: Sequence[str], *, title: str) -> Figure:
    """The filter [K,k,k] of every class, 0 black and 1 white."""
    figure = new_figure(0.4 + 0.9 * len(classes), 1.7)
    pictures.draw_filters(figure.subplots(1, len(classes), squeeze=False)[0], filters.numpy(), classes)
    return _titled(figure, title)


def mixture_figure(d: int, norm: float, a_minus: float, a_plus: float) -> Figure:
    """What class-wise filters do to two Gaussians: left in two dimensions, right the accuracies over the dimension."""
    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    mixtureplots.draw_mixture(left, norm, a_minus, a_plus)
    left.set_title("two dimensions", fontsize="medium")
    mixtureplots.draw_dimensions(right, mixtureplots.mixture_rows(norm, a_minus, a_plus), at=d)
    right.set_title("and more of them", fontsize="medium")
    return _titled(figure, f"|μ| = {norm:g}, filters (a, 1, a) with a = {a_minus:g} and {a_plus:g}")


def protection_figure(
    rows: Sequence[dict],
    originals: torch.Tensor,
    noises: Mapping[str, torch.Tensor],
    *,
    radius: float,
    title: str,
    chance: float,
) -> Figure:
    """Left the images, protected images and noise; right the accuracy of learners over their training radius."""
    figure = new_figure(12, 4.6)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    pictures.draw_strip(left, originals, noises, radius)
    plots.draw_accuracies(right.subplots(), rows, chance)
    return _titled(figure, title)


def accuracy_figure(rows: Sequence[dict], *, chance: float | None = None, title: str) -> Figure:
    """Clean test accuracy over the learner's training radius, a line a method, 95 % intervals over seeds."""
    figure = new_figure(8, 4)
    plots.draw_accuracies(figure.subplots(), rows, chance)
    return _titled(figure, title)


def curves_figure(rows: Sequence[dict], *, chance: float | None = None, title: str) -> Figure:
    """Learning curves, a panel a training radius and a line a method, with 95 % bands over seeds."""
    count = _radii(rows)
    figure = new_figure(min(9.5, 4 + 2.5 * count), 3.8)
    plots.draw_curves(figure.subplots(1, count, sharey=True, squeeze=False)[0], rows, chance)
    return _titled(figure, title)


def grid_figure(rows: Sequence[dict], *, title: str) -> Figure:
    """Protection in points, a table a training radius: noise side x surrogate side, mean ± half the 95 % interval.

    Rows of methods "noise side/surrogate side" and "clean". Raises ValueError at a radius where none pair by seed.
    """
    count = _radii(rows)
    figure = new_figure(1.7 + 3.5 * count, 4.5)
    panels = figure.subplots(1, count, squeeze=False)[0]
    image = plots.draw_grid(panels, rows)
    figure.colorbar(image, ax=list(panels), shrink=0.8, label="protection (points of accuracy)")
    return _titled(figure, title)


def countermeasures_figure(rows: Sequence[dict], *, chance: float | None = None, title: str) -> Figure:
    """Clean test accuracy after each countermeasure, a line of points a method, a panel a training radius."""
    count = _radii(rows)
    figure = new_figure(2.5 + 5.5 * count, 1.6 + 0.42 * len({row["countermeasure"] for row in rows}))
    dots.draw_countermeasures(figure.subplots(1, count, sharey=True, squeeze=False)[0], rows, chance)
    return _titled(figure, title)


def defences_figure(rows: Sequence[dict], *, chance: float | None = None, title: str) -> Figure:
    """Accuracy under each attack, a line of points a defence, 95 % intervals over seeds."""
    figure = new_figure(8.5, 4)
    dots.draw_defences(figure.subplots(), rows, chance)
    return _titled(figure, title)


def scatter_figure(
    rows: Sequence[dict],
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    correlation: Correlation | None = None,
    title: str,
) -> Figure:
    """A point a row at its columns x and y, its look by its noise side; the correlation with intervals beside it."""
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    plots.draw_scatter(axes, rows, x, y, correlation)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _titled(figure, title)


def losses_figure(rows: Sequence[dict], *, log: bool = False, title: str) -> Figure:
    """Loss along random (dashed) and adversarial (solid) directions over the radius, a colour a method.

    Rows with method, direction, radius, loss; several (seeds) of the same radius give a mean and a 95 % band, on the
    log scale those of the logarithms.
    """
    figure = new_figure(8, 4)
    plots.draw_losses(figure.subplots(), rows, log)
    return _titled(figure, title)


def pruning_figure(rows: Sequence[dict], *, title: str) -> Figure:
    """Accuracy over sparsity on clean and on attacked images, a line a learner, 95 % bands over seeds."""
    figure = new_figure(9, 3.6)
    sparseplots.draw_pruned(*figure.subplots(1, 2), rows)
    return _titled(figure, title)


def weights_figure(weights: Mapping[str, torch.Tensor], share: float, *, title: str) -> Figure:
    """The sizes of each net's weights, a panel a net, and which of them go when a `share` is pruned."""
    figure = new_figure(9, 3)
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, weights.items(), strict=True):
        threshold = sparseplots.draw_weights(axes, values.detach().abs().flatten().float().cpu().numpy(), share)
        axes.set_title(f"{name}: threshold {threshold:.2g}", fontsize="medium")
    panels[0].set_ylabel("number of weights")
    plots.legend(panels[-1])
    return _titled(figure, title)


def progress_figure(losses: Mapping[int, float], right: Mapping[int, tuple[float, float]], total: int) -> Figure:
    """A crafting of `total` steps so far: the surrogate's loss, and the shares it gets right (with noise, without)."""
    figure = new_figure(8.4, 2.4)
    plots.draw_progress(*figure.subplots(1, 2), losses, right)
    for axes in figure.axes:
        axes.set(xlim=(0, total), xlabel="step")
        axes.grid(alpha=0.3)
    return figure


def lines_figure(
    rows: Sequence[dict],
    *,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    points: tuple[str, str] | None = None,
    log: bool = False,
    title: str,
) -> Figure:
    """Column y over column x, a line a method, 95 % bands over the rows of the same x; log: of the axis x, with
    a tick at every x.

    points: the columns of an estimate of the same quantity and of its standard error, drawn beside the lines.
    """
    figure = new_figure(8, 4)
    axes = figure.subplots()
    plots.draw_lines(axes, rows, x, y, points)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        values = sorted({row[x] for row in rows})
        axes.set_xscale("log")
        axes.set_xticks(values, [f"1/{1 / value:g}" if value < 1 else f"{value:g}" for value in values])
        axes.minorticks_off()
    return _titled(figure, title)


def spreads_figure(v: torch.Tensor, limit: float, *, title: str) -> Figure:
    """The signed spreads v [N] of a net's answers by kind: outlier, boundary, robust (above the limit)."""
    figure = new_figure(8, 3.4)
    spareplots.draw_spreads(figure.subplots(), v, limit)
    return _titled(figure, title)


def reached_figure(rows: Sequence[dict], *, x: str, xlabel: str, columns: Mapping[str, str], title: str) -> Figure:
    """A point a method: mean of a column over that of x, 95 % intervals over rows; a panel a column, with its label."""
    figure = new_figure(2.4 + 3.4 * len(columns), 3.8)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    spareplots.draw_panels(panels, rows, x, columns)
    figure.supxlabel(xlabel, fontsize="medium")
    return _titled(figure, title)


def gallery_figure(pictures: Mapping[str, torch.Tensor], *, columns: int = 8, title: str) -> Figure:
    """Named uint8 pictures [3,H,W] in rows of `columns`."""
    lines = math.ceil(len(pictures) / columns)
    figure = new_figure(1.25 * columns, 0.5 + 1.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for empty in panels[len(pictures) :]:
        empty.set_axis_off()
    spareplots.draw_gallery(panels[: len(pictures)], pictures)
    return _titled(figure, title)


def spectrum_figure(noises: Mapping[str, torch.Tensor], *, title: str) -> Figure:
    """Power of each noise [N,C,H,W] over spatial frequency, against white noise of the same variance."""
    figure = new_figure(8, 4)
    pictures.draw_spectra(figure.subplots(), noises)
    return _titled(figure, title)


def class_means_figure(noise: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], *, radius: float) -> Figure:
    """The mean of the noise over the images of each class that occurs in labels, all rescaled alike."""
    present, means = class_means(noise, labels)
    columns = min(10 if len(present) > 20 else 5, len(present))
    lines = math.ceil(len(present) / columns)
    figure = new_figure(max(4.5, 0.4 + 1.3 * columns), 0.7 + 1.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for empty in panels[len(present) :]:
        empty.set_axis_off()
    scale = float(np.abs(means).max()) or 1.0
    pictures.draw_class_means(panels[: len(present)], means, [classes[label] for label in present], scale)
    return _titled(figure, f"class means of the noise of radius {radius:g}: ±{scale:.1f} levels → ±127")


def embedding_figure(points: np.ndarray | Mapping[str, np.ndarray], groups: Sequence[str], *, title: str) -> Figure:
    """Points [N,2] by the names of their N groups; a mapping gives a panel each, its keys the panels' titles."""
    panels = points if isinstance(points, Mapping) else {"": points}
    figure = new_figure(1.8 + 3.4 * len(panels), 3.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for place, (name, mine) in zip(axes, panels.items(), strict=True):
        pictures.draw_points(place, mine, groups)
        place.set_title(name, fontsize="medium")
    plots.legend(axes[-1])
    return _titled(figure, title)
