"""Several processes on one job, under torchrun: each holds its share of the images, their gradients are averaged.

The first process runs the command as ever; the others serve it: what it hands to `together` all of them run. With one
process every function here is the identity. Gradients and what batch-norm remembers are averaged in one exchange a
step; DistributedDataParallel, which averages gradients on the way back, would leave batch-norm the first one's memory.
"""

import contextlib
import contextvars
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=1)  # with a process that is at the same job: a large step may take its time
_within: dist.ProcessGroup | None = None  # the group of jobs: waits PATIENCE, no longer
_broken = False  # whether this process has left a job that the others may still be at
_together: contextvars.ContextVar[bool] = contextvars.ContextVar("together", default=False)


class LostProcess(RuntimeError):
    """A process of the group is gone."""


class Stopped(Exception):
    """The end of a job that all its processes raise at once: they are still together."""


def place() -> tuple[int, int]:
    """(rank, number of processes) inside a job that all run together, (0, 1) elsewhere."""
    return member() if _together.get() else (0, 1)


def member() -> tuple[int, int]:
    """(rank, number of processes) of the group, (0, 1) where there is none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def processes() -> int:
    """How many processes the group has, 1 where there is none."""
    return member()[1]


@contextlib.contextmanager
def group() -> Iterator[bool]:
    """Joins the processes that torchrun started; True in the process that is to run the command.

    Leaving it sends the serving processes home. What a signal to stop means is the first one's to say; the others
    ignore it, and so does that one when it has left. Without torchrun: True, and nothing else.
    """
    global _within, _broken
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    from torch.distributed.nn import functional  # noqa: F401  # imported later, its defaults would hold this group

    # Serving processes wait as long as the first one is busy with what only it does.
    dist.init_process_group(timeout=timedelta(days=7))
    _within, _broken = dist.new_group(timeout=PATIENCE), False
    if dist.get_rank():
        _ignore_signals()
    try:
        yield dist.get_rank() == 0
    finally:
        _ignore_signals()  # to the end: torchrun's comes after the terminal's
        if dist.get_rank() == 0 and not _broken:  # else they notice that the first one is gone
            with contextlib.suppress(RuntimeError):  # who is gone needs not be told
                _send(None)
        _within = None  # threads of a group that somebody holds may abort the interpreter at its end
        dist.destroy_process_group()


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():  # others may not
        for asked_to_stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(asked_to_stop, signal.SIG_IGN)


def _send(value, group: dist.ProcessGroup | None = None) -> object:
    box = [value]
    dist.broadcast_object_list(box, group=group)
    return box[0]


def _run(job: Callable, *arguments, **options):
    token = _together.set(True)
    try:
        return job(*arguments, **options)
    except RuntimeError as error:
        if "Connection" in str(error) or "gloo" in str(error).lower() or "NCCL" in str(error):
            lost = LostProcess("a process of the group was lost; what was saved can be resumed")
            raise lost from error.with_traceback(None)  # whose frames would hold the group
        raise
    finally:
        _together.reset(token)


def serve() -> None:
    """Runs what the first process hands out, until it leaves its group.

    Raises what a job raises but Stopped; the other processes notice when this one has ended.
    """
    while (job := _run(_send, None)) is not None:
        with contextlib.suppress(Stopped):
            _run(job[0], *job[1])


def together(job: Callable, *arguments, **mine):
    """job(*arguments, **mine), run by every process of the group, the keywords in this one only; its result here."""
    global _broken
    if processes() == 1 or _together.get():
        return job(*arguments, **mine)
    _send((job, arguments))
    _broken = True
    try:
        made = _run(job, *arguments, **mine)
    except Stopped:
        _broken = False
        raise
    _broken = False
    return made


def mine(images):
    """This process's share of an ImageSet: every size-th image from its rank on; the set itself where there is one."""
    rank, size = place()
    return images if size == 1 else images.take(slice(rank, None, size))


def stream() -> tuple[int, ...]:
    """What a process adds to the name of its random draws, so that no two draw the same: () where there is one."""
    rank, size = place()
    return (rank, size) if size > 1 else ()


def average_(tensors: list[torch.Tensor]) -> None:
    """Every tensor becomes its mean over the processes, in one exchange."""
    if place()[1] == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=_within)
    flat /= place()[1]
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def total(value: float) -> float:
    """The sum of the processes' values."""
    return sum(every(value))


def every(value) -> list:
    """The value of each process, in the order of their ranks."""
    size = place()[1]
    if size == 1:
        return [value]
    found = [None] * size
    dist.all_gather_object(found, value, group=_within)
    return found


def first(value):
    """The first process's value, in all of them."""
    return value if place()[1] == 1 else _send(value, _within)


def whole(part: torch.Tensor, n: int) -> torch.Tensor:
    """[n, ...] from every process's `part` [its share, ...], each row in its place."""
    if place()[1] == 1:
        return part
    made = torch.empty((n, *part.shape[1:]), dtype=part.dtype)
    for rank, rows in enumerate(every(part.cpu())):
        made[rank :: place()[1]] = rows
    return made.to(part.device)
