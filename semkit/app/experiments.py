"""The commands that train learners or time nets: options become recipes, runs become rows, a table and a figure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from semkit.analysis.cluster import check_scheduler
from semkit.analysis.cost import Work, passes_of, seconds_of
from semkit.analysis.designs import DESIGNS, LEARNERS, METHODS, reference_recipe
from semkit.analysis.measure import loss_rows, noise_rows, rise_rows
from semkit.analysis.report import as_objects, bench_tables, table, write_bench, write_report, write_rows
from semkit.analysis.statistics import interval
from semkit.analysis.study import crafted_noise, grid, grid_recipes, learned_net, learned_row
from semkit.app.checking import job, protected_split
from semkit.app.cli import Report, announce, bars
from semkit.app.folder import check_place, claim
from semkit.countermeasures.registry import counter
from semkit.countermeasures.transform import Transform
from semkit.images.files import duration
from semkit.images.imageset import ImageSet, Split, limit_test, not_among
from semkit.images.loading import load
from semkit.images.storage import Storage
from semkit.lessons.defences import defence_rows, defences_figure, defences_table
from semkit.nets.engine import FAST_PATHS, Engine
from semkit.nets.lab import Lab, OnStep
from semkit.protections import methods
from semkit.protections.base import Recipe
from semkit.training.recipes import LearnRecipe, lasting, learn_recipe


def engine_of(options) -> Engine:
    """The engine that --device, --precision, --compile and --switch-off ask for."""
    off = {name: value for path in options.switch_off for name, value in FAST_PATHS[path].items()}
    return Engine(options.device, options.precision, compile=options.compile, **off)


def reading(options) -> dict:
    """Which images are meant, beside IMAGES itself: keywords of `load` and `folder.protect`."""
    names = ("size", "limit", "download", "skip_unreadable")
    return {"root": options.data, **{name: getattr(options, name) for name in names}}


def _seeds(options) -> range:
    return range(options.seed, options.seed + options.seeds)


def _split(options, report: Report, on_step: OnStep) -> Split:
    """IMAGES after --limit, --without, --protected and --test-limit; says which files were left out.

    --without is about the originals, because protected images differ from them in every byte. What has to lie on a disk
    lies on that of --out or --cache.
    """
    told, place = job(on_step, "reading images"), Storage(options.hold, options.out or options.cache)
    how = dict(reading(options), seed=options.split_seed, storage=place, on_step=told)
    split = load(options.images, **how)
    report.skipped(split.skipped)
    report.left_out(split.ignored, "the report of learn --json")
    kept, n = range(len(split.train)), len(split.train)
    if options.without:
        kept = not_among(split.train, load(options.images, **{**how, "limit": options.without}).train)
        if len(kept) < 2:
            raise ValueError(f"--without {options.without} leaves {len(kept)} of {n} images to train on, 2 are needed")
    if options.protected:
        split = protected_split(split, options.images, options.protected)
    return limit_test(replace(split, train=split.train.take(kept)), options.test_limit)


def _cost(recipes: list[Work], train: ImageSet, engine: Engine, seeds: int) -> str:
    """The passes and the time that these recipes take, each once for every seed, in words."""
    n, classes, size = len(train), len(train.classes), train.images.shape[-1]
    seconds = seeds * seconds_of(recipes, n, classes, size, engine)
    return f"{seeds * passes_of(recipes, n).total:,} passes on {engine.device}, at most about {duration(seconds)}"


def learn(options) -> None:
    """semkit learn: fresh learners on images, protected or not; reports their accuracy on clean test images."""
    report, engine, radius = Report(options.json), engine_of(options), options.perturbation_radius
    recipe = learn_recipe(
        options.preset, perturbation_radius=radius, norm=options.norm, learner=options.learner, size=options.size
    )
    if options.save and options.seeds > 1:
        raise ValueError("one net can be saved: --seeds 1")
    rows = []
    with bars() as on_step:
        split = _split(options, report, on_step)
        train, recipe = counter(split.train, recipe, options.countermeasure, engine, split.spare)
        kind = f"AT {radius:g} ({options.norm})" if radius else "ERM"
        cost = _cost([recipe], train, engine, options.seeds)
        announce(f"{options.seeds} x {kind}: {recipe.model} on {train!r}, {cost}")
        for seed in _seeds(options):
            lab = Lab(engine, options.cache, on_step, f"training, seed {seed}")
            row = _learner_row(train, split.test, recipe, seed, lab, options.save)
            report.line(f"seed {seed}: clean test accuracy last {row['last']:.3f}, best {row['best']:.3f}")
            rows.append({"seed": seed, **row})
    mean, low, high = interval([row["last"] for row in rows])
    last = {"mean": mean, "low": low, "high": high} if len(rows) > 1 else {"mean": mean}
    report.values({
        "images": repr(train), "test_images": len(split.test), "recipe": repr(recipe), "last": last, "rows": rows,
        "countermeasures": list(options.countermeasure), "skipped": list(split.skipped), "ignored": list(split.ignored),
    })  # fmt: skip
    if len(rows) > 1:
        report.line(f"last, mean of {len(rows)} seeds: {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")


def _learner_row(train: ImageSet, test: ImageSet, recipe: LearnRecipe, seed: int, lab: Lab, save: Path | None) -> dict:
    if save:
        return learned_net(train, test, recipe, file=save, seed=seed, lab=lab)[0]
    return learned_row(train, test, recipe, seed=seed, lab=lab)


def _claim(options, split: Split, engine: Engine, **settings) -> None:
    """Leave rows, table and figure of other images, recipes or engines alone; some settings may grow."""
    told = {name: getattr(options, name) for name in ("command", "preset", "learner_steps")}
    images = [split.train.fingerprint, split.test.fingerprint]
    claim(options.out, {**told, **settings, "engine": engine.settings(), "fingerprint": images})


def _report_rows(options, rows: pd.DataFrame, text: str, figure) -> None:
    """Write rows, their table and their figure to OUT, and the table, or the rows as JSON, to stdout."""
    write_report(options.out, rows, text, figure)
    Report(options.json).values(as_objects(rows))
    Report(options.json).line(text)


def _recipes(options) -> tuple[dict[str, Recipe | None], dict[float | str, LearnRecipe]]:
    """(what makes the images, what trains on them), by name. Raises ValueError for options that exclude each other."""
    design, preset, size, steps = options.design, options.preset, options.size, options.learner_steps
    if design and options.methods:
        raise ValueError(f"--design {design} has methods of its own: leave --methods out")
    if design in LEARNERS and options.radii:
        raise ValueError(f"--design {design} has learners of its own: leave --radii out")
    crafts, learners = methods.sweep_recipes(options.methods or METHODS, options.radii or (0, 4), preset, size=size)
    crafts = DESIGNS[design](preset, size) if design else crafts
    if options.measure_noise and not any(recipe and recipe.net for recipe in crafts.values()):
        raise ValueError("none of these methods adds noise that could be measured: leave --measure-noise out")
    return crafts, {r: lasting(recipe, steps) if steps else recipe for r, recipe in learners.items()}


def sweep(options) -> None:
    """semkit sweep: learners over methods, training radii and seeds; rows, a table and a figure."""
    check_place(options.images, options.out)
    engine, design, steps, seeds = engine_of(options), options.design, options.learner_steps, _seeds(options)
    crafts, learners = _recipes(options)
    check_scheduler(Lab(engine, scheduler=options.scheduler))  # before images are read, which may take long
    with bars() as on_step:
        split = _split(options, Report(options.json), on_step)
        if design in LEARNERS:
            learners = LEARNERS[design](options.preset, options.size, split, steps)
            if design == "cuda-defences" and not split.spare:
                announce("no fine-tuned learners: they begin with the test images that --test-limit N leaves over")
        after = dict(countermeasures=options.countermeasures)
        recipes = grid_recipes(split, crafts, learners, **after)  # raises before the folder is claimed
        _claim(
            options, split, engine, methods=options.methods or METHODS, design=design, radii=options.radii or (0, 4),
            **after,
        )  # fmt: skip
        times = f"{len(options.countermeasures)} countermeasures x " if options.countermeasures else ""
        announce(
            f"{split.train!r}, {len(split.test)} test images: {len(crafts)} methods x {times}{len(learners)} ways x "
            f"{len(seeds)} seeds in {engine.precision}, {_cost(recipes, split.train, engine, len(seeds))}"
        )
        lab = Lab(engine, options.out / "runs", on_step, workers=options.workers, scheduler=options.scheduler)
        rises = options.measure_noise and not options.countermeasures
        rows = grid(split, crafts, learners, keep_nets=rises, seeds=seeds, lab=lab, **after)
        rows.insert(0, "preset", options.preset + f", {steps} learner steps" * bool(steps))
        _report_rows(options, rows, table(rows), sweep_figure(rows, split.train, crafts, lab))
        if options.measure_noise:
            _measure(options, split, crafts, learners, rows["preset"][0], lab)


def demo(options) -> None:
    """semkit demo: a sweep over the embedded images."""
    sweep(options)


def sweep_figure(rows: pd.DataFrame, train: ImageSet, crafts: Mapping[str, Recipe | None], lab: Lab):
    """The Figure of a sweep of countermeasures, or of named methods that add noise; None for any other.

    rows: with the columns of study.grid and `preset`. The noise is drawn from -radius to +radius of its own recipes.
    """
    from semkit.analysis import figures  # matplotlib takes a second that the other commands need not pay

    seeds = rows["seed"].unique()
    many = f"{len(seeds)} seed" + "s" * (len(seeds) > 1)
    title = f"{train.name}: {len(train)} training images, {rows['preset'][0]} preset, {many}"
    about = dict(title=title, chance=1 / len(train.classes))
    if "countermeasure" in rows:
        return figures.countermeasures_figure(rows, **about)
    makers = {method: recipe for method, recipe in crafts.items() if recipe}
    if any(recipe.radius is None for recipe in makers.values()) or not crafts.keys() <= methods.METHODS.keys():
        return None
    place = [train.labels.tolist().index(k) for k in range(min(6, len(train.classes)))]
    made = {
        method: crafted_noise(train, recipe, seed=int(seeds[0]), lab=lab)[0].levels[place]
        for method, recipe in makers.items()
    }
    radius = max((recipe.radius for recipe in makers.values()), default=0)
    return figures.protection_figure(rows, train.images[place], made, radius=radius, **about)


def _measure(
    options, split: Split, crafts: Mapping[str, Recipe | None], learners: Mapping, preset: str, lab: Lab
) -> None:
    """Write what perturbations do to every noise, and to the learners that no countermeasure changed."""
    reference, how = reference_recipe(options.preset, options.size), dict(seeds=_seeds(options), lab=lab)
    found = {
        "noise.csv": noise_rows(split, crafts, reference=reference, **how),
        "losses.csv": loss_rows(split, crafts, **how),
    }
    if not options.countermeasures:
        found["rises.csv"] = rise_rows(split, crafts, learners, **how)
    for name, rows in found.items():
        rows.insert(0, "preset", preset)
        write_rows(rows, options.out / name)


def transform(options) -> None:
    """semkit transform: a classifier behind an adversarial-example transform under attacks, ERM and AT beside it."""
    check_place(options.images, options.out)
    engine, radius, attacked = engine_of(options), options.radius, options.attacked
    _, learners = methods.sweep_recipes((), (0, radius), options.preset, size=options.size)
    if options.learner_steps:
        learners[0] = lasting(learners[0], options.learner_steps)
    with bars() as on_step:
        split, behind = _split(options, Report(options.json), on_step), Transform(options.net)
        _claim(options, split, engine, radius=radius, attacked=attacked, net=behind.content)
        train, trained = split.train, [*learners.values(), learners[0]]
        announce(
            f"{options.seeds * len(trained)} learners on {train!r}, {_cost(trained, train, engine, options.seeds)}; "
            f"then {attacked} test images are attacked"
        )
        lab = Lab(engine, options.out / "runs", on_step)
        rows = defence_rows(split, behind, learners, radius=radius, attacked=attacked, seeds=_seeds(options), lab=lab)
        title = f"{train.name}: {len(train)} training images, {rows['n'][0]} attacked at {radius:g}/255"
        figure = defences_figure(rows, chance=1 / len(train.classes), title=title)
        _report_rows(options, rows, defences_table(rows), figure)


def bench(options) -> None:
    """semkit bench: the engine beside plain PyTorch; reports the table."""
    from semkit.analysis.speed import QUICK, Plan, measure

    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # fails before minutes of work, not after
    names = ("nets", "batch", "rounds", "samples", "attack_steps")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    report, plan = Report(options.json), replace(QUICK if options.quick else Plan(), **given)
    with bars() as on_step:
        engine = engine_of(options)
        announce(f"{' and '.join(plan.nets)} on {engine.device} in {engine.precision}, rounds: {plan.rounds}")
        result = measure(plan, Lab(engine, on_step=on_step))
    report.values(result)
    report.line(bench_tables(result))
    if options.out:
        write_bench(result, options.out)


def gpu_check(options) -> None:
    """semkit gpu-check: a prepared run on a GPU, part by part within a time limit; reports its rows."""
    from semkit.analysis.gpucheck import TINY, Scale, run

    check_place(options.images, options.out)
    report = Report(options.json)
    with bars() as on_step:
        split, lab = _split(options, report, on_step), Lab(engine_of(options), on_step=on_step)
        rows = run(split, options.out, limit=options.time_limit, scale=TINY if options.tiny else Scale(), lab=lab)
    report.values({"rows": as_objects(rows)})
    report.line(rows.drop(columns=["curve", "engine"], errors="ignore").to_string(index=False, na_rep=""))
