"""Figures of rows: what they draw is what the rows say, and nothing overlaps."""

import numpy as np
import pandas as pd
import pytest
from drawn import bands, collisions, drawn_texts, error_bars, texts
from matplotlib.colors import to_hex
from photos import image_set

from semkit.analysis import figures
from semkit.analysis.designs import noise_sides, pairs
from semkit.analysis.statistics import Correlation, correlation, interval
from semkit.nets.lab import Lab
from semkit.protections.methods import RandomGrey

SIDES = "none", "random", "adversarial"


def learned(methods, radii=(0, 4), seeds=3):
    """Rows of a grid whose numbers all differ."""
    rng = np.random.default_rng(0)
    rows = []
    for m, method in enumerate(methods):
        for r in radii:
            for seed in range(seeds):
                curve = [[step, float(rng.uniform(0.1, 0.9))] for step in (10, 20, 40)]
                row = {"method": method, "training_radius": r, "seed": seed, "last": curve[-1][1], "curve": curve}
                rows.append({**row, "noise_passes": 0 if method == "clean" else 61_000 * (1 + 20 * m)})
    return rows


FOUR = learned(["clean", "em", "rem", "sem"], (0, 2, 4))
PAIRS = learned(pairs("demo", 32))
POINTS = [
    {"method": method, "seed": seed, "x": -i + 0.3 * seed, "y": (i - 4) ** 2 + seed}
    for i, method in enumerate(list(noise_sides("demo", 32))[1:])
    for seed in range(3)
]
FOUND = correlation([row["x"] for row in POINTS], [row["y"] for row in POINTS])
LOSSES = [
    {"method": m, "direction": d, "radius": r, "seed": s, "loss": 0.1 + r * (i + 1) * (d == "adversarial") + 0.01 * s}
    for i, m in enumerate(("em", "sem"))
    for d in ("random", "adversarial")
    for r in (0, 2, 8)
    for s in range(3)
]
NAMES = ["none", "jpeg", "grayscale", "purifier=external.safetensors"]
COUNTERED = [
    {"method": m, "countermeasure": c, "training_radius": r, "seed": s, "last": 0.1 + 0.1 * i + 0.05 * j + 0.02 * s}
    for i, m in enumerate(("clean", "em", "sem", "cuda"))
    for j, c in enumerate(NAMES)
    for r in (0, 4)
    for s in range(3)
]


PERTURBED = ["random", "generation-time", "another surrogate's", "evaluation-time"]
RISES = [
    {"method": m, "learner": w, "seed": s, "perturbation": p, "rise": 0.1 * i + 0.3 * j + 0.05 * s + 0.2 * k}
    for i, m in enumerate(list(pairs("demo", 32))[3::3])
    for k, w in enumerate(("AT 4/255, 100 steps", "AT 4/255, 600 steps"))
    for s in range(3)
    for j, p in enumerate(PERTURBED)
]


def scatter():
    labels = {"xlabel": "noise robustness (negative loss)", "ylabel": "protection (points)"}
    return figures.scatter_figure(POINTS, x="x", y="y", correlation=FOUND, title="Scatter", **labels)


def lines(**how):
    """Two methods over x = 1, 2, 4, two rows each; the second method has an estimate in its rows of x = 2."""
    rows = [{"method": m, "x": x, "y": x * (i + 1) + s} for i, m in enumerate("ab") for x in (1, 2, 4) for s in (0, 1)]
    rows[-3] |= {"guess": 6, "error": 4}
    rows[-4] |= {"guess": 4, "error": 3}
    return figures.lines_figure(rows, x="x", y="y", xlabel="x", ylabel="y", title="Lines", **how)


def protection():
    crafts = {"clean": None, "em": RandomGrey(8), "sem": RandomGrey(8, block=2)}
    return figures.sweep_figure(pd.DataFrame(FOUR).assign(preset="quick"), image_set(3, classes=3), crafts, Lab())


FIGURES = {
    "accuracy": lambda: figures.accuracy_figure(FOUR, chance=0.1, title="Accuracy"),
    "accuracy of pairs": lambda: figures.accuracy_figure(PAIRS, chance=0.1, title="Accuracy"),
    "scatter": scatter,
    "losses": lambda: figures.losses_figure(LOSSES, title="Losses"),
    "lines": lambda: lines(points=("guess", "error")),
    "protection": protection,
    "countermeasures": lambda: figures.countermeasures_figure(COUNTERED, chance=0.1, title="Countermeasures"),
    "rises": lambda: figures.rises_figure(RISES, title="Rises"),
    "progress": lambda: figures.progress_figure({0: 2.0, 50: 0.5}, {0: (0.1, 0.1), 50: (0.9, 0.2)}, 100),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_hides_another_or_leaves_the_figure(name):
    figure = FIGURES[name]()
    assert collisions(figure) == ([], []) and len(drawn_texts(figure)) >= 5
    assert figure.get_size_inches()[0] <= 14


@pytest.mark.parametrize("rows", [FOUR, pd.DataFrame(FOUR)], ids=["dicts", "table"])
def test_accuracies_are_means_with_students_intervals(rows):
    (axes,) = figures.accuracy_figure(rows, chance=0.1, title="t").axes
    assert texts(axes) == ["clean images", "EM", "REM", "SEM", "chance (10 %)"]
    for method, (means, ends) in zip(("clean", "em", "rem", "sem"), error_bars(axes, 4), strict=True):
        for place, radius in enumerate((0, 2, 4)):
            mine = [row["last"] for row in FOUR if (row["method"], row["training_radius"]) == (method, radius)]
            mean, low, high = 100 * np.array(interval(mine))
            assert means[place] == pytest.approx((radius, mean), abs=0.15)
            assert ends[place] == pytest.approx((low, high))
    assert "%" in axes.get_ylabel() and "levels of 255" in axes.get_xlabel()


def test_a_figure_of_a_method_that_no_row_has_says_so():
    rows = pd.DataFrame({"method": ["sem"], "training_radius": [0], "seed": [0], "last": [0.5]})
    with pytest.raises(ValueError, match="there are no rows to draw: look at the names"):
        figures.accuracy_figure(rows[rows["method"] == "SEM"], title="a name in capitals")


def test_one_seed_has_no_interval_and_one_method_is_enough():
    (axes,) = figures.accuracy_figure([row for row in FOUR if row["seed"] == 0], title="t").axes
    assert all(np.isnan(ends).all() and np.isfinite(means).all() for means, ends in error_bars(axes, 4))
    (axes,) = figures.accuracy_figure([row for row in FOUR if row["method"] == "em"], title="t").axes
    assert texts(axes) == ["EM"]


def test_a_scatter_shows_which_points_are_of_a_seed_and_which_of_a_method_and_says_the_correlation():
    (axes,) = scatter().axes
    methods = list(dict.fromkeys(row["method"] for row in POINTS))
    assert texts(axes) == ["seed", "0", "1", "2", "method", *methods]
    points = axes.collections[0]
    assert np.array(points.get_offsets()) == pytest.approx(np.array([(row["x"], row["y"]) for row in POINTS]))
    colours = {tuple(colour) for colour in points.get_facecolors()[::3]}
    assert len(colours) == 1 and len(np.unique(points.get_facecolors(), axis=0)) == 3  # one a seed
    given = Correlation((-0.5, -0.75, -0.25), (0.125, -0.1, 0.5), 27)
    (axes,) = figures.scatter_figure(POINTS, x="x", y="y", xlabel="a", ylabel="b", correlation=given, title="t").axes
    said = axes.texts[-1].get_text()
    assert said == "Pearson −0.50\n[−0.75, −0.25]\nSpearman 0.12\n[−0.10, 0.50]\nn = 27"


def test_a_scatter_has_a_line_a_seed_and_a_mean_a_method_with_both_intervals():
    (axes,) = scatter().axes
    lines = [line.get_xydata() for line in axes.lines if line.get_lw() == 0.8]
    for seed, found in enumerate(lines):
        mine = [(row["x"], row["y"]) for row in POINTS if row["seed"] == seed]
        slope, start = np.polyfit(*np.transpose(mine), 1)
        assert found[:, 1] == pytest.approx(start + slope * found[:, 0])
    assert len(lines) == 3 and len(axes.containers) == len(POINTS) // 3
    first = [(row["x"], row["y"]) for row in POINTS if row["method"] == "none 0"]
    (mean, low_x, high_x), (middle, low, high) = (interval(values) for values in zip(*first, strict=True))
    point, _, (across, up) = axes.containers[0]
    assert point.get_xydata()[0] == pytest.approx((mean, middle))
    assert across.get_segments()[0][:, 0] == pytest.approx((low_x, high_x))
    assert up.get_segments()[0][:, 1] == pytest.approx((low, high))


def test_a_scatter_of_rows_without_seeds_has_the_methods_own_colours():
    rows = [{"method": m, "x": i, "y": i} for i, m in enumerate(("em", "rem", "sem"))]
    (axes,) = figures.scatter_figure(rows, x="x", y="y", xlabel="a", ylabel="b", title="t").axes
    assert texts(axes) == ["EM", "REM", "SEM"]
    assert not axes.containers and not any(len(line.get_xdata()) for line in axes.lines)
    assert [to_hex(colour).upper() for colour in axes.collections[0].get_facecolors()] == [
        "#0072B2", "#009E73", "#D55E00",
    ]  # fmt: skip


def test_losses_are_solid_in_the_worst_case_and_dashed_along_random_directions():
    (axes,) = figures.losses_figure(LOSSES, title="t").axes
    assert texts(axes) == ["EM, worst case", "SEM, worst case", "EM, random", "SEM, random"]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
    em = [row["loss"] for row in LOSSES if (row["method"], row["direction"]) == ("em", "adversarial")]
    mean, low, high = interval(em[-3:])
    assert axes.lines[0].get_xydata()[-1] == pytest.approx((8, mean))
    assert bands(axes)[0][8] == pytest.approx((low, high))


def test_lines_are_means_in_bands_with_estimates_beside_them():
    (axes,) = lines().axes
    assert texts(axes) == ["a", "b"]
    assert axes.lines[1].get_xydata() == pytest.approx(np.array([(1, 2.5), (2, 4.5), (4, 8.5)]))
    _, low, high = interval([8, 9])
    assert bands(axes)[1][4] == pytest.approx((low, high))
    (axes,) = lines(points=("guess", "error"), log=True).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.get_xscale() == "log" and len(axes.containers) == 1
    point, _, (bar,) = axes.containers[0]
    assert point.get_xydata().tolist() == [[2, 5]]  # the standard error of the mean is hypot(3, 4) / 2
    assert bar.get_segments()[0][:, 1].tolist() == [0, 10] and point.get_color() == axes.lines[1].get_color()


def test_on_the_log_scale_mean_and_band_of_losses_are_geometric_and_stay_above_zero():
    losses = (0.001, 0.1, 0.02)  # whose plain interval reaches below zero
    rows = [{"method": "em", "direction": "random", "radius": r, "loss": loss * r} for loss in losses for r in (1, 2)]
    (axes,) = figures.losses_figure(rows, log=True, title="t").axes
    mean, low, high = np.exp(interval(np.log(losses)))
    assert axes.get_yscale() == "log" and interval(losses)[1] < 0 < low
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([(1, mean), (2, 2 * mean)]))
    assert bands(axes)[0][1] == pytest.approx((low, high), abs=1e-8)


def test_places_are_named_above_their_points():
    (axes,) = figures.lines_figure(
        [{"method": "a", "x": x, "y": x, "name": f"point {x}"} for x in (1, 10, 10)],
        x="x", y="y", xlabel="x", ylabel="y", log=True, names="name", title="t",
    ).axes  # fmt: skip
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("point 1", 1), ("point 10", 10)]


def test_every_countermeasure_has_its_line_and_every_method_its_point_there():
    erm, at = figures.countermeasures_figure(COUNTERED, title="Countermeasures").axes
    assert [label.get_text() for label in erm.get_yticklabels()] == ["none", "JPEG 10", "grey-scale", "purifier"]
    assert [axes.get_title() for axes in (erm, at)] == ["ERM", "AT 4/255"] and texts(at)[-1] == "CUDA"
    means, ends = error_bars(erm, 4, values=0)[2]  # sem
    told = "sem", "jpeg", 0
    found = [r["last"] for r in COUNTERED if (r["method"], r["countermeasure"], r["training_radius"]) == told]
    mean, low, high = interval(found)
    assert round(means[1, 1]) == 1 and means[1, 0] == pytest.approx(100 * mean)
    assert ends[1] == pytest.approx([100 * low, 100 * high])


def test_rises_are_means_with_intervals_a_panel_a_learner_and_a_line_a_perturbation():
    young, old = figures.rises_figure(RISES, title="Rises").axes
    assert [axes.get_title() for axes in (young, old)] == ["AT 4/255, 100 steps", "AT 4/255, 600 steps"]
    assert [label.get_text() for label in young.get_yticklabels()] == PERTURBED
    assert texts(old) == ["none/adversarial", "random/adversarial", "adversarial/adversarial", "no rise"]
    means, ends = error_bars(old, 3, values=0)[1]
    mean, low, high = interval([0.1 + 0.9 + 0.2 + 0.05 * seed for seed in range(3)])
    assert means[3, 0] == pytest.approx(mean) and ends[3] == pytest.approx([low, high])
