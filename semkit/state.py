"""The state of a crafting: all that its next step depends on, saved and found again."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from semkit import parallel
from semkit.engine import Passes
from semkit.files import atomic_write


def _read_state(path: Path, made_by: str, device: str) -> dict:
    """The state at `path`; raises ValueError if another recipe, seed or image set made it."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no crafting state ({error}); delete it to start afresh") from error
    if state["made_by"] != made_by:
        raise ValueError(f"{path} belongs to another recipe, seed or image set; delete it to start afresh")
    return state


def state_files(checkpoint: str | os.PathLike) -> list[Path]:
    """Where this process saves its state, in turn.

    Two files with several processes: whenever they are killed, they have one step in common.
    """
    rank, size = parallel.place()
    if size == 1:
        return [Path(checkpoint)]
    return [Path(f"{checkpoint}.{rank}of{size}{turn}") for turn in "ab"]


def newest(files: list[Path], made_by: str, device: str) -> dict | None:
    """The newest state that every process has, None if there is none."""
    found = {state["step"]: state for path in files if path.exists() for state in [_read_state(path, made_by, device)]}
    common = set.intersection(*map(set, parallel.every(list(found))))
    return found[max(common)] if common else None


@dataclass
class State:
    """All that the next step depends on, besides the images: the surrogate, its optimizer, the noise, the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    noise: torch.Tensor
    losses: list[float]
    passes: Passes
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path, made_by: str) -> None:
        state = dict(
            made_by=made_by, step=self.step, seconds=self.seconds, losses=self.losses, passes=vars(self.passes),
            noise=self.noise, model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
        )  # fmt: skip
        content = io.BytesIO()  # what torch.save makes of a full disk is no OSError
        torch.save(state, content)
        atomic_write(path, content.getvalue())

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.noise.copy_(state["noise"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.passes = Passes(**state["passes"])
