"""A grid's runs on Dask: processes of this machine by default, any scheduler by its address; results go to the cache.

The cache is a folder that all workers see. Whatever is finished is kept there, so study.grid afterwards reads it all,
and a worker that dies costs the run it was at: Dask gives that run to another one.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from semkit.analysis.study import crafted_noise, further_tests, learned_row, training_set
from semkit.images.imageset import Split
from semkit.nets.engine import keep_freed
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.protection import NoiseRecipe, Recipe
from semkit.training.learning import LearnRecipe

# In place of Dask's own settings, whose MALLOC_TRIM_THRESHOLD_ works against keep_freed. Errors of a worker are raised
# here, so it need not log them.
OF_A_WORKER = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
OF_A_WORKER["DASK_LOGGING__DISTRIBUTED"] = "critical"
LOCAL = {
    "distributed.nanny.pre-spawn-environ": OF_A_WORKER,
    # A process that looks at itself every 10 or 20 ms takes time from runs that use all processors.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
}

TRIES = 3  # how often runs that were lost are given out again, with nothing finished in between
PATIENCE = 30  # seconds that a worker may take to come


@contextmanager
def connected(workers: int | None = 2, address: str | None = None, patience: float = 10) -> Iterator:
    """A Dask client, to `workers` processes of one thread each on this machine, or to the scheduler at `address`.

    None where neither is given. Raises ValueError without dask.distributed, and where no scheduler answers within
    `patience` seconds.
    """
    if not workers and not address:
        yield None
        return
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise ValueError("runs on a cluster need dask.distributed: pip install semkit[cluster]") from None
    if address is None:
        # Any free port, where the usual one may be another cluster's.
        quiet = dict(dashboard_address="127.0.0.1:0", silence_logs="CRITICAL", host="127.0.0.1")
        with (
            dask.config.set(LOCAL),
            LocalCluster(n_workers=workers, threads_per_worker=1, **quiet) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(address, timeout=patience)
    except (OSError, ValueError) as error:
        raise ValueError(f"no Dask scheduler answers at {address} ({error or type(error).__name__})") from None
    with client:
        yield client


def _craft(split: Split, recipe: NoiseRecipe, seed: int, lab: Lab) -> None:
    crafted_noise(split.train, recipe, seed=seed, lab=lab)


def _learn(
    split: Split, crafted: None, made_by: Recipe | None, learn_by: LearnRecipe, countermeasures: Sequence[str],
    seed: int, lab: Lab,
) -> None:  # fmt: skip
    train, _ = training_set(split.train, made_by, seed=seed, lab=lab)
    also = further_tests(split.test, made_by, seed)
    how = dict(countermeasures=countermeasures, also=also, spare=split.spare, seed=seed, lab=lab)
    learned_row(train, split.test, learn_by, **how)


def run_grid(
    client,
    split: Split,
    crafts: Mapping[str, Recipe | None],
    learners: Mapping[float | str, LearnRecipe],
    *,
    countermeasures: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    lab: Lab,
) -> None:
    """Every run of study.grid's rows made by the client's workers and kept in lab.cache, where study.grid finds them.

    A learner starts when its noise is there. lab.on_step is told of "runs on n workers".
    Raises what a run raised, and ValueError for a run that killed worker after worker, for a scheduler that is gone and
    for one without workers.
    """
    from distributed import KilledWorker

    cache = Path(lab.cache).resolve()
    how = (split, crafts, learners, countermeasures, seeds, Lab(lab.engine, cache))
    at, tries, kept = client.scheduler.address, 0, None
    try:
        while tries < TRIES:
            _has_workers(client)
            if _all_finished(client, _submitted(client, *how), lab):
                return
            if client.status != "running":
                raise OSError
            before, kept = kept, len(list(cache.glob("*")))
            tries = 1 if kept != before else tries + 1
    except KilledWorker as error:
        raise ValueError(f"a run killed every worker it was given to, for want of memory perhaps ({error})") from None
    except (OSError, AttributeError):  # what a client without a scheduler raises, by what it was asked
        if client.status == "running":
            raise
        raise ValueError(f"the Dask scheduler at {at} is gone; finished runs are kept") from None
    raise ValueError(f"runs were lost {TRIES} times, and their workers with them; finished runs are kept")


def _has_workers(client) -> None:
    """Raises ValueError where no worker comes within PATIENCE seconds, and where one has no semkit."""
    at = client.scheduler.address
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        raise ValueError(f"the Dask scheduler at {at} has no workers; start some: dask worker {at}") from None
    # All workers import semkit at once here: what is broadcast goes from one to the next.
    for worker, found in client.run(keep_freed, on_error="return").items():
        if "No module named" in str(found):
            raise ValueError(f"the Dask worker at {worker} cannot import semkit ({found}); install it there")


def _submitted(client, split: Split, crafts, learners, countermeasures, seeds, lab: Lab) -> list:
    """The futures of all runs; those in the cache are over at once."""
    images = client.scatter(split, broadcast=True)
    learned_by = [client.scatter(recipe, broadcast=True, hash=False) for recipe in learners.values()]  # may hold images
    runs = []
    for seed, made_by in product(seeds, crafts.values()):
        noisy = made_by and made_by.radius is not None
        crafted = client.submit(_craft, images, made_by, seed, lab, pure=False) if noisy else None
        runs += [crafted] if crafted else []
        runs += [
            client.submit(_learn, images, crafted, made_by, learn_by, first, seed, lab, pure=False)
            for first, learn_by in product([(name,) for name in countermeasures] or [()], learned_by)
        ]
    return runs


def _all_finished(client, runs: list, lab: Lab) -> bool:
    """Waits for the runs; False if some were lost, with the scheduler or with a worker that had what others need."""
    what = f"runs on {len(client.nthreads())} workers"
    while True:
        status = Counter(run.status for run in runs)
        for failed in (run for run in runs if run.status == "error"):
            failed.result()
        if lab.doing(what).asked_to_stop(status["finished"], len(runs), {}):
            client.cancel(runs)
            raise Interrupted("stopped; finished runs are kept")
        if not status["pending"]:
            return status["finished"] == len(runs)
        time.sleep(0.2)
