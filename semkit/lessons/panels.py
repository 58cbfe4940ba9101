"""Figures with knobs, guesses and quizzes, and what every panel is made of: widgets, and a worker thread.

JupyterLab calls back on two threads, so a drawing reads its knobs under a lock.
"""

import html
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import ClassVar

import ipywidgets as widgets

from semkit.analysis.canvas import Figure, as_html
from semkit.images.files import one_line
from semkit.lessons.answers import Reply

UNIT = "levels of 255"
WIDE = {"width": "40em", "max_width": "98%"}


def slider(start: float, low: float, high: float, text: str, step: float = 1) -> widgets.Widget:
    """A slider, over whole numbers if step is one, whose value changes when it is let go, not on the way.

    >>> slider(8, 1, 32, "noise radius").value
    8
    """
    kind = widgets.IntSlider if isinstance(step, int) else widgets.FloatSlider
    how = dict(style={"description_width": "initial"}, layout=WIDE, continuous_update=False)
    return kind(value=start, min=low, max=high, step=step, description=text, **how)


def choice(kind: type, text: str, **how):
    """A widget of this kind, as wide as its description and its options need."""
    return kind(description=text, style={"description_width": "initial"}, layout={"width": "max-content"}, **how)


def line(of: str) -> widgets.HTML:
    """A line of HTML with the CSS class semkit-OF."""
    line = widgets.HTML()
    line.add_class(f"semkit-{of}")
    return line


def failure(error: BaseException) -> str:
    """The error as one line of HTML."""
    return f"<b>failed:</b> {html.escape(f'{type(error).__name__}: {one_line(error)}')}"


def display(view: widgets.Widget, plain: str = "a panel: run this cell to use it", **how) -> dict:
    """What a notebook shows of a panel; a page without a kernel has only the plain text."""
    return {**view._repr_mimebundle_(**how), "text/plain": plain}


class Job:
    """A worker thread, one per name: a new Job of the same name stops the old one's worker and starts after it.

    running: whether the worker is at work. result, error: what it returned or raised, else None.
    """

    _newest: ClassVar[dict[str, "Job"]] = {}  # of every name
    _turns: ClassVar[dict[str, threading.Lock]] = defaultdict(
        threading.Lock
    )  # of every name: the worker at work has it
    _lock = threading.RLock()

    def __init__(self, name: str):
        self.name, self.running, self.error, self.result = name, False, None, None
        self._thread, self._cancel = None, threading.Event()
        self._succeed()

    def _succeed(self) -> None:
        """Make this the newest job of its name and ask the one before to stop."""
        with self._lock:
            before = self._newest.get(self.name, self)
            self._newest[self.name] = self
            if before is not self:
                before.cancel()

    def start(self, work: Callable, begin: Callable = lambda: None, end: Callable = lambda: None) -> bool:
        """Call begin(), then run work(cancelled) and end() in a thread; False, and nothing is done, if one is running.

        cancelled() is True once the work should stop; it stops by returning or by raising Interrupted.
        """
        with self._lock:
            if self.running:
                return False
            self._succeed()
            self._cancel.clear()
            self.running, self.error, self.result = True, None, None
            begin()
            how = dict(name=f"semkit {self.name}", daemon=True)
            self._thread = threading.Thread(target=self._main, args=(work, end), **how)
            self._thread.start()
            return True

    def _main(self, work: Callable, end: Callable) -> None:
        from semkit.nets.lab import Interrupted  # takes torch, which panels without a worker need not

        with self._turns[self.name]:
            try:
                self.result = work(self._cancel.is_set)
            except Interrupted:
                pass  # stopped as asked: neither error nor result
            except BaseException as error:
                self.error = error
        with self._lock:
            self.running = False
            end()

    def cancel(self) -> None:
        """Ask the worker to stop at its next step, without waiting for it."""
        self._cancel.set()

    def wait(self, timeout: float | None = None):
        """Wait for the worker and return its result; None if it was stopped or never started.

        Raises the worker's own error, and TimeoutError after `timeout` seconds. Ctrl-C stops the worker too.
        """
        try:
            if self._thread:
                self._thread.join(timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise
        if self.running:
            raise TimeoutError(f"still running after {timeout:g} s")
        if self.error:
            raise self.error
        return self.result


class FigurePanel:
    """Knobs over a figure, which is drawn again whenever one of them changes.

    knobs: widgets by name. Attributes: knobs, view. An error is shown in the panel and raised.
    """

    def __init__(self, draw: Callable, knobs: Mapping[str, widgets.Widget]):
        self._draw, self.knobs, self._drawing = draw, dict(knobs), threading.Lock()
        self.figure, self.status = line("figure"), line("status")
        self.view = widgets.VBox([*self.knobs.values(), self.status, self.figure])
        for knob in self.knobs.values():
            knob.observe(lambda _: self.redraw(), "value")
        self.redraw()

    def redraw(self) -> None:
        """Draw the figure with the current values of the knobs."""
        with self._drawing:  # the values are read inside, so that the last drawing is that of the last values
            try:
                drawn = self._draw(**{name: knob.value for name, knob in self.knobs.items()})
                self.figure.value, self.status.value = as_html(*drawn), ""
            except Exception as error:
                self.figure.value, self.status.value = "", failure(error)
                raise

    def _repr_mimebundle_(self, **how):
        return display(self.view, **how)


def figure_panel(draw: Callable, **knobs) -> FigurePanel:
    """A panel that shows draw(**values) -> (Figure, alternative text[, caption]), drawn again whenever a knob changes.

    knobs: ipywidgets, or (low, high, start) for a slider named after the knob, in levels where it is a radius.
    For figures that take less than 0.3 s. Raises what the first drawing raises.

        sk.panels.figure_panel(sk.twopixels.draw_landscape, window=sk.panels.slider(0.5, 0, 1.5, "window", 0.1))
    """

    def knob(name: str, given):
        if isinstance(given, widgets.Widget):
            return given
        low, high, start = given
        text = name.replace("_", " ")
        return slider(start, low, high, f"{text} ({UNIT})" if text.endswith("radius") else text)

    return FigurePanel(draw, {name: knob(name, given) for name, given in knobs.items()})


def film_panel(draw: Callable, frames: int) -> FigurePanel:
    """A panel that plays draw(frame) -> (Figure, alternative text[, caption]) for the frames 0 to frames - 1.

    It starts at the last one. `play` has the buttons; its knob `frame` is a slider.

        sk.panels.film_panel(film.draw, len(film.frames))
    """
    panel = FigurePanel(draw, {"frame": slider(frames - 1, 0, frames - 1, "frame")})
    panel.play = widgets.Play(value=frames - 1, max=frames - 1, interval=700)
    widgets.link((panel.play, "value"), (panel.knobs["frame"], "value"))
    panel.view.children = panel.play, *panel.view.children
    return panel


class Question:
    """A question with a widget to answer it. The answer is kept: the cell that runs again shows it.

    given: whether it was answered. value: the answer; before, where the slider stands, or None.
    """

    kept: ClassVar[dict[str, object]] = {}  # question -> answer, as long as the kernel runs

    def __init__(self, text: str, knob: widgets.Widget):
        self.text, self.knob, self.reply = text, knob, line("reply")
        knob.value = self.kept.get(text, knob.value)
        knob.observe(lambda change: self.kept.update({text: change["new"]}), "value")
        self.view = widgets.VBox([widgets.HTML(f"<b>{html.escape(text)}</b>"), knob, self.reply])

    @property
    def given(self) -> bool:
        return self.text in self.kept

    @property
    def value(self):
        return self.knob.value

    def __str__(self) -> str:
        return f"your guess: {self.value}" if self.given else "no guess"

    def on(self, figure: Figure, along: str = "y") -> Figure:
        """The figure with the guess, where one was given, as a dashed line in every panel: a value of y, or of x."""
        for axes in figure.axes if self.given else ():
            look = dict(color="#CC79A7", label="your guess")
            if along == "y":
                axes.axhline(self.value, ls="--", **look)
                axes.text(0.01, self.value, "your guess", va="bottom", transform=axes.get_yaxis_transform(), **look)
            else:
                axes.axvline(self.value, ls="--", **look)
                axes.text(self.value, 0.02, "your guess", rotation=90, transform=axes.get_xaxis_transform(), **look)
        return figure

    def feedback(self, truth: float | str, why: Mapping[float | str, str] | None = None) -> Reply:
        """How far off the guess was, and why people often guess so.

        why: option -> text; for numbers, in rising order, the upper end of a range of guesses -> text.
        """
        numeric, mine = not isinstance(truth, str), self.value
        told = f"{self.text}: {f'it is {truth:.3g}' if numeric else truth}"
        if not self.given:
            return Reply("guess", f"{told}; you gave no guess.")
        off = mine - truth if numeric else 0
        far = f", {abs(off):.3g} too {'high' if off > 0 else 'low'}" if off else ""
        met = (text for end, text in (why or {}).items() if (mine <= end if numeric else mine == end))
        return Reply("guess", f"{told}; you said {mine}{far}. {next(met, '')}".strip())

    def _repr_mimebundle_(self, **how):
        options = f" ({', '.join(self.knob.options)})" if hasattr(self.knob, "options") else ""
        return display(self.view, f"{self.text}{options}: run this cell to answer", **how)


def guess(text: str, *between: float | str) -> Question:
    """A guess before the result: of a number between two, or of one of several options.

    mine = sk.panels.guess("accuracy of AT 4, %", 0, 100)
    show(mine.on(accuracy_figure(rows, title=...)), alt=f"Accuracy over the training radius; {mine}")
    mine.feedback(19, {25: "So it is.", 100: "The noise looks harmless to people, but not to nets."})
    """
    low, high = between[0], between[-1]
    if isinstance(low, str):
        return Question(text, widgets.RadioButtons(options=between, value=None))
    whole = isinstance(low, int) and isinstance(high, int)
    start, step = ((low + high) // 2, 1) if whole else ((low + high) / 2, (high - low) / 100)
    return Question(text, slider(start, low, high, "", step))


def quiz(text: str, options: Mapping[str, str], right: str) -> Question:
    """A question with options -> the reason why each is right or wrong, shown once it is chosen.

    Raises ValueError where `right` is no option.

    >>> quiz("Which surrogate does SEM train?", {"ERM": "That is EM's.", "AT": "So it is."}, right="AT").given
    False
    """
    if right not in options:
        raise ValueError(f"the right answer must be one of {', '.join(options)}, got {right!r}")
    asked = guess(text, *options)

    def tell(chosen: str) -> None:
        kind = "right" if chosen == right else "not yet"
        asked.reply.value = Reply(kind, f"{kind}: {options[chosen]}")._repr_html_()

    asked.knob.observe(lambda change: tell(change["new"]), "value")
    if asked.given:
        tell(asked.value)
    return asked
