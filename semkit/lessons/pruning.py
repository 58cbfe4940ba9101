"""Robust sparse regularisation: robust learners, pruned to several sparsities, tuned and evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from semkit.analysis.canvas import Figure, draw_lines, legend, new_figure, titled
from semkit.analysis.statistics import Rows
from semkit.images.imageset import Split
from semkit.lessons.answers import checker
from semkit.nets.lab import Lab, as_json, kept
from semkit.nets.models import INJECTED
from semkit.nets.weights import alphas, check_sparsity, pruned, sparsity
from semkit.training.learning import accuracy, fit
from semkit.training.objectives import Rsr
from semkit.training.perturb import EOT, PGD
from semkit.training.recipes import SGD, LearnRecipe

SPARSITIES = (0.0, 0.5, 0.7, 0.85, 0.95)
BASELINE, OURS = "PGD training", "RSR"  # as figures and tables name them


@dataclass(frozen=True)
class Cut:
    """How a trained net is pruned and evaluated.

    tune: the schedule after pruning, on the net's own objective with the masks fixed; the published one is not known,
    this one is a tenth of the training at a fifth of its rate. attack: for robust accuracy, on `attacked` test images.
    """

    tune: SGD = SGD(steps=60, batch=64, lr=0.02)
    attack: EOT = EOT(8, 10, draws=4)
    attacked: int = 500


def robust_learners(
    model: str = "tiny", radius: float = 8, lam: float = Rsr.lam, sgd: SGD = SGD(steps=600, batch=64)
) -> dict[str, LearnRecipe]:
    """{BASELINE: PGD training, OURS: RSR}, which is PGD training plus the lasso `lam` and injected noise.

    Both halve the loss between clean and attacked images, by PGD of 3 steps within `radius` levels. Published are 7
    steps of 2.55 levels and 160 epochs; this is the budget of a lesson.
    """
    pgd = LearnRecipe(PGD(radius, 3, 0.4 * radius), model, sgd, evaluations=2, objective=Rsr(0))
    return {BASELINE: pgd, OURS: replace(pgd, model=model + INJECTED, objective=Rsr(lam))}


def judged(net: nn.Module, split: Split, cut: Cut, *, seed: int = 0) -> dict:
    """{"robust": accuracy under the attack, "naive": the same with one draw a step}; equal without injected noise."""
    some, attack = split.test.limit(cut.attacked), cut.attack
    single = replace(attack, draws=1)
    naive = accuracy(net, some, single, seed=seed)
    robust = accuracy(net, some, attack, seed=seed) if alphas(net) else naive
    return {"robust": robust, "naive": naive}


def _cut_rows(split: Split, recipe: LearnRecipe, cut: Cut, shares: Sequence[float], seed: int, lab: Lab) -> list[dict]:
    trained = partial(fit, split.train, split.test, seed=seed, lab=lab)
    whole, rows = trained(recipe), []
    for share in shares:
        net = pruned(whole.model, share)
        before = accuracy(net, split.test)
        tuned = trained(replace(recipe, sgd=cut.tune, evaluations=1), start=net)
        strength = [float(alpha.detach().abs().mean()) for alpha in alphas(net)]
        rows.append({
            "sparsity": share, "zeros": sparsity(net), "untuned": before, "clean": tuned.last,
            **judged(net, split, cut, seed=seed),
            "alpha": sum(strength) / len(strength) if strength else None, "passes": whole.passes.total,
            "tune_passes": tuned.passes.total,
        })  # fmt: skip
    return rows


def pruned_rows(
    split: Split,
    learners: Mapping[str, LearnRecipe],
    *,
    cut: Cut = Cut(),
    sparsities: Sequence[float] = SPARSITIES,
    seeds: Sequence[int] = (0,),
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of learner x seed x sparsity: a trained net, pruned to each sparsity, tuned with fixed masks and evaluated.

    untuned, clean: accuracy on all test images before and after tuning. robust, naive: see judged. zeros: share of
    masked weights. alpha: mean strength of the injected noise, nan without. Kept in lab.cache by learner and seed.
    Raises ValueError for a sparsity outside [0, 1).
    """
    lab, rows = lab or Lab(), []
    shares = [check_sparsity(share) for share in sparsities]
    for seed, (name, recipe) in product(seeds, learners.items()):
        make = partial(_cut_rows, split, recipe, cut, shares, seed, lab.doing(f"{name}, seed {seed}"))
        parts = (split.train.fingerprint, split.test.fingerprint, recipe, cut, shares, seed)
        (found,) = kept(lab, "pruned", parts, lambda _, make=make: (make(),), as_json())
        rows += [{"method": name, "lam": recipe.objective.lam, "seed": seed, **row} for row in found]
    return pd.DataFrame(rows).astype({"alpha": float})


def pruning_figure(rows: Rows, *, title: str) -> Figure:
    """Rows of pruned_rows: accuracy over sparsity on clean images, before and after tuning, and on attacked ones.

    A line per learner with its 95 % band over seeds.

        sk.pruning.pruning_figure(sk.read_rows("../results/rsr/rows.csv"), title="Pruned to several sparsities")
    """
    columns = {"untuned": "clean images, pruned only", "clean": "clean images, tuned", "robust": "attacked, tuned"}
    rows = pd.DataFrame(rows)
    rows[["sparsity", *columns]] *= 100
    figure = new_figure(11, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        draw_lines(axes, rows, "sparsity", column)
        axes.set(xlabel="weights pruned (%)", ylabel="accuracy (%)", xticks=rows["sparsity"].unique())
    axes.set_ylim(0)
    legend(axes)
    return titled(figure, title, panels, list(columns.values()))


def _draw_weights(axes, sizes: np.ndarray, share: float) -> float:
    """Draw a histogram of the sizes |W|, split into pruned and kept weights at the threshold, which is returned.

    Twenty bins per power of ten, from 1e-5 on, with an edge at the threshold.
    """
    count = round(share * len(sizes))
    threshold = float(np.sort(sizes)[count]) if count else 0.0
    first, step = -5 + np.log10(threshold) % 0.05 if threshold else -5, 0.05
    bins = 10 ** np.arange(first, np.log10(max(1, sizes.max())) + step, step)
    seen = sizes.clip(1.0001 * bins[0])
    for part, color, label in ((sizes < threshold, "#D55E00", "pruned"), (sizes >= threshold, "#0072B2", "kept")):
        axes.stairs(*np.histogram(seen[part], bins), fill=True, color=color, label=label)
    if threshold:
        axes.axvline(threshold, color="black", lw=1)
    axes.set(xscale="log", xlabel="size of a weight, |W|")
    axes.set_xticks(10.0 ** np.arange(-5, 1), ["≤ $10^{-5}$", *(f"$10^{{{power}}}$" for power in range(-4, 1))])
    return threshold


def weights_figure(weights: Mapping[str, Tensor], share: float, *, title: str) -> Figure:
    """Histograms of each net's weights by size, a panel per net, and which of them go when a `share` is pruned."""
    figure, names = new_figure(9, 3), []
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, weights.items(), strict=True):
        threshold = _draw_weights(axes, values.detach().abs().flatten().float().cpu().numpy(), share)
        names.append(f"{name}: threshold {threshold:.2g}")
    panels[0].set_ylabel("number of weights")
    legend(panels[-1])
    return titled(figure, title, panels, names)


@checker(
    "Put the sizes |w| of all tensors into one long vector: torch.cat of w.abs().flatten().",
    "Weights of one size make a threshold take too few or too many: argsort and take the first ones.",
    "Set those places of a vector of ones to 0, and split it back into the tensors' shapes.",
)
def check_masks(masks: Callable) -> str:
    """Whether masks(weights, share) prunes the share of all weights together that is smallest in size.

    weights: a list of tensors; the answer is a list of tensors of their shapes, 0 where a weight goes and 1 where it
    stays, with exactly round(share * number of weights) zeros.

    >>> check_masks(lambda weights, share: weights)
    not yet, because masks hold 0 and 1, yours hold other values: weights?
    """
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(shape, generator=generator) for shape, scale in (((4, 3, 3, 3), 1), ((10, 6), 0.2))]
    weights[1][:, :2] = 0.25  # many of one size, because a threshold alone prunes all of them or none
    total = sum(w.numel() for w in weights)
    for share in (0.0, 0.5, 0.85):
        mine = masks([w.clone() for w in weights], share)
        is_list = isinstance(mine, list | tuple) and all(isinstance(m, torch.Tensor) for m in mine)
        assert is_list and len(mine) == len(weights), "it returns no list with one mask for each tensor of weights"
        shapes = [list(m.shape) for m in mine], [list(w.shape) for w in weights]
        assert shapes[0] == shapes[1], f"the masks have the shapes {shapes[0]}, and their weights {shapes[1]}"
        assert all(((m == 0) | (m == 1)).all() for m in mine), "masks hold 0 and 1, yours hold other values: weights?"
        _check_pruned(weights, [m.bool() for m in mine], share, total)
    return "one threshold for the whole net, so layers lose what they can spare"


def _check_pruned(weights: list, kept: list, share: float, total: int) -> None:
    """Raises AssertionError unless `kept` masks all but the smallest weights, exactly as many as the share says."""
    gone, wanted = sum(int((~k).sum()) for k in kept), round(share * total)
    assert gone != total - wanted or 2 * wanted == total, "0 and 1 are exchanged: 1 is for weights that stay"
    each = [round(share * w.numel()) for w in weights]
    same = share and [int((~k).sum()) for k in kept] == each
    assert not same, "each tensor has lost the same share: compare the weights of all tensors with each other"
    stays = torch.cat([w[k] for w, k in zip(weights, kept, strict=True)])
    goes = torch.cat([w[~k] for w, k in zip(weights, kept, strict=True)])
    if gone and stays.numel():
        assert goes.max() > stays.min() or goes.min() >= 0, "weights are sorted by w, not |w|: -0.9 is a large one"
        assert goes.abs().max() <= stays.abs().min(), "a smaller weight stays while a larger one goes"
    assert gone == wanted, f"with share {share} exactly {wanted} of {total} go, not {gone}: weights of one size count"
