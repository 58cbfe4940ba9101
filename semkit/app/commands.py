"""The work of every command: options become recipes, results become lines, JSON, tables and figures."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd

from semkit.analysis import cost, survival
from semkit.analysis.cluster import check_scheduler
from semkit.analysis.designs import DESIGNS, LEARNERS, METHODS, reference_recipe
from semkit.analysis.measure import loss_rows, noise_rows, rise_rows
from semkit.analysis.report import as_objects, bench_figure, bench_tables, table, write_report, write_rows
from semkit.analysis.statistics import interval
from semkit.analysis.study import grid, grid_recipes, learned_net, learned_row
from semkit.app import checking, folder
from semkit.app.checking import job
from semkit.app.cli import FAILED, Report, announce, bars, lab
from semkit.app.options import engine_of, own_values, reading
from semkit.countermeasures.registry import counter
from semkit.countermeasures.transform import Transform, transformed
from semkit.images.files import duration, shown
from semkit.images.imageset import ImageSet, Split, Storage, limit_test, not_among
from semkit.images.loading import load
from semkit.lessons.defences import defence_rows, defences_figure, defences_table
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab, OnStep
from semkit.protections import conversion, methods
from semkit.protections.base import Recipe
from semkit.protections.methods import PROTECTIONS
from semkit.training.recipes import LearnRecipe, lasting, learn_recipe

MOST_SHOWN = 10


def protect(options) -> None:
    """semkit protect: protected copies of images; reports what was written."""
    report, engine = Report(options.json), engine_of(options)
    own = own_values(options.method, vars(options))
    recipe = PROTECTIONS[options.method].recipe(options.preset, size=options.size, **own)

    def say_cost(images: ImageSet) -> None:
        if recipe.net:
            what = f"{options.method.upper()} noise for {len(images)} images, {options.preset} preset, {recipe.net}"
            side = recipe.augment.output_size(options.size)
            announce(f"{what} at {side} px: {cost.in_words([recipe], images, engine, 1)}")

    with bars() as on_step:
        made = folder.protect(
            options.images, options.out, recipe, seed=options.seed, fraction=options.fraction, resume=options.resume,
            lab=Lab(engine, on_step=on_step, checkpoint_every=options.checkpoint_every), on_start=say_cost,
            hold=options.hold, **reading(options),
        )  # fmt: skip
    report.values(made)
    _tell_protected(report, made, options.out)


def _tell_protected(report: Report, made: dict, out: Path) -> None:
    if made["radius"] is None:
        bound, took = f"{made['bound']}, here by up to {made['largest_change']}", "filtering and writing"
    else:
        bound, took = f"radius {made['radius']:g}", "crafting"
    alike = "" if made["ssim"] is None else f", SSIM {made['ssim']}"  # of images of 11 pixels and more
    report.line(
        f"{made['protected']} of {made['images']} images protected in {shown(out / 'images')} "
        f"({bound}, PSNR {made['psnr_db']} dB{alike}); {took} took {duration(made['seconds'])}, images {made['held']}"
    )
    if same := made["unchanged_files"]:
        report.line(f"{same} of the protected files have the pixels of their originals: nothing changed in them")
    report.skipped(made["skipped"])
    report.left_out(made["ignored"], "report.json")


def check(options) -> int | None:
    """semkit check: every protected file against its original; FAILED, with the first offenders, if one is not right.

    The key in the environment counts for filtered images only.
    """
    report, key, made = Report(options.json), options.key, checking.read_report(options.out)
    if key is None and made["radius"] is None:
        variables = [option.variable for option in PROTECTIONS[made["method"]].options if option.private]
        key = next(map(os.environ.get, variables), None)
    how = dict(radius=options.radius, key=key, root=options.data)
    with bars() as on_step:
        found = checking.check(options.images, options.out, **how, on_step=on_step)
    report.values(found)
    problems = found["problems"]
    for problem in problems[:MOST_SHOWN]:
        report.line(problem)
    if (more := len(problems) - MOST_SHOWN) > 0:
        report.line(f"and {more} more")
    report.skipped(found["skipped"], "not protected, unreadable")
    against = "against the filters of the key" if key else "without the key: size, mode and name, not the values"
    if found["radius"] is not None:
        against = f"against radius {found['radius']:g}"
    same = f", {found['unchanged']} unchanged" if found["unchanged"] else ""
    report.line(f"{found['checked']} files checked {against}: {len(problems)} problems{same}")
    return FAILED if problems else None


def inspect(options) -> None:
    """semkit inspect: what each countermeasure leaves of a folder's noise, and what kind of noise it is."""
    report, names = Report(options.json), options.countermeasures or survival.SEEN
    with bars() as on_step:
        told, rows = checking.inspected(options.images, options.out, names, root=options.data, on_step=on_step)
    if options.figure:
        survival.survival_figure(rows, told, title=f"Noise in {shown(options.out)}", file=options.figure)
    report.values({**told, "survival": as_objects(rows)})
    report.line(survival.in_words(told, rows))


def _seeds(options) -> range:
    return range(options.seed, options.seed + options.seeds)


def _split(options, report: Report, on_step: OnStep) -> Split:
    """IMAGES after --limit, --without, --protected and --test-limit; says which files were left out.

    --without is about the originals, because protected images differ from them in every byte. What has to lie on a disk
    lies on that of --out or --cache.
    """
    folder.check_clean(options.images)
    if at := options.out or options.cache:
        folder.check_place(options.images, at)
    told, place = job(on_step, "reading images"), Storage(options.hold, at)
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
        split = checking.protected_split(split, options.images, options.protected)
    return limit_test(replace(split, train=split.train.take(kept)), options.test_limit)


def learn(options) -> None:
    """semkit learn: fresh learners on images, protected or not; reports their accuracy on clean test images."""
    report, engine, radius, rows = Report(options.json), engine_of(options), options.perturbation_radius, []
    recipe = learn_recipe(
        options.preset, perturbation_radius=radius, norm=options.norm, learner=options.learner, size=options.size
    )
    if options.save and options.seeds > 1:
        raise ValueError("one net can be saved: --seeds 1")
    with bars() as on_step:
        split = _split(options, report, on_step)
        train, recipe = counter(split.train, recipe, options.countermeasure, engine, split.spare)
        kind = f"AT {radius:g} ({options.norm})" if radius else "ERM"
        passes = cost.in_words([recipe], train, engine, options.seeds)
        announce(f"{options.seeds} x {kind}: {recipe.model} on {train!r}, {passes}")
        for seed in _seeds(options):
            lab = Lab(engine, options.cache, on_step, f"training, seed {seed}")
            if options.save:
                row, _ = learned_net(train, split.test, recipe, file=options.save, seed=seed, lab=lab)
            else:
                row = learned_row(train, split.test, recipe, seed=seed, lab=lab)
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


def _claim(options, split: Split, engine: Engine, **settings) -> None:
    """Claim OUT for these settings; raises OutputError if its rows are of other images, recipes or engines."""
    settings |= {"engine": engine.settings(), "fingerprint": [split.train.fingerprint, split.test.fingerprint]}
    names = ("command", "preset", "learner_steps", "surrogate", "learner")
    folder.claim(options.out, {name: getattr(options, name, None) for name in names} | settings)


def _report_rows(options, rows: pd.DataFrame, text: str, figure) -> None:
    """Write rows, their table and their figure to OUT, and the table, or the rows as JSON, to stdout."""
    write_rows(rows, options.out / "rows.csv")
    write_report(options.out, text, figure)
    Report(options.json).values(as_objects(rows))
    Report(options.json).line(text)


def _recipes(options) -> tuple[dict[str, Recipe | None], dict[float | str, LearnRecipe]]:
    """(what makes the images, what trains on them), by name. Raises ValueError for options that exclude each other."""
    design, preset, size, steps = options.design, options.preset, options.size, options.learner_steps
    if design and (options.methods or options.surrogate):
        raise ValueError(f"--design {design} has methods of its own: leave --methods and --surrogate out")
    if design in LEARNERS and (options.radii or options.learner):
        raise ValueError(f"--design {design} has learners of its own: leave --radii and --learner out")
    what = options.methods or METHODS, options.radii or (0, 4), preset
    crafts, learners = methods.sweep_recipes(*what, size=size, surrogate=options.surrogate, learner=options.learner)
    crafts = DESIGNS[design](preset, size) if design else crafts
    if options.measure_noise and not any(recipe and recipe.net for recipe in crafts.values()):
        raise ValueError("none of these methods adds noise that could be measured: leave --measure-noise out")
    return crafts, {r: lasting(recipe, steps) if steps else recipe for r, recipe in learners.items()}


def sweep(options) -> None:
    """semkit sweep, and semkit demo over the embedded images: rows, a table and a figure."""
    from semkit.analysis import figures, pictures  # matplotlib takes a second that other commands need not pay

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
            f"{len(seeds)} seeds in {engine.precision}, {cost.in_words(recipes, split.train, engine, len(seeds))}"
        )
        lab = Lab(engine, options.out / "runs", on_step, workers=options.workers, scheduler=options.scheduler)
        rises = options.measure_noise and not options.countermeasures
        rows = grid(split, crafts, learners, keep_nets=rises, seeds=seeds, lab=lab, **after)
        nets = [f"{role} {net}" for role in ("learner", "surrogate") if (net := getattr(options, role))]
        rows.insert(0, "preset", ", ".join([options.preset, *[f"{steps} learner steps"] * bool(steps), *nets]))
        _report_rows(options, rows, table(rows), figures.sweep_figure(rows, split.train, crafts, lab))
        if options.strips:
            pictures.write_strips(split.train, crafts, seed=options.seed, lab=lab, out=options.out / "strips")
        if options.measure_noise:
            _measure(options, split, crafts, learners, rows["preset"][0], lab)


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
    engine, radius, attacked = engine_of(options), options.radius, options.attacked
    _, learners = methods.sweep_recipes((), (0, radius), options.preset, size=options.size)
    if options.learner_steps:
        learners[0] = lasting(learners[0], options.learner_steps)
    with bars() as on_step:
        split, behind = _split(options, Report(options.json), on_step), Transform(options.net)
        transformed(split.test.limit(attacked).images[:1], behind, engine)  # raises before the folder is claimed
        _claim(options, split, engine, radius=radius, attacked=attacked, net=behind.content)
        train, trained = split.train, [*learners.values(), learners[0]]
        announce(
            f"{options.seeds * len(trained)} learners on {train!r}, "
            f"{cost.in_words(trained, train, engine, options.seeds)}; then {attacked} test images are attacked"
        )
        lab = Lab(engine, options.out / "runs", on_step)
        rows = defence_rows(split, behind, learners, radius=radius, attacked=attacked, seeds=_seeds(options), lab=lab)
        title = f"{train.name}: {len(train)} training images, {rows['n'][0]} attacked at {radius:g}/255"
        figure = defences_figure(rows, chance=1 / len(train.classes), title=title)
        _report_rows(options, rows, defences_table(rows), figure)


def bench(options) -> None:
    """semkit bench: the engine beside plain PyTorch; reports the table."""
    from semkit.analysis.speed import QUICK, Plan, measure

    engine = engine_of(options)
    if options.out:
        folder.check_place(None, options.out)
        folder.claim(options.out, {"command": "bench"})  # fails before minutes of work, not after
    names = ("nets", "batch", "rounds", "samples", "attack_steps")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    report, plan = Report(options.json), replace(QUICK if options.quick else Plan(), **given)
    with bars() as on_step:
        announce(f"{' and '.join(plan.nets)} on {engine.device} in {engine.precision}, rounds: {plan.rounds}")
        result = measure(plan, Lab(engine, on_step=on_step))
    report.values(result)
    report.line(bench_tables(result))
    if options.out:
        folder.write_record(options.out / "bench.json", result)
        write_report(options.out, bench_tables(result), bench_figure(result))


def gpu_check(options) -> None:
    """semkit gpu-check: a prepared run on a GPU, part by part within a time limit; reports its rows."""
    from semkit.analysis.gpucheck import TINY, Scale, run

    with bars() as on_step:
        split, lab = _split(options, report := Report(options.json), on_step), Lab(engine_of(options), on_step=on_step)
        _claim(options, split, lab.engine, tiny=options.tiny)
        rows = run(split, options.out, limit=options.time_limit, scale=TINY if options.tiny else Scale(), lab=lab)
    report.values({"rows": as_objects(rows)})
    report.line(rows.drop(columns=["curve", "engine"], errors="ignore").to_string(index=False, na_rep=""))


def convert(options) -> None:
    """semkit convert: the noise of SRC as DST, whose suffix says the kind; reports shape and radius."""
    report, to = Report(options.json), options.destination
    how = dict(radius=options.radius, unit=options.unit, class_wise=options.class_wise, overwrite=options.overwrite)
    noise = conversion.convert(options.source, to, **how)
    shape = list(noise.levels.shape)
    report.values({"destination": to, "shape": shape, "radius": noise.radius})
    report.line(f"{shown(to)}: {'x'.join(map(str, shape))}, radius {noise.radius:g}")


def page(options) -> None:
    """semkit page: one HTML file with sliders; a file that is no page of this command is left alone."""
    from semkit.lessons.page import write  # matplotlib takes a second that the other commands need not pay

    announce(f"{shown(options.out)}, {write(options.out, options.results) / 1000:.0f} kB: open it in a browser")


COMMANDS: dict[str, Callable] = {  # name -> what does its work, given the options; returns an exit code, None if fine
    "demo": sweep, "sweep": sweep, "protect": protect, "transform": transform, "check": check, "inspect": inspect,
    "learn": learn, "convert": convert, "bench": bench, "gpu-check": gpu_check, "lab": lab, "page": page,
}  # fmt: skip
