"""What BulletTrain saves and what it costs in accuracy: TRADES, MART and AugMix, plain and with BulletTrain."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from semkit.analysis.canvas import Figure, draw_points, legend, new_figure, reference, styles, titled
from semkit.analysis.statistics import Rows
from semkit.images.corruptions import KINDS, corrupted
from semkit.images.imageset import ImageSet, Split
from semkit.lessons.answers import checker
from semkit.nets import models
from semkit.nets.engine import Engine, step_down
from semkit.nets.lab import Lab, as_json, as_net, kept
from semkit.training.bullettrain import KINDS as SORTED
from semkit.training.bullettrain import BulletTrain, Mined, Mining, groups, mining, spread, threshold
from semkit.training.learning import accuracy, augmented_batch, fit
from semkit.training.objectives import AugMix, Mart, Trades
from semkit.training.perturb import PGD, Clean
from semkit.training.recipes import SGD, LearnRecipe

ATTACK = PGD(8, 10, 2)
SGD_OF_ROWS = SGD(steps=232, batch=256, lr=0.2)
TESTED, CORRUPTED = 1000, 300  # test images: clean and attacked; of each corruption at each severity
FORWARD = 0.5  # of a pass, because an input gradient is a forward and a backward pass of about equal cost
ONE_STEP = PGD(8, 1, 10)
FORMS = {"plain": "plain", "bullettrain": "BulletTrain", "one step": "one step"}  # as figures name them


def recipes(sgd: SGD, model: str = "tiny") -> dict[tuple[str, str], LearnRecipe]:
    """(objective, form) -> LearnRecipe; all else is equal.

    "plain": PGD-10 of radius 8, or two mixtures of every image. "bullettrain": as published. "one step": a step of 10
    levels for outliers and robust images, in place of none and of two (fast AT, Wong et al., ICLR 2020).
    """
    base = LearnRecipe(model=model, sgd=sgd, evaluations=1)
    made, one_step = {}, BulletTrain(robust=ONE_STEP, outlier=ONE_STEP)
    for name, objective in (("trades", Trades()), ("mart", Mart())):
        made[name, "plain"] = replace(base, perturbation=ATTACK, objective=objective)
        made[name, "bullettrain"] = replace(base, perturbation=BulletTrain(), objective=objective)
        made[name, "one step"] = replace(base, perturbation=one_step, objective=objective)
    made["augmix", "plain"] = replace(base, objective=AugMix())
    made["augmix", "bullettrain"] = replace(base, objective=AugMix(mining=Mining()))
    made["cross-entropy", "plain"] = base
    return made


def under_corruptions(model: nn.Module, images: ImageSet) -> float:
    """Mean accuracy over fifteen corruptions of the images at severities 1 to 5."""
    every = itertools.product(KINDS, range(1, 6))
    found = [accuracy(model, corrupted(images, kind, severity)) for kind, severity in every]
    return sum(found) / len(found)


def _trained(split: Split, recipe: LearnRecipe, seed: int, lab: Lab) -> tuple[dict, nn.Module]:
    """(row without objective, form and seed; trained net), both kept in lab.cache."""

    def make(_) -> tuple[dict, nn.Module]:
        test, attacked = split.test.limit(TESTED), recipe.perturbation != Clean()
        done = fit(split.train, test, recipe, seed=seed, lab=lab)
        return {
            "clean": done.last, "attacked": accuracy(done.model, test, ATTACK) if attacked else None,
            "corrupted": None if attacked else under_corruptions(done.model, split.test.limit(CORRUPTED)),
            "passes": done.passes.total, "forward": done.passes.forward - len(test), "average": done.mined.average,
            **{kind: done.mined.shares.get(kind) for kind in SORTED},
        }, done.model  # fmt: skip

    parts = (split.train.fingerprint, split.test.fingerprint, recipe, seed)
    return kept(lab, "spared", parts, make, as_json(), as_net(recipe, split.train, lab.engine))


def training_rows(
    split: Split, *, seeds: Sequence[int] = (0, 1, 2), sgd: SGD = SGD_OF_ROWS, lab: Lab | None = None
) -> pd.DataFrame:
    """Rows of objective x form x seed, each kept with its net in lab.cache.

    clean, attacked: accuracy on test images without and with ATTACK. corrupted: mean accuracy over corruptions, for
    learners without PGD. passes: forward and backward. forward: forward only, without the final test. outlier,
    boundary, robust: shares of all images over the training. nan where a form has no such number.
    """
    lab, rows = lab or Lab(), []
    for ((objective, form), recipe), seed in itertools.product(recipes(sgd).items(), seeds):
        made, _ = _trained(split, recipe, seed, lab.doing(f"{objective}, {form}, seed {seed}"))
        rows.append({"objective": objective, "form": form, "seed": seed, **made})
    return pd.DataFrame(rows).astype(dict.fromkeys(("attacked", "corrupted", *SORTED), float))


def _seconds(train: ImageSet, recipe: LearnRecipe, state: dict, average: float, steps: int, engine: Engine) -> float:
    """Wall-clock seconds per step: the mean of `steps` steps of the recipe on a net with these weights."""
    net = models.build(recipe.model, len(train.classes))
    net.load_state_dict(state)
    net = engine.prepare(net)
    optimizer = recipe.sgd.optimizer(net)
    recipe.sgd.set_rate(optimizer, recipe.sgd.steps - 1)  # the last and lowest rate, so that the net hardly changes
    batches = itertools.islice(recipe.sgd.batches(len(train), 0, engine), steps)
    with mining(Mined(average)):
        began = time.perf_counter()
        for step, index in batches:
            x, y = augmented_batch(train, index, recipe.augment, engine, generator := engine.generator(0, step))
            step_down(optimizer, partial(recipe.objective, net, x, y, recipe.perturbation, generator))
        return (time.perf_counter() - began) / steps


def seconds_rows(
    split: Split,
    *,
    objectives: Sequence[str] = ("trades", "mart", "augmix"),
    sgd: SGD = SGD_OF_ROWS,
    rounds: int = 5,
    steps: int = 3,
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of wall-clock seconds per step: the forms of an objective in turn, `rounds` times, after a warm-up round.

    All forms continue from the final "bullettrain" net of training_rows with seed 0, because at the end of training the
    fewest images are outliers and the most need steps, so savings are not exaggerated. It is trained if not kept.
    """
    lab, rows, every = lab or Lab(), [], recipes(sgd)
    for objective in objectives:
        row, net = _trained(split, every[objective, "bullettrain"], 0, lab)
        mine = {form: recipe for (of, form), recipe in every.items() if of == objective}
        for turn, (form, recipe) in itertools.product(range(-1, rounds), mine.items()):
            seconds = _seconds(split.train, recipe, net.state_dict(), row["average"], steps, lab.engine)
            if turn >= 0:
                rows.append({
                    "objective": objective, "form": form, "threads": torch.get_num_threads(), "round": turn,
                    "seconds": seconds,
                })  # fmt: skip
    return pd.DataFrame(rows)


def cost(rows: pd.DataFrame) -> pd.Series:
    """Passes of each row; a forward pass alone counts as FORWARD."""
    return rows["passes"] + FORWARD * rows["forward"]


def _both(rows: Rows, objective: str, form: str, by: str, values: Callable) -> tuple[pd.Series, pd.Series]:
    """values(rows) of an objective's plain form and of this form, by seed or round, where both exist."""
    mine = pd.DataFrame(rows).query("objective == @objective")
    found = mine.assign(value=values).pivot(index=by, columns="form", values="value")
    found = found.reindex(columns=["plain", form]).dropna()
    return found["plain"], found[form]


def fewer(rows: Rows, objective: str, form: str = "bullettrain") -> pd.Series:
    """By seed: passes of the plain form / passes of this form."""
    plain, mine = _both(rows, objective, form, "seed", cost)
    return plain / mine


def lost(rows: Rows, objective: str, column: str, form: str = "bullettrain") -> pd.Series:
    """By seed: the points of accuracy (`column`) that this form loses against the plain one.

    >>> forms = {"plain": 0.50, "bullettrain": 0.48}
    >>> rows = [{"objective": "trades", "form": form, "seed": 0, "attacked": a} for form, a in forms.items()]
    >>> lost(rows, "trades", "attacked").round(1).tolist()
    [2.0]
    """
    plain, mine = _both(rows, objective, form, "seed", itemgetter(column))
    return 100 * (plain - mine)


def faster(rows: Rows, objective: str, form: str = "bullettrain", *, threads: int = 1) -> pd.Series:
    """By round: seconds of a step of the plain form / seconds of a step of this form."""
    rows = pd.DataFrame(rows).query("threads == @threads")
    plain, mine = _both(rows, objective, form, "round", itemgetter("seconds"))
    return plain / mine


def spreads_figure(v: torch.Tensor, limit: float, *, title: str) -> Figure:
    """Histogram of the signed spreads v [N] of a net's answers by kind: outlier, boundary, robust (above the limit).

    Bins are 0.015 wide, with an edge at 0; kinds that share the bin of the limit are stacked.
    """
    figure = new_figure(8, 3.4)
    axes, looks, found = figure.subplots(), styles(SORTED), groups(v, limit)
    places = np.arange(math.floor(min(-0.3, v.min()) / 0.015), math.ceil(max(0.3, v.max()) / 0.015) + 1)
    named = [f"{kind}: {100 * len(index) / len(v):.0f} %" for kind, index in zip(SORTED, found, strict=True)]
    colours = [look["color"] for look in looks.values()]
    axes.hist([v[index].tolist() for index in found], 0.015 * places, stacked=True, color=colours, label=named)
    reference(axes.axvline, limit, "limit")
    axes.set(xlabel="signed spread of the answers (right > 0 > wrong)", ylabel="images")
    legend(axes)
    return titled(figure, title)


def forms_figure(rows: Rows, *, title: str) -> Figure:
    """Rows of training_rows: accuracy of each form of TRADES and MART, with 95 % intervals over seeds.

    Left on clean images, right on attacked ones; below each form its passes, the mean over both objectives.

        sk.savings.forms_figure(sk.read_rows("../results/bullettrain/rows.csv"), title="With BulletTrain")
    """
    rows = pd.DataFrame(rows).dropna(subset="attacked")
    rows = rows.assign(clean=100 * rows["clean"], attacked=100 * rows["attacked"])
    rows["objective"] = rows["objective"].str.upper()
    passes = cost(rows).groupby(rows["form"]).mean() / 1000
    figure = new_figure(9.5, 3.6)
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("clean", "attacked"), strict=True):
        draw_points(axes, rows, "form", column, by="objective", joined=True, order=list(FORMS))
        axes.set_xticks(range(len(FORMS)), [f"{name}\n{passes[form]:.0f} k passes" for form, name in FORMS.items()])
        axes.set(xlabel=None, ylabel="accuracy (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.get_legend().remove()
    legend(panels[-1])
    return titled(figure, title, panels, ["clean images", "under PGD-10"])


@checker(
    "p.argmax(1) == y says which images are labelled rightly; v is negative for all the others.",
    "The limit is v.quantile(1 - average) over all images, but not below 0: clamp(min=0).",
    "Nested torch.where: 0 where v < 0, else 2 where v > limit, else 1.",
)
def check_kinds(kinds: Callable) -> str:
    """Whether kinds(p, y, average) is BulletTrain's kind of each image: 0 outlier, 1 boundary, 2 robust.

        v = std of p over the classes, negative where the likeliest class is not y
        0 where v < 0, 2 where v > max(0, quantile of v at 1 - average), 1 elsewhere

    p [N,classes], y [N] -> [N] whole numbers.
    """
    generator = torch.Generator().manual_seed(3)
    p, y = torch.randn(200, 5, generator=generator).mul(2).softmax(1), torch.arange(200) % 5
    p = (p + 1.5 * F.one_hot(y, 5) * torch.rand(200, 1, generator=generator)).softmax(1)
    v = spread(p, y)
    for average in (0.2, 0.0, 0.99):
        wanted = torch.empty(200, dtype=torch.int64)
        for kind, index in enumerate(groups(v, threshold(v, average))):
            wanted[index] = kind
        mine = torch.as_tensor(kinds(p.clone(), y.clone(), average))
        assert mine.shape == y.shape, f"asked for is one kind for each of the {len(y)} images, not {list(mine.shape)}"
        assert set(mine.tolist()) <= {0, 1, 2}, "there are other kinds than 0 (outlier), 1 (boundary) and 2 (robust)"
        assert (mine[v < 0] == 0).all(), "an image whose likeliest class is not its label is an outlier, however sure"
        assert (mine[v >= 0] != 0).all(), "an image that is labelled rightly is no outlier"
        found = (mine == 2).float().mean().item()
        told = f"with an average of {average:g}, {found:.0%} of the images are robust"
        assert torch.equal(mine, wanted), f"{told}: those above the quantile of v at 1 - average, v of all images"
    return "steps go to the images that are right, but not by far"
