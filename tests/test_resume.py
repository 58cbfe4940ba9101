"""Runs that were killed, stopped or ran out of disk, and then finished, against one that was left alone."""

import itertools
import json
import os
import random
import signal
import time
import tracemalloc
from dataclasses import replace
from functools import partial

import pytest
import torch
from forked import finish, start
from photos import contents, image_set, make_photos
from safetensors import safe_open
from safetensors.torch import save_file

from semkit.__main__ import main
from semkit.nets import models
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe, Interrupted, craft
from semkit.protections.state import State
from semkit.training.perturb import PGD, Uniform
from semkit.training.recipes import SGD

ENGINE = Engine("cpu", "float32")
KILLS = 5
QUICK = ["--preset", "quick", "--size", "24", "--seed", "3"]  # long enough to be stopped halfway


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the folder of photos, what a run that was left alone wrote, its seconds)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    photos = make_photos(folder / "photos", 36, size=24)
    finish(["--version"], folder / "log")  # the process that the others are forked from is up
    began = time.monotonic()
    assert finish(["protect", str(photos), str(folder / "out"), *QUICK], folder / "log") == 0
    return photos, results(folder / "out"), time.monotonic() - began


def results(out):
    """What must not depend on interruptions: every file but the report, which holds the seconds."""
    found = contents(out)
    assert found.pop("report.json")
    return found


def command(photos, out, *more):
    return ["protect", str(photos), str(out), *QUICK, *more]


def test_kills_at_random_moments_leave_no_trace(undisturbed, tmp_path):
    photos, expected, seconds = undisturbed
    moments, kills, compared = random.Random(), [], 0
    for run in itertools.count():
        out = tmp_path / f"out{run}"
        while not (out / "report.json").exists():
            hold = ["--hold", moments.choice(("memory", "disk"))]
            process = start(command(photos, out, "--resume", "--checkpoint-every", "0", *hold), tmp_path / "log")
            process.join(moments.uniform(0, seconds) if len(kills) < KILLS else 60)
            if process.exitcode is None:
                kills.append(sorted(name[-12:] for name in contents(out)) if out.exists() else [])
                process.kill()
                process.join()
            else:
                assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert finish(command(photos, out, "--resume"), tmp_path / "log") == 0
        assert results(out) == expected, kills
        compared += 1
        if len(kills) >= KILLS:
            break
    assert compared >= 1 and len(kills) == KILLS


def test_ctrl_c_says_how_to_go_on_and_leaves_a_state_that_does(undisturbed, tmp_path):
    photos, expected, _ = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(command(photos, out, "--checkpoint-every", "0"), log)
    while not list(out.glob("unfinished/*.state")):
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    cost, stopped = log.read_text().splitlines()
    assert "passes" in cost
    assert stopped.startswith("semkit: stopped while crafting noise, ") and "--resume" in stopped
    assert not (out / "noise.safetensors").exists() and len(list(out.glob("unfinished/*.state"))) == 1
    assert finish(command(photos, out, "--resume"), log) == 0
    assert results(out) == expected


@pytest.mark.parametrize(("room", "every", "file"), [(100_000, "0", "state"), (4_000, "20", "safetensors")])
def test_a_full_disk_is_one_line_and_leaves_a_run_that_can_go_on(undisturbed, tmp_path, room, every, file):
    photos, expected, _ = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    assert finish(command(photos, out, "--checkpoint-every", every), log, largest_file=room) == 2
    _, line = log.read_text().splitlines()
    assert line.startswith("semkit: ") and "File too large" in line and "--resume" in line
    left = contents(out)
    assert all(not name.endswith((".tmp", file)) for name in left), sorted(left)
    assert finish(command(photos, out, "--resume"), log) == 0
    assert results(out) == expected


def test_of_two_runs_that_start_together_in_one_folder_one_is_refused(undisturbed, tmp_path):
    photos, _, _ = undisturbed
    out = tmp_path / "out"
    runs = [start(command(photos, out, "--radius", str(r)), tmp_path / f"log{r}") for r in (8, 60)]
    for process in runs:
        process.join(60)
    assert sorted(process.exitcode for process in runs) == [0, 2]
    told = "".join((tmp_path / f"log{r}").read_text() for r in (8, 60))
    assert "was begun with other settings (recipe); name another folder" in told or "another run is at work" in told
    assert finish(["check", str(photos), str(out)], tmp_path / "log") == 0


def test_of_two_runs_that_resume_one_folder_the_second_waits_for_the_first(undisturbed, tmp_path):
    photos, expected, _ = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    first = start(command(photos, out, "--checkpoint-every", "0"), log)
    while not list(out.glob("unfinished/*.state")):
        assert first.is_alive(), log.read_text()
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        assert finish(command(photos, out, "--resume"), tmp_path / "second") == 2
        [line] = (tmp_path / "second").read_text().splitlines()
        assert line == f"semkit: another run is at work on the output {out}; wait until it is done"
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0 and results(out) == expected


def killed_by_a_full_disk(arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    main(arguments)


def test_a_kill_while_the_record_is_written_leaves_a_folder_that_can_be_used(undisturbed, tmp_path):
    photos, expected, _ = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    kill = partial(killed_by_a_full_disk, command(photos, out))
    assert finish(kill, log, largest_file=10) == -signal.SIGXFSZ and out.exists()
    assert finish(command(photos, out), log) == 0, log.read_text()
    assert results(out) == expected


RUNS = {
    "sweep": ["--methods", "clean", "em", "sem", "--radii", "0", "4", "--seeds", "1", "--out"],
    "learn": ["--seeds", "6", "--cache"],
}


def learners(folder):
    """Name -> when it was written, of every learner that is kept below the folder."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("learner-*.json")}


@pytest.mark.parametrize("name", RUNS)
def test_ctrl_c_leaves_learners_with_which_the_same_command_goes_on(tmp_path, name):
    photos, log = make_photos(tmp_path / "photos", 36), tmp_path / "log"
    run = [name, str(photos), *QUICK, *RUNS[name]]
    process = start([*run, str(tmp_path / "stopped")], log)
    while not learners(tmp_path / "stopped"):
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    last = log.read_text().splitlines()[-1]
    assert last.startswith("semkit: stopped while "), last
    kept = learners(tmp_path / "stopped")
    assert finish([*run, str(tmp_path / "stopped")], log) == 0
    found = learners(tmp_path / "stopped")
    assert 1 <= len(kept) < len(found) == 6 and kept.items() <= found.items()


STARTS = {name: {"start": name} for name in ("random", "zero", "warm")} | {
    "class-wise": {"start": "warm", "class_wise": True},
    "faded in": {"start": "warm", "fade_in": 0.8, "ramp": 0.6},
}
SCHEDULES = {
    "ramp": SGD(steps=5, batch=4),
    "milestones, no momentum": SGD(steps=5, batch=4, momentum=0.0, milestones=(2, 4)),
}
RECIPE = CraftRecipe(Uniform(4), PGD(4, 1), steps=1, samples=1, surrogate="tiny")


def trace(crafted):
    """Everything a finished run holds but its seconds, bit for bit."""
    weights = [value.numpy().tobytes() for value in crafted.surrogate.state_dict().values()]
    return crafted.noise.numpy().tobytes(), weights, crafted.losses, crafted.passes


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_stopped_after_every_step_equals_one_that_was_not(tmp_path, start, schedule):
    torch.set_num_threads(1)
    images, recipe = image_set(10, classes=3), replace(RECIPE, sgd=SCHEDULES[schedule], **STARTS[start])
    seen = []
    watched = Lab(ENGINE, on_step=lambda what, step, total, _: seen.append(step) or False)
    whole = craft(images, recipe, seed=1, lab=watched)
    state, stops = tmp_path / "state", 0
    while True:
        try:
            pieced = craft(images, recipe, seed=1, lab=Lab(ENGINE, on_step=lambda *_: True), checkpoint=state)
            break
        except Interrupted:
            stops += 1
    assert stops == len(seen) == (5 if recipe.class_wise else 8)
    assert trace(pieced) == trace(whole)


def test_a_state_saved_on_the_way_is_taken_up(tmp_path):
    images, recipe = image_set(10, classes=3), replace(RECIPE, sgd=SCHEDULES["ramp"])
    state = tmp_path / "state"

    def die(what, step, *_):
        if step == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        craft(images, recipe, lab=Lab(ENGINE, on_step=die, checkpoint_every=0), checkpoint=state)
    taken = []
    watch = lambda what, step, *_: taken.append(step) or False  # noqa: E731
    pieced = craft(images, recipe, lab=Lab(ENGINE, on_step=watch), checkpoint=state)
    assert taken[0] == 4  # the state of step 3
    assert trace(pieced) == trace(craft(images, recipe, lab=Lab(ENGINE)))


def test_a_state_goes_to_its_file_without_a_copy_in_memory(tmp_path):
    recipe, noise = replace(RECIPE, sgd=SCHEDULES["ramp"]), torch.ones(4000, 3, 32, 32, dtype=torch.int8)
    model = ENGINE.prepare(models.build("tiny", 2))
    state = State(noise, model, [0.5], optimizer=recipe.sgd.optimizer(model), step=3)
    tracemalloc.start()
    state.save(tmp_path / "state", "me")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < noise.nbytes / 10
    found = State(torch.zeros_like(noise), model, optimizer=recipe.sgd.optimizer(model))
    found.load(tmp_path / "state", "me", 5)
    assert found.step == 3 and found.losses == [0.5] and found.noise.equal(noise)


def stopped_state(folder):
    """Where craft left the state of a run of RECIPE that was stopped after 3 steps, and how to go on."""
    recipe = replace(RECIPE, sgd=SCHEDULES["ramp"])
    go_on = partial(craft, image_set(10), recipe, checkpoint=folder / "noise.state")
    with pytest.raises(Interrupted):
        go_on(lab=Lab(ENGINE, on_step=lambda what, step, *_: step == 3))
    return folder / "noise.state", partial(go_on, lab=Lab(ENGINE))


def put(*names):
    """A change of a state: the value at state[name][name]... becomes names[-1], or goes where that is `...`."""
    *way, last, value = names

    def change(state):
        at = state
        for name in way:
            at = at[name]
        if value is ...:
            del at[last]
        else:
            at[last] = value(at[last]) if callable(value) else value

    return change


FIELDS = "made_by", "step", "seconds", "losses", "passes", "mined", "noise"
WEIGHT, MOMENTUM = "model.1.weight", "momentum.0"
DAMAGE = {
    **{f"no {name}": put(name, ...) for name in FIELDS},
    **{f"{name} is a text": put(name, "x") for name in FIELDS[1:]},
    **{f"{name} is a list": put(name, [1]) for name in FIELDS[3:]},
    "half a step": put("step", 1.5), "no losses yet": put("losses", []), "step below 0": put("step", -1),
    "step beyond the last": put("step", 1000),
    "noise of one image": put("noise", lambda noise: noise[:1]),
    "noise of other size": put("noise", lambda noise: noise[..., :4].contiguous()),
    "noise in floats": put("noise", lambda noise: noise.float()),
    "passes are half": put("passes", "training", 0.5), "passes of other kinds": put("passes", "other", 1),
    "mined texts": put("mined", "counts", [("a", "b", "c")]), "mined too few": put("mined", "counts", [(1,)]),
    "no average": put("mined", "average", ...),
    "a weight less": put(WEIGHT, ...), "a weight too many": put("model.other", torch.ones(3)),
    "a weight is no tensor": put(WEIGHT, 1), "weights of other shape": put(WEIGHT, torch.ones(3)),
    "momentum of other shape": put(MOMENTUM, lambda kept: kept[:1]),
    "momentum of another kind": put(MOMENTUM, lambda kept: kept.long()),
}  # fmt: skip


def taken_apart(path):
    """Everything that a state holds, by name."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["semkit"]) | {name: file.get_tensor(name) for name in file.keys()}


def put_together(state, path):
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    record = {name: value for name, value in state.items() if name not in tensors}
    save_file(tensors, path, metadata={"semkit": json.dumps(record)})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return stopped_state(tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("damage", [*DAMAGE, "is {}", "is of torch", "is cut", "is empty", "is a pipe"])
def test_a_damaged_state_is_one_line_that_names_it_and_is_left_alone(stopped, damage):
    path, go_on = stopped
    whole = path.read_bytes()
    try:
        if damage == "is a pipe":
            path.unlink()
            os.mkfifo(path)
        elif damage == "is of torch":  # an earlier version's
            torch.save({"made_by": "me"}, path)
        elif damage in DAMAGE:
            DAMAGE[damage](state := taken_apart(path))
            put_together(state, path)
        else:
            path.write_bytes({"is {}": b"{}", "is cut": whole[:-500], "is empty": b""}[damage])
        before = None if damage == "is a pipe" else path.read_bytes()
        with pytest.raises(ValueError, match=r"^\S*noise.state is damaged.*; delete it to start afresh$") as told:
            go_on()
        assert len(str(told.value)) < 400
        assert before is None or path.read_bytes() == before
    finally:
        path.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize("other", ["recipe", "seed", "images"])
def test_a_state_of_another_run_is_refused(tmp_path, other):
    images, recipe = image_set(10), replace(RECIPE, sgd=SCHEDULES["ramp"])
    how = {"checkpoint": tmp_path / "state"}
    with pytest.raises(Interrupted):
        craft(images, recipe, seed=0, lab=Lab(ENGINE, on_step=lambda *_: True), **how)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="another recipe, seed, engine or image set; delete it"):
        craft(
            image_set(10, seed=1) if other == "images" else images,
            replace(recipe, step_size=1.0) if other == "recipe" else recipe,
            seed=1 if other == "seed" else 0,
            lab=Lab(ENGINE),
            **how,
        )
    assert contents(tmp_path) == before
