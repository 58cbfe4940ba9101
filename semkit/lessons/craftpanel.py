"""The craft panel: knobs, cost, Run and Stop, and what the run makes.

JupyterLab delivers callbacks on two threads, so the run has a thread of its own; a slider never starts work.
"""

import html
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import ipywidgets as widgets

from semkit.images.files import shown
from semkit.images.imageset import Split
from semkit.lessons import craftrun as crafting
from semkit.lessons.craftrun import Made, Progress, Settings
from semkit.lessons.jobs import Job
from semkit.lessons.panels import UNIT, WIDE, choice, display, failure, line, slider
from semkit.nets.lab import Lab, runs_folder
from semkit.protections.methods import craft_recipe, label_of
from semkit.protections.noise import save as save_noise

AGAINST = {"sem": "random perturbation", "rem": "adversarial perturbation", "em": "no perturbation"}


class CraftPanel:
    """The widgets of the craft panel and its run: see craft_panel.

    Attributes: the knobs data, method, radius, perturbation_radius, surrogate_steps, noise_steps, samples, learners and
    folder; the buttons run, stop, keep; progress; the lines cost, status, stale; the HTML of strip, losses, table;
    made: what the last run has made so far, or None.
    """

    def __init__(self, splits: Mapping[str, Split], *, lab: Lab, preset: str, seed: int, name: str):
        self._splits, self._preset, self._how = dict(splits), preset, (seed, lab)
        self._job, self.measuring = Job(name), Job(f"{name}: speed")
        self.made, self._made_of, self._at, self._progress = None, None, None, Progress()
        self._make_knobs()
        self._make_rest()
        self._default_budget()
        self._tick()
        self.measuring.start(self._measure)

    def _make_knobs(self) -> None:
        most = max(craft_recipe(method, self._preset).sgd.steps for method in AGAINST)
        step = 10 if most >= 100 else 1
        self.data = choice(widgets.Dropdown, "images", options=list(self._splits))
        names = [(f"{label_of(method)}: noise against {what}", method) for method, what in AGAINST.items()]
        self.method = choice(widgets.Dropdown, "method", options=names)
        self.radius = slider(8, 1, 32, f"radius ρu ({UNIT})")
        self.perturbation_radius = slider(4, 0, 8, f"perturbation radius ρa ({UNIT})")
        self.surrogate_steps = slider(step, step, 4 * most, "surrogate steps", step)
        self.noise_steps = slider(1, 1, 20, "noise steps for a batch")
        self.samples = slider(1, 1, 10, "EOT samples for a noise step")
        self.learners = widgets.Checkbox(False, description="train learners afterwards (ERM and AT 4)", indent=False)
        for knob in (self.radius, self.perturbation_radius, self.surrogate_steps, self.noise_steps, self.samples):
            knob.style.description_width = "20em"  # of the longest, so that all begin at one place
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
        self.folder = choice(widgets.Text, "save the noise in folder", value="protected")
        self.progress = widgets.IntProgress(description="passes", style={"description_width": "initial"}, layout=WIDE)
        lines = ("cost", "status", "stale", "strip", "losses", "table")
        self.cost, self.status, self.stale, self.strip, self.losses, self.table = map(line, lines)
        self.status.value = "not run yet"
        self.view = widgets.VBox([
            *([self.data] if len(self._splits) > 1 else []), self.method, *self._knobs.values(), self.cost,
            widgets.HBox([self.run, self.stop]), self.progress, self.status, self.stale, self.strip, self.losses,
            self.table, widgets.HBox([self.folder, self.keep]),
        ])  # fmt: skip
        self.view.add_class("semkit-craft")

    def settings(self) -> Settings:
        """The Settings that the knobs say."""
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
        """Show the cost of the knobs' settings, and mark the result below as stale if it was made with others."""
        now, split, engine = self.settings(), self._splits[self.data.value], self._how[1].engine
        passes, seconds = now.passes(len(split.train)), crafting.seconds(now, split, engine)
        took = "time not measured yet" if seconds is None else f"about {crafting.duration(seconds)}"
        self.cost.value = f"cost: {passes:,} passes, {took} on {engine.device} in {engine.precision}"
        same = self._made_of in (None, (self.data.value, now.recipe))
        self.stale.value = "" if same else "<b>The knobs have changed:</b> what is below is not theirs until Run."

    def _measure(self, cancelled: Callable[[], bool]) -> None:
        for split in self._splits.values():
            all_of_it = crafting.settings("sem", self._preset, learners=True, size=split.train.images.shape[-1])
            crafting.seconds(all_of_it, split, self._how[1].engine, measure=True)
        self._tick()

    def start(self) -> bool:
        """Start a run with the current knobs in its thread; False, and nothing is done, if one is running."""
        frozen = self.settings(), self.data.value
        return self._job.start(partial(self._work, *frozen), partial(self._begin, *frozen), self._end)

    def cancel(self) -> None:
        """Stop the run at its next step; Run with the same settings resumes it."""
        self.stop.disabled = True
        self._job.cancel()

    def wait(self, timeout: float | None = None) -> Made | None:
        """Wait for the run and return what it made; None if it was stopped or never started. Raises the run's error."""
        return self._job.wait(timeout)

    def _begin(self, now: Settings, data: str) -> None:
        self.run.disabled, self.stop.disabled, self.keep.disabled = True, False, True
        if self._made_of != (data, now.recipe):  # a run that is resumed keeps its curves
            self._progress = Progress()
        self.made, self._made_of, self._began, self._at = None, (data, now.recipe), time.monotonic(), None
        self.strip.value = self.losses.value = self.table.value = self.stale.value = ""
        self.status.value, self.progress.bar_style = "starting", ""
        self.progress.value, self.progress.max = 0, now.passes(len(self._splits[data].train))

    def _work(self, now: Settings, data: str, cancelled: Callable[[], bool]) -> Made:
        self.measuring.wait()  # because the two would slow each other down
        split, next_text, next_picture = self._splits[data], 0.0, time.monotonic() + 0.5

        def on_step(job: str, step: int, total: int, metrics: dict) -> bool:
            nonlocal next_text, next_picture
            self._at = f"step {step} of {total}", job
            if time.monotonic() > next_text:
                self._tell(metrics)
                next_text = time.monotonic() + 0.2
            if self.made is None:
                self._progress.losses[step] = metrics["loss"]
                if (began := time.monotonic()) > next_picture:
                    self._draw_unfinished(now, split, step, total, metrics)
                    # at most a tenth of the time goes into pictures
                    next_picture = time.monotonic() + max(2, 10 * (time.monotonic() - began))
            return cancelled()

        seed, lab = self._how
        shown = partial(self._show, split)
        return crafting.run(split, now, seed=seed, lab=replace(lab, on_step=on_step), on_made=shown)

    def _tell(self, metrics: dict) -> None:
        self.progress.value = metrics["done"]
        numbers = crafting.numbers(metrics, self.progress.max, time.monotonic() - self._began)
        self.status.value = f"<b>{self._at[1]}</b>: {self._at[0]}, {numbers}"

    def _draw_unfinished(self, now: Settings, split: Split, step: int, total: int, metrics: dict) -> None:
        noise = metrics["noise"]
        self._progress.look(step, metrics["surrogate"], split.train, noise)
        self.losses.value = self._progress.html(total)
        self.strip.value = crafting.strip_html(split.train, noise, now, f"unfinished: step {step} of {total}")

    def _show(self, split: Split, made: Made) -> None:
        if self.made is None:
            caption = f"{split.train.name}, {len(split.train)} images, {self._preset} preset: {made.settings}"
            self.strip.value = crafting.strip_html(split.train, made.noise.levels, made.settings, caption)
            if self._progress.losses:
                self.losses.value = self._progress.html(max(self._progress.losses))
        self.made, self.keep.disabled = made, False
        if made.settings.learners:
            self.table.value = crafting.table_html(made)

    def _end(self) -> None:
        self.run.disabled, self.stop.disabled = False, True
        took = crafting.duration(time.monotonic() - self._began)
        step, job = self._at or ("the start", "nothing is lost")
        if self._job.error:
            self.status.value, self.progress.bar_style = failure(self._job.error), "danger"
        elif self._job.result is None:
            self.status.value = f"<b>stopped</b> at {step} ({job}); Run resumes"
            self.progress.bar_style = "warning"
        else:
            self.status.value = f"<b>done</b> in {took}" + ("" if self._at else ", all of it from kept runs")
            self.progress.value, self.progress.bar_style = self.progress.max, "success"

    def save(self) -> Path:
        """Write the noise to folder/noise.safetensors and return the path; an error is shown and raised."""
        try:
            if self.made is None:
                raise ValueError("there is no noise to save yet: press Run")
            path = Path(self.folder.value).expanduser().resolve() / "noise.safetensors"
            save_noise(self.made.noise, path)
        except (OSError, ValueError) as error:
            self.status.value = failure(error)
            raise
        what = f"{label_of(self.made.settings.method)} noise of radius {self.made.noise.radius:g}"
        self.status.value = f"<b>saved</b> {html.escape(shown(path))}: {what}"
        return path

    def _repr_mimebundle_(self, **how):
        return display(self.view, **how)


def craft_panel(
    split: Split | Mapping[str, Split],
    *,
    lab: Lab | None = None,
    preset: str = "demo",
    seed: int = 0,
    name: str = "craft",
) -> CraftPanel:
    """A panel that crafts noise for a split, or for one of several by name, and trains learners on the result.

    Runs are kept in lab.cache, by default in runs_folder(): a stopped run is resumed, a finished one is instant. A new
    panel stops the run of an older one of the same `name`.
    """
    splits = split if isinstance(split, Mapping) else {split.train.name: split}
    return CraftPanel(splits, lab=lab or Lab(cache=runs_folder()), preset=preset, seed=seed, name=name)
