"""Images and noise drawn into axes that the caller made: strips, class means, spectra, embeddings."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from semkit.analysis.patterns import radial_spectrum
from semkit.analysis.plots import legend, line, reference, styles
from semkit.protections.registry import label_of


def rescaled(noise, scale: float) -> np.ndarray:
    """uint8 [...,H,W,C] of noise [...,C,H,W]: 0 as middle grey, -scale as black, +scale as white."""
    grey = np.rint(127.5 + np.asarray(noise, float) * 127.5 / scale).clip(0, 255)
    return np.moveaxis(grey.astype(np.uint8), -3, -1)


def draw_picture(axes, levels: np.ndarray) -> None:
    """A uint8 picture [H,W,3], or [H,W] as grey, without ticks or frame."""
    axes.imshow(levels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_strip(figure, originals: torch.Tensor, noises: Mapping[str, torch.Tensor], radius: float) -> None:
    """A grid: a row of uint8 originals [N,3,H,W], then for each method the protected images and the rescaled noise."""
    rows = [("original", np.moveaxis(originals.numpy(), 1, -1))]
    for method, noise in noises.items():
        protected = (originals.to(torch.int16) + noise).clamp(0, 255).to(torch.uint8)
        label = label_of(method)
        rows += [(f"{label}:\nprotected", np.moveaxis(protected.numpy(), 1, -1))]
        rows += [(f"{label}: noise\n±{radius:g} → ±127", rescaled(noise, radius))]
    axes = figure.subplots(len(rows), len(originals), squeeze=False)
    for row, (label, pictures) in zip(axes, rows, strict=True):
        for place, picture in zip(row, pictures, strict=True):
            draw_picture(place, picture)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")


def draw_images(figure, rows: Mapping[str, torch.Tensor]) -> None:
    """A grid: a labelled row for each uint8 [N,3,H,W]."""
    panels = figure.subplots(len(rows), max(len(images) for images in rows.values()), squeeze=False)
    for row, (label, images) in zip(panels, rows.items(), strict=True):
        for place, image in zip(row, images.cpu().numpy(), strict=True):
            draw_picture(place, np.moveaxis(image, 0, -1))
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")


def draw_filters(panels: Sequence, filters: np.ndarray, names: Sequence[str]) -> None:
    """Each filter [k,k] into one axes: 0 black, 1 white."""
    for axes, kernel, name in zip(panels, filters, names, strict=True):
        draw_picture(axes, np.rint(255 * np.asarray(kernel)))
        axes.spines[:].set(visible=True, color="0.6")  # else white entries at the rim would be lost on the page
        axes.set_xlabel(name, fontsize="small")


def draw_class_means(panels: Sequence, means: np.ndarray, names: Sequence[str], scale: float) -> None:
    """The mean noise of each class [K,C,H,W] into one axes each, +-scale levels as white and black."""
    for axes, mean, name in zip(panels, means, names, strict=True):
        draw_picture(axes, rescaled(mean, scale))
        axes.set_xlabel(name, fontsize="small")


def draw_spectra(axes, noises: Mapping[str, torch.Tensor]) -> None:
    """The radial spectrum of each noise [N,C,H,W] over that of white noise of its variance: mean, middle 90 % of N."""
    for name, look in styles(noises).items():
        noise = np.asarray(noises[name])
        frequency, power = radial_spectrum(noise)
        power /= np.mean(noise.astype(float) ** 2)
        band = np.quantile(power, (0.05, 0.95), axis=0)
        line(axes, frequency, power.mean(0), *band, label=label_of(name), **look)
    reference(axes, 1, "white noise of\nthe same variance")
    axes.set(yscale="log", xlabel="spatial frequency (cycles per pixel)", ylabel="power (white noise = 1)")
    axes.grid(alpha=0.3)
    legend(axes)


def draw_points(axes, points: np.ndarray, groups: Sequence[str]) -> None:
    """Points [N,2] in the look of their group; the legend is left to the caller."""
    for name, look in styles(dict.fromkeys(groups)).items():
        mine = points[[group == name for group in groups]]
        axes.plot(*mine.T, **{**look, "ls": ""}, ms=4, alpha=0.6, mew=0, label=label_of(name))
    axes.set(xticks=[], yticks=[], xlabel="first coordinate", ylabel="second coordinate")
