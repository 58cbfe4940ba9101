"""One prepared run on a GPU within a time limit: its numbers, its speed, and SEM at full scale.

Parts, in this order, each saved in OUT as it ends, so that a run that is cut off loses the part under way only:

    numbers.json   input gradients, folding and batching against float64 on the CPU; the same call gives the same bytes
    speed.json     images per second: plain, compiled, as a CUDA graph; share of the fastest matrix product
    rows.csv       EM and SEM noise, then learners on clean and protected images, JPEG and grey-scale learners, and the
                   published recipe; what does not fit into the time left has the time it needs in its row
    noise-*.npz    the noise, 5,000 images a file
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from semkit.analysis.cost import gradient_flops, seconds_of
from semkit.analysis.report import write_rows
from semkit.analysis.speed import GRADIENT, PRODUCT, Plan, hardware, product, random_images, seconds_of_call, works
from semkit.analysis.study import crafted_noise, learned_row
from semkit.images.augment import FlipCrop
from semkit.images.files import atomic_write, one_line
from semkit.images.imageset import Split
from semkit.nets import models
from semkit.nets.engine import Engine, input_gradient
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.crafting import CraftRecipe, noise_step
from semkit.protections.methods import craft_recipe, large_batches
from semkit.training.recipes import LearnRecipe, lasting, learn_recipe

CHUNK = 5_000  # images in a file of noise
BARS = {"float32": 1e-4, "bfloat16": 0.1}  # relative error of an input gradient
UNDONE = ("jpeg-10", "jpegload-10", "grayscale")  # learners' countermeasures against SEM's noise


@dataclass(frozen=True)
class Scale:
    """How large the run is: the net, its batch, and for how many epochs learners train.

    visits: how often crafting sees each image (14.9 in large_batches); 12.9 is a ninth of the published passes.
    """

    net: str = "resnet18"
    batch: int = 512
    visits: float = 12.9
    erm_epochs: float = 30
    at_epochs: float = 20
    batches: tuple[int, ...] = (128, 512, 1024, 2048)
    products: tuple[int, ...] = (4096, 8192)


TINY = Scale(net="tiny", batch=32, visits=2, erm_epochs=2, at_epochs=1, batches=(16, 32), products=(256,))


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact| in the l2 norm, in float64 on the CPU."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    return float((found - exact).norm() / exact.norm())


def numbers(device: str, net: str = "tiny", n: int = 64) -> list[dict]:
    """Rows {"what", "precision", "error", "bar", "right"}: what this device computes, against float64 on the CPU."""
    data, rows = random_images(n, 32), []

    def on(engine: Engine) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        return engine.prepare(models.build(net, 10, 0)), engine.images(data.images), data.labels.to(engine.device)

    def delta(engine: Engine, recipe: CraftRecipe) -> torch.Tensor:
        model, x, y = on(engine)
        return noise_step(model, x, y, torch.zeros_like(x), recipe, engine.generator(0)).cpu()

    def row(what: str, precision: str, error: float, bar: float) -> None:
        rows.append(dict(what=what, precision=precision, error=error, bar=bar, right=error <= bar))

    exact = input_gradient(*on(Engine("cpu", "float64")))
    for precision, bar in BARS.items():
        engine = Engine(device, precision)
        found = input_gradient(*on(engine))
        row("input gradient", precision, error_of(found, exact), bar)
        row("the same call gives the same bytes", precision, error_of(input_gradient(*on(engine)), found), 0.0)
        row("folding", precision, error_of(input_gradient(*on(replace(engine, fold=False))), found), bar)
        recipe = CraftRecipe(samples=3, augment=FlipCrop())
        steps = [delta(other, recipe) for other in (engine, replace(engine, batch_samples=False))]
        row("batching, share of other signs", precision, float((steps[0] != steps[1]).float().mean()), 100 * bar / 2)
    return rows


def graphed(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """The input gradient as a CUDA graph: captured once, then replayed. Raises RuntimeError where it cannot be."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False, enabled=model.engine.precision == "bfloat16"):
        captured = torch.cuda.make_graphed_callables(model.eval(), (x,))

    def run() -> torch.Tensor:
        return torch.autograd.grad(nn.functional.cross_entropy(captured(x).float(), y, reduction="sum"), x)[0]

    return run


def speeds(engine: Engine, scale: Scale) -> Iterator[dict]:
    """Rows {"path", "batch", "images_per_second", "share"} of input gradients; share: of the fastest matrix product.

    A path that fails has "why_not" in place of a rate.
    """
    flops, each = [], gradient_flops(scale.net, 1)
    for side in scale.products:
        flops.append(2 * side**3 / seconds_of_call(product(side, engine), engine.device))
        yield dict(path=PRODUCT, batch=side, flops=flops[-1])
    for batch, path in itertools.product(scale.batches, ("engine", "not folded", "compiled", "CUDA graph")):
        try:
            rate = batch / seconds_of_call(_way(path, engine, scale.net, batch), engine.device)
            yield dict(path=path, batch=batch, images_per_second=rate, share=rate * each / max(flops))
        except Exception as error:  # whatever a compiler or a driver raises is the finding
            yield dict(path=path, batch=batch, why_not=one_line(error))


def _way(path: str, engine: Engine, net: str, batch: int) -> Callable[[], object]:
    changed = {"compiled": dict(compile=True), "not folded": dict(fold=False)}.get(path, {})
    run = works(Plan((net,), batch), net, replace(engine, **changed), False)[GRADIENT]
    model = run.args[0]
    if path == "CUDA graph":
        if torch.device(engine.device).type != "cuda":
            raise ValueError("needs a CUDA GPU")
        return graphed(*run.args)
    run()
    if path == "compiled" and model.folded.not_compiled:
        raise ValueError(model.folded.not_compiled)
    return run


Job = tuple[dict, CraftRecipe | LearnRecipe, tuple[str, ...]]  # what names it in rows.csv, recipe, countermeasures


def jobs(n: int, scale: Scale) -> list[Job]:
    """The noises and learners for n training images, the most telling first; the last have the published recipe."""

    def lasting_for(recipe, epochs: float):
        steps = max(2, round(epochs * n / scale.batch))
        return replace(lasted := lasting(recipe, steps), sgd=replace(lasted.sgd, batch=scale.batch))

    def noise(method: str, recipe: CraftRecipe) -> Job:
        return {"method": method, "what": "noise"}, replace(recipe, surrogate=scale.net), ()

    def learner(method: str, radius: float, *names: str) -> Job:
        recipe = replace(learn_recipe("lesson", perturbation_radius=radius, learner=scale.net), evaluations=2)
        row = {"method": method, "what": " ".join(["learner", *names]), "training_radius": recipe.perturbation.radius}
        return row, lasting_for(recipe, scale.at_epochs if radius else scale.erm_epochs), names

    published = "sem, published"
    return [
        noise("sem", lasting_for(large_batches(), scale.visits)),
        noise("em", lasting_for(craft_recipe("em"), scale.visits)),
        *(learner(method, radius) for radius in (0, 4) for method in ("sem", "em", "clean")),
        *(learner(method, 0, name) for name in UNDONE for method in ("sem", "clean")),
        noise(published, craft_recipe("sem", "paper")), *(learner(published, radius) for radius in (0, 4)),
    ]  # fmt: skip


def run(
    split: Split, out: Path, *, limit: float = 480, scale: Scale | None = None, lab: Lab | None = None
) -> pd.DataFrame:
    """All parts within `limit` seconds; returns the rows of rows.csv. What OUT has already is not made again."""
    end, scale = time.monotonic() + limit, scale or Scale()
    lab = replace(lab or Lab(), cache=out / "runs")
    parts = {
        "numbers.json": lambda: numbers(lab.engine.device),
        "speed.json": lambda: {"hardware": hardware(lab.engine), "rows": list(speeds(lab.engine, scale))},
    }
    for name, make in parts.items():
        if not (out / name).exists():
            atomic_write(out / name, json.dumps(make(), indent=1).encode())
    rows, made = [], {"clean": split.train}
    for job in jobs(len(split.train), scale):
        told = {"device": lab.engine.device, "images": len(split.train)}
        rows.append(job[0] | told | _made(job, split, made, out, end, lab))
        write_rows(rows, out / "rows.csv")
    return pd.DataFrame(rows)


def _made(job: Job, split: Split, made: dict, out: Path, end: float, lab: Lab) -> dict:
    """The job's numbers; {"skipped": why} if it does not fit into the time left, or what it builds on was skipped."""
    row, recipe, names = job
    method, is_noise = row["method"], isinstance(recipe, CraftRecipe)
    if not is_noise and method not in made:
        return {"skipped": "its noise was not made"}
    train = split.train if is_noise else made[method]
    needed = seconds_of([recipe], train, lab.engine)
    if needed > (left := end - time.monotonic()):
        return {"skipped": f"needs {needed:.0f} s of {max(left, 0):.0f} s left"}
    in_time = replace(lab, on_step=lambda *told: (lab.on_step and lab.on_step(*told)) or time.monotonic() > end)
    with suppress(Interrupted):
        if not is_noise:
            return learned_row(train, split.test, recipe, countermeasures=names, lab=in_time)
        noise, cost = crafted_noise(train, recipe, lab=in_time)
        made[method] = train.with_noise(noise.levels)
        for at, levels in enumerate(noise.levels.split(CHUNK)):
            np.savez_compressed(out / f"noise-{method.replace(', ', '-')}-{at:02d}.npz", noise=levels.numpy())
        return cost
    return {"skipped": "stopped at the time limit; the same command goes on"}
