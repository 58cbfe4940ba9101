"""The training loop of learners: ERM, adversarial training and their variants, tested on clean images."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Generator, Tensor, nn

from semkit.images.augment import Augment
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count
from semkit.nets import models
from semkit.nets.engine import Engine, Passes, count_passes, engine_of, predict, step_down
from semkit.nets.lab import Lab, as_net, kept
from semkit.nets.weights import drawing
from semkit.training.bullettrain import Mined, mining
from semkit.training.perturb import Clean, Perturbation
from semkit.training.recipes import LearnRecipe, Pretrained


def pretrained_weights(pretrained: Pretrained, seed: int, lab: Lab) -> dict[str, Tensor]:
    """The state dict of the pretrained net of a seed, trained with the engine of the lab; kept in lab.cache."""
    images, recipe, lab = pretrained.images, pretrained.recipe, replace(lab, what=f"pretraining, seed {seed}")

    def make(state: Path | None) -> tuple[nn.Module]:
        tested = images.limit(len(images.labels.unique()))
        return (fit(images, tested, recipe, seed=seed, lab=lab).model,)

    parts = (images.fingerprint, recipe, seed)
    (model,) = kept(lab, "pretrained", parts, make, as_net(recipe, images, lab.engine))
    return model.state_dict()


@dataclass
class Learned:
    """A trained learner: test accuracy over the steps, losses, cost, and BulletTrain's state.

    curve: (step, accuracy) of every test. losses: one per step.
    """

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


def check_outputs(model: nn.Module, images: ImageSet) -> nn.Module:
    """`model` if it has an output for each class of the images; raises ValueError otherwise. Counts no pass."""
    first, _ = images.batch(slice(1))
    with count_passes(), drawing(model, Generator()):
        outputs, classes = predict(model, engine_of(model).images(first)).shape[-1], len(images.classes)
    if outputs < classes:
        raise ValueError(f"the net has {outputs} outputs, the images {classes} classes: take a net for them")
    return model


def accuracy(
    model: nn.Module, images: ImageSet, perturbation: Perturbation = Clean(), *, seed: int = 0, batch: int = 500
) -> float:
    """The share of images that the model, in eval mode, classifies correctly after `perturbation`.

    Clean() gives clean accuracy, PGD(r) robust accuracy at radius r. Raises ValueError for no images, and for a net
    with fewer outputs than the images have classes.

        sk.accuracy(learned.model, split.test, sk.PGD(4))
    """
    if not len(images):
        raise ValueError("accuracy needs an image or more, got none")
    engine, batch = engine_of(check_outputs(model, images)), check_count(batch, "batch", 1)
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


def _begun(train: ImageSet, recipe: LearnRecipe, seed: int, own: int, lab: Lab) -> nn.Module:
    """The net before its first step: fresh weights of the seed `own`, or the pretrained ones of `seed`."""
    model = models.fresh(recipe, train, own)
    if recipe.pretrained:
        model.to(lab.engine.dtype).load_state_dict(pretrained_weights(recipe.pretrained, seed, lab))
        if recipe.pretrained.last_layer:
            models.freeze_but_last(model)
    return model


def augmented_batch(
    images: ImageSet, index: Tensor, augment: Augment, engine: Engine, generator: Generator
) -> tuple[Tensor, Tensor]:
    """(x, y) of a step: the augmented images [N,C,H,W] in [0,1] at index, and their labels [N]."""
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
    """Train a learner on `train` and test it on the clean images of `test`.

        one step of SGD on objective(f, t(x), y, perturbation);  by default on CE(f(perturbation(t(x))), y)

    The perturbation sees the model in eval mode, the step in train mode; AT trains on perturbed images only.
    lab.on_step is called after every step with metrics "loss", "accuracy" (at the last test) and "passes" so far; with
    BulletTrain also with the shares of outlier, boundary and robust images in the batch.
    start: a net to train further, in place, a pruned one for example.
    Raises Interrupted when lab.on_step asks to stop, and ValueError for fewer than 2 training images, for test images
    of other classes or another size, and for a training that diverges.

        learned = sk.fit(split.train, split.test, sk.learn_recipe("demo", perturbation_radius=4))
    """
    lab = (lab or Lab()).doing("training")
    engine, sgd = lab.engine, recipe.sgd
    train, test = train.to(engine.device), recipe.tested(test).to(engine.device)
    wanted = (train.classes, *map(recipe.augment.output_size, train.images.shape[2:]))
    if wanted != (given := (test.classes, *test.images.shape[2:])):
        raise ValueError(f"test images must have the classes and size of the training images, {wanted}, got {given}")
    # A learner draws from another stream of the seed than the surrogate: other first weights, another order of images.
    own = engine.generator(seed, "learner").initial_seed()
    model = check_outputs(engine.prepare(start or _begun(train, recipe, seed, own, lab)), test)
    optimizer, curve, losses = sgd.optimizer(model), [], []
    every, began = math.ceil(sgd.steps / recipe.evaluations), time.monotonic()
    with count_passes() as passes, mining() as mined:
        for step, index in sgd.batches(len(train), own, engine):
            generator = engine.generator(own, "learn", step)
            x, y = augmented_batch(train, index, recipe.augment, engine, generator)
            sgd.set_rate(optimizer, step)
            loss = partial(recipe.objective, model, x, y, recipe.perturbation.at(step / sgd.steps), generator)
            losses.append(step_down(optimizer, loss))
            if (step + 1) % every == 0 or step + 1 == sgd.steps:
                curve.append((step + 1, accuracy(model, test)))
            metrics = {"loss": losses[-1], "accuracy": curve[-1][1] if curve else None, "passes": passes.total}
            lab.report(step + 1, sgd.steps, metrics | mined.now)
    return Learned(model, tuple(curve), losses, passes, time.monotonic() - began, mined)
