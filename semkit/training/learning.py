"""The training loop of learners: ERM, adversarial training and their variants, tested on clean images."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Generator, Tensor, nn

from semkit.images.augment import Augment, FlipCrop
from semkit.images.imageset import ImageSet
from semkit.images.loading import resized
from semkit.images.pixels import check_count
from semkit.nets import models
from semkit.nets.engine import Engine, Passes, count_passes, engine_of, predict, step_down
from semkit.nets.lab import Lab, as_net, kept
from semkit.nets.weights import drawing
from semkit.training.bullettrain import Mined, mining
from semkit.training.objectives import Objective, Plain
from semkit.training.perturb import Clean, Perturbation
from semkit.training.schedule import SGD


@dataclass(frozen=True)
class LearnRecipe:
    """How a learner is trained; the defaults are SEM's and REM's released protocol for ERM.

    perturbation: Clean() is empirical risk minimisation (ERM), PGD(r) adversarial training (AT) at radius r.
    objective: the loss; Plain() is the cross-entropy on the perturbed images, Trades() and Mart() use clean ones too.
    evaluations: how often the test accuracy is taken, evenly spread and at the end.
    pretrained: a net to start from, None for fresh weights.

    >>> sk.LearnRecipe(sk.PGD(4), model="tiny", sgd=sk.SGD(steps=100, batch=50)).cost(1000).total
    55000
    """

    perturbation: Perturbation = Clean()
    model: str = "resnet18"
    sgd: SGD = SGD(steps=40_000, batch=128, milestones=(16_000, 32_000))
    augment: Augment = FlipCrop()
    evaluations: int = 20
    objective: Objective = Plain()
    pretrained: "Pretrained | None" = None

    at_once = 0  # samples of an image in one pass: its input gradients are plain ones

    @property
    def net(self) -> str:
        return self.model

    def __post_init__(self):
        check_count(self.evaluations, "evaluations", 1)

    def cost(self, n: int) -> Passes:
        """The passes that training on n images takes."""
        visits = self.sgd.steps * min(self.sgd.batch, n)
        return Passes(visits * self.perturbation.passes, visits * self.objective.passes)

    def tested(self, images: ImageSet) -> ImageSet:
        """Test images at the size that the augmented ones have: larger ones are cropped, smaller ones resized."""
        have = images.images.shape[-1]
        side = self.augment.output_size(have)
        if side == have:
            return images
        return images.centre(side) if side < have else resized(images, side)

    def further(self, model: nn.Module, test: ImageSet, seed: int) -> dict:
        """Further numbers for the row of this learner: its perturbation's, and the seed of its pretrained net."""
        numbers = self.perturbation.further(model, self.tested(test))
        return {"pretrained_seed": seed, **numbers} if self.pretrained else numbers


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A net to start from: a learner trained by `recipe` on `images`, with the seed and the engine of the learner that
    goes on from it.

    So every seed has a pretrained net of its own. It is trained once, when it is first needed, and kept as long as
    `images` live, and in lab.cache. last_layer: only the last layer is trained further (linear probe).
    """

    images: ImageSet
    recipe: LearnRecipe
    last_layer: bool = False

    def __repr__(self) -> str:
        return f"Pretrained({self.images.fingerprint[:24]}, {self.recipe}" + ", last_layer=True" * self.last_layer + ")"

    def weights(self, seed: int, lab: Lab) -> dict[str, Tensor]:
        """The state dict of the pretrained net of this seed."""
        images, recipe, lab = self.images, self.recipe, replace(lab, what=f"pretraining, seed {seed}")
        nets, which = _pretrained.setdefault(images, {}), (images.fingerprint, recipe, seed, lab.engine)

        def make(state: Path | None) -> tuple[nn.Module]:
            tested = images.limit(len(images.labels.unique()))
            return (fit(images, tested, recipe, seed=seed, lab=lab).model,)

        if which not in nets:
            (model,) = kept(lab, "pretrained", which[:3], make, as_net(recipe, images, lab.engine))
            nets[which] = model.state_dict()
        return nets[which]


_pretrained: WeakKeyDictionary[ImageSet, dict] = WeakKeyDictionary()  # state dicts by what they depend on


@dataclass
class Learned:
    """A trained learner: its test accuracy over the steps, its cost, and what BulletTrain has learned."""

    model: nn.Module
    curve: tuple[tuple[int, float], ...]
    losses: list[float]
    passes: Passes
    seconds: float
    mined: Mined

    @property
    def last(self) -> float:
        """Test accuracy of the final model: the number that counts."""
        return self.curve[-1][1]

    @property
    def best(self) -> float:
        """The highest test accuracy on the way: what a trainer with clean validation images could keep."""
        return max(accuracy for _, accuracy in self.curve)


def accuracy(
    model: nn.Module,
    images: ImageSet,
    perturbation: Perturbation = Clean(),
    *,
    seed: int = 0,
    batch: int = 500,
) -> float:
    """The share of images that the model, in eval mode, labels rightly after `perturbation`.

    Clean() gives clean accuracy, PGD(r) robust accuracy.
    """
    engine = engine_of(model)
    images = images.to(engine.device)
    right = 0
    with drawing(model, engine.generator(seed, "accuracy, injected noise")):
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            x, y = images.batch(part)
            x = engine.images(x)
            x = perturbation(model, x, y, engine.generator(seed, "accuracy", start))
            right += (predict(model, x).argmax(1) == y).sum().item()
    return right / len(images)


def _fresh(train: ImageSet, recipe: LearnRecipe, seed: int, own: int, lab: Lab) -> nn.Module:
    """The net before its first step: fresh weights of the seed `own`, or the pretrained ones of `seed`."""
    model = models.fresh(recipe, train, own)
    if recipe.pretrained:
        model.to(lab.engine.dtype).load_state_dict(recipe.pretrained.weights(seed, lab))
        if recipe.pretrained.last_layer:
            models.freeze_but_last(model)
    return model


def _batch(
    images: ImageSet, index: Tensor, augment: Augment, engine: Engine, generator: Generator
) -> tuple[Tensor, Tensor]:
    """(x, y) of a training step: augmented images [N,C,H,W] in [0,1] and their labels [N]."""
    levels, y = images.batch(index)
    x = engine.images(levels)
    return augment.apply(x, augment.draw(len(x), x.shape[2:], generator)), y


def fit(
    train: ImageSet,
    test: ImageSet,
    recipe: LearnRecipe,
    *,
    seed: int = 0,
    lab: Lab | None = None,
    start: nn.Module | None = None,
) -> Learned:
    """Train a fresh learner on `train` and test it on the clean images of `test`.

        one step of SGD on objective(f, t(x), y, perturbation);  by default on CE(f(perturbation(t(x))), y)

    The perturbation sees the model in eval mode, the step in train mode; under AT only perturbed images are trained on.
    lab.on_step is told of every step, in metrics of the "loss", the "accuracy" last tested and the "passes" so far;
    with BulletTrain also of the shares of outlier, boundary and robust images in the batch.
    start: a net to go on with, a pruned one for example; it is trained in place.
    Raises Interrupted when lab.on_step asks to stop, and ValueError for fewer than 2 training images, of which
    batch-norm has no statistics.
    """
    if len(train) < 2:
        raise ValueError(f"a learner needs 2 training images or more, got {len(train)}")
    lab = (lab or Lab()).doing("training")
    engine, sgd = lab.engine, recipe.sgd
    train, test = train.to(engine.device), recipe.tested(test).to(engine.device)
    # Neither the surrogate's first weights nor its order of images: a learner has its own stream of the seed.
    own = engine.generator(seed, "learner").initial_seed()
    model = engine.prepare(start or _fresh(train, recipe, seed, own, lab))
    optimizer = sgd.optimizer(model)
    curve, losses = [], []
    every = math.ceil(recipe.sgd.steps / recipe.evaluations)
    began = time.monotonic()
    with count_passes() as passes, mining() as mined:
        for step, index in sgd.batches(len(train), own, engine):
            generator = engine.generator(own, "learn", step)
            x, y = _batch(train, index, recipe.augment, engine, generator)
            sgd.set_rate(optimizer, step)
            loss = partial(recipe.objective, model, x, y, recipe.perturbation.at(step / sgd.steps), generator)
            losses.append(step_down(optimizer, loss))
            if (step + 1) % every == 0 or step + 1 == recipe.sgd.steps:
                curve.append((step + 1, accuracy(model, test)))
            metrics = {"loss": losses[-1], "accuracy": curve[-1][1] if curve else None, "passes": passes.total}
            metrics |= mined.now
            lab.report(step + 1, sgd.steps, metrics)
    return Learned(model, tuple(curve), losses, passes, time.monotonic() - began, mined)
