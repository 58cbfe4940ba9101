"""The words of the command line: the options of every command, and what may stand in them."""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from semkit.analysis.designs import DESIGNS
from semkit.analysis.designs import METHODS as SWEPT
from semkit.countermeasures.registry import COUNTERMEASURES, check_countermeasure
from semkit.images.files import shown
from semkit.images.pixels import NORMS, check_name, check_radius, parse_count
from semkit.images.storage import HOLDS
from semkit.nets.engine import FAST_PATHS
from semkit.nets.models import LARGE, MODELS, check_model, check_net
from semkit.protections.methods import DEFAULT, METHODS, PROTECTIONS, options_of
from semkit.protections.noise import UNITS
from semkit.training.recipes import PRESETS

MOST_SEEDS = 9999
# What commands that read images may not have as options of their own.
UNLESS_GIVEN = dict(
    split_seed=0, without=None, protected=None, test_limit=None, out=None, cache=None, learner_steps=None, methods=None,
    design=None, measure_noise=False, radii=None, countermeasures=(), workers=None, scheduler=None,
)  # fmt: skip


def _checked(check: Callable) -> Callable:
    """`check` as the type of an option: what its ValueError says is what the user reads."""

    def parse(text: str):
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _word(known: tuple[str, ...], what: str):
    return _checked(lambda text: check_name(text, known, what))


def _count(least: int, most: int | None = None):
    return _checked(partial(parse_count, least=least, most=most))


def _filled(text: str) -> str:
    if not text:
        raise ValueError("a name is needed, got an empty one; is it a variable that is not set?")
    return text


_name = _checked(_filled)
_path = _checked(lambda text: Path(_filled(text)))


def _free(text: str) -> Path:
    if (path := Path(_filled(text))).exists():
        raise ValueError(f"{shown(path)} exists already")
    return path


_new_file = _checked(_free)

_radius = _checked(check_radius)
_countermeasure = _checked(check_countermeasure)
_known_countermeasures = ", ".join(name + each.spelling for name, each in COUNTERMEASURES.items())


@_checked
def _attack_radius(text: str) -> float:
    if not check_radius(text):
        raise ValueError("radius 0 attacks nothing: write pixel levels above 0")
    return float(text)


@_checked
def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text):
        raise ValueError(f"cpu, mps, cuda or cuda:N is needed, got {text}")
    return text


def _add_images(parser) -> None:
    add = parser.add_argument
    parser.set_defaults(**UNLESS_GIVEN)
    sets = "shapes, cifar10, cifar100, svhn, or a folder with a sub-folder per class"
    add("images", metavar="IMAGES", type=_name, help=sets)
    place = "where torchvision's sets are (else $SEMKIT_DATA, else ~/.cache/semkit)"
    add("--data", metavar="DIR", type=_name, help=place)
    add("--download", action="store_true", help="let torchvision download the set")
    add("--limit", type=_count(2), metavar="N", help="N training images only, every class in its share")
    sizes = "side to which images are resized for the nets (32; ImageNet's recipe was published at 256)"
    add("--size", type=_count(8), default=32, metavar="N", help=sizes)
    add("--hold", type=_word(HOLDS, "storage"), default="auto", help="images in memory, on disk, or what fits (auto)")
    add("--skip-unreadable", action="store_true", help="leave out, and list, files that cannot be read")


def _add_run(parser, preset: str = "lesson") -> None:
    add = parser.add_argument
    presets = f"quick, demo, lesson or paper: CIFAR's recipe, from {LARGE} pixels on ImageNet's (%(default)s)"
    add("--preset", type=_word(PRESETS, "preset"), default=preset, help=presets)
    add("--seed", type=_count(0), default=0, metavar="N", help="the same seed gives the same result (0)")
    _add_engine(parser)
    _add_json(parser)


def _add_engine(parser) -> None:
    add = parser.add_argument
    add("--device", type=_device, default="auto", help="cpu, mps, cuda or cuda:N (a GPU if there is one)")
    precisions = _word(("auto", "float32", "bfloat16", "float64"), "precision")
    help_ = "float32, bfloat16 or float64 (the first two: what the hardware is fast in)"
    add("--precision", type=precisions, default="auto", help=help_)
    add("--compile", action="store_true", help="torch.compile for the eval passes; seconds to a minute at first")
    help_ = f"fast paths not to take: {', '.join(FAST_PATHS)}; results differ in their rounding, if at all"
    add("--switch-off", nargs="+", type=_word(tuple(FAST_PATHS), "path"), default=(), metavar="PATH", help=help_)


def _add_json(parser) -> None:
    parser.add_argument("--json", action="store_true", help="report as JSON on standard output")


def _add_sweep_out(parser, seeds: int, **out) -> None:
    add = parser.add_argument
    add("--out", type=_path, metavar="DIR", help="folder for table, figure and finished runs", **out)
    add("--seeds", type=_count(1, MOST_SEEDS), default=seeds, metavar="N", help=f"how many seeds ({seeds})")


def _demo(parser) -> None:
    parser.set_defaults(
        **UNLESS_GIVEN, images="shapes", data=None, download=False, limit=None, size=32, hold="auto",
        skip_unreadable=False,
    )  # fmt: skip
    _add_run(parser, "demo")
    _add_sweep_out(parser, 1, default=Path("semkit-demo"))


def _listed(names: Iterable[str], last: str) -> str:
    *first, end = names
    return f"{', '.join(first)} {last} {end}"


def _add_own(parser, private: bool = False) -> None:
    """The options that protections have of their own, or the private ones only; None where they are not given."""
    for option, methods in options_of(PROTECTIONS).values():
        if option.private or not private:
            default = "" if option.default in (None, False) else f" ({option.default})"
            help_ = f"of {_listed(methods, 'and') if methods[1:] else methods[0]}: {option.help}{default}"
            if option.parse is None:
                parser.add_argument(option.flag, action="store_true", default=None, help=help_)
            else:
                parser.add_argument(option.flag, type=_checked(option.parse), metavar=option.metavar, help=help_)


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


def _sweep(parser) -> None:
    _add_images(parser)
    _add_run(parser)
    _add_sweep_out(parser, 3, required=True)
    add = parser.add_argument
    methods = _word(tuple(METHODS), "method")
    add("--methods", nargs="+", type=methods, help=f"of {_listed(METHODS, 'and')} ({' '.join(SWEPT)})")
    designs = _word(tuple(DESIGNS), "design")
    add("--design", type=designs, metavar="NAME", help=f"instead of methods a lesson's set: {', '.join(DESIGNS)}")
    help_ = "what perturbations do to noises and learners, in noise.csv, losses.csv and rises.csv"
    add("--measure-noise", action="store_true", help=help_)
    add("--radii", nargs="+", type=_radius, help="training radii in levels, 0 is ERM (0 4)")
    help_ = "learners after each of these, none to compare with: " + _known_countermeasures
    add("--countermeasures", nargs="+", type=_countermeasure, default=(), metavar="NAME", help=help_)
    add("--learner-steps", type=_count(1), metavar="N", help="how long learners train (the preset's steps)")
    add("--test-limit", type=_count(2), metavar="N", help="N test images only")
    add("--workers", type=_count(1), metavar="N", help="make the runs in N processes of one thread each (needs Dask)")
    help_ = "make the runs on the workers of a Dask scheduler, tcp://HOST:PORT"
    add("--scheduler", type=_name, metavar="ADDRESS", help=help_)


def _protect(parser) -> None:
    _add_images(parser)
    _add_run(parser)
    add = parser.add_argument
    add("out", metavar="OUT", type=_path, help="a new folder")
    methods = _word(tuple(PROTECTIONS), "method")
    add("--method", type=methods, default=DEFAULT, help=f"{_listed(PROTECTIONS, 'or')} (%(default)s)")
    _add_own(parser)
    add("--fraction", type=float, default=1.0, help="share of every class that is protected (1.0)")
    add("--resume", action="store_true", help="continue an interrupted run in OUT")
    add("--checkpoint-every", type=float, default=20, help=argparse.SUPPRESS)  # seconds


def _transform(parser) -> None:
    _add_images(parser)
    _add_run(parser)
    _add_sweep_out(parser, 3, required=True)
    add = parser.add_argument
    add("net", metavar="NET", type=_checked(check_net), help="an external net, made by semkit learn IMAGES --save NET")
    add("--radius", type=_attack_radius, default=4, help="of the attacks, and of AT beside it, in levels (4)")
    add("--attacked", type=_count(2), default=300, metavar="N", help="how many test images are attacked (300)")
    add("--test-limit", type=_count(2), metavar="N", help="N test images only")
    add("--learner-steps", type=_count(1), metavar="N", help="how long ERM trains (the preset's steps)")


def _check(parser) -> None:
    add = parser.add_argument
    add("images", metavar="IMAGES", type=_name, help="what was protected")
    add("out", metavar="OUT", type=_path, help="what semkit protect wrote")
    add("--radius", type=_radius, help="instead of the radius in OUT/report.json")
    _add_own(parser, private=True)
    add("--data", metavar="DIR", type=_name, help="where torchvision's sets are")
    _add_json(parser)


def _inspect(parser) -> None:
    add = parser.add_argument
    add("images", metavar="IMAGES", type=_name, help="what was protected")
    add("out", metavar="OUT", type=_path, help="what semkit protect wrote")
    help_ = f"of the countermeasures that change images, all by default: {_known_countermeasures}"
    add("--countermeasures", nargs="+", type=_countermeasure, metavar="NAME", help=help_)
    add("--figure", type=_new_file, metavar="FILE", help="a figure of it; the suffix says the format (.png .pdf .svg)")
    add("--data", metavar="DIR", type=_name, help="where torchvision's sets are")
    _add_json(parser)


def _learn(parser) -> None:
    _add_images(parser)
    _add_run(parser)
    add = parser.add_argument
    add("--protected", metavar="OUT", type=_path, help="what semkit protect wrote for these images")
    add("--perturbation-radius", type=_radius, default=0, help="adversarial training at it, in levels; 0 is ERM (0)")
    norms = (
        "of that radius: linf (the default), l2 or l1, in levels too: an l2 radius of 0.5 on pixels of 0 to 1 is 127.5"
    )
    add("--norm", type=_word(NORMS, "norm"), default="linf", help=norms)
    add("--learner", type=_checked(check_model), help=f"one of {', '.join(MODELS)}")
    help_ = f"what the trainer does about the protection, in this order: {_known_countermeasures}"
    add("--countermeasure", nargs="+", type=_countermeasure, default=(), metavar="NAME", help=help_)
    add("--test-limit", type=_count(2), metavar="N", help="N test images only; finetune and lastlayer use the others")
    add("--seeds", type=_count(1, MOST_SEEDS), default=1, metavar="N", help="how many learners (1)")
    add("--without", type=_count(1), metavar="N", help="leave out the images that --limit N would take")
    add("--save", type=_new_file, metavar="FILE", help="the trained net as a file, for --countermeasure purifier=FILE")
    add("--split-seed", type=_count(0), default=0, help="of the division of a folder without test/ (0)")
    add("--cache", type=_path, metavar="DIR", help="keeps finished learners, so that a second call is instant")


def _convert(parser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", type=_name)
    add("destination", metavar="DST", type=_name)
    add("--radius", type=_radius, help="of foreign noise, in levels (else its largest value)")
    add("--unit", type=_word(UNITS, "unit"), default="auto", help="of foreign floats: levels, or fraction of 1")
    add("--class-wise", action="store_true", help="foreign noise has a row per class, not per image")
    add("--overwrite", action="store_true", help="replace DST")
    _add_json(parser)


def _bench(parser) -> None:
    add = parser.add_argument
    nets = _word(tuple(MODELS), "net")
    add("--models", dest="nets", nargs="+", type=nets, metavar="NET", help="nets to time (tiny resnet18)")
    add("--batch", type=_count(2), metavar="N", help="images in a batch (128)")
    add("--rounds", type=_count(1), metavar="N", help="how often everything is timed, in turn (3)")
    add("--samples", type=_count(1), metavar="N", help="EOT samples of a noise step (2; the published recipes have 5)")
    add("--attack-steps", type=_count(1), metavar="N", help="ascent steps inside REM and AT (10)")
    add("--quick", action="store_true", help="small batches and sets, to see that it works, not how fast")
    add("--out", type=_path, metavar="DIR", help="folder for bench.json, table.md and figure.png")
    _add_engine(parser)
    _add_json(parser)


def _gpu_check(parser) -> None:
    _add_images(parser)
    parser.add_argument("out", metavar="OUT", type=_path, help="folder for numbers, speeds, rows and noise")
    help_ = "what no longer fits into N seconds is left out (480)"
    parser.add_argument("--time-limit", type=_count(1), default=480, metavar="N", help=help_)
    parser.add_argument(
        "--tiny", action="store_true", help="a small net and few steps, to see that it works, on a CPU too"
    )
    _add_engine(parser)
    _add_json(parser)


def _lab(parser) -> None:
    parser.add_argument("notebook", nargs="?", type=_name, default="notebooks/00_index.ipynb", metavar="NOTEBOOK")


def _page(parser) -> None:
    parser.add_argument("out", metavar="OUT", type=_path, help="the HTML file to write")
    help_ = "folder of committed results (results)"
    parser.add_argument("--results", metavar="DIR", type=_path, default=Path("results"), help=help_)


OPTIONS = {
    "demo": _demo, "sweep": _sweep, "protect": _protect, "transform": _transform, "check": _check, "inspect": _inspect,
    "learn": _learn, "convert": _convert, "bench": _bench, "gpu-check": _gpu_check, "lab": _lab, "page": _page,
}  # fmt: skip


def add_options(command: str, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add the options of this command to its parser. Raises ValueError for an unknown one, with the nearest name."""
    OPTIONS[check_name(command, tuple(OPTIONS), "command")](parsers[command])


def repeatable(words: list[str], options: argparse.Namespace) -> str:
    """The words, but not those that may be a piece of a key: what an option is given, or what follows a key."""
    private = [name for name, (option, _) in options_of(PROTECTIONS).items() if option.private]
    if named := [word.partition("=")[0] for word in words if word.startswith("-")]:
        return " ".join(named)
    hint = "quote what has spaces in it"
    return hint if any(getattr(options, name, None) for name in private) else f"{' '.join(map(shown, words))}; {hint}"
