"""One HTML file with sliders that needs no kernel, no network and no framework: closed forms and committed results."""

import base64
import json
from pathlib import Path

import pandas as pd

from semkit import __version__
from semkit.analysis.report import read_rows
from semkit.analysis.statistics import interval, learner
from semkit.images.files import atomic_write, shown
from semkit.lessons.twopixels import LOOK, PIT, REACH, SPREAD, VALLEY

TEMPLATE = Path(__file__).with_suffix(".html")
SIGNATURE = "Written by <code>semkit page</code>"  # in the template: a page may be written over, nothing else
NAMES = {"clean": "clean", "em": "EM", "sem": "SEM", "rem": "REM"}
DASHES = {"-": "", "--": "6 4", "-.": "8 3 2 3"}
KNOBS = ("radius", "steps", "perturbation")  # in the names of the map's methods: of the noise; of the surrogate
SWEEP = "4,000 recompressed CIFAR-10 images, lesson preset, net tiny; mean and 95 % interval of {n} seeds."
MAP = "SEM on 1,000 embedded images, demo preset, net tiny; mean{interval} of {n} seed{s}."


def html(results: Path) -> str:
    """The page, from results/cifar10-lesson/rows.csv and, if it is there, results/map/rows.csv with its strips/.

    Raises ValueError where the first is missing.
    """
    rows = results / "cifar10-lesson" / "rows.csv"
    if not rows.exists():
        raise ValueError(f"{rows} is not there: name the folder of committed results with --results")
    data = {
        "spread": SPREAD, "places": (PIT, VALLEY), "reach": REACH, "sweep": swept(read_rows(rows)),
        "look": {"clean": ("var(--ink)", ""), **{name: (look[0], DASHES[look[2]]) for name, look in LOOK.items()}},
        "map": mapped(results / "map"),
    }  # fmt: skip
    text = json.dumps(data).replace("</", "<\\/")  # no text ends the script
    return TEMPLATE.read_text().replace("{{version}}", __version__).replace("{{data}}", text)


def write(out: Path, results: Path) -> int:
    """Write the page to `out`, whole; its size in bytes. Raises ValueError for a file that is no such page."""
    if out.exists() and not (out.is_file() and SIGNATURE in out.read_text(errors="replace")):
        raise ValueError(f"{shown(out)} is there and is no page of semkit; name another file")
    atomic_write(out, page := html(results).encode())
    return len(page)


def point(accuracies: pd.Series) -> dict:
    """Accuracies of several seeds as a point in percent: y, and low and high where two or more have an interval."""
    values = interval(list(accuracies)) if len(accuracies) > 1 else list(accuracies)
    return dict(zip(("y", "low", "high"), (round(100 * float(value), 3) for value in values), strict=False))


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


def mapped(folder: Path) -> dict | None:
    """What a sweep of the design `map` wrote to this folder, None if it is not there: knobs, cells and recipe.

    knobs: name -> its values. cells: method, "clean" or a value of each knob as in "8-600-4" -> {"ERM": point,
    "AT 4/255": point, "strip": the picture strips/8-600-4.png, if there is one}.
    """
    if not (folder / "rows.csv").exists():
        return None
    rows, cells = read_rows(folder / "rows.csv"), {}
    for method, mine in rows.groupby("method", sort=False):
        cells[method] = {learner(radius): point(same["last"]) for radius, same in mine.groupby("training_radius")}
        if (strip := folder / "strips" / f"{method}.png").exists():
            cells[method]["strip"] = f"data:image/png;base64,{base64.b64encode(strip.read_bytes()).decode()}"
    settings = zip(*(map(int, method.split("-")) for method in cells if method != "clean"), strict=True)
    knobs, seeds = dict(zip(KNOBS, (sorted({*values}) for values in settings), strict=True)), rows["seed"].nunique()
    recipe = MAP.format(n=seeds, s="s" * (seeds > 1), interval=" and 95 % interval" * (seeds > 1))
    return {"knobs": knobs, "cells": cells, "recipe": recipe}
