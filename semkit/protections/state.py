"""The state of a crafting: all that its next step depends on, saved and found again."""

import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from semkit.images.files import atomic_write, check_fields, one_line, shown
from semkit.images.storage import out_of_memory
from semkit.nets.engine import Passes
from semkit.training.bullettrain import KINDS, Mined

FIELDS = {
    "step": int, "seconds": float | int, "losses": list, "passes": dict, "mined": dict, "noise": torch.Tensor,
    "model": dict, "optimizer": dict,
}  # fmt: skip


class _Told:
    """A file for torch.save, which makes something else of a full disk: the first OSError is kept for later."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, content) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Nothing: who opened the file closes it."""


def _save(state: dict, file: BinaryIO) -> None:
    """torch.save straight to the file, so that the noise is not held a second time."""
    told = _Told(file)
    torch.save(state, told)
    if told.error:
        raise told.error


def read_state(path: Path, made_by: str) -> dict:
    """The state at `path`, its tensors mapped.

    Raises ValueError if it is none, or if another recipe, seed, engine or image set made it.
    """
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("not a file")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_fields(state, {"made_by": str})
    except Exception as error:  # torch raises whatever it runs into
        if out_of_memory(error) or isinstance(error, PermissionError):
            raise
        raise ValueError(f"{shown(path)} is damaged, no crafting state; delete it to start afresh") from error
    if state["made_by"] != made_by:
        raise ValueError(
            f"{shown(path)} belongs to another recipe, seed, engine or image set; delete it to start afresh"
        )
    return state


@dataclass
class State:
    """All that the next step depends on, besides the images: the surrogate, its optimizer, the noise, the step,
    and what mining has learned.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    noise: torch.Tensor
    losses: list[float]
    passes: Passes
    step: int = 0
    seconds: float = 0.0
    mined: Mined = field(default_factory=Mined)

    def save(self, path: Path, made_by: str) -> float:
        """Writes the state to `path`, whole or not at all; returns the seconds that took."""
        began = time.monotonic()
        state = dict(
            made_by=made_by, step=self.step, seconds=self.seconds, losses=self.losses, passes=vars(self.passes),
            mined=vars(self.mined), noise=self.noise, model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )  # fmt: skip
        atomic_write(path, lambda file: _save(state, file))
        return time.monotonic() - began

    def load(self, path: Path, made_by: str, total: int) -> None:
        """Goes on from the state at `path`, of a run of `total` steps.

        Raises ValueError as read_state does, and for a state that is not of this model, optimizer and noise.
        """
        state = read_state(path, made_by)
        try:
            self._check(state, total)
            self._take(state)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"{shown(path)} is damaged ({one_line(error)}); delete it to start afresh") from error

    def _check(self, state: dict, total: int) -> None:
        """Raises ValueError for what load_state_dict and copy_ would take, and no step could go on from."""
        check_fields(state, FIELDS)
        check_fields(state["passes"], {name: int for name in vars(self.passes)})
        check_fields(state["mined"], {"average": float | int, "last": tuple, "all": tuple})
        step, losses, noise = state["step"], state["losses"], state["noise"]
        counts = [*state["mined"]["last"], *state["mined"]["all"]]
        if not all(isinstance(loss, float) for loss in losses) or not 0 < len(losses) <= step:
            raise ValueError(f"{len(losses)} losses of {step} steps")
        if step > total:
            raise ValueError(f"step {step} of {total}")
        if len(counts) != 2 * len(KINDS) or not all(isinstance(count, int) for count in counts):
            raise ValueError("the counts of mined images")
        if noise.dtype != self.noise.dtype or noise.shape != self.noise.shape:
            raise ValueError(
                f"noise {noise.dtype} {list(noise.shape)}, not {self.noise.dtype} {list(self.noise.shape)}"
            )
        groups = [state["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"]]
        found, own = ([{**group, "lr": None} for group in these] for these in groups)  # every step sets its rate
        if found != own:
            raise ValueError("the settings of another optimizer")

    def _take(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # no part of the mapped file
        for p, kept in self.optimizer.state.items():
            if (momentum := kept.get("momentum_buffer")) is not None and momentum.shape != p.shape:
                raise ValueError(f"momentum {list(momentum.shape)} of a parameter {list(p.shape)}")
        self.noise.copy_(state["noise"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.passes, self.mined = Passes(**state["passes"]), Mined(**state["mined"])
