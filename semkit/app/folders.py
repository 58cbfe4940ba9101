"""The commands that make and read protected folders: semkit protect and semkit check."""

import os

from semkit.analysis.cost import seconds_of
from semkit.app.checking import check as check_folder
from semkit.app.folder import protect as protect_folder
from semkit.app.inputs import engine_of, where
from semkit.app.outputs import read_report
from semkit.app.progress import progress
from semkit.app.telling import FAILED, FINE, announce, duration, print_json, tell, tell_left_out
from semkit.images.files import shown
from semkit.nets.lab import Lab
from semkit.protections.registry import PROTECTIONS, options_of

MOST_SHOWN = 10


def _own(options) -> dict:
    """The values of the method's own options: as given, else a private one from the environment, else their defaults.

    Raises ValueError for options of other methods that were given, and for a private one that is nowhere.
    """
    method, protection = options.method, PROTECTIONS[options.method]
    own = {option.name: option for option in protection.options}
    given = {name: getattr(options, name) for name in options_of(PROTECTIONS)}
    given = {name: value for name, value in given.items() if value is not None}
    if wrong := [option.flag for name, (option, _) in options_of(PROTECTIONS).items() if name in given.keys() - own]:
        because = f" ({protection.bound})" if protection.bound else ""
        raise ValueError(f"{', '.join(wrong)}: not for --method {method}{because}")
    for name, option in own.items():
        if option.private and name not in given:
            if (value := os.environ.get(option.variable)) is None:
                where_from = f"put it into the environment variable {option.variable}"
                raise ValueError(f"--method {method} needs a private {name}: {where_from}")
            given[name] = value
    return {name: option.default for name, option in own.items()} | given


def protect(options) -> int:
    """semkit protect: protected copies of images; reports what was written."""
    recipe = PROTECTIONS[options.method].recipe(options.preset, size=options.size, **_own(options))
    engine = engine_of(options)
    with progress() as on_step:
        report = protect_folder(
            options.images, options.out, recipe, seed=options.seed, fraction=options.fraction, resume=options.resume,
            lab=Lab(engine, on_step=on_step), on_start=lambda images: _announce_cost(options, recipe, images, engine),
            checkpoint_every=options.checkpoint_every, hold=options.hold, **where(options),
        )  # fmt: skip
    print_json(options, report)
    if report["radius"] is None:
        bound, took = f"{report['bound']}, here by up to {report['largest_change']}", "filtering and writing"
    else:
        bound, took = f"radius {report['radius']:g}", "crafting"
    tell(
        options,
        f"{report['protected']} of {report['images']} images protected in {shown(options.out / 'images')} "
        f"({bound}, PSNR {report['psnr_db']} dB, SSIM {report['ssim']}); {took} took {duration(report['seconds'])}, "
        f"images {report['held']}",
    )
    if same := report["unchanged_files"]:
        tell(options, f"{same} of the protected files have the pixels of their originals: nothing changed in them")
    for name in report["skipped"]:
        tell(options, f"skipped, unreadable: {shown(name)}")
    tell_left_out(options, report["ignored"], "report.json")
    return FINE


def _announce_cost(options, recipe, images, engine) -> None:
    n = len(images)
    if not (passes := recipe.cost(n).total):
        return
    seconds = seconds_of([recipe], n, len(images.classes), options.size, engine)
    announce(
        f"{options.method.upper()} noise for {n} images, {options.preset} preset: {passes:,} passes of {recipe.net} "
        f"at {recipe.augment.output_size(options.size)} px on {engine.device}, "
        f"{'at most ' if options.resume else ''}about {duration(seconds)}"
    )


def check(options) -> int:
    """semkit check: every protected file against its original; FAILED, with the first offenders, if one is not right.

    The key in the environment counts for filtered images only.
    """
    key, report = options.key, read_report(options.out)
    if key is None and report["radius"] is None:
        variables = [option.variable for option in PROTECTIONS[report["method"]].options if option.private]
        key = next(map(os.environ.get, variables), None)
    how = dict(radius=options.radius, key=key, root=options.data)
    with progress() as on_step:
        found = check_folder(options.images, options.out, **how, on_step=on_step)
    print_json(options, found)
    problems = found["problems"]
    for problem in problems[:MOST_SHOWN]:
        tell(options, problem)
    if (more := len(problems) - MOST_SHOWN) > 0:
        tell(options, f"and {more} more")
    for name in found["skipped"]:
        tell(options, f"not protected, unreadable: {shown(name)}")
    against = "against the filters of the key" if key else "without the key: size, mode and name, not the values"
    if found["radius"] is not None:
        against = f"against radius {found['radius']:g}"
    same = f", {found['unchanged']} unchanged" if found["unchanged"] else ""
    tell(options, f"{found['checked']} files checked {against}: {len(problems)} problems{same}")
    return FAILED if problems else FINE
