"""The commands about images, noise files and notebooks, and the table of all commands: options become recipes."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from semkit.analysis import survival
from semkit.analysis.cost import seconds_of
from semkit.analysis.report import as_objects
from semkit.app import checking, folder
from semkit.app.checking import read_report
from semkit.app.cli import FAILED, Report, announce, bars
from semkit.app.experiments import bench, demo, engine_of, gpu_check, learn, reading, sweep, transform
from semkit.images.files import duration, shown
from semkit.images.imageset import ImageSet
from semkit.nets.lab import Lab
from semkit.protections import conversion
from semkit.protections.methods import PROTECTIONS, options_of

MOST_SHOWN = 10


def _own_values(method: str, given: Mapping[str, object]) -> dict:
    """The values of the method's own options: as given, else a private one from the environment, else their defaults.

    Raises ValueError for options of other methods that were given, and for a private one that is nowhere.
    """
    protection, every = PROTECTIONS[method], options_of(PROTECTIONS)
    own = {option.name: option for option in protection.options}
    given = {name: value for name, value in given.items() if name in every and value is not None}
    if wrong := [every[name][0].flag for name in every if name in given.keys() - own]:
        because = f" ({protection.bound})" if protection.bound else ""
        raise ValueError(f"{', '.join(wrong)}: not for --method {method}{because}")
    for name, option in own.items():
        if option.private and name not in given:
            if (value := os.environ.get(option.variable)) is None:
                place = f"put it into the environment variable {option.variable}"
                raise ValueError(f"--method {method} needs a private {name}: {place}")
            given[name] = value
    return {name: option.default for name, option in own.items()} | given


def protect(options) -> None:
    """semkit protect: protected copies of images; reports what was written."""
    report, engine = Report(options.json), engine_of(options)
    recipe = PROTECTIONS[options.method].recipe(
        options.preset, size=options.size, **_own_values(options.method, vars(options))
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
            hold=options.hold, **reading(options),
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


def convert(options) -> None:
    """semkit convert: the noise of SRC as DST, whose suffix says the kind; reports shape and radius."""
    report, to = Report(options.json), options.destination
    how = dict(radius=options.radius, unit=options.unit, class_wise=options.class_wise, overwrite=options.overwrite)
    noise = conversion.convert(options.source, to, **how)
    shape = list(noise.levels.shape)
    report.values({"destination": to, "shape": shape, "radius": noise.radius})
    report.line(f"{shown(to)}: {'x'.join(map(str, shape))}, radius {noise.radius:g}")


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
    """semkit page: one HTML file with sliders; a file that is no page of this command is left alone."""
    from semkit.lessons.page import write  # matplotlib takes a second that the other commands need not pay

    announce(f"{shown(options.out)}, {write(options.out, options.results) / 1000:.0f} kB: open it in a browser")


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


COMMANDS: dict[str, Callable] = {  # name -> what does its work, given the options; returns an exit code, None if fine
    "demo": demo, "sweep": sweep, "protect": protect, "transform": transform, "check": check, "inspect": inspect,
    "learn": learn, "convert": convert, "bench": bench, "gpu-check": gpu_check, "lab": lab, "page": page,
}  # fmt: skip
