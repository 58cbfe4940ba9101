"""The state of an unfinished crafting, saved to a file and loaded again."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from semkit.images.files import check_fields, one_line, out_of_memory, read_tensors, shown, write_tensors
from semkit.nets.engine import Passes
from semkit.protections.base import Crafted
from semkit.training.bullettrain import KINDS, Mined

FIELDS = {"made_by": str, "step": int, "seconds": float | int, "losses": list, "passes": dict, "mined": dict}


def _copied(found: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """`to` with the values of `found`, which must have its shape and dtype."""
    if found.dtype != to.dtype or found.shape != to.shape:
        raise ValueError(f"{found.dtype} {list(found.shape)}, not {to.dtype} {list(to.shape)}")
    return to.copy_(found)


@dataclass
class State(Crafted):
    """The noise and surrogate so far, and what else the next step needs: optimizer, step and BulletTrain's state."""

    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    mined: Mined = field(default_factory=Mined)

    def save(self, path: Path, made_by: str) -> float:
        """Write the state to `path`, whole or not at all; returns the seconds that this took."""
        began = time.monotonic()
        record = dict(
            made_by=made_by, step=self.step, seconds=self.seconds, losses=self.losses, passes=vars(self.passes),
            mined=vars(self.mined),
        )  # fmt: skip
        weights = {f"model.{name}": value for name, value in self.surrogate.state_dict().items()}
        kept = {f"momentum.{i}": self.optimizer.state.get(p, {}).get("momentum_buffer") for i, p in self._parameters()}
        momentum = {name: value for name, value in kept.items() if value is not None}
        write_tensors(path, {"noise": self.noise, **weights, **momentum}, record)
        return time.monotonic() - began

    def load(self, path: Path, made_by: str, total: int) -> None:
        """Go on from the state at `path`, of a run of `total` steps.

        Raises ValueError if it is damaged, or if another recipe, seed, engine or image set made it.
        """
        try:
            tensors, record = read_tensors(path, FIELDS)
            if check_fields(record, FIELDS)["made_by"] == made_by:
                return self._take(tensors, record, total)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"{shown(path)} is damaged ({one_line(error)}); delete it to start afresh") from error
        raise ValueError(
            f"{shown(path)} belongs to another recipe, seed, engine or image set; delete it to start afresh"
        )

    def _parameters(self):
        """(place, parameter) of each parameter of the optimizer."""
        return enumerate(p for group in self.optimizer.param_groups for p in group["params"])

    def _take(self, tensors: dict[str, torch.Tensor], record: dict, total: int) -> None:
        """Restore the state from tensors and record; raises an error if no step could go on from it."""
        step, losses, mined = record["step"], record["losses"], record["mined"]
        check_fields(record["passes"], dict.fromkeys(vars(self.passes), int))
        check_fields(mined, {"average": float | int, "counts": list})
        if not all(isinstance(loss, float) for loss in losses) or not 0 < len(losses) <= step <= total:
            raise ValueError(f"{len(losses)} losses of {step} steps, of {total} in all")
        if any([type(count) for count in counts] != len(KINDS) * [int] for counts in mined["counts"]):
            raise ValueError("the counts of mined images")
        self.surrogate.load_state_dict({name[6:]: tensors[name] for name in tensors if name.startswith("model.")})
        _copied(tensors["noise"], self.noise)
        for i, p in self._parameters():
            if (kept := tensors.get(f"momentum.{i}")) is not None:
                self.optimizer.state[p]["momentum_buffer"] = _copied(kept, torch.empty_like(p))
        self.step, self.seconds, self.losses = step, record["seconds"], losses
        self.passes = Passes(**record["passes"])
        self.mined = Mined(mined["average"], [tuple(counts) for counts in mined["counts"]])
