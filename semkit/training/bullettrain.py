"""BulletTrain: PGD with many steps for images near the decision boundary, few for robust ones, none for outliers."""

import contextvars
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from semkit.images.pixels import check_share, settle
from semkit.nets.engine import predict, within
from semkit.training.perturb import PGD, Clean, Perturbation

KINDS = ("outlier", "boundary", "robust")


@dataclass
class Mined:
    """The state of mining in a run; it is saved with the run.

    average: moving average of the adversarial accuracy, which sets the threshold. counts: of every batch so far, the
    numbers of images of each of KINDS.

    >>> Mined(counts=[(1, 0, 1), (0, 2, 0)]).shares
    {'outlier': 0.25, 'boundary': 0.5, 'robust': 0.25}
    """

    average: float = 0.0
    counts: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def last(self) -> tuple[int, ...]:
        """The numbers of images of each kind in the last batch."""
        return self.counts[-1]

    @property
    def now(self) -> dict[str, float]:
        """The share of each kind in the last batch; empty before the first batch."""
        return _shares(self.counts[-1:])

    @property
    def shares(self) -> dict[str, float]:
        """The share of each kind in all batches so far; empty before the first batch."""
        return _shares(self.counts)


def _shares(counts: list[tuple[int, ...]]) -> dict[str, float]:
    totals = [sum(of_kind) for of_kind in zip(*counts, strict=True)]
    return {kind: total / sum(totals) for kind, total in zip(KINDS, totals, strict=True)} if sum(totals) else {}


_mined: contextvars.ContextVar[Mined | None] = contextvars.ContextVar("mined", default=None)


def mining(mined: Mined | None = None):
    """Inside a with-block, mining in this thread reads and updates `mined`, by default a new Mined.

    Outside of a block every batch counts as the first one, because a perturbation is a frozen recipe without memory.

    >>> with mining(Mined(average=0.5)) as mined:
    ...     print(mined.average)
    0.5
    """
    return within(_mined, mined or Mined())


def spread(p: Tensor, y: Tensor) -> Tensor:
    """Signed spread of predictions p [N,classes]: std over the classes, negative where the top class is not y. [N].

    >>> spread(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    tensor([ 0.2500, -0.2500])
    """
    return torch.where(p.argmax(1) == y, 1.0, -1.0).to(p) * p.std(1, correction=0)


def threshold(v: Tensor, average: float) -> Tensor:
    """max(0, quantile of v at 1 - average), so that about the share `average` of the images lies above it.

    >>> threshold(torch.tensor([-0.5, 0.0, 0.5]), 0.25)
    tensor(0.2500)
    """
    return v.float().quantile(1 - average).clamp(min=0)


def groups(v: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of outliers (v < 0), boundary images (0 <= v <= limit) and robust images (v > limit).

    >>> groups(torch.tensor([-0.1, 0.1, 0.4]), 0.25)
    (tensor([0]), tensor([1]), tensor([2]))
    """
    outlier, robust = v < 0, v > limit
    return tuple(mask.nonzero().flatten() for mask in (outlier, ~(outlier | robust), robust))


@dataclass(frozen=True)
class Mining:
    """Sort the images of a batch by the net's predictions p at the unperturbed images.

        v = spread(p, y);  limit = max(0, quantile of v at 1 - average)
        outlier: v < 0;  boundary: 0 <= v <= limit;  robust: v > limit
        average <- memory * average + (1 - memory) * gamma * adversarial accuracy of the batch

    So the share called robust is gamma times the adversarial accuracy of recent batches. Two choices are this kit's,
    because the publication names none: the average starts at 0, and the quantile is that of the batch.
    Source: Hua et al., NeurIPS 2021 (BulletTrain).
    """

    gamma: float = 0.8
    memory: float = 0.9

    def __post_init__(self):
        settle(self, gamma=check_share, memory=check_share)

    def sort(self, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of outliers, boundary images and robust images; their numbers go to the run's Mined."""
        mined, v = _mined.get() or Mined(), spread(p, y)
        found = groups(v, threshold(v, mined.average))
        mined.counts.append(tuple(len(index) for index in found))
        return found

    def learn(self, right: float, of: int) -> None:
        """Update the average: `right` of the `of` images of a batch were classified correctly after perturbation."""
        if mined := _mined.get():
            mined.average = self.memory * mined.average + (1 - self.memory) * self.gamma * right / of


@dataclass(frozen=True)
class BulletTrain(Perturbation):
    """PGD with steps by kind of image: `boundary` for boundary images, `robust` (few, large steps) for robust ones,
    `outlier` for images that are wrong without perturbation (Clean(): no step, as published).

    One forward pass in eval mode sorts a batch, unless `target` has the predictions. The adversarial accuracy is taken
    in the training step that follows (`learn`), which is this kit's choice. Each kind of image is perturbed as a
    separate batch, so that spared steps are not computed.
    Raises ValueError for more than one radius. Source: Hua et al., NeurIPS 2021.

    >>> BulletTrain().radius, BulletTrain().passes
    (8.0, 10)
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
        """Input gradients per image at most: the number for the kind of image with the most steps."""
        return max(self.outlier.passes, self.boundary.passes, self.robust.passes)

    def scaled(self, share: float) -> "BulletTrain":
        parts = (part.scaled(share) for part in (self.boundary, self.robust, self.outlier))
        return BulletTrain(*parts, self.mining)

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """The start of the ascent as an offset from x, for every image, because the kinds are not known yet."""
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
