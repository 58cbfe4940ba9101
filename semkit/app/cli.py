"""The command line: which command runs, and every error as one line and an exit code."""

import sys
import warnings
from collections.abc import Callable

from semkit.app import folders, lab, learners, noisefiles, timing
from semkit.app.options import parse
from semkit.app.telling import FINE, STOPPED, announce, complain, streams
from semkit.images.files import one_line, shown
from semkit.images.storage import out_of_memory
from semkit.nets.lab import Interrupted

RUN = {
    "demo": learners.sweep, "sweep": learners.sweep, "transform": learners.transform, "learn": learners.learn,
    "protect": folders.protect, "check": folders.check, "convert": noisefiles.convert, "bench": timing.bench,
    "lab": lab.lab,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0: fine, 1: a check failed, 2: bad input, 130: stopped by Ctrl-C or SIGTERM."""
    shown_before, warnings.showwarning = warnings.showwarning, _once()
    try:
        with streams():
            return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        warnings.showwarning = shown_before


def _once() -> Callable:
    """A warnings.showwarning of one line, without the code that it is from, told once."""
    told = set()

    def show(message, *_):
        line = " ".join(str(message).split())
        if line not in told:
            told.add(line)
            announce(f"semkit: {line}")

    return show


def _main(arguments: list[str]) -> int:
    options = parse(arguments)
    return _told(lambda: RUN[options.command](options), f"; {options.again}" if options.again else "")


def _told(work: Callable[[], int | None], hint: str = "") -> int:
    """The exit code of work(), FINE for None; its errors as one line, with `hint` how to go on."""
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
