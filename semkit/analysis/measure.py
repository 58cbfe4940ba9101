"""Measures of nets and of noise: losses, robustness, stability; spectra, class means and embeddings of noise; and rows
of them for every noise of a sweep.

The published definitions were not all available; robustness and stability are as defined here, after Liu et al.,
AAAI 2024. Both are negative losses: the higher, the less the perturbation does.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from semkit.analysis.study import crafted_surrogate, learned_net
from semkit.images.augment import Augment, FlipCrop, Identity
from semkit.images.imageset import ImageSet, Split
from semkit.images.pixels import check_count, check_name
from semkit.nets.engine import engine_of, predict
from semkit.nets.lab import Lab, as_dict, as_json, kept
from semkit.nets.weights import drawing
from semkit.protections.base import NoiseRecipe, Recipe
from semkit.training.learning import augmented_batch, check_outputs
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform
from semkit.training.recipes import LearnRecipe

RADIUS = 4  # levels, at which robustness and stability are measured
PARTS = ("low", "high", "grey", "colour")  # of a noise
CUT = 1 / 16  # cycles a pixel, between low and high: a wave of 16 pixels
ALONG, LOOKED_AT = (0, 1, 2, 4, 6, 8), 200  # radii in levels of loss_rows, and protected images of loss and rise rows


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

    Every draw has its own t ~ augment and its own random numbers of the perturbation. The same seed gives the same
    losses, also for a net with injected noise.

        loss = sk.measure.losses(net, split.test, sk.PGD(4)).mean()
    """
    if not len(images):
        raise ValueError("losses need an image or more, got none")
    engine = engine_of(check_outputs(model, images))
    batch, draws = check_count(batch, "batch", 1), check_count(draws, "draws", 1)
    images, found = images.to(engine.device), torch.empty(draws, len(images))
    with drawing(model, engine.generator(seed, "losses, injected noise")):
        for draw, start in itertools.product(range(draws), range(0, len(images), batch)):
            part, generator = slice(start, start + batch), engine.generator(seed, "losses", draw, start)
            x, y = augmented_batch(images, part, augment, engine, generator)
            a = perturbation(model, x, y, generator)
            found[draw, part] = F.cross_entropy(predict(model, a), y, reduction="none").float().cpu()
    return found


def robustness(model: nn.Module, images: ImageSet, radius: float = 4, *, steps: int = 10, **how) -> float:
    """-E_t max over |a - t(x)| <= radius of L(f(a), y), the maximum found by PGD of `steps` steps.

    Under a surrogate f: the surrogate's robustness on clean test images, the robustness of the noise on protected ones.
    """
    return -float(losses(model, images, PGD(radius, steps), **{"augment": FlipCrop(), **how}).mean())


def stability(model: nn.Module, images: ImageSet, radius: float = 4, *, draws: int = 8, **how) -> tuple[float, float]:
    """(-E_t E_u L(f(t(x) + u), y), the mean over images of L's variance over the draws), u uniform within radius.

    Raises ValueError for draws < 2, which have no variance.
    """
    how = {"augment": FlipCrop(), **how, "draws": check_count(draws, "draws", 2)}
    found = losses(model, images, Uniform(radius), **how)
    return -float(found.mean()), float(found.var(0).mean())


def losses_along(model: nn.Module, images: ImageSet, radii: Sequence[float], *, steps: int = 10, **how) -> pd.DataFrame:
    """Rows of direction ("random" or "adversarial"), radius in levels and mean loss."""
    rows = []
    for radius in radii:
        for direction, perturbation in (("random", Uniform(radius)), ("adversarial", PGD(radius, steps))):
            loss = float(losses(model, images, perturbation, **how).mean())
            rows.append({"direction": direction, "radius": radius, "loss": loss})
    return pd.DataFrame(rows)


def cosine(noise: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[N]: the cosine of the angle between two noises [N,C,H,W] of every image: 1 if alike, about 0 if unrelated.

    >>> cosine(torch.ones(2, 1, 2, 2), -torch.ones(2, 1, 2, 2))
    tensor([-1., -1.], dtype=torch.float64)
    """
    return F.cosine_similarity(noise.flatten(1).double(), other.flatten(1).double())


def radial_spectrum(noise) -> tuple[np.ndarray, np.ndarray]:
    """(frequency [K] in cycles a pixel, power [N,K] in squared levels) of noise [N,C,H,W].

        power[n, k] = mean over channels and the frequencies of ring k of |FFT2(noise[n])|^2 / (H * W)

    Ring k holds the frequencies nearest to k / min(H, W); those above 1/2 are corners of the plane. White noise of
    variance v has power v on every ring. The mean of the power over all H * W frequencies is the mean of noise^2.
    """
    noise = np.asarray(noise)
    height, width = noise.shape[-2:]
    size = min(height, width)
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring = np.rint(distance * size).astype(int).ravel()
    count = np.bincount(ring)

    def of(image: np.ndarray) -> np.ndarray:
        power = (np.abs(np.fft.fft2(image.astype(float))) ** 2).mean(0) / (height * width)
        return np.bincount(ring, power.ravel()) / count

    return np.arange(len(count)) / size, np.stack([of(image) for image in noise])


def _part(noise: torch.Tensor, part: str, cut: float) -> torch.Tensor:
    check_name(part, PARTS, "part")
    whole = noise.double()
    if part in ("low", "high"):
        rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in noise.shape[2:])
        kept = torch.hypot(rows[:, None], columns) <= cut
        first = torch.fft.ifft2(torch.fft.fft2(whole) * kept).real
    else:
        first = whole.mean(1, keepdim=True).expand_as(whole)
    return first if part in ("low", "grey") else whole - first


def noise_part(noise: torch.Tensor, part: str, cut: float = CUT) -> torch.Tensor:
    """One part of int8 noise [N,C,H,W] in levels, as int8, clipped to the largest level of the noise.

        low + high    = noise:   its Fourier coefficients of at most `cut` cycles a pixel, and all others
        grey + colour = noise:   the mean of its channels in each of them, and what is left

    Before rounding and clipping the two of a pair are orthogonal. Raises ValueError for another part.

    >>> noise_part(torch.tensor([6, 3, 0], dtype=torch.int8).view(1, 3, 1, 1), "colour").flatten().tolist()
    [3, 0, -3]
    """
    limit = int(noise.abs().max())
    return _part(noise, part, cut).round().clamp(-limit, limit).to(torch.int8)


def part_share(noise: torch.Tensor, part: str, cut: float = CUT) -> float:
    """The share of the noise's mean square that its part has, before rounding; the two of a pair add up to 1.

    >>> part_share(torch.ones(1, 3, 4, 4), "grey")
    1.0
    """
    return float(_part(noise, part, cut).square().mean() / noise.double().square().mean())


def class_means(noise, labels) -> tuple[np.ndarray, np.ndarray]:
    """(the K labels that occur, their mean noise [K,C,H,W]) of noise [N,C,H,W] and labels [N].

    >>> class_means(np.ones((4, 3, 8, 8)), [0, 0, 2, 2])[1].shape
    (2, 3, 8, 8)
    """
    noise, labels = np.asarray(noise), np.asarray(labels)
    present = np.unique(labels)
    return present, np.stack([noise[labels == label].mean(0, dtype=float) for label in present])


def embed(vectors, kind: str = "pca", *, seed: int = 0) -> np.ndarray:
    """[N,2]: the vectors [N,...] in a plane, by "pca", "tsne" or, where umap-learn is installed, "umap".

    Distances are to scale by PCA only; t-SNE and UMAP keep neighbours, and both first reduce to 50 components by PCA.
    Raises ValueError for another kind, for fewer than 4 vectors, and for "umap" without umap-learn.

    >>> embed(np.random.default_rng(0).normal(size=(10, 3, 4, 4))).shape
    (10, 2)
    """
    from sklearn.decomposition import PCA  # half a second that importing semkit need not pay

    vectors = np.asarray(vectors, np.float64)
    vectors = vectors.reshape(len(vectors), -1)
    check_name(kind, ("pca", "tsne", "umap"), "kind of embedding")
    if len(vectors) < 4:
        raise ValueError(f"an embedding needs 4 vectors or more, got {len(vectors)}")
    if kind == "umap" and not find_spec("umap"):
        raise ValueError('kind "umap" needs the package umap-learn: pip install umap-learn')
    components = 2 if kind == "pca" else min(50, *vectors.shape)
    reduced = PCA(components, random_state=seed).fit_transform(vectors)
    if kind == "pca":
        return reduced
    neighbours = min(30, (len(vectors) - 1) // 3)
    if kind == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(perplexity=neighbours, init="pca", random_state=seed).fit_transform(reduced)
    from umap import UMAP

    return UMAP(n_neighbors=max(2, neighbours), random_state=seed, n_jobs=1).fit_transform(reduced)


Crafts = Mapping[str, Recipe | None]


def _crafted(split: Split, crafts: Crafts, seeds: Sequence[int], lab: Lab | None) -> Iterator[tuple]:
    """(method, seed, lab, noise in levels, net that made it) of every noise that a net makes."""
    for seed, (method, recipe) in itertools.product(seeds, crafts.items()):
        if recipe and recipe.net:
            job = (lab or Lab()).doing(f"{method} noise, seed {seed}")
            noise, surrogate = crafted_surrogate(split.train, recipe, seed=seed, lab=job)
            yield method, seed, job, noise.levels, surrogate


def _following(seed: int, seeds: Sequence[int]) -> int | None:
    """The seed after this one, and the first after the last one; None if there is no other."""
    return seeds[(seeds.index(seed) + 1) % len(seeds)] if len(seeds) > 1 else None


def _judged(split: Split, noise: torch.Tensor, judges: Mapping[str, nn.Module]) -> dict[str, float]:
    """The numbers of noise_rows that cost passes; the net that made the noise is the judge "noise"."""
    protected, found = split.train.with_noise(noise), {}
    found["surrogate_robustness"] = robustness(judges["noise"], split.test, RADIUS)
    for name, model in judges.items():
        found[f"{name}_loss"] = float(losses(model, protected, augment=FlipCrop()).mean())
        found[f"{name}_robustness"] = robustness(model, protected, RADIUS)
        found[f"{name}_stability"], found[f"{name}_variance"] = stability(model, protected, RADIUS)
    return found


def noise_rows(
    split: Split,
    crafts: Crafts,
    *,
    seeds: Sequence[int] = (0,),
    reference: NoiseRecipe | None = None,
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of noises: every recipe x seed, measured at RADIUS levels with PGD-10 and 8 draws.

    surrogate_robustness: of the surrogate on the clean test images
    noise_loss, noise_robustness, noise_stability, noise_variance: of the protected images under the surrogate that
        made them; the loss is the mean at these images themselves, so -robustness - loss is its rise
    reference_*: the same under the surrogate that `reference` makes with the same seed
    other_*: under that of the next seed, which had no part in the noise; missing with one seed
    cosine: mean over images, with the noise of the next seed; nan with one seed

    With lab.cache a noise is measured once.
    """
    rows, noises, prints = [], {}, (split.train.fingerprint, split.test.fingerprint)
    for method, seed, job, noise, surrogate in _crafted(split, crafts, seeds, lab):
        noises[method, seed] = noise
        judges = {"noise": surrogate}
        for name, by in {"reference": seed, "other": _following(seed, seeds)}.items():
            if reference and by is not None:
                judges[name] = crafted_surrogate(split.train, reference, seed=by, lab=job)[1]
        told = as_dict(crafts[method])
        row = {"method": method, "seed": seed, **{side: told.get(side) for side in ("noise_side", "surrogate_side")}}
        parts = (*prints, crafts[method], seed, reference, _following(seed, seeds))
        (found,) = kept(job, "measured", parts, lambda _, of=(noise, judges): (_judged(split, *of),), as_json())
        rows.append(row | found)
        count = len(seeds) * sum(bool(recipe and recipe.net) for recipe in crafts.values())
        replace(job, what="measuring noise").report(len(rows), count, {})
    for row in rows:
        again = noises.get((row["method"], _following(row["seed"], seeds)))
        mine = noises[row["method"], row["seed"]]
        row["cosine"] = float("nan") if again is None else float(cosine(mine, again).mean())
    return pd.DataFrame(rows)


def loss_rows(split: Split, crafts: Crafts, *, seeds: Sequence[int] = (0,), lab: Lab | None = None) -> pd.DataFrame:
    """Rows of losses along random and adversarial directions: every recipe x seed x direction x radius of ALONG.

    losses_along of LOOKED_AT protected images, under the surrogate that made their noise. Raises ValueError if no
    recipe has a surrogate.
    """
    found = {}
    for method, seed, _, noise, surrogate in _crafted(split, crafts, seeds, lab):
        protected = split.train.with_noise(noise).limit(LOOKED_AT)
        found[method, seed] = losses_along(surrogate, protected, ALONG)
    if not found:
        raise ValueError("none of these recipes adds noise that a surrogate made, so there are no losses to measure")
    return pd.concat(found, names=["method", "seed"]).droplevel(-1).reset_index()


def rise_rows(
    split: Split,
    crafts: Crafts,
    learners: Mapping[float | str, LearnRecipe],
    *,
    seeds: Sequence[int] = (0,),
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of how much perturbations of RADIUS levels raise a learner's loss on the protected images it trained on:
    every recipe x seed x learner x perturbation, of LOOKED_AT images.

        perturbation: "random": Uniform; "generation-time": PGD-10 on the surrogate that made the noise; "another
            surrogate's": on that of the next seed, if there is one; "evaluation-time": on the learner itself
        loss, rise: the learner's mean cross-entropy at the perturbed images, and that less the one at the protected
            images themselves
        cosine: with the evaluation-time perturbation, mean over images

    method, training_radius, learner and seed as in study.grid, whose learners these are.
    """
    made = {(method, seed): (noise, net) for method, seed, _, noise, net in _crafted(split, crafts, seeds, lab)}
    rows, pgd = [], PGD(RADIUS)
    for (method, seed), (noise, surrogate) in made.items():
        train, engine = split.train.with_noise(noise), engine_of(surrogate)
        x, y = train.limit(LOOKED_AT).to(engine.device).batch(slice(None))
        x = engine.images(x)

        def moved(net: nn.Module, how: Perturbation, x=x, y=y, seed=seed) -> torch.Tensor:
            return how(net, x, y, engine_of(net).generator(seed, "rise")) - x

        by = {"random": moved(surrogate, Uniform(RADIUS)), "generation-time": moved(surrogate, pgd)}
        if other := made.get((method, _following(seed, seeds))):
            by["another surrogate's"] = moved(other[1], pgd)
        for name, recipe in learners.items():
            told = {"training_radius": recipe.perturbation.radius, "learner": str(name), "seed": seed}
            job = (lab or Lab()).doing(f"{method}, {name}, seed {seed}")
            learner = learned_net(train, split.test, recipe, seed=seed, lab=job)[1]
            own, at = moved(learner, pgd), float(F.cross_entropy(predict(learner, x), y))
            for kind, u in (by | {"evaluation-time": own}).items():
                loss = float(F.cross_entropy(predict(learner, x + u), y))
                told |= {"perturbation": kind, "loss": loss, "rise": loss - at, "cosine": float(cosine(u, own).mean())}
                rows.append({"method": method, **told})
    return pd.DataFrame(rows)
