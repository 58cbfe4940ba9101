"""Seconds that calls take, all in turn, and the hardware they were taken on."""

import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

from semkit import __version__
from semkit.nets.engine import Engine

SHORTEST = 0.2  # seconds that a timing lasts at least, by calling again

Run = Callable[[], object]
Clock = Callable[[int], float]  # the seconds of a call, the mean of so many


def hardware(engine: Engine) -> dict:
    """What numbers are taken on: processor, cores, threads, GPU, precision, versions."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.startswith("cuda") else None
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "gpu": gpu, "precision": engine.precision, "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "semkit": __version__,
    }  # fmt: skip


def clock(run: Run, calls: int, device: str) -> float:
    """Seconds that a call of `run` takes, the mean of `calls` of them; on a GPU between two of its own events."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            began.record()
            for _ in range(calls):
                run()
            ended.record()
            torch.cuda.synchronize()
            return began.elapsed_time(ended) / 1000 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def in_turn(clocks: dict[Hashable, Clock], rounds: int, tell: Run) -> dict[Hashable, list[float]]:
    """Seconds of a call by each clock, once a round: all one after another, so that they share the machine's moods.

    A round before, which does not count, finds how many calls last SHORTEST. What takes less than a second is called
    once more before its calls count: after other work it has to find its memory again. tell() is called after each.
    """
    calls, short, seconds = {}, set(), {name: [] for name in clocks}
    for name, seconds_of in clocks.items():
        took = seconds_of(1)
        if took < 1:
            short.add(name)
            took = seconds_of(1)
        calls[name] = math.ceil(SHORTEST / max(took, 1e-5))
        tell()
    for _ in range(rounds):
        for name, seconds_of in clocks.items():
            if name in short:
                seconds_of(1)
            seconds[name].append(seconds_of(calls[name]))
            tell()
    return seconds


def peak_memory(device: str) -> int:
    """The most bytes that this process has held so far, on its GPU if it uses one."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    import resource  # second choice: on Linux a process begins with the peak of the one that started it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
