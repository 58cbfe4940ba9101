"""Rows as files and as tables: CSV, which keeps every digit, and Markdown, which people read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from semkit.analysis.statistics import Rows, interval, trained_by
from semkit.analysis.study import SPARSE
from semkit.images.files import atomic_write, shown
from semkit.protections.methods import label_of

if TYPE_CHECKING:
    from semkit.analysis.canvas import Figure  # matplotlib takes a second that other commands need not pay

LISTS = ("curve", "mined")  # columns of lists, in a CSV as JSON


def cell(values: Sequence[float]) -> str:
    """Accuracies of 1 in %: their mean ± half its 95 % interval, or the only one.

    >>> cell([0.5, 0.6])
    '55.0 ± 63.5'
    """
    mean, _, high = interval(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * (high - mean):.1f}" if len(values) > 1 else "")


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, its columns padded to one width; "-" where a value is missing.

    >>> print(markdown(pd.DataFrame({"net": ["tiny"], "passes": ["1,200"]})))
    | net  | passes |
    |------|--------|
    | tiny | 1,200  |
    """
    columns = [[head, *values.fillna("-")] for head, values in table.items()]
    padded = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    lines = ["| " + " | ".join(line) + " |" for line in zip(*padded, strict=True)]
    rule = "|" + "|".join("-" * (len(column[0]) + 2) for column in padded) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def table(rows: Rows) -> str:
    """Rows of a sweep in Markdown: a line a method (and countermeasure), a column a way to train, accuracy in %.

    ± half the 95 % interval over seeds. Rows that tell noise_seconds get a column of them.
    """
    rows = pd.DataFrame(rows)
    names = rows["method"].map(label_of)
    if "countermeasure" in rows:
        changed = rows["countermeasure"].fillna("none") != "none"
        names = names.where(~changed, names + ", " + rows["countermeasure"])
    rows = rows.assign(way=trained_by(rows), **{"trained on": names})
    ways = rows.sort_values("training_radius", kind="stable")["way"].unique()
    of_method = rows.groupby("trained on", sort=False)
    cells = rows.groupby(["trained on", "way"])["last"].agg(cell).unstack().reindex(names.unique())[ways]
    if "noise_seconds" in rows:
        seconds = of_method["noise_seconds"].max()
        cells["noise made in"] = seconds.map(lambda s: f"{s:.0f} s" if s else "-")
    return markdown(cells.reset_index())


def write_rows(rows: Rows, path: Path) -> None:
    """The rows as CSV, a line a row; what is missing is empty."""
    atomic_write(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode())


def read_rows(path: str | os.PathLike) -> pd.DataFrame:
    """The rows of a CSV that write_rows wrote: numbers, curves and texts; nan where one is missing.

    Raises ValueError where there is no such file.

        rows = sk.read_rows("results/cifar10-lesson/rows.csv")
        rows.groupby(["method", "training_radius"])["last"].mean()
    """
    if not Path(path).exists():
        raise ValueError(f"no rows at {shown(path)}; they are in the folder results of semkit's repository")
    how = dict(keep_default_na=False, na_values=["", "nan"], dtype=SPARSE)
    rows = pd.read_csv(path, **how)
    for name in rows.columns.intersection(LISTS):
        rows[name] = rows[name].map(json.loads, na_action="ignore")
    return rows


def write_report(out: Path, rows: pd.DataFrame, text: str, figure: "Figure | None") -> None:
    """The rows, their table and their figure, if there is one: rows.csv, table.md and figure.png in `out`."""
    write_rows(rows, out / "rows.csv")
    atomic_write(out / "table.md", (text + "\n").encode())
    if figure:
        from semkit.analysis.canvas import save

        save(figure, out / "figure.png")


def as_objects(rows: pd.DataFrame) -> list[dict]:
    """The rows as JSON can hold them, None where a value is missing.

    >>> as_objects(pd.DataFrame([{"seed": 0, "on_own": 0.5}, {"seed": 1}]))
    [{'seed': 0, 'on_own': 0.5}, {'seed': 1, 'on_own': None}]
    """
    return rows.astype(object).where(rows.notna(), None).to_dict("records")
