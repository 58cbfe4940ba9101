"""Rows as CSV, which keeps every digit, and as tables in Markdown; the tables and the figure of the bench."""

import json
import os
from collections.abc import Sequence
from itertools import cycle
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
    """The mean of accuracies in % ± half its 95 % interval, as text; of one value without the interval.

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

    >>> print(table([{"method": "em", "training_radius": 0, "last": 0.4}]))
    | trained on | ERM  |
    |------------|------|
    | EM         | 40.0 |
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
    """Read rows from a CSV file of write_rows: numbers, curves and texts; nan where one is missing.

    Raises ValueError if there is no such file.

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


def write_report(out: Path, text: str, figure: "Figure | None") -> None:
    """A table and its figure as table.md and figure.png in `out`. Without a figure that of earlier rows is removed."""
    atomic_write(out / "table.md", (text + "\n").encode())
    if figure:
        from semkit.analysis.canvas import save

        save(figure, out / "figure.png")
    else:
        (out / "figure.png").unlink(missing_ok=True)


def as_objects(rows: pd.DataFrame) -> list[dict]:
    """The rows as JSON can hold them, None where a value is missing.

    >>> as_objects(pd.DataFrame([{"seed": 0, "on_own": 0.5}, {"seed": 1}]))
    [{'seed': 0, 'on_own': 0.5}, {'seed': 1, 'on_own': None}]
    """
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


def _conditions(result: dict) -> str:
    """The hardware with its versions in a line, and the plan in a line."""
    where, plan = result["hardware"], result["plan"]
    device = where["gpu"] or f"{where['processor']}, {where['threads']} of {where['cores']} cores"
    return (
        f"{device}, torch {where['torch']}, {where['precision']}\n"
        f"batch {plan['batch']} of 32 px, samples a noise step: {plan['samples']}, ascent steps in REM and AT: "
        f"{plan['attack_steps']}; medians of {plan['rounds']} rounds (sets: {plan['set_rounds']})"
    )


def _text(row: dict, name: str) -> str:
    if f"{name}_low" in row:
        return "{:.3g} ({:.3g} to {:.3g})".format(*(row[name + end] for end in ("", "_low", "_high")))
    return f"{row[name]:,}" if isinstance(row[name], int) else str(row[name] or "not known, its process failed")


def bench_tables(result: dict) -> str:
    """A table in Markdown for every kind of row, of medians (smallest to largest).

    seconds: of a call, or for an image of a set; ratio: to the engine's seconds, or to those of the smallest set;
    bytes: peak memory above torch's own.
    """
    tables = []
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        columns = [name for name in rows[0] if name != "kind" and not name.endswith(("_low", "_high"))]
        tables.append(markdown(pd.DataFrame({name: [_text(row, name) for row in rows] for name in columns})))
    return "\n\n".join([f"{_conditions(result)} (smallest to largest).", *tables])


def _draw_ratios(axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    """How many times faster the engine is, a bar a row and a colour a net."""
    colours = dict(zip(rows["net"].unique(), cycle(("#0072B2", "#D55E00", "#009E73"))))
    ends = rows["ratio"] - rows["ratio_low"], rows["ratio_high"] - rows["ratio"]
    bars = axes.barh(range(len(rows)), rows["ratio"], xerr=ends, capsize=3, color=rows["net"].map(colours))
    axes.bar_label(bars, fmt="%.1f", padding=5)
    axes.axvline(1, color="0.4", lw=1, ls=":")
    axes.set(yticks=range(len(rows)), yticklabels=rows["net"] + ": " + names, xlabel="engine is faster, times")
    axes.set_xlim(0, 1.15 * max(rows["ratio_high"], default=1))
    axes.invert_yaxis()


def bench_figure(result: dict) -> "Figure":
    """Three axes: the engine against plain PyTorch, against itself less one thing, the cost of an image by set size."""
    from semkit.analysis.canvas import new_figure, titled  # matplotlib takes a second that commands need not pay

    times, sets = (pd.DataFrame([row for row in result["rows"] if row["kind"] == kind]) for kind in ("time", "set"))
    plain, off = times[times["path"] == "plain"], times[~times["path"].isin(["plain", "engine"])]
    figure = new_figure(14, 1.6 + 0.3 * max(len(plain), len(off)))
    left, middle, right = figure.subplots(1, 3)
    _draw_ratios(left, plain, plain["work"])
    _draw_ratios(middle, off, off["path"].str.removeprefix("engine").str.lstrip(", "))
    cost, low, high = (1000 * sets[name] for name in ("seconds", "seconds_low", "seconds_high"))
    right.errorbar(sets["images"].map("{:,}".format), cost, (cost - low, high - cost), marker="o", ls=":", capsize=3)
    right.set(ylim=(0, 1.2 * max(high)), xlabel="images in the set", ylabel="milliseconds an image")
    right.grid(axis="y", alpha=0.3)
    names = "engine against plain PyTorch", "engine less one thing against itself", "cost of crafting an image"
    return titled(figure, f"{_conditions(result)}, bars: smallest to largest", figure.axes, names)
