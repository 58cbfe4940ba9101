"""BulletTrain: steps go where they matter. Images at the net's boundary get many, sure ones few, lost ones none."""

import contextlib
import contextvars
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from semkit.images.pixels import check_share
from semkit.nets.engine import predict
from semkit.training.perturb import PGD, Clean, Perturbation

KINDS = ("outlier", "boundary", "robust")


@dataclass
class Mined:
    """What mining knows of a run so far: the average that sets the threshold, how the last batch was sorted, and how
    all were: images of each of KINDS. All of it goes into a saved state.
    """

    average: float = 0.0
    last: tuple[int, ...] = (0, 0, 0)
    all: tuple[int, ...] = (0, 0, 0)

    @staticmethod
    def _shares(counts: tuple[int, ...]) -> dict[str, float]:
        return {kind: count / sum(counts) for kind, count in zip(KINDS, counts, strict=True)} if sum(counts) else {}

    @property
    def now(self) -> dict[str, float]:
        """The share of the last batch that was of each kind; nothing before the first batch."""
        return self._shares(self.last)

    @property
    def shares(self) -> dict[str, float]:
        """The share of all images sorted so far that was of each kind; nothing before the first batch."""
        return self._shares(self.all)


_mined: contextvars.ContextVar[Mined | None] = contextvars.ContextVar("mined", default=None)


@contextlib.contextmanager
def mining(mined: Mined | None = None):
    """A Mined (a new one, or the one given) that mining in this thread goes on from inside the with-block.

    Outside of any block every batch is the first one: a perturbation is a frozen recipe and remembers nothing.
    """
    mined = mined or Mined()
    token = _mined.set(mined)
    try:
        yield mined
    finally:
        _mined.reset(token)


def spread(p: Tensor, y: Tensor) -> Tensor:
    """v [N]: std over the classes of p [N,classes], positive where the likeliest class is y [N], else negative."""
    return torch.where(p.argmax(1) == y, 1.0, -1.0).to(p) * p.std(1, correction=0)


def threshold(v: Tensor, average: float) -> Tensor:
    """max(0, quantile of the spreads v at 1 - average): above it is about the share `average` of the images."""
    return v.float().quantile(1 - average).clamp(min=0)


def groups(v: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indices of the outliers, v < 0, of the boundary images and of the robust ones, v > limit >= 0."""
    outlier, robust = v < 0, v > limit
    return tuple(mask.nonzero().flatten() for mask in (outlier, ~(outlier | robust), robust))


@dataclass(frozen=True)
class Mining:
    """Which images of a batch are worth steps, by the net's answers p at the unperturbed images.

        v = spread(p, y);  limit = max(0, quantile of v at 1 - average)
        outlier: v < 0;  boundary: 0 <= v <= limit;  robust: v > limit
        average <- memory * average + (1 - memory) * gamma * adversarial accuracy of the batch

    So about as many are called robust as lately proved to be, times gamma. Where the published text is silent, this
    kit chooses: the average starts at 0 (nothing is robust before it has proved to be); the batch's own quantile.
    Source: Hua et al., NeurIPS 2021 (BulletTrain).
    """

    gamma: float = 0.8
    memory: float = 0.9

    def __post_init__(self):
        for name in ("gamma", "memory"):
            object.__setattr__(self, name, check_share(getattr(self, name), name))

    def sort(self, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of the outliers, of the boundary images and of the robust ones; noted in the run's Mined."""
        mined, v = _mined.get() or Mined(), spread(p, y)
        found = groups(v, threshold(v, mined.average))
        mined.last = tuple(len(index) for index in found)
        mined.all = tuple(a + b for a, b in zip(mined.all, mined.last, strict=True))
        return found

    def learn(self, right: float, of: int) -> None:
        """Takes in that `right` of the batch's `of` images were answered rightly after the perturbation."""
        if mined := _mined.get():
            mined.average = self.memory * mined.average + (1 - self.memory) * self.gamma * right / of


@dataclass(frozen=True)
class BulletTrain(Perturbation):
    """PGD whose steps depend on the image: `boundary` at boundary images, `robust` (few, large steps) at robust ones,
    `outlier` at those that are wrong without it: Clean(), no step, as published.

    One forward pass in eval mode sorts a batch (none where the answers come as `target`); how many stand it is told by
    the training step that follows, through `learn`: this kit's choice of where adversarial accuracy comes from. Groups
    are gathered into batches of their own, so that what is spared is not computed.
    Raises ValueError for more than one radius. Source: Hua et al., NeurIPS 2021.
    """

    boundary: PGD = PGD(8, 10, 2)
    robust: PGD = PGD(8, 2, 6)
    outlier: PGD | Clean = Clean()
    mining: Mining = Mining()
    whole_batch = True

    def __post_init__(self):
        radii = {p.radius for p in (self.boundary, self.robust, self.outlier) if p.radius}
        if len(radii) > 1:
            raise ValueError(f"one radius for all, not {' and '.join(f'{r:g}' for r in sorted(radii))}")

    @property
    def radius(self) -> float:
        return self.boundary.radius

    @property
    def passes(self) -> int:
        """Input gradients per image, at most: what an image costs if all are of the dearest kind."""
        return max(self.outlier.passes, self.boundary.passes, self.robust.passes)

    def scaled(self, share: float) -> "BulletTrain":
        parts = (part.scaled(share) for part in (self.boundary, self.robust, self.outlier))
        return BulletTrain(*parts, self.mining)

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Where an ascent starts, as an offset from x; which images ascend is not known yet."""
        return self.boundary.draw(x, generator)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        p = predict(model, x).softmax(1) if target is None else target
        found = self.mining.sort(p, y)
        x_adv = x.detach().clone()
        parts = (self.outlier, self.boundary, self.robust)
        for part in dict.fromkeys(parts):  # kinds that get the same steps make one batch
            chosen = torch.cat([index for other, index in zip(parts, found, strict=True) if other == part])
            if part.radius and len(chosen):
                goal = None if target is None else target[chosen]
                x_adv[chosen] = part.apply(model, x[chosen], y[chosen], drawn[chosen], goal)
        return x_adv

    def learn(self, logits: Tensor, y: Tensor) -> None:
        self.mining.learn((logits.argmax(1) == y).sum().item(), len(y))
