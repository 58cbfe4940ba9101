"""Objectives, the losses that a learner minimises: cross-entropy on perturbed images, TRADES, MART, RSR.

Every objective is called as objective(model, x, y, perturbation, generator) -> loss, a scalar with its graph on the
weights. It calls the perturbation, which sees the model in eval mode, and makes the train-mode passes itself.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.nets.engine import predict, training_logits
from semkit.nets.weights import lasso
from semkit.training.perturb import Perturbation


class Objective(Protocol):
    """A loss over a batch. passes: train-mode passes an image, without those of the perturbation."""

    passes: int

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor: ...


def check_weight(value: float, name: str) -> float:
    """value as a float if it is a finite number from 0 on; raises ValueError otherwise."""
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be a finite number from 0 on, got {value!r}")
    return float(value)


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """[N]: KL(softmax(logits) || softmax(others)) in nats, of logits [N,classes]; gradients flow into both."""
    return F.kl_div(others.log_softmax(1), logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def answers(model: nn.Module, a: Tensor, y: Tensor, perturbation: Perturbation) -> Tensor:
    """Train-mode logits [N,classes] at the perturbed images a, which the perturbation is told of (BulletTrain)."""
    logits = training_logits(model, a)
    perturbation.learn(logits.detach(), y)
    return logits


@dataclass(frozen=True)
class Plain:
    """Mean CE(f(a), y), a = perturbation(x): ERM with Clean(), adversarial training (Madry et al.) with PGD."""

    passes = 1

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, perturbation: Perturbation, generator: Generator | None = None
    ) -> Tensor:
        return F.cross_entropy(answers(model, perturbation(model, x, y, generator), y, perturbation), y)


class TwoBatches:
    """Base of the objectives below: clean and perturbed images as two train-mode batches, and one weight.

        loss(f(x), f(a), y),   a = perturbation(x)

    Each batch has its own batch statistics. Raises ValueError for a weight that is negative or infinite.
    """

    passes = 2

    def __post_init__(self):
        for name, weight in list(vars(self).items()):
            object.__setattr__(self, name, check_weight(weight, name))

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

    Two train-mode passes an image and one forward pass in eval mode, for the prediction at x.
    Source: Zhang et al., ICML 2019.
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

    p = softmax(f(x)), q = softmax(f(a)), a = perturbation(x). Two train-mode passes an image.
    Source: Wang et al., ICLR 2020.
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
    compared with. Two train-mode passes an image. Source: Rakin et al., 2019.
    """

    lam: float = 3e-4  # the best of three at a lesson's budget: results/rsr

    def loss(self, clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(clean, y) + F.cross_entropy(attacked, y)) / 2

    def __call__(self, model: nn.Module, *given) -> Tensor:
        return super().__call__(model, *given) + (self.lam * lasso(model) if self.lam else 0)
