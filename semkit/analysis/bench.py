"""The kit's own speed: the engine against the plain reference, in turn, medians with their spread.

The plain reference runs in a process of its own, where memory is what a plain script has: the engine has the whole of
its process keep what it frees (semkit.nets.engine).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from statistics import median
from warnings import catch_warnings, simplefilter

import torch
from torch.utils.flop_counter import FlopCounterMode

from semkit.analysis import elsewhere, plain
from semkit.analysis.sets import NET, random_images, set_memory, set_seconds
from semkit.analysis.stopwatch import SHORTEST, Run, clock, hardware, in_turn
from semkit.images.augment import FlipCrop
from semkit.images.pixels import LEVEL, check_count, uniform
from semkit.nets import models
from semkit.nets.engine import FAST_PATHS, Engine, input_gradient, predict, together, train_step
from semkit.nets.lab import Interrupted
from semkit.protections.crafting import CraftRecipe, noise_step
from semkit.training.perturb import PGD, Clean, Uniform

PAD = 4
PRODUCT = "matrix product"


@dataclass(frozen=True)
class Plan:
    """What is timed. Nets by name at `batch` images of 32 px, `rounds` times.

    samples: EOT samples of a noise step (published: 5, the same work repeated); attack_steps: ascent steps inside REM
    and AT; compiled: torch.compile too. sets: sizes of image sets in batches, for the cost of an image, in
    `set_rounds` rounds; memory: (images, side, batch) of the sets whose peak memory is asked.
    Raises ValueError for what cannot be.
    """

    nets: tuple[str, ...] = ("tiny", "resnet18")
    batch: int = 128
    rounds: int = 3
    samples: int = 2
    attack_steps: int = 10
    sets: tuple[int, ...] = (16, 80, 392)
    set_rounds: int = 3
    compiled: bool = True
    memory: tuple[tuple[int, int, int], ...] = ((50_000, 32, 128), (1_000, 224, 64))

    def __post_init__(self):
        object.__setattr__(self, "nets", tuple(models.check_model(name) for name in self.nets))
        for name, least in (("batch", 2), ("rounds", 1), ("set_rounds", 1), ("samples", 1), ("attack_steps", 1)):
            check_count(getattr(self, name), name, least)

    @property
    def recipes(self) -> dict[str, CraftRecipe]:
        """The noise step of each method."""
        sides = {"EM": Clean(), "SEM": Uniform(4), "REM": PGD(4, self.attack_steps)}
        how = dict(samples=self.samples, augment=FlipCrop(PAD))
        return {method: CraftRecipe(noise_side=side, **how) for method, side in sides.items()}

    def times(self, batches: int) -> int:
        """How often a set is crafted a round: small ones several times, so that the machine's moods weigh no more."""
        return max(1, max(self.sets) // (8 * batches))


QUICK = Plan(
    nets=("tiny",), batch=16, rounds=2, attack_steps=2, sets=(8, 16), set_rounds=2, compiled=False,
    memory=((64, 32, 16),),
)  # fmt: skip


def planned(*, quick: bool = False, **given) -> Plan:
    """Plan(), or QUICK, with what is given and not None; names that a Plan does not have are left out."""
    names = {field.name for field in fields(Plan)}
    chosen = {name: value for name, value in given.items() if name in names and value is not None}
    return replace(QUICK if quick else Plan(), **chosen)


# -- what is timed -----------------------------------------------------------------------------------------------------


def _view(x, generator):
    t = FlipCrop(PAD)
    return t.apply(x, t.draw(len(x), x.shape[2:], generator))


def _train(model, optimizer, x, y, side, generator):
    return train_step(model, optimizer, side(model, _view(x, generator), y, generator), y)


def _plain_view(x, generator):
    return plain.views(x, FlipCrop(PAD).draw(len(x), x.shape[2:], generator), PAD)


def _plain_train(model, optimizer, x, y, side, generator):
    return plain.train_step(model, optimizer, x, y, side, PAD, plain.draw(FlipCrop(PAD), side, x, generator))


def _plain_noise(model, x, y, delta, recipe, generator):
    return plain.noise_step(model, x, y, delta, recipe, plain.draws(recipe, x, generator))


def _works(plan: Plan, model, x, y, generator, view, noise, train) -> dict[str, Run]:
    """What is done on both paths, from one path's three functions."""
    delta = uniform(x, 8 * LEVEL, generator)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)  # small: a net that collapses computes with zeros

    def augmentation():
        leaf = delta.detach().requires_grad_()
        return torch.autograd.grad(view(leaf, generator), leaf, x)

    steps = {
        f"{method} noise step": partial(noise, model, x, y, delta, recipe, generator)
        for method, recipe in plan.recipes.items()
    }
    training = partial(train, model, optimizer, x, y, PGD(4, plan.attack_steps), generator)
    return {**steps, "AT training step": training, "augmentation": augmentation}


def _engine_works(plan: Plan, net: str, engine: Engine) -> dict[str, Run]:
    data = random_images(plan.batch, 32)
    model = engine.prepare(models.build(net, 10))
    x, y = engine.images(data.images), data.labels.to(engine.device)
    together(model, x)  # what is found once for a shape is found before anything is timed
    works = _works(plan, model, x, y, engine.generator(0), _view, noise_step, _train)
    return {**works, "input gradient": partial(input_gradient, model, x, y)}


def _plain_works(plan: Plan, net: str, device: str) -> dict[str, Run]:
    data = random_images(plan.batch, 32)
    x, y = (data.images / 255).to(device), data.labels.to(device)
    generator = torch.Generator(device).manual_seed(0)
    return _works(plan, models.build(net, 10).to(device), x, y, generator, _plain_view, _plain_noise, _plain_train)


def switches(engine: Engine, compiled: bool = False) -> dict[tuple[str, str], Engine]:
    """(work, path) -> the engine with one switch turned: precision (where it is not float32 already), layout, folding,
    samples in one pass, and, if asked and where it works, torch.compile."""
    off = {"channels_last": FAST_PATHS["channels_last"], "folding": {**FAST_PATHS["folding"], "compile": False}}
    if engine.compile:
        off["compile"] = dict(compile=False)
    if engine.precision == "bfloat16":
        off["bfloat16"] = dict(precision="float32")
    turned = {("input gradient", f"engine without {name}"): replace(engine, **new) for name, new in off.items()}
    turned["SEM noise step", "engine, samples one by one"] = replace(engine, **FAST_PATHS["batching"])
    if compiled and not engine.compile and _compiles(engine):
        turned["input gradient", "engine with compile"] = replace(engine, compile=True)
    return turned


def _compiles(engine: Engine) -> bool:
    """Whether torch.compile works here: it needs a C++ compiler, and on a GPU Triton."""
    model = replace(engine, compile=True).prepare(models.build(NET, 10))
    with catch_warnings():
        simplefilter("ignore")
        predict(model, engine.images(random_images(2, 32).images))
    return model.folded.compiled


def timed_runs(plan: Plan, net: str, engine: Engine) -> dict[tuple[str, str], Run]:
    """(work, path) -> what is to be timed: each work in plain and on the engine, its switches, matrix products."""
    ours, plainly = _engine_works(plan, net, engine), _plain_works(plan, net, engine.device)
    made = {}
    for work in ours:
        if work in plainly:
            made[work, "plain"] = plainly[work]
        made[work, "engine"] = ours[work]
    for (work, path), other in switches(engine, plan.compiled).items():
        made[work, path] = _engine_works(plan, net, other)[work]
    for side in (4096, 8192) if engine.device.startswith("cuda") else (1024, 2048):
        a, b = torch.rand(2, side, side, device=engine.device).to(getattr(torch, engine.precision))
        made[PRODUCT, str(side)] = partial(torch.mm, a, b.t())  # as a linear layer multiplies
    return made


def gradient_flops(net: str, n: int) -> float:
    """Floating-point operations of the input gradient of n images of 32 px: as many backward as forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.build(net, 10).eval()(torch.zeros(1, 3, 32, 32))
    return 2.0 * n * counter.get_total_flops()


# -- rows --------------------------------------------------------------------------------------------------------------


def _measured(name: str, values: Sequence[float]) -> dict:
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def _over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [p / q for p, q in zip(a, b, strict=True)]


def time_rows(net: str, seconds: dict[tuple[str, str], list[float]]) -> list[dict]:
    """A row a run: seconds, and how many times the engine's that is, round by round: median, smallest and largest."""
    return [
        {"kind": "time", "net": net, "work": work, "path": path, **_measured("seconds", values),
         **_measured("ratio", _over(values, seconds[work, "engine"]))}
        for (work, path), values in seconds.items()
        if work != PRODUCT
    ]  # fmt: skip


def rate_row(net: str, batch: int, precision: str, seconds: dict[tuple[str, str], list[float]]) -> dict:
    """The input gradient's operations per second, and their share of a round's fastest matrix product's."""
    rates = [[2 * int(side) ** 3 / s for s in values] for (work, side), values in seconds.items() if work == PRODUCT]
    matmul = [max(of_round) for of_round in zip(*rates, strict=True)]
    gradient = [gradient_flops(net, batch) / s for s in seconds["input gradient", "engine"]]
    return {
        "kind": "rate", "net": net, "precision": precision, **_measured("matmul_flops", matmul),
        **_measured("gradient_flops", gradient), **_measured("share", _over(gradient, matmul)),
    }  # fmt: skip


def set_rows(seconds: dict[int, list[float]]) -> list[dict]:
    """A row a set's size: seconds per image, and how many times the smallest set's that is, by rounds."""
    smallest = seconds[min(seconds)]
    return [
        {"kind": "set", "net": NET, "images": n, **_measured("seconds", values),
         **_measured("ratio", _over(values, smallest))}
        for n, values in seconds.items()
    ]  # fmt: skip


def expected_seconds(plan: Plan, engine: Engine) -> float:
    """About how long `bench` takes, from a few timed calls and the number of passes."""
    once, total = replace(plan, samples=1), 0.0
    passes = 3 * plan.samples + (plan.samples + 1) * plan.attack_steps + 3  # EM, SEM, REM; AT, its training step as 3
    for net in dict.fromkeys((*plan.nets, NET)):
        paths = _plain_works(once, net, engine.device), _engine_works(once, net, engine)
        plainly, ours = (min(clock(works["EM noise step"], 1, engine.device) for _ in range(2)) for works in paths)
        if net in plan.nets:
            total += (plan.rounds + 1) * (passes * (plainly + ours) + plainly + 14 * SHORTEST)
        if net == NET:
            total += plan.set_rounds * 1.4 * sum(b * plan.times(b) for b in plan.sets) * ours
    return total + 8 * len(plan.memory)


def bench(plan: Plan, engine: Engine, *, on_step: Callable | None = None, say: Callable[[str], object] = print) -> dict:
    """{"hardware", "plan", "rows"}: every row a dict of numbers, its "kind" time, rate, set or memory.

    on_step(what, step, total, metrics) is told of every timing; when it returns True Interrupted is raised.
    """
    where, minutes = f"{engine.device} in {engine.precision}", expected_seconds(plan, engine) / 60
    say(f"{' and '.join(plan.nets)} on {where}, rounds: {plan.rounds}; about {minutes:.1f} min")

    def telling(what: str, total: int) -> Run:
        done = count(1)

        def tell():
            if on_step and on_step(what, next(done), total, {}):
                raise Interrupted("stopped")

        return tell

    rows = []
    for net in plan.nets:
        timed = timed_runs(plan, net, engine)
        with elsewhere.clocks(_plain_works, plan, net, engine.device, device=engine.device) as plain_clock:
            clocks = {
                (work, path): plain_clock(work) if path == "plain" else partial(clock, run, device=engine.device)
                for (work, path), run in timed.items()
            }
            seconds = in_turn(clocks, plan.rounds, telling(net, len(clocks) * (plan.rounds + 1)))
        rows += [*time_rows(net, seconds), rate_row(net, plan.batch, engine.precision, seconds)]
    tell = telling("sets", plan.set_rounds * sum((b + b // 8) * plan.times(b) for b in plan.sets))
    once = partial(set_seconds, batch=plan.batch, engine=engine, tell=tell)
    crafted = [{b: once(b, times=plan.times(b)) for b in plan.sets} for _ in range(plan.set_rounds)]
    rows += set_rows({b * plan.batch: [seconds[b] for seconds in crafted] for b in plan.sets})
    tell = telling("memory", len(plan.memory))
    for n, size, batch in plan.memory:
        used = set_memory(n, size, batch, engine)
        rows.append({"kind": "memory", "net": NET, "images": n, "size": size, "batch": batch, "bytes": used})
        tell()
    return {"hardware": hardware(engine), "plan": asdict(plan), "rows": rows}
