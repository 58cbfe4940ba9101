"""Panels driven as a reader drives them, without a browser: knobs are set, buttons clicked, workers waited for."""

import re
import threading
import time
from dataclasses import replace

import ipywidgets as widgets
import pandas as pd
import pytest
import torch
from photos import image_split, make_map

from semkit.analysis import figures
from semkit.analysis.cost import seconds_of
from semkit.analysis.study import crafted_noise
from semkit.images.imageset import Split
from semkit.images.loading import load
from semkit.lessons import craftrun as crafting
from semkit.lessons import twopixels
from semkit.lessons.craftpanel import CraftPanel
from semkit.lessons.panels import Job, figure_panel, guess, quiz
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.nets.models import build
from semkit.protections.crafting import Interrupted
from semkit.protections.methods import craft_recipe
from semkit.protections.noise import load as load_noise
from semkit.training.learning import accuracy
from semkit.training.perturb import Clean
from semkit.training.recipes import lasting, learn_recipe

ENGINE = Engine("cpu", "float64")
SPLIT = image_split(20)


@pytest.fixture
def panel(tmp_path):
    made = CraftPanel(SPLIT, lab=Lab(ENGINE, tmp_path / "runs"), preset="quick")
    yield made
    made.cancel()
    made.measuring.wait(60)


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "semkit craft"]


def stopped_at(panel, step):
    """Runs the panel up to a step of the crafting, as if Stop were clicked there."""
    tell = panel._tell

    def click_stop(metrics):
        tell(metrics)
        if panel._at[0].startswith(f"step {step} "):
            panel.stop.click()

    panel._tell = click_stop
    panel.start()
    found = panel.wait(60)
    panel._tell = tell
    return found


# --- the worker


def test_a_second_start_is_ignored_while_the_worker_runs():
    go, runs = threading.Event(), []
    job = Job("two starts")
    assert job.start(lambda cancelled: runs.append(go.wait(10)))
    assert not job.start(lambda cancelled: runs.append("second"))
    go.set()
    job.wait(10)
    assert runs == [True]
    assert job.start(lambda cancelled: "again") and job.wait(10) == "again"


def test_wait_raises_the_error_of_the_worker_until_the_next_start():
    job = Job("error")
    job.start(lambda cancelled: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            job.wait(10)
    job.start(lambda cancelled: "fine")
    assert job.wait(10) == "fine"


def test_wait_says_that_the_worker_is_not_done():
    go = threading.Event()
    job = Job("slow")
    job.start(lambda cancelled: go.wait(10))
    with pytest.raises(TimeoutError, match=r"0\.01 s"):
        job.wait(0.01)
    go.set()
    assert job.wait(10)


def test_a_new_job_of_a_name_stops_the_old_worker_and_starts_after_it():
    events = []

    def until_cancelled(cancelled):
        while not cancelled():
            time.sleep(0.01)
        time.sleep(0.1)
        events.append("old ended")
        raise Interrupted

    old = Job("name")
    old.start(until_cancelled)
    other = Job("other name")
    assert old.running and not old._cancel.is_set()
    new = Job("name")
    new.start(lambda cancelled: events.append("new ran"))
    new.wait(10)
    assert events == ["old ended", "new ran"] and old.wait(10) is None and not old.running
    assert other.wait() is None


def test_the_old_job_stops_the_new_one_when_it_is_started_again():
    old, new = Job("back"), Job("back")
    new.start(lambda cancelled: [time.sleep(0.01) for _ in iter(cancelled, True)] and "stopped")
    old.start(lambda cancelled: "old again")
    assert old.wait(10) == "old again" and new.wait(10) == "stopped"


# --- what a run costs


@pytest.mark.parametrize("method", ["sem", "rem", "em"])
@pytest.mark.parametrize("preset", ["quick", "demo", "lesson", "paper"])
def test_settings_of_a_preset_are_its_recipe(method, preset):
    made = crafting.settings(method, preset, learners=True, radius=6, perturbation_radius=3)
    assert made.recipe == craft_recipe(method, preset, radius=6, perturbation_radius=3)
    assert made.learners == {r: learn_recipe(preset, perturbation_radius=r) for r in (0, 4)}
    expected = made.recipe.cost(50).total + 2 * sum(recipe.cost(50).total for recipe in made.learners.values())
    assert made.passes(50) == expected
    assert crafting.settings(method, preset).passes(50) == craft_recipe(method, preset).cost(50).total


def test_the_budget_goes_into_the_recipe_and_milestones_move_with_the_steps():
    made = crafting.settings("sem", "paper", surrogate_steps=500, noise_steps=3, samples=2).recipe
    assert (made.sgd.steps, made.sgd.milestones, made.steps, made.samples) == (500, (200, 400), 3, 2)
    assert replace(made, sgd=(base := craft_recipe("sem", "paper")).sgd, steps=base.steps, samples=base.samples) == base


@pytest.mark.parametrize("steps", [1, 777, 1999])
def test_the_panel_and_learner_steps_agree_on_where_the_rate_falls(steps):
    recipe = craft_recipe("sem", "paper")
    assert crafting.settings("sem", "paper", surrogate_steps=steps).recipe == lasting(recipe, steps)


def test_perturbation_radius_zero_is_no_perturbation():
    recipe = crafting.settings("rem", "quick", perturbation_radius=0).recipe
    assert (recipe.noise_side, recipe.surrogate_side) == (Clean(), Clean())


@pytest.mark.whole
def test_a_run_counts_the_passes_that_were_predicted():
    what, told = crafting.settings("sem", "quick", learners=True), []
    made = [*crafting.run(SPLIT, what, lab=Lab(ENGINE, on_step=lambda *a: told.append(a) and False))]
    done = [metrics["done"] for *_, metrics in told]
    assert done == sorted(done) and done[-1] == what.passes(20)
    assert [len(m.rows) for m in made] == [0, 1, 2, 3, 4]
    assert [(row["method"], row["training_radius"]) for row in made[-1].rows] == [
        ("sem", 0), ("clean", 0), ("sem", 4), ("clean", 4),
    ]  # fmt: skip


def test_seconds_are_measured_once_and_only_when_asked():
    engine = replace(ENGINE, fold=False)  # of no other test here
    what, train = crafting.settings("sem", "quick"), SPLIT.train
    assert seconds_of(what.recipes, train, engine, may_probe=False) is None
    first = seconds_of(what.recipes, train, engine)
    assert first > 0 and seconds_of(what.recipes, train, engine, may_probe=False) == first
    # So many more surrogate steps cost so much more, at the speed that was measured once.
    longer = (crafting.settings("sem", "quick", surrogate_steps=n).recipes for n in (20, 30))
    more, most = (seconds_of(recipes, train, engine, may_probe=False) for recipes in longer)
    assert most - more == pytest.approx(more - first) and more > first
    assert what.recipe.sgd.steps == 10


# --- the craft panel


@pytest.mark.whole
def test_a_run_shows_its_cost_first_and_its_result_after(panel, tmp_path):
    passes = craft_recipe("sem", "quick").cost(20).total
    panel.measuring.wait(60)
    assert re.fullmatch(rf"cost: {passes:,} passes, about \d+ s on cpu in float64", panel.cost.value)
    panel.start()
    made = panel.wait(60)
    noise, _ = crafted_noise(SPLIT.train, craft_recipe("sem", "quick"), lab=Lab(ENGINE))
    assert (made.noise.levels == noise.levels).all() and panel.made is made
    assert panel.progress.value == panel.progress.max == passes
    assert panel.status.value.startswith("<b>done</b>") and "with SEM noise" in panel.compared.value
    assert (panel.run.disabled, panel.stop.disabled, panel.keep.disabled) == (False, True, False)


def test_two_clicks_on_run_start_one_worker(panel):
    go, tell = threading.Event(), panel._tell
    panel._tell = lambda metrics: (go.wait(60), tell(metrics))
    panel.run.click()
    panel.run.click()
    assert not panel.start() and len(workers()) == 1
    go.set()
    assert panel.wait(60) and workers() == []


@pytest.mark.whole
def test_a_changed_knob_starts_nothing_and_marks_what_is_shown(panel):
    panel.measuring.wait(60)
    threads = threading.active_count()
    panel.radius.value = 16
    assert threading.active_count() == threads and panel._job._thread is None and panel.stale.value == ""
    panel.start()
    assert panel.wait(60).noise.radius == 16
    shown = panel.compared.value
    panel.radius.value = 12
    assert "have changed" in panel.stale.value and panel.compared.value == shown and panel.made.noise.radius == 16
    panel.radius.value = 16
    assert panel.stale.value == ""
    panel.learners.value = True  # more work, but the noise on show is theirs
    assert panel.stale.value == ""
    panel.method.value = "rem"
    assert panel.stale.value


@pytest.mark.parametrize("knob", ["radius", "perturbation_radius", "surrogate_steps", "noise_steps", "samples"])
def test_every_knob_reaches_the_recipe_and_the_cost(panel, knob):
    def passes():
        return int(re.match("cost: ([0-9,]+) passes", panel.cost.value)[1].replace(",", ""))

    recipe, before = panel.settings().recipe, passes()
    slider = getattr(panel, knob)
    slider.value += 1
    assert panel.settings().recipe != recipe and not slider.continuous_update
    assert passes() == panel.settings().recipe.cost(20).total
    assert (passes() != before) == (knob not in ("radius", "perturbation_radius"))


@pytest.mark.whole
def test_the_settings_are_those_of_the_click_on_run(panel):
    panel.start()
    panel.radius.value = 31
    assert panel.wait(60).noise.radius == 8 and "have changed" in panel.stale.value


def test_choosing_a_method_keeps_the_budget_and_a_button_sets_the_presets(tmp_path):
    panel = CraftPanel(SPLIT, lab=Lab(ENGINE, tmp_path), preset="demo")
    panel.surrogate_steps.value, panel.noise_steps.value, panel.samples.value = 250, 3, 4
    for method in ("em", "rem", "sem"):
        panel.method.value = method
        recipe = panel.settings().recipe
        assert (recipe.sgd.steps, recipe.steps, recipe.samples) == (250, 3, 4)
        assert panel.perturbation_radius.disabled == (method == "em")
    panel.method.value = "em"
    panel.budget.click()
    assert panel.settings().recipe == craft_recipe("em", "demo")
    panel.measuring.wait(60)


@pytest.mark.whole
def test_a_stopped_run_goes_on_to_the_same_bytes(panel, tmp_path):
    whole, _ = crafted_noise(SPLIT.train, craft_recipe("sem", "quick"), lab=Lab(ENGINE))
    steps = []
    assert stopped_at(panel, 1) is None
    assert panel.status.value == "<b>stopped</b> at step 1 of 11 (crafting, seed 0); Run resumes"
    assert (panel.run.disabled, panel.stop.disabled, panel.keep.disabled) == (False, True, True)
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".state"]
    tell = panel._tell
    panel._tell = lambda metrics: (steps.append(panel._at[0]), tell(metrics))
    panel.start()
    assert (panel.wait(60).noise.levels == whole.levels).all()
    assert steps[0] == "step 2 of 11"
    other, _ = crafted_noise(SPLIT.train, craft_recipe("sem", "quick"), lab=Lab(ENGINE), seed=1)
    assert (other.levels != whole.levels).any()
    assert not list((tmp_path / "runs").glob("*.state"))


@pytest.mark.whole
def test_a_run_stopped_among_the_learners_loses_no_row(panel):
    panel.learners.value = True
    panel.table.observe(lambda change: "100.0" in change["new"] and panel.cancel(), "value")  # after the first learner
    panel.start()
    assert panel.wait(60) is None
    panel.table.unobserve_all()
    assert re.fullmatch(
        r"<b>stopped</b> at step 1 of 10 \(ERM on clean images, seed 0\); Run resumes", panel.status.value
    )
    (row,) = panel.history.seeds.to_dict("records")
    assert row["ERM"] == 1 and pd.isna(row["AT 4/255"]) and not panel.keep.disabled
    panel.start()
    by = {(row["method"], row["training_radius"]): 100 * row["last"] for row in panel.wait(60).rows}
    cells = [float(cell) for cell in re.findall(r"<td>(.*?)</td>", panel.compared.value)]
    clean, mine = [by["clean", r] for r in (0, 4)], [by["sem", r] for r in (0, 4)]
    lost = [a - b for a, b in zip(clean, mine, strict=True)]
    assert cells == pytest.approx([*clean, *mine, *lost], abs=0.06)


@pytest.mark.whole
def test_a_finished_run_is_instant_the_second_time(panel):
    panel.start()
    first = panel.wait(60)
    panel.start()
    again = panel.wait(60)
    assert (again.noise.levels == first.noise.levels).all() and "kept runs" in panel.status.value
    assert panel.progress.value == panel.progress.max
    assert len(panel.history.table()) == len(panel.history.records) == 1


def test_an_error_of_the_worker_is_shown_escaped_and_raised(panel, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    panel._how = 0, Lab(ENGINE, tmp_path / "runs" / "<b>")
    panel.start()
    with pytest.raises(OSError):
        panel.wait(60)
    assert panel.status.value.startswith("<b>failed:</b> NotADirectoryError") and "\n" not in panel.status.value
    assert "&lt;b&gt;" in panel.status.value and "<b>'" not in panel.status.value
    assert not panel.run.disabled and panel.stop.disabled and panel.made is None


@pytest.mark.whole
def test_a_panel_made_again_stops_the_worker_of_the_old_one(tmp_path):
    how = dict(lab=Lab(ENGINE, tmp_path), preset="quick")
    old = CraftPanel(SPLIT, **how)
    old.surrogate_steps.value = old.surrogate_steps.max
    began, tell = threading.Event(), old._tell
    old._tell = lambda metrics: (began.set(), tell(metrics))
    old.start()
    assert began.wait(60)
    new = CraftPanel(SPLIT, **how)
    assert old.wait(60) is None and old.status.value.startswith("<b>stopped</b>")
    new.start()
    assert new.wait(60) and not old._job.running


@pytest.mark.whole
def test_save_writes_the_noise_that_is_shown(panel, tmp_path):
    panel.folder.value = str(tmp_path / "saved")
    with pytest.raises(ValueError, match="press Run"):
        panel.save()
    assert "press Run" in panel.status.value and not (tmp_path / "saved").exists()
    panel.start()
    made = panel.wait(60)
    panel.radius.value = 30  # not what was made
    path = panel.save()
    saved = load_noise(path, images=SPLIT.train)
    assert (saved.levels == made.noise.levels).all() and saved.radius == 8 and str(path) in panel.status.value
    panel.folder.value = str(path)
    with pytest.raises(OSError):
        panel.save()
    assert "failed" in panel.status.value and load_noise(path, images=SPLIT.train).radius == 8


@pytest.mark.whole
def test_several_sets_are_chosen_by_name(tmp_path):
    sets = {"small": SPLIT, "large": image_split(30)}
    panel = CraftPanel(sets, lab=Lab(ENGINE, tmp_path), preset="quick")
    panel.data.value = "large"
    panel.start()
    assert panel.wait(60).noise.levels.shape == (30, 3, 8, 8)
    panel.data.value = "small"
    assert panel.stale.value and panel.data in panel.view.children


@pytest.mark.whole
def test_the_embedded_images_are_protected_by_the_panel(tmp_path):
    whole = load("shapes")
    split = Split(whole.train.limit(20), whole.test.limit(20))
    panel = CraftPanel(split, lab=Lab(Engine("cpu", "float32"), tmp_path), preset="quick")
    panel.start()
    made = panel.wait(120)
    assert made.noise.levels.shape == (20, 3, 32, 32) and int(made.noise.levels.abs().max()) == 8
    assert "shapes, 20 images, quick preset, seed 0: SEM, radius 8" in panel.compared.value


def test_pictures_of_an_unfinished_run_say_so(panel):
    surrogate = ENGINE.prepare(build("tiny", 2, 0, size=8)).train()
    metrics = {"noise": SPLIT.train.images.to(torch.int8) % 8, "surrogate": surrogate}
    progress = crafting.Progress({1: 2.3, 2: 2.1})
    panel._draw_unfinished(progress, SPLIT.train, panel.settings(), (2, 31), metrics)
    assert "unfinished: step 2 of 31</figcaption>" in panel.strip.value
    assert "2.10 at step 2 of 31" in panel.losses.value
    protected = SPLIT.train.with_noise(metrics["noise"])
    right = [accuracy(surrogate, images) for images in (protected, SPLIT.train)]
    assert progress.right == {2: tuple(right)} and surrogate.training
    assert f"labels {100 * right[0]:.0f} % of images with noise rightly, {100 * right[1]:.0f} %" in panel.losses.value


# --- the table of runs, and two of them side by side


def finished(panel, **knobs):
    """Runs the panel with these knobs, and few steps if they name none, to its end."""
    for name, value in {"surrogate_steps": 4, **knobs}.items():
        getattr(panel, name).value = value
    panel.start()
    return panel.wait(60)


def lines(panel):
    """The cells of each line of the table of runs."""
    return [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", panel.table.value, re.S)]


def titles(panel):
    return re.findall("<h4>(.*?)</h4>", panel.compared.value)


@pytest.mark.whole
def test_every_run_stays_in_the_table_and_the_last_two_are_side_by_side(panel):
    finished(panel)
    first = panel.compared.value
    assert titles(panel) == ["B: run 1, SEM"]
    assert [line[:6] for line in lines(panel)] == [["B", "1", "SEM", "8", "4", "4"]]
    panel.radius.value = 4
    seen = []
    panel.progress.observe(lambda change: seen.append(panel.compared.value), "value")
    finished(panel)
    assert seen[0] == first  # while the second was under way
    assert titles(panel) == ["A: run 1, SEM", "B: run 2, SEM"] and panel.compared.value.count("with SEM noise") == 2
    assert [line[:4] for line in lines(panel)] == [["B", "2", "SEM", "4"], ["A", "1", "SEM", "8"]]
    assert panel.compared.value.count("The surrogate&#x27;s loss") == 2 and panel.strip.value == ""


@pytest.mark.whole
def test_a_is_kept_if_asked_and_any_two_runs_can_be_compared(panel):
    for radius in (8, 4, 2):
        finished(panel, radius=radius, pin=radius == 2)
    assert titles(panel) == ["A: run 1, SEM", "B: run 3, SEM"]
    panel.a.value, panel.b.value = 2, 9  # there is no ninth
    assert titles(panel) == ["A: run 2, SEM", "B: run 3, SEM"]
    panel.a.value = 0
    assert titles(panel) == ["B: run 3, SEM"]


@pytest.mark.whole
def test_the_table_is_sorted_by_the_column_chosen(panel):
    for steps in (4, 2, 6):
        finished(panel, surrogate_steps=steps)
    found = {}
    for by in ("run", "passes", "PSNR"):
        panel.sort.value = by
        found[by] = [line[1] for line in lines(panel)]
    assert found["run"] == ["3", "2", "1"] and found["passes"] == ["2", "1", "3"]
    psnr = panel.history.table("PSNR")["PSNR"].tolist()
    assert psnr == sorted(psnr, reverse=True)
    assert panel.history.table("AT 4/255")["AT 4/255"].isna().all()


@pytest.mark.parametrize(
    "method, radius, name",
    [("sem", 4, "SEM"), ("rem", 4, "REM"), ("em", 4, "EM"), ("sem", 0, "EM in SEM's recipe"), ("em", 0, "EM")],
)
def test_a_recipe_is_named_by_what_it_is(method, radius, name):
    made = crafting.settings(method, "quick", perturbation_radius=radius)
    assert made.name == name and str(made).startswith(f"{name}, radius 8")
    assert (made.knobs["recipe"], made.knobs["ρa"]) == (name, 0 if "EM" == name[:2] else 4)


@pytest.mark.whole
def test_several_seeds_are_one_line_with_an_interval(panel):
    panel.surrogate_steps.value = 4
    passes = panel.settings().passes(20)
    panel.learners.value, panel.seeds.value = True, 2
    assert re.match(f"cost: {2 * panel.settings().passes(20):,} passes", panel.cost.value)
    made = finished(panel)
    assert made.seed == 0 and panel.progress.value == panel.progress.max == 2 * panel.settings().passes(20)
    ((_, number, *_, seeds, told, _, _, erm, at),) = lines(panel)
    assert (number, seeds, told) == ("1", "2", f"{passes:,}")
    last = panel.history.seeds[["ERM", "AT 4/255"]].to_numpy(float)
    assert [cell.split(" ± ")[0] for cell in (erm, at)] == [f"{100 * value:.1f}" for value in last.mean(0)]
    assert "±" in erm and panel.compared.value.count("±") >= 4


@pytest.mark.whole
def test_noise_that_may_be_seen_is_noted_before_and_after_the_run(panel):
    assert panel.note.value == ""
    panel.radius.value = 9
    assert panel.note.value == "at radius 9 PSNR may fall to 29.0 dB: below 30 dB noise is often visible"
    finished(panel, radius=32)
    assert "(visible?)" in panel.table.value and float(panel.history.table()["PSNR"].iloc[0]) < 30
    finished(panel, radius=2)
    assert panel.note.value == "" and panel.table.value.count("(visible?)") == 1


@pytest.mark.whole
def test_runs_of_another_kernel_are_in_the_table_and_none_is_lost(panel, tmp_path):
    lab = Lab(ENGINE, tmp_path / "runs")
    other = CraftPanel(SPLIT, lab=lab, preset="quick", name="of another kernel")
    finished(panel, learners=True)
    finished(other, learners=False)  # the same run: it has no learners, and takes none away
    finished(other, radius=4)
    new = CraftPanel(SPLIT, lab=lab, preset="quick", name="after a restart")
    assert new.history.table("run")["ρu"].tolist() == [4, 8] and titles(new) == ["A: run 1, SEM", "B: run 2, SEM"]
    assert new.history.table()["ERM"].notna().tolist() == [False, True]
    others = crafting.History.opened(lab, "demo"), crafting.History.opened(Lab(ENGINE), "quick")
    assert [other.records for other in others] == [[], []]
    next(iter(new.history.folder.iterdir())).write_text("{")
    with pytest.raises(ValueError, match=r"json is damaged; delete it"):
        crafting.History.opened(lab, "quick")


@pytest.mark.whole
def test_a_knob_shows_at_once_what_was_measured_there_and_a_run_adds_its_star(panel, tmp_path):
    assert panel.measured.value == ""
    rows = make_map(tmp_path / "map")
    panel = CraftPanel(SPLIT, lab=Lab(ENGINE, tmp_path / "runs"), preset="quick", measured=tmp_path / "map")
    for name, value in {"surrogate_steps": 4, "radius": 2, "perturbation_radius": 0}.items():
        getattr(panel, name).value = value
    of = rows.query("method == '2-75-0' and training_radius == 4")["last"]
    assert "Nearest measured at radius ρu 2, ρa 0 and 75 surrogate steps" in panel.measured.value
    assert f"AT 4/255 {100 * of.mean():.1f} % [" in panel.measured.value and "data:image/png" in panel.measured.value
    finished(panel, learners=True)
    assert "Stars: your runs" in panel.measured.value
    panel.radius.value = 8
    assert "radius ρu 8" in panel.measured.value and "Stars" in panel.measured.value
    panel.noise_steps.value = 5  # no run has these
    assert "Stars" not in panel.measured.value
    panel.measuring.wait(60)
    took = []
    for radius in (2, 8, 2, 8, 2):
        began = time.process_time()  # of a core, because others may work beside
        panel.radius.value = radius
        took.append(time.process_time() - began)
    assert min(took) < 0.3
    panel.method.value = "em"
    assert panel.measured.value == ""


# --- figures with knobs


def test_a_figure_panel_draws_with_the_values_of_its_knobs():
    seen = []

    def draw(training_radius, kind):
        seen.append((training_radius, kind))
        return figures.new_figure(1, 1), f"alt {training_radius} {kind}", "caption"

    kind = widgets.Dropdown(options=["a", "b"])
    panel = figure_panel(draw, training_radius=(0, 8, 4), kind=kind)
    slider = panel.knobs["training_radius"]
    assert (slider.min, slider.max, slider.value, slider.continuous_update) == (0, 8, 4, False)
    assert slider.description == "training radius (levels of 255)"
    slider.value, kind.value = 6, "b"
    assert seen == [(4, "a"), (6, "a"), (6, "b")]
    assert 'alt="alt 6 b"' in panel.figure.value and "caption</figcaption>" in panel.figure.value


@pytest.mark.whole
def test_a_knob_changes_its_figure_in_hardly_more_time_than_it_takes_to_draw_it():
    def seconds(work):
        """Of a core, the least of several times, because others may work beside."""
        took = []
        for _ in range(3):
            began = time.process_time()
            work()
            took.append(time.process_time() - began)
        return min(took)

    panel = figure_panel(twopixels.draw_world, radius=widgets.FloatSlider(0.5), rho=widgets.FloatSlider(0.1))
    drawing = seconds(lambda: twopixels.draw_world(0.5, 0.1)[0].canvas.draw())
    redrawing = seconds(panel.redraw)
    assert redrawing < 0.3 * 2 and redrawing < 2 * drawing


def test_an_error_of_a_drawing_is_shown_and_raised():
    def draw(n):
        if n > 1:
            raise ValueError("n <must>\nbe 1")
        return figures.new_figure(1, 1), "fine"

    panel = figure_panel(draw, n=(0, 2, 1))
    with pytest.raises(ValueError):
        panel.knobs["n"].value = 2
    assert panel.status.value == "<b>failed:</b> ValueError: n &lt;must&gt; be 1" and panel.figure.value == ""
    panel.knobs["n"].value = 0
    assert panel.status.value == "" and "fine" in panel.figure.value
    with pytest.raises(ValueError):
        figure_panel(draw, n=(0, 2, 2))


def test_the_last_drawing_is_that_of_the_last_values_though_callbacks_come_on_two_threads():
    slow = threading.Event()

    def draw(n):
        if n == 1:
            slow.set()
            time.sleep(0.2)
        return figures.new_figure(1, 1), f"n is {n}"

    panel = figure_panel(draw, n=(0, 5, 0))
    first = threading.Thread(target=setattr, args=(panel.knobs["n"], "value", 1))
    first.start()
    slow.wait(10)
    panel.knobs["n"].value = 2
    first.join()
    assert 'alt="n is 2"' in panel.figure.value


# --- guesses and quizzes

WHY = {25: "So it is.", 100: "Nets see it first."}


def test_a_guess_is_kept_when_its_cell_runs_again_and_feedback_says_how_far_off_it_was():
    mine = guess("accuracy of AT 4, %", 0, 100)
    assert repr(mine.feedback(19.26, WHY)) == "accuracy of AT 4, %: it is 19.3; you gave no guess."
    assert str(mine) == "no guess" and mine.value == 50
    mine.knob.value = 40
    again = guess("accuracy of AT 4, %", 0, 100)
    assert str(again) == "your guess: 40"
    assert repr(again.feedback(19.26, WHY)).endswith("it is 19.3; you said 40, 20.7 too high. Nets see it first.")
    again.knob.value = 19
    assert repr(mine.feedback(20, WHY)).endswith("you said 40, 20 too high. Nets see it first.")
    assert repr(again.feedback(20, WHY)).endswith("it is 20; you said 19, 1 too low. So it is.")
    assert repr(again.feedback(19)).endswith("it is 19; you said 19.")


def test_a_guess_may_be_a_fraction_or_one_of_several_options():
    share = guess("share", 0.0, 1.0)
    share.knob.value = 0.25
    assert repr(share.feedback(0.5)) == "share: it is 0.5; you said 0.25, 0.25 too low."
    points = guess("The points", "fall", "rise")
    assert points.value is None and repr(points.feedback("fall")) == "The points: fall; you gave no guess."
    points.knob.value = "rise"
    assert repr(points.feedback("fall", {"rise": "They do not."})).endswith("fall; you said rise. They do not.")


@pytest.mark.parametrize("along, place", [("y", ([0, 1], [7, 7])), ("x", ([7, 7], [0, 1]))])
def test_a_guess_is_a_dashed_line_in_the_figure_that_answers_it(along, place):
    def drawn(mine):
        figure = figures.new_figure(2, 2)
        axes = figure.subplots()
        assert mine.on(figure, along) is figure
        return axes

    mine = guess(f"where, {along}", 0, 10)
    assert len(drawn(mine).lines) == 0  # none was given
    mine.knob.value = 7
    axes = drawn(mine)
    (line,) = axes.lines
    assert tuple(map(list, line.get_data())) == place and line.get_linestyle() == "--"
    assert line.get_label() == axes.texts[0].get_text() == "your guess"


def test_a_quiz_gives_the_reason_for_the_option_that_was_chosen():
    options = {"EM": "It has no inner loop, so <it> is cheap.", "AT": "Ten steps a batch."}
    asked = quiz("What costs more?", options, "AT")
    assert asked.reply.value == ""
    asked.knob.value = "EM"
    assert "not yet: It has no inner loop, so &lt;it&gt; is cheap." in asked.reply.value
    asked.knob.value = "AT"
    assert "right: Ten steps a batch." in quiz("What costs more?", options, "AT").reply.value
    plain = asked._repr_mimebundle_()["text/plain"]
    assert plain == "What costs more? (EM, AT): run this cell to answer"
    with pytest.raises(ValueError, match="one of EM, AT, got 'SEM'"):
        quiz("What costs more?", options, "SEM")


# --- in a notebook

CELLS = """\
import semkit as sk
sk.load("nowhere")
---
import torch
from semkit.lessons.craftpanel import CraftPanel
images = sk.ImageSet(torch.arange(20 * 192).reshape(20, 3, 8, 8).byte(), torch.arange(20) % 2, ("a", "b"))
split, how = sk.Split(images, images), dict(preset="quick")
panel = CraftPanel(split, lab=sk.Lab(sk.Engine("cpu", "float32"), "runs"), **how)
panel
---
panel.wait()
---
panel.radius.value = 4
panel.start()
_ = panel.wait()
---
print(panel.status.value)
---
panel = CraftPanel(split, lab=sk.Lab(sk.Engine("cpu", "float32"), "a file"), **how)
panel.start()
panel.wait()"""


@pytest.mark.whole
def test_a_panel_works_in_a_notebook_and_its_error_fails_it(tmp_path):
    import nbformat  # with nbclient a second and a half
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    (tmp_path / "a file").touch()
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS.split("---\n")]
    cells[0].metadata["tags"] = ["raises-exception"]
    book = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(tmp_path)}}
    with pytest.raises(CellExecutionError, match="FileExistsError"):
        NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    missing, shown, nothing, done, status, _ = (cell.outputs for cell in book.cells)
    assert missing[0].traceback == [f"DataError: {missing[0].evalue}"] and "no such folder" in missing[0].evalue
    assert "application/vnd.jupyter.widget-view+json" in shown[0].data
    assert "run this cell" in shown[0].data["text/plain"]
    assert nothing == [] and done == [] and status[0].text.startswith("<b>done</b>")
