"""Checkers of answers, their replies and their hints.

A checker is a function of the student's answer; each of its assertions names a mistake. `checker` makes one.
"""

import dis
import html
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor  # late below, because a lesson about two pixels needs no torch

from semkit.images.files import one_line

COLOURS = {"right": "#009E73", "not yet": "#D55E00", "your code raised": "#CC79A7"}  # of the bar beside a reply
DOES_NOTHING = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}  # instructions of an empty function


@dataclass(frozen=True)
class Reply:
    """One sentence to a student, shown at the end of a notebook's cell; with pictures, if any, of target and answer.

    kind: "right", "not yet", "not attempted", "your code raised", "hint" or "guess". pictures: name -> uint8 [C,H,W].
    """

    kind: str
    text: str
    pictures: "Mapping[str, Tensor]" = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        style = f"border-left:4px solid {COLOURS.get(self.kind, '#999999')};padding-left:0.6em"
        line = f'<p style="{style}">{html.escape(self.text)}</p>'
        if not self.pictures:
            return line
        from semkit.analysis.canvas import as_html  # matplotlib takes a second, which only pictures need
        from semkit.analysis.pictures import gallery_figure

        figure = gallery_figure(self.pictures, title="What was asked for, and your answer")
        return line + as_html(figure, f"{', '.join(self.pictures)}, side by side", self.text)


class _Raised(Exception):
    """Carries what the student's code raised past the checker's own assertions."""


@contextmanager
def drawn(target: "Tensor", yours: "Tensor") -> Iterator[None]:
    """Assertions that fail inside are shown with both pictures, uint8 [C,H,W], and with how far they differ."""
    try:
        yield
    except AssertionError as wrong:
        off = (target.int() - yours.int()).abs().amax(0, keepdim=True)
        far = f"difference\n(white: {off.max()} levels)"
        wrong.pictures = {"target": target, "yours": yours, far: (255 * off / off.max().clamp(min=1)).byte()}
        raise


def check_tensor(mine: object, like: "Tensor") -> None:
    """Raises AssertionError unless `mine` is a tensor with the shape and the dtype of `like`."""
    from torch import Tensor

    assert isinstance(mine, Tensor), f"it returns {type(mine).__name__}, not a tensor"
    assert mine.shape == like.shape, f"it returns the shape {list(mine.shape)}; asked for is {list(like.shape)}"
    assert mine.dtype == like.dtype, f"it returns {mine.dtype}; asked for is {like.dtype}"


def reject(mine: object, mistakes: Mapping[str, object], tolerance: float = 1e-6) -> None:
    """Raises AssertionError if `mine`, a number or an array, is one of the mistakes, text -> mistaken answer."""
    for why, wrong in mistakes.items():
        assert not np.allclose(mine, wrong, rtol=0, atol=tolerance), why


def _is_starter(answer: object) -> bool:
    """Whether the answer is None or ..., or a function that does nothing but return one of them."""
    if not hasattr(answer, "__code__"):
        return answer is None or answer is ...
    body, does = answer.__code__, {step.opname for step in dis.get_instructions(answer)}
    return does <= DOES_NOTHING and {*body.co_consts} <= {None, ..., answer.__doc__}


def _guarded(answer: object) -> object:
    """The answer; if it is a function, it raises _Raised from its errors, and must return something."""

    def asked(*args, **kwargs):
        try:
            found = answer(*args, **kwargs)
        except Exception as error:
            raise _Raised from error
        assert found is not None, "it returns nothing: end with return"
        return found

    return asked if callable(answer) else answer


def _raised(error: BaseException, answer: Callable) -> str:
    """What the student's code raised, and the last of its own lines on the way there."""
    own = getattr(answer, "__code__", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if own and frame.filename == own.co_filename]
    where = f", in line {frames[-1].lineno}: {frames[-1].line}".rstrip(": ") if frames else ""
    return f"your code raised {type(error).__name__}: {one_line(error)}{where}"


def _hint(hints: tuple[str, ...], n: int = 1) -> Reply:
    if not 1 <= n <= len(hints):
        raise ValueError(f"there are {len(hints)} hints; ask for hint(1) to hint({len(hints)})")
    last = ", the last one" if n == len(hints) else ""
    return Reply("hint", f"hint {n} of {len(hints)}{last}: {hints[n - 1]}")


def checker(*hints: str) -> Callable[[Callable], Callable[[object], Reply]]:
    """Makes a checker of a function that asserts what must hold of an answer, and returns what to say if all does.

        right: what the function returned          not yet, because: the message of the assertion that failed
        not attempted: None, ..., or no body yet   your code raised: the error and its line

    The checker's hint(n) is the n-th of the hints, from the gentlest to one that all but gives the answer.
    """

    def made(check: Callable[[object], str]) -> Callable[[object], Reply]:
        name = f"sk.{check.__module__.split('.')[-1]}.{check.__name__}"

        @wraps(check)
        def told(answer: object) -> Reply:
            task = check.__name__.removeprefix("check_")
            untouched = Reply("not attempted", f"not attempted: write {task}; {name}.hint(1) is a first hint")
            if _is_starter(answer):
                return untouched
            try:
                return Reply("right", f"right: {check(_guarded(answer))}")
            except AssertionError as wrong:
                return Reply("not yet", f"not yet, because {wrong}", getattr(wrong, "pictures", {}))
            except _Raised as raised:
                if isinstance(raised.__cause__, NotImplementedError):
                    return untouched
                return Reply("your code raised", _raised(raised.__cause__, answer))
            except Exception as error:  # the answer is of a kind that the assertions did not foresee
                why = f"what it gives cannot be used: {type(error).__name__}: {one_line(error)}"
                return Reply("not yet", f"not yet, because {why}")

        told.hint = partial(_hint, hints)
        return told

    return made
