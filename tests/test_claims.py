"""results/claims.csv: each claim has what its rows give, and the status that one rule decides from it."""

import ast
import csv
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
from pairings import MEASURED, measured

from semkit.analysis.report import read_rows
from semkit.analysis.statistics import decide

ROOT = Path(__file__).parents[1]
HEADER = "section claim measured n low high margin unit recipe rows status decided_by".split()
SECTIONS = ("sem", "cuda", "bullettrain", "rsr", "transform", "latent")
STATUSES = ("supported", "undecided", "contradicted")
ROWS = list(csv.DictReader((ROOT / "results" / "claims.csv").read_text().splitlines()))


def number(text):
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def filled(row):
    if list(row) != HEADER:
        yield f"the columns are {', '.join(HEADER)}"
    elif empty := [name for name in HEADER if not (row[name] or "").strip()]:
        yield f"{', '.join(empty)} must be filled"
    elif row["section"] not in SECTIONS or row["status"] not in STATUSES:
        yield f"section {row['section']!r}, status {row['status']!r}"


def numbers(row):
    value, low, high = (number(row[name]) for name in ("measured", "low", "high"))
    if None in (value, low, high) or not re.fullmatch(r"[1-9]\d*", row["n"]):
        yield f"measured {row['measured']!r}, low {row['low']!r}, high {row['high']!r}, n {row['n']!r}"
    elif not low <= value <= high:
        yield f"not low <= measured <= high: {row['low']!r}, {row['measured']!r}, {row['high']!r}"


def measured_rows(row):
    for name in row["rows"].split():
        if not name.startswith("results/") or not (ROOT / name).is_file():
            yield f"there are no rows at {name!r}"


@cache
def rows_of(name):
    return read_rows(ROOT / name)


def recomputed(row):
    """Each number is what its rows give, to the digits that it is written with."""
    if row["claim"].partition(" (published")[0] not in MEASURED:
        yield f"tests/pairings.py does not say how {row['claim']!r} is measured"
        return
    found = measured(row["claim"], *(rows_of(name) for name in row["rows"].split()))
    for name, value in zip(("measured", "low", "high"), found, strict=True):
        digits = len(row[name].partition(".")[2])
        if abs(float(row[name]) - value) > 0.501 * 10**-digits:
            yield f"{name} is {row[name]}, its rows give {value:.{digits}f}"


def ruled(row):
    found = decide(float(row["low"]), float(row["high"]), row["margin"])
    if found != row["status"]:
        yield f"[{row['low']}, {row['high']}] against {row['margin']!r} is {found}, not {row['status']}"


def has_test(where):
    """Whether tests/test_x.py::test_y is a function of that file."""
    file, _, name = where.partition("::")
    path = ROOT / file
    if not re.fullmatch(r"tests/test_\w+\.py", file) or not path.is_file():
        return False
    return name in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@cache
def lines(notebook):
    """What the cells of a notebook that nbval compares have printed."""
    if not re.fullmatch(r"\d\d_\w+", notebook) or not (path := ROOT / "notebooks" / f"{notebook}.ipynb").is_file():
        return []
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    compared = [cell for cell in cells if "".join(cell["source"]).startswith("# NBVAL_CHECK_OUTPUT")]
    return [line.rstrip("\n") for cell in compared for output in cell["outputs"] for line in output.get("text", [])]


def verdict(where):
    """The status that is committed below "notebook: text before the colon"; None if there is no such line."""
    notebook, _, text = where.partition(": ")
    found = [line.rpartition(": ")[2] for line in lines(notebook) if line.rpartition(": ")[0] == text]
    return found[0] if len(found) == 1 and found[0] in STATUSES else None


def decided(row):
    where = row["decided_by"]
    if "::" in where:
        if not has_test(where):
            yield f"there is no test {where}"
    elif (found := verdict(where)) is None:
        yield f"there is no verdict {where!r}, or several"
    elif found != row["status"]:
        yield f"{where!r} says {found}, the claim is {row['status']}"


def problems(row):
    for rules in ((filled,), (numbers, measured_rows), (recomputed, ruled, decided)):
        if wrong := [problem for rule in rules for problem in rule(row)]:
            return wrong
    return []


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['section']}" for i, row in enumerate(ROWS, 2)])
def test_a_claim_is_what_its_rows_say(row):
    assert problems(row) == []


def test_claims_are_told_once_and_section_by_section():
    assert len({row["claim"] for row in ROWS}) == len(ROWS) == len(MEASURED)
    sections = [SECTIONS.index(row["section"]) for row in ROWS]
    assert sections == sorted(sections) and set(sections) == set(range(len(SECTIONS)))


SOUND = next(row for row in ROWS if row["claim"].startswith("SEM holds where EM falls"))
TEST = "tests/test_claims.py::test_a_claim_is_what_its_rows_say"


def test_a_sound_claim_passes():
    assert (
        SOUND["decided_by"].startswith("06_sem: ") and problems(SOUND) == problems(SOUND | {"decided_by": TEST}) == []
    )


@pytest.mark.parametrize("change, says", [
    ({"note": "1"}, "the columns are"), ({"recipe": " "}, "recipe must be filled"), ({"claim": None}, "claim must be"),
    ({"low": ""}, "low must be filled"), ({"margin": ""}, "margin must be filled"),
    ({"section": "em"}, "section 'em'"), ({"status": "True"}, "status 'True'"),
    ({"status": "not at this scale"}, "status 'not at"),
    ({"measured": "about 1"}, "measured 'about 1'"), ({"measured": "nan"}, "measured 'nan'"), ({"n": "0"}, "n '0'"),
    ({"n": "2.5"}, "n '2.5'"), ({"low": "23.8"}, "low <= measured"), ({"high": "23.6"}, "low <= measured"),
    ({"high": "inf"}, "high 'inf'"), ({"rows": "results/gone/rows.csv"}, "no rows"), ({"rows": "results"}, "no rows"),
    ({"rows": "README.md"}, "no rows"), ({"rows": f"{SOUND['rows']} results/gone.csv"}, "no rows"),
    ({"measured": "23.6"}, "its rows give 23.7"), ({"high": "26.7"}, "its rows give 26.8"),
    ({"rows": "results/shapes-demo/rows.csv"}, "its rows give 26.6"), ({"claim": "SEM protects"}, "does not say how"),
    ({"margin": "> 22", "decided_by": TEST}, "is undecided, not supported"),
    ({"margin": "< 0", "decided_by": TEST}, "is contradicted, not supported"),
    ({"status": "contradicted", "decided_by": TEST}, "is supported, not contradicted"),
    ({"status": "contradicted"}, "says supported"),
    ({"decided_by": "tests/test_gone.py::test_a"}, "no test"), ({"decided_by": TEST + "s"}, "no test"),
    ({"decided_by": "tests/checks.py::passes"}, "no test"), ({"decided_by": "looks right"}, "no verdict"),
    ({"decided_by": "99_gone: shape kept"}, "no verdict"), ({"decided_by": "06_sem: SEM"}, "no verdict"),
    ({"decided_by": "00_index: shape kept"}, "no verdict"),
])  # fmt: skip
def test_a_broken_claim_is_rejected(change, says):
    assert any(says in problem for problem in problems(SOUND | change))


def test_a_margin_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="a margin is written"):
        problems(SOUND | {"margin": "at least 0"})
