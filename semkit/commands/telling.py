"""What the command line says, where it says it, and the code it ends with."""

import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from semkit.files import shown

FEW = 3  # names in a line
FINE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


def complain(message: object) -> int:
    """Says what is wrong with the input, on one line of stderr; the exit code for it."""
    print("semkit:", " ".join(str(message).split()), file=sys.stderr)
    return BAD_INPUT


def announce(text: str) -> None:
    """What is about to be done, on stderr: stdout belongs to the report."""
    tqdm.write(text, file=sys.stderr)


def tell(options, text: str) -> None:
    """A line of the report: on stdout, or on stderr where stdout gets the JSON."""
    tqdm.write(text, file=sys.stderr if options.json else sys.stdout)


def tell_left_out(options, names: Sequence[str], where: str) -> None:
    """A line with the first of the names that were taken for no image of a class, if any, and where they all are."""
    if names:
        first, more = ", ".join(map(shown, names[:FEW])), len(names) - FEW
        rest = f" and {more} more, all in {where}" if more > 0 else ""
        tell(options, f"left out, not taken for images of a class: {first}{rest}")


def print_json(options, values) -> None:
    """The report as JSON on stdout, if that is asked for."""
    if options.json:
        print(json.dumps(values, indent=1, allow_nan=False))


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3.5 min."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
