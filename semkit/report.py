"""A sweep as people read it: the table, the rows as CSV, the figure."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from semkit.engine import Engine, predict_seconds
from semkit.files import atomic_write
from semkit.imageset import Split
from semkit.measure import LABEL, interval
from semkit.models import build
from semkit.presets import learn_recipe, sweep_recipes
from semkit.study import crafted_noise, grid, grid_cost


def _cell(values: Sequence[float]) -> str:
    mean, _, high = interval(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * (high - mean):.1f}" if len(values) > 1 else "")


def table(rows: Sequence[dict]) -> str:
    """Rows of a sweep in Markdown: a line a method, a column a training radius, accuracy in % (± 95 % interval)."""
    radii = sorted({row["training_radius"] for row in rows})
    heads = ["trained on", *("ERM" if r == 0 else f"AT {r:g}/255" for r in radii), "noise made in"]
    lines = [heads]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [_cell([row["last"] for row in mine if row["training_radius"] == r]) for r in radii]
        seconds = max(row["noise_seconds"] for row in mine)
        lines.append([LABEL[method], *cells, f"{seconds:.0f} s" if seconds else "-"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def write_rows(rows: Sequence[dict], path: Path) -> None:
    """The rows as CSV, a line a learner."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())


def write_sweep(
    split: Split,
    out: Path,
    *,
    methods: Sequence[str],
    radii: Sequence[float],
    seeds: Sequence[int],
    preset: str,
    engine: Engine,
    on_step: Callable | None = None,
    say: Callable[[str], object] = print,
) -> tuple[str, list[dict]]:
    """(table, rows) of a sweep; rows.csv, table.md and figure.png are written to `out`, finished runs kept there."""
    from semkit import figures

    runs = out / "runs"
    size = split.train.images.shape[-1]
    crafts, learners = sweep_recipes(methods, radii, preset, size=size)
    cost = grid_cost(len(split.train), crafts, learners, len(seeds))
    net = build(learn_recipe(preset).model, len(split.train.classes), size=size)
    seconds = predict_seconds(net, split.train.images[:64], cost, engine)
    say(
        f"{split.train!r}, {len(split.test)} test images: {len(methods)} methods x {len(radii)} radii x {len(seeds)} "
        f"seeds, {cost.total:,} passes, at most about {seconds / 60:.1f} min on {engine.device} in {engine.precision}"
    )
    rows = grid(split, crafts, learners, seeds=seeds, engine=engine, cache=runs, on_step=on_step)
    rows = [{"preset": preset, **row} for row in rows]
    place = [split.train.labels.tolist().index(k) for k in range(min(6, len(split.train.classes)))]
    noises = {}
    for method, recipe in crafts.items():
        if recipe:
            noise, _ = crafted_noise(split.train, recipe, seed=seeds[0], engine=engine, cache=runs)
            noises[method] = noise.levels[place]
    plural = "s" * (len(seeds) > 1)
    title = f"{split.train.name}: {len(split.train)} training images, {preset} preset, {len(seeds)} seed{plural}"
    figure = figures.protection_figure(
        rows, split.train.images[place], noises, radius=8, title=title, chance=1 / len(split.train.classes)
    )
    text = table(rows)
    write_rows(rows, out / "rows.csv")
    atomic_write(out / "table.md", (text + "\n").encode())
    figures.save(figure, out / "figure.png")
    return text, rows
