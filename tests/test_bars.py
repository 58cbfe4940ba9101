"""The bars of the main job, held against the committed rows; README's tables say what these rows say."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from semkit.analysis.measure import interval, protection, verdict
from semkit.analysis.report import read_rows, table

ROOT = Path(__file__).parents[1]
SETS = {name: read_rows(ROOT / "results" / name / "rows.csv") for name in ("shapes-demo", "cifar10-lesson")}


def reached(rows, method, radius):
    """(mean, low, high) in points of accuracy over the three seeds."""
    values = [100 * row["last"] for row in rows if (row["method"], row["training_radius"]) == (method, radius)]
    assert len(values) == 3, (method, radius)
    return interval(values)


def unmet(name, rows):
    """The bars that these rows miss."""
    mean = lambda method, radius: reached(rows, method, radius)[0]  # noqa: E731
    bars = {
        "SEM under ERM 40 points below clean": mean("clean", 0) - mean("sem", 0) >= 40,
        "EM under AT 4 at most 6 points below clean": mean("clean", 4) - mean("em", 4) <= 6,
        "SEM under AT 4 12 points below clean": mean("clean", 4) - mean("sem", 4) >= 12,
    }
    protects = [protection(rows, method, 4) for method in ("sem", "em")]
    bars |= {"SEM protects from AT 4 more than EM": verdict(np.subtract(*protects)) == "supported"}
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
    ("em", 4, 0.3, "SEM protects from AT 4 more than EM"),
])  # fmt: skip
def test_rows_that_miss_a_bar_are_seen(name, method, radius, last, missed):
    row_of = lambda row: (row["method"], row["training_radius"]) == (method, radius)  # noqa: E731
    twin = [{**row, "last": last} if row_of(row) else row for row in SETS[name]]
    assert any(bar.startswith(missed) for bar in unmet(name, twin))


def differing(rows, others):
    """(method, radius) of which the interval of the differences, paired by seed, is without 0."""
    last = [{(r["method"], r["training_radius"], r["seed"]): r["last"] for r in found} for found in (rows, others)]
    assert last[0].keys() == last[1].keys()
    cells = {(method, radius) for method, radius, _ in last[0]}
    found = {cell: interval([last[0][*cell, s] - last[1][*cell, s] for s in range(3)]) for cell in cells}
    return {cell for cell, (_, low, high) in found.items() if low > 0 or high < 0}


def test_float32_and_bfloat16_come_to_the_same_within_their_intervals():
    float32 = read_rows(ROOT / "results/shapes-demo/float32.csv")
    assert differing(SETS["shapes-demo"], float32) == set()
    twin = [{**row, "last": row["last"] + 0.2 * (row["method"] == "sem")} for row in float32]
    assert differing(SETS["shapes-demo"], twin) == {("sem", 0), ("sem", 4)}


def lines_of(text):
    """The cells of every line of the tables in Markdown, without the lines below their heads."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [cells for cells in lines if set("".join(cells)) != {"-"}]


def untold(name, rows, text):
    """The lines of the rows' table that `text` does not have, with what noise costs where it is told."""
    wanted = lines_of(table(rows))[1:]
    if name == "cifar10-lesson":
        passes = [max(row["noise_passes"] for row in rows if row["method"] == m) for m in ("clean", "em", "sem", "rem")]
        for cells, cost in zip(wanted, passes, strict=True):
            cells.append(f"{cost / 4000:.0f} passes" if cost else "")
    told = lines_of(text)
    return [cells for cells in wanted if cells not in told]


@pytest.mark.parametrize("name", SETS)
def test_readme_tells_the_rows(name):
    text = (ROOT / "README.md").read_text()
    assert untold(name, SETS[name], text) == []
    assert untold(name, SETS[name], text.replace("| EM ", "| SEM "))  # a broken twin
    assert untold(name, [{**row, "last": row["last"] - 0.001} for row in SETS[name]], text)
