"""The Bayes rule of convolved Gaussians and its accuracy; oracles are densities, matrices, known laws, Monte-Carlo."""

import math

import numpy as np
import pytest
from drawn import collisions
from scipy import integrate, stats

from semkit.lessons.mixtures import (
    DIMENSIONS,
    Mixture,
    accuracies,
    accuracy,
    bayes_rule,
    decide,
    filters_figure,
    mixture_figure,
    probability_positive,
    sampled,
)
from semkit.protections.cuda import class_filters

# d, norm, a_minus, a_plus -> clean, on_clean, on_protected, from 200,000 samples and to three digits
VECTORS = {
    (10, 1, 0.1, 0.1): (0.841, 0.842, 0.842),
    (2, 1, 0, 0.5): (0.841, 0.780, 0.864),
    (10, 1, 0, 0.5): (0.841, 0.510, 0.992),
    (10, 2.5, 0.1, 0.45): (0.994, 0.646, 0.998),
    (10, 5, 0.1, 0.45): (1.000, 0.852, 1.000),
    (50, 5, 0, 0.5): (1.000, 0.501, 1.000),
}
NAMES = ("clean", "on_clean", "on_protected")


def banded(d, a):
    return np.eye(d) + a * (np.eye(d, k=1) + np.eye(d, k=-1))


def test_protecting_is_multiplying_by_the_matrix_of_the_class():
    mixture = Mixture(6, 2, 0.15, 0.4)
    x, y = mixture.draw(40)
    matrices = {1: banded(6, 0.4), -1: banded(6, 0.15)}
    assert all((mixture.matrix(y) == matrices[y]).all() for y in matrices)
    assert np.allclose(mixture.protect(x, y), [matrices[label] @ point for label, point in zip(y, x, strict=True)])


@pytest.mark.parametrize(("d", "norm", "a_minus", "a_plus"), VECTORS)
def test_the_rule_is_twice_the_log_likelihood_ratio(d, norm, a_minus, a_plus):
    mixture = Mixture(d, norm, a_minus, a_plus)
    x = mixture.protect(*mixture.draw(50, seed=1))
    log = {}
    for y, a in ((1, a_plus), (-1, a_minus)):
        matrix = banded(d, a)
        log[y] = stats.multivariate_normal(y * matrix @ mixture.mu, matrix @ matrix).logpdf(x)
    a, b, c = bayes_rule(mixture)
    score = ((x @ a) * x).sum(1) + x @ b + c
    assert np.allclose(score, 2 * (log[1] - log[-1]), rtol=1e-6, atol=1e-6)
    assert np.array_equal(decide((a, b, c), x), np.where(log[1] > log[-1], 1, -1))


def test_positive_is_a_known_law_where_there_is_one():
    w, shift = np.full(5, 0.7), np.array([0.3, -1, 0, 2, 0.5])
    noncentral = stats.ncx2(5, shift @ shift)  # 0.7 sum (z + shift)^2
    for level in (0.5, 4, 9, 30):
        constant = 0.7 * shift @ shift - 0.7 * level
        assert probability_positive(w, 1.4 * shift, constant) == pytest.approx(noncentral.sf(level), abs=1e-9)
        assert probability_positive(-w, -1.4 * shift, -constant) == pytest.approx(noncentral.cdf(level), abs=1e-9)
    for mean in (-6, -0.3, 0, 2, 300):
        linear = np.array([0, 3, 4.0])
        assert probability_positive(np.zeros(3), linear, mean) == pytest.approx(stats.norm.cdf(mean / 5), abs=1e-9)
    difference = probability_positive(np.array([1.0, -2.0]), np.zeros(2), 0)  # z1^2 > 2 z2^2
    assert difference == pytest.approx(2 / math.pi * math.atan(1 / math.sqrt(2)), abs=1e-9)


@pytest.mark.parametrize("constant", [-8, -1, 0, 0.7, 5])
def test_positive_in_two_dimensions_is_an_integral_over_one(constant):
    w, linear = np.array([0.6, -3.0]), np.array([1.5, 2.0])

    def given(z):  # -3 u^2 + 2 u + rest > 0 between its roots
        rest = 0.6 * z * z + 1.5 * z + constant
        root = math.sqrt(max(0, 4 + 12 * rest))
        return stats.norm.pdf(z) * (stats.norm.cdf((2 + root) / 6) - stats.norm.cdf((2 - root) / 6))

    edges = [z.real for z in np.roots([0.6, 1.5, constant + 1 / 3]) if abs(z.imag) < 1e-9]
    whole, _ = integrate.quad(given, -9, 9, points=edges or None, epsabs=1e-11, limit=400)
    assert probability_positive(w, linear, constant) == pytest.approx(whole, abs=1e-8)


def test_a_tie_counts_half_and_a_certainty_fully():
    nothing = np.zeros(3)
    assert [probability_positive(nothing, nothing, c) for c in (-1, 0, 1)] == [0, 0.5, 1]


@pytest.mark.parametrize("vector", VECTORS)
def test_closed_form_table_and_monte_carlo_agree_within_3_standard_errors(vector):
    row = accuracies(*vector, samples=50_000, seed=3)
    for name, known in zip(NAMES, VECTORS[vector], strict=True):
        exact = row[name]
        assert abs(row[f"{name}_sampled"] - exact) <= 3 * row[f"{name}_error"]
        assert abs(known - exact) <= 3 * math.sqrt(exact * (1 - exact) / 200_000) + 0.0005


def test_that_agreement_would_see_a_wrong_rule():
    right, wrong = Mixture(10, 1, 0, 0.5), Mixture(10, 1, 0.5, 0)  # the filters swapped
    x, y = right.draw(20_000)
    share = (decide(bayes_rule(wrong), right.protect(x, y)) == y).mean()
    assert accuracy(right, protected=True) - share > 3 * 0.01
    assert abs((decide(bayes_rule(right), right.protect(x, y)) == y).mean() - accuracy(right, protected=True)) < 0.003


def test_classes_filtered_alike_lose_nothing_and_swapped_signs_change_nothing():
    row = accuracies(10, 1.5, 0.3, 0.3)
    assert row["on_protected"] == pytest.approx(row["clean"], abs=1e-9) and row["clean"] - 0.05 < row["on_clean"]
    assert row["on_clean"] < row["clean"]
    one, other = accuracies(9, 1.5, 0.1, 0.4), accuracies(9, 1.5, 0.4, 0.1)
    assert [one[name] for name in NAMES] == pytest.approx([other[name] for name in NAMES], abs=1e-9)
    assert accuracies(1, 1, 0, 0.5)["on_clean"] == pytest.approx(stats.norm.cdf(1), abs=1e-9)


def test_two_dimensions_undersell_what_many_do():
    lost = [(row := accuracies(d, 1, 0, 0.5))["clean"] - row["on_clean"] for d in (2, 5, 10, 20)]
    assert sorted(lost) == lost and lost[0] < 0.07 < 0.34 < lost[-1]


def test_the_bayes_rule_is_the_best_on_protected_data():
    mixture = Mixture(4, 1, 0.05, 0.4)
    x, y = mixture.draw(40_000, seed=2)
    x, (a, b, c) = mixture.protect(x, y), bayes_rule(mixture)
    share = lambda *rule: (decide(rule, x) == y).mean()  # noqa: E731
    best = share(a, b, c)
    assert best > max(share(0 * a, b, 0), share(a, 0 * b, c), share(a, b, c + 1), share(a, -b, c), share(1.5 * a, b, c))


def test_a_seed_repeats_and_batches_do_not_matter_to_the_count():
    mixture = Mixture(3, 1, 0, 0.5)
    assert sampled(mixture, 1000, seed=1) == sampled(mixture, 1000, seed=1) != sampled(mixture, 1000, seed=2)
    assert sampled(Mixture(1, 40, 0, 0), 7)["clean"] == (1, pytest.approx(math.sqrt(8 / 9 * 1 / 9 / 7)))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ((0, 1, 0, 0.5), "the dimension d must be a whole number >= 1, got 0"),
        ((2.5, 1, 0, 0.5), "the dimension d must be"),
        ((2, 1, -0.1, 0.5), r"a_minus must be in \[0, 0.5\], got -0.1"),
        ((2, 1, 0, 0.51), r"a_plus must be in \[0, 0.5\], got 0.51"),
        ((2, 1, 0, math.nan), r"a_plus must be in \[0, 0.5\], got nan"),
        ((2, -1, 0, 0.5), "norm must be a finite number >= 0, got -1"),
    ],
)
def test_what_has_no_meaning_is_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        accuracies(*wrong)


# --- figures


def test_the_border_is_where_the_rule_is_zero_and_the_ellipses_are_of_filtered_points():
    axes = mixture_figure(10, 1.5, 0.1, 0.45).axes[0]
    mixture = Mixture(2, 1.5, 0.1, 0.45)
    (border,) = axes.collections
    points = np.concatenate([path.vertices for path in border.get_paths()])
    a, b, c = bayes_rule(mixture)
    score = ((points @ a) * points).sum(1) + points @ b + c
    assert len(points) > 50 and np.abs(score).max() < 0.05 < np.abs(score + 0.5).min()
    ellipses = {line.get_label(): line.get_xydata() for line in axes.lines if "s.d." in str(line.get_label())}
    assert len(ellipses) == 2
    x, y = mixture.draw(4000, seed=1)
    filtered = mixture.protect(x, y)[y == 1]
    (drawn,) = (points for label, points in ellipses.items() if "+1" in label)
    assert np.allclose(drawn[:-1].mean(0), filtered.mean(0), atol=0.1)
    assert np.allclose(np.ptp(drawn, axis=0), 4 * filtered.std(0), rtol=0.05)


@pytest.mark.whole
def test_the_lines_are_the_accuracies_over_the_dimension_and_the_chosen_one_is_marked():
    figure = mixture_figure(10, 1, 0, 0.5)
    drawn = {tuple(np.round(line.get_ydata(), 6)) for line in figure.axes[1].lines}
    for name in NAMES:
        assert tuple(np.round([100 * accuracies(d, 1, 0, 0.5)[name] for d in DIMENSIONS], 6)) in drawn
    assert any(list(line.get_xdata()) == [10, 10] for line in figure.axes[1].lines)
    assert [axes.get_title() for axes in figure.axes] == ["two dimensions", "more dimensions"]
    assert collisions(figure)[1] == [] and "a = 0 and 0.5" in figure.get_suptitle()
    with pytest.raises(ValueError, match="a_plus must be in"):
        mixture_figure(2, 1, 0, 0.6)


def test_filters_are_drawn_as_they_are():
    filters = class_filters("a private key", 3)
    figure = filters_figure(filters, ["a", "b", "c"], title="filters")
    for axes, kernel in zip(figure.axes, filters.numpy(), strict=True):
        assert np.array_equal(axes.images[0].get_array(), np.rint(255 * kernel))
