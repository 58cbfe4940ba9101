"""SGD as a recipe: learning rate, schedule and batches, for the surrogate and the learners."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from semkit.images.pixels import check_count, check_share
from semkit.nets.engine import Engine
from semkit.nets.weights import alphas


@dataclass(frozen=True)
class SGD:
    """Steps of SGD with momentum. The rate falls by 10 at each milestone; without milestones it rises linearly over
    the first `warmup` share of the steps and falls linearly to zero.

    Raises ValueError for steps < 1, batch < 2, a warmup outside [0, 1], and an lr, momentum or weight_decay that is
    negative or not finite.

    >>> [round(SGD(steps=4, warmup=0.5).rate(step), 3) for step in range(4)]
    [0.025, 0.075, 0.075, 0.025]
    """

    steps: int = 5000
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()
    warmup: float = 0.15

    def __post_init__(self):
        object.__setattr__(self, "steps", check_count(self.steps, "steps", 1))
        object.__setattr__(self, "batch", check_count(self.batch, "batch", 2))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        check_share(self.warmup, "warmup")
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0 .. steps-1."""
        if self.milestones:
            return self.lr * 0.1 ** sum(step >= m for m in self.milestones)
        done = (step + 0.5) / self.steps
        if done < self.warmup:
            return self.lr * (done / self.warmup)
        return self.lr * ((1 - done) / (1 - self.warmup))

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """The optimizer of all parameters; the strengths of injected noise (weights.alphas) do not decay."""
        free = alphas(model)
        decayed = [p for p in model.parameters() if not any(p is other for other in free)]
        groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}] if free else decayed
        return torch.optim.SGD(groups, self.lr, self.momentum, weight_decay=self.weight_decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)

    def batches(self, n: int, seed: int, engine: Engine, start: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, indices) for the steps start .. steps-1: every epoch a fresh order of 0 .. n-1, the ragged last batch
        dropped. The order of an epoch depends on the seed and the epoch alone, so a resumed run sees the same batches.
        """
        batch = min(self.batch, n)
        each = n // batch
        order, of_epoch = None, None
        for step in range(start, self.steps):
            epoch, place = divmod(step, each)
            if epoch != of_epoch:
                generator = engine.generator(seed, "order", epoch)
                order, of_epoch = torch.randperm(n, generator=generator, device=generator.device), epoch
            yield step, order[place * batch : (place + 1) * batch]
