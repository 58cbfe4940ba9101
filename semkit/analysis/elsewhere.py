"""Clocks that are read in another process: nothing that this one has set for itself reaches what runs there."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

import torch

from semkit.analysis.stopwatch import Clock, Run, clock

_works: dict[str, Run] = {}  # of the other process


def _begin(make: Callable[..., dict[str, Run]], given: tuple, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(threads)
    _works.update(make(*given))


def _read(work: str, calls: int, device: str) -> float:
    return clock(_works[work], calls, device)


@contextmanager
def clocks(make: Callable[..., dict[str, Run]], *given, device: str) -> Iterator[Callable[[str], Clock]]:
    """The clock of each work of make(*given), by name; the other process makes them, and ends with the block.

    Clocks raise ChildProcessError when the other process has ended before its time.
    """
    how = make, given, torch.get_num_threads()

    def seconds(work: str, calls: int) -> float:
        try:
            return pool.submit(_read, work, calls, device).result()
        except BrokenProcessPool:
            why = "for want of memory perhaps; a smaller --batch needs less"
            raise ChildProcessError(f"the plain reference's process was killed, {why}") from None

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, how) as pool:
        yield lambda work: partial(seconds, work)
