"""Figures with knobs, and what every panel is made of: with `craftpanel` the only module that imports ipywidgets.

JupyterLab calls back on two threads, so a drawing reads its knobs under a lock.
"""

import html
import threading
from collections.abc import Callable, Mapping

import ipywidgets as widgets
import pandas as pd

from semkit.analysis.canvas import as_html
from semkit.analysis.statistics import Rows, learner
from semkit.images.files import one_line

UNIT = "levels of 255"
WIDE = {"width": "40em", "max_width": "98%"}


def slider(start: float, low: float, high: float, text: str, step: float = 1) -> widgets.Widget:
    """A slider, over whole numbers if step is one, whose value changes when it is let go, not on the way."""
    kind = widgets.IntSlider if isinstance(step, int) else widgets.FloatSlider
    how = dict(style={"description_width": "initial"}, layout=WIDE, continuous_update=False)
    return kind(value=start, min=low, max=high, step=step, description=text, **how)


def choice(kind: type, text: str, **how):
    """A widget of the kind that is as wide as its description and its choices."""
    return kind(description=text, style={"description_width": "initial"}, layout={"width": "max-content"}, **how)


def line(of: str) -> widgets.HTML:
    """A line of HTML that a page finds as .semkit-OF."""
    line = widgets.HTML()
    line.add_class(f"semkit-{of}")
    return line


def failure(error: BaseException) -> str:
    """The error as one line of HTML."""
    return f"<b>failed:</b> {html.escape(f'{type(error).__name__}: {one_line(error)}')}"


def display(view: widgets.Widget, **how) -> dict:
    """What a notebook shows of a panel; a page without a kernel has only its text/plain."""
    return {**view._repr_mimebundle_(**how), "text/plain": "a panel: run this cell to use it"}


class FigurePanel:
    """Knobs over a drawing that is quick enough to be made anew at every change.

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
        """Draws with the knobs as they are now."""
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
    """A panel that shows draw(**values) -> (Figure, alternative text[, caption]), anew whenever a knob changes.

    knobs: ipywidgets, or (low, high, start) for a slider named after the knob, in levels where it is a radius.
    For drawings below 0.3 s. Raises what the first drawing raises.
    """

    def knob(name: str, given):
        if isinstance(given, widgets.Widget):
            return given
        low, high, start = given
        text = name.replace("_", " ")
        return slider(start, low, high, f"{text} ({UNIT})" if text.endswith("radius") else text)

    return FigurePanel(draw, {name: knob(name, given) for name, given in knobs.items()})


def sweep_panel(rows: Rows, *, title: str, chance: float | None = None, caption: str = "") -> FigurePanel:
    """A panel over the rows of a grid: which methods and training radii the accuracy figure shows.

    Raises ValueError without rows.
    """
    from semkit.analysis import figures  # late, because these take torch, which other panels need not
    from semkit.lessons.craftrun import accuracies
    from semkit.protections.methods import label_of

    rows = pd.DataFrame(rows)
    if rows.empty:
        raise ValueError("there are no rows to show")
    radii, methods = sorted(rows["training_radius"].unique().tolist()), rows["method"].unique().tolist()

    def draw(methods: tuple, radii: tuple):
        chosen = rows[rows["method"].isin(methods) & rows["training_radius"].between(*radii)]
        if chosen.empty:
            raise ValueError("choose one method or more")
        return figures.accuracy_figure(chosen, chance=chance, title=title), accuracies(chosen), caption

    names = [(label_of(method), method) for method in methods]
    which = choice(widgets.SelectMultiple, "methods", options=names, value=methods, rows=min(len(methods), 9) + 1)
    of = choice(
        widgets.SelectionRangeSlider, f"training radius ({UNIT})", options=[(learner(r), r) for r in radii],
        index=(0, len(radii) - 1), continuous_update=False,
    )  # fmt: skip
    of.layout.width = "40em"
    return FigurePanel(draw, {"methods": which, "radii": of})
