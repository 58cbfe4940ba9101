"""Robustness, stability, protection and correlation against closed forms and plain loops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import image_set
from scipy import stats
from torch import nn

from semkit.analysis.measure import (
    blocked_difference,
    correlation,
    cosine,
    decide,
    interval,
    losses,
    losses_along,
    paired,
    protection,
    protection_for_passes,
    robustness,
    stability,
    verdict,
)
from semkit.analysis.report import read_rows
from semkit.images.augment import FlipCrop, Identity
from semkit.images.pixels import LEVEL
from semkit.lessons.transform import survived
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


def test_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 4.0])
    low_, high_ = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1, 2, 4]))
    assert (mean, low, high) == pytest.approx((7 / 3, low_, high_))


def simulated(seeds=4, columns=6, *, seed=0, effect=0.0):
    """[seeds, columns] of seed + column + noise; columns 0 and 1 are raised by `effect` above the others."""
    rng = np.random.default_rng(seed)
    made = rng.normal(0, 5, (seeds, 1)) + rng.normal(0, 1, (seeds, columns))
    made[:, :2] += effect
    return made


def test_a_blocked_difference_is_least_squares_with_a_column_for_every_seed_and_treatment():
    values, more, less = simulated(effect=2), [0, 1], [2, 4, 5]
    seed, column = np.indices(values.shape).reshape(2, -1)
    design = np.hstack([np.eye(4)[seed], np.eye(6)[column][:, 1:]])  # the first treatment is in the seeds' columns
    beta, (rest,), rank, _ = np.linalg.lstsq(design, values.ravel(), rcond=None)
    weights = np.zeros(6)
    weights[more], weights[less] = 1 / 2, -1 / 3
    weights = np.concatenate([np.zeros(4), weights[1:]])
    error = np.sqrt(rest / (values.size - rank) * weights @ np.linalg.inv(design.T @ design) @ weights)
    low, high = stats.t.interval(0.9, values.size - rank, loc=weights @ beta, scale=error)
    assert blocked_difference(values, more, less, 0.9) == pytest.approx((weights @ beta, low, high))


def test_of_two_treatments_it_is_the_paired_t_interval():
    values = simulated(5, 2, effect=1)
    found = stats.ttest_rel(values[:, 1], values[:, 0]).confidence_interval(0.95)
    assert blocked_difference(values, [1], [0]) == pytest.approx(interval(values[:, 1] - values[:, 0]))
    assert blocked_difference(values, [1], [0])[1:] == pytest.approx((found.low, found.high))


def test_95_of_100_blocked_intervals_hold_the_effect_and_blocks_shorten_them():
    held = [low <= 2 <= high for _, low, high in (
        blocked_difference(simulated(3, 4, seed=s, effect=2), [0, 1], [2, 3]) for s in range(1000))]  # fmt: skip
    assert 0.93 <= np.mean(held) <= 0.97
    values = simulated(effect=2)
    shuffled = np.random.default_rng(0).permuted(values, axis=0)  # a seed's values no longer share a line
    width = lambda v: np.diff(blocked_difference(v, [0, 1], [2, 3])[1:])[0]  # noqa: E731
    assert width(shuffled) > 2 * width(values)


@pytest.mark.parametrize(("values", "more", "less", "says"), [
    ([[1, 2]], [0], [1], "2 or more of each"), ([1, 2], [0], [1], "seeds, treatments"),
    ([[1, 2], [3, 4]], [0, 1], [1], "different columns"), ([[1, 2], [3, 4]], [], [1], "different columns"),
])  # fmt: skip
def test_a_blocked_difference_of_nothing_is_refused(values, more, less, says):
    with pytest.raises(ValueError, match=says):
        blocked_difference(values, more, less)


DECISIONS = [
    (0.1, 2, "> 0", "supported"), (-1, 2, "> 0", "undecided"), (-2, -1, "> 0", "contradicted"),
    (0, 2, "> 0", "undecided"), (-2, 0, "> 0", "contradicted"), (-4.4, 6.9, "< 1.5", "undecided"),
    (-4, 1.4, "< 1.5", "supported"), (1.5, 3, "< 1.5", "contradicted"), (-3, -2.5, "> -2", "contradicted"),
    (float("nan"), float("nan"), "> 0", "undecided"), (0.65, 0.65, "< 1", "supported"),
]  # fmt: skip


def wrong_decisions(rule):
    return [case for case in DECISIONS if rule(*case[:3]) != case[3]]


def test_a_claim_is_supported_only_if_the_whole_interval_is_on_its_side():
    assert wrong_decisions(decide) == []


def test_a_rule_by_the_mean_or_without_the_third_outcome_is_rejected():
    def by_the_mean(low, high, margin):
        return decide((low + high) / 2, (low + high) / 2, margin)

    def without_undecided(low, high, margin):
        return decide(low, high, margin).replace("undecided", "contradicted")

    assert (-4.4, 6.9, "< 1.5", "undecided") in wrong_decisions(by_the_mean)
    assert wrong_decisions(without_undecided)


@pytest.mark.parametrize("margin", ["", "0", ">0", ">= 0", "> much", "> nan", "< inf"])
def test_a_margin_that_cannot_be_read_is_refused(margin):
    with pytest.raises(ValueError, match="a margin is written"):
        decide(0, 1, margin)


def test_a_verdict_is_the_decision_of_the_interval():
    assert verdict([5.6, 5.8, 5.7]) == "supported" and verdict([5.6, 5.8, -1.0]) == "undecided"
    assert verdict([5.6, 5.8, 5.7], "< 1.5") == "contradicted" and verdict([9.0]) == "undecided"


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
    loss = {(row["direction"], row["radius"]): row["loss"] for row in rows}
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


def rows(method, radius, values):
    return [{"method": method, "training_radius": radius, "seed": s, "last": v} for s, v in enumerate(values)]


def test_protection_pairs_the_seeds():
    made = rows("clean", 4, [0.5, 0.6, 0.7]) + rows("sem", 4, [0.2, 0.4]) + rows("sem", 0, [0.0, 0.0])
    assert protection(made, "sem", 4) == pytest.approx([0.3, 0.2])
    assert protection(made[::-1], "sem", 4) == pytest.approx([0.3, 0.2])


def test_protection_under_several_learners_at_one_radius_is_refused_and_of_each_alone_is_given():
    defences = read_rows(Path(__file__).parents[1] / "results" / "cuda" / "defences.csv")
    with pytest.raises(ValueError, match=r"clean at training radius 0 .random blur, none; smoothing, "):
        protection(defences, "cuda .3", 0)
    blur = [row for row in defences if row["learner"] == "random blur"]
    assert protection(blur, "cuda .3", 0) == pytest.approx([0.2045, 0.2405, 0.208])
    filtered = [{**row, "countermeasure": name} for row in blur for name in ("none", "jpeg")]
    with pytest.raises(ValueError, match="random blur, none; random blur, jpeg"):
        protection(filtered, "cuda .3", 0)


def test_what_protection_costs_is_told_by_noise_and_paired_by_seed():
    made = (
        rows("clean", 4, [0.5, 0.6]) + rows("sem", 4, [0.2, 0.4, 0.1]) + rows("sem", 0, [0.1]) + rows("clean", 0, [0.9])
    )
    made = [{**row, "noise_passes": 0 if row["method"] == "clean" else 300 + row["seed"]} for row in made]
    first, second = protection_for_passes(made[::-1], 100)
    assert first == pytest.approx({"method": "sem", "seed": 0, "passes": 3, "AT 4/255": 30, "ERM": 80})
    assert second == pytest.approx({"method": "sem", "seed": 1, "passes": 3.01, "AT 4/255": 20})


def test_noises_are_joined_with_their_learners_by_method_and_seed():
    noises = [{"method": m, "seed": s, "noise_stability": -s} for s in (0, 1, 2) for m in ("sem", "em")]
    learners = rows("clean", 4, [0.5, 0.6]) + rows("sem", 4, [0.2, 0.4, 0.1]) + rows("em", 4, [0.45])
    learners += rows("em", 0, [0.1, 0.1, 0.1])  # of another training radius
    found = paired(noises, learners[::-1], 4)
    assert [(row["method"], row["seed"], row["noise_stability"]) for row in found] == [
        ("sem", 0, 0), ("em", 0, 0), ("sem", 1, -1)
    ]  # fmt: skip
    assert [row["protection"] for row in found] == pytest.approx([0.3, 0.05, 0.2])
    assert [row["protection"] for row in found if row["method"] == "sem"] == protection(learners, "sem", 4)
    assert "protection" not in noises[0] and paired(noises, learners, 8) == []


def test_correlation_agrees_with_scipy_and_its_interval_with_fishers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = -0.6 * x + 0.8 * rng.normal(size=200)
    found = correlation(x, y)
    assert found.n == 200 and found.pearson[0] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman[0] == pytest.approx(stats.spearmanr(x, y).statistic)
    fisher = stats.pearsonr(x, y).confidence_interval(0.95)
    assert found.pearson[1:] == pytest.approx((fisher.low, fisher.high), abs=0.03)
    assert correlation(x, x**3).spearman == pytest.approx((1, 1, 1)) and correlation(x, x**3).pearson[0] < 1


@pytest.mark.parametrize(("x", "y"), [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4])])
def test_a_correlation_of_too_little_is_refused(x, y):
    with pytest.raises(ValueError, match="a correlation needs"):
        correlation(x, y)


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
