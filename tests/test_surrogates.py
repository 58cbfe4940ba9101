"""The lesson about surrogates: noises lower the loss of their net, tables are what rows say, figures show them."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import collisions, texts
from photos import image_set, image_split
from torch import nn

from semkit.analysis.designs import noise_parts
from semkit.analysis.measure import losses, noise_part, part_share
from semkit.analysis.statistics import blocked_difference, interval, protection
from semkit.analysis.study import learned_net
from semkit.lessons import surrogates
from semkit.lessons.surrogates import (
    COMPARED,
    PAIRS,
    beats,
    by_seed,
    effects,
    lowered,
    net_rows,
    objection,
    protections,
)
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.methods import craft_recipe
from semkit.training.recipes import lasting, learn_recipe

ENGINE = Engine("cpu", "float32")
NOISE = torch.randint(-8, 9, (6, 3, 16, 16), dtype=torch.int8)
NAMED = {name: NOISE for name in ("em", "none/none", "sem")}


@pytest.fixture(scope="module")
def images():
    return image_set(6, size=16)


def net(images, seed):
    torch.manual_seed(seed)
    return ENGINE.prepare(nn.Sequential(nn.Flatten(), nn.Linear(images.images[0].numel(), len(images.classes))))


@pytest.fixture(scope="module")
def rows():
    """Rows of both designs, three seeds, in which all numbers differ."""
    rng, found = np.random.default_rng(0), []
    for method in ("clean", *PAIRS, *noise_parts("quick", 16)):
        for radius in (0.0, 4.0) if "," not in method or "sem" in method else (0.0,):
            for seed in range(3):
                curve = [[step, float(rng.uniform(0.1, 0.9))] for step in (10, 20)]
                row = {"method": method, "training_radius": radius, "seed": seed, "curve": curve}
                found.append({"preset": "quick", **row, "last": curve[-1][1]})
    return pd.DataFrame(found).drop_duplicates(["method", "training_radius", "seed"])


@pytest.fixture(scope="module")
def nets():
    """Rows of two nets, two seeds: a loss that falls from 8 by 4 for the whole noise, and by parts of this."""
    falls = {"none": 0, "whole": 4, "low": 1, "high": 2, "grey": 3, "colour": 4}
    return pd.DataFrame(
        {"net": net, "seed": seed, "accuracy": share, "part": part, "loss": 8 + seed - fall, "energy": fall / 4}
        for net, share in (("ERM", 0.2), ("AT", 0.6))
        for seed in (0, 1)
        for part, fall in falls.items()
    )


def test_a_net_writes_noise_that_lowers_its_own_loss_within_the_radius(images):
    mine, other = net(images, 0), net(images, 1)
    noise = surrogates.written(mine, images)
    assert noise.dtype == torch.int8 and noise.shape == images.images.shape and noise.abs().max() == 8
    plain = [float(losses(judge, images).mean()) for judge in (mine, other)]
    moved = [float(losses(judge, images.with_noise(noise)).mean()) for judge in (mine, other)]
    assert moved[0] < plain[0] and plain[0] - moved[0] > 2 * abs(plain[1] - moved[1])
    assert torch.equal(noise, surrogates.written(mine, images))


@pytest.mark.whole
def test_a_net_judges_the_parts_of_its_own_noise(tmp_path):
    split, lab = image_split(12, size=16), Lab(ENGINE, tmp_path)
    recipe = lasting(learn_recipe("quick", size=16), 3)
    found = net_rows(split, {"short": recipe}, seeds=(0, 1), lab=lab)
    assert found["part"].tolist() == 2 * ["none", "whole", "low", "high", "grey", "colour"]
    row, model = learned_net(split.train, split.test, recipe, seed=1, lab=lab)
    noise = surrogates.written(model, split.train)
    mine = found[found["seed"] == 1].set_index("part")
    assert set(mine["accuracy"]) == {row["last"]}
    high = float(losses(model, split.train.with_noise(noise_part(noise, "high"))).mean())
    assert mine["loss"]["high"] == high and mine["energy"]["high"] == part_share(noise, "high")
    assert mine["loss"]["none"] == float(losses(model, split.train).mean()) > mine["loss"]["whole"]
    of_whole = (mine["loss"]["none"] - high) / (mine["loss"]["none"] - mine["loss"]["whole"])
    assert lowered(found, "short").loc[1, "high"] == pytest.approx(of_whole)


def test_the_costs_are_those_of_the_recipes():
    table = surrogates.costs("lesson", 4000)
    assert table.loc["random", "adversarial"] == round(craft_recipe("sem", "lesson").cost(4000).total / 1e3, 1)
    assert table.loc["adversarial", "adversarial"] == round(craft_recipe("rem", "lesson").cost(4000).total / 1e3, 1)
    assert (table.index.name, table.columns.name) == ("noise side", "surrogate side")


def test_effects_are_differences_of_protection_with_both_intervals(rows):
    points = protections(rows, 4)
    assert points["random/none"].tolist() == pytest.approx((100 * protection(rows, "random/none", 4)).tolist())
    sides = ("none", "random", "adversarial")
    adversarial, none = ([f"{noise}/{of}" for noise in sides] for of in ("adversarial", "none"))
    gain = points[adversarial].mean(axis=1) - points[none].mean(axis=1)
    pd.testing.assert_series_equal(by_seed(points, "an adversarial surrogate side"), gain)
    found = effects(points).set_index(["compared", "analysis"])
    assert len(found) == 2 * len(COMPARED)
    t = found.loc["an adversarial surrogate side", "t over the seeds"]
    assert t[["mean", "low", "high"]].tolist() == pytest.approx(interval(gain))
    block = found.loc["a random noise side", "seed as block"]
    wanted = blocked_difference(points, [PAIRS.index(f"random/{of}") for of in sides], [0, 1, 2])
    assert block[["mean", "low", "high"]].tolist() == pytest.approx(wanted)
    certain = points + np.where([name.endswith("/adversarial") for name in points], 1000, 0)
    decided = effects(certain).set_index(["compared", "analysis"])["decision"]
    assert set(decided["an adversarial surrogate side"]) == {"supported"} != set(decided["a random noise side"])


def test_a_cell_is_chosen_for_what_it_costs_and_measurably_adds():
    points = pd.DataFrame({"A": [1.0, 2, 3, 4], "B": [11.1, 12, 12.9, 14], "C": [11.0, 12.2, 13, 14]})
    passes = {"A": 10, "B": 20, "C": 30}
    assert beats(points, "B", "A") and not beats(points, "A", "B")
    assert not beats(points, "C", "B") and not beats(points, "B", "B")
    assert objection(points, passes, 30, "B") == "" == objection(points, passes, 10, "A")
    assert "B protects 10.0 points more than A" in objection(points, passes, 20, "A")
    assert "B costs less than C" in objection(points, passes, 30, "C")
    assert objection(points, passes, 20, "C") == "C costs 30 passes and the budget is 20"
    assert objection(points, passes, 20, "SEM") == "'SEM' is none of A, B, C"


def test_pairs_are_drawn_as_dots_joined_by_seed_for_every_learner(rows):
    figure, alt, _ = surrogates.draw_pairs(rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "AT 4/255, noise side none" and titles[-1] == "ERM, noise side adversarial"
    points = protections(rows, 4)
    for axes, noise in zip(figure.axes[:3], ("none", "random", "adversarial"), strict=True):
        names = [f"{noise}/{of}" for of in ("none", "random", "adversarial")]
        drawn = np.array([line.get_ydata() for line in axes.lines[:4]])
        assert drawn == pytest.approx(np.vstack([points[names], points[names].mean()]))
    labels = [label.get_text() for label in figure.axes[4].get_xticklabels()]
    assert labels == ["none\n", "random\n", "adversarial\nSEM"]
    assert f"none/adversarial {points['none/adversarial'].mean():.0f}" in alt


def test_the_two_analyses_are_drawn_with_the_seeds(rows):
    figure, alt, _ = surrogates.draw_effects({"AT": protections(rows, 4)})
    (axes,) = figure.axes
    assert texts(axes) == ["t over the seeds", "seed as block", "a seed"]
    assert alt.count("undecided") + alt.count("supported") + alt.count("contradicted") == 6
    assert [label.get_text() for label in axes.get_yticklabels()] == list(COMPARED)


def test_parts_are_drawn_with_their_share_of_the_energy_where_learners_had_them(rows):
    few = rows[(rows["training_radius"] == 0) | ~rows["method"].isin(["sem, grey", "sem, colour", "em"])]
    figure, alt, _ = surrogates.draw_parts(few, {"em": NOISE, "sem": NOISE})
    assert [axes.get_title() for axes in figure.axes] == ["EM, ERM", "SEM, ERM", "SEM, AT 4/255"]
    names = [[label.get_text().split("\n")[0] for label in axes.get_xticklabels()] for axes in figure.axes]
    assert names == 2 * [["whole", "low", "high", "grey", "colour"]] + [["whole", "low", "high"]]
    shares = [int(label.get_text().split("\n")[1][:-1]) for label in figure.axes[0].get_xticklabels()]
    assert shares[0] == 100 and sum(shares[1:3]) in (99, 100, 101) and sum(shares[3:]) in (99, 100, 101)
    mean = 100 * protection(rows, "sem, high", 4).mean()
    assert re.search(rf"SEM, AT 4/255: .*high {mean:.0f}", alt)


def test_nets_are_drawn_with_their_accuracy_and_the_work_of_each_part(nets):
    figure, alt, _ = surrogates.draw_nets(nets)
    assert [axes.get_title() for axes in figure.axes] == ["ERM: 20% right", "AT: 60% right"]
    drawn = np.array([line.get_ydata() for line in figure.axes[1].lines[:2]])
    assert drawn == pytest.approx(100 * lowered(nets, "AT").to_numpy())
    assert "AT: low 25 %, high 50 %, grey 75 %, colour 100 %" in alt


def test_the_low_part_alone_is_drawn_where_a_period_is_asked_for(images):
    whole, low = (surrogates.draw_noises(images.images, {"em": NOISE}, period) for period in (None, 4))
    share = part_share(NOISE, "low", 1 / 4)
    assert f"EM {share:.0%}" in low[1] and "waves of 4 pixels and longer" in low[2] and "16 pixels" in whole[2]
    pictures = [np.asarray(drawn[0].axes[6].images[0].get_array()) for drawn in (whole, low)]
    assert pictures[0].std() > pictures[1].std() > 0


@pytest.mark.whole
@pytest.mark.parametrize("name", ["noises", "nets", "pairs", "effects", "parts"])
def test_no_text_of_a_figure_covers_another(name, rows, nets, images):
    figure, alt, caption = {
        "noises": lambda: surrogates.draw_noises(images.images, NAMED),
        "nets": lambda: surrogates.draw_nets(nets),
        "pairs": lambda: surrogates.draw_pairs(rows),
        "effects": lambda: surrogates.draw_effects({"AT 4/255": protections(rows, 4), "ERM": protections(rows, 0)}),
        "parts": lambda: surrogates.draw_parts(rows, {"em": NOISE, "sem": NOISE}),
    }[name]()
    assert collisions(figure) == ([], []) and alt and caption
