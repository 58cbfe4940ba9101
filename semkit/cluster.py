"""A grid's runs on Dask: processes of this machine by default, any scheduler by its address; results go to the cache.

The cache is a folder that all workers see. Whatever is finished is kept there, so study.grid afterwards reads it all,
and a worker that dies costs the run it was at: Dask gives that run to another one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from semkit.craft import CraftRecipe, Interrupted
from semkit.engine import Engine
from semkit.imageset import Split
from semkit.learn import LearnRecipe
from semkit.neighbours.convolve import filtered_tests
from semkit.study import MadeBy, crafted_noise, learned_row, training_set

# In place of Dask's own wishes, a MALLOC_TRIM_THRESHOLD_ among them, which semkit.memory would have to undo.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


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
        quiet = dict(dashboard_address="127.0.0.1:0", silence_logs="ERROR", host="127.0.0.1")
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": ONE_THREAD}),
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


def _craft(split: Split, recipe: CraftRecipe, seed: int, engine: Engine, cache: Path) -> None:
    crafted_noise(split.train, recipe, seed=seed, engine=engine, cache=cache)


def _learn(
    split: Split, crafted: None, made_by: MadeBy, learn_by: LearnRecipe, countermeasures: Sequence[str], seed: int,
    engine: Engine, cache: Path,
) -> None:  # fmt: skip
    how = dict(seed=seed, engine=engine, cache=cache)
    train, _ = training_set(split.train, made_by, **how)
    also = filtered_tests(split.test, made_by, seed)
    learned_row(train, split.test, learn_by, countermeasures=countermeasures, also=also, **how)


def run_grid(
    client,
    split: Split,
    crafts: Mapping[str, MadeBy],
    learners: Mapping[float | str, LearnRecipe],
    *,
    countermeasures: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    engine: Engine | None = None,
    cache: Path,
    on_step: Callable | None = None,
) -> None:
    """Every run of study.grid's rows made by the client's workers and kept in `cache`, where study.grid finds them.

    A learner starts when its noise is there. on_step("runs on n workers", done, total, {}) stops it by returning True.
    Raises what a run raised, and ValueError for a run that killed worker after worker.
    """
    from distributed import KilledWorker

    engine, cache = engine or Engine(), Path(cache).resolve()
    images = client.scatter(split, broadcast=True)
    learned_by = [client.scatter(recipe, broadcast=True, hash=False) for recipe in learners.values()]  # may hold images
    runs = []
    for seed, made_by in product(seeds, crafts.values()):
        noisy = isinstance(made_by, CraftRecipe)
        crafted = client.submit(_craft, images, made_by, seed, engine, cache, pure=False) if noisy else None
        runs += [crafted] if crafted else []
        runs += [
            client.submit(_learn, images, crafted, made_by, learn_by, first, seed, engine, cache, pure=False)
            for first, learn_by in product([(name,) for name in countermeasures] or [()], learned_by)
        ]
    what = f"runs on {len(client.scheduler_info(n_workers=-1)['workers'])} workers"
    try:
        while True:
            done = [run for run in runs if run.done()]
            for failed in (run for run in done if run.status == "error"):
                failed.result()
            if on_step and on_step(what, len(done), len(runs), {}):
                client.cancel(runs)
                raise Interrupted("stopped; finished runs are kept")
            if len(done) == len(runs):
                return
            time.sleep(0.2)
    except KilledWorker as error:
        raise ValueError(f"a run killed every worker it was given to, for want of memory perhaps ({error})") from None
