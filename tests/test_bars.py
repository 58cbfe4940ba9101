"""The bars of the main job, held against the committed rows; README's tables say what these rows say."""

from itertools import product
from pathlib import Path

import pytest

from semkit.analysis.report import read_rows, table
from semkit.analysis.statistics import interval, protection, verdict

ROOT = Path(__file__).parents[1]
SETS = {name: read_rows(ROOT / "results" / name / "rows.csv") for name in ("shapes-demo", "cifar10-lesson")}


def reached(rows, method, radius):
    """(mean, low, high) in points of accuracy over the seeds, three or more."""
    values = rows[(rows["method"] == method) & (rows["training_radius"] == radius)]["last"]
    assert len(values) == rows["seed"].nunique() >= 3, (method, radius)
    return interval(100 * values)


def unmet(name, rows):
    """The bars that these rows miss."""
    mean = lambda method, radius: reached(rows, method, radius)[0]  # noqa: E731
    bars = {
        "SEM under ERM 40 points below clean": mean("clean", 0) - mean("sem", 0) >= 40,
        "EM under AT 4 at most 6 points below clean": mean("clean", 4) - mean("em", 4) <= 6,
        "SEM under AT 4 12 points below clean": mean("clean", 4) - mean("sem", 4) >= 12,
    }
    more = protection(rows, "sem", 4) - protection(rows, "em", 4)
    bars |= {"SEM protects from AT 4 more than EM": verdict(more) == "supported"}
    if name == "shapes-demo":
        bars |= {"clean ERM 75": mean("clean", 0) >= 75, "clean AT 4 55": mean("clean", 4) >= 55}
    else:
        for method, radius in product(("clean", "em", "sem", "rem"), range(5)):  # the sweep that is drawn
            reached(rows, method, radius)
    return [bar for bar, met in bars.items() if not met]


@pytest.mark.parametrize("name", SETS)
def test_the_committed_rows_meet_the_bars(name):
    assert unmet(name, SETS[name]) == []


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("method", "radius", "last", "missed"), [
    ("sem", 0, 0.5, "SEM under ERM 40"), ("sem", 4, 0.6, "SEM under AT 4 12"), ("em", 4, 0.3, "EM under AT 4 at most"),
    ("em", 4, 0.2, "SEM protects from AT 4 more than EM"),
])  # fmt: skip
def test_rows_that_miss_a_bar_are_seen(name, method, radius, last, missed):
    twin = SETS[name].copy()
    twin.loc[(twin["method"] == method) & (twin["training_radius"] == radius), "last"] = last
    assert any(bar.startswith(missed) for bar in unmet(name, twin))


def differing(rows, others):
    """(method, radius) of which the interval of the differences, paired by seed, is without 0."""
    last, other = (of.set_index(["method", "training_radius", "seed"])["last"] for of in (rows, others))
    assert set(last.index) == set(other.index) and last.index.is_unique and other.index.is_unique
    found = (last - other).groupby(["method", "training_radius"]).agg(interval)
    return {cell for cell, (_, low, high) in found.items() if low > 0 or high < 0}


def test_float32_and_bfloat16_come_to_the_same_within_their_intervals():
    float32 = read_rows(ROOT / "results/shapes-demo/float32.csv")
    assert differing(SETS["shapes-demo"], float32) == set()
    twin = float32.assign(last=float32["last"] + 0.2 * (float32["method"] == "sem"))
    assert differing(SETS["shapes-demo"], twin) == {("sem", 0), ("sem", 4)}


def lines_of(text):
    """The cells of every line of the tables in Markdown, without the lines below their heads."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if set("".join(cells)) != {"-"}]


def untold(name, rows, text):
    """The lines of the rows' table that `text` does not have, with what noise costs where it is told."""
    wanted = lines_of(table(rows))[1:]
    if name == "cifar10-lesson":
        passes = rows.groupby("method")["noise_passes"].max()[["clean", "em", "sem", "rem"]]
        for cells, cost in zip(wanted, passes, strict=True):
            cells.append(f"{cost / 4000:.0f} passes" if cost else "")
    told = lines_of(text)
    return [cells for cells in wanted if cells not in told]


@pytest.mark.parametrize("name", SETS)
def test_readme_tells_the_rows(name):
    text = (ROOT / "README.md").read_text()
    assert untold(name, SETS[name], text) == []
    assert untold(name, SETS[name], text.replace("| EM ", "| SEM "))  # a broken twin
    assert untold(name, SETS[name].assign(last=SETS[name]["last"] - 0.001), text)
