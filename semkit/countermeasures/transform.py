"""An input transform: g(x), an adversarial example of x on a frozen external net, for a classifier that sees only g(x).

It hides the classifier's gradient instead of making it robust. So it is attacked as if it were known: backwards g
counts as the identity (BPDA), and where g draws a random start, over the mean of draws (EOT).
Sources: the transform, after "Resisting adversarial examples by adversarial examples"; BPDA and EOT, Athalye et al.,
ICML 2018. Radius, steps and direction are this kit's choice: the published ones were not available.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from semkit.images.files import shown
from semkit.nets.engine import Engine, logits, predict
from semkit.nets.models import digest, load_net
from semkit.training.perturb import PGD

BATCH = 500


@lru_cache(maxsize=4)
def _external(path: str, content: str, engine: Engine) -> nn.Module:
    if digest(path) != content:
        raise ValueError(f"{shown(path)} holds another net than when this transform was made")
    return load_net(path, engine)


@dataclass(frozen=True)
class Transform:
    """g(x): away from the class that a frozen external net sees in x, as far as a large ball allows.

        c = argmax f_a(x),   g(x) = PGD(radius, steps) of f_a from x, climbing CE(f_a(.), c)

    g depends on neither the label nor the classifier, so it is the same in training and at test. radius 51 levels (a
    fifth of the range), 13 steps of radius / 5. Without random_start g is deterministic: the same x, the same g(x).
    external: a file of models.save_net; `content` tells which net was in it. Raises ValueError where there is none.

        g = sk.transform.Transform("external.safetensors")  # made by semkit learn IMAGES --save
    """

    external: str
    radius: float = 51
    steps: int = 13
    random_start: bool = False
    content: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "external", str(self.external))
        object.__setattr__(self, "content", digest(self.external))
        object.__setattr__(self, "radius", self.pgd.radius)

    @property
    def pgd(self) -> PGD:
        """The ascent that g is."""
        return PGD(self.radius, self.steps, random_start=self.random_start)

    @property
    def passes(self) -> int:
        """Input gradients per image, of the external net."""
        return self.pgd.passes

    def net(self, engine: Engine) -> nn.Module:
        """The external net f_a on this engine."""
        return _external(self.external, self.content, engine)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        external = self.net(model.engine)
        return self.pgd(external, x, predict(external, x).argmax(1), generator)


class Behind(nn.Module):
    """f(g(x)), a classifier behind its transform; on the way back g counts as the identity.

        forward: f(g(x));   backward: d f(z) / dz at z = g(x), taken for the gradient at x (BPDA)

    So PGD on this net is BPDA, and EOT on it is BPDA+EOT if g has a random start: every pass makes a new draw, from
    `seed` on. The classifier must have been prepared by an Engine.
    """

    def __init__(self, classifier: nn.Module, transform: Transform, seed: int = 0):
        super().__init__()
        self.classifier, self.transform, self.engine = classifier, transform, classifier.engine
        self._generator = self.engine.generator(seed, "behind a transform")

    def forward(self, x: Tensor) -> Tensor:
        moved = self.transform(self.classifier, x.detach(), generator=self._generator)
        return logits(self.classifier, moved + (x - x.detach()))  # the last term is 0, and carries the gradient


def transformed(images: Tensor, transform: Transform, engine: Engine | None = None) -> Tensor:
    """g of uint8 images [N,3,H,W], rounded to 8 bits. Raises ValueError for a size that the net cannot take."""
    engine = engine or Engine()
    net, done = transform.net(engine), torch.empty_like(images)
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        try:
            moved = transform(net, engine.images(images[part]), generator=engine.generator(0, "transformed", start))
        except AssertionError:
            raise ValueError(
                f"{shown(transform.external)} takes images of another size: give both one --size"
            ) from None
        done[part] = (moved * 255).round().to(torch.uint8).to(images.device)
    return done
