"""Runs on Dask: the same files as without it, a killed worker's run made again, one line where no scheduler is."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from photos import image_split

from semkit.analysis import cluster
from semkit.analysis.study import grid
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.crafting import Interrupted
from semkit.protections.registry import sweep_recipes

pytest.importorskip("distributed", reason="dask.distributed is not installed: pip install semkit[cluster]")
pytestmark = pytest.mark.filterwarnings("default")  # Dask's own, at start and end of a cluster

from semkit.analysis.cluster import connected, run_grid  # noqa: E402

ENGINE = Engine("cpu", "float32")
RECIPES = sweep_recipes(("clean", "sem"), (0,), "quick")


def timeless(rows):
    """The rows without their seconds, which every run has its own."""
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def never(*_):
    raise AssertionError("this run was kept and must not be made again")


@pytest.fixture(scope="module")
def client():
    with connected(2) as client:
        yield client


def test_the_cache_is_filled_as_it_would_be_without_a_cluster(client, tmp_path):
    split, told = image_split(20), []
    how = dict(seeds=(0, 1))
    watched = Lab(ENGINE, tmp_path / "a", lambda *step: told.append(step) and False)
    run_grid(client, split, *RECIPES, lab=watched, **how)
    rows = grid(split, *RECIPES, lab=Lab(ENGINE, tmp_path / "a", never), **how)
    assert timeless(rows) == timeless(grid(split, *RECIPES, lab=Lab(ENGINE, tmp_path / "b"), **how))
    assert timeless(rows) != timeless(grid(split, *RECIPES, seeds=(0, 2), lab=Lab(ENGINE, tmp_path / "b")))
    what, done, total, _ = told[-1]
    assert (what, done, total) == ("runs on 2 workers", 6, 6)


def asked(name):
    return os.environ.get(name)


def test_a_worker_has_one_thread_and_keeps_its_memory(client):
    assert set(client.run(asked, "OMP_NUM_THREADS").values()) == {"1"}
    assert set(client.run(asked, "MALLOC_TRIM_THRESHOLD_").values()) == {os.environ.get("MALLOC_TRIM_THRESHOLD_")}


def looks_at_itself(dask_worker):
    return "profile" in dask_worker.periodic_callbacks


def test_a_worker_does_not_profile_its_runs(client):
    assert set(client.run(looks_at_itself).values()) == {False}


def test_a_killed_workers_run_is_made_again(client, tmp_path):
    split, killed = image_split(20), []

    def kill(what, done, total, metrics):
        if done >= 2 and not killed:
            (pid, *_) = [p for p in client.run(os.getpid).values()]
            os.kill(pid, signal.SIGKILL)
            killed.append(done)

    run_grid(client, split, *RECIPES, seeds=(0, 1, 2), lab=Lab(ENGINE, tmp_path, kill))
    assert killed
    assert len(grid(split, *RECIPES, seeds=(0, 1, 2), lab=Lab(ENGINE, tmp_path, never))) == 6


@pytest.mark.whole
def test_the_only_worker_may_be_killed_as_well(tmp_path):
    split, killed = image_split(20), []

    def kill(what, done, total, metrics):
        if done >= 2 and not killed:
            killed.append(list(tmp_path.iterdir()))
            os.kill(*client.run(os.getpid).values(), signal.SIGKILL)

    with connected(1) as client:
        run_grid(client, split, *RECIPES, seeds=(0, 1, 2), lab=Lab(ENGINE, tmp_path, kill))
    assert killed and set(killed[0]) < set(tmp_path.iterdir())
    assert len(grid(split, *RECIPES, seeds=(0, 1, 2), lab=Lab(ENGINE, tmp_path, never))) == 6


def started(program, *arguments):
    """A scheduler's or a worker's own process."""
    command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *arguments]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.fixture
def scheduler(tmp_path):
    """(process, address) of a scheduler without workers."""
    told = tmp_path / "scheduler.json"
    where = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", told)
    running = started("scheduler", *where)
    while not (told.exists() and told.read_text().endswith("}")) and running.poll() is None:
        time.sleep(0.1)
    yield running, json.loads(told.read_text())["address"]
    running.kill()
    running.wait()


@pytest.mark.whole
def test_a_scheduler_without_workers_and_one_that_goes_away_are_one_line_each(scheduler, tmp_path, monkeypatch):
    running, address = scheduler
    lab = Lab(ENGINE, tmp_path / "runs")
    how = dict(seeds=(0, 1), lab=lab)
    with connected(None, address) as client:
        monkeypatch.setattr(cluster, "PATIENCE", 1)
        with pytest.raises(ValueError, match=f"at {address} has no workers; start some: dask worker {address}"):
            run_grid(client, image_split(20), *RECIPES, **how)
        monkeypatch.undo()
        on_step = lambda what, done, *_: done and running.kill()  # noqa: E731
        worker = started("worker", address, "--no-nanny")
        try:
            with pytest.raises(ValueError, match=f"scheduler at {address} is gone; finished runs are kept"):
                run_grid(client, image_split(20), *RECIPES, seeds=(0, 1), lab=replace(lab, on_step=on_step))
        finally:
            worker.kill()
            worker.wait()
    assert list((tmp_path / "runs").iterdir())


# As where it was never installed. Dask writes a preload that is no name of a file to one.
WITHOUT_SEMKIT = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "semkit":
            raise ModuleNotFoundError("No module named 'semkit'")
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.whole
def test_a_worker_without_semkit_is_one_line(scheduler, tmp_path):
    _, address = scheduler
    worker = started("worker", address, "--no-nanny", "--no-dashboard", "--preload", WITHOUT_SEMKIT)
    try:
        with connected(None, address) as client, pytest.raises(ValueError, match=r"tcp://.* cannot import semkit"):
            run_grid(client, image_split(20), *RECIPES, lab=Lab(ENGINE, tmp_path))
    finally:
        worker.kill()
        worker.wait()


def test_stopping_keeps_what_is_finished(client, tmp_path):
    with pytest.raises(Interrupted, match="finished runs are kept"):
        stop = lambda what, done, *_: done >= 1  # noqa: E731
        run_grid(client, image_split(20), *RECIPES, lab=Lab(ENGINE, tmp_path, stop))
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.glob("*.json"))


def test_what_a_run_raises_is_raised_here(client, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        run_grid(client, image_split(20), *RECIPES, lab=Lab(ENGINE, tmp_path / "file"))


def test_no_scheduler_at_the_address_is_one_line():
    nobody = "tcp://127.0.0.1:9"
    with pytest.raises(ValueError, match=f"no Dask scheduler answers at {nobody}"), connected(1, nobody, patience=1):
        pass


def test_without_dask_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install semkit\[cluster\]"), connected():
        pass
