"""The command line: semkit demo, protect, check, learn, sweep, convert, lab."""

import argparse
import json
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from semkit import __version__
from semkit.models import MODELS
from semkit.presets import METHODS, PRESETS, check_name

FINE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse with one clear line, and the nearest known word, in place of a page of usage."""

    def error(self, message):
        raise SystemExit(_complain(f"{message} (see {self.prog} --help)"))


def _complain(message) -> int:
    print("semkit:", " ".join(str(message).split()), file=sys.stderr)
    return BAD_INPUT


def _word(known: tuple[str, ...], what: str):
    def parse(text: str) -> str:
        try:
            return check_name(text, known, what)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _count(least: int):
    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"a whole number >= {least} is needed, got {text}")
        return int(text)

    return parse


def _radius(text: str) -> float:
    from semkit.pixels import check_radius

    try:
        return check_radius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@contextmanager
def _progress():
    """An on_step(what, step, total, metrics) that draws a bar per job and returns True after Ctrl-C.

    The first Ctrl-C lets the step finish, so that the saved state is whole; the second one ends at once.
    """
    from tqdm import tqdm

    bars, stop = {}, []

    def interrupt(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    def on_step(what, step, total, metrics):
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars.clear()
            bars[what] = tqdm(total=total, desc=what, file=sys.stderr, leave=False, disable=None)
        bar = bars[what]
        bar.update(step - bar.n)
        numbers = {k: f"{v:.3f}" for k, v in metrics.items() if isinstance(v, float)}
        if numbers:
            bar.set_postfix(numbers, refresh=False)
        return bool(stop)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield on_step
    finally:
        signal.signal(signal.SIGINT, before)
        for bar in bars.values():
            bar.close()


def _say(options, text: str) -> None:
    """Told to a person on stdout; with --json stdout belongs to the report, so on stderr."""
    print(text, file=sys.stderr if getattr(options, "json", False) else sys.stdout, flush=True)


def _report(options, values) -> None:
    if options.json:
        print(json.dumps(values, indent=1))


def _engine(options):
    from semkit.engine import Engine

    return Engine(options.device, options.precision)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _protect(options) -> int:
    from semkit.engine import predict_seconds
    from semkit.models import build
    from semkit.presets import craft_recipe
    from semkit.protect import protect

    engine = _engine(options)
    recipe = craft_recipe(
        options.method, options.preset, radius=options.radius, perturbation_radius=options.perturbation_radius,
        surrogate=options.surrogate, size=options.size, class_wise=options.class_wise,
    )  # fmt: skip
    where = {"root": options.data, "download": options.download}
    how = dict(seed=options.seed, size=options.size, limit=options.limit, skip_unreadable=options.skip_unreadable, **where)

    def announce(images):
        cost = recipe.cost(len(images))
        surrogate = build(recipe.surrogate, len(images.classes), size=options.size)
        seconds = predict_seconds(surrogate, images.images[: recipe.sgd.batch], cost, engine)
        _say(options, f"{options.method.upper()} noise for {len(images)} images, {options.preset} preset: "
             f"{cost.total:,} passes of {recipe.surrogate} at {options.size} px, about {_seconds(seconds)} on {engine}")  # fmt: skip

    with _progress() as on_step:
        report = protect(
            options.images, options.out, recipe, fraction=options.fraction, resume=options.resume, engine=engine,
            on_step=on_step, on_start=announce, **how,
        )  # fmt: skip
    _report(options, report)
    if not options.json:
        print(f"{report['protected']} of {report['images']} images protected in {options.out}/images "
              f"(radius {report['radius']:g}, PSNR {report['psnr_db']} dB, SSIM {report['ssim']}); "
              f"crafting took {_seconds(report['seconds'])}")  # fmt: skip
        for name in report["skipped"]:
            print(f"skipped, unreadable: {name}")
        if report["ignored"]:
            print(f"{len(report['ignored'])} files are no images and were left out; report.json names them")
    return FINE


def _check(options) -> int:
    from semkit.protect import check

    with _progress() as on_step:
        found = check(options.images, options.out, radius=options.radius, root=options.data, on_step=on_step)
    _report(options, found)
    if not options.json:
        for problem in found["problems"][:10]:
            print(problem)
        if (more := len(found["problems"]) - 10) > 0:
            print(f"and {more} more")
        print(f"{found['checked']} files checked against radius {found['radius']:g}: {len(found['problems'])} problems")
    return FAILED if found["problems"] else FINE


def _learn(options) -> int:
    from semkit.data import load
    from semkit.measure import interval
    from semkit.presets import learn_recipe
    from semkit.protect import protected_split
    from semkit.study import learned_row

    engine, where = _engine(options), {"root": options.data}
    recipe = learn_recipe(
        options.preset, perturbation_radius=options.perturbation_radius, norm=options.norm, learner=options.learner
    )
    with _progress() as on_step:
        told = lambda done, total: on_step("reading images", done, total, {})  # noqa: E731
        split = load(
            options.images, size=options.size, seed=options.split_seed, limit=options.limit, download=options.download,
            skip_unreadable=options.skip_unreadable, on_step=told, **where,
        )  # fmt: skip
        if options.protected:
            split = protected_split(split, options.images, options.protected, **where)
        cost = recipe.cost(len(split.train)).total * options.seeds
        kind = f"AT {options.perturbation_radius:g} ({options.norm})" if options.perturbation_radius else "ERM"
        _say(options, f"{options.seeds} x {kind}: {recipe.model} on {split.train!r}, {cost:,} passes on {engine}")
        rows = []
        for seed in range(options.seed, options.seed + options.seeds):
            step = lambda *a, seed=seed: on_step(f"seed {seed}", *a)  # noqa: E731
            row = learned_row(split.train, split.test, recipe, seed=seed, engine=engine, cache=options.cache, on_step=step)
            rows.append({"seed": seed, **row})
            _say(options, f"seed {seed}: clean test accuracy last {row['last']:.3f}, best {row['best']:.3f}")
    mean, low, high = interval([row["last"] for row in rows])
    spread = {"mean": mean, "low": low, "high": high} if len(rows) > 1 else {"mean": mean}
    _report(options, {"images": repr(split.train), "test_images": len(split.test), "recipe": repr(recipe), "last": spread, "rows": rows})
    if len(rows) > 1:
        _say(options, f"last, mean of {len(rows)} seeds: {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    return FINE


def _sweep(options) -> int:
    from semkit.data import load
    from semkit.report import write_sweep

    with _progress() as on_step:
        told = lambda done, total: on_step("reading images", done, total, {})  # noqa: E731
        split = load(options.images, size=options.size, limit=options.limit, root=options.data, download=options.download, on_step=told)
        if options.test_limit:
            split = type(split)(split.train, split.test.limit(options.test_limit), split.skipped)
        table, rows = write_sweep(
            split, options.out, methods=options.methods, radii=options.radii, preset=options.preset,
            seeds=range(options.seed, options.seed + options.seeds), engine=_engine(options), on_step=on_step,
            say=lambda text: _say(options, text),
        )  # fmt: skip
    _report(options, rows)
    _say(options, table)
    return FINE


def _convert(options) -> int:
    from semkit.convert import convert

    noise = convert(options.source, options.destination, radius=options.radius, overwrite=options.overwrite)
    print(f"{options.destination}: {tuple(noise.levels.shape)}, radius {noise.radius:g}")
    return FINE


def _lab(options) -> int:
    from subprocess import run

    notebook = Path(options.notebook)
    if not notebook.exists():
        raise ValueError(f"no notebook {notebook}; semkit lab looks for it below the current folder")
    return run([sys.executable, "-m", "jupyterlab", str(notebook)], check=False).returncode


def _common(parser, *, images: bool = True) -> None:
    if images:
        parser.add_argument("images", metavar="IMAGES", help="shapes, cifar10, cifar100, svhn, or a folder with a sub-folder per class")
        parser.add_argument("--data", metavar="DIR", help="where torchvision's sets are (else $SEMKIT_DATA, else ~/.cache/semkit)")
        parser.add_argument("--download", action="store_true", help="let torchvision download the set")
        parser.add_argument("--limit", type=_count(2), metavar="N", help="N training images only, every class in its share")
        parser.add_argument("--size", type=_count(8), default=32, help="side to which images are resized for the nets (32)")
    parser.add_argument("--json", action="store_true", help="report as JSON on standard output")
    parser.add_argument("--seed", type=_count(0), default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (a GPU if there is one)")
    parser.add_argument("--precision", default="auto", type=_word(("auto", "float32", "bfloat16"), "precision"))


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(prog="semkit", description="Stable unlearnable examples: protect images, and measure how far that goes.")
    top.add_argument("--version", action="version", version=f"semkit {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name, run, text):
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    nets = _word(tuple(MODELS), "net")
    preset = dict(type=_word(PRESETS, "preset"), default="lesson", help="quick, lesson (the default) or paper")

    p = command("demo", _sweep, "The main job on the embedded images: noise, learners, a table and a figure.")
    _common(p, images=False)
    p.add_argument("--out", type=Path, default=Path("semkit-demo"), help="folder for table, figure and finished runs")
    p.add_argument("--seeds", type=_count(1), default=1, help="how many seeds, for intervals (1)")
    p.add_argument("--preset", **preset)
    p.set_defaults(
        images="shapes", data=None, download=False, limit=None, size=32, test_limit=None, methods=("clean", "em", "sem"), radii=(0, 4)
    )

    p = command("sweep", _sweep, "Learners over methods, training radii and seeds: rows, a table and a figure.")
    _common(p)
    p.add_argument("--out", type=Path, required=True, help="folder for table, figure and finished runs")
    p.add_argument("--methods", nargs="+", type=_word(("clean", *METHODS), "method"), default=("clean", "em", "sem"))
    p.add_argument("--radii", nargs="+", type=_radius, default=(0, 4), help="training radii in levels, 0 is ERM")
    p.add_argument("--seeds", type=_count(1), default=3)
    p.add_argument("--test-limit", type=_count(2), metavar="N", help="N test images only")
    p.add_argument("--preset", **preset)

    p = command("protect", _protect, "Protected copies of images: OUT/images, OUT/noise.safetensors, OUT/report.json.")
    _common(p)
    p.add_argument("out", metavar="OUT", type=Path)
    p.add_argument("--method", type=_word(METHODS, "method"), default="sem", help="sem (the default), rem or em")
    p.add_argument("--radius", type=_radius, default=8, help="largest change of a value in levels of 255 (8)")
    p.add_argument("--perturbation-radius", type=_radius, default=4, help="radius the noise is trained to stand, in levels (4)")
    p.add_argument("--preset", **preset)
    p.add_argument("--surrogate", type=nets, help=f"one of {', '.join(MODELS)}")
    p.add_argument("--class-wise", action="store_true", help="one noise per class instead of one per image")
    p.add_argument("--fraction", type=float, default=1.0, help="share of every class that is protected (1.0)")
    p.add_argument("--skip-unreadable", action="store_true", help="leave out, and list, files that cannot be read")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run in OUT")

    p = command("check", _check, "Every protected file against its original: size, mode, and every value within the radius.")
    p.add_argument("images", metavar="IMAGES")
    p.add_argument("out", metavar="OUT", type=Path)
    p.add_argument("--radius", type=_radius, help="instead of the radius in OUT/report.json")
    p.add_argument("--data", metavar="DIR", help="where torchvision's sets are")
    p.add_argument("--json", action="store_true", help="report as JSON on standard output")

    p = command("learn", _learn, "Fresh learners on images, or on protected ones: their accuracy on clean test images.")
    _common(p)
    p.add_argument("--protected", metavar="OUT", type=Path, help="what semkit protect wrote for these images")
    p.add_argument("--perturbation-radius", type=_radius, default=0, help="adversarial training at this radius in levels; 0 is ERM")
    p.add_argument("--norm", type=_word(("linf", "l2", "l1"), "norm"), default="linf")
    p.add_argument("--learner", type=nets, help=f"one of {', '.join(MODELS)}")
    p.add_argument("--seeds", type=_count(1), default=1, help="how many learners")
    p.add_argument("--split-seed", type=_count(0), default=0, help="of the division of a folder without train/ and test/")
    p.add_argument("--preset", **preset)
    p.add_argument("--cache", type=Path, help="folder that keeps finished learners, so that a second call is instant")
    p.add_argument("--skip-unreadable", action="store_true", help="leave out files that cannot be read")

    p = command("convert", _convert, "Noise files from one kind to another: safetensors, int8 pickle, .pt, .npy, .npz, a PNG folder.")
    p.add_argument("source", metavar="SRC", type=Path)
    p.add_argument("destination", metavar="DST", type=Path)
    p.add_argument("--radius", type=_radius, help="of foreign noise, in levels (else its largest value)")
    p.add_argument("--overwrite", action="store_true")

    p = command("lab", _lab, "JupyterLab at a notebook.")
    p.add_argument("notebook", nargs="?", default="notebooks/00_index.ipynb", metavar="NOTEBOOK")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0: fine, 1: a check failed, 2: bad input, 130: stopped by Ctrl-C."""
    from semkit.craft import Interrupted

    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"semkit: {stop or 'stopped'}; the same command goes on from there (protect: with --resume)", file=sys.stderr)
        return STOPPED
    except ValueError as error:
        return _complain(error)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _complain(f"{name}{error.strerror or error}; what was finished is kept, and the same command goes on from there")
