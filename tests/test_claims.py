"""results/claims.csv holds together: each published claim, what was measured, the test or verdict that decides it."""

import ast
import csv
import math
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
HEADER = "section claim measured n low high unit recipe rows status decided_by".split()
SECTIONS = ("cuda", "bullettrain", "rsr", "transform", "latent")
STATUSES = {"supported": "True", "not at this scale": "False", "contradicted": "False"}
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
    elif empty := [name for name in HEADER if name not in ("low", "high") and not (row[name] or "").strip()]:
        yield f"{', '.join(empty)} must be filled"
    elif row["section"] not in SECTIONS or row["status"] not in STATUSES:
        yield f"section {row['section']!r}, status {row['status']!r}"


def numbers(row):
    measured, low, high = (number(row[name]) for name in ("measured", "low", "high"))
    if measured is None or not re.fullmatch(r"[1-9]\d*", row["n"]):
        yield f"measured {row['measured']!r}, n {row['n']!r}"
    elif (row["low"], row["high"]) != ("", "") and (None in (low, high) or not low <= measured <= high):
        yield f"not low <= measured <= high: {row['low']!r}, {row['measured']!r}, {row['high']!r}"


def measured_rows(row):
    path = ROOT / row["rows"]
    if not row["rows"].startswith("results/") or not path.is_file():
        yield f"there are no rows at {row['rows']!r}"


def has_test(where):
    """Whether tests/test_x.py::test_y is a function of that file."""
    file, _, name = where.partition("::")
    path = ROOT / file
    if not re.fullmatch(r"tests/test_\w+\.py", file) or not path.is_file():
        return False
    return name in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def verdict(where):
    """What is committed, "True" or "False", below "notebook: text before the colon"; None if there is no such line."""
    notebook, _, text = where.partition(": ")
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    if not re.fullmatch(r"\d\d_\w+", notebook) or not path.is_file():
        return None
    cells = [c for c in nbformat.read(path, 4).cells if c.source.startswith("# NBVAL_CHECK_OUTPUT")]
    lines = [line for c in cells for o in c.outputs for line in o.get("text", "").splitlines()]
    found = [m[1] for line in lines if (m := re.fullmatch(re.escape(text) + r": (True|False)\b.*", line))]
    return found[0] if len(found) == 1 else None


def decided(row):
    where = row["decided_by"]
    if "::" in where:
        if not has_test(where):
            yield f"there is no test {where}"
    elif (found := verdict(where)) is None:
        yield f"there is no verdict {where!r}, or several"
    elif found != STATUSES[row["status"]]:
        yield f"{where!r} says {found}, the claim is {row['status']}"


def problems(row):
    wrong = list(filled(row))
    return wrong or [problem for rule in (numbers, measured_rows, decided) for problem in rule(row)]


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['section']}" for i, row in enumerate(ROWS, 2)])
def test_a_claim_holds_together(row):
    assert problems(row) == []


def test_claims_are_told_once_and_section_by_section():
    assert len({row["claim"] for row in ROWS}) == len(ROWS)
    sections = [SECTIONS.index(row["section"]) for row in ROWS]
    assert sections == sorted(sections) and set(sections) == set(range(len(SECTIONS)))


SOUND = dict(zip(HEADER, (
    "cuda", "filters protect", "0.5", "3", "0.4", "0.6", "accuracy lost", "lesson preset", "results/claims.csv",
    "supported", "00_index: shape kept",
), strict=True))  # fmt: skip
TEST = "tests/test_claims.py::test_a_sound_claim_passes"


@pytest.mark.parametrize("change", [
    {}, {"low": "", "high": ""}, {"decided_by": TEST}, {"decided_by": TEST, "status": "contradicted"},
])  # fmt: skip
def test_a_sound_claim_passes(change):
    assert problems(SOUND | change) == []


@pytest.mark.parametrize("change, says", [
    ({"note": "1"}, "the columns are"), ({"recipe": " "}, "recipe must be filled"), ({"claim": None}, "claim must be"),
    ({"section": "sem"}, "section 'sem'"), ({"status": "true"}, "status 'true'"),
    ({"measured": "about 1"}, "measured 'about 1'"), ({"measured": "nan"}, "measured 'nan'"), ({"n": "0"}, "n '0'"),
    ({"n": "2.5"}, "n '2.5'"), ({"low": "0.55"}, "low <= measured"), ({"high": "0.45"}, "low <= measured"),
    ({"low": ""}, "low <= measured"), ({"high": "inf"}, "low <= measured"),
    ({"rows": "results/gone/rows.csv"}, "no rows"), ({"rows": "results"}, "no rows"),
    ({"rows": "README.md"}, "no rows"),
    ({"decided_by": "tests/test_gone.py::test_a"}, "no test"), ({"decided_by": TEST + "s"}, "no test"),
    ({"decided_by": "tests/checks.py::passes"}, "no test"), ({"decided_by": "looks right"}, "no verdict"),
    ({"decided_by": "99_gone: shape kept"}, "no verdict"), ({"decided_by": "00_index: shape"}, "no verdict"),
    ({"status": "contradicted"}, "says True"), ({"status": "not at this scale"}, "says True"),
])  # fmt: skip
def test_a_broken_claim_is_rejected(change, says):
    found = problems(SOUND | change)
    assert len(found) == 1 and says in found[0]
