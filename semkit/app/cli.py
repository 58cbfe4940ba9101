"""The command line: its commands, and every error as one line and an exit code.

torch is imported once a command is named: semkit --help and --version need none.
"""

import argparse
import sys
import warnings
from collections.abc import Callable

from semkit import __version__
from semkit.app.progress import FINE, STOPPED, announce, complain, streams
from semkit.images.files import one_line, shown

AGAIN = "the same command goes on from there"
COMMANDS = {  # name -> (its help, how to go on after it was stopped)
    "demo": ("The main job on the embedded images: noise, learners, a table and a figure.", AGAIN),
    "sweep": ("Learners over methods, training radii and seeds: rows, a table and a figure.", AGAIN),
    "protect": (
        "Protected copies of images: OUT/images, OUT/report.json and (noise) OUT/noise.safetensors.",
        "the same command with --resume goes on from there",
    ),
    "transform": ("A classifier behind an adversarial-example transform, attacked in four ways, and AT.", AGAIN),
    "check": ("Every file against its original: size, mode, values within the radius or as filtered.", ""),
    "inspect": (
        "What countermeasures leave of a protected folder's noise, and what kind of noise it is: no training.",
        "",
    ),
    "learn": (
        "Fresh learners on images, or on protected ones: their accuracy on clean test images.",
        "with --cache, learners that were finished are kept",
    ),
    "convert": ("Noise files from one kind to another: safetensors, int8 pickle, .pt, .npy, .npz, a PNG folder.", ""),
    "bench": ("How fast this machine is: the engine against a plain reference, memory, cost of an image.", ""),
    "lab": ("JupyterLab at a notebook.", ""),
    "page": ("One HTML file with sliders over closed forms and committed results, for a browser without a kernel.", ""),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0: fine, 1: a check failed, 2: bad input, 130: stopped by Ctrl-C or SIGTERM."""
    shown_before, warnings.showwarning = warnings.showwarning, _once()
    try:
        with streams():
            options = parse(sys.argv[1:] if arguments is None else arguments)
            again = COMMANDS[options.command][1]
            return _told(lambda: _run(options), f"; {again}" if again else "")
    finally:
        warnings.showwarning = shown_before


def _run(options: argparse.Namespace) -> int | None:
    from semkit.app import commands

    return getattr(commands, options.command)(options)


class _Parser(argparse.ArgumentParser):
    """argparse with one clear line in place of a page of usage."""

    def error(self, message):
        raise SystemExit(complain(f"{message} (see {self.prog} --help)"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options in `arguments`; exits with one line on stderr and code 2 where they make no sense."""
    top = _Parser(
        prog="semkit", description="Stable unlearnable examples: protect images, and measure how far that goes."
    )
    top.add_argument("--version", action="version", version=f"semkit {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser, dest="command")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, (text, _) in COMMANDS.items()}
    named = next((word for word in arguments if not word.startswith("-")), None)
    if named is None:
        return top.parse_args(arguments)
    from semkit.app import options as words

    try:
        words.add_options(named, parsers)
    except ValueError as error:
        top.error(str(error))
    options, extra = top.parse_known_args(arguments)
    if extra:
        top.error(f"unrecognized arguments: {words.repeatable(extra, options)}")
    return options


def _once() -> Callable:
    """A warnings.showwarning of one line, without the code that it is from, told once."""
    told = set()

    def show(message, *_):
        line = " ".join(str(message).split())
        if line not in told:
            told.add(line)
            announce(f"semkit: {line}")

    return show


def _told(work: Callable[[], int | None], hint: str = "") -> int:
    """The exit code of work(), FINE for None; its errors as one line, with `hint` how to go on."""
    from semkit.images.storage import out_of_memory
    from semkit.nets.lab import Interrupted

    try:
        return work() or FINE
    except (Interrupted, KeyboardInterrupt) as end:
        complain(f"{str(end) or 'stopped'}{hint}")
        return STOPPED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        error.__traceback__ = None  # lets go of what the frames hold, so that there is memory to say so
        needs_less = "--hold disk, a smaller --size or another --device needs less"
        return complain(f"out of memory ({one_line(error)}); {needs_less}{hint}")
    except ValueError as error:
        return complain(f"{error}")
    except OSError as error:
        name = f"{shown(error.filename)}: " if error.filename else ""
        denied = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError)
        return complain(f"{name}{error.strerror or error}{'' if denied else hint}")
