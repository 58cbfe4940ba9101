"""Figures: what they draw is what the rows and tensors say, and nothing overlaps."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from photos import image_set

from semkit.analysis import figures
from semkit.analysis.designs import noise_sides, pairs
from semkit.analysis.measure import Correlation, correlation, interval
from semkit.analysis.patterns import class_means, radial_spectrum
from semkit.analysis.plots import grid_cells, noise_side, styles

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
PRUNED = [
    {"method": m, "seed": s, "sparsity": share, "clean": 0.6 - 0.1 * share + 0.01 * s, "untuned": 0.6 - 0.5 * share}
    | {"robust": 0.3 - 0.1 * i * share + 0.02 * s}
    for i, m in enumerate(("PGD training", "RSR"))
    for share in (0, 0.5, 0.85, 0.95)
    for s in range(3)
]
SIZES = {"plain": torch.linspace(-0.1, 0.1, 200), "lasso": torch.linspace(-0.1, 0.1, 200) ** 3}
GENERATOR = torch.Generator().manual_seed(0)
NOISES = {m: torch.randint(-8, 9, (12, 3, 8, 8), dtype=torch.int8, generator=GENERATOR) for m in ("em", "sem")}
IMAGES = image_set(12, classes=6)
GROUPS = ["random"] * 4 + ["adversarial, crafting"] * 4 + ["adversarial, testing"] * 4
PLANE = np.random.default_rng(0).normal(size=(12, 2))


def scatter():
    labels = {"xlabel": "noise robustness (negative loss)", "ylabel": "protection (points)"}
    return figures.scatter_figure(POINTS, x="x", y="y", correlation=FOUND, title="Scatter", **labels)


def lines(**how):
    """Two methods over x = 1, 2, 4, two rows each; the second method has an estimate in its rows of x = 2."""
    rows = [{"method": m, "x": x, "y": x * (i + 1) + s} for i, m in enumerate("ab") for x in (1, 2, 4) for s in (0, 1)]
    rows[-3] |= {"guess": 6, "error": 4}
    rows[-4] |= {"guess": 4, "error": 3}
    return figures.lines_figure(rows, x="x", y="y", xlabel="x", ylabel="y", title="Lines", **how)


FIGURES = {
    "accuracy": lambda: figures.accuracy_figure(FOUR, chance=0.1, title="Accuracy"),
    "accuracy of pairs": lambda: figures.accuracy_figure(PAIRS, chance=0.1, title="Accuracy"),
    "curves": lambda: figures.curves_figure(FOUR, chance=0.1, title="Curves"),
    "grid": lambda: figures.grid_figure(PAIRS, title="Grid"),
    "scatter": scatter,
    "losses": lambda: figures.losses_figure(LOSSES, title="Losses"),
    "losses, log": lambda: figures.losses_figure(LOSSES, log=True, title="Losses"),
    "lines": lambda: lines(points=("guess", "error")),
    "lines, log": lambda: lines(log=True),
    "pruning": lambda: figures.pruning_figure(PRUNED, title="Pruning"),
    "weights": lambda: figures.weights_figure(SIZES, 0.85, title="Weights"),
    "spectrum": lambda: figures.spectrum_figure(NOISES, title="Spectrum"),
    "class means": lambda: figures.class_means_figure(NOISES["em"], IMAGES.labels, IMAGES.classes, radius=8),
    "embedding": lambda: figures.embedding_figure({"PCA": PLANE, "t-SNE": -PLANE}, GROUPS, title="Embedding"),
    "strip": lambda: figures.strip_figure(IMAGES.images[:3], {m: n[:3] for m, n in NOISES.items()}, radius=8),
    "protection": lambda: figures.protection_figure(
        FOUR, IMAGES.images[:3], {m: n[:3] for m, n in NOISES.items()}, radius=8, title="Protection", chance=0.1
    ),
}


def drawn_texts(figure):
    """Every text with its box in pixels, ticks outside their axis left out."""
    figure.canvas.draw()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks() + axis.get_minor_ticks()
            off = [t for t in ticks if not axes.axison or not low - 1e-9 <= t.get_loc() <= high + 1e-9]
            hidden |= {label for tick in off for label in (tick.label1, tick.label2)}
    seen = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden]
    return [(text.get_text(), text.get_window_extent().padded(-1)) for text in seen]


def collisions(figure):
    """Pairs of texts that overlap or a legend that covers its axes, and texts that leave the figure."""
    texts = drawn_texts(figure)
    legends = [(axes, axes.get_legend()) for axes in figure.axes if axes.get_legend()]
    covering = [("legend", "axes") for axes, legend in legends if legend.get_window_extent().overlaps(axes.bbox)]
    width, height = figure.canvas.get_width_height()
    overlapping = [(a, b) for (a, box), (b, other) in combinations(texts, 2) if box.overlaps(other)]
    return overlapping + covering, [t for t, b in texts if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_hides_another_or_leaves_the_figure(name):
    figure = FIGURES[name]()
    assert collisions(figure) == ([], []) and len(drawn_texts(figure)) >= 5
    assert figure.get_size_inches()[0] <= 12


def test_texts_that_collide_would_be_seen():
    figure = figures.new_figure(3, 2)
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "two")
    figure.text(0.9, 0.1, "too long for this")
    axes = figure.subplots()
    axes.plot([0, 1], label="line")
    axes.legend()
    assert collisions(figure) == ([("one", "two"), ("legend", "axes")], ["too long for this"])


@pytest.mark.parametrize("design", [pairs, noise_sides])
def test_every_method_of_a_design_has_a_look_of_its_own(design):
    methods = design("demo", 32)
    looks = styles(methods)
    assert len({tuple(look.values()) for look in looks.values()}) == len(methods)
    assert {look["color"] for look in looks.values()} <= {"#000000", "#0072B2", "#D55E00", "#009E73"}


def test_a_pair_has_the_colour_of_its_surrogate_side_and_the_marker_of_its_noise_side():
    look = styles([f"{n}/{s}" for n in SIDES for s in SIDES])
    assert all(look[f"{n}/{s}"]["color"] == look[f"none/{s}"]["color"] for n in SIDES for s in SIDES)
    assert all(look[f"{n}/{s}"]["marker"] == look[f"{n}/none"]["marker"] for n in SIDES for s in SIDES)


@pytest.mark.parametrize(
    ("method", "side"),
    [("sem", "random"), ("none/random", "none"), ("adversarial 4 x2", "adversarial"), ("random", "random"),
     ("adversarial, testing", "adversarial, testing"), ("clean", "clean")],
)  # fmt: skip
def test_the_noise_side_is_read_from_the_name(method, side):
    assert noise_side(method) == side


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_accuracies_are_means_with_students_intervals():
    (axes,) = figures.accuracy_figure(FOUR, chance=0.1, title="t").axes
    assert texts(axes) == ["clean images", "EM", "REM", "SEM", "chance (10 %)"]
    for method, container in zip(("clean", "em", "rem", "sem"), axes.containers, strict=True):
        line, _, (bars,) = container.lines
        for place, radius in enumerate((0, 2, 4)):
            mine = [row["last"] for row in FOUR if (row["method"], row["training_radius"]) == (method, radius)]
            mean, low, high = 100 * np.array(interval(mine))
            assert line.get_xydata()[place] == pytest.approx((radius, mean), abs=0.1)
            assert bars.get_segments()[place][:, 1] == pytest.approx((low, high))
    assert "%" in axes.get_ylabel() and "levels of 255" in axes.get_xlabel()


def test_one_seed_has_no_interval():
    (axes,) = figures.accuracy_figure([row for row in FOUR if row["seed"] == 0], title="t").axes
    bars = [np.array(container.lines[2][0].get_segments()) for container in axes.containers]
    assert len(bars) == 4 and all(segments.size == 0 for segments in bars)


def test_curves_have_a_panel_a_radius_and_bands_of_intervals():
    figure = figures.curves_figure(FOUR, chance=0.1, title="t")
    assert [axes.get_title() for axes in figure.axes] == ["ERM", "AT 2/255", "AT 4/255"]
    axes = figure.axes[2]
    line, band = axes.lines[1], axes.collections[1].get_paths()[0].vertices
    for place, step in enumerate((10, 20, 40)):
        mine = [r["curve"][place][1] for r in FOUR if (r["method"], r["training_radius"]) == ("em", 4)]
        mean, low, high = 100 * np.array(interval(mine))
        assert line.get_xydata()[place] == pytest.approx((step, mean))
        at_step = band[band[:, 0] == step][:, 1]
        assert (at_step.min(), at_step.max()) == pytest.approx((low, high))
    assert texts(axes)[1] == "EM" and figure.axes[0].get_legend() is None


def test_the_cells_of_the_grid_are_protection_with_its_interval_and_cost():
    figure = figures.grid_figure(PAIRS, title="t")
    erm, at, bar = figure.axes
    clean = {(r["training_radius"], r["seed"]): r["last"] for r in PAIRS if r["method"] == "clean"}
    for axes, radius in ((erm, 0), (at, 4)):
        cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
        shown = axes.images[0].get_array()
        for i, noise in enumerate(SIDES):
            for j, surrogate in enumerate(SIDES):
                mine = [r for r in PAIRS if (r["method"], r["training_radius"]) == (f"{noise}/{surrogate}", radius)]
                mean, _, high = interval([100 * (clean[radius, r["seed"]] - r["last"]) for r in mine])
                *_, value, cost = cells[j, i].split("\n")
                assert value == f"{mean:.1f} ± {high - mean:.1f}".replace("-0.0", "0.0").replace("-", "−")
                assert shown[i, j] == pytest.approx(mean)
                passes = mine[0]["noise_passes"]
                assert cost == (f"{passes / 1e6:.1f} M passes" if passes >= 1e6 else f"{passes // 1000} k passes")
        assert cells[2, 1].startswith("SEM\n") and cells[2, 2].startswith("REM\n")
    assert erm.images[0].get_clim() == at.images[0].get_clim() and "points" in bar.get_ylabel()
    assert erm.get_ylabel() == "noise side" and erm.get_title().startswith("ERM, clean images: ")


def test_a_pair_without_rows_is_an_empty_cell_and_a_radius_without_clean_rows_is_refused():
    some = [row for row in PAIRS if row["method"] != "random/none" and row["seed"] == 0]
    axes = figures.grid_figure(some, title="t").axes[0]
    assert len(axes.texts) == 8 and not any("±" in text.get_text() for text in axes.texts)
    assert np.isnan(grid_cells(some, 0)[0][1, 0])
    lacking = [row for row in PAIRS if (row["method"], row["training_radius"]) != ("clean", 4)]
    with pytest.raises(ValueError, match='protection needs rows of "clean"'):
        figures.grid_figure(lacking, title="t")


def test_the_scatter_has_a_point_a_row_by_noise_side_and_says_the_correlation():
    (axes,) = scatter().axes
    assert texts(axes) == list(SIDES)
    for side, line in zip(SIDES, axes.lines, strict=True):
        mine = [(row["x"], row["y"]) for row in POINTS if row["method"].startswith(side)]
        assert line.get_xydata().tolist() == pytest.approx(np.array(mine))
    given = Correlation((-0.5, -0.75, -0.25), (0.125, -0.1, 0.5), 27)
    (axes,) = figures.scatter_figure(POINTS, x="x", y="y", xlabel="a", ylabel="b", correlation=given, title="t").axes
    said = axes.texts[-1].get_text()
    assert said == "Pearson −0.50\n[−0.75, −0.25]\nSpearman 0.12\n[−0.10, 0.50]\nn = 27"


def test_names_in_the_scatter_stand_beside_a_point_of_theirs_and_on_none():
    figure = scatter()
    figure.canvas.draw()
    (axes,) = figure.axes
    points = axes.transData.transform([(row["x"], row["y"]) for row in POINTS])
    names = [text for text in axes.texts if not text.get_text().startswith("Pearson")]
    assert len(names) >= 4
    for text in names:
        box = text.get_window_extent()
        assert not any(box.contains(*point) for point in points)
        near = [p for p, row in zip(points, POINTS, strict=True) if row["method"] == text.get_text()]
        assert min(max(box.x0 - x, x - box.x1, abs(y - (box.y0 + box.y1) / 2)) for x, y in near) < 15


def test_the_column_family_goes_before_the_name():
    rows = [{**row, "family": "ours" if i % 2 else "theirs"} for i, row in enumerate(POINTS)]
    (axes,) = figures.scatter_figure(rows, x="x", y="y", xlabel="a", ylabel="b", title="t").axes
    assert texts(axes) == ["theirs", "ours"]


def test_losses_are_solid_along_adversarial_and_dashed_along_random_directions():
    (axes,) = figures.losses_figure(LOSSES, title="t").axes
    assert texts(axes) == ["EM, adversarial", "EM, random", "SEM, adversarial", "SEM, random"]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-", "--"]
    em = [row["loss"] for row in LOSSES if (row["method"], row["direction"]) == ("em", "adversarial")]
    mean, low, high = interval(em[-3:])
    assert axes.lines[0].get_xydata()[-1] == pytest.approx((8, mean))
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({*band[band[:, 0] == 8][:, 1].round(9)}) == pytest.approx([low, high])


def test_lines_are_means_in_bands_with_estimates_beside_them():
    (axes,) = lines().axes
    assert texts(axes) == ["a", "b"]
    assert axes.lines[1].get_xydata() == pytest.approx(np.array([(1, 2.5), (2, 4.5), (4, 8.5)]))
    _, low, high = interval([8, 9])
    band = axes.collections[1].get_paths()[0].vertices
    assert sorted({*band[band[:, 0] == 4][:, 1].round(9)}) == pytest.approx([low, high])
    (axes,) = lines(points=("guess", "error"), log=True).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.get_xscale() == "log" and len(axes.containers) == 1
    point, _, (bar,) = axes.containers[0]
    assert point.get_xydata().tolist() == [[2, 5]]  # the standard error of the mean is hypot(3, 4) / 2
    assert bar.get_segments()[0][:, 1].tolist() == [0, 10] and point.get_color() == axes.lines[1].get_color()


def test_pruned_nets_are_drawn_over_their_sparsity_dashed_before_tuning():
    clean, robust = figures.pruning_figure(PRUNED, title="t").axes
    assert texts(robust) == ["PGD training", "RSR", "left: before tuning"]
    assert [line.get_linestyle() for line in clean.lines] == ["--", "-", "--", "-"]
    last = [row for row in PRUNED if row["method"] == "RSR" and row["sparsity"] == 0.95]
    for axes, place, name in ((clean, 2, "untuned"), (clean, 3, "clean"), (robust, 1, "robust")):
        assert axes.lines[place].get_xydata()[-1] == pytest.approx((95, 100 * interval([r[name] for r in last])[0]))
    assert list(clean.get_xticks()) == [0, 50, 85, 95] and clean.get_ylim()[0] == robust.get_ylim()[0] == 0


@pytest.mark.parametrize("share", [0, 0.5, 0.85])
def test_the_weights_below_the_threshold_are_the_share_that_is_pruned(share):
    figure = figures.weights_figure(SIZES, share, title="t")
    for axes, values in zip(figure.axes, SIZES.values(), strict=True):
        heights = [sum(bar.get_height() for bar in container) for container in axes.containers]
        assert heights == pytest.approx([share * len(values), (1 - share) * len(values)], abs=1)  # sizes come in pairs
        threshold = float(axes.get_title().rpartition(" ")[2])
        below = (values.abs() < threshold * 0.9).float().mean()
        assert below <= share and (share == 0 or (values.abs() < threshold * 1.1).float().mean() >= share - 0.01)


def test_on_the_log_scale_mean_and_band_of_losses_are_geometric_and_stay_above_zero():
    losses = (0.001, 0.1, 0.02)  # whose plain interval reaches below zero
    rows = [{"method": "em", "direction": "random", "radius": r, "loss": loss * r} for loss in losses for r in (1, 2)]
    (axes,) = figures.losses_figure(rows, log=True, title="t").axes
    mean, low, high = np.exp(interval(np.log(losses)))
    assert axes.get_yscale() == "log" and interval(losses)[1] < 0 < low
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([(1, mean), (2, 2 * mean)]))
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({*band[band[:, 0] == 1][:, 1].round(12)}) == pytest.approx([low, high])


def test_spectra_are_in_units_of_white_noise():
    (axes,) = figures.spectrum_figure(NOISES, title="t").axes
    noise = NOISES["sem"].double()
    frequency, power = radial_spectrum(noise)
    assert axes.lines[1].get_xydata().T == pytest.approx(
        np.stack([frequency, power.mean(0) / float(noise.square().mean())])
    )
    assert set(axes.lines[2].get_ydata()) == {1} and axes.get_yscale() == "log"
    assert texts(axes)[:2] == ["EM", "SEM"] and "cycles per pixel" in axes.get_xlabel()


def test_class_means_are_stretched_by_the_scale_of_the_title():
    labels = IMAGES.labels.clone()
    labels[labels == 3] = 1
    figure = figures.class_means_figure(NOISES["em"], labels, IMAGES.classes, radius=8)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in shown] == ["a", "b", "c", "e", "f"]
    _, means = class_means(NOISES["em"], labels)
    scale = np.abs(means).max()
    assert f"radius 8: ±{scale:.1f} levels → ±127" in figure.get_suptitle()
    for axes, mean in zip(shown, means, strict=True):
        grey = np.moveaxis(np.asarray(axes.images[0].get_array(), float), -1, 0)
        back = (grey - 127.5) * scale / 127.5
        assert back == pytest.approx(mean, abs=0.51 * scale / 127.5)


def test_the_strip_shows_originals_protected_images_and_noise_of_any_depth():
    noise = NOISES["em"][:2].clone()
    noise[0, :, 0, 0] = torch.tensor([-8, 0, 8], dtype=torch.int8)
    figure = figures.strip_figure(IMAGES.images[:2], {"em": noise}, radius=8)
    pictures = np.array([axes.images[0].get_array() for axes in figure.axes]).reshape(3, 2, 8, 8, 3)
    original = IMAGES.images[:2].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pictures[0], original)
    expected = np.clip(original.astype(int) + noise.permute(0, 2, 3, 1).numpy(), 0, 255)
    assert np.array_equal(pictures[1], expected)
    assert pictures[2, 0, 0, 0].tolist() == [0, 128, 255]
    grey = figures.strip_figure(IMAGES.images[:2, :1], {"em": noise[:, :1]}, radius=8)
    assert grey.axes[0].images[0].get_array().shape == (8, 8)


def test_an_embedding_has_a_panel_a_view_and_a_look_a_group():
    figure = figures.embedding_figure({"PCA": PLANE, "t-SNE": -PLANE}, GROUPS, title="t")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("PCA", "t-SNE") and texts(right) == list(dict.fromkeys(GROUPS))
    assert left.lines[1].get_xydata() == pytest.approx(PLANE[4:8])
    assert right.lines[2].get_xydata() == pytest.approx(-PLANE[8:])
    assert len({line.get_color() for line in left.lines}) == 3
    (alone,) = figures.embedding_figure(PLANE, GROUPS, title="t").axes
    assert alone.lines[0].get_xydata() == pytest.approx(PLANE[:4])
