"""The craft panel: knobs, cost, Run and Stop, the table of all runs, and two of them side by side.

JupyterLab delivers callbacks on two threads, so the run has a thread of its own; a slider never starts work.
"""

import html
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import ipywidgets as widgets

from semkit.analysis.cost import seconds_of
from semkit.images.files import duration, shown
from semkit.images.imageset import ImageSet, Split
from semkit.lessons import craftrun as crafting
from semkit.lessons.craftrun import History, Made, Progress, Settings
from semkit.lessons.page import mapped
from semkit.lessons.panels import UNIT, WIDE, Job, choice, display, failure, line, slider
from semkit.nets.lab import Lab, runs_folder
from semkit.protections.methods import craft_recipe, label_of
from semkit.protections.noise import save as save_noise

AGAINST = {"sem": "random perturbation", "rem": "adversarial perturbation", "em": "no perturbation"}


def table_html(history: History, by: str, marks: Mapping[int, str]) -> str:
    """The table of runs; marks: number of a run -> what stands before it."""
    if not history.records:
        return ""
    table, seeds = history.table(by), history.seeds.groupby("run")
    for name in crafting.LEARNERS:
        table[name] = table["run"].map(seeds[name].agg(crafting.cells))
    table["PSNR"] = table["PSNR"].map(lambda psnr: f"{psnr:.1f}" + " (visible?)" * (psnr < crafting.VISIBLE))
    table.insert(0, "", table["run"].map(marks).fillna(""))
    if table["images"].nunique() == 1:
        table = table.drop(columns="images")
    caption = "all runs: passes and seconds of one seed's noise, PSNR in dB, accuracy on clean test images in %"
    forms = {"passes": "{:,}".format, "seconds": "{:.0f}".format}
    return crafting.page(table, caption, index=False, formatters=forms)


def compared_html(history: History, marks: Mapping[int, str]) -> str:
    """Runs side by side, the noise and the curves of the first seed and all accuracies; marks: number -> A or B."""
    cards = []
    for number, seeds in history.seeds.groupby("run"):
        if mark := marks.get(number):
            title = html.escape(f"{mark}: run {number}, {seeds['recipe'].iloc[0]}")
            pictures = "".join(seeds.iloc[0][["strip", "curves"]].dropna())
            reached = crafting.accuracies_html(seeds) if seeds[[*crafting.LEARNERS]].notna().any(axis=None) else ""
            cards.append(f"<div style='flex:1 1 24em'><h4>{title}</h4>{pictures}{reached}</div>")
    return f"<div style='display:flex;flex-wrap:wrap;gap:1em'>{''.join(cards)}</div>"


class CraftPanel:
    """A panel that crafts noise for a split, or for one of several by name, and trains learners on the result.

    Runs are kept in lab.cache, by default in runs_folder(): a stopped run is resumed, a finished one is instant, and
    the table has those of other kernels. seed: the first. A new panel stops the run of an older one of the same name.
    measured: the folder of a sweep of the design `map`; if it is there, the knobs of SEM show what was measured.

        sk.craftpanel.CraftPanel(sk.load("shapes"))

    Attributes: the knobs data, method, radius, perturbation_radius, surrogate_steps, noise_steps, samples, learners,
    seeds, sort, a, b, pin and folder; the buttons budget, run, stop, keep; progress; the lines note, cost, status,
    stale, measured; the HTML of strip and losses of the run under way, of table and compared; history: all runs; made:
    what the last run has made so far of its first seed, or None.
    """

    def __init__(
        self,
        split: Split | Mapping[str, Split],
        *,
        lab: Lab | None = None,
        preset: str = "demo",
        seed: int = 0,
        name: str = "craft",
        measured: str | Path = "",
    ):
        self._splits = split if isinstance(split, Mapping) else {split.train.name: split}
        self._preset, self._how = preset, (seed, lab := lab or Lab(cache=runs_folder()))
        self._job, self.measuring, self._drawing = Job(name), Job(f"{name}: speed"), threading.RLock()
        self._map = mapped(Path(measured)) if measured else None
        self.made, self._at, self._progress, self.history = None, None, {}, History.opened(lab, preset)
        self._make_knobs()
        self._make_rest()
        self._preset_budget()
        self._compare(len(self.history.table()))
        self._tick()
        self.measuring.start(self._measure)

    def _make_knobs(self) -> None:
        most = max(craft_recipe(method, self._preset).sgd.steps for method in AGAINST)
        step = 15 if most >= 100 else 1  # so that the measured steps and the presets' are on the slider
        self.data = choice(widgets.Dropdown, "images", options=list(self._splits))
        names = [(f"{label_of(method)}: noise against {what}", method) for method, what in AGAINST.items()]
        self.method = choice(widgets.Dropdown, "method", options=names)
        self.radius = slider(8, 1, 32, f"noise radius ρu ({UNIT})")
        self.perturbation_radius = slider(4, 0, 8, f"perturbation radius ρa ({UNIT})")
        self.surrogate_steps = slider(step, step, 4 * most, "surrogate steps", step)
        self.noise_steps = slider(1, 1, 20, "noise steps for a batch")
        self.samples = slider(1, 1, 10, "EOT samples for a noise step")
        self.learners = widgets.Checkbox(False, description="train learners afterwards (ERM and AT 4)", indent=False)
        self.seeds = slider(1, 1, 5, "seeds")
        names = ("radius", "perturbation_radius", "surrogate_steps", "noise_steps", "samples", "learners")
        self._knobs = {name: getattr(self, name) for name in names}
        for knob in (*self._knobs.values(), self.seeds):
            knob.style.description_width = "20em"  # of the longest, so that all begin at one place
        for knob in (self.data, self.method, *self._knobs.values(), self.seeds):
            knob.observe(lambda _: self._tick(), "value")

    def _make_rest(self) -> None:
        what = dict(description="preset's budget", tooltip="surrogate steps, noise steps and samples of the preset")
        self.budget = widgets.Button(**what, layout={"width": "max-content"})
        self.run = widgets.Button(description="Run", button_style="primary")
        self.stop = widgets.Button(description="Stop", button_style="warning", disabled=True)
        self.keep = widgets.Button(description="Save", disabled=True)
        does = {self.budget: self._preset_budget, self.run: self.start, self.stop: self.cancel, self.keep: self.save}
        for button, do in does.items():
            button.on_click(lambda _, do=do: do())
        self.folder = choice(widgets.Text, "save the last run's noise in folder", value="protected")
        self.progress = widgets.IntProgress(description="passes", style={"description_width": "initial"}, layout=WIDE)
        self.sort = choice(widgets.Dropdown, "sort by", options=list(crafting.SORTED))
        self.a, self.b = (choice(widgets.BoundedIntText, f"{letter}: run", max=0) for letter in "AB")
        self.pin = widgets.Checkbox(False, description="keep A", indent=False)
        for knob in (self.sort, self.a, self.b):
            knob.observe(lambda _: self._draw_history(), "value")
        lines = ("note", "cost", "status", "stale", "strip", "losses", "measured", "table", "compared")
        for name in lines:
            setattr(self, name, line(name))
        self.status.value = "not run yet"
        self.view = widgets.VBox([
            *([self.data] if len(self._splits) > 1 else []), self.method, *self._knobs.values(), self.seeds, self.note,
            self.cost, widgets.HBox([self.run, self.stop, self.budget]), self.progress, self.status, self.stale,
            self.measured, self.losses, self.strip, widgets.HBox([self.sort, self.a, self.b, self.pin]), self.table,
            self.compared, widgets.HBox([self.folder, self.keep]),
        ])  # fmt: skip
        self.view.add_class("semkit-craft")

    def settings(self) -> Settings:
        """The Settings that the knobs say."""
        size = self._splits[self.data.value].train.images.shape[-1]
        knobs = {name: knob.value for name, knob in self._knobs.items()}
        return crafting.settings(self.method.value, self._preset, size=size, **knobs)

    def _preset_budget(self) -> None:
        size = self._splits[self.data.value].train.images.shape[-1]
        recipe = craft_recipe(self.method.value, self._preset, size=size)
        self.surrogate_steps.value, self.noise_steps.value = recipe.sgd.steps, recipe.steps
        self.samples.value = recipe.samples

    def _tick(self) -> None:
        """Show what a run of the knobs' settings costs, and whether the table has it."""
        now, split, engine = self.settings(), self._splits[self.data.value], self._how[1].engine
        passes, seconds = now.passes(len(split.train)), seconds_of(now.recipes, split.train, engine, may_probe=False)
        took = "time not measured yet" if seconds is None else f"about {duration(self.seeds.value * seconds)}"
        self.cost.value = f"cost: {self.seeds.value * passes:,} passes, {took} on {engine.device} in {engine.precision}"
        self.note.value = crafting.visible(now.recipe.radius)
        with self._drawing:
            mine = self.history.alike(self.data.value, now)
            shown = self._map and now.method == "sem"
            self.measured.value = crafting.measured_html(self._map, now, mine) if shown else ""
        self.perturbation_radius.disabled = self.method.value == "em"
        new = self.history.records and not self.history.has(self.data.value, now)
        self.stale.value = "<b>The knobs have changed:</b> no run below has these; Run adds one." if new else ""

    def _draw_history(self) -> None:
        with self._drawing:  # the values are read inside, so that the last drawing is that of the last values
            self.history = self.history.updated()
            self.a.max = self.b.max = len(self.history.table())
            marks = {self.a.value: "A", self.b.value: "B"}
            self.table.value = table_html(self.history, self.sort.value, marks)
            self.compared.value = compared_html(self.history, marks)

    def _compare(self, number: int) -> None:
        """Show the run of this number as B, and what was B, or else the run before it, as A."""
        with self._drawing:
            self.a.max = self.b.max = max(number, self.b.max)
            if number != self.b.value and not self.pin.value:
                self.a.value = self.b.value or number - 1
            self.b.value = number
            self._draw_history()

    def _measure(self, cancelled: Callable[[], bool]) -> None:
        for split in self._splits.values():
            all_of_it = crafting.settings("sem", self._preset, learners=True, size=split.train.images.shape[-1])
            seconds_of(all_of_it.recipes, split.train, self._how[1].engine)
        self._tick()

    def start(self) -> bool:
        """Start a run with the current knobs in its thread; False, and nothing is done, if one is running."""
        return self._job.start(self._work, self._begin, self._end)

    def cancel(self) -> None:
        """Stop the run at its next step; Run with the same settings resumes it."""
        self.stop.disabled = True
        self._job.cancel()

    def wait(self, timeout: float | None = None) -> Made | None:
        """Wait for the run and return what its first seed made; None if it was stopped or never started.

        Raises the run's error.
        """
        return self._job.wait(timeout)

    def _begin(self) -> None:
        self._asked = now, data, seeds = self.settings(), self.data.value, self.seeds.value  # knobs may move later
        self.run.disabled, self.stop.disabled, self._began, self._at = True, False, time.monotonic(), None
        self.strip.value = self.losses.value = self.stale.value = ""
        self.status.value, self.progress.bar_style = "starting", ""
        self.progress.value, self.progress.max = 0, seeds * now.passes(len(self._splits[data].train))

    def _work(self, cancelled: Callable[[], bool]) -> Made:
        self.measuring.wait()  # because the two would slow each other down
        (now, data, seeds), (first, lab) = self._asked, self._how
        split, each = self._splits[data], now.passes(len(self._splits[data].train))
        next_text, next_picture, found = 0.0, time.monotonic() + 0.5, []

        def on_step(progress: Progress, job: str, step: int, total: int, metrics: dict) -> bool:
            nonlocal next_text, next_picture
            self._at = f"step {step} of {total}", job
            if time.monotonic() > next_text:
                self._tell(metrics)
                next_text = time.monotonic() + 0.2
            if "noise" in metrics and step <= now.recipe.sgd.steps:
                progress.losses[step] = metrics["loss"]
                if (began := time.monotonic()) > next_picture:
                    self._draw_unfinished(progress, split.train, now, (step, total), metrics)
                    # at most a tenth of the time goes into pictures
                    next_picture = time.monotonic() + max(2, 10 * (time.monotonic() - began))
            return cancelled()

        for seed in range(first, first + seeds):
            # a run that is resumed keeps its curves
            progress = self._progress.setdefault((data, repr(now.recipe), seed), Progress())
            how = dict(seed=seed, before=len(found) * each, lab=replace(lab, on_step=partial(on_step, progress)))
            for made in crafting.run(split, now, **how):
                self._show(split, data, progress, made)
            found.append(made)
        return found[0]

    def _tell(self, metrics: dict) -> None:
        self.progress.value = metrics["done"]
        reached = f", accuracy {100 * metrics['accuracy']:.1f} %" if metrics.get("accuracy") is not None else ""
        took = duration(time.monotonic() - self._began)
        self.status.value = (
            f"<b>{self._at[1]}</b>: {self._at[0]}, loss {metrics['loss']:.2f}{reached}; "
            f"{metrics['done']:,} of {self.progress.max:,} passes after {took}"
        )

    def _draw_unfinished(self, progress: Progress, train: ImageSet, now: Settings, at: tuple, metrics: dict) -> None:
        progress.look(at[0], metrics["surrogate"], train, metrics["noise"])
        strip = crafting.strip_html(train, metrics["noise"], now, "unfinished: step {} of {}".format(*at))
        self.losses.value, self.strip.value = progress.html(at[1]), strip  # both at once, because both name the step

    def _show(self, split: Split, data: str, progress: Progress, made: Made) -> None:
        """Remember what a run has made so far, and show it as B in place of the pictures of the unfinished run."""
        new = crafting.record(made, split, data, self._preset, progress)
        with self._drawing:
            self.history = self.history.adding(new)
            seeds = self.history.seeds
            self._compare(int(seeds.loc[seeds["of"] == new["of"], "run"].iloc[0]))
        self.strip.value = self.losses.value = ""
        if made.seed == self._how[0]:
            self.made, self.keep.disabled = made, False

    def _end(self) -> None:
        self.run.disabled, self.stop.disabled = False, True
        took = duration(time.monotonic() - self._began)
        step, job = self._at or ("the start", "nothing is lost")
        if self._job.error:
            self.status.value, self.progress.bar_style = failure(self._job.error), "danger"
        elif self._job.result is None:
            self.status.value = f"<b>stopped</b> at {step} ({job}); Run resumes"
            self.progress.bar_style = "warning"
        else:
            self.status.value = f"<b>done</b> in {took}" + ("" if self._at else ", all of it from kept runs")
            self.progress.value, self.progress.bar_style = self.progress.max, "success"
        self._tick()

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
        what = f"{self.made.settings.name} noise of radius {self.made.noise.radius:g}, seed {self.made.seed}"
        self.status.value = f"<b>saved</b> {html.escape(shown(path))}: {what}"
        return path

    def _repr_mimebundle_(self, **how):
        return display(self.view, **how)
