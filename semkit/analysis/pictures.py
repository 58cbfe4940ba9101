"""Figures of images, of noise and of its patterns."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from semkit.analysis.canvas import Figure, draw_lines, legend, new_figure, reference, styles, titled
from semkit.analysis.measure import class_means, radial_spectrum
from semkit.analysis.study import crafted_noise
from semkit.images.imageset import ImageSet
from semkit.images.picture import write_png
from semkit.images.pixels import add_noise
from semkit.nets.lab import Lab
from semkit.protections.base import Recipe
from semkit.protections.methods import label_of


def rescaled(noise, scale: float) -> np.ndarray:
    """uint8 [...,C,H,W] of noise of that shape: 0 as middle grey, -scale and below as black, +scale as white."""
    return np.rint(127.5 + np.asarray(noise, float) * 127.5 / scale).clip(0, 255).astype(np.uint8)


def _draw(axes, picture) -> None:
    """A uint8 picture [C,H,W], of three colours or grey, without ticks or frame."""
    levels = np.moveaxis(np.asarray(picture), 0, -1).squeeze()
    axes.imshow(levels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_rows(figure, rows: Mapping[str, Sequence]) -> None:
    """Into an empty figure or part of one: a labelled row of uint8 pictures [C,H,W] each."""
    panels = figure.subplots(len(rows), max(len(images) for images in rows.values()), squeeze=False)
    for places, (label, images) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(places, images, strict=True):
            _draw(axes, image)
        places[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")


def strip_rows(originals: torch.Tensor, noises: Mapping[str, torch.Tensor], radius: float) -> dict[str, Sequence]:
    """Originals uint8 [N,C,H,W], and for each method's int8 noise the protected images and the noise itself.

    The noise is drawn from -radius as black to +radius as white.
    """
    rows = {"original": originals}
    for method, noise in noises.items():
        label = label_of(method)
        rows[f"{label}:\nprotected"] = add_noise(originals, noise)
        rows[f"{label}: noise\n±{radius:g} as\nblack, white"] = rescaled(noise, radius)
    return rows


def write_strips(train: ImageSet, crafts: Mapping[str, Recipe | None], *, seed: int, lab: Lab, out: Path) -> None:
    """For each noise a PNG OUT/METHOD.png: an image of each of the first four classes, protected, above its noise."""
    place = [train.labels.tolist().index(k) for k in range(min(4, len(train.classes)))]
    for method, recipe in crafts.items():
        if recipe and recipe.radius is not None:
            noise = crafted_noise(train, recipe, seed=seed, lab=lab)[0].levels[place]
            _, *rows = strip_rows(train.images[place], {method: noise}, recipe.radius).values()
            side_by_side = [np.asarray(row).transpose(2, 0, 3, 1).reshape(row.shape[2], -1, 3) for row in rows]
            write_png(Image.fromarray(np.vstack(side_by_side)), out / f"{method}.png")


def strip_figure(originals: torch.Tensor, noises: Mapping[str, torch.Tensor], *, radius: float) -> Figure:
    """Originals uint8 [N,C,H,W], and below them for each method's int8 noise the protected images and the noise.

    >>> black, noise = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.ones(4, 3, 8, 8, dtype=torch.int8)
    >>> strip_figure(black, {"em": noise}, radius=8)
    <Figure size 480x290 with 12 Axes>
    """
    rows = strip_rows(originals, noises, radius)
    figure = new_figure(1.2 + 0.9 * len(originals), 0.2 + 0.9 * len(rows))
    draw_rows(figure, rows)
    return figure


def images_figure(rows: Mapping[str, torch.Tensor], *, title: str) -> Figure:
    """A labelled row of images for each uint8 [N,C,H,W]; all N alike.

    >>> sk.images_figure({"original": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, title="Four black images")
    <Figure size 520x130 with 4 Axes>
    """
    figure = new_figure(1.6 + 0.9 * max(len(images) for images in rows.values()), 0.4 + 0.9 * len(rows))
    draw_rows(figure, {label: images.cpu() for label, images in rows.items()})
    return titled(figure, title)


def gallery_figure(pictures: Mapping[str, torch.Tensor], *, columns: int = 8, title: str) -> Figure:
    """Named uint8 pictures [C,H,W] in lines of `columns`, each in a thin frame.

    >>> sk.gallery_figure({"black": torch.zeros(3, 8, 8, dtype=torch.uint8)}, title="One black picture")
    <Figure size 450x185 with 1 Axes>
    """
    columns = min(columns, len(pictures))
    lines = math.ceil(len(pictures) / columns)
    figure = new_figure(max(4.5, 1.25 * columns), 0.4 + 1.45 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, picture) in zip(panels, pictures.items(), strict=False):
        _draw(axes, picture)
        axes.spines[:].set(visible=True, color="0.6")  # else white at the rim would be lost on the page
        axes.set_xlabel(name, fontsize="small")
    for empty in panels[len(pictures) :]:
        empty.set_axis_off()
    return titled(figure, title)


def class_means_figure(noise: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], *, radius: float) -> Figure:
    """The mean of the noise over the images of each class that occurs in labels, all rescaled alike.

    The scale is the level that 98 % of the means do not exceed: by the largest alone they would all be grey.

    >>> sk.class_means_figure(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]), ["cat", "dog"], radius=8)
    <Figure size 450x185 with 2 Axes>
    """
    present, means = class_means(noise, labels)
    scale = float(np.quantile(np.abs(means), 0.98)) or 1.0
    pictures = {classes[label]: rescaled(mean, scale) for label, mean in zip(present, means, strict=True)}
    title = f"class means of the noise of radius {radius:g}: ±{scale:.1f} levels as black and white"
    return gallery_figure(pictures, columns=10 if len(present) > 20 else 5, title=title)


def spectrum_figure(noises: Mapping[str, torch.Tensor], *, title: str) -> Figure:
    """Power of each noise [N,C,H,W] over spatial frequency, of white noise of the same variance as 1.

    A line is the mean over the N images, its band holds the middle 90 % of them.

    >>> sk.spectrum_figure({"em": torch.randn(4, 3, 8, 8)}, title="Spectrum")
    <Figure size 800x400 with 1 Axes>
    """
    found = []
    for method, noise in noises.items():
        frequency, power = radial_spectrum(noise)
        power /= np.mean(np.asarray(noise, float) ** 2)
        each = {"method": method, "frequency": np.tile(frequency, len(power)), "power": power.ravel()}
        found.append(pd.DataFrame(each))
    figure = new_figure(8, 4)
    axes = figure.subplots()
    draw_lines(axes, pd.concat(found), "frequency", "power", errorbar=("pi", 90))
    reference(axes.axhline, 1, "white noise of\nthe same variance")
    axes.set(yscale="log", xlabel="spatial frequency (cycles per pixel)", ylabel="power (white noise = 1)")
    legend(axes)
    return titled(figure, title)


def embedding_figure(
    points: Mapping[str, np.ndarray], groups: Sequence[str], *, joined: tuple[str, str] | None = None, title: str
) -> Figure:
    """Points [N,2] by the names of their N groups; a panel for each entry of `points`, named by its key.

    joined: two groups of equally many points; the points of each that belong together are joined by a thin line.

    >>> sk.embedding_figure({"PCA": np.eye(4)[:, :2]}, ["em", "em", "sem", "sem"], title="Noises")
    <Figure size 520x390 with 1 Axes>
    """
    figure, groups = new_figure(1.8 + 3.4 * len(points), 3.9), np.asarray(groups)
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, place in zip(panels, points.values(), strict=True):
        if joined:
            ends = [place[groups == name] for name in joined]
            axes.plot(*np.stack(ends).transpose(2, 0, 1), color="0.6", lw=0.5, zorder=1)
        for name, look in styles(dict.fromkeys(groups.tolist())).items():
            axes.plot(*place[groups == name].T, **look | {"ls": ""}, ms=4, alpha=0.6, mew=0, label=name)
        axes.set(xticks=[], yticks=[], xlabel="first coordinate", ylabel="second coordinate")
    legend(panels[-1])
    return titled(figure, title, panels, list(points))
