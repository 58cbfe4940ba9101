"""Knobs, Run and Stop over studies and figures; the only module that imports ipywidgets.

JupyterLab calls back on two threads: work runs in a thread of its own, and nothing dear happens on a slider's tick.
"""

import html
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets

from semkit import crafting, figures
from semkit.crafting import Made, Settings
from semkit.engine import Engine
from semkit.files import shown
from semkit.imageset import Split
from semkit.jobs import Job
from semkit.measure import LABEL
from semkit.noise import one_line
from semkit.noise import save as save_noise
from semkit.plots import learner
from semkit.presets import craft_recipe
from semkit.study import runs_folder

UNIT = "levels of 255"
AGAINST = {"sem": "random perturbation", "rem": "adversarial perturbation", "em": "no perturbation"}
WIDE = {"width": "40em", "max_width": "98%"}


def _slider(start: int, low: int, high: int, text: str, step: int = 1) -> widgets.IntSlider:
    how = dict(style={"description_width": "initial"}, layout=WIDE, continuous_update=False)
    return widgets.IntSlider(start, low, high, step, description=text, **how)


def _choice(kind: type, text: str, **how):
    return kind(description=text, style={"description_width": "initial"}, layout={"width": "max-content"}, **how)


def _line(of: str) -> widgets.HTML:
    line = widgets.HTML()
    line.add_class(f"semkit-{of}")
    return line


def _failure(error: BaseException) -> str:
    return f"<b>failed:</b> {html.escape(f'{type(error).__name__}: {one_line(error)}')}"


def _display(view: widgets.Widget, **how) -> dict:
    """What a notebook shows of a panel; a page without a kernel has only its text/plain."""
    return {**view._repr_mimebundle_(**how), "text/plain": "a panel: run this cell to use it"}


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
        return _display(self.view, **how)


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
        return figures.accuracy_figure(chosen, chance=chance, title=title), crafting.accuracies(chosen), caption

    names = [(LABEL.get(method, method), method) for method in methods]
    which = _choice(widgets.SelectMultiple, "methods", options=names, value=methods, rows=min(len(methods), 9) + 1)
    of = _choice(
        widgets.SelectionRangeSlider, f"training radius ({UNIT})", options=[(learner(r), r) for r in radii],
        index=(0, len(radii) - 1), continuous_update=False,
    )  # fmt: skip
    of.layout.width = "40em"
    return FigurePanel(draw, {"methods": which, "radii": of})


class CraftPanel:
    """Knobs of crafting, its cost, Run and Stop, and what the run makes: see craft_panel.

    Attributes: the knobs data, method, radius, perturbation_radius, surrogate_steps, noise_steps, samples, learners and
    folder; the buttons run, stop, keep; progress; the lines cost, status, stale; the pictures strip, losses, table;
    made: what the last run has made so far, or None.
    """

    def __init__(self, splits: Mapping[str, Split], *, cache: Path, preset: str, seed: int, engine: Engine, name: str):
        self._splits, self._preset, self._how = dict(splits), preset, dict(seed=seed, engine=engine, cache=cache)
        self._job, self.measuring = Job(name), Job(f"{name}: speed")
        self.made, self._made_of, self._at, self._losses = None, None, None, []
        self._make_knobs()
        self._make_rest()
        self._default_budget()
        self._tick()
        self.measuring.start(self._measure)

    def _make_knobs(self) -> None:
        most = max(craft_recipe(method, self._preset).sgd.steps for method in AGAINST)
        step = 10 if most >= 100 else 1
        self.data = _choice(widgets.Dropdown, "images", options=list(self._splits))
        names = [(f"{LABEL[method]}: noise against {what}", method) for method, what in AGAINST.items()]
        self.method = _choice(widgets.Dropdown, "method", options=names)
        self.radius = _slider(8, 1, 32, f"radius ρu ({UNIT})")
        self.perturbation_radius = _slider(4, 0, 8, f"perturbation radius ρa ({UNIT})")
        self.surrogate_steps = _slider(step, step, 4 * most, "surrogate steps", step)
        self.noise_steps = _slider(1, 1, 20, "noise steps for a batch")
        self.samples = _slider(1, 1, 10, "EOT samples for a noise step")
        self.learners = widgets.Checkbox(False, description="train learners afterwards (ERM and AT 4)", indent=False)
        names = ("radius", "perturbation_radius", "surrogate_steps", "noise_steps", "samples", "learners")
        self._knobs = {name: getattr(self, name) for name in names}
        self.method.observe(lambda _: self._default_budget(), "value")
        for knob in (self.data, self.method, *self._knobs.values()):
            knob.observe(lambda _: self._tick(), "value")

    def _make_rest(self) -> None:
        self.run = widgets.Button(description="Run", button_style="primary")
        self.stop = widgets.Button(description="Stop", button_style="warning", disabled=True)
        self.keep = widgets.Button(description="Save", disabled=True)
        for button, do in ((self.run, self.start), (self.stop, self.cancel), (self.keep, self.save)):
            button.on_click(lambda _, do=do: do())
        self.folder = _choice(widgets.Text, "save the noise in folder", value="protected")
        self.progress = widgets.IntProgress(description="passes", style={"description_width": "initial"}, layout=WIDE)
        lines = ("cost", "status", "stale", "strip", "losses", "table")
        self.cost, self.status, self.stale, self.strip, self.losses, self.table = map(_line, lines)
        self.status.value = "not run yet"
        self.view = widgets.VBox([
            *([self.data] if len(self._splits) > 1 else []), self.method, *self._knobs.values(), self.cost,
            widgets.HBox([self.run, self.stop]), self.progress, self.status, self.stale, self.strip, self.losses,
            self.table, widgets.HBox([self.folder, self.keep]),
        ])  # fmt: skip
        self.view.add_class("semkit-craft")

    def settings(self) -> Settings:
        """The knobs as they are now."""
        size = self._splits[self.data.value].train.images.shape[-1]
        knobs = {name: knob.value for name, knob in self._knobs.items()}
        return crafting.settings(self.method.value, self._preset, size=size, **knobs)

    def _default_budget(self) -> None:
        size = self._splits[self.data.value].train.images.shape[-1]
        recipe = craft_recipe(self.method.value, self._preset, size=size)
        self.surrogate_steps.value, self.noise_steps.value = recipe.sgd.steps, recipe.steps
        self.samples.value = recipe.samples
        self.perturbation_radius.disabled = self.method.value == "em"

    def _tick(self) -> None:
        """What a change of a knob does: the cost anew, and the result marked if it is not that of these knobs."""
        now, split, engine = self.settings(), self._splits[self.data.value], self._how["engine"]
        passes, seconds = now.passes(len(split.train)), crafting.seconds(now, split, engine)
        took = "time not measured yet" if seconds is None else f"about {crafting.duration(seconds)}"
        self.cost.value = f"cost: {passes:,} passes, {took} on {engine.device} in {engine.precision}"
        same = self._made_of in (None, (self.data.value, now.recipe))
        self.stale.value = "" if same else "<b>The knobs have changed:</b> what is below is not theirs until Run."

    def _measure(self, cancelled: Callable[[], bool]) -> None:
        for split in self._splits.values():
            all_of_it = crafting.settings("sem", self._preset, learners=True, size=split.train.images.shape[-1])
            crafting.seconds(all_of_it, split, self._how["engine"], measure=True)
        self._tick()

    def start(self) -> bool:
        """Runs with the knobs as they are now, in a thread; False if a run is going on."""
        frozen = self.settings(), self.data.value
        return self._job.start(partial(self._work, *frozen), partial(self._begin, *frozen), self._end)

    def cancel(self) -> None:
        """Stops the run at its next step; the same settings go on from there at the next Run."""
        self.stop.disabled = True
        self._job.cancel()

    def wait(self, timeout: float | None = None) -> Made | None:
        """What the run made, once it is over; None if it was stopped or there was none. Raises its error."""
        return self._job.wait(timeout)

    def _begin(self, now: Settings, data: str) -> None:
        self.run.disabled, self.stop.disabled, self.keep.disabled = True, False, True
        self.made, self._made_of, self._began = None, (data, now.recipe), time.monotonic()
        self._at, self._losses = None, []
        self.strip.value = self.losses.value = self.table.value = self.stale.value = ""
        self.status.value, self.progress.bar_style = "starting", ""
        self.progress.value, self.progress.max = 0, now.passes(len(self._splits[data].train))

    def _work(self, now: Settings, data: str, cancelled: Callable[[], bool]) -> Made:
        self.measuring.wait()  # else they would slow each other down
        split, next_text, next_picture = self._splits[data], 0.0, time.monotonic() + 0.5

        def on_step(job: str, step: int, total: int, metrics: dict) -> bool:
            nonlocal next_text, next_picture
            self._at = f"step {step} of {total}", job
            if time.monotonic() > next_text:
                self._tell(metrics)
                next_text = time.monotonic() + 0.2
            if self.made is None:
                self._losses.append((step, metrics["loss"]))
                if (began := time.monotonic()) > next_picture:
                    self._draw_unfinished(now, split, total, metrics)
                    # At most a tenth of the time goes into pictures.
                    next_picture = time.monotonic() + max(2, 10 * (time.monotonic() - began))
            return cancelled()

        return crafting.run(split, now, on_step=on_step, on_made=partial(self._show, split), **self._how)

    def _tell(self, metrics: dict) -> None:
        self.progress.value = metrics["done"]
        numbers = crafting.numbers(metrics, self.progress.max, time.monotonic() - self._began)
        self.status.value = f"<b>{self._at[1]}</b>: {self._at[0]}, {numbers}"

    def _draw_unfinished(self, now: Settings, split: Split, total: int, metrics: dict) -> None:
        self.losses.value = crafting.losses_html(self._losses, total)
        if "noise" in metrics:
            self.strip.value = crafting.strip_html(split.train, metrics["noise"], now, f"unfinished: {self._at[0]}")

    def _show(self, split: Split, made: Made) -> None:
        if self.made is None:
            caption = f"{split.train.name}, {len(split.train)} images, {self._preset} preset: {made.settings}"
            self.strip.value = crafting.strip_html(split.train, made.noise.levels, made.settings, caption)
            if self._losses:
                self.losses.value = crafting.losses_html(self._losses, self._losses[-1][0])
        self.made, self.keep.disabled = made, False
        if made.settings.learners:
            self.table.value = crafting.table_html(made)

    def _end(self) -> None:
        self.run.disabled, self.stop.disabled = False, True
        took = crafting.duration(time.monotonic() - self._began)
        step, job = self._at or ("the start", "nothing is lost")
        if self._job.error:
            self.status.value, self.progress.bar_style = _failure(self._job.error), "danger"
        elif self._job.result is None:
            self.status.value = f"<b>stopped</b> at {step} ({job}); Run resumes"
            self.progress.bar_style = "warning"
        else:
            self.status.value = f"<b>done</b> in {took}" + ("" if self._at else ", all of it from kept runs")
            self.progress.value, self.progress.bar_style = self.progress.max, "success"

    def save(self) -> Path:
        """Writes the noise to folder/noise.safetensors, and says where; shows and raises what goes wrong."""
        try:
            if self.made is None:
                raise ValueError("there is no noise to save yet: press Run")
            path = Path(self.folder.value).expanduser().resolve() / "noise.safetensors"
            save_noise(self.made.noise, path)
        except (OSError, ValueError) as error:
            self.status.value = _failure(error)
            raise
        what = f"{LABEL[self.made.settings.method]} noise of radius {self.made.noise.radius:g}"
        self.status.value = f"<b>saved</b> {html.escape(shown(path))}: {what}"
        return path

    def _repr_mimebundle_(self, **how):
        return _display(self.view, **how)


def craft_panel(
    split: Split | Mapping[str, Split],
    *,
    cache: Path | None = None,
    preset: str = "demo",
    seed: int = 0,
    engine: Engine | None = None,
    name: str = "craft",
) -> CraftPanel:
    """The panel that crafts noise for a split, or for one of several by name, and trains learners on it.

    Runs are kept in `cache`, study.runs_folder() unless given: a stopped one goes on, a finished one is instant.
    A new panel stops the run of the one before with the same `name`.
    """
    splits = split if isinstance(split, Mapping) else {split.train.name: split}
    how = dict(cache=cache or runs_folder(), preset=preset, seed=seed, engine=engine or Engine(), name=name)
    return CraftPanel(splits, **how)
