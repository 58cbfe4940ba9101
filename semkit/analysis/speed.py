"""The speed of the engine: against plain PyTorch, and against itself with one fast path switched off.

The plain steps are an oracle too: with the same random draws they give the engine's results. They run in a second
process, and so does an engine without `memory`, because an engine makes its process keep freed memory
(engine.keep_freed), which would make the others faster too.
"""

import multiprocessing
import os
import platform
import re
import signal
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit import __version__
from semkit.analysis.cost import clock, gradient_flops, peak_memory
from semkit.images.augment import FlipCrop
from semkit.images.imageset import ImageSet
from semkit.images.pixels import LEVEL, box, check_count, uniform
from semkit.nets import models
from semkit.nets.engine import FAST_PATHS, Engine, input_gradient, keep_freed, train_step
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.crafting import CraftRecipe, craft, noise_step
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform
from semkit.training.recipes import SGD

NET = "tiny"  # for the cost of whole sets, where the net matters little
STEPS = "EM noise step", "SEM noise step", "REM noise step", "AT training step"
GRADIENT, PRODUCT = "input gradient", "matrix product"
KILLED = "the plain reference's process was killed, for want of memory perhaps; a smaller --batch needs less"


def plain_views(x: Tensor, drawn: tuple, pad: int) -> Tensor:
    """FlipCrop(pad).apply(x, drawn), one image after another: [N,C,H,W] -> [N,C,H,W]."""
    views = []
    for image, flip, top, left in zip(x, *(numbers.tolist() for numbers in drawn), strict=True):
        padded = F.pad(image.flip(2) if flip else image, (pad,) * 4)
        views.append(padded[:, top : top + x.shape[2], left : left + x.shape[3]])
    return torch.stack(views)


def plain_perturbed(model: nn.Module, x: Tensor, y: Tensor, side: Perturbation, generator: Generator) -> Tensor:
    """Clean: x; Uniform: a random point of the max-norm ball and box; PGD: the end of its ascent from such a point.

    x [N,C,H,W] in [0,1], y [N] -> the same shape. The model stays in its mode. Source: Madry et al., ICLR 2018.
    """
    if isinstance(side, Clean):
        return x
    radius = side.radius * LEVEL
    x_adv = box(x + uniform(x, radius, generator))
    for _ in range(side.passes):
        x_adv.requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
        x_adv = x_adv.detach() + side.step_size * LEVEL * slope.sign()
        x_adv = box(torch.minimum(torch.maximum(x_adv, x - radius), x + radius))
    return x_adv


def plain_noise_step(
    model: nn.Module, x: Tensor, y: Tensor, delta: Tensor, recipe: CraftRecipe, generator: Generator
) -> Tensor:
    """crafting.noise_step, one sample after another: x [N,C,H,W] in [0,1], y [N], delta [N,C,H,W] -> the next delta.

    Leaves the model in eval mode. Source: Liu et al., AAAI 2024.
    """
    model.eval()
    delta = delta.detach().requires_grad_()
    total = torch.zeros_like(delta)
    for _ in range(recipe.samples):
        drawn = recipe.augment.draw(len(x), x.shape[2:], generator)
        z = box(plain_views(x + delta, drawn, recipe.augment.pad))
        a = plain_perturbed(model, z.detach(), y, recipe.noise_side, generator)
        straight_through = z + (a - z).detach()
        total += torch.autograd.grad(F.cross_entropy(model(straight_through), y), delta)[0]
    radius = recipe.radius * LEVEL
    return (delta.detach() - recipe.step_size * LEVEL * total.sign()).clamp(-radius, radius)


def plain_train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, side: Perturbation, generator: Generator
) -> float:
    """One step of adversarial training on x [N,C,H,W] in [0,1], y [N]; returns the loss before it.

    The perturbation is made in eval mode, the step in train mode. Source: Madry et al., ICLR 2018.
    """
    x_adv = plain_perturbed(model.eval(), x, y, side, generator)
    optimizer.zero_grad()
    loss = F.cross_entropy(model.train()(x_adv), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@dataclass(frozen=True)
class Plan:
    """What is timed: the steps of each net on `batch` images of 32 px, once in each of `rounds` rounds.

    samples: EOT samples of a noise step (published: 5); attack_steps: PGD steps inside REM and AT. sets: sizes in
    batches, for the cost of an image, in `set_rounds` rounds; memory: (images, size, batch), for peak memory.
    Raises ValueError for unknown nets and for counts that are too small.
    """

    nets: tuple[str, ...] = ("tiny", "resnet18")
    batch: int = 128
    rounds: int = 3
    samples: int = 2
    attack_steps: int = 10
    sets: tuple[int, ...] = (16, 80, 392)
    set_rounds: int = 3
    memory: tuple[tuple[int, int, int], ...] = ((50_000, 32, 128), (1_000, 224, 64))

    def __post_init__(self):
        object.__setattr__(self, "nets", tuple(models.check_model(name) for name in self.nets))
        for name, least in (("batch", 2), ("rounds", 1), ("set_rounds", 1), ("samples", 1), ("attack_steps", 1)):
            check_count(getattr(self, name), name, least)


QUICK = Plan(nets=("tiny",), batch=16, rounds=2, attack_steps=2, sets=(8, 16), set_rounds=2, memory=((64, 32, 16),))


def random_images(n: int, size: int) -> ImageSet:
    """n images of size x size pixels of random levels, the same ones at every call, in ten classes."""
    levels = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(levels, torch.arange(n) % 10, tuple("0123456789"))


@cache  # a net is made once in each process
def works(plan: Plan, net: str, engine: Engine, plain: bool) -> dict[str, Callable[[], object]]:
    """The timed calls by name: STEPS, on the engine or in plain PyTorch, and on the engine GRADIENT."""
    data, generator, t = random_images(plan.batch, 32), engine.generator(0), FlipCrop()
    model, y, attack = models.build(net, 10), data.labels.to(engine.device), PGD(4, plan.attack_steps)
    if plain:
        model, x, noise = model.to(engine.device), (data.images / 255).to(engine.device), plain_noise_step
    else:
        model, x, noise = engine.prepare(model), engine.images(data.images), noise_step
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)  # small: a net that collapses computes with zeros

    def train() -> float:
        drawn = t.draw(len(x), x.shape[2:], generator)
        if plain:
            return plain_train_step(model, optimizer, plain_views(x, drawn, t.pad), y, attack, generator)
        return train_step(model, optimizer, attack(model, t.apply(x, drawn), y, generator), y)

    recipes = [CraftRecipe(noise_side=side, samples=plan.samples, augment=t) for side in (Clean(), Uniform(4), attack)]
    calls = [partial(noise, model, x, y, torch.zeros_like(x), recipe, generator) for recipe in recipes]
    made = dict(zip(STEPS, (*calls, train), strict=True))
    return made if plain else {**made, GRADIENT: partial(input_gradient, model, x, y)}


def switched_off(engine: Engine) -> dict[str, Engine]:
    """Name -> the engine with one thing switched off: each fast path that it takes, torch.compile, bfloat16."""
    off = {**FAST_PATHS, "folding": {"fold": False, "compile": False}, "compile": {"compile": False}}
    if engine.keep_memory and not keep_freed():
        del off["memory"]  # this system has no such switch
    if engine.precision == "bfloat16":
        off["bfloat16"] = {"precision": "float32"}
    others = {name: replace(engine, **changed) for name, changed in off.items()}
    return {name: other for name, other in others.items() if other != engine}


def seconds_of_call(run: Callable[[], object], device: str) -> float:
    """Seconds that a call takes: the mean of as many as last 0.2 seconds together."""
    calls, seconds = timeit.Timer(run, timer=partial(clock, device)).autorange()
    return seconds / calls


def product(side: int, engine: Engine) -> Callable[[], Tensor]:
    """A product of two matrices of side x side: no net can run at a higher rate."""
    a, b = torch.rand(2, side, side, device=engine.device).to(getattr(torch, engine.precision))
    return partial(torch.mm, a, b.t())


def _seconds_of_work(work: str, plan: Plan, net: str, engine: Engine, plain: bool) -> float:
    return seconds_of_call(works(plan, net, engine, plain)[work], engine.device)


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(threads)


def second_process() -> ProcessPoolExecutor:
    """A fresh process with as many threads as this one, and with none of its other settings."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (torch.get_num_threads(),))


def runs_of_net(plan: Plan, net: str, engine: Engine, process: ProcessPoolExecutor) -> dict[tuple[str, str], Callable]:
    """(work, path) -> a function that returns the seconds of a call, taken here or in the second process."""
    timed = {(step, path): (engine, path == "plain") for step in STEPS for path in ("plain", "engine")}
    timed[GRADIENT, "engine"] = engine, False
    for name, other in switched_off(engine).items():
        timed["SEM noise step" if name == "batching" else GRADIENT, f"engine without {name}"] = other, False
    runs = {}
    for (work, path), (other, plain) in timed.items():
        run = partial(_seconds_of_work, work, plan, net, other, plain)
        runs[work, path] = partial(_result_of, process, run) if plain or not other.keep_memory else run
    for side in (4096, 8192) if engine.device.startswith("cuda") else (1024, 2048):
        runs[PRODUCT, str(side)] = partial(seconds_of_call, product(side, engine), engine.device)
    return runs


def _result_of(process: ProcessPoolExecutor, run: Callable[[], float]) -> float:
    try:
        return process.submit(run).result()
    except BrokenProcessPool:
        raise ChildProcessError(KILLED) from None


def in_turn(runs: dict, rounds: int, lab: Lab) -> dict:
    """Name -> the numbers that its run returned, one a round; all in turn, so that they share a machine's slow minutes.

    A round before these warms up. Raises Interrupted when lab.on_step asks to stop.
    """
    found, order = {name: [] for name in runs}, (rounds + 1) * list(runs)
    for step, name in enumerate(order, 1):
        found[name].append(runs[name]())
        lab.report(step, len(order), {})
    return {name: numbers[1:] for name, numbers in found.items()}


def _craft(n: int, size: int, batch: int, steps: int, lab: Lab) -> float:
    recipe = CraftRecipe(surrogate_side=Clean(), steps=1, samples=1, surrogate=NET, sgd=SGD(steps=steps, batch=batch))
    return craft(random_images(n, size), recipe, lab=lab).seconds


def _memory_here(n: int, size: int, batch: int, engine: Engine) -> int:
    # Two surrogate steps and two of the final pass hold all that is ever held.
    peaks, a_little = [], Lab(engine, on_step=lambda what, step, *_: step == 4)
    for what in ((4, 32, 2), (n, size, batch)):  # the first for what torch itself loads and keeps
        with suppress(Interrupted):
            _craft(*what, 2, a_little)
        peaks.append(peak_memory(engine.device))
    return peaks[1] - peaks[0]


def memory_of_crafting(n: int, size: int, batch: int, engine: Engine) -> int | None:
    """Bytes above torch's own that crafting n images of size x size pixels holds at most, images and noise included.

    Measured in a fresh process, because a process's peak never falls. None if that failed, for want of memory perhaps.
    """
    with second_process() as process, suppress(BrokenProcessPool, ImportError, MemoryError, RuntimeError):
        return process.submit(_memory_here, n, size, batch, engine).result()


def measure(plan: Plan, lab: Lab) -> dict:
    """{"hardware", "plan", "rows"}: every row a dict of numbers, its "kind" time, rate, set or memory.

    lab.on_step is told of every timing. Raises Interrupted when it asks to stop, ChildProcessError if the second
    process is killed.
    """
    rows, engine = [], lab.engine
    with second_process() as process:
        for net in plan.nets:
            seconds = in_turn(runs_of_net(plan, net, engine, process), plan.rounds, lab.doing(net))
            rows += rows_of_net(net, plan.batch, engine.precision, seconds)
    # A noise step for every image of a set, and for one in eight a surrogate step too.
    crafting = {
        n * plan.batch: partial(_craft, n * plan.batch, 32, plan.batch, max(1, n // 8), Lab(engine)) for n in plan.sets
    }
    rows += rows_of_sets(NET, in_turn(crafting, plan.set_rounds, lab.doing("sets")))
    for n, size, batch in plan.memory:
        used = memory_of_crafting(n, size, batch, engine)
        rows.append({"kind": "memory", "net": NET, "images": n, "size": size, "batch": batch, "bytes": used})
    return {"hardware": hardware(engine), "plan": asdict(plan), "rows": rows}


def hardware(engine: Engine) -> dict:
    """Processor, cores, threads, GPU, precision and versions."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.startswith("cuda") else None
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "gpu": gpu, "precision": engine.precision, "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "semkit": __version__,
    }  # fmt: skip


def _spread(**rounds: Sequence[float]) -> dict:
    """The median of each, its smallest and its largest value."""
    ends = {"": np.median, "_low": np.min, "_high": np.max}
    return {name + end: float(of(values)) for name, values in rounds.items() for end, of in ends.items()}


def rows_of_net(net: str, batch: int, precision: str, seconds: dict[tuple[str, str], list[float]]) -> list[dict]:
    """A "time" row for each (work, path) -> seconds by round, and a "rate" row.

    ratio: to the engine's seconds of the same round. The rate is the input gradient's operations per second; share: of
    the fastest matrix product of the same round.
    """
    rounds = {name: np.array(values) for name, values in seconds.items()}
    fastest = np.max([2 * int(side) ** 3 / s for (work, side), s in rounds.items() if work == PRODUCT], axis=0)
    gradient = gradient_flops(net, batch) / rounds[GRADIENT, "engine"]
    rates = _spread(matmul_flops=fastest, gradient_flops=gradient, share=gradient / fastest)
    times = [
        {"kind": "time", "net": net, "work": work, "path": path, **_spread(seconds=s, ratio=s / rounds[work, "engine"])}
        for (work, path), s in rounds.items()
        if work != PRODUCT
    ]
    return [*times, {"kind": "rate", "net": net, "precision": precision, **rates}]


def rows_of_sets(net: str, seconds: dict[int, list[float]]) -> list[dict]:
    """A "set" row for each number of images -> seconds of all by round.

    seconds: per image; ratio: to those of the smallest set.
    """
    each = {n: np.array(values) / n for n, values in seconds.items()}
    base = each[min(each)]
    return [{"kind": "set", "net": net, "images": n, **_spread(seconds=s, ratio=s / base)} for n, s in each.items()]
