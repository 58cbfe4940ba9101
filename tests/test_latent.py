"""Latent models: accuracies against Monte-Carlo and integrals, the best rules against a general optimiser."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from semkit.lessons.latent import (
    LABELS,
    RATIOS,
    Latent,
    accuracy,
    best,
    gaps,
    latent_model,
    rule,
    sampled,
    trade_off,
)


@pytest.fixture(scope="module", params=LABELS)
def model(request):
    """Few dimensions and uneven factors, so that robustness costs accuracy."""
    W = np.random.default_rng(0).standard_normal((9, 4)) * (0.2, 0.5, 1, 2)
    return Latent(W, np.array([1.2, 0.7, 0.5, 0.3]), request.param)


def test_accuracy_is_monte_carlos(model):
    theta = np.random.default_rng(2).standard_normal(9) + 3 * rule(model, 0.1)
    for epsilon in (0, 0.2, 1, 3):
        share, error = sampled(model, theta, epsilon, samples=100_000, seed=3)
        assert abs(share - accuracy(model, theta, epsilon)) <= 3 * error
        assert abs(share - accuracy(model, theta, epsilon + 0.1)) > 3 * error  # the next radius would be seen


def test_the_attack_is_the_worst_of_its_length(model):
    """No common move of length epsilon does as much as the one against each image's label."""
    theta, rng = rule(model, 0.1), np.random.default_rng(0)
    x, y = model.draw(2000)
    moves = rng.standard_normal((50, 9))
    moves *= 0.7 / np.linalg.norm(moves, axis=1)[:, None]
    reached = min(((x + move) @ theta * y > 0).mean() for move in moves)
    worst = ((x - y[:, None] * 0.7 * theta / np.linalg.norm(theta)) @ theta * y > 0).mean()
    assert worst < reached < accuracy(model, theta) + 0.03


def test_probit_accuracy_is_an_integral_over_the_score():
    mu = np.array([1.5, -0.5, 1])
    made = Latent(np.random.default_rng(1).standard_normal((5, 3)), mu, "probit")
    theta = np.array([1, 0, 2, -1, 0.5])
    phi = made.W.T @ theta
    c = phi @ mu / np.linalg.norm(phi) / math.sqrt(1 + mu @ mu)  # correlation of the score and of what makes y
    assert accuracy(made, theta) == pytest.approx(0.5 + math.asin(c) / math.pi)
    r = 0.8 * np.linalg.norm(theta) / np.linalg.norm(phi)
    half, _ = integrate.quad(lambda u: stats.norm.pdf(u) * stats.norm.cdf(c * u / math.sqrt(1 - c * c)), r, 12)
    assert accuracy(made, theta, 0.8) == pytest.approx(2 * half, abs=1e-9)


def test_a_rules_length_does_not_matter_and_the_constant_answer_has_a_half(model):
    theta = rule(model, 0.3)
    assert accuracy(model, 7 * theta, 0.4) == pytest.approx(accuracy(model, theta, 0.4))
    assert accuracy(model, 0 * theta, 5) == 0.5
    share, error = sampled(model, 0 * theta, 5)
    assert abs(share - 0.5) <= 3 * error


def test_rules_are_ridge_solutions(model):
    for ridge in (0.01, 1, 50):
        direct = np.linalg.solve(model.W @ model.W.T + ridge * np.eye(9), model.W @ model.mu)
        assert np.allclose(rule(model, ridge), direct / np.linalg.norm(direct))
    direction = model.W.T @ rule(model, 0)
    assert np.allclose(direction / np.linalg.norm(direction), model.mu / np.linalg.norm(model.mu))


@pytest.mark.parametrize("epsilon", [0, 0.1, 0.3, 0.8])
def test_best_is_what_a_general_optimiser_finds(model, epsilon):
    theta, found = best(model, epsilon)
    assert found == pytest.approx(accuracy(model, theta, epsilon))
    starts = [*np.random.default_rng(0).standard_normal((6, 9)), theta]
    others = [optimize.minimize(lambda t: -accuracy(model, t, epsilon), start, method="BFGS").fun for start in starts]
    assert -min(others) == pytest.approx(found, abs=1e-6)
    if epsilon:
        assert found > accuracy(model, rule(model, 0), epsilon) + 1e-4  # the best standard rule is not the best one


def test_best_without_attack_is_the_bayes_rule():
    made = latent_model(20, 5, norm=1.5)
    assert best(made)[1] == pytest.approx(stats.norm.cdf(1.5))
    probit = replace(made, labels="probit")
    score = stats.norm(0, 1.5)
    bayes, _ = integrate.quad(lambda v: score.pdf(v) * stats.norm.cdf(abs(v)), -15, 15, points=[0])
    assert best(probit)[1] == pytest.approx(bayes)


def test_alike_factors_give_a_closed_form_and_no_trade_off():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 4)))
    made = Latent(2.5 * q, np.array([1, 1, 0, 0.5]))
    norm = np.linalg.norm(made.mu)
    for epsilon in (0.5, 2, 2.5 * norm - 0.01):
        assert best(made, epsilon)[1] == pytest.approx(stats.norm.cdf(norm - epsilon / 2.5))
    assert np.ptp(trade_off(made, 1)["standard"]) < 1e-12


def test_where_the_attack_reaches_across_the_means_only_a_constant_answer_is_left():
    made = latent_model(12, 4, norm=1)
    reach = np.linalg.norm(made.W @ made.mu)
    theta, found = best(made, 0.99 * reach)
    assert found > 0.5 and theta.any()
    theta, found = best(made, 1.01 * reach)
    assert found == 0.5 and not theta.any()


def test_the_trade_off_runs_from_the_best_standard_rule_past_the_best_robust_one(model):
    rows = trade_off(model, 0.3)
    standard, robust = (rows[name].to_numpy() for name in ("standard", "robust"))
    assert standard[0] == pytest.approx(best(model)[1]) and (np.diff(standard) <= 1e-12).all()
    top = robust.argmax()
    assert 0 < top < len(rows) - 1 and robust[top] == pytest.approx(best(model, 0.3)[1], abs=1e-3)
    assert (np.diff(robust[: top + 1]) >= 0).all() and robust[0] < robust[top] - 1e-3
    for row in rows[::10].to_dict("records"):
        theta = rule(model, row["ridge"])
        assert row["standard"] == pytest.approx(accuracy(model, theta))
        assert row["robust"] == pytest.approx(accuracy(model, theta, 0.3))
    rng = np.random.default_rng(0)  # no rule lies beyond the curve
    for theta in rng.standard_normal((300, 9)) * 0.3 + [rule(model, r) for r in rng.choice([0.01, 0.1, 1, 10], 300)]:
        a, b = accuracy(model, theta), accuracy(model, theta, 0.3)
        assert b <= np.interp(a, standard[: top + 1][::-1], robust[: top + 1][::-1]) + 2e-3


@pytest.mark.parametrize("labels", LABELS)
def test_the_gap_falls_with_the_latent_dimension_and_monte_carlo_agrees(labels):
    rows = gaps(256, 0.5, labels=labels, samples=4000)
    found = list(rows["gap"])
    assert list(rows["ratio"]) == list(RATIOS) == [1, 1 / 4, 1 / 16, 1 / 64]
    assert sorted(found, reverse=True) == found and found[-1] < found[0] / 8
    assert np.ptp(rows["standard"]) < 1e-9
    for row in rows.to_dict("records"):
        assert row["gap"] == row["standard"] - row["robust"] and row["robust"] <= row["cautious"] <= row["standard"]
        for name in ("standard", "robust", "cautious", "gap"):
            assert abs(row[f"{name}_sampled"] - row[name]) <= 3 * row[f"{name}_error"]


def test_without_growing_factors_the_gap_stays():
    kept = stats.norm.cdf(2) - stats.norm.cdf(1.5)
    rows = {c: gaps(512, 0.5, ratios=[1 / 64], contrast=c).iloc[0] for c in ("pixel", "factor")}
    assert rows["factor"]["gap"] == pytest.approx(kept, rel=0.15) and rows["pixel"]["gap"] < kept / 5


def test_contrast_is_what_is_held_fixed():
    for k in (4, 64):
        x, y = latent_model(256, k).draw(3000)
        within = x - np.where(y[:, None] > 0, x[y > 0].mean(0), x[y < 0].mean(0))
        assert within.var() == pytest.approx(1, rel=0.1)
        lengths = np.linalg.norm(latent_model(256, k, contrast="factor").W, axis=0)
        assert lengths == pytest.approx(1, abs=0.25) and lengths.mean() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: latent_model(8, 0), "the latent dimension k must be a whole number >= 1, got 0"),
        (lambda: latent_model(0, 1), "the dimension d must be a whole number >= 1, got 0"),
        (lambda: latent_model(4, 5), "1 <= k <= d"),
        (lambda: gaps(10, 0.5), "the latent dimension k must be a whole number >= 1, got 2.5"),
        (lambda: gaps(8, 0.5, ratios=[1 / 4], samples=1.5), "samples must be a whole number >= 1, got 1.5"),
        (lambda: latent_model(4, 2, norm=0), "norm must be a finite number > 0, got 0"),
        (lambda: latent_model(4, 2, contrast="eye"), "unknown contrast 'eye'; known are pixel, factor"),
        (lambda: latent_model(4, 2, labels="logit"), "unknown labels 'logit'; known are mixture, probit"),
        (lambda: Latent(np.eye(3), np.zeros(3)), "mu must not be 0"),
        (lambda: best(Latent(np.ones((3, 2)), np.ones(2))), "W must have full rank"),
        (lambda: best(latent_model(4, 2), -1), "epsilon must be a finite number >= 0, got -1"),
        (lambda: accuracy(Latent(np.eye(3)[:, :2], np.ones(2)), np.eye(3)[2]), "theta'x is 0 for every x"),
    ],
)
def test_what_has_no_meaning_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
