"""The options of every command, the checks of their values, and the objects that they become."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from semkit.analysis.designs import DESIGNS
from semkit.analysis.designs import METHODS as SWEPT
from semkit.countermeasures.registry import COUNTERMEASURES, check_countermeasure
from semkit.images.files import shown
from semkit.images.imageset import HOLDS
from semkit.images.pixels import NORMS, check_name, check_radius, parse_count
from semkit.nets.engine import FAST_PATHS, Engine
from semkit.nets.models import LARGE, MODELS, check_model, check_net
from semkit.protections.methods import DEFAULT, METHODS, PROTECTIONS, options_of
from semkit.protections.noise import UNITS
from semkit.training.recipes import PRESETS

MOST_SEEDS = 9999
KNOWN = ", ".join(name + each.spelling for name, each in COUNTERMEASURES.items())


def _kind(check: Callable, metavar: str, **more) -> dict:
    """An option whose value is check(text); the message of a ValueError of it is what the user reads."""

    def parse(text: str):
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return dict(type=parse, metavar=metavar, **more)


def _whole(least: int, most: int = 2**63 - 1) -> dict:  # torch takes no seed of more than 64 bits
    return _kind(partial(parse_count, name="N", least=least, most=most), "N")


def _word(known: Iterable[str], what: str) -> dict:
    return _kind(lambda text: check_name(text, tuple(known), what), "NAME")


def _filled(text: str) -> str:
    if not text:
        raise ValueError("a name is needed, got an empty one; is it a variable that is not set?")
    return os.path.expanduser(text)  # no shell does it in --out=~/runs


def _free(text: str) -> Path:
    if (path := Path(_filled(text))).exists():
        raise ValueError(f"{shown(path)} exists already")
    return path


def _picture(text: str) -> Path:
    check_name(Path(text).suffix, (".png", ".pdf", ".svg"), "format of a figure")
    return _free(text)


def _attack_radius(text: str) -> float:
    if not check_radius(text):
        raise ValueError("radius 0 attacks nothing: write pixel levels above 0")
    return float(text)


def _path(metavar: str) -> dict:
    return _kind(lambda text: Path(_filled(text)), metavar)


SWITCH = dict(action="store_true")
RADIUS = _kind(check_radius, "R")
DATA = "--data", "folder of torchvision's data sets ($SEMKIT_DATA, else ~/.cache/semkit)", _kind(_filled, "DIR")
AFTER = dict(nargs="+", **_kind(check_countermeasure, "NAME"))


def _group(parser, title: str | None = None) -> Callable:
    """add(flag, what it is for, kind, ...): adds options to the parser, in --help under this title, with defaults."""
    group = parser.add_argument_group(title) if title else parser

    def add(flag: str, what: str, kind: Mapping, **more) -> None:
        default = more.get("default")
        told = "" if default in (None, ()) or what is argparse.SUPPRESS else f" ({default})"
        group.add_argument(flag, help=what + told, **kind, **more)

    return add


def _add_images(parser) -> None:
    # What `commands` asks every command that reads images for, and most have no option for.
    parser.set_defaults(split_seed=0, without=None, protected=None, test_limit=None, out=None, cache=None)
    sets = "shapes (embedded), cifar10, cifar100, svhn, or a folder with a sub-folder of images for each class"
    _group(parser)("images", sets, _kind(_filled, "IMAGES"))
    add = _group(parser, "images")
    add(*DATA)
    add("--download", "let torchvision download the data set", SWITCH)
    add("--limit", "use N training images, the same share of every class", _whole(2))
    add("--size", "resize images to N x N pixels for the nets", _whole(8), default=32)
    add("--hold", "where images are kept: memory, disk, or auto: what fits", _word(HOLDS, "storage"), default="auto")
    add("--skip-unreadable", "leave out files that cannot be read, and list them", SWITCH)


def _add_run(parser, preset: str = "lesson") -> None:
    add = _group(parser, "run")
    presets = f"quick, demo, lesson or paper; from {LARGE} pixels on ImageNet's recipe, published at 256"
    add("--preset", presets, _word(PRESETS, "preset"), default=preset)
    add("--seed", "random seed; the same seed, machine and threads give the same result", _whole(0), default=0)
    _add_engine(parser)


def _add_engine(parser) -> None:
    add = _group(parser, "engine")
    device = "cpu, mps, cuda, cuda:N, or auto: a GPU if there is one"
    add("--device", device, dict(metavar="NAME"), default="auto")
    precisions = _word(("auto", "float32", "bfloat16", "float64"), "precision")
    add("--precision", "float32, bfloat16, float64, or auto: the faster of the first two", precisions, default="auto")
    add("--compile", "use torch.compile in eval mode; it takes up to a minute at the start", SWITCH)
    paths = f"do without these fast paths: {', '.join(FAST_PATHS)}; results change at most by rounding"
    add("--switch-off", paths, _word(FAST_PATHS, "path"), nargs="+", default=())
    _group(parser)("--json", "write the report as JSON to stdout", SWITCH)


def _add_rows(parser, seeds: int, **out) -> None:
    add = _group(parser, "results")
    add("--out", "folder for rows, table, figure and finished runs", _path("DIR"), **out)
    add("--seeds", "number of seeds", _whole(1, MOST_SEEDS), default=seeds)


def _demo(parser) -> None:
    of_sweep, out = argparse.ArgumentParser(), Path("semkit-demo")
    _sweep(of_sweep)
    parser.set_defaults(**vars(of_sweep.parse_args(["shapes", "--out", str(out)])))
    _add_run(parser, "demo")
    _add_rows(parser, 1, default=out)


def _listed(names: Iterable[str], last: str) -> str:
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def _add_own(add: Callable, private: bool = False) -> None:
    """The options that protections have of their own, or the private ones only; None where they are not given."""
    for option, methods in options_of(PROTECTIONS).values():
        if option.private or not private:
            default = "" if option.default in (None, False) else f" ({option.default})"
            kind = _kind(option.parse, option.metavar or "X") if option.parse else SWITCH | {"default": None}
            add(option.flag, f"{option.help}{default}; for {_listed(methods, 'and')}", kind)


def _sweep(parser) -> None:
    _add_images(parser)
    add = _group(parser, "what is compared")
    methods = f"methods of protection: {_listed(METHODS, 'or')} ({' '.join(SWEPT)})"
    add("--methods", methods, _word(METHODS, "method"), nargs="+")
    add("--design", f"a lesson's recipes in place of methods: {', '.join(DESIGNS)}", _word(DESIGNS, "design"))
    add("--radii", "training radii in levels; 0 is ERM, others are AT (0 4)", RADIUS, nargs="+")
    add("--countermeasures", f"train learners after each of these; none to compare with: {KNOWN}", AFTER, default=())
    add("--learner-steps", "training steps of every learner (the preset's)", _whole(1))
    for role in ("learner", "surrogate"):
        add(f"--{role}", f"net of every {role} (the preset's): {', '.join(MODELS)}", _kind(check_model, "NET"))
    add("--test-limit", "use N test images", _whole(2))
    measured = "measure how perturbations move noises and learners: noise.csv, losses.csv and rises.csv"
    add("--measure-noise", measured, SWITCH)
    add("--strips", "write a picture of every noise: strips/METHOD.png", SWITCH)
    _add_run(parser)
    _add_rows(parser, 3, required=True)
    add = _group(parser, "processes (need Dask)")
    add("--workers", "spread runs over N processes of one thread each", _whole(1))
    add("--scheduler", "spread runs over the workers of a Dask scheduler, tcp://HOST:PORT", _kind(_filled, "ADDRESS"))


def _protect(parser) -> None:
    _add_images(parser)
    _group(parser)("out", "a new folder", _path("OUT"))
    add = _group(parser, "protection")
    add("--method", f"{_listed(PROTECTIONS, 'or')}", _word(PROTECTIONS, "method"), default=DEFAULT)
    _add_own(add)
    share = "protect this share of every class and write the rest unchanged"
    add("--fraction", share, dict(type=float, metavar="X"), default=1.0)
    add("--resume", "go on with an interrupted run in OUT", SWITCH)
    add("--checkpoint-every", argparse.SUPPRESS, dict(type=float), default=20)  # seconds
    _add_run(parser)


def _transform(parser) -> None:
    _add_images(parser)
    _group(parser)("net", "an external net, made by semkit learn IMAGES --save NET", _kind(check_net, "NET"))
    add = _group(parser, "attacks")
    add("--radius", "radius of the attacks, and of AT beside them, in levels", _kind(_attack_radius, "R"), default=4)
    add("--attacked", "attack N test images", _whole(2), default=300)
    add("--test-limit", "use N test images", _whole(2))
    add("--learner-steps", "training steps of ERM (the preset's)", _whole(1))
    _add_run(parser)
    _add_rows(parser, 3, required=True)


def _add_protected(parser) -> Callable:
    add = _group(parser)
    add("images", "the images that were protected", _kind(_filled, "IMAGES"))
    add("out", "the folder that semkit protect wrote", _path("OUT"))
    add(*DATA)
    add("--json", "write the report as JSON to stdout", SWITCH)
    return add


def _check(parser) -> None:
    add = _add_protected(parser)
    add("--radius", "instead of the radius in OUT/report.json, in levels", RADIUS)
    _add_own(add, private=True)


def _inspect(parser) -> None:
    add = _add_protected(parser)
    add("--countermeasures", f"those that change images, all by default, of: {KNOWN}", AFTER)
    add("--figure", "draw it too, in the format of the suffix (.png .pdf .svg)", _kind(_picture, "FILE"))


def _learn(parser) -> None:
    _add_images(parser)
    add = _group(parser, "learners")
    add("--protected", "train on the files that semkit protect wrote to OUT for these images", _path("OUT"))
    add("--perturbation-radius", "radius of adversarial training (AT) in levels; 0 is ERM", RADIUS, default=0)
    norms = "norm of that radius: linf, l2 or l1, in levels too; an l2 radius of 0.5 on [0, 1] is 127.5"
    add("--norm", norms, _word(NORMS, "norm"), default="linf")
    add("--learner", f"net of the learner (the preset's): {', '.join(MODELS)}", _kind(check_model, "NET"))
    add("--countermeasure", f"what the trainer does about the protection, in this order: {KNOWN}", AFTER, default=())
    add("--test-limit", "use N test images; what needs clean images trains on the others", _whole(2))
    add("--without", "leave out the images that --limit N takes", _whole(1))
    add("--split-seed", "seed by which a folder without test/ is divided", _whole(0), default=0)
    add("--seeds", "number of learners", _whole(1, MOST_SEEDS), default=1)
    add("--save", "save the net, for --countermeasure purifier=FILE and semkit transform", _kind(_free, "FILE"))
    add("--cache", "keep finished learners in DIR, so that a second call reads them", _path("DIR"))
    _add_run(parser)


def _convert(parser) -> None:
    add = _group(parser)
    add("source", "a noise file, or a folder of PNGs 0.png to n.png", _kind(_filled, "SRC"))
    add("destination", "its suffix says the format; without one it is a folder of PNGs", _kind(_filled, "DST"))
    add("--radius", "radius of foreign noise, in levels (its largest value)", RADIUS)
    units = "unit of foreign floats: levels, fraction (of 1), or auto: by their size"
    add("--unit", units, _word(UNITS, "unit"), default="auto")
    add("--class-wise", "the foreign noise has one row for each class, not for each image", SWITCH)
    add("--overwrite", "replace DST, if it is noise too", SWITCH)
    add("--json", "write the report as JSON to stdout", SWITCH)


def _bench(parser) -> None:
    add = _group(parser)
    add("--models", "nets to time (tiny resnet18)", _word(MODELS, "net"), dest="nets", nargs="+")
    add("--batch", "images in a batch (128)", _whole(2))
    add("--rounds", "time everything N times, in turn (3)", _whole(1))
    add("--samples", "EOT samples of a noise step (2; the published recipes have 5)", _whole(1))
    add("--attack-steps", "PGD steps inside REM and AT (10)", _whole(1))
    add("--quick", "small batches and sets: to see that it works, not how fast", SWITCH)
    add("--out", "folder for bench.json, table.md and figure.png", _path("DIR"))
    _add_engine(parser)


def _gpu_check(parser) -> None:
    _add_images(parser)
    _group(parser)("out", "folder for numbers, speeds, rows and noise", _path("OUT"))
    add = _group(parser, "run")
    add("--time-limit", "leave out what no longer fits into N seconds", _whole(1), default=480)
    add("--tiny", "a small net and few steps: to see that it works, on a CPU too", SWITCH)
    _add_engine(parser)


def _lab(parser) -> None:
    first = "notebooks/00_index.ipynb"
    _group(parser)("notebook", "the notebook to open", _kind(_filled, "NOTEBOOK"), nargs="?", default=first)


def _page(parser) -> None:
    add = _group(parser)
    add("out", "the HTML file to write", _path("OUT"))
    add("--results", "folder of committed results", _path("DIR"), default=Path("results"))


OPTIONS = {  # command -> (what must be given, what adds its options)
    "demo": ("", _demo), "sweep": ("IMAGES --out DIR ", _sweep), "protect": ("IMAGES OUT ", _protect),
    "transform": ("IMAGES NET --out DIR ", _transform), "check": ("IMAGES OUT ", _check),
    "inspect": ("IMAGES OUT ", _inspect), "learn": ("IMAGES ", _learn), "convert": ("SRC DST ", _convert),
    "bench": ("", _bench), "gpu-check": ("IMAGES OUT ", _gpu_check), "lab": ("[NOTEBOOK] ", _lab),
    "page": ("OUT ", _page),
}  # fmt: skip


def add_options(command: str, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add the options of this command to its parser. Raises ValueError for an unknown one, with the nearest name."""
    needed, add = OPTIONS[check_name(command, tuple(OPTIONS), "command")]
    parsers[command].usage = f"semkit {command} {needed}[options]"
    add(parsers[command])


def engine_of(options) -> Engine:
    """The engine that --device, --precision, --compile and --switch-off ask for."""
    off = {name: value for path in options.switch_off for name, value in FAST_PATHS[path].items()}
    return Engine(options.device, options.precision, compile=options.compile, **off)


def reading(options) -> dict:
    """Which images are meant, beside IMAGES itself: keywords of `load` and `folder.protect`."""
    names = ("size", "limit", "download", "skip_unreadable")
    return {"root": options.data, **{name: getattr(options, name) for name in names}}


def own_values(method: str, given: Mapping[str, object]) -> dict:
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
