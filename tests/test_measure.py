"""Robustness, stability and patterns of noise against closed forms, plain loops, Parseval and numpy's own SVD."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import image_set
from torch import nn

from semkit.analysis.measure import (
    class_means,
    cosine,
    embed,
    losses,
    losses_along,
    noise_part,
    radial_spectrum,
    robustness,
    stability,
)
from semkit.images.augment import FlipCrop, Identity
from semkit.images.pixels import LEVEL
from semkit.lessons.defences import survived
from semkit.nets import models
from semkit.nets.engine import Engine
from semkit.training.learning import accuracy
from semkit.training.perturb import PGD, Uniform

ENGINE = Engine("cpu", "float64")


@pytest.fixture(scope="module")
def images():
    """Images well inside the box, so that no clipping spoils a closed form."""
    made = image_set(12)
    return replace(made, images=made.images // 4 + 90)


@pytest.fixture(scope="module")
def linear(images):
    """logits = W x + b, whose loss has a closed form for two classes."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(images.images[0].numel(), len(images.classes))
    return ENGINE.prepare(nn.Sequential(*layers).requires_grad_(False))


def two_classes(images, linear):
    """Binary labels and the margin direction w = W_1 - W_0 of the linear model's first two classes."""
    binary = replace(images, labels=images.labels % 2, classes=images.classes[:2])
    model = ENGINE.prepare(nn.Sequential(nn.Flatten(), nn.Linear(images.images[0].numel(), 2)))
    with torch.no_grad():
        model[1].weight.copy_(linear[1].weight[:2])
    model.requires_grad_(False)
    return binary, model, model[1].weight[1] - model[1].weight[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_net_of_ones_own_is_measured_in_its_own_dtype_and_not_in_half_precision(images, dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(images.images[0].numel(), len(images.classes))).to(dtype)
    logits = net(images.images.to(dtype) / 255)
    assert accuracy(net, images) == (logits.argmax(1) == images.labels).double().mean()
    assert torch.allclose(losses(net, images)[0], F.cross_entropy(logits, images.labels, reduction="none").float())
    assert robustness(net, images, 4) < -float(losses(net, images).mean())
    for half in (net.half(), Engine("cpu", "float32").prepare(net.float()).half()):
        with pytest.raises(ValueError, match=r"weights are torch.float16: write net.to\(torch.float32\) first"):
            accuracy(half, images)


def test_losses_are_those_of_a_plain_loop(images, linear):
    found = losses(linear, images, batch=5)
    pairs = zip(images.images.double() / 255, images.labels, strict=True)
    alone = [F.cross_entropy(linear(x[None]), y[None]).item() for x, y in pairs]
    assert found.shape == (1, 12)
    assert found[0].tolist() == pytest.approx(alone, rel=1e-6)


def test_robustness_of_a_linear_model_is_its_closed_form(images, linear):
    binary, model, w = two_classes(images, linear)
    x, sign = binary.images.double() / 255, 1 - 2 * binary.labels
    margin = sign * (model(x)[:, 0] - model(x)[:, 1]) - 4 * LEVEL * w.abs().sum()
    worst = F.softplus(-margin).mean()
    found = robustness(model, binary, 4, steps=10, augment=Identity())
    assert found == pytest.approx(-float(worst), rel=1e-6)
    too_few = robustness(model, binary, 4, steps=1, augment=Identity())
    assert too_few > found + 1e-6


def test_stability_of_a_linear_model_is_that_of_a_sum_of_uniforms(images, linear):
    binary, model, w = two_classes(images, linear)
    x, sign = binary.images.double() / 255, 1 - 2 * binary.labels
    margin = sign * (model(x)[:, 0] - model(x)[:, 1])
    sigma = 4 * LEVEL * w.norm() / 3**0.5  # many small uniforms: Gaussian
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2) / torch.exp(-z * z / 2).sum()
    along = F.softplus(-(margin[:, None] + sigma * z))
    mean = (along * weight).sum(1)
    variance = ((along - mean[:, None]) ** 2 * weight).sum(1)
    found, spread = stability(model, binary, 4, draws=400, augment=Identity())
    assert found == pytest.approx(-float(mean.mean()), abs=4 * float((variance.mean() / (400 * 12)) ** 0.5))
    assert spread == pytest.approx(float(variance.mean()), rel=0.15)


def test_a_random_direction_does_less_than_an_adversarial_one_and_radius_0_nothing(images, linear):
    rows = losses_along(linear, images, (0, 2, 6))
    loss = rows.set_index(["direction", "radius"])["loss"]
    plain = float(losses(linear, images).mean())
    assert loss["random", 0] == loss["adversarial", 0] == pytest.approx(plain)
    assert loss["adversarial", 6] > loss["adversarial", 2] > loss["random", 2]


def test_every_draw_has_its_own_randomness_and_the_seed_fixes_it(images, linear):
    how = {"augment": FlipCrop(), "draws": 3}
    found = losses(linear, images, Uniform(4), **how)
    assert torch.equal(found, losses(linear, images, Uniform(4), **how))
    assert found.var(0).min() > 0
    assert not torch.equal(found, losses(linear, images, Uniform(4), seed=1, **how))


def test_cosine_of_noises():
    a = torch.tensor([[1, 0], [2, 2], [1, 1]], dtype=torch.int8).reshape(3, 1, 1, 2)
    b = torch.tensor([[0, 5], [3, 3], [-1, -1]], dtype=torch.int8).reshape(3, 1, 1, 2)
    assert cosine(a, b).tolist() == pytest.approx([0, 1, -1])


def test_a_net_is_measured_in_the_precision_it_was_prepared_for(images):
    model = ENGINE.prepare(models.build("tiny", len(images.classes), size=8))
    assert 0 <= accuracy(model, images) <= 1
    assert robustness(model, images, 4, steps=1) == robustness(model, images, 4, steps=1)
    assert losses(model, images).shape == (1, len(images))


def test_a_net_with_injected_noise_measures_the_same_twice_and_its_noise_stream_stays(images):
    model = ENGINE.prepare(models.build("tiny+injected", len(images.classes), size=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert stability(model, images, draws=2, seed=3) == stability(model, images, draws=2, seed=3)
    attack = (model, PGD(4, 1))
    assert torch.equal(survived(model, attack, images), survived(model, attack, images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert losses(model, images, draws=2).diff(dim=0).abs().max() > 0  # every draw has noise of its own


def test_stability_of_one_draw_is_refused_because_it_has_no_variance(images, linear):
    with pytest.raises(ValueError, match="draws must be a whole number >= 2, got 1"):
        stability(linear, images, draws=1)


# -- patterns of noise ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("height, width", [(16, 32), (15, 21)])
def test_the_two_parts_of_a_pair_are_the_noise_again_up_to_rounding_and_the_radius(height, width):
    noise = torch.randint(-8, 9, (6, 3, height, width), dtype=torch.int8) // 2
    noise[0, 0, 0, 0] = 8  # room for what the parts of the others go beyond
    for first, second in (("low", "high"), ("grey", "colour")):
        parts = [noise_part(noise, part) for part in (first, second)]
        assert all(part.dtype == torch.int8 and part.abs().max() <= 8 for part in parts)
        assert (parts[0].int() + parts[1] - noise).abs().max() <= 1
        products = (parts[0].double() * parts[1]).sum() / noise.double().square().sum()
        assert abs(products) < 0.02 and all(part.any() for part in parts)


def test_low_frequencies_are_waves_of_16_pixels_and_longer_and_grey_is_alike_in_all_channels():
    across = torch.arange(32.0)
    for period, low in ((32, True), (16, True), (32 / 3, False), (2, False)):
        wave = (8 * torch.cos(2 * torch.pi * across / period)).round().to(torch.int8).expand(1, 3, 32, 32)
        parts = [noise_part(wave, part) for part in ("low", "high")]
        assert (parts[not low] - wave).abs().max() <= 1 and parts[low].abs().max() <= 1
        assert torch.equal(noise_part(wave, "grey"), wave) and not noise_part(wave, "colour").any()
    patch = torch.tensor([6, 3, 0], dtype=torch.int8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert (noise_part(patch, "grey") == 3).all() and (noise_part(patch, "colour")[0, :, 0, 0].tolist() == [3, 0, -3])


def test_a_part_never_leaves_the_radius_of_the_noise():
    torch.manual_seed(0)
    noise = 8 * torch.randint(0, 2, (4, 3, 32, 32), dtype=torch.int8) - 4
    noise[:, :, :16] = 4  # its low part overshoots at the edge, and high is noise less low
    assert all(noise_part(noise, part).abs().max() == 4 for part in ("low", "high"))


def test_a_part_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="unknown part 'luma'; known are low, high, grey, colour"):
        noise_part(torch.ones(1, 3, 4, 4, dtype=torch.int8), "luma")


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


@pytest.mark.parametrize(
    ("n", "kind", "said"),
    [(9, "isomap", "did you mean umap"), (3, "pca", "4 vectors or more, got 3")],
)
def test_what_cannot_be_embedded_is_said(n, kind, said):
    with pytest.raises(ValueError, match=said):
        embed(np.zeros((n, 4)), kind)


@pytest.mark.skipif(find_spec("umap") is not None, reason="umap-learn is installed")
def test_a_missing_umap_is_named():
    with pytest.raises(ValueError, match="pip install umap-learn"):
        embed(np.zeros((9, 4)), "umap")
