"""The theory's figures: the border that is drawn is the rule's, and the lines are the accuracies of the rows."""

import numpy as np
import pytest

from semkit.analysis import figures
from semkit.lessons import mixtureplots
from semkit.lessons.mixtures import Mixture, accuracies, bayes_rule
from semkit.protections.cuda import class_filters


def test_the_border_is_where_the_rule_is_zero_and_the_ellipses_are_of_filtered_points():
    axes = figures.new_figure(5, 5).subplots()
    mixtureplots.draw_mixture(axes, 1.5, 0.1, 0.45)
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


def test_the_lines_are_the_accuracies_over_the_dimension_and_the_chosen_one_is_marked():
    axes = figures.new_figure(5, 4).subplots()
    rows = mixtureplots.mixture_rows(1, 0, 0.5, (2, 10))
    mixtureplots.draw_dimensions(axes, rows, at=10)
    drawn = {tuple(np.round(line.get_ydata(), 6)) for line in axes.lines if len(line.get_xdata()) == 2}
    for name in ("clean", "on_clean", "on_protected"):
        wanted = tuple(np.round([100 * accuracies(d, 1, 0, 0.5)[name] for d in (2, 10)], 6))
        assert wanted in drawn
    assert any(list(line.get_xdata()) == [10, 10] for line in axes.lines)


def test_a_figure_of_every_knob_is_drawn_within_its_time():
    figure = figures.mixture_figure(20, 1, 0, 0.5)
    assert [axes.get_title() for axes in figure.axes] == ["two dimensions", "and more of them"]
    assert "a = 0 and 0.5" in figure.get_suptitle()
    with pytest.raises(ValueError, match="a_plus must be in"):
        figures.mixture_figure(2, 1, 0, 0.6)


def test_filters_are_drawn_as_they_are():
    filters = class_filters("a private key", 3)
    figure = figures.filters_figure(filters, ["a", "b", "c"], title="filters")
    for axes, kernel in zip(figure.axes, filters.numpy(), strict=True):
        assert np.array_equal(axes.images[0].get_array(), np.rint(255 * kernel))
