"""Lesson 7: what noises take from trainers after each change, and the set to break, whose recipe is hidden."""

from collections.abc import Callable, Sequence
from functools import cache

import pandas as pd
import torch
from torch.nn.functional import avg_pool2d

from semkit.analysis import canvas
from semkit.analysis.figures import Figure, points_by_place
from semkit.analysis.statistics import Rows, interval, learner
from semkit.analysis.study import crafted_noise, learned_row
from semkit.analysis.survival import noise_left
from semkit.countermeasures.registry import label_of, named
from semkit.images.imageset import ImageSet, Split
from semkit.images.loading import load
from semkit.lessons.answers import check_tensor, checker
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.methods import RandomGrey
from semkit.training.recipes import lasting, learn_recipe

LEAST = 10  # points that a noise takes as it is, for shares of them to mean something
HIDDEN, CLASSES, STEPS, SEED = RandomGrey(24, block=4), 4, 200, 7  # the lesson tells the recipe at its end


def taken(rows: Rows) -> pd.DataFrame:
    """Rows of method, change, seed and points: what noises take from learners, in points of accuracy.

        points = 100 * (last on clean images - last on protected ones), after the same change and with the same seed

    rows: as of study.grid with countermeasures. change: the countermeasure, without its file; of adversarially trained
    learners "AT 4/255" and the like.

        sk.undoing.taken(sk.read_rows("results/worst-column/rows.csv"))
    """
    rows = pd.DataFrame(rows)
    trained = rows["training_radius"].map(learner)
    changes = rows["countermeasure"].str.partition("=")[0].mask(rows["training_radius"] > 0, trained)
    last = rows.assign(change=changes).pivot(index=["change", "seed"], columns="method", values="last")
    points = 100 * last.rsub(last["clean"], axis=0).drop(columns="clean")
    return points.melt(value_name="points", ignore_index=False).dropna().reset_index()


def worst(points: pd.DataFrame, method: str, changes: Sequence[str]) -> tuple[str, pd.Series]:
    """The change after which a method may take least, by the lower end of the 95 % interval, and its points by seed.

    change, points = sk.undoing.worst(sk.undoing.taken(rows), "sem", ["none", "jpeg", "AT 4/255"])
    """
    mine = points[points["method"] == method].set_index("seed").groupby("change")["points"]
    change = min(changes, key=lambda change: interval(list(mine.get_group(change)))[1])
    return change, mine.get_group(change)


def taken_figure(points: pd.DataFrame, methods: Sequence[str], changes: Sequence[str], *, title: str) -> Figure:
    """What these methods take after these changes, points with 95 % intervals over seeds, in the order given."""
    mine = pd.concat([points[points["method"] == method] for method in methods])
    mine = mine[mine["change"].isin(changes)].assign(panel=0)
    figure, (axes,), _ = points_by_place(mine, "points", "change", changes, by="panel")
    axes.set(xlabel="points of accuracy that the noise takes")
    axes.set_yticks(range(len(changes)), map(label_of, changes))
    canvas.reference(axes.axvline, 0, "nothing taken")
    canvas.legend(axes)
    return canvas.titled(figure, title)


def shares_left(points: pd.DataFrame) -> pd.Series:
    """By change and method, in %: of the points that a noise takes as it is, those that it takes after each change.

    Means over seeds, of noises that take LEAST points or more as they are; adversarially trained learners are left out.
    """
    mean = points.groupby(["change", "method"])["points"].mean().unstack()
    whole = mean.loc["none"][mean.loc["none"] >= LEAST]
    mean = mean.loc[~mean.index.str.startswith("AT ") & (mean.index != "none"), whole.index]
    return (100 * mean / whole).stack().dropna().rename("left")


def _smaller(images: ImageSet) -> ImageSet:
    """The images of the first CLASSES classes at half their size, because a learner of them takes seconds."""
    few = images.take(torch.nonzero(images.labels < CLASSES)[:, 0])
    return ImageSet(avg_pool2d(few.images.float(), 2).round().byte(), few.labels, few.classes[:CLASSES])


@cache
def _challenge() -> tuple[Split, torch.Tensor]:
    """Clean images, and the hidden noise of those to train on, int8 [N,3,16,16]."""
    whole = load("shapes")
    split = Split(_smaller(whole.train), _smaller(whole.test))
    return split, crafted_noise(split.train, HIDDEN, seed=SEED)[0].levels


def protected_set() -> ImageSet:
    """The images to break: 16 x 16 pixels, 4 classes, protected by a recipe that lesson 7 tells at its end."""
    split, noise = _challenge()
    return split.train.with_noise(noise)


def _reached(train: ImageSet) -> float:
    """What an ERM learner of these images reaches on clean test images, in %."""
    recipe = lasting(learn_recipe("demo"), STEPS)
    return 100 * learned_row(train, _challenge()[0].test, recipe, seed=SEED, lab=Lab())["last"]


@cache
def _ends() -> tuple[float, float]:
    """The accuracies between which a countermeasure ends: of clean and of protected images, in %."""
    return _reached(_challenge()[0].train), _reached(protected_set())


@checker(
    "Look first: show sk.undoing.protected_set() and the mean image of each class. What does the noise vary in?",
    "Every reply says how much of the noise is left. Try 'grayscale' and 'jpeg': which part of the image holds it?",
    "All of it is luma. Keep the colour and take the mean of R, G and B off each pixel; then add 128.",
)
def check_countermeasure(countermeasure: Callable | str) -> str:
    """Whether a countermeasure brings back half of what protected_set() lost: one learner, some 5 seconds of a core.

    countermeasure: images uint8 [N,3,H,W] -> the same shape and dtype, or a name of sk.COUNTERMEASURES that changes
    images. The first call trains learners of the clean and of the protected images too.

        sk.undoing.check_countermeasure("jpeg")  # or a function of images
    """
    (split, noise), protected = _challenge(), protected_set()
    if isinstance(countermeasure, str):
        countermeasure = named(countermeasure).fitted(protected, Engine())
    changed = countermeasure(given := protected.images.clone())
    check_tensor(changed, protected.images)
    assert torch.equal(given, protected.images), "it changes the images in place: make a new tensor"
    assert not torch.equal(changed, given), "it returns the images as they are, with all of the noise"
    assert len(changed[:, :, 1:-1, 1:-1].unique()) > 1, "all values are alike: the picture has gone with the noise"
    left = noise_left(split.train.images, noise, countermeasure)
    (clean, none), mine = _ends(), _reached(protected.changed(lambda *_: changed))
    back = 100 * (mine - none) / (clean - none)
    told = (
        f"a learner reaches {mine:.0f} % of clean test images, {none:.0f} % without your countermeasure, {clean:.0f} % "
        f"if nothing is protected, so {back:.0f} % of the loss came back; {100 * left:.0f} % of the noise is left"
    )
    assert back >= 50, f"{told}: at least half must come back"
    return told
