import time
from dataclasses import dataclass
import torch
from semkit import models
from semkit.augment import Augment, FlipCrop
from semkit.engine import Engine, count_passes, predict, train_step
from semkit.perturb import Clean, Perturbation
from semkit.schedule import SGD


@dataclass(frozen=True)
class LearnRecipe:
    perturbation: Perturbation = Clean()
    model: str = "resnet18"
    sgd: SGD = SGD(steps=40000, milestones=(16000, 32000))
    augment: Augment = FlipCrop()
    evaluations: int = 10


def accuracy(model, images, labels, engine, perturbation=Clean(), batch=512):
    hits = 0
    for i in range(0, len(images), batch):
        x, y = engine.images(images[i:i+batch]), labels[i:i+batch]
        hits += (predict(model, perturbation(model, x, y)).argmax(1) == y).sum().item()
    return hits / len(images)


def fit(images, labels, test, test_labels, classes, recipe, *, seed=0, engine=Engine()):
    t0 = time.time()
    model = engine.prepare(models.build(recipe.model, classes, seed + 1000))
    opt = recipe.sgd.optimizer(model)
    curve = []
    every = max(1, recipe.sgd.steps // recipe.evaluations)
    with count_passes() as passes:
        for step, index in recipe.sgd.batches(len(images), seed, engine):
            g = engine.generator(seed, "learn", step)
            x, y = engine.images(images[index]), labels[index]
            z = recipe.augment.apply(x, recipe.augment.draw(len(x), x.shape[2:], g))
            recipe.sgd.set_rate(opt, step)
            train_step(model, opt, recipe.perturbation(model, z, y, g), y)
            if (step + 1) % every == 0 or step + 1 == recipe.sgd.steps:
                curve.append((step + 1, accuracy(model, test, test_labels, engine)))
    return curve, model, passes, time.time() - t0
