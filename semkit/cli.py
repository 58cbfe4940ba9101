"""The command line: semkit demo, sweep, transform, protect, check, learn, convert, bench, lab."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from semkit.commands.methodoptions import KEY_VARIABLE, settle
from semkit.commands.options import complain, parse
from semkit.commands.progress import progress
from semkit.files import shown

FINE, FAILED, STOPPED = 0, 1, 130  # and options.BAD_INPUT, 2
MOST_SHOWN = 10


def _announce(text: str) -> None:
    """What is about to be done, on stderr: stdout belongs to the report."""
    tqdm.write(text, file=sys.stderr)


def _tell(options, text: str) -> None:
    """A line of the report: on stdout, or on stderr where stdout gets the JSON."""
    tqdm.write(text, file=sys.stderr if options.json else sys.stdout)


def _print_json(options, values) -> None:
    if options.json:
        print(json.dumps(values, indent=1, allow_nan=False))


def _engine(options):
    from semkit.engine import Engine

    return Engine(options.device, options.precision, compile=options.compile)


def _where(options) -> dict:
    names = ("size", "limit", "download", "skip_unreadable")
    return {"root": options.data, **{name: getattr(options, name) for name in names}}


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _protect(options) -> int:
    report, bound, took = (_filter if settle(options).method == "cuda" else _craft)(options)
    _print_json(options, report)
    _tell(
        options,
        f"{report['protected']} of {report['images']} images protected in {shown(options.out / 'images')} "
        f"({bound}, PSNR {report['psnr_db']} dB, SSIM {report['ssim']}); {took} took {_seconds(report['seconds'])}, "
        f"images {report['held']}",
    )
    for name in report["skipped"]:
        _tell(options, f"skipped, unreadable: {shown(name)}")
    if report["ignored"]:
        _tell(options, f"left out, no images: {len(report['ignored'])} files, named in report.json")
    return FINE


def _filter(options) -> tuple[dict, str, str]:
    from semkit.commands.filtered import protect_by_filters
    from semkit.neighbours.convolve import ClassFilters

    recipe = ClassFilters(options.kernel, options.strength, fraction=options.fraction)
    with progress() as on_step:
        report = protect_by_filters(
            options.images, options.out, recipe, options.key, seed=options.seed, resume=options.resume, on_step=on_step,
            hold=options.hold, **_where(options),
        )  # fmt: skip
    return report, f"{report['bound']}, here by up to {report['largest_change']}", "filtering and writing"


def _craft(options) -> tuple[dict, str, str]:
    from semkit.commands.protect import protect
    from semkit.presets import craft_recipe

    engine = _engine(options)
    recipe = craft_recipe(
        options.method, options.preset, radius=options.radius, perturbation_radius=options.perturbation_radius,
        surrogate=options.surrogate, size=options.size, class_wise=options.class_wise,
    )  # fmt: skip
    with progress() as on_step:
        report = protect(
            options.images, options.out, recipe, seed=options.seed, fraction=options.fraction, resume=options.resume,
            engine=engine, on_step=on_step, on_start=lambda images: _announce_cost(options, recipe, images, engine),
            checkpoint_every=options.checkpoint_every, hold=options.hold, **_where(options),
        )  # fmt: skip
    return report, f"radius {report['radius']:g}", "crafting"


def _announce_cost(options, recipe, images, engine) -> None:
    from semkit.engine import predict_seconds
    from semkit.models import build

    cost = recipe.cost(len(images))
    surrogate = build(recipe.surrogate, len(images.classes), size=options.size)
    seconds = predict_seconds(surrogate, images.images[: recipe.sgd.batch], cost, engine)
    _announce(
        f"{options.method.upper()} noise for {len(images)} images, {options.preset} preset: {cost.total:,} passes of "
        f"{recipe.surrogate} at {options.size} px on {engine.device}, about {_seconds(seconds)}"
    )


def _check(options) -> int:
    from semkit.commands.protected import check, read_report

    key = options.key
    if key is None and read_report(options.out)["radius"] is None:
        key = os.environ.get(KEY_VARIABLE)
    with progress() as on_step:
        found = check(options.images, options.out, radius=options.radius, key=key, root=options.data, on_step=on_step)
    _print_json(options, found)
    problems = found["problems"]
    for problem in problems[:MOST_SHOWN]:
        _tell(options, problem)
    if (more := len(problems) - MOST_SHOWN) > 0:
        _tell(options, f"and {more} more")
    for name in found["skipped"]:
        _tell(options, f"not protected, unreadable: {shown(name)}")
    against = "against the filters of the key" if key else "without the key: size, mode and name, not the values"
    if found["radius"] is not None:
        against = f"against radius {found['radius']:g}"
    _tell(options, f"{found['checked']} files checked {against}: {len(problems)} problems")
    return FAILED if problems else FINE


def _learn(options) -> int:
    from semkit.countermeasures import counter
    from semkit.imageset import without
    from semkit.presets import learn_recipe

    engine, radius = _engine(options), options.perturbation_radius
    recipe = learn_recipe(
        options.preset, perturbation_radius=radius, norm=options.norm, learner=options.learner, size=options.size
    )
    if options.save and options.seeds > 1:
        raise ValueError("one net can be saved: --seeds 1")
    if options.save and options.save.exists():
        raise ValueError(f"{shown(options.save)} exists already")
    with progress() as on_step:
        split = _split(options, on_step)
        if options.without:
            left_out = _loaded(options, options.without, on_step).train
            split = replace(split, train=without(split.train, left_out))
        train, recipe = counter(split.train, recipe, options.countermeasure)
        split = replace(split, train=train)
        cost = recipe.cost(len(split.train)).total * options.seeds
        kind = f"AT {radius:g} ({options.norm})" if radius else "ERM"
        _announce(f"{options.seeds} x {kind}: {recipe.model} on {split.train!r}, {cost:,} passes on {engine.device}")
        rows = list(_learner_rows(options, split, recipe, engine, on_step))
    return _report_learners(options, split, recipe, rows)


def _loaded(options, limit, on_step):
    from semkit.commands.originals import job
    from semkit.data import load
    from semkit.storage import Storage

    told, where = job(on_step, "reading images"), vars(options).get("out") or options.cache
    how = dict(seed=options.split_seed, storage=Storage(options.hold, where), on_step=told)
    return load(options.images, **how, **{**_where(options), "limit": limit})


def _split(options, on_step):
    from semkit.commands.protected import protected_split

    split = _loaded(options, options.limit, on_step)
    for name in split.skipped:
        _tell(options, f"skipped, unreadable: {shown(name)}")
    return protected_split(split, options.images, options.protected) if options.protected else split


def _learner_rows(options, split, recipe, engine, on_step):
    from semkit.study import learned_row

    for seed in range(options.seed, options.seed + options.seeds):
        step = lambda *a, seed=seed: on_step(f"seed {seed}", *a)  # noqa: E731
        how = dict(net=options.save, seed=seed, engine=engine, cache=options.cache, on_step=step)
        row = learned_row(split.train, split.test, recipe, **how)
        _tell(options, f"seed {seed}: clean test accuracy last {row['last']:.3f}, best {row['best']:.3f}")
        yield {"seed": seed, **row}


def _report_learners(options, split, recipe, rows) -> int:
    from semkit.measure import interval

    mean, low, high = interval([row["last"] for row in rows])
    last = {"mean": mean, "low": low, "high": high} if len(rows) > 1 else {"mean": mean}
    _print_json(options, {
        "images": repr(split.train), "test_images": len(split.test), "recipe": repr(recipe), "last": last, "rows": rows,
        "countermeasures": list(options.countermeasure), "skipped": list(split.skipped),
    })  # fmt: skip
    if len(rows) > 1:
        _tell(options, f"last, mean of {len(rows)} seeds: {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    return FINE


def _sweep(options) -> int:
    from semkit.cluster import connected
    from semkit.designs import DESIGNS, LEARNERS
    from semkit.imageset import limit_test
    from semkit.presets import lasting, sweep_recipes
    from semkit.report import write_sweep

    engine = _engine(options)
    crafts, learners = sweep_recipes(options.methods, options.radii, options.preset, size=options.size)
    preset = options.preset
    if options.learner_steps:
        learners = {r: lasting(recipe, options.learner_steps) for r, recipe in learners.items()}
        preset += f", {options.learner_steps} learner steps"
    if options.design:
        crafts = DESIGNS[options.design](options.preset, options.size)
    with progress() as on_step, connected(options.workers, options.scheduler) as client:
        split, spare = limit_test(_split(options, on_step), options.test_limit)
        if options.design in LEARNERS:
            learners = LEARNERS[options.design](options.preset, options.size, spare)
        table, rows = write_sweep(
            split, options.out, crafts, learners, preset=preset, engine=engine,
            seeds=range(options.seed, options.seed + options.seeds), measure_noise=options.measure_noise,
            countermeasures=options.countermeasures, client=client, on_step=on_step, say=_announce,
        )  # fmt: skip
    _print_json(options, rows)
    _tell(options, table)
    return FINE


def _transform(options) -> int:
    from semkit.imageset import limit_test
    from semkit.neighbours.transform import Transform
    from semkit.presets import lasting, sweep_recipes
    from semkit.report import write_defences

    _, learners = sweep_recipes((), (0, options.radius), options.preset, size=options.size)
    if options.learner_steps:
        learners[0] = lasting(learners[0], options.learner_steps)
    with progress() as on_step:
        split, _ = limit_test(_split(options, on_step), options.test_limit)
        table, rows = write_defences(
            split, Transform(options.net), learners, options.out, radius=options.radius, attacked=options.attacked,
            seeds=range(options.seed, options.seed + options.seeds), engine=_engine(options), on_step=on_step,
        )  # fmt: skip
    _print_json(options, rows)
    _tell(options, table)
    return FINE


def _convert(options) -> int:
    from semkit.convert import convert

    noise = convert(
        options.source, options.destination, radius=options.radius, unit=options.unit, class_wise=options.class_wise,
        overwrite=options.overwrite,
    )  # fmt: skip
    shape = list(noise.levels.shape)
    _print_json(options, {"destination": str(options.destination), "shape": shape, "radius": noise.radius})
    _tell(options, f"{shown(options.destination)}: {'x'.join(map(str, shape))}, radius {noise.radius:g}")
    return FINE


def _bench(options) -> int:
    from semkit.speed.bench import planned
    from semkit.speed.benchreport import markdown, run_bench

    with progress() as on_step:
        result = run_bench(planned(**vars(options)), _engine(options), options.out, on_step=on_step, say=_announce)
    _print_json(options, result)
    _tell(options, markdown(result))
    return FINE


def _lab(options) -> int:
    from jupyterlab.labapp import LabApp

    notebook = Path(options.notebook)
    if not notebook.exists():
        raise ValueError(f"no notebook {shown(notebook)}; run semkit lab in semkit's own folder, or name a notebook")
    notebook = notebook.resolve()
    here = Path.cwd() if notebook.is_relative_to(Path.cwd()) else notebook.parent
    LabApp.launch_instance([str(notebook), f"--ServerApp.root_dir={here}"])
    return FINE


RUN = {
    "demo": _sweep, "sweep": _sweep, "transform": _transform, "protect": _protect, "check": _check, "learn": _learn,
    "convert": _convert, "bench": _bench, "lab": _lab,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0: fine, 1: a check failed, 2: bad input, 130: stopped by Ctrl-C."""
    from semkit import parallel
    from semkit.craft import Interrupted

    with parallel.group() as leads:
        if leads:
            return _main(sys.argv[1:] if arguments is None else arguments)
        parallel.serve(Interrupted)
        return FINE


def _main(arguments: list[str]) -> int:
    from semkit.craft import Interrupted
    from semkit.noise import one_line
    from semkit.parallel import LostProcess
    from semkit.storage import out_of_memory

    options = parse(arguments)
    hint = f"; {options.again}" if options.again else ""
    try:
        return RUN[options.command](options)
    except (Interrupted, KeyboardInterrupt, LostProcess) as end:
        complain(f"{str(end) or 'stopped'}{hint}")
        return FAILED if isinstance(end, LostProcess) else STOPPED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        needs_less = "--hold disk, a smaller --size or another --device needs less"
        return complain(f"out of memory ({one_line(error)}); {needs_less}{hint}")
    except ValueError as error:
        return complain(error)
    except OSError as error:
        name = f"{shown(error.filename)}: " if error.filename else ""
        denied = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return complain(f"{name}{error.strerror or error}{'' if denied else hint}")
