"""The command line: commands, output streams, progress bars, and errors as one line and an exit code.

torch is imported once a command is named: semkit --help and --version need none.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from semkit import __version__
from semkit.images.files import one_line, out_of_memory, shown

FINE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130
FEW = 3  # names in a line
AGAIN = "; the same command goes on from there"
# Name -> (its help, how to go on after it was stopped). Its options are in app/options.py, its work in app/commands.py.
COMMANDS = {
    "demo": ("Protect the embedded images and train learners on them: a table and a figure, in minutes.", AGAIN),
    "sweep": ("Train learners over methods, training radii and seeds: rows, a table and a figure.", AGAIN),
    "protect": (
        "Write protected copies of images: OUT/images, OUT/report.json and, for noise, OUT/noise.safetensors.",
        "; the same command with --resume goes on from there",
    ),
    "transform": ("Attack a classifier behind an input transform in four ways, beside ERM and AT.", AGAIN),
    "check": ("Compare every protected file with its original: size, mode, values within the radius.", ""),
    "inspect": ("Measure without training what countermeasures leave of a protected folder's noise.", ""),
    "learn": (
        "Train fresh learners on images, protected or not: their accuracy on clean test images.",
        "; with --cache, learners that were finished are kept",
    ),
    "convert": ("Convert noise files: .safetensors, pickled arrays, .pt, .npy, .npz and folders of PNGs.", ""),
    "bench": ("Measure how fast this machine is: the engine beside plain PyTorch, memory, cost per image.", ""),
    "gpu-check": ("Find out in minutes about a GPU: its numbers, its speed, SEM at full scale.", AGAIN),
    "lab": ("Open JupyterLab at a notebook.", ""),
    "page": ("Write one HTML file with sliders over closed forms and committed results, for any browser.", ""),
}


def run(arguments: list[str], commands: Mapping[str, Callable]) -> int:
    """The exit code of the command that the arguments name: commands[name](options)."""
    with warnings.catch_warnings(), streams():
        warnings.showwarning = _once()
        options = parse(arguments)
        return _told(lambda: commands[options.command](options), COMMANDS[options.command][1])


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
        top.error(f"unrecognized arguments: {_repeatable(extra, options)}")
    return options


def _repeatable(words: list[str], options: argparse.Namespace) -> str:
    """The words, but not those that may be a piece of a key: what an option is given, or what follows a key."""
    from semkit.protections.methods import PROTECTIONS, options_of

    private = [name for name, (option, _) in options_of(PROTECTIONS).items() if option.private]
    if named := [word.partition("=")[0] for word in words if word.startswith("-")]:
        return " ".join(named)
    hint = "quote what has spaces in it"
    return hint if any(getattr(options, name, None) for name in private) else f"{' '.join(map(shown, words))}; {hint}"


def _told(work: Callable[[], int | None], hint: str) -> int:
    """The exit code of work(), FINE for None; its errors as one line, with `hint` how to go on."""
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
        # A full disk may have room the next time. A wrong name or a missing permission comes again.
        may_pass = type(error) is OSError and error.errno != errno.ENAMETOOLONG
        return complain(f"{name}{error.strerror or error}{hint if may_pass else ''}")


def _once() -> Callable:
    """A warnings.showwarning that says every warning once, in one line without its place in the code."""
    told = set()

    def show(message, *_):
        line = " ".join(str(message).split())
        if line not in told:
            told.add(line)
            announce(f"semkit: {line}")

    return show


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Inside the block stdout and stderr can be written to even if they were closed, and take any file name.

    What cannot be flushed at the end is discarded, because Python would exit with a code of its own.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by the caller: >&-
                stack.callback(setattr, sys, name, None)
                setattr(sys, name, stack.enter_context(open(os.devnull, "w")))
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            stack.callback(_flush, getattr(sys, name))
        yield


def _flush(stream) -> None:
    try:
        stream.flush()
    except OSError:
        _drop(stream)


def _drop(stream) -> None:
    """Discard what the stream still holds, and all that is written to it from now on."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _say(text: str, stream) -> None:
    """Write a line. A closed pipe (| head) or a closed stderr is no error, because the work counts."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as error:
        if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
            raise
        _drop(stream)


def complain(message: object) -> int:
    """Say on one line of stderr what is wrong with the input; returns the exit code for it."""
    _say(f"semkit: {' '.join(str(message).split())}", sys.stderr)
    return BAD_INPUT


def announce(text: str) -> None:
    """Say on stderr what is about to be done; stdout is for the report."""
    _say(text, sys.stderr)


@dataclass(frozen=True)
class Report:
    """What a command found: lines on stdout; with --json values on stdout, and the lines on stderr."""

    json: bool

    def line(self, text: str) -> None:
        """Write a line of the report."""
        _say(text, sys.stderr if self.json else sys.stdout)

    def skipped(self, names: Sequence[str], why: str = "skipped, unreadable") -> None:
        """Write a line for every file that could not be read."""
        for name in names:
            self.line(f"{why}: {shown(name)}")

    def left_out(self, names: Sequence[str], where: str) -> None:
        """Write a line with the first files that are no images of a class, and where all of them are listed."""
        if names:
            first, more = ", ".join(map(shown, names[:FEW])), len(names) - FEW
            rest = f" and {more} more, all in {where}" if more > 0 else ""
            self.line(f"left out, not taken for images of a class: {first}{rest}")

    def values(self, values: dict | list) -> None:
        """Write the whole report as JSON, if that is asked for."""
        if self.json:
            _say(json.dumps(values, indent=1, allow_nan=False), sys.stdout)


@contextlib.contextmanager
def bars() -> Iterator:
    """An on_step(what, step, total, metrics) that draws a bar for each job and returns True after Ctrl-C.

    The first Ctrl-C, or SIGTERM, lets the step finish, so that the saved state is whole; the second one ends at once.
    Bars are drawn on a terminal only.
    """
    drawn, stop = {}, []

    def interrupt(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    def close():
        for bar in drawn.values():
            bar.close()
        drawn.clear()

    def on_step(what, step, total, metrics):
        if what not in drawn:
            close()
            drawn[what] = tqdm(total=total, desc=what, file=sys.stderr, leave=False, disable=None)
        bar = drawn[what]
        numbers = {k: f"{v:.3f}" for k, v in metrics.items() if isinstance(v, float)}
        numbers |= {k: f"{v:,}" for k, v in metrics.items() if k == "passes"}
        if numbers:
            bar.set_postfix(numbers, refresh=False)
        bar.update(step - bar.n)
        return bool(stop)

    before = {which: signal.signal(which, interrupt) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield on_step
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        close()


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
