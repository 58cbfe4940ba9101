"""The state of a crafting: all that its next step depends on, saved and found again."""

import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from semkit.engine import Passes
from semkit.files import atomic_write
from semkit.neighbours.bullettrain import Mined
from semkit.storage import out_of_memory


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


def _read_state(path: Path, made_by: str) -> dict:
    """The state at `path`, mapped; raises ValueError if another recipe, seed, engine or image set made it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{path} is no crafting state ({error}); delete it to start afresh") from error
    if state["made_by"] != made_by:
        raise ValueError(f"{path} belongs to another recipe, seed, engine or image set; delete it to start afresh")
    return state


def read_state(path: Path, made_by: str) -> dict | None:
    """The state at `path`, None where there is none.

    Raises ValueError if another recipe, seed, engine or image set made it.
    """
    return _read_state(path, made_by) if path.exists() else None


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

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # no part of the mapped file
        self.noise.copy_(state["noise"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.passes, self.mined = Passes(**state["passes"]), Mined(**state["mined"])
