"""The rows of BulletTrain: passes against the shares they report, kept runs, times in turn; and how they are drawn."""

import shutil

import pytest
import torch
from drawn import collisions
from photos import image_split
from safetensors.torch import load_file

from semkit.analysis.report import as_objects
from semkit.lessons import savings
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.training.bullettrain import groups
from semkit.training.recipes import SGD

ENGINE = Engine("cpu", "float32")
FEW = SGD(steps=3, batch=8)
N = 3 * 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the cache folder, the rows of one seed)."""
    cache = tmp_path_factory.mktemp("spared")
    return cache, savings.training_rows(image_split(classes=3), seeds=[4], sgd=FEW, lab=Lab(ENGINE, cache))


@pytest.mark.whole
def test_every_row_cost_what_its_shares_say(made):
    steps = {"plain": (10, 10, 10), "bullettrain": (0, 10, 2), "one step": (1, 10, 1)}
    for row in as_objects(made[1]):
        shares = [row[kind] or 0 for kind in ("outlier", "boundary", "robust")]
        if row["attacked"] is None:
            views = {"cross-entropy": 0, "augmix": 2}[row["objective"]]
            wanted = N * (1 + views * (1 if row["form"] == "plain" else shares[1]))
        else:
            shares = [1, 0, 0] if row["form"] == "plain" else shares
            wanted = N * (2 + sum(a * b for a, b in zip(steps[row["form"]], shares, strict=True)))
        assert row["passes"] == pytest.approx(wanted)
        sorted_ = row["form"] != "plain"
        asked = row["objective"] == "trades" or sorted_
        assert row["forward"] == pytest.approx(N * asked)
        assert savings.cost(row) == pytest.approx(wanted + N * asked / 2)


@pytest.mark.whole
def test_a_row_has_the_accuracy_that_its_training_is_about(made):
    for row in as_objects(made[1]):
        assert (row["attacked"] is None) == (row["corrupted"] is not None) == (row["objective"][0] not in "tm")
        assert all(0 <= row[name] <= 1 for name in ("clean", "attacked", "corrupted") if row[name] is not None)
    assert list(zip(made[1]["objective"], made[1]["form"], strict=True)) == list(savings.recipes(FEW))


@pytest.mark.whole
def test_a_second_call_takes_what_was_kept(made):
    cache, rows = made
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = savings.training_rows(image_split(classes=3), seeds=[4], sgd=FEW, lab=Lab(ENGINE, cache))
    assert again.equals(rows) and {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files


@pytest.mark.whole
def test_a_kept_net_that_is_lost_is_made_again_and_is_the_same(made, tmp_path):
    cache = shutil.copytree(made[0], tmp_path / "cache")
    lost = min(cache.glob("*.weights"))
    before = load_file(lost)
    lost.unlink()
    rows = savings.training_rows(image_split(classes=3), seeds=[4], sgd=FEW, lab=Lab(ENGINE, cache))
    assert rows.equals(made[1]) and all(torch.equal(value, before[name]) for name, value in load_file(lost).items())


@pytest.mark.whole
def test_times_are_taken_in_turn(made):
    cache, _ = made
    how = dict(sgd=FEW, rounds=2, steps=1, lab=Lab(ENGINE, cache))
    rows = savings.seconds_rows(image_split(classes=3), **how)
    assert list(rows["form"][rows["objective"] == "mart"]) == ["plain", "bullettrain", "one step"] * 2
    assert len(rows) == 2 * (3 + 3 + 2) and (rows["seconds"] > 0).all()


def test_how_much_faster_is_paired_by_round():
    seconds = {"plain": [4.0, 8.0, 6.0], "bullettrain": [2.0, 100.0, 1.0]}
    rows = [
        {"objective": "mart", "form": form, "threads": 1, "round": turn, "seconds": found}
        for form, every in seconds.items() for turn, found in enumerate(every)
    ]  # fmt: skip
    rows += [{**row, "threads": 2, "seconds": 1.0} for row in rows[:4]]
    assert savings.faster(rows[::-1], "mart", threads=2).to_dict() == {0: 1}
    assert list(savings.faster(rows[::-1], "mart")) == pytest.approx([2, 0.08, 6])


def test_what_is_saved_and_lost_is_paired_by_seed():
    def row(form, seed, passes, clean):
        return {"objective": "mart", "form": form, "seed": seed, "passes": passes, "forward": 10, "clean": clean}

    rows = [row("plain", 1, 95, 0.5), row("bullettrain", 2, 45, 0.25), row("plain", 2, 195, 0.75)]
    rows += [row("bullettrain", 1, 20, 0.625), row("one step", 1, 5, 0.5), row("plain", 3, 10, 0.5)]
    assert savings.fewer(rows, "mart").to_dict() == {1: 4, 2: 4}
    assert savings.fewer(rows, "mart", "one step").to_dict() == {1: 10}
    assert savings.lost(rows, "mart", "clean").to_dict() == {1: -12.5, 2: 50}
    assert savings.lost(rows, "trades", "clean").empty


# -- figures -----------------------------------------------------------------------------------------------------------


def test_spreads_are_drawn_by_kind_and_all_of_them():
    v = torch.linspace(-0.2, 0.4, 61)
    axes = savings.spreads_figure(v, 0.25, title="spreads").axes[0]
    counts = [sum(bar.get_height() for bar in bars) for bars in axes.containers]
    assert counts == [len(index) for index in groups(v, 0.25)]
    named = {label.split(":")[0] for label in axes.get_legend_handles_labels()[1]}
    assert named == {"outlier", "boundary", "robust", "limit"}


def test_forms_are_drawn_in_order_at_their_means_over_their_passes():
    rows = [
        {
            "objective": objective,
            "form": form,
            "clean": clean + 0.1 * seed,
            "attacked": 0.2,
            "passes": 2000,
            "forward": 0,
        }
        for objective, clean in (("trades", 0.5), ("mart", 0.3))
        for form in ("one step", "bullettrain", "plain")
        for seed in (0, 1)
    ]
    rows.append({"objective": "augmix", "form": "plain", "clean": 0.9, "attacked": None, "passes": 9000, "forward": 0})
    figure = savings.forms_figure(rows, title="forms")
    clean, attacked = figure.axes
    assert [label.get_text() for label in clean.get_xticklabels()] == [
        f"{form}\n2 k passes" for form in ("plain", "BulletTrain", "one step")
    ]
    means = [line.get_ydata().tolist() for line in clean.lines if len(line.get_ydata()) == 3]
    assert [pytest.approx(mean) for mean in means] == [[55] * 3, [35] * 3]
    assert [text.get_text() for text in attacked.get_legend().get_texts()] == ["TRADES", "MART"]
    assert collisions(figure) == ([], [])
