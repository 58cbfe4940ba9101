"""Runs of the command line in processes of their own, forked from one that has torch imported already."""

import multiprocessing
import re
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from semkit.__main__ import main

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["semkit.app.commands", "torch._dynamo"])


def _run(job: Callable, log: Path, largest_file: int | None, more_memory: int | None) -> None:
    import torch

    torch.set_num_threads(1)
    with open(log, "w") as file, redirect_stderr(file), redirect_stdout(file):
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if more_memory is not None:  # files that are mapped do not count
            held = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
            most = 1024 * int(held[1]) + more_memory
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        sys.exit(job())


def start(job: list[str] | Callable, log: Path, largest_file: int | None = None, more_memory: int | None = None):
    """The process of a job, or of `semkit` with these arguments, its output going to `log`.

    No file may grow beyond largest_file bytes, and it can hold more_memory bytes more than at its beginning.
    """
    job = job if callable(job) else partial(main, job)
    process = _context.Process(target=_run, args=(job, log, largest_file, more_memory))
    process.start()
    return process


def finish(job: list[str] | Callable, log: Path, **limits: int) -> int:
    """The exit code of such a process."""
    process = start(job, log, **limits)
    process.join(60)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode
