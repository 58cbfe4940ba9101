"""Runs of the command line in processes of their own, forked from one that has torch imported already."""

import multiprocessing
import resource
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from semkit.cli import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["semkit.cli", "semkit.protect", "torch._dynamo"])


def _run(arguments: list[str], log: Path, largest_file: int | None) -> None:
    import torch

    torch.set_num_threads(1)
    with open(log, "w") as file, redirect_stderr(file), redirect_stdout(file):
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.exit(main(arguments))


def start(arguments: list[str], log: Path, largest_file: int | None = None) -> multiprocessing.Process:
    """`semkit` with these arguments, its output going to `log`; no file may grow beyond largest_file bytes."""
    process = _context.Process(target=_run, args=(arguments, log, largest_file))
    process.start()
    return process


def finish(arguments: list[str], log: Path, largest_file: int | None = None) -> int:
    """The exit code of such a run."""
    process = start(arguments, log, largest_file)
    process.join(60)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode
