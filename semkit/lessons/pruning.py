"""What is left of a net when most of its weights are gone: robust learners, pruned to several sparsities and judged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from torch import nn

from semkit.images.imageset import Split
from semkit.nets.cache import kept_json
from semkit.nets.lab import Lab
from semkit.nets.models import INJECTED
from semkit.nets.weights import alphas, check_sparsity, pruned, sparsity
from semkit.training.learning import LearnRecipe, accuracy, fit
from semkit.training.objectives import Rsr
from semkit.training.perturb import EOT, PGD
from semkit.training.schedule import SGD

SPARSITIES = (0.0, 0.5, 0.7, 0.85, 0.95)
BASELINE, OURS = "PGD training", "RSR"  # as figures and tables name them


@dataclass(frozen=True)
class Cut:
    """How a trained net is made sparse and judged.

    tune: the steps after pruning, on the net's own objective with the masks kept; the published schedule is not known,
    this one is a tenth of the training at a fifth of its rate. attack: for robust accuracy, on `attacked` test images.
    """

    tune: SGD = SGD(steps=60, batch=64, lr=0.02)
    attack: EOT = EOT(8, 10, draws=4)
    attacked: int = 500


def robust_learners(
    model: str = "tiny", radius: float = 8, lam: float = Rsr.lam, sgd: SGD = SGD(steps=600, batch=64)
) -> dict[str, LearnRecipe]:
    """{BASELINE: PGD training, OURS: RSR}: the same loss by halves and the same attack, PGD of 3 steps in a ball of
    `radius` levels; RSR has the lasso and the injected noise on top.

    As published it is 7 steps of 2.55 levels and 160 epochs: this is the budget of a lesson.
    """
    pgd = LearnRecipe(PGD(radius, 3, 0.4 * radius), model, sgd, evaluations=2, objective=Rsr(0))
    return {BASELINE: pgd, OURS: replace(pgd, model=model + INJECTED, objective=Rsr(lam))}


def judged(net: nn.Module, split: Split, cut: Cut, *, seed: int = 0) -> dict:
    """{"robust": accuracy under the attack, "naive": the same with one draw a step}; equal for nets without noise."""
    some, attack = split.test.limit(cut.attacked), cut.attack
    single = replace(attack, draws=1)
    naive = accuracy(net, some, single, seed=seed)
    robust = accuracy(net, some, attack, seed=seed) if alphas(net) else naive
    return {"robust": robust, "naive": naive}


def _cut_rows(split: Split, recipe: LearnRecipe, cut: Cut, shares: Sequence[float], seed: int, lab: Lab):
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
) -> list[dict]:
    """Rows of learner x seed x sparsity: a trained net, pruned, tuned with its masks and judged at each sparsity.

    untuned, clean: accuracy on all test images before and after tuning. robust, naive: see judged. zeros: the share of
    weights that are masked. alpha: mean strength of the injected noise. Kept in lab.cache by learner and seed. Raises
    ValueError for a sparsity outside [0, 1).
    """
    lab, rows = lab or Lab(), []
    shares = [check_sparsity(share) for share in sparsities]
    for seed, (name, recipe) in product(seeds, learners.items()):
        make = partial(_cut_rows, split, recipe, cut, shares, seed, lab.doing(f"{name}, seed {seed}"))
        parts = (split.train.fingerprint, split.test.fingerprint, recipe, cut, shares, seed)
        found = kept_json(lab, "pruned", parts, make)
        lam = recipe.objective.lam
        rows += [{"method": name, "lam": lam, "seed": seed, **row} for row in found]
    return rows
