"""The commands that make and read protected folders: semkit protect and semkit check."""

import os

from semkit.analysis.cost import seconds_of
from semkit.app.filtered import protect_by_filters
from semkit.app.folder import protect as protect_by_noise
from semkit.app.inputs import engine_of, where
from semkit.app.methodoptions import KEY_VARIABLE, settle
from semkit.app.progress import progress
from semkit.app.protected import check as check_folder
from semkit.app.protected import read_report
from semkit.app.telling import FAILED, FINE, announce, duration, print_json, tell, tell_left_out
from semkit.images.files import shown
from semkit.nets.lab import Lab
from semkit.protections.cuda import ClassFilters
from semkit.protections.presets import craft_recipe

MOST_SHOWN = 10


def protect(options) -> int:
    """semkit protect: images get noise, or (cuda) the filters of their classes; reports what was written."""
    report, bound, took = (_filter if settle(options).method == "cuda" else _craft)(options)
    print_json(options, report)
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


def _filter(options) -> tuple[dict, str, str]:
    recipe = ClassFilters(options.kernel, options.strength, fraction=options.fraction)
    with progress() as on_step:
        report = protect_by_filters(
            options.images, options.out, recipe, options.key, seed=options.seed, resume=options.resume, on_step=on_step,
            hold=options.hold, **where(options),
        )  # fmt: skip
    return report, f"{report['bound']}, here by up to {report['largest_change']}", "filtering and writing"


def _craft(options) -> tuple[dict, str, str]:
    engine = engine_of(options)
    recipe = craft_recipe(
        options.method, options.preset, radius=options.radius, perturbation_radius=options.perturbation_radius,
        surrogate=options.surrogate, size=options.size, class_wise=options.class_wise,
    )  # fmt: skip
    with progress() as on_step:
        report = protect_by_noise(
            options.images, options.out, recipe, seed=options.seed, fraction=options.fraction, resume=options.resume,
            lab=Lab(engine, on_step=on_step), on_start=lambda images: _announce_cost(options, recipe, images, engine),
            checkpoint_every=options.checkpoint_every, hold=options.hold, **where(options),
        )  # fmt: skip
    return report, f"radius {report['radius']:g}", "crafting"


def _announce_cost(options, recipe, images, engine) -> None:
    n, side = len(images), recipe.augment.output_size(options.size)
    seconds = seconds_of([recipe], n, len(images.classes), options.size, engine)
    announce(
        f"{options.method.upper()} noise for {n} images, {options.preset} preset: {recipe.cost(n).total:,} passes of "
        f"{recipe.surrogate} at {side} px on {engine.device}, "
        f"{'at most ' if options.resume else ''}about {duration(seconds)}"
    )


def check(options) -> int:
    """semkit check: every protected file against its original; FAILED, with the first offenders, if one is not right.

    The key in the environment counts for filtered images only.
    """
    key = options.key
    if key is None and read_report(options.out)["radius"] is None:
        key = os.environ.get(KEY_VARIABLE)
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
