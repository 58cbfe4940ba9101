"""Objectives, the losses that a learner minimises: cross-entropy on perturbed images, TRADES, MART, RSR, mixup, CutMix
and AugMix.

Every objective is called as objective(model, x, y, perturbation, generator) -> loss, a scalar with its graph on the
weights. It calls the perturbation, which sees the model in eval mode, and makes the train-mode passes itself.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.images.pixels import check_count, check_name, check_nonnegative, drawn_seed, seeded, settle, through_levels
from semkit.nets.engine import predict, training_logits
from semkit.nets.weights import lasso
from semkit.training.bullettrain import BulletTrain, Mining
from semkit.training.perturb import Perturbation

MIXTURES = {"mixup": "MixUp", "cutmix": "CutMix"}  # our name -> torchvision's


class Objective(Protocol):
    """A loss over a batch. passes: train-mode passes per image; the perturbation counts its passes itself."""

    passes: int

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor: ...


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """[N]: KL(softmax(logits) || softmax(others)) in nats, of logits [N,classes]; gradients flow into both."""
    return F.kl_div(others.log_softmax(1), logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def answers(model: nn.Module, a: Tensor, y: Tensor, perturbation: Perturbation) -> Tensor:
    """Train-mode logits [N,classes] at the perturbed images a; perturbation.learn gets them (BulletTrain)."""
    logits = training_logits(model, a)
    perturbation.learn(logits.detach(), y)
    return logits


@dataclass(frozen=True)
class Plain:
    """Mean CE(f(a), y), a = perturbation(x): ERM with Clean(), adversarial training (Madry et al.) with PGD.

    >>> sk.LearnRecipe(sk.PGD(4)).objective
    Plain()
    """

    passes = 1

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor:
        return F.cross_entropy(answers(model, perturbation(model, x, y, generator), y, perturbation), y)


class TwoBatches:
    """Base of TRADES, MART and RSR: clean and perturbed images as two train-mode batches, and one weight.

        loss(f(x), f(a), y),   a = perturbation(x)

    Each batch has its own batch statistics. Raises ValueError for a weight that is negative or infinite.
    """

    passes = 2

    def __post_init__(self):
        settle(self, **dict.fromkeys(vars(self), check_nonnegative))

    def target(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Class probabilities [N,classes] that the perturbation moves away from; None for the labels."""
        return None

    def loss(self, clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        """Mean loss over the batch, from train-mode logits [N,classes] of both and labels y [N]."""
        raise NotImplementedError

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor:
        a = perturbation(model, x, y, generator, target=self.target(model, x))
        return self.loss(training_logits(model, x), answers(model, a, y, perturbation), y)


@dataclass(frozen=True)
class Trades(TwoBatches):
    """Accuracy on clean images plus the same prediction at the perturbed image where it changes most.

        mean CE(f(x), y) + beta KL(f(x) || f(a)),   a = perturbation climbing KL(f(x) || f(.)), not CE(f(.), y)

    Two train-mode passes per image and one forward pass in eval mode, for the prediction at x.
    Source: Zhang et al., ICML 2019.

    >>> Trades(), Trades().passes
    (Trades(beta=6.0), 2)
    """

    beta: float = 6

    def target(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's own predictions at x."""
        return predict(model, x).softmax(1)

    def loss(self, clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(clean, y) + self.beta * divergence(clean, attacked).mean()


@dataclass(frozen=True)
class Mart(TwoBatches):
    """Adversarial training that weights images by how wrong the net is on them without perturbation.

        mean -log q_y - log(1 - max over k != y of q_k) + beta (1 - p_y) KL(p || q)

    p = softmax(f(x)), q = softmax(f(a)), a = perturbation(x). Two train-mode passes per image.
    Source: Wang et al., ICLR 2020.

    >>> sk.LearnRecipe(sk.PGD(8), objective=Mart()).cost(1000).training  # two passes an image
    10240000
    """

    beta: float = 5

    def loss(self, clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        own = F.one_hot(y, attacked.shape[1]).bool()
        rival = attacked.softmax(1).masked_fill(own, 0).amax(1)
        # log(1 - q) of a q that rounds to 1 would be minus infinity.
        margin = F.cross_entropy(attacked, y, reduction="none") - (1 - rival).clamp(min=1e-6).log()
        wrong = 1 - clean.softmax(1)[own]
        return (margin + self.beta * wrong * divergence(clean, attacked)).mean()


@dataclass(frozen=True)
class Rsr(TwoBatches):
    """Robust sparse regularisation: half clean, half perturbed images, and a lasso that makes weights prunable.

        1/2 mean CE(f(x), y) + 1/2 mean CE(f(a), y) + lam sum |W|,   a = perturbation(x)

    W: the weights of convolutions and linear layers, without injected noise (weights.layer_weights). RSR as published
    uses a net with injected noise ("...+injected"); with lam 0 and a plain net this is the PGD training that RSR is
    compared with. Two train-mode passes per image. Source: Rakin et al., 2019.
    """

    lam: float = 3e-4  # the best of three at a lesson's budget: results/rsr

    def loss(self, clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(clean, y) + F.cross_entropy(attacked, y)) / 2

    def __call__(self, model: nn.Module, *given) -> Tensor:
        return super().__call__(model, *given) + (self.lam * lasso(model) if self.lam else 0)


@dataclass(frozen=True)
class Mixed:
    """Cross-entropy on mixtures of two images of the batch against both their labels, by torchvision.

        mean CE(f(a), q),  q = l onehot(y) + (1 - l) onehot(y'),  a = perturbation(z), an ascent climbs CE(f(.), q)
        mixup:  z = l x + (1 - l) x'
        cutmix: z = x with a box of x' in it that covers 1 - l of the pixels; a box cut by the border changes l

    x', y': the image before x in the (shuffled) batch. One l ~ Beta(alpha, alpha) and one box for the batch, as
    published. classes: the number of classes.
    Raises ValueError for another mixture, alpha <= 0, and BulletTrain as perturbation.
    Sources: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """

    by: str
    classes: int
    alpha: float = 1.0
    passes = 1

    def __post_init__(self):
        check_name(self.by, tuple(MIXTURES), "mixture")
        settle(self, classes=partial(check_count, least=1))
        object.__setattr__(self, "alpha", float(self.alpha))
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number above 0, got {self.alpha:g}")

    def mixture(self, x: Tensor, y: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """(z, q): x [N,C,H,W], y [N] -> z like x, q [N,classes] of x's dtype, every row with sum 1."""
        from torchvision.transforms import v2  # takes two seconds to import

        mix = getattr(v2, MIXTURES[self.by])(alpha=self.alpha)
        with seeded(drawn_seed(generator)):
            return mix(x, F.one_hot(y, self.classes).to(x.dtype))

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor:
        if isinstance(perturbation, BulletTrain):
            raise ValueError("BulletTrain sorts images by their label, and a mixture has two: take PGD")
        z, q = self.mixture(x, y, generator)
        a = perturbation(model, z, q.argmax(1), generator, target=q)
        return F.cross_entropy(training_logits(model, a), q)


def mixed(x: Tensor, severity: int = 3, generator: Generator | None = None) -> Tensor:
    """AugMix of every image of x [N,C,H,W] in [0,1], by torchvision, in 8-bit levels on the CPU.

    all_ops=False leaves out brightness, contrast, colour and sharpness, because corrupted test images have them.
    torchvision draws from torch's global generator, which is seeded from `generator` for this call and then restored.
    """
    from torchvision.transforms import v2  # takes two seconds to import

    augmix = v2.AugMix(severity=severity, all_ops=False)
    with seeded(drawn_seed(generator)):
        return through_levels(x, lambda levels: torch.stack([augmix(image) for image in levels]))


def disagreement(*answers: Tensor) -> Tensor:
    """Jensen-Shannon divergence of several logits [N,classes], in nats: [N], from 0 to log(number of logits)."""
    logs = torch.stack([logits.log_softmax(1) for logits in answers])
    middle = logs.logsumexp(0) - math.log(len(logs))
    return (logs.exp() * (logs - middle)).sum(2).mean(0)


@dataclass(frozen=True)
class AugMix:
    """Cross-entropy on the images plus consistency with two AugMix versions of each.

        mean CE(f(a), y) + weight * JS(f(a), f(mixed(a)), f(mixed(a))),   a = perturbation(x), with Clean() x itself

    The images and their versions are one train-mode batch: three passes per image.
    mining: the form of BulletTrain. A forward pass in eval mode sorts the images; only boundary images get AugMix
    versions, the others one pass and no consistency term. For the moving average an image with versions counts by the
    share of them that is classified correctly, one without versions as it was sorted.
    Raises ValueError for a negative weight or a severity outside 1 to 10.
    Sources: Hendrycks et al., ICLR 2020; Hua et al., NeurIPS 2021, as this kit reads its text on AugMix.

    >>> sk.LearnRecipe(objective=AugMix()).cost(1000).training  # three passes an image
    15360000
    """

    weight: float = 12
    severity: int = 3
    mining: Mining | None = None
    passes = 3

    def __post_init__(self):
        settle(self, weight=check_nonnegative, severity=partial(check_count, least=1, most=10))

    def _chosen(self, model: nn.Module, a: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """The indices of the images that get AugMix versions, and how many of the others are robust."""
        if self.mining is None:
            return torch.arange(len(y), device=y.device), 0
        _, boundary, robust = self.mining.sort(predict(model, a).softmax(1), y)
        return boundary, len(robust)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor:
        a = perturbation(model, x, y, generator)
        chosen, robust = self._chosen(model, a, y)
        mixtures = [mixed(a[chosen], self.severity, generator) for _ in range(2)] if len(chosen) else []
        answers = training_logits(model, torch.cat([a, *mixtures]))
        clean, rest = answers[: len(y)], answers[len(y) :]
        perturbation.learn(clean.detach(), y)
        if self.mining:
            stood = (rest.argmax(1) == y[chosen].repeat(len(mixtures))).sum().item() if mixtures else 0
            self.mining.learn(robust + stood / 2, len(y))
        loss = F.cross_entropy(clean, y)
        if mixtures:
            loss = loss + self.weight * disagreement(clean[chosen], *rest.chunk(2)).sum() / len(y)
        return loss
