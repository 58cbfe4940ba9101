"""Figures of countermeasures and attacks: the points are the rows' means and intervals; no text hides another."""

import numpy as np
import pytest
import torch
from photos import image_set
from test_plots import collisions

from semkit.analysis import figures
from semkit.analysis.dots import ATTACKS
from semkit.analysis.measure import interval

NAMES = ["none", "jpeg", "grayscale", "purifier=external.safetensors"]
ROWS = [
    {"method": m, "countermeasure": c, "training_radius": r, "seed": s, "last": 0.1 + 0.1 * i + 0.05 * j + 0.02 * s}
    for i, m in enumerate(("clean", "em", "sem", "cuda"))
    for j, c in enumerate(NAMES)
    for r in (0, 4)
    for s in range(3)
]
DEFENCES = {
    "ERM": ("none", "naive", "worst of these"),
    "AT 4": ("none", "naive", "worst of these"),
    "transform": ATTACKS,
}
ATTACKED = [
    {"defence": d, "attack": a, "seed": s, "accuracy": 0.9 - 0.1 * i - 0.05 * j - 0.03 * s}
    for j, (d, attacks) in enumerate(DEFENCES.items())
    for i, a in enumerate(attacks)
    for s in range(3)
]


def bars(container):
    """(the points [K], the ends of their intervals [K,2]) of an errorbar, in data units; [K,2] each."""
    points, _, (ends,) = container.lines
    return np.column_stack(points.get_data()), np.array([segment for segment in ends.get_segments()])


@pytest.mark.parametrize(
    "figure",
    [
        figures.countermeasures_figure(ROWS, chance=0.1, title="Countermeasures"),
        figures.defences_figure(ATTACKED, chance=0.1, title="Defences"),
        figures.images_figure({"original": image_set(3).images, "a long\nlabel": image_set(3).images}, title="Images"),
    ],
    ids=["countermeasures", "defences", "images"],
)
def test_no_text_hides_another_or_leaves_the_figure(figure):
    assert collisions(figure) == ([], []) and figure.get_size_inches()[0] <= 14


def test_every_countermeasure_has_its_line_and_every_method_its_point_there():
    erm, at = figures.countermeasures_figure(ROWS, title="Countermeasures").axes
    assert [label.get_text() for label in erm.get_yticklabels()] == ["none", "JPEG 10", "grey-scale", "purifier"]
    assert [axes.get_title() for axes in (erm, at)] == ["ERM", "AT 4/255"] and len(erm.containers) == 4
    points, ends = bars(erm.containers[2])  # sem
    found = [r["last"] for r in ROWS if (r["method"], r["countermeasure"], r["training_radius"]) == ("sem", "jpeg", 0)]
    mean, low, high = interval(found)
    assert round(points[1, 1]) == 1 and points[1, 0] == pytest.approx(100 * mean)
    assert ends[1, :, 0] == pytest.approx([100 * low, 100 * high])


def test_every_attack_has_its_place_and_a_defence_without_a_transform_lacks_some():
    (axes,) = figures.defences_figure(ATTACKED, title="Defences").axes
    assert len(axes.get_xticklabels()) == len(ATTACKS) == 6
    at, _ = bars(axes.containers[1])
    assert [round(place) for place, _ in at] == [0, 1, 5]
    transform, ends = bars(axes.containers[2])
    mean, low, high = interval([r["accuracy"] for r in ATTACKED if r["attack"] == "BPDA"])
    assert transform[3, 1] == pytest.approx(100 * mean) and ends[3, :, 1] == pytest.approx([100 * low, 100 * high])


def test_rows_of_images_are_drawn_as_they_are():
    images = image_set(3).images
    figure = figures.images_figure({"original": images, "inverted": 255 - images}, title="Images")
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(drawn) == 6 and np.array_equal(drawn[4], 255 - images[1].permute(1, 2, 0).numpy())
    assert [axes.get_ylabel() for axes in figure.axes] == ["original", "", "", "inverted", "", ""]
    assert torch.equal(images, image_set(3).images)
