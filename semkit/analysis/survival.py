"""What is left of a protection after each countermeasure, and what kind of noise it is: no net, no training.

The noise is d = protected - clean, in levels. Energy is not all: a net also has to find the noise more useful than the
content at the same frequencies. So survival orders protections and countermeasures; it does not predict accuracies.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from semkit.analysis.measure import part_share
from semkit.analysis.report import markdown
from semkit.countermeasures.pixelwise import dct_matrix, linear_softmax
from semkit.countermeasures.registry import COUNTERMEASURES, ByAugment, ByImage, ByNet, Countermeasure, label_of, named
from semkit.images.augment import FlipCrop
from semkit.images.imageset import ImageSet, stratified_split
from semkit.images.picture import SAMPLE, WINDOW, ssim
from semkit.images.pixels import add_noise, to_float
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.base import Recipe
from semkit.training.recipes import LearnRecipe

if TYPE_CHECKING:
    from semkit.analysis.canvas import Figure  # matplotlib takes a second that the command need not pay

SEEN = tuple(
    name for name, one in COUNTERMEASURES.items() if isinstance(one, ByImage | ByAugment) and not isinstance(one, ByNet)
)  # the countermeasures that can be seen in the images, without a file
BLOCK = 8  # pixels of a side, as JPEG's
BANDS = {"0": (0, 0), "1-2": (1, 2), "3-5": (3, 5), "6+": (6, 2 * BLOCK)}  # diagonals u + v of a block's DCT


def looked_at(size: int) -> int:
    """How many images of this size are enough for the numbers here, and few enough for seconds."""
    return max(200, 3_000_000 // (3 * size**2))


def along(noise: Tensor, left: Tensor) -> tuple[float, float]:
    """(gain, cosine) of what is left of a noise, both [N,...]: how much of it, and how little else.

        gain = <left, noise> / <noise, noise>,   cosine = <left, noise> / (|left| |noise|)

    Over all images together. cosine is 0 if nothing is left. Raises ValueError for zero noise.

    >>> along(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    (0.36, 0.6)
    """
    noise, left = noise.double(), left.double()
    if not (energy := float(noise.square().sum())):
        raise ValueError("the protected images are their originals: there is no noise of which something could be left")
    product, rest = float((left * noise).sum()), float(left.square().sum())
    return product / energy, product / math.sqrt(energy * rest) if rest else 0.0


def noise_left(images: Tensor, noise: Tensor, change: Callable[[Tensor], Tensor]) -> float:
    """The gain of a noise, int8 [N,3,H,W] in levels, through a change of images uint8 [N,3,H,W].

        <d, change(images + noise) - change(images)> / <d, d>,   d = the noise as the box leaves it

    1: all of it is left; 0: nothing along it. Raises ValueError for zero noise.

    >>> images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    >>> sk.survival.noise_left(images, torch.full((1, 3, 2, 2), 4, dtype=torch.int8), lambda x: x // 2)
    0.5
    """
    protected = add_noise(images, noise)
    return along(protected.double() - images, change(protected).double() - change(images).double())[0]


def _difference(clean: ImageSet, protected: ImageSet, see: Callable[[Tensor], Tensor]) -> Tensor:
    return see(protected.images).double() - see(clean.images).double()


def _noises(clean: ImageSet, protected: ImageSet, name: str, engine: Engine) -> tuple[Tensor, Tensor]:
    """The noise before and after a countermeasure; at every load both after the same crop and flip."""
    each = named(name)
    each.check()
    if isinstance(each, ByImage):
        change = each.fitted(protected, engine)
        return _difference(clean, protected, lambda images: images), _difference(clean, protected, change)
    if type(each) is Countermeasure:  # which does nothing
        return (_difference(clean, protected, lambda images: images),) * 2
    if not isinstance(each, ByAugment):
        raise ValueError(f"{name} changes the training, not the images: nothing can be seen of it here")

    def see(augment) -> Callable[[Tensor], Tensor]:
        size, generator = clean.images.shape[2:], torch.Generator().manual_seed(0)
        drawn = augment.draw(len(clean), size, generator)  # the draws of crop and flip come first
        return lambda images: 255 * augment.apply(to_float(images), drawn)

    changed = each.learner(LearnRecipe(augment=FlipCrop()), clean, None).augment
    return _difference(clean, protected, see(FlipCrop())), _difference(clean, protected, see(changed))


def survival_rows(
    clean: ImageSet, protected: ImageSet, names: Iterable[str] = SEEN, *, engine: Engine | None = None
) -> pd.DataFrame:
    """Rows of countermeasure, gain and cosine: what each countermeasure leaves of the noise (see `along`).

        left = c(protected) - c(clean), with the same random draws in both

    What a countermeasure fits to a set is fitted to the protected one, because a trainer has no other.
    Raises ValueError for equal sets, and for a countermeasure that does not change the images.

        sk.survival.survival_rows(split.train, split.train.with_noise(noise.levels), ["jpeg", "grayscale"])
    """
    engine = engine or Engine()
    rows = [(name, *along(*_noises(clean, protected, name, engine))) for name in names]
    return pd.DataFrame(rows, columns=["countermeasure", "gain", "cosine"])


def predicted_survival(
    train: ImageSet,
    crafts: Mapping[str, Recipe | None],
    names: Iterable[str] = SEEN,
    *,
    seeds: Sequence[int] = (0,),
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of method, seed, countermeasure, gain and cosine: the survival of the protection of every recipe x seed.

    To draw against the accuracy of learners, join it with rows of `grid` on method, countermeasure and seed. Recipes
    None, the clean images, are left out.

        crafts, _ = sk.sweep_recipes(["em", "sem", "rem"], [0], "lesson")
        sk.survival.predicted_survival(split.train, crafts, ["jpeg", "grayscale"], seeds=(0, 1, 2))
    """
    lab, found = lab or Lab(), {}
    for seed, (method, recipe) in product(seeds, crafts.items()):
        if recipe is not None:
            job = lab.doing(f"{method} noise, seed {seed}")
            protected, _ = recipe.apply(train, seed=seed, lab=job)
            found[method, seed] = survival_rows(train, protected, names, engine=lab.engine)
    return pd.concat(found, names=["method", "seed"]).droplevel(-1).reset_index()


def spectrum_shares(noise: Tensor) -> dict[str, float]:
    """The shares of a noise's energy by frequency: u + v = 0, 1-2, 3-5 and 6+ of the DCT of 8 x 8 blocks; [N,C,H,W].

    White noise has 1/64, 5/64, 15/64 and 43/64. Rows and columns that fill no block are left out.

    >>> spectrum_shares(torch.ones(1, 3, 8, 8))["0"]
    1.0
    """
    height, width = (side // BLOCK * BLOCK for side in noise.shape[2:])
    blocks = noise[..., :height, :width].double().unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)
    transform = dct_matrix(BLOCK)
    energy = (transform @ blocks @ transform.T).square().sum((0, 1, 2, 3))
    diagonal = torch.arange(BLOCK)[:, None] + torch.arange(BLOCK)
    of = {name: float(energy[(diagonal >= low) & (diagonal <= high)].sum()) for name, (low, high) in BANDS.items()}
    return {name: share / float(energy.sum()) for name, share in of.items()}


def separability(noise: Tensor, labels: Tensor) -> float | None:
    """The accuracy of a bias-free linear classifier of noises [N,C,H,W] on the half of them that it was not fitted to.

    1: the noise alone tells the class. None if a class has a single image.
    """
    if labels.unique(return_counts=True)[1].min() < 2:
        return None
    fitted, held_out = stratified_split(labels, 0.5)
    x = (noise / noise.abs().max()).float().flatten(1)
    weights = linear_softmax(x[fitted], labels[fitted])
    return float(((x[held_out] @ weights.T).argmax(1) == labels[held_out]).double().mean())


def noise_numbers(clean: ImageSet, protected: ImageSet, radius: float | None = None) -> dict:
    """What kind of noise it is: rms in levels, at_bound (share of values at +-radius, None without a radius), psnr_db,
    ssim, achromatic (part_share, "grey"), spectrum (spectrum_shares), separability and chance (that of a guess).

    Raises ValueError for equal sets.
    """
    noise = protected.images.double() - clean.images
    along(noise, noise)  # raises for zero noise
    pairs = zip(clean.images[:SAMPLE], protected.images[:SAMPLE], strict=True)
    square = float(noise.square().mean())
    return {
        "rms": math.sqrt(square),
        "at_bound": None if radius is None else float((noise.abs() > radius - 1).double().mean()),
        "psnr_db": 10 * math.log10(255**2 / square),
        "ssim": float(np.mean([ssim(*pair) for pair in pairs])) if min(noise.shape[2:]) >= WINDOW else None,
        "achromatic": part_share(noise, "grey"),
        "spectrum": spectrum_shares(noise),
        "separability": separability(noise, clean.labels),
        "chance": 1 / len(clean.classes),
    }  # fmt: skip


def in_words(numbers: Mapping, rows: pd.DataFrame) -> str:
    """noise_numbers as lines to read, and the rows of `survival_rows` as a table in Markdown."""
    bound = "" if numbers["at_bound"] is None else f", {numbers['at_bound']:.0%} of the values at the radius"
    alike = "" if numbers["ssim"] is None else f", SSIM {numbers['ssim']:.3f}"
    spectrum = ", ".join(f"{name}: {share:.0%}" for name, share in numbers["spectrum"].items())
    told = "unknown, because a class has a single image"
    if numbers["separability"] is not None:
        told = f"{numbers['separability']:.0%} of the noises that it has not seen (chance {numbers['chance']:.0%})"
    seen = f"{numbers['looked_at']} of {numbers['images']} images looked at: " if "images" in numbers else ""
    return "\n".join((
        f"{seen}noise of rms {numbers['rms']:.1f} levels{bound}; PSNR {numbers['psnr_db']:.1f} dB{alike}",
        f"its energy by frequency u + v of 8 x 8 blocks: {spectrum}; without colour: {numbers['achromatic']:.0%}",
        f"a linear classifier labels rightly: {told}",
        markdown(rows.assign(**{name: rows[name].map("{:.2f}".format) for name in ("gain", "cosine")})),
    ))  # fmt: skip


def survival_figure(rows: pd.DataFrame, numbers: Mapping, *, title: str, file: Path | None = None) -> "Figure":
    """Gain and cosine of the noise after each countermeasure, and its energy by frequency and colour.

    file: where the figure is saved as well; the suffix says the format.
    """
    from semkit.analysis import canvas

    figure = canvas.new_figure(9, 0.8 + 0.24 * max(12, len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for column, colour, marker in (("gain", "#0072B2", "o"), ("cosine", "#D55E00", "^")):
        left.plot(rows[column], range(len(rows)), marker, color=colour, label=column)
    left.set(xlabel="what is left, along the noise itself", ylim=(len(rows) - 0.5, -0.5))
    left.set_xlim(left=min(0, left.get_xlim()[0]))
    left.set_yticks(range(len(rows)), rows["countermeasure"].map(label_of))
    canvas.reference(left.axvline, 1, "all of it")
    left.grid(alpha=0.3)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize="small", frameon=False)
    shares = {f"u + v = {name}": share for name, share in numbers["spectrum"].items()}
    shares["without colour"] = numbers["achromatic"]
    right.barh(list(shares), [100 * share for share in shares.values()], color="#56B4E9")
    right.invert_yaxis()
    right.set(xlabel="share of the noise's energy (%)", xlim=(0, 100))
    canvas.titled(figure, title)
    if file:
        canvas.save(figure, file)
    return figure
