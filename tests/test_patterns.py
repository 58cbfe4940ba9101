"""Spectrum, class means and embeddings of noise against Parseval, plane waves, plain loops and numpy's own SVD."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from semkit.analysis.patterns import class_means, embed, radial_spectrum


def rings(height, width):
    """How many of the height * width frequencies are nearest to k / min(height, width), by a plain loop."""
    count = {}
    for i in range(height):
        for j in range(width):
            u, v = min(i, height - i) / height, min(j, width - j) / width
            k = round((u * u + v * v) ** 0.5 * min(height, width))
            count[k] = count.get(k, 0) + 1
    return np.array([count[k] for k in sorted(count)])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 9), (8, 12)])
def test_the_spectrum_keeps_the_power_of_every_image(height, width):
    noise = torch.randint(-8, 9, (5, 3, height, width), dtype=torch.int8)
    frequency, power = radial_spectrum(noise)
    count = rings(height, width)
    assert power.shape == (5, len(count)) and frequency == pytest.approx(np.arange(len(count)) / min(height, width))
    squares = noise.double().square().mean((1, 2, 3))
    assert power @ count / (height * width) == pytest.approx(squares.numpy())


@pytest.mark.parametrize(("down", "across"), [(0, 3), (5, 0), (3, 4), (0, 8), (0, 0)])
def test_a_plane_wave_is_one_ring(down, across):
    i, j = np.mgrid[:16, :16]
    wave = np.cos(2 * np.pi * (down * i + across * j) / 16)[None, None]
    frequency, power = radial_spectrum(wave)
    k = round((down**2 + across**2) ** 0.5)
    assert frequency[k] == pytest.approx(k / 16)
    assert power[0, k] * rings(16, 16)[k] / 256 == pytest.approx((wave**2).mean())
    assert np.delete(power[0], k) == pytest.approx(0, abs=1e-12)


def test_white_noise_has_its_variance_at_every_frequency():
    noise = np.random.default_rng(0).normal(0, 3, (400, 3, 8, 8))
    _, power = radial_spectrum(noise)
    # 1,200 draws of every frequency, each with a relative deviation of at most sqrt(2).
    assert power.mean(0) == pytest.approx(9, rel=4 * (2 / 1200) ** 0.5)


def test_class_means_are_those_of_a_plain_loop():
    noise, labels = torch.randint(-8, 9, (7, 3, 4, 4), dtype=torch.int8), torch.tensor([2, 0, 2, 2, 0, 5, 2])
    present, means = class_means(noise, labels)
    assert present.tolist() == [0, 2, 5]
    for label, mean in zip(present, means, strict=True):
        mine = [n.double().numpy() for n, y in zip(noise, labels, strict=True) if y == label]
        assert mean == pytest.approx(sum(mine) / len(mine))


def test_pca_is_the_projection_on_the_first_two_singular_vectors():
    vectors = torch.randn(30, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 4)
    found = embed(vectors)
    centred = vectors.flatten(1).double().numpy()
    centred -= centred.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :2] * s[:2]
    assert np.abs(found) == pytest.approx(np.abs(expected), rel=1e-9)


UMAP = (
    pytest.mark.skipif(not find_spec("umap"), reason="umap-learn is missing"),
    pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning"),
)


@pytest.mark.parametrize("kind", ["tsne", pytest.param("umap", marks=UMAP)])
def test_neighbours_stay_neighbours_and_the_seed_fixes_the_picture(kind):
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(centre, 0.1, (15, 20)) for centre in (0, 1, 2)])
    points, group = embed(vectors, kind), np.repeat((0, 1, 2), 15)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag([np.inf] * 45)
    assert points.shape == (45, 2) and (group[distance.argmin(0)] == group).all()
    assert np.array_equal(points, embed(vectors, kind))


@pytest.mark.parametrize(("n", "kind", "said"), [(9, "isomap", "kind must be"), (3, "pca", "4 vectors or more, got 3")])
def test_what_cannot_be_embedded_is_said(n, kind, said):
    with pytest.raises(ValueError, match=said):
        embed(np.zeros((n, 4)), kind)


@pytest.mark.skipif(find_spec("umap") is not None, reason="umap-learn is installed")
def test_a_missing_umap_is_named():
    with pytest.raises(ValueError, match="pip install umap-learn"):
        embed(np.zeros((9, 4)), "umap")
