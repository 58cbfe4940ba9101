"""AugMix: the same answer for an image and for two random mixtures of augmentations of it."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.images.pixels import check_count, drawn_seed, seeded, to_float
from semkit.nets.engine import predict, training_logits
from semkit.training.bullettrain import Mining
from semkit.training.objectives import check_weight
from semkit.training.perturb import Perturbation


@cache
def _transform(severity: int):
    from torchvision.transforms import v2  # takes two seconds to import

    return v2.AugMix(severity=severity, all_ops=False)


def mixed(x: Tensor, severity: int = 3, generator: Generator | None = None) -> Tensor:
    """Every image of x [N,C,H,W] in [0,1] with an AugMix of its own, by torchvision, made in levels on the CPU.

    Without brightness, contrast, colour and sharpness, which corrupted test images have (all_ops=False). torchvision
    draws from torch's global generator: it is seeded from `generator` for this call, and put back.
    """
    levels = (255 * x).round().clamp(0, 255).to("cpu", torch.uint8)
    with seeded(drawn_seed(generator)):
        out = torch.stack([_transform(severity)(image) for image in levels])
    return torch.empty_like(x).copy_(to_float(out))


def disagreement(*answers: Tensor) -> Tensor:
    """[N]: the Jensen-Shannon divergence, in nats, of several answers [N,classes] as logits; 0 to log(how many)."""
    logs = torch.stack([logits.log_softmax(1) for logits in answers])
    middle = logs.logsumexp(0) - math.log(len(logs))
    return (logs.exp() * (logs - middle)).sum(2).mean(0)


@dataclass(frozen=True)
class AugMix:
    """Cross-entropy on the images, and consistency with two mixtures of augmentations of each.

        mean CE(f(a), y) + weight * JS(f(a), f(mixed(a)), f(mixed(a))),   a = perturbation(x), with Clean() x itself

    The images and their mixtures are one train-mode batch: three passes an image. mining: BulletTrain's form. Only
    boundary images get mixtures, the others one pass and no consistency; a forward pass in eval mode sorts them. What
    stands the mixtures, and so counts as robust next time, is how many of their answers are right; an image without
    mixtures counts as it was sorted. Raises ValueError for a negative weight or a severity outside 1 to 10.
    Sources: Hendrycks et al., ICLR 2020; Hua et al., NeurIPS 2021, whose text on AugMix this kit reads so.
    """

    weight: float = 12
    severity: int = 3
    mining: Mining | None = None
    passes = 3

    def __post_init__(self):
        object.__setattr__(self, "weight", check_weight(self.weight, "weight"))
        object.__setattr__(self, "severity", check_count(self.severity, "severity", 1))
        if self.severity > 10:
            raise ValueError(f"severity is 1 to 10, got {self.severity}")

    def _chosen(self, model: nn.Module, a: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """The indices of the images that get mixtures, and how many of the others count as robust."""
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
