"""Two processes on one job: sums and shares, the gradient of the whole batch, the same bytes after a stop."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from photos import make_photos
from together import linear_step

from semkit import parallel

SCRIPT = Path(__file__).with_name("together.py")


def side_by_side(*command, limited=None, **environment):
    """Two processes of Python with the command as torchrun starts them; the `limited` one can write no large file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4000, 4000))
    return [
        subprocess.Popen(
            [sys.executable, *command], env={**how, "RANK": str(rank)}, stdout=-1, stderr=-1, text=True,
            preexec_fn=limit if rank == limited else None,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def ended(running):
    """((output, errors), exit code) of each of the processes."""
    return [(process.communicate(timeout=120), process.returncode) for process in running]


def both(folder, **environment):
    """What two processes that run together.py side by side end with."""
    return ended(side_by_side(SCRIPT, folder, **environment))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    (first, code), (_, other) = both(tmp_path_factory.mktemp("together"))
    assert (code, other) == (0, 0), first[1]
    return json.loads(first[0])


def test_what_is_exchanged(found):
    assert found["exchange"] == {
        "average": [[0.5, 0.5], [5.0]], "total": 3, "every": [0, 1], "first": "from 0", "whole": list(range(7)),
        "stream": [0, 2],
    }  # fmt: skip


def test_two_halves_of_a_batch_make_the_step_of_the_whole(found):
    assert found["linear"] == pytest.approx(linear_step(), abs=1e-12)
    assert found["alone"] == linear_step()  # outside a common job a process is alone


def test_crafting_makes_noise_for_every_image_and_counts_all_passes(found):
    noise = torch.tensor(found["noise"]).reshape(found["shape"])
    assert found["shape"] == [21, 3, 8, 8] and noise.abs().max() <= 8
    assert (noise != 0).flatten(1).any(1).all()
    # 8 images a step and 21 in the last pass, where 20 would be noted
    assert found["passes"] == found["cost"] + 1
    assert found["same"]


def test_a_stopped_run_goes_on_to_the_same_bytes_from_the_newest_state_that_both_have(found):
    assert found["resumed"] == found["noise"]


def test_a_learner_is_trained_and_tested_by_both(found):
    assert found["curve"] == [2, 4] and found["learner_passes"] == 4 * 8 * 2
    assert round(found["last"] * 9) == pytest.approx(found["last"] * 9)


def test_several_processes_hold_their_sets_in_memory(found):
    where, said = found["streaming"]
    assert where is None and "needs a single one" in said


def test_a_lost_process_is_said_in_one_line(tmp_path):
    (first, code), (_, other) = both(tmp_path, LOSE="1")
    assert code and other == -9
    assert first[1].strip().splitlines()[-1].endswith("a process of the group was lost; what was saved can be resumed")


GONE = "a process of the group was lost; what was saved can be resumed"
GOES_ON = "; the same command with --resume goes on from there"


@pytest.fixture
def protecting(tmp_path):
    """A command that protects a few photos in some hundred steps, and saves its state after every one."""
    make_photos(tmp_path / "photos", 8)
    more = ["--preset", "lesson", "--size", "8", "--checkpoint-every", "0"]
    return ["-m", "semkit", "protect", tmp_path / "photos", tmp_path / "out", *more]


@pytest.mark.whole
@pytest.mark.parametrize("limited", [0, 1])
def test_what_goes_wrong_in_one_process_ends_both_with_a_line_each(limited, protecting):
    found = ended(side_by_side(*protecting, limited=limited))
    said = [errors.splitlines()[-1] for (_, errors), _ in found]
    wrong, other = said[limited], said[1 - limited]
    assert wrong.endswith(("File too large" + GOES_ON, "File too large")) and "state" in wrong
    assert other.startswith("semkit: process 1 of 2: "[: 8 if limited else None]) and GONE in other
    assert not any("Traceback" in errors for (_, errors), _ in found) and [code for _, code in found].count(0) == 0


@pytest.mark.whole
def test_a_signal_to_stop_is_the_first_ones_to_answer_however_often_it_comes(protecting, tmp_path):
    running = side_by_side(*protecting)
    while not list(tmp_path.glob("out/unfinished/*")) and running[0].poll() is None:
        time.sleep(0.05)
    for _ in range(2):  # from the terminal, and from torchrun
        for process in running:
            process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    ((_, first), code), ((_, second), other) = ended(running)
    assert first.splitlines()[-1].startswith("semkit: stopped after step ") and first.endswith(GOES_ON + "\n")
    assert (code, other, second) == (130, 0, "")


def test_one_process_is_itself():
    tensor = torch.ones(2)
    parallel.average_([tensor])
    assert parallel.place() == (0, 1) and parallel.stream() == () and parallel.processes() == 1
    assert tensor.tolist() == [1, 1] and parallel.every("x") == ["x"] and parallel.first(3) == 3
    with parallel.group() as leads:
        assert leads and parallel.together(lambda value: value, 4) == 4
