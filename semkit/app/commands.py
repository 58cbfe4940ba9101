"""The commands, one function each: options become recipes and plain arguments of the library, results a report."""

import os
from dataclasses import replace
from pathlib import Path

from semkit.analysis import survival
from semkit.analysis.cluster import check_scheduler
from semkit.analysis.cost import seconds_of
from semkit.analysis.designs import DESIGNS, LEARNERS, METHODS, reference_recipe
from semkit.analysis.report import as_objects, bench_tables, write_bench, write_report
from semkit.analysis.statistics import interval
from semkit.analysis.study import learned_net, learned_row
from semkit.app import checking, folder
from semkit.app.options import own_values
from semkit.app.outputs import check_place, claim, read_report
from semkit.app.progress import FAILED, Report, announce, bars, duration
from semkit.app.sweeps import Sweep, cost_in_words
from semkit.countermeasures.registry import counter
from semkit.countermeasures.transform import Transform
from semkit.images.files import atomic_write, shown
from semkit.images.imageset import ImageSet, Split, limit_test, not_among
from semkit.images.loading import load
from semkit.images.storage import Storage
from semkit.lessons.defences import defence_rows, defences_figure, defences_table
from semkit.nets.engine import FAST_PATHS, Engine
from semkit.nets.lab import Lab, OnStep
from semkit.protections import conversion
from semkit.protections.methods import PROTECTIONS, sweep_recipes
from semkit.training.learning import LearnRecipe
from semkit.training.presets import lasting, learn_recipe

MOST_SHOWN = 10


def _engine(options) -> Engine:
    off = {name: value for path in options.switch_off for name, value in FAST_PATHS[path].items()}
    return Engine(options.device, options.precision, compile=options.compile, **off)


def _seeds(options) -> range:
    return range(options.seed, options.seed + options.seeds)


def _reading(options) -> dict:
    """Which images are meant, beside IMAGES itself: keywords of `load` and `folder.protect`."""
    names = ("size", "limit", "download", "skip_unreadable")
    return {"root": options.data, **{name: getattr(options, name) for name in names}}


def _split(options, report: Report, on_step: OnStep) -> Split:
    """IMAGES as --limit, --without, --protected and --test-limit have them; says which files were left out.

    --without is about the originals, because protected images differ from them in every byte. What has to lie on a disk
    lies on that of --out or --cache.
    """
    told, place = folder.job(on_step, "reading images"), Storage(options.hold, options.out or options.cache)
    how = dict(_reading(options), seed=options.split_seed, storage=place, on_step=told)
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


def protect(options) -> None:
    """semkit protect: protected copies of images; reports what was written."""
    report, engine = Report(options.json), _engine(options)
    recipe = PROTECTIONS[options.method].recipe(
        options.preset, size=options.size, **own_values(options.method, vars(options))
    )

    def say_cost(images: ImageSet) -> None:
        if passes := recipe.cost(len(images)).total:
            seconds = seconds_of([recipe], len(images), len(images.classes), options.size, engine)
            announce(
                f"{options.method.upper()} noise for {len(images)} images, {options.preset} preset: {passes:,} passes "
                f"of {recipe.net} at {recipe.augment.output_size(options.size)} px on {engine.device}, "
                f"{'at most ' if options.resume else ''}about {duration(seconds)}"
            )

    with bars() as on_step:
        made = folder.protect(
            options.images, options.out, recipe, seed=options.seed, fraction=options.fraction, resume=options.resume,
            lab=Lab(engine, on_step=on_step), on_start=say_cost, checkpoint_every=options.checkpoint_every,
            hold=options.hold, **_reading(options),
        )  # fmt: skip
    report.values(made)
    _tell_protected(report, made, options.out)


def _tell_protected(report: Report, made: dict, out: Path) -> None:
    if made["radius"] is None:
        bound, took = f"{made['bound']}, here by up to {made['largest_change']}", "filtering and writing"
    else:
        bound, took = f"radius {made['radius']:g}", "crafting"
    report.line(
        f"{made['protected']} of {made['images']} images protected in {shown(out / 'images')} "
        f"({bound}, PSNR {made['psnr_db']} dB, SSIM {made['ssim']}); {took} took {duration(made['seconds'])}, "
        f"images {made['held']}"
    )
    if same := made["unchanged_files"]:
        report.line(f"{same} of the protected files have the pixels of their originals: nothing changed in them")
    report.skipped(made["skipped"])
    report.left_out(made["ignored"], "report.json")


def check(options) -> int | None:
    """semkit check: every protected file against its original; FAILED, with the first offenders, if one is not right.

    The key in the environment counts for filtered images only.
    """
    report, key, made = Report(options.json), options.key, read_report(options.out)
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


def learn(options) -> None:
    """semkit learn: fresh learners on images, protected or not; reports their accuracy on clean test images."""
    report, engine, radius = Report(options.json), _engine(options), options.perturbation_radius
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
        cost = cost_in_words([recipe], train, engine, options.seeds)
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
    """Leave rows, table and figure of other images, recipe or engine alone; some settings may grow."""
    told = {name: getattr(options, name) for name in ("command", "preset", "learner_steps")}
    images = [split.train.fingerprint, split.test.fingerprint]
    claim(options.out, {**told, **settings, "engine": engine.settings(), "fingerprint": images})


def sweep(options) -> None:
    """semkit sweep: learners over methods, training radii and seeds; rows, a table and a figure."""
    check_place(options.images, options.out)
    report, engine, design, steps = Report(options.json), _engine(options), options.design, options.learner_steps
    preset, size, countermeasures = options.preset, options.size, options.countermeasures
    if design and options.methods:
        raise ValueError(f"--design {design} has methods of its own: leave --methods out")
    if design in LEARNERS and options.radii:
        raise ValueError(f"--design {design} has learners of its own: leave --radii out")
    methods, radii = options.methods or METHODS, options.radii or (0, 4)
    crafts, learners = sweep_recipes(methods, radii, preset, size=size)
    crafts = DESIGNS[design](preset, size) if design else crafts
    if options.measure_noise and not any(recipe and recipe.net for recipe in crafts.values()):
        raise ValueError("none of these methods adds noise that could be measured: leave --measure-noise out")
    learners = {r: lasting(recipe, steps) if steps else recipe for r, recipe in learners.items()}
    check_scheduler(Lab(engine, scheduler=options.scheduler))  # before images are read, which may take long
    with bars() as on_step:
        split = _split(options, report, on_step)
        if design in LEARNERS:
            learners = LEARNERS[design](preset, size, split, steps)
            if design == "cuda-defences" and not split.spare:
                announce("no fine-tuned learners: they begin with the test images that --test-limit N leaves over")
        named = preset + f", {steps} learner steps" * bool(steps)
        made = Sweep(split, crafts, learners, countermeasures, _seeds(options), named)
        made.recipes()  # raises before the folder is claimed
        _claim(options, split, engine, methods=methods, design=design, radii=radii, countermeasures=countermeasures)
        announce(made.in_words(engine))
        lab = Lab(engine, options.out / "runs", on_step, workers=options.workers, scheduler=options.scheduler)
        rows, text = made.write(options.out, lab, reference_recipe(preset, size) if options.measure_noise else None)
    report.values(as_objects(rows))
    report.line(text)


def demo(options) -> None:
    """semkit demo: a sweep over the embedded images."""
    sweep(options)


def transform(options) -> None:
    """semkit transform: a classifier behind an adversarial-example transform under attacks, ERM and AT beside it."""
    check_place(options.images, options.out)
    report, engine, radius, attacked = Report(options.json), _engine(options), options.radius, options.attacked
    _, learners = sweep_recipes((), (0, radius), options.preset, size=options.size)
    if options.learner_steps:
        learners[0] = lasting(learners[0], options.learner_steps)
    with bars() as on_step:
        split, behind = _split(options, report, on_step), Transform(options.net)
        _claim(options, split, engine, radius=radius, attacked=attacked, net=behind.content)
        trained = [*learners.values(), learners[0]]
        announce(
            f"{options.seeds * len(trained)} learners on {split.train!r}, "
            f"{cost_in_words(trained, split.train, engine, options.seeds)}; then {attacked} test images are attacked"
        )
        lab = Lab(engine, options.out / "runs", on_step)
        rows = defence_rows(split, behind, learners, radius=radius, attacked=attacked, seeds=_seeds(options), lab=lab)
        text, train = defences_table(rows), split.train
        title = f"{train.name}: {len(train)} training images, {rows['n'][0]} attacked at {radius:g}/255"
        write_report(options.out, rows, text, defences_figure(rows, chance=1 / len(train.classes), title=title))
    report.values(as_objects(rows))
    report.line(text)


def convert(options) -> None:
    """semkit convert: the noise of SRC as DST, whose suffix says the kind; reports shape and radius."""
    report, to = Report(options.json), options.destination
    how = dict(radius=options.radius, unit=options.unit, class_wise=options.class_wise, overwrite=options.overwrite)
    noise = conversion.convert(options.source, to, **how)
    shape = list(noise.levels.shape)
    report.values({"destination": to, "shape": shape, "radius": noise.radius})
    report.line(f"{shown(to)}: {'x'.join(map(str, shape))}, radius {noise.radius:g}")


def bench(options) -> None:
    """semkit bench: the engine against plain PyTorch; reports the table."""
    from semkit.analysis.speed import QUICK, Plan, measure

    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # fails before minutes of work, not after
    names = ("nets", "batch", "rounds", "samples", "attack_steps")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    report, plan = Report(options.json), replace(QUICK if options.quick else Plan(), **given)
    with bars() as on_step:
        engine = _engine(options)
        announce(f"{' and '.join(plan.nets)} on {engine.device} in {engine.precision}, rounds: {plan.rounds}")
        result = measure(plan, Lab(engine, on_step=on_step))
    report.values(result)
    report.line(bench_tables(result))
    if options.out:
        write_bench(result, options.out)


def lab(options) -> None:
    """semkit lab: JupyterLab at a notebook, in this folder or in the notebook's own."""
    notebook = Path(options.notebook)
    if not notebook.exists():
        raise ValueError(f"no notebook {shown(notebook)}; run semkit lab in semkit's own folder, or name a notebook")
    _check_account()
    notebook = notebook.resolve()
    here = Path.cwd() if notebook.is_relative_to(Path.cwd()) else notebook.parent
    from jupyterlab.labapp import LabApp  # takes a second that the other commands need not pay

    LabApp.launch_instance([str(notebook), f"--ServerApp.root_dir={here}"])


def page(options) -> None:
    """semkit page: one HTML file, written whole; a file that is no page of this command is left alone."""
    from semkit.lessons.page import SIGNATURE, html  # with it comes matplotlib, which other commands need not load

    out = Path(options.out)
    if out.exists() and not (out.is_file() and SIGNATURE in out.read_text(errors="replace")):
        raise ValueError(f"{shown(out)} is there and is no page of semkit; name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, html(Path(options.results)).encode())
    announce(f"{shown(out)}, {out.stat().st_size / 1000:.0f} kB: open it in a browser")


def _check_account() -> None:
    """Raises ValueError for root, whom Jupyter refuses with a page of log, unless Jupyter's configuration allows it."""
    from jupyter_server.serverapp import ServerApp

    if hasattr(os, "geteuid") and os.geteuid() == 0:
        settings = ServerApp()
        settings.load_config_file()
        if not settings.allow_root:
            raise ValueError(
                "JupyterLab does not run as root: use another account, or start it by jupyter lab --allow-root"
            )
