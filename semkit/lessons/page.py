"""One HTML file with sliders that needs no kernel, no network and no framework: closed forms and committed results."""

import base64
import json
from pathlib import Path

import pandas as pd

from semkit import __version__
from semkit.analysis.report import read_rows
from semkit.analysis.statistics import interval
from semkit.images.files import atomic_write, shown
from semkit.lessons.twopixels import LOOK, PIT, REACH, SPREAD, VALLEY

TEMPLATE = Path(__file__).with_suffix(".html")
SIGNATURE = "Written by <code>semkit page</code>"  # in the template: a page may be written over, nothing else
NAMES = {"clean": "clean", "em": "EM", "sem": "SEM", "rem": "REM"}
DASHES = {"-": "", "--": "6 4", "-.": "8 3 2 3"}
KNOBS = ["radius", "steps", "perturbation"]  # columns of the map's rows: of the noise; surrogate steps; its AT radius
SWEEP = "4,000 recompressed CIFAR-10 images, lesson preset, net tiny; mean and 95 % interval of {n} seeds."
MAP = "SEM on the embedded images, demo preset, net tiny; {n} seed{s}, learners ERM and AT 4."


def html(results: Path) -> str:
    """The page, from results/cifar10-lesson/rows.csv and, if it is there, results/map/rows.csv with its strips/.

    Raises ValueError where the first is missing.
    """
    rows = results / "cifar10-lesson" / "rows.csv"
    if not rows.exists():
        raise ValueError(f"{rows} is not there: name the folder of committed results with --results")
    places = results / "map"
    data = {
        "spread": SPREAD, "places": (PIT, VALLEY), "reach": REACH, "sweep": swept(read_rows(rows)),
        "look": {"clean": ("var(--ink)", ""), **{name: (look[0], DASHES[look[2]]) for name, look in LOOK.items()}},
        "map": mapped(read_rows(places / "rows.csv"), places / "strips") if places.exists() else None,
    }  # fmt: skip
    text = json.dumps(data).replace("</", "<\\/")  # no text ends the script
    return TEMPLATE.read_text().replace("{{version}}", __version__).replace("{{data}}", text)


def write(out: Path, results: Path) -> int:
    """Write the page to `out`, whole; its size in bytes. Raises ValueError for a file that is no such page."""
    if out.exists() and not (out.is_file() and SIGNATURE in out.read_text(errors="replace")):
        raise ValueError(f"{shown(out)} is there and is no page of semkit; name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, page := html(results).encode())
    return len(page)


def point(accuracies: pd.Series) -> dict:
    """Accuracies of several seeds as a point in percent: y, and low and high where two or more have an interval."""
    if len(accuracies) == 1:
        return {"y": 100 * float(accuracies.iloc[0])}
    return dict(zip(("y", "low", "high"), (100 * float(value) for value in interval(list(accuracies))), strict=True))


def swept(rows: pd.DataFrame) -> dict:
    """A sweep's rows as lines over the training radius, a line for each method."""
    rows = rows[rows["method"].isin(NAMES)]
    methods = {
        NAMES[method]: [{"x": x, **point(same["last"])} for x, same in mine.groupby("training_radius")]
        for method, mine in rows.groupby("method", sort=False)
    }
    return {
        "radii": sorted(rows["training_radius"].unique().tolist()),
        "methods": methods,
        "recipe": SWEEP.format(n=rows["seed"].nunique()),
    }


def mapped(rows: pd.DataFrame, strips: Path) -> dict:
    """The map's rows as cells, one for each setting of KNOBS, with the picture strips/RADIUS-STEPS-PERTURBATION.png."""
    cells = []
    for setting, mine in rows.groupby(KNOBS):
        learners = {
            ("AT 4" if radius else "ERM"): point(same["last"]) for radius, same in mine.groupby("training_radius")
        }
        strip = strips / ("-".join(f"{value:g}" for value in setting) + ".png")
        picture = base64.b64encode(strip.read_bytes()).decode() if strip.exists() else ""
        cell = dict(zip(KNOBS, map(float, setting), strict=True)) | {"learners": learners}
        cells.append(cell | ({"strip": f"data:image/png;base64,{picture}"} if picture else {}))
    seeds = rows["seed"].nunique()
    knobs = {knob: sorted(rows[knob].astype(float).unique().tolist()) for knob in KNOBS}
    return {"knobs": knobs, "cells": cells, "recipe": MAP.format(n=seeds, s="s" * (seeds > 1))}
