"""What the command line says, where it says it, and the code it ends with."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence

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
    """Says what is wrong with the input, on one line of stderr; the exit code for it."""
    _say(f"semkit: {' '.join(str(message).split())}", sys.stderr)
    return BAD_INPUT


def announce(text: str) -> None:
    """What is about to be done, on stderr: stdout belongs to the report."""
    _say(text, sys.stderr)


def tell(options, text: str) -> None:
    """A line of the report: on stdout, or on stderr where stdout gets the JSON."""
    _say(text, sys.stderr if options.json else sys.stdout)


def tell_left_out(options, names: Sequence[str], where: str) -> None:
    """A line with the first of the names that were taken for no image of a class, if any, and where they all are."""
    if names:
        first, more = ", ".join(map(shown, names[:FEW])), len(names) - FEW
        rest = f" and {more} more, all in {where}" if more > 0 else ""
        tell(options, f"left out, not taken for images of a class: {first}{rest}")


def print_json(options, values) -> None:
    """The report as JSON on stdout, if that is asked for."""
    if options.json:
        _say(json.dumps(values, indent=1, allow_nan=False), sys.stdout)


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3.5 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
