"""Runs on worker processes: of this machine, or of any Dask scheduler.

Plain Dask, because joblib's Dask backend waits forever for a run that killed its workers, its own backend ends all
workers when one dies, and neither hears of Ctrl-C before a run is done.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from semkit.images.files import temporary_file
from semkit.nets.engine import keep_freed
from semkit.nets.lab import Lab

Call = Callable[[], object]
Group = tuple[Call | None, Sequence[Call]]  # the call that the others wait for, if there is one, and the others

# In place of Dask's own settings, whose MALLOC_TRIM_THRESHOLD_ works against keep_freed. Errors of a worker are raised
# here, so it need not log them. A process that looks at itself every 10 or 20 ms takes time from runs.
OF_A_WORKER = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} | {
    "DASK_LOGGING__DISTRIBUTED": "critical", "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
    "DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON": "{'MALLOC_TRIM_THRESHOLD_': None}",
}  # fmt: skip
ANSWERS, COMES = 10, 60  # seconds that a scheduler may take to answer, and a worker to come


def spread(groups: Iterable[Group], lab: Lab) -> None:
    """Run calls on workers: lab.workers processes of one thread each, or the workers of the scheduler at lab.scheduler.

    A call keeps its result in lab.cache, a folder that all workers see; what it returns is dropped. If a worker dies,
    another one runs its call again. lab.on_step is told of "runs on n workers".

    Raises what a call raises, Interrupted where on_step asks to stop, and ValueError without Dask or lab.cache, for a
    scheduler that is not there or has no workers, for workers without semkit, and for a call that kills them.
    """
    if lab.cache is None:
        raise ValueError("workers keep their runs in a folder: give the Lab a cache")
    Path(lab.cache).mkdir(parents=True, exist_ok=True)
    with _connected(lab) as client, temporary_file(Path(lab.cache).resolve()) as file:
        _check_workers(client, 1 if lab.scheduler else lab.workers)
        _watch(client, list(_submitted(client, list(groups), file)), lab)


def check_scheduler(lab: Lab) -> None:
    """Raises ValueError, as `spread` does, unless the scheduler at lab.scheduler has workers; for None nothing."""
    if lab.scheduler is not None:
        with _connected(lab) as client:
            _check_workers(client)


@contextmanager
def _connected(lab: Lab) -> Iterator:
    """A Dask client of the scheduler at lab.scheduler, else of lab.workers processes of this machine."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ValueError("runs on workers need dask.distributed: pip install semkit[cluster]") from None
    if lab.scheduler is None:
        # Any free port, where the usual one may be another cluster's.
        quiet = dict(dashboard_address="127.0.0.1:0", silence_logs="CRITICAL", host="127.0.0.1")
        with LocalCluster(n_workers=0, **quiet) as one, _started(one.scheduler_address, lab.workers):
            with Client(one) as client:
                yield client
        return
    try:
        client = Client(lab.scheduler, timeout=ANSWERS)
    except (OSError, ValueError) as error:
        said = f"{error}" or type(error).__name__
        raise ValueError(f"no Dask scheduler answers at {lab.scheduler} ({said})") from None
    with client:
        yield client


@contextmanager
def _started(at: str, n: int) -> Iterator[None]:
    """n worker processes of one thread each, by Dask's command, because LocalCluster's own run a script anew each."""
    command = f"-m dask worker {at} --host 127.0.0.1 --no-dashboard --death-timeout {COMES} --nworkers {n}".split()
    command = [sys.executable, *command, "--nthreads", "1", "--memory-limit", str(1 / n)]
    found = {"PYTHONPATH": os.pathsep.join(sys.path)}  # what can be imported here
    with subprocess.Popen(command, env=os.environ | OF_A_WORKER | found, start_new_session=True) as workers:
        try:
            yield
        finally:
            workers.terminate()


def _check_workers(client, n: int = 1) -> None:
    """Raises ValueError where fewer than n workers come, and where one has no semkit: Dask would wait for ever."""
    at = client.scheduler.address
    try:
        client.wait_for_workers(n, timeout=COMES)
    except TimeoutError:
        raise ValueError(f"the Dask scheduler at {at} has no workers; start some: dask worker {at}") from None
    # All workers import semkit here, at the same time.
    for worker, found in client.run(keep_freed, on_error="return").items():
        if "No module named" in str(found):
            raise ValueError(f"the Dask worker at {worker} cannot import semkit ({found}); install it there")


def _submitted(client, groups: Sequence[Group], file: BinaryIO) -> Iterator:
    """The futures of all calls. They are handed over in a file, because what Dask holds is lost with a worker."""
    from cloudpickle import dumps

    file.write(dumps(groups))
    file.flush()
    submit = partial(client.submit, _make, Path(file.name), pure=False)
    for i, (first, others) in enumerate(groups):
        needed = [submit(i, None)] if first else []
        yield from needed
        yield from (submit(i, j, *needed) for j in range(len(others)))


@lru_cache(maxsize=1)
def _read(file: Path) -> Sequence[Group]:
    from cloudpickle import loads

    return loads(file.read_bytes())


def _make(file: Path, group: int, place: int | None, *_: None) -> None:
    first, others = _read(file)[group]
    (first if place is None else others[place])()


def _watch(client, runs: Sequence, lab: Lab) -> None:
    """Wait until all runs are finished; raise what one of them raised, and Interrupted where on_step asks to stop."""
    from distributed import KilledWorker

    at, lab = client.scheduler.address, lab.doing(f"runs on {len(client.nthreads())} workers")
    seen = time.monotonic()  # when there was a worker: one that dies while it starts does not come back
    while True:
        status = Counter(run.status for run in runs)
        for failed in (run for run in runs if run.status == "error"):
            try:
                failed.result()
            except KilledWorker as error:
                why = f"a run killed every worker it was given to, for want of memory perhaps ({error})"
                raise ValueError(why) from None
        lab.report(status["finished"], len(runs), {})
        if status["finished"] == len(runs):
            return
        try:
            if status["cancelled"]:
                raise OSError
            seen = time.monotonic() if client.nthreads() else seen
        except OSError:
            raise ValueError(f"the Dask scheduler at {at} is gone; finished runs are kept") from None
        if time.monotonic() > seen + COMES:
            raise ValueError(f"the Dask scheduler at {at} has lost its workers; finished runs are kept")
        time.sleep(0.2)
