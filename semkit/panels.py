"""Knobs, Run and Stop over studies and figures; the only module that imports ipywidgets.

JupyterLab calls back on two threads: work runs in a thread of its own, and nothing dear happens on a slider's tick.
"""

import html
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import torch

from semkit import figures
from semkit.craft import CraftRecipe, Interrupted
from semkit.engine import Engine, Passes, predict_seconds
from semkit.files import shown
from semkit.imageset import ImageSet, Split
from semkit.measure import LABEL, interval
from semkit.models import build
from semkit.noise import Noise, one_line, save
from semkit.perturb import Clean
from semkit.plots import learner
from semkit.presets import METHODS, craft_recipe, learn_recipe
from semkit.study import crafted_noise, learned_row, runs_folder

UNIT = "levels of 255"
TRAINING_RADII = (0, 4)  # of the learners: ERM and AT
_lock = threading.RLock()
_jobs: dict[str, "Job"] = {}  # the live one of every name
_speeds: dict[tuple, tuple[float, float]] = {}  # (net, classes, size, batch, engine) -> seconds of a pass of each kind


class Job:
    """One worker thread at a time under a name: a new Job of that name stops the worker of the one before."""

    def __init__(self, name: str):
        self.name, self.running, self.error, self.result = name, False, None, None
        self._thread, self._before, self._cancel = None, None, threading.Event()
        self._succeed()

    def _succeed(self) -> None:
        """Makes this the live Job of its name; the one before is told to stop."""
        with _lock:
            before = _jobs.get(self.name)
            _jobs[self.name] = self
            if before not in (None, self):
                before.cancel()
                self._before = before._thread

    def start(self, work: Callable, begin: Callable = lambda: None, end: Callable = lambda: None) -> bool:
        """Whether work(cancelled) was started in a thread, between begin() and end(); False if one is running."""
        with _lock:
            if self.running:
                return False
            self._succeed()
            self._cancel.clear()
            self.running, self.error, self.result = True, None, None
            begin()
            self._thread = threading.Thread(target=self._main, args=(work, end), daemon=True)
            self._thread.start()
            return True

    def _main(self, work: Callable, end: Callable) -> None:
        try:
            if self._before:
                self._before.join()
            self.result = work(self._cancel.is_set)
        except Interrupted:
            pass  # as asked: neither an error nor a result
        except BaseException as error:
            self.error = error
        with _lock:
            self.running = False
            end()

    def cancel(self) -> None:
        """Asks the worker to stop at its next step; does not wait for it."""
        self._cancel.set()

    def wait(self, timeout: float | None = None):
        """What the last work returned, once it is over; None if it was stopped or there was none.

        Raises its error, and TimeoutError if it takes longer than `timeout` seconds. Ctrl-C stops the worker too.
        """
        if self._thread:
            try:
                self._thread.join(timeout)
            except KeyboardInterrupt:
                self.cancel()
                raise
            if self._thread.is_alive():
                raise TimeoutError(f"still running after {timeout:g} s")
        if self.error:
            raise self.error
        return self.result


def _slider(start: int, low: int, high: int, text: str, step: int = 1) -> widgets.IntSlider:
    how = dict(style={"description_width": "initial"}, layout={"width": "40em", "max_width": "98%"})
    return widgets.IntSlider(start, low, high, step, description=text, continuous_update=False, **how)


def _choice(kind: type, text: str, **how):
    return kind(description=text, style={"description_width": "initial"}, layout={"width": "max-content"}, **how)


def _line(of: str) -> widgets.HTML:
    line = widgets.HTML()
    line.add_class(f"semkit-{of}")
    return line


def _failure(error: BaseException) -> str:
    return f"<b>failed:</b> {html.escape(f'{type(error).__name__}: {one_line(error)}')}"


def _display(view: widgets.Widget, kind: str, **how) -> dict:
    """What a notebook shows of a panel; a page without a kernel has only its text/plain."""
    found = view._repr_mimebundle_(**how)
    data = found[0] if isinstance(found, tuple) else found
    return {**data, "text/plain": f"{kind}: run this cell to use it"}


class FigurePanel:
    """Knobs over a drawing that is quick enough to be made anew at every change.

    knobs: widgets by name. Attributes: knobs, view. An error is shown in the panel and raised.
    """

    def __init__(self, draw: Callable, knobs: Mapping[str, widgets.Widget]):
        self._draw, self.knobs, self._drawing = draw, dict(knobs), threading.Lock()
        self.figure, self.status = _line("figure"), _line("status")
        self.view = widgets.VBox([*self.knobs.values(), self.status, self.figure])
        for knob in self.knobs.values():
            knob.observe(lambda _: self.redraw(), "value")
        self.redraw()

    def redraw(self) -> None:
        """Draws with the knobs as they are now."""
        with self._drawing:  # the values are read inside, so that the last drawing is that of the last values
            try:
                drawn = self._draw(**{name: knob.value for name, knob in self.knobs.items()})
                self.figure.value, self.status.value = figures.as_html(*drawn), ""
            except Exception as error:
                self.figure.value, self.status.value = "", _failure(error)
                raise

    def _repr_mimebundle_(self, **how):
        return _display(self.view, "a figure with knobs", **how)


def figure_panel(draw: Callable, **knobs) -> FigurePanel:
    """A panel that shows draw(**values) -> (Figure, alternative text[, caption]), anew whenever a knob changes.

    knobs: ipywidgets, or (low, high, start) for a slider named after the knob, in levels where it is a radius.
    For drawings below 0.3 s. Raises what the first drawing raises.
    """

    def knob(name: str, given):
        if isinstance(given, widgets.Widget):
            return given
        low, high, start = given
        text = name.replace("_", " ")
        return _slider(start, low, high, f"{text} ({UNIT})" if text.endswith("radius") else text)

    return FigurePanel(draw, {name: knob(name, given) for name, given in knobs.items()})


def _accuracies(rows: Sequence[dict]) -> str:
    """The rows as a sentence: the alternative text of their figure."""
    found = []
    for method, radius in dict.fromkeys((row["method"], row["training_radius"]) for row in rows):
        mine = [row["last"] for row in rows if (row["method"], row["training_radius"]) == (method, radius)]
        found.append(f"{LABEL.get(method, method)} {learner(radius)} {100 * interval(mine)[0]:.0f} %")
    return f"Accuracy on clean test images: {', '.join(found)}"


def sweep_panel(rows: Sequence[dict], *, title: str, chance: float | None = None, caption: str = "") -> FigurePanel:
    """A panel over the rows of a grid: which methods and training radii the accuracy figure shows.

    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("there are no rows to show")
    radii = sorted({row["training_radius"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def draw(methods: tuple, radii: tuple):
        low, high = radii
        chosen = [row for row in rows if row["method"] in methods and low <= row["training_radius"] <= high]
        if not chosen:
            raise ValueError("choose one method or more")
        return figures.accuracy_figure(chosen, chance=chance, title=title), _accuracies(chosen), caption

    names = [(LABEL.get(method, method), method) for method in methods]
    which = _choice(widgets.SelectMultiple, "methods", options=names, value=methods, rows=min(len(methods), 9))
    of = _choice(
        widgets.SelectionRangeSlider, f"training radius ({UNIT})", options=[(learner(r), r) for r in radii],
        index=(0, len(radii) - 1), continuous_update=False,
    )  # fmt: skip
    of.layout.width = "40em"
    return FigurePanel(draw, {"methods": which, "radii": of})


@dataclass(frozen=True)
class Settings:
    """What a run does: the knobs as they were when Run was pressed."""

    data: str
    method: str
    recipe: CraftRecipe
    learners: bool

    def __str__(self) -> str:
        recipe = self.recipe
        return (
            f"{LABEL[self.method]} noise for {self.data}, radius {recipe.radius:g}, noise side {recipe.noise_side}, "
            f"surrogate side {recipe.surrogate_side}, {recipe.sgd.steps} surrogate steps, {recipe.steps} noise steps, "
            f"{recipe.samples} samples"
        )


@dataclass
class Made:
    """What a run has made so far: its noise, and the rows of the learners."""

    settings: Settings
    noise: Noise
    rows: list[dict] = field(default_factory=list)


def _speed(net: str, classes: int, size: int, batch: int, engine: Engine) -> tuple[float, float]:
    """Seconds of an input-gradient pass and of a training pass on this machine, measured once."""
    key = net, classes, size, batch, engine
    if key not in _speeds:
        images = torch.zeros((batch, 3, size, size), dtype=torch.uint8)
        each = Passes(input_gradient=1), Passes(training=1)
        _speeds[key] = tuple(predict_seconds(build(net, classes, size=size), images, one, engine) for one in each)
    return _speeds[key]


def _first_of_each_class(images: ImageSet, most: int = 8) -> list[int]:
    labels = images.labels.tolist()
    return [labels.index(label) for label in dict.fromkeys(labels)][:most]


