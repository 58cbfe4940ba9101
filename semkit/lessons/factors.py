"""The theory of `latent` on real images: their dimension, and the accuracy of linear rules on two classes.

Images are arrays of floats [N,...] of any shape and unit; lengths such as epsilon are l2 norms in that unit.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from semkit.images.pixels import check_count
from semkit.lessons.latent import Latent, best, share_of

Labelled = tuple[np.ndarray, np.ndarray]  # images [N,...] and labels [N]


def _principal(images: np.ndarray, labels: Sequence[int] | None):
    """scikit-learn's PCA of the images [N,...] about their mean, or, with labels, about their class means."""
    from sklearn.decomposition import PCA  # half a second that importing semkit need not pay

    x = np.array(images, float).reshape(len(images), -1)  # a copy, to be centred
    labels = np.zeros(len(x), int) if labels is None else np.asarray(labels)
    if len(x) < 2 or labels.shape != (len(x),):
        raise ValueError(f"2 images or more and a label each are needed, got {len(x)} and {labels.shape}")
    for label in np.unique(labels):
        x[labels == label] -= x[labels == label].mean(0)
    if not x.any():
        raise ValueError("images that do not vary have no dimension")
    return PCA(svd_solver="covariance_eigh" if len(x) >= x.shape[1] else "full").fit(x)


def dimensions(
    images: np.ndarray, labels: Sequence[int] | None = None, *, shares: Sequence[float] = (0.9, 0.95, 0.99)
) -> dict:
    """A row: n, d, the number of principal components that hold each share of the variance, and the participation.

        participation = (sum_i v_i)^2 / sum_i v_i^2 of the components' variances v: d if all are equal, 1 if one is all

    images [N,...]. With labels it is the variance within classes, as of the latent z of a mixture. n images have at
    most n - 1 components. Raises ValueError for fewer than 2 images, labels that do not fit, or no variance.

    >>> dimensions(np.eye(3))["components_99%"]
    2
    """
    principal = _principal(images, labels)
    v = principal.explained_variance_
    held = np.cumsum(v) / v.sum()
    counts = {f"components_{100 * share:g}%": int(np.searchsorted(held, share - 1e-12) + 1) for share in shares}
    return {"n": len(images), "d": principal.n_features_in_, **counts, "participation": float(v.sum() ** 2 / (v @ v))}


def fitted(images: np.ndarray, y: Sequence[int], k: int) -> tuple[Latent, np.ndarray]:
    """(model, centre [d]): the mixture x = image - centre with the class means and the k main components of images.

        W = components * sqrt(variances) within classes, centre = (m_+ + m_-) / 2, W mu = the part of (m_+ - m_-) / 2
        that lies in the components

    images [N,...], y of +1 and -1. What best(model) promises is true if images are such a mixture and N is much larger
    than k; test its rule on other images with `withstood`. The first j columns of W and values of mu are the model of j
    components. Raises ValueError unless both classes occur and 1 <= k <= the components that vary.
    """
    y = np.asarray(y)
    if set(np.unique(y)) != {-1, 1}:
        raise ValueError("y must be +1 or -1, and both must occur")
    principal = _principal(images, y)
    check_count(k, "the latent dimension k", 1)
    v = principal.explained_variance_
    if k > (vary := int((v > 1e-9 * v[0]).sum())):
        raise ValueError(f"k must be at most the {vary} components that vary, got {k}")
    x = np.asarray(images, float).reshape(len(y), -1)
    plus, minus = x[y > 0].mean(0), x[y < 0].mean(0)
    components, scale = principal.components_[:k], np.sqrt(v[:k])
    return Latent(components.T * scale, components @ (plus - minus) / 2 / scale), (plus + minus) / 2


def withstood(theta: np.ndarray, centre: np.ndarray, images: np.ndarray, y: np.ndarray, epsilon: float) -> np.ndarray:
    """Whether sign(theta'(image - centre)) stays y under every move of the image of length epsilon, [N] bool.

    Moves may leave the box [0, 1], so this is a lower bound. theta = 0 answers +1.
    """
    if not theta.any():
        return y > 0
    score = y * ((images.reshape(len(images), -1) - centre) @ theta)
    return score > epsilon * np.linalg.norm(theta)


def _two(part: Labelled, pair: tuple[int, int]) -> Labelled:
    """The images of both classes, and y = -1 for the first of them, +1 for the second."""
    images, labels = part
    kept = np.isin(labels, pair)
    return images[kept], np.where(labels[kept] == pair[1], 1, -1)


def pair_rows(
    train: Labelled,
    test: Labelled,
    pair: tuple[int, int],
    *,
    ks: Sequence[int],
    epsilons: Sequence[float],
    size: int | None = None,
) -> pd.DataFrame:
    """Rows, one for each k and epsilon: pair, d, k, epsilon, n and n_test images, and of the two best linear rules

        standard, robust:            accuracy that the mixture fitted to `train` promises; gap: their difference
        standard_held, robust_held:  share of `test` that is right, or that withstands epsilon; gap_held
        standard_error ...:          the standard errors of those shares

    size: images [N,C,H,W] are averaged down to size x size first. Raises ValueError as `fitted` and `pooled` do.
    """
    (x, y), (new, truth) = _two(train, pair), _two(test, pair)
    x, new = (x, new) if size is None else (pooled(x, size), pooled(new, size))
    full, centre = fitted(x, y, max(ks))
    of = {"pair": "{}/{}".format(*pair), "d": len(centre)}
    rows = []
    for k in ks:
        model = Latent(full.W[:, :k], full.mu[:k])
        for epsilon in epsilons:
            row = {**of, "k": k, "epsilon": epsilon, "n": len(x), "n_test": len(new)}
            kept = {}
            for name, reach in {"standard": 0, "robust": epsilon}.items():
                theta, row[name] = best(model, reach)
                kept[name] = withstood(theta, centre, new, truth, reach)
                row[f"{name}_held"], row[f"{name}_error"] = share_of(int(kept[name].sum()), len(new))
            lost = kept["standard"].astype(float) - kept["robust"]
            row |= {"gap": row["standard"] - row["robust"], "gap_held": float(lost.mean())}
            rows.append({**row, "gap_error": float(lost.std() / len(new) ** 0.5)})
    return pd.DataFrame(rows)


def class_rows(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """The row of `dimensions` of each class, with its name."""
    return pd.DataFrame({"class": name, **dimensions(images[labels == k])} for k, name in enumerate(names))


def values(image_set) -> Labelled:
    """(images in [0, 1], labels) of an ImageSet, as arrays.

    >>> [part.shape for part in values(sk.shapes.embedded(20, 10).train)]
    [(20, 3, 32, 32), (20,)]
    """
    return image_set.images.numpy() / np.float32(255), image_set.labels.numpy()


def pooled(images: np.ndarray, size: int) -> np.ndarray:
    """Images [N,C,H,W] averaged down to size x size. Raises ValueError unless size divides H and W."""
    check_count(size, "size", 1)
    n, c, h, w = images.shape
    if h % size or w % size:
        raise ValueError(f"size must divide {h} and {w}, got {size}")
    return images.reshape(n, c, size, h // size, size, w // size).mean((3, 5))
