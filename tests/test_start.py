"""The command `semkit` while it is imported: Ctrl-C and a torch that cannot be loaded are one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = "import sys; from semkit.__main__ import main; print('ready', flush=True); sys.exit(main())"


def started(before: str = "", arguments: tuple[str, ...] = ("check", "photos", "out")) -> subprocess.Popen:
    call = [sys.executable, "-c", before + START, *arguments]
    return subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_ctrl_c_while_torch_is_imported_is_one_line(seconds):
    process = started()
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1], process.returncode) == ("semkit: stopped\n", 130)


def test_a_torch_that_cannot_be_loaded_is_one_line():
    process = started("import sys; sys.modules['torch'] = None; ")
    said = process.communicate()[1]
    assert said.startswith("semkit: cannot be started; ") and said.count("\n") == 1 and process.returncode == 2


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_take_no_torch(word):
    process = started("import sys; sys.modules['torch'] = None; ", (word,))
    said, complained = process.communicate()
    assert "semkit" in said and (complained, process.returncode) == ("", 0)


@pytest.mark.whole
def test_protecting_leaves_nothing_in_the_home_folder(tmp_path):
    home, out = tmp_path / "home", str(tmp_path / "out")
    home.mkdir()
    command = [sys.executable, "-m", "semkit", "protect", "shapes", out, "--preset", "quick", "--limit", "10"]
    place = {"cwd": Path(__file__).parents[1], "env": {**os.environ, "HOME": str(home)}}
    subprocess.run([*command, "--size", "8"], **place, capture_output=True, check=True)
    assert list(home.rglob("*")) == []
