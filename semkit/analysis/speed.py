"""How fast the engine is: against the same steps in plain PyTorch, and against itself with one fast path switched off.

The plain reference is also an oracle: with the same random draws it gives the engine's results (tests/test_speed.py).
It runs in a second process, and so does an engine without `memory`, because an engine makes its whole process keep the
memory that is freed (engine.keep_freed). That would make plain PyTorch faster too.
"""

import multiprocessing
import signal
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.analysis.cost import clock, peak_memory
from semkit.analysis.speedreport import GRADIENT, PRODUCT, hardware, rows_of_net, rows_of_sets
from semkit.images.augment import FlipCrop
from semkit.images.imageset import ImageSet
from semkit.images.pixels import LEVEL, box, check_count, uniform
from semkit.nets import models
from semkit.nets.engine import FAST_PATHS, Engine, input_gradient, keep_freed, train_step
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.crafting import CraftRecipe, craft, noise_step
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform
from semkit.training.schedule import SGD

SHORTEST = 0.2  # seconds that a timing of short calls lasts
NET = "tiny"  # for the cost of whole sets, where the net matters little
STEPS = "EM noise step", "SEM noise step", "REM noise step", "AT training step"
KILLED = "the plain reference's process was killed, for want of memory perhaps; a smaller --batch needs less"


# -- the plain reference -----------------------------------------------------------------------------------------------


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


# -- what is timed -----------------------------------------------------------------------------------------------------


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


def _random_images(n: int, size: int) -> ImageSet:
    levels = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(levels, torch.arange(n) % 10, tuple("0123456789"))


@cache  # a net is made once in each process
def works(plan: Plan, net: str, engine: Engine, plain: bool) -> dict[str, Callable[[], object]]:
    """What is timed by name, each as a call: STEPS on the engine or in plain PyTorch; on the engine GRADIENT too."""
    data, generator, t = _random_images(plan.batch, 32), engine.generator(0), FlipCrop()
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


# -- timing ------------------------------------------------------------------------------------------------------------


def seconds_of_call(run: Callable[[], object], device: str) -> float:
    """Seconds that a call takes: the first one if it takes more than a second, else the mean of some after it."""
    timer = timeit.Timer(run, timer=partial(clock, device))
    if (first := timer.timeit(1)) > 1:
        return first
    calls = 1 + int(SHORTEST / max(first, 1e-5))
    return timer.timeit(calls) / calls


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
        a, b = torch.rand(2, side, side, device=engine.device).to(getattr(torch, engine.precision))
        runs[PRODUCT, str(side)] = partial(seconds_of_call, partial(torch.mm, a, b.t()), engine.device)
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
    return craft(_random_images(n, size), recipe, lab=lab).seconds


def seconds_per_image(n: int, batch: int, engine: Engine) -> float:
    """The cost of an image in a set of n images of 32 px: a noise step, and for one in eight a surrogate step too."""
    return _craft(n, 32, batch, max(1, n // (8 * batch)), Lab(engine)) / n


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


def expected_seconds(plan: Plan, runs: dict[str, dict[tuple[str, str], Callable]]) -> float:
    """About how long `measure` takes, from a noise step of each net on both paths and the number of all passes."""
    total, passes = 8 * len(plan.memory), 3 * plan.samples + (plan.samples + 1) * plan.attack_steps + 3
    for timings in runs.values():
        both = [min(timings["EM noise step", path]() for _ in range(2)) for path in ("plain", "engine")]
        total += (plan.rounds + 1) * (passes * sum(both) / plan.samples + 2 * SHORTEST * len(timings))
    return total


def measure(plan: Plan, lab: Lab, say: Callable[[str], object] = print) -> dict:
    """{"hardware", "plan", "rows"}: every row a dict of numbers, its "kind" time, rate, set or memory.

    lab.on_step is told of every timing. Raises Interrupted when it asks to stop, ChildProcessError if the second
    process is killed.
    """
    rows, engine = [], lab.engine
    with second_process() as process:
        runs = {net: runs_of_net(plan, net, engine, process) for net in plan.nets}
        how = f"{' and '.join(plan.nets)} on {engine.device} in {engine.precision}, rounds: {plan.rounds}"
        say(f"{how}; about {expected_seconds(plan, runs) / 60:.1f} min")
        for net in plan.nets:
            rows += rows_of_net(net, plan.batch, engine.precision, in_turn(runs[net], plan.rounds, lab.doing(net)))
    crafting = {b * plan.batch: partial(seconds_per_image, b * plan.batch, plan.batch, engine) for b in plan.sets}
    rows += rows_of_sets(NET, in_turn(crafting, plan.set_rounds, lab.doing("sets")))
    for n, size, batch in plan.memory:
        used = memory_of_crafting(n, size, batch, engine)
        rows.append({"kind": "memory", "net": NET, "images": n, "size": size, "batch": batch, "bytes": used})
    return {"hardware": hardware(engine), "plan": asdict(plan), "rows": rows}
