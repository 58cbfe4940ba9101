"""What `bench` measured, as people read it: tables in Markdown, the figure, the rows as JSON."""

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from semkit.images.files import atomic_write

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # Okabe and Ito's


def _of(result: dict, kind: str) -> list[dict]:
    return [row for row in result["rows"] if row["kind"] == kind]


def _range(row: dict, name: str, form: str = "{:.2f} ({:.2f} to {:.2f})", unit: float = 1) -> str:
    return form.format(*(row[name + end] * unit for end in ("", "_low", "_high")))


def _milliseconds(row: dict) -> str:
    return _range(row, "seconds", "{:.3g} ms ({:.3g} to {:.3g})", 1000)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def machine(result: dict) -> str:
    """The hardware and versions in a line."""
    where = result["hardware"]
    device = where["gpu"] or f"{where['processor']}, {where['threads']} of {where['cores']} cores"
    return f"{device}, torch {where['torch']}, {where['precision']}"


def conditions(result: dict) -> str:
    """The plan in a line."""
    plan = result["plan"]
    return (
        f"batch {plan['batch']} of 32 px, samples a noise step: {plan['samples']}, ascent steps in REM and AT: "
        f"{plan['attack_steps']}; medians of {plan['rounds']} rounds"
    )


def pairs(result: dict) -> list[tuple[dict, dict]]:
    """(plain row, engine row) of every work that both did."""
    ours = {(row["net"], row["work"]): row for row in _of(result, "time") if row["path"] == "engine"}
    return [(row, ours[row["net"], row["work"]]) for row in _of(result, "time") if row["path"] == "plain"]


def switched(result: dict) -> list[dict]:
    """The rows of the engine with one of its switches turned."""
    return [row for row in _of(result, "time") if row["path"] not in ("plain", "engine")]


def _sentences(result: dict) -> list[str]:
    said = []
    for row in _of(result, "rate"):
        gradient, matmul = (f"{row[name] / 1e9:,.0f} GFLOP/s" for name in ("gradient_flops", "matmul_flops"))
        share = _range(row, "share", "{:.0f} % ({:.0f} to {:.0f})", 100)
        said.append(f"{row['net']}: input gradients reach {gradient}, {share} of a matrix product's {matmul}")
    for row in _of(result, "set"):
        cost = f"{_milliseconds(row)} an image, {_range(row, 'ratio')} of the smallest set's"
        said.append(f"{row['net']}, {row['images']:,} images: {cost} (rounds: {result['plan']['set_rounds']})")
    for row in _of(result, "memory"):
        images = f"{row['images']:,} images of {row['size']} px, batch {row['batch']}"
        peak = "not known, its process failed" if row["bytes"] is None else f"{row['bytes'] / 2**30:.2f} GiB"
        said.append(f"{row['net']}, {images}: peak memory above torch's own {peak}")
    return said


def markdown(result: dict) -> str:
    """Plain against engine, the engine with a switch turned, then a line for every other row."""
    both = [
        [plain["net"], plain["work"], _milliseconds(plain), _milliseconds(ours), _range(plain, "ratio")]
        for plain, ours in pairs(result)
    ]
    off = [[row["net"], row["work"], row["path"], _milliseconds(row), _range(row, "ratio")] for row in switched(result)]
    return "\n\n".join([
        f"{machine(result)}; {conditions(result)} (smallest to largest).",
        _table(["net", "work", "plain", "engine", "engine is faster, times"], both),
        _table(["net", "work", "path", "time", "engine is faster, times"], off),
        "\n".join(f"- {sentence}" for sentence in _sentences(result)),
    ])  # fmt: skip


def _bars(axes, rows: Sequence[dict], names: Sequence[str]) -> None:
    """How many times faster the engine is, a bar a row and a colour a net, with the range over rounds."""
    colours = dict(zip(dict.fromkeys(row["net"] for row in rows), cycle(COLOURS)))
    for place, row in enumerate(rows):
        ends = [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
        axes.barh(place, row["ratio"], color=colours[row["net"]], xerr=ends, capsize=3)
        end = (row["ratio_high"], place)
        axes.annotate(f"{row['ratio']:.1f}", end, (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="0.4", lw=1, ls=":")
    axes.set(yticks=range(len(rows)), yticklabels=names, xlabel="engine is faster, times")
    axes.set_xlim(0, 1.15 * max((row["ratio_high"] for row in rows), default=1))
    axes.invert_yaxis()


def draw(panels: Sequence, result: dict) -> None:
    """Three axes: the engine against plain, against itself with a switch turned, and an image's cost by set size."""
    plains, off, sets = [plain for plain, _ in pairs(result)], switched(result), _of(result, "set")
    _bars(panels[0], plains, [f"{row['net']}: {row['work']}" for row in plains])
    panels[0].set_title("engine against the plain reference", fontsize="medium")
    _bars(panels[1], off, [f"{row['net']}: {row['path'].removeprefix('engine').lstrip(', ')}" for row in off])
    panels[1].set_title("engine against itself, a switch turned", fontsize="medium")
    cost, low, high = ([1000 * row[name] for row in sets] for name in ("seconds", "seconds_low", "seconds_high"))
    ends = [[c - a for c, a in zip(cost, low, strict=True)], [b - c for c, b in zip(cost, high, strict=True)]]
    panels[2].errorbar(range(len(sets)), cost, ends, color=COLOURS[0], marker="o", ls=":", capsize=3)
    panels[2].set(xticks=range(len(sets)), xticklabels=[f"{row['images']:,}" for row in sets])
    panels[2].set(xlabel="images in the set", ylabel="milliseconds an image")
    panels[2].set(xlim=(-0.5, len(sets) - 0.5), ylim=(0, 1.2 * max(high)))
    panels[2].set_title("cost of crafting an image", fontsize="medium")
    panels[2].grid(axis="y", alpha=0.3)


def write_bench(result: dict, out: Path) -> None:
    """Writes what `bench` measured to the folder `out`, as bench.json, table.md and figure.png."""
    atomic_write(out / "bench.json", json.dumps(result, indent=1, allow_nan=False).encode())
    atomic_write(out / "table.md", (markdown(result) + "\n").encode())
    _write_figure(result, out / "figure.png")


def _write_figure(result: dict, path: Path) -> None:
    from semkit.analysis.canvas import (  # matplotlib takes a second that the other commands need not pay
        new_figure,
        save,
    )

    figure = new_figure(14, 1.6 + 0.3 * len(pairs(result)))
    draw(figure.subplots(1, 3), result)
    figure.suptitle(f"{machine(result)}\n{conditions(result)}, bars: smallest to largest", fontsize="medium")
    save(figure, path)
