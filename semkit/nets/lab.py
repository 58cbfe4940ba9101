"""What travels with every run: the engine, the folder of finished runs, the progress callback, the worker processes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from semkit.nets.engine import Engine

OnStep = Callable[[str, int, int, dict], bool | None]


class Interrupted(Exception):
    """A run was asked to stop. Finished runs and the saved state are kept."""


@dataclass(frozen=True)
class Lab:
    """Where and how runs are made.

    engine: device, precision and fast paths. cache: the folder of finished runs, None to keep none.
    on_step(what, step, total, metrics): called after every step of the job `what`. It stops the run by returning True;
    Interrupted is raised then. what: the name of the job under way. workers: how many processes `grid` spreads its runs
    over, of one thread each; scheduler: the address of a Dask scheduler whose workers make them instead. Both need a
    cache, which all workers see.

        lab = sk.Lab(cache=sk.runs_folder())
        noise, cost = sk.crafted_noise(split.train, sk.craft_recipe("sem", "demo"), lab=lab)
    """

    engine: Engine = field(default_factory=Engine)
    cache: Path | None = None
    on_step: OnStep | None = None
    what: str = ""
    workers: int | None = None
    scheduler: str | None = None

    def doing(self, what: str) -> "Lab":
        """This lab with a name for its job; a name that was given before stays."""
        return self if self.what else replace(self, what=what)

    def asked_to_stop(self, step: int, total: int, metrics: dict) -> bool:
        """Report a step of the job to on_step. True if the run is to stop."""
        return bool(self.on_step and self.on_step(self.what, step, total, metrics))

    def report(self, step: int, total: int, metrics: dict) -> None:
        """Report a step of the job to on_step. Raises Interrupted if the run is to stop."""
        if self.asked_to_stop(step, total, metrics):
            raise Interrupted(f"stopped while {self.what}, {step} of {total}; finished runs are kept")
