"""Runs spread over workers: the same rows as without, a killed worker's run made again, one line where none can be."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
from photos import image_split

from semkit.analysis import cluster
from semkit.analysis.cluster import spread
from semkit.analysis.study import grid
from semkit.nets.engine import Engine
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.methods import sweep_recipes

pytestmark = [
    pytest.mark.skipif(not find_spec("distributed"), reason="dask.distributed is missing: pip install semkit[cluster]"),
    pytest.mark.filterwarnings("default"),  # Dask's own, at start and end of a cluster
]

ENGINE = Engine("cpu", "float32")
RECIPES = sweep_recipes(("clean", "sem"), (0,), "quick")


def timeless(rows):
    """The rows without their seconds, which every run has its own."""
    return rows.drop(columns=[name for name in rows if "seconds" in name])


def never(*_):
    raise AssertionError("this run was kept and must not be made again")


def test_rows_of_two_workers_are_those_of_none_and_are_kept(tmp_path):
    split, told, seeds = image_split(20), [], (0, 1)
    spreading = Lab(ENGINE, tmp_path / "a", lambda *step: told.append(step) and False, workers=2)
    rows = grid(split, *RECIPES, seeds=seeds, lab=spreading)
    assert rows.equals(grid(split, *RECIPES, seeds=seeds, lab=Lab(ENGINE, tmp_path / "a", never)))
    assert timeless(rows).equals(timeless(grid(split, *RECIPES, seeds=seeds, lab=Lab(ENGINE, tmp_path / "b"))))
    assert told[-1][:3] == ("runs on 2 workers", 6, 6)
    assert not list((tmp_path / "a").glob(".*"))


@pytest.fixture(scope="module")
def address():
    """Of a scheduler with two workers."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


def look(folder):
    from distributed import get_worker

    found = [os.environ.get("OMP_NUM_THREADS"), os.environ.get("MALLOC_TRIM_THRESHOLD_")]
    (folder / "found").write_text(json.dumps([*found, "profile" in get_worker().periodic_callbacks]))


def test_a_worker_has_one_thread_keeps_its_memory_and_does_not_profile_its_runs(tmp_path):
    spread([(None, [partial(look, tmp_path)])], Lab(ENGINE, tmp_path, workers=1))
    assert json.loads((tmp_path / "found").read_text()) == ["1", os.environ.get("MALLOC_TRIM_THRESHOLD_"), False]


def keep(file, *, dying=False):
    """A run that is kept in a file, with a line for every time that it was made."""
    if dying and not file.exists():
        file.write_text("killed\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if dying or not file.exists():
        with file.open("a") as lines:
            lines.write("made\n")


@pytest.mark.parametrize("alone", [True, False])
def test_a_killed_worker_costs_its_own_run_only(address, tmp_path, alone):
    first, killed, *others = (tmp_path / name for name in "abcd")
    groups = [(partial(keep, first), [partial(keep, killed, dying=True)]), (None, [partial(keep, f) for f in others])]
    how = {"workers": 1} if alone else {"scheduler": address}
    spread(groups, Lab(ENGINE, tmp_path, **how))
    assert killed.read_text().split() == ["killed", "made"]
    assert [file.read_text().split() for file in (first, *others)] == 3 * [["made"]]


def die():
    time.sleep(0.5)  # Dask starts no other worker for one that dies at its start
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.whole
def test_a_run_that_kills_every_worker_is_one_line(tmp_path):
    from dask import config

    once = config.set({"distributed.scheduler.allowed-failures": 0})
    with once, pytest.raises(ValueError, match="a run killed every worker it was given to, for want of memory perhaps"):
        spread([(None, [die])], Lab(ENGINE, tmp_path, workers=1))


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
def test_a_scheduler_without_workers_and_one_that_loses_them_are_one_line_each(scheduler, tmp_path, monkeypatch):
    _, address = scheduler
    lab = Lab(ENGINE, tmp_path, scheduler=address)
    monkeypatch.setattr(cluster, "COMES", 1)
    with pytest.raises(ValueError, match=f"at {address} has no workers; start some: dask worker {address}"):
        grid(image_split(20), *RECIPES, lab=lab)
    monkeypatch.undo()
    worker = started("worker", address, "--no-nanny")

    def on_step(*_):
        monkeypatch.setattr(cluster, "COMES", 1)
        worker.kill()

    with pytest.raises(ValueError, match=f"at {address} has lost its workers; finished runs are kept"):
        grid(image_split(20), *RECIPES, lab=replace(lab, on_step=on_step))
    worker.wait()


@pytest.mark.whole
def test_a_scheduler_that_goes_away_is_one_line(scheduler, tmp_path):
    running, address = scheduler
    lab = Lab(ENGINE, tmp_path / "runs", lambda what, done, *_: done and running.kill(), scheduler=address)
    worker = started("worker", address, "--no-nanny")
    try:
        with pytest.raises(ValueError, match=f"scheduler at {address} is gone; finished runs are kept"):
            grid(image_split(20), *RECIPES, seeds=2, lab=lab)
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
        with pytest.raises(ValueError, match=r"worker at tcp://.* cannot import semkit"):
            grid(image_split(20), *RECIPES, lab=Lab(ENGINE, tmp_path, scheduler=address))
    finally:
        worker.kill()
        worker.wait()


def test_stopping_keeps_what_is_finished(address, tmp_path):
    with pytest.raises(Interrupted, match="finished runs are kept"):
        stop = lambda what, done, *_: done >= 1  # noqa: E731
        grid(image_split(20), *RECIPES, lab=Lab(ENGINE, tmp_path, stop, scheduler=address))
    assert list(tmp_path.glob("*.json"))


def test_what_a_run_raises_is_raised_here(address, tmp_path):
    with pytest.raises(ZeroDivisionError):
        spread([(None, [partial(divmod, 1, 0)])], Lab(ENGINE, tmp_path, scheduler=address))


def test_no_scheduler_at_the_address_is_one_line(tmp_path, monkeypatch):
    nobody = "tcp://127.0.0.1:9"
    monkeypatch.setattr(cluster, "ANSWERS", 1)
    with pytest.raises(ValueError, match=f"no Dask scheduler answers at {nobody}"):
        spread([], Lab(ENGINE, tmp_path, scheduler=nobody))


def test_without_dask_the_extra_is_named_and_without_a_cache_the_cache(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give the Lab a cache"):
        spread([], Lab(ENGINE, workers=2))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install semkit\[cluster\]"):
        spread([], Lab(ENGINE, tmp_path, workers=2))


SCRIPT = """
import sys, semkit as sk
print("begun")
split = sk.load("shapes", limit=20, size=8)
lab = sk.Lab(sk.Engine("cpu", "float32"), sys.argv[1], workers=2)
print(len(sk.grid(split, *sk.sweep_recipes(["clean"], [0], "quick"), seeds=2, lab=lab)), "rows")
"""


@pytest.mark.whole
def test_a_plain_script_is_run_once_and_not_by_every_worker_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, "script.py", "runs"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "begun\n2 rows\n", "")
