"""What is measured of nets and of noise: losses, robustness, stability; spectra, class means and embeddings of noise.

The published definitions were not all available; robustness and stability are as defined here, after Liu et al.,
AAAI 2024. Both are negative losses: the higher, the less the perturbation does.
"""

import itertools
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from semkit.images.augment import Augment, FlipCrop, Identity
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count
from semkit.nets.engine import engine_of, predict
from semkit.nets.weights import drawing
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform


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


def losses_along(model: nn.Module, images: ImageSet, radii: Sequence[float], *, steps: int = 10, **how) -> pd.DataFrame:
    """Rows of direction ("random" or "adversarial"), radius and mean loss as the perturbation grows."""
    rows = []
    for radius in radii:
        for direction, perturbation in (("random", Uniform(radius)), ("adversarial", PGD(radius, steps))):
            loss = float(losses(model, images, perturbation, **how).mean())
            rows.append({"direction": direction, "radius": radius, "loss": loss})
    return pd.DataFrame(rows)


def cosine(noise: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[N]: the cosine of the angle between two noises [N,C,H,W] of every image: 1 if alike, about 0 if unrelated."""
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


def class_means(noise, labels) -> tuple[np.ndarray, np.ndarray]:
    """(the K labels that occur, the mean noise of each [K,C,H,W]) of noise [N,C,H,W] and labels [N]."""
    noise, labels = np.asarray(noise), np.asarray(labels)
    present = np.unique(labels)
    return present, np.stack([noise[labels == label].mean(0, dtype=float) for label in present])


def embed(vectors, kind: str = "pca", *, seed: int = 0) -> np.ndarray:
    """[N,2]: the vectors [N,...] in a plane, by "pca", "tsne" or, where umap-learn is installed, "umap".

    Distances are to scale by PCA only; t-SNE and UMAP keep neighbours, and both first reduce to 50 components by PCA.
    Raises ValueError for any other kind, for fewer than 4 vectors, and where UMAP is asked for and not installed.
    """
    from sklearn.decomposition import PCA  # half a second that importing semkit need not pay

    vectors = np.asarray(vectors, np.float64)
    vectors = vectors.reshape(len(vectors), -1)
    if kind not in ("pca", "tsne", "umap"):
        raise ValueError(f'kind must be "pca", "tsne" or "umap", got {kind!r}')
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
