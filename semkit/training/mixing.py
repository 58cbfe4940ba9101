"""mixup and cutmix: a learner on mixtures of two images, which belong to both their classes."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.images.pixels import check_count, drawn_seed, seeded
from semkit.nets.engine import training_logits
from semkit.training.bullettrain import BulletTrain
from semkit.training.perturb import Perturbation

MIXTURES = {"mixup": "MixUp", "cutmix": "CutMix"}  # our name -> torchvision's


@dataclass(frozen=True)
class Mixed:
    """Cross-entropy on mixtures of the batch's images, to the labels of both, by torchvision.

        mean CE(f(a), q),  q = l onehot(y) + (1 - l) onehot(y'),  a = perturbation(z), an ascent climbs CE(f(.), q)
        mixup:  z = l x + (1 - l) x'
        cutmix: z = x with a box of x' in it, of 1 - l of the pixels; at the border it is cut, and l is what is left

    x', y': the image before x in the batch, which is shuffled. One l ~ Beta(alpha, alpha) a batch, as published, and
    one box. classes: how many there are.
    Raises ValueError for another mixture, alpha <= 0, and BulletTrain as perturbation.
    Sources: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """

    by: str
    classes: int
    alpha: float = 1.0
    passes = 1

    def __post_init__(self):
        if self.by not in MIXTURES:
            raise ValueError(f"images are mixed by {' or '.join(MIXTURES)}, not by {self.by!r}")
        object.__setattr__(self, "classes", check_count(self.classes, "classes", 1))
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
