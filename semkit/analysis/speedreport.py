"""What `semkit bench` measured as rows, as tables in Markdown and as a figure."""

import json
import os
import platform
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from semkit import __version__
from semkit.images.files import atomic_write
from semkit.nets import models
from semkit.nets.engine import Engine

GRADIENT, PRODUCT = "input gradient", "matrix product"
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # Okabe and Ito's


# -- rows --------------------------------------------------------------------------------------------------------------


def hardware(engine: Engine) -> dict:
    """What is timed on: processor, cores, threads, GPU, precision, versions."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.startswith("cuda") else None
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "gpu": gpu, "precision": engine.precision, "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "semkit": __version__,
    }  # fmt: skip


def _spread(name: str, values: Sequence[float]) -> dict:
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def _compared(seconds: Sequence[float], base: Sequence[float]) -> dict:
    """Seconds, and how many times the base's they are, round by round: median, smallest and largest."""
    return {**_spread("seconds", seconds), **_spread("ratio", [a / b for a, b in zip(seconds, base, strict=True)])}


def gradient_flops(net: str, n: int) -> float:
    """Floating-point operations of the input gradient of n images of 32 px: twice those of the forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.build(net, 10).eval()(torch.zeros(1, 3, 32, 32))
    return 2.0 * n * counter.get_total_flops()


def rows_of_net(net: str, batch: int, precision: str, seconds: dict[tuple[str, str], list[float]]) -> list[dict]:
    """A "time" row for each (work, path) -> seconds by round, and the "rate" row.

    The latter has the input gradient's operations per second, and their share of a round's fastest matrix product's.
    """
    products = [[2 * int(side) ** 3 / s for s in values] for (work, side), values in seconds.items() if work == PRODUCT]
    fastest = [max(of_round) for of_round in zip(*products, strict=True)]
    gradient = [gradient_flops(net, batch) / s for s in seconds[GRADIENT, "engine"]]
    share = [g / f for g, f in zip(gradient, fastest, strict=True)]
    times = [
        {"kind": "time", "net": net, "work": work, "path": path, **_compared(values, seconds[work, "engine"])}
        for (work, path), values in seconds.items()
        if work != PRODUCT
    ]
    rates = {**_spread("matmul_flops", fastest), **_spread("gradient_flops", gradient), **_spread("share", share)}
    return [*times, {"kind": "rate", "net": net, "precision": precision, **rates}]


def rows_of_sets(net: str, seconds: dict[int, list[float]]) -> list[dict]:
    """A "set" row for each number of images -> seconds per image by round, compared with the smallest set."""
    base = seconds[min(seconds)]
    return [{"kind": "set", "net": net, "images": n, **_compared(values, base)} for n, values in seconds.items()]


# -- for people --------------------------------------------------------------------------------------------------------


def _of(result: dict, kind: str) -> list[dict]:
    return [row for row in result["rows"] if row["kind"] == kind]


def _plain(result: dict) -> list[dict]:
    return [row for row in _of(result, "time") if row["path"] == "plain"]


def _switched(result: dict) -> list[dict]:
    return [row for row in _of(result, "time") if row["path"] not in ("plain", "engine")]


def _range(row: dict, name: str, form: str = "{:.2f} ({:.2f} to {:.2f})", unit: float = 1) -> str:
    return form.format(*(row[name + end] * unit for end in ("", "_low", "_high")))


def _milliseconds(row: dict) -> str:
    return _range(row, "seconds", "{:.3g} ms ({:.3g} to {:.3g})", 1000)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def conditions(result: dict) -> tuple[str, str]:
    """The hardware with its versions in a line, and the plan in a line."""
    where, plan = result["hardware"], result["plan"]
    device = where["gpu"] or f"{where['processor']}, {where['threads']} of {where['cores']} cores"
    return f"{device}, torch {where['torch']}, {where['precision']}", (
        f"batch {plan['batch']} of 32 px, samples a noise step: {plan['samples']}, ascent steps in REM and AT: "
        f"{plan['attack_steps']}; medians of {plan['rounds']} rounds"
    )


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
    """Plain PyTorch against the engine, the engine with one thing switched off, then a line for every other row."""
    ours = {(row["net"], row["work"]): row for row in _of(result, "time") if row["path"] == "engine"}
    faster, plain, off = "engine is faster, times", [], []
    for row in _plain(result):
        times = map(_milliseconds, (row, ours[row["net"], row["work"]]))
        plain.append([row["net"], row["work"], *times, _range(row, "ratio")])
    for row in _switched(result):
        off.append([row["net"], row["work"], row["path"], _milliseconds(row), _range(row, "ratio")])
    return "\n\n".join([
        f"{'; '.join(conditions(result))} (smallest to largest).",
        _table(["net", "work", "plain", "engine", faster], plain),
        _table(["net", "work", "path", "time", faster], off),
        "\n".join(f"- {sentence}" for sentence in _sentences(result)),
    ])  # fmt: skip


def _bars(rows: Sequence[dict], name: str, unit: float = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """The medians, and how far below and above them the smallest and the largest lie, as matplotlib draws them."""
    middle, low, high = (unit * np.array([row[name + end] for row in rows]) for end in ("", "_low", "_high"))
    return middle, [middle - low, high - middle]


def _draw_ratios(axes, rows: Sequence[dict], names: Sequence[str], title: str) -> None:
    """How many times faster the engine is, a bar a row and a colour a net."""
    colours = dict(zip(dict.fromkeys(row["net"] for row in rows), cycle(COLOURS)))
    ratios, ends = _bars(rows, "ratio")
    axes.barh(range(len(rows)), ratios, xerr=ends, capsize=3, color=[colours[row["net"]] for row in rows])
    for place, row in enumerate(rows):
        end = (row["ratio_high"], place)
        axes.annotate(f"{row['ratio']:.1f}", end, (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="0.4", lw=1, ls=":")
    axes.set(yticks=range(len(rows)), yticklabels=names, xlabel="engine is faster, times")
    axes.set_xlim(0, 1.15 * max((row["ratio_high"] for row in rows), default=1))
    axes.set_title(title, fontsize="medium")
    axes.invert_yaxis()


def _draw_costs(axes, rows: Sequence[dict]) -> None:
    """Milliseconds an image by the size of the set."""
    axes.errorbar(range(len(rows)), *_bars(rows, "seconds", 1000), color=COLOURS[0], marker="o", ls=":", capsize=3)
    axes.set(xticks=range(len(rows)), xticklabels=[f"{row['images']:,}" for row in rows], xlim=(-0.5, len(rows) - 0.5))
    axes.set(ylim=(0, 1200 * max(row["seconds_high"] for row in rows)))
    axes.set(xlabel="images in the set", ylabel="milliseconds an image")
    axes.set_title("cost of crafting an image", fontsize="medium")
    axes.grid(axis="y", alpha=0.3)


def bench_figure(result: dict):
    """Three axes: the engine against plain PyTorch, against itself less one thing, the cost of an image by set size."""
    from semkit.analysis.canvas import new_figure  # matplotlib takes a second, and bench without --out draws nothing

    plain, off = _plain(result), _switched(result)
    figure = new_figure(14, 1.6 + 0.3 * max(len(plain), len(off)))
    left, middle, right = figure.subplots(1, 3)
    _draw_ratios(left, plain, [f"{row['net']}: {row['work']}" for row in plain], "engine against plain PyTorch")
    names = [f"{row['net']}: {row['path'].removeprefix('engine').lstrip(', ')}" for row in off]
    _draw_ratios(middle, off, names, "engine against itself, one thing switched off")
    _draw_costs(right, _of(result, "set"))
    figure.suptitle("\n".join(conditions(result)) + ", bars: smallest to largest", fontsize="medium")
    return figure


def write_bench(result: dict, out: Path) -> None:
    """Writes what `semkit bench` measured to the folder `out`, as bench.json, table.md and figure.png."""
    from semkit.analysis.canvas import save

    atomic_write(out / "bench.json", json.dumps(result, indent=1, allow_nan=False).encode())
    atomic_write(out / "table.md", (markdown(result) + "\n").encode())
    save(bench_figure(result), out / "figure.png")
