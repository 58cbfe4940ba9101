"""What the command line says and where it says it: lines, JSON, bars; what Ctrl-C does to a run; exit codes."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from semkit.images.files import shown

FEW = 3  # names in a line
FINE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Inside the block stdout and stderr can be written to, even where they are closed, and whatever a name holds.

    What cannot be written at the end is dropped, because Python would end with an exit code of its own for it.
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
    """From now on nothing is written to the stream, nor what it holds."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _say(text: str, stream) -> None:
    """A line. That nobody reads it (| head), or that stderr takes none, is no error: the work counts."""
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as error:
        if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
            raise
        _drop(stream)


def complain(message: object) -> int:
    """Say what is wrong with the input, on one line of stderr; the exit code for it."""
    _say(f"semkit: {' '.join(str(message).split())}", sys.stderr)
    return BAD_INPUT


def announce(text: str) -> None:
    """Say on stderr what is about to be done: stdout belongs to the report."""
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
        """Write a line with the first files that were taken for no image of a class, and where all of them are."""
        if names:
            first, more = ", ".join(map(shown, names[:FEW])), len(names) - FEW
            rest = f" and {more} more, all in {where}" if more > 0 else ""
            self.line(f"left out, not taken for images of a class: {first}{rest}")

    def values(self, values: dict | list) -> None:
        """Write the whole report, if JSON is asked for."""
        if self.json:
            _say(json.dumps(values, indent=1, allow_nan=False), sys.stdout)


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3.5 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


@contextlib.contextmanager
def bars() -> Iterator:
    """An on_step(what, step, total, metrics) that draws a bar per job and returns True after Ctrl-C.

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
