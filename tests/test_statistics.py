"""Intervals, decisions, correlation and protection against scipy, least squares and numbers by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from semkit.analysis.report import read_rows
from semkit.analysis.statistics import (
    attenuated,
    blocked_difference,
    correlation,
    decide,
    interval,
    paired,
    power,
    protection,
    protection_for_passes,
    reliability,
    verdict,
)


def test_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 4.0])
    low_, high_ = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1, 2, 4]))
    assert (mean, low, high) == pytest.approx((7 / 3, low_, high_))


@pytest.mark.parametrize("values", [[], [[1, 2], [3, 4]]], ids=["none", "a table"])
def test_an_interval_of_nothing_or_of_a_table_is_none(values):
    with pytest.raises(ValueError, match="an interval is of one value or more, one for each seed"):
        interval(values)


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
    low, high = stats.t.interval(0.95, values.size - rank, loc=weights @ beta, scale=error)
    assert blocked_difference(values, more, less) == pytest.approx((weights @ beta, low, high))


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


def test_f_of_a_design_with_one_seed_as_block_is_the_squared_paired_t():
    values = simulated(5, 2, effect=1)
    values[:, 0] += 1
    (f, p, _), paired = reliability(values), stats.ttest_rel(values[:, 0], values[:, 1])
    assert (f, p) == pytest.approx((paired.statistic**2, paired.pvalue))


def test_reliability_is_cronbachs_alpha_of_the_seeds():
    values = simulated(4, 6) + np.arange(6)
    seeds = values.T  # columns of the seeds are the items of a questionnaire
    alpha = 4 / 3 * (1 - seeds.var(0, ddof=1).sum() / seeds.sum(1).var(ddof=1))
    assert reliability(values)[2] == pytest.approx(alpha)


def test_treatments_that_do_not_differ_have_no_reliability_however_many_seeds():
    assert reliability([[1, 2], [2, 1]]) == (0, 1, 0)
    assert reliability([[1, 2, 4], [2, 3, 5]]) == (float("inf"), 0, 1)


def test_measured_with_scatter_a_correlation_shrinks_as_the_formula_says():
    rng, n = np.random.default_rng(0), 200_000
    x = rng.normal(size=n)
    y = -0.8 * x + 0.6 * rng.normal(size=n)  # true correlation -0.8
    x_, y_ = x + rng.normal(size=n), y + 0.5 * rng.normal(size=n)  # reliabilities 1 / 2 and 1 / 1.25
    assert attenuated(-0.8, (1 / 2, 1 / 1.25)) == pytest.approx(np.corrcoef(x_, y_)[0, 1], abs=0.01)


@pytest.mark.parametrize(("true", "reliabilities"), [(-0.9, (1, 1)), (0.6, (0.9, 0.5)), (-1, (0.25, 0.29))])
def test_power_is_how_often_simulated_designs_find_the_correlation(true, reliabilities):
    rng, r = np.random.default_rng(0), attenuated(true, reliabilities)
    x, e = rng.normal(size=(2, 2000, 8))
    y = r * x + np.sqrt(1 - r * r) * e
    found = stats.pearsonr(x, y, axis=1)
    share = np.mean((found.pvalue < 0.05) & (found.statistic * true > 0))
    assert power(true, 8, reliabilities) == pytest.approx(share, abs=0.04)  # Fisher's approximation
    with pytest.raises(ValueError, match="4 pairs or more, got 3"):
        power(true, 3)


def test_the_eight_noise_sides_do_not_differ_in_protection_but_do_in_what_a_reference_sees():
    folder = Path(__file__).parents[1] / "results/shapes-noise-sides"
    learners, noises = read_rows(folder / "rows.csv"), read_rows(folder / "noise.csv")
    of_protection = paired(noises, learners, 4).pivot(index="seed", columns="method", values="protection")
    of_reference = noises.pivot(index="seed", columns="method", values="reference_robustness")
    (_, p, of_mean), (_, p_reference, of_mean_reference) = map(reliability, (of_protection, of_reference))
    assert p > 0.05 > p_reference and of_mean < 0.5 < 0.9 < of_mean_reference


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


def rows(method, radius, values):
    return [{"method": method, "training_radius": radius, "seed": s, "last": v} for s, v in enumerate(values)]


def test_protection_pairs_the_seeds():
    made = rows("clean", 4, [0.5, 0.6, 0.7]) + rows("sem", 4, [0.2, 0.4]) + rows("sem", 0, [0.0, 0.0])
    for given in (made, made[::-1], pd.DataFrame(made)):
        assert protection(given, "sem", 4).to_dict() == pytest.approx({0: 0.3, 1: 0.2})
    assert protection(made, "sem", 8).empty and protection(made, "rem", 4).empty


def test_protection_under_several_learners_at_one_radius_is_refused_and_of_each_alone_is_given():
    defences = read_rows(Path(__file__).parents[1] / "results" / "cuda" / "defences.csv")
    with pytest.raises(ValueError, match=r"radius 0 .random blur, none; smoothing, .*: pass those of one learner"):
        protection(defences, "cuda .3", 0)
    blur = defences[defences["learner"] == "random blur"]
    assert list(protection(blur, "cuda .3", 0)) == pytest.approx([0.2045, 0.2405, 0.208])
    filtered = pd.concat([blur.assign(countermeasure=name) for name in ("none", "jpeg")])
    with pytest.raises(ValueError, match="random blur, none; random blur, jpeg"):
        protection(filtered, "cuda .3", 0)
    with pytest.raises(ValueError, match="the same seed"):
        protection(pd.concat([blur, blur]), "cuda .3", 0)
    other = defences.query("(method == 'clean') != (learner == 'random blur')").query("training_radius == 0")
    with pytest.raises(ValueError, match="one learner"):  # clean images by one learner, filtered ones by another
        protection(other[other["learner"].isin(["random blur", "smoothing"])], "cuda .3", 0)


def test_rows_without_a_name_for_the_learner_are_of_one():
    made = [{**row, "learner": None} for row in rows("clean", 4, [0.5]) + rows("sem", 4, [0.2])]
    assert list(protection(made, "sem", 4)) == pytest.approx([0.3])


def test_what_protection_costs_is_told_by_noise_and_paired_by_seed():
    made = (
        rows("clean", 4, [0.5, 0.6]) + rows("sem", 4, [0.2, 0.4, 0.1]) + rows("sem", 0, [0.1]) + rows("clean", 0, [0.9])
    )
    made = [{**row, "noise_passes": 0 if row["method"] == "clean" else 300 + row["seed"]} for row in made]
    first, second = protection_for_passes(made[::-1], 100).to_dict("records")
    assert first == pytest.approx({"method": "sem", "seed": 0, "passes": 3, "AT 4/255": 30, "ERM": 80})
    assert np.isnan(second.pop("ERM")) and second == pytest.approx(
        {"method": "sem", "seed": 1, "passes": 3.01, "AT 4/255": 20}
    )


def test_budgets_keep_the_order_that_they_were_run_in():
    made = [row for method in ("clean", "sem", "em", "rem") for row in rows(method, 4, [0.5, 0.25])]
    found = protection_for_passes([{**row, "noise_passes": 1} for row in made], 1)
    assert list(found["method"].unique()) == ["sem", "em", "rem"]


def test_noises_are_joined_with_their_learners_by_method_and_seed():
    noises = pd.DataFrame({"method": m, "seed": s, "noise_stability": -s} for s in (0, 1, 2) for m in ("sem", "em"))
    learners = rows("clean", 4, [0.5, 0.6]) + rows("sem", 4, [0.2, 0.4, 0.1]) + rows("em", 4, [0.45])
    learners += rows("em", 0, [0.1, 0.1, 0.1])  # of another training radius
    found = paired(noises, learners[::-1], 4)
    names = ["method", "seed", "noise_stability"]
    assert found[names].values.tolist() == [["sem", 0, 0], ["em", 0, 0], ["sem", 1, -1]]
    assert list(found["protection"]) == pytest.approx([0.3, 0.05, 0.2])
    assert list(found.query("method == 'sem'")["protection"]) == list(protection(learners, "sem", 4))
    assert "protection" not in noises and paired(noises, learners, 8).empty


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


@pytest.mark.parametrize(
    ("x", "y"),
    [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, np.nan], [1, 2, 3, 4]),
     ([1, 2, 3, 4], [1, 2, 3, np.inf])],
)  # fmt: skip
def test_a_correlation_of_too_little_or_of_missing_values_is_refused(x, y):
    with pytest.raises(ValueError, match="a correlation needs"):
        correlation(x, y)
