"""The patterns in a set's noise as numbers: its spectrum, its class means, its place in a plane."""

from importlib.util import find_spec

import numpy as np


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
