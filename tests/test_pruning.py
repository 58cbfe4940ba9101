"""Pruned learners: rows against the steps made by hand, what the two learners differ in, stopping and keeping."""

from dataclasses import replace

import pytest
import torch
from drawn import collisions, texts
from photos import image_split

from semkit.analysis.report import as_objects
from semkit.analysis.statistics import interval
from semkit.lessons.pruning import (
    BASELINE,
    OURS,
    Cut,
    judged,
    pruned_rows,
    pruning_figure,
    robust_learners,
    weights_figure,
)
from semkit.nets.engine import Engine
from semkit.nets.lab import Interrupted, Lab
from semkit.nets.weights import alphas, layer_weights, pruned
from semkit.training.learning import accuracy, fit
from semkit.training.objectives import Rsr
from semkit.training.perturb import EOT
from semkit.training.recipes import SGD

ENGINE = Engine("cpu", "float32")
QUICK = Cut(SGD(steps=2, batch=16, lr=0.02), EOT(8, 1, draws=2), 20)
LEARNERS = robust_learners(sgd=SGD(steps=3, batch=16))


def test_the_learners_differ_in_lasso_and_injected_noise_alone():
    made = robust_learners(lam=0.3)
    pgd, rsr = made[BASELINE], made[OURS]
    assert replace(rsr, model=pgd.model, objective=Rsr(0)) == pgd and pgd.objective == Rsr(0)
    assert (rsr.model, rsr.objective) == ("tiny+injected", Rsr(0.3))
    assert pgd.perturbation.steps * pgd.perturbation.step_size >= pgd.perturbation.radius == 8  # it can cross the ball


@pytest.mark.whole
@pytest.mark.parametrize("name", LEARNERS)
def test_a_row_is_the_net_pruned_tuned_and_judged(name):
    split, recipe = image_split(), LEARNERS[name]
    rows = pruned_rows(split, {name: recipe}, cut=QUICK, sparsities=[0.6], seeds=[3], lab=Lab(ENGINE))
    (row,) = as_objects(rows)
    net = pruned(fit(split.train, split.test, recipe, seed=3, lab=Lab(ENGINE)).model, 0.6)
    untuned = accuracy(net, split.test)
    tune = replace(recipe, sgd=QUICK.tune, evaluations=1)
    tuned = fit(split.train, split.test, tune, seed=3, lab=Lab(ENGINE), start=net)
    robust = accuracy(net, split.test.limit(20), QUICK.attack, seed=3)
    zeros = sum(int((w == 0).sum()) for w in layer_weights(net)) / sum(w.numel() for w in layer_weights(net))
    assert {name: row[name] for name in ("untuned", "clean", "robust", "zeros", "sparsity", "seed", "method")} == {
        "untuned": untuned, "clean": tuned.last, "robust": robust, "zeros": zeros, "sparsity": 0.6, "seed": 3,
        "method": name,
    }  # fmt: skip
    strength = torch.stack([alpha.abs().mean() for alpha in alphas(net)]).mean() if name == OURS else None
    assert row["alpha"] == (None if strength is None else pytest.approx(strength.item()))
    assert (row["passes"], row["tune_passes"]) == (recipe.cost(len(split.train)).total, tune.cost(80).total)


@pytest.mark.whole
def test_sparsities_of_one_net_do_not_touch_each_other():
    how = dict(cut=QUICK, seeds=[0], lab=Lab(ENGINE))
    both = pruned_rows(image_split(), LEARNERS, sparsities=[0, 0.9], **how)
    alone = pruned_rows(image_split(), LEARNERS, sparsities=[0.9], **how)
    # The draws of a noisy net go on from where the one before left them only if it were the same net.
    assert both[both["sparsity"] == 0.9].reset_index(drop=True).equals(alone)


def test_without_injected_noise_eot_is_one_draw():
    split = image_split()
    net = fit(split.train, split.test, LEARNERS[BASELINE], lab=Lab(ENGINE)).model
    found = judged(net, split, QUICK)
    assert found["robust"] == found["naive"] == accuracy(net, split.test.limit(20), QUICK.attack)


@pytest.mark.whole
def test_rows_are_kept_and_a_stopped_run_says_so(tmp_path):
    split, seen = image_split(), []
    how = dict(cut=QUICK, sparsities=[0.5])
    with pytest.raises(Interrupted, match=r"stopped while .*, seed 0"):
        pruned_rows(split, LEARNERS, lab=Lab(ENGINE, tmp_path, lambda *step: True), **how)
    assert not list(tmp_path.iterdir())
    first = pruned_rows(split, LEARNERS, lab=Lab(ENGINE, tmp_path, lambda *step: seen.append(step[0])), **how)
    assert set(seen) == {f"{BASELINE}, seed 0", f"{OURS}, seed 0"} and len(list(tmp_path.iterdir())) == 2
    lab = Lab(ENGINE, tmp_path, lambda *step: pytest.fail("made again"))
    assert pruned_rows(split, LEARNERS, lab=lab, **how).equals(first)
    next(tmp_path.iterdir()).write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        pruned_rows(split, LEARNERS, lab=lab, **how)


def test_a_sparsity_that_cannot_be_is_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="sparsity is a share, 0 to 1, got 85"):
        lab = Lab(on_step=lambda *step: pytest.fail("trained"))
        pruned_rows(image_split(), LEARNERS, sparsities=[0.5, 85], lab=lab)


# --- figures

PRUNED = [
    {"method": m, "seed": s, "sparsity": share, "clean": 0.6 - 0.1 * share + 0.01 * s, "untuned": 0.6 - 0.5 * share}
    | {"robust": 0.3 - 0.1 * i * share + 0.02 * s}
    for i, m in enumerate(("PGD training", "RSR"))
    for share in (0, 0.5, 0.85, 0.95)
    for s in range(3)
]
SIZES = {"plain": torch.linspace(-0.1, 0.1, 200), "lasso": torch.linspace(-0.1, 0.1, 200) ** 3}


def test_pruned_nets_are_drawn_over_their_sparsity_before_and_after_tuning_and_under_attack():
    figure = pruning_figure(PRUNED, title="t")
    assert collisions(figure) == ([], []) and texts(figure.axes[-1]) == ["PGD training", "RSR"]
    last = [row for row in PRUNED if row["method"] == "RSR" and row["sparsity"] == 0.95]
    for axes, name in zip(figure.axes, ("untuned", "clean", "robust"), strict=True):
        assert axes.lines[1].get_xydata()[-1] == pytest.approx((95, 100 * interval([r[name] for r in last])[0]))
        assert list(axes.get_xticks()) == [0, 50, 85, 95] and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("share", [0, 0.5, 0.85])
def test_the_weights_below_the_threshold_are_the_share_that_is_pruned(share):
    figure = weights_figure(SIZES, share, title="t")
    assert collisions(figure) == ([], [])
    for axes, values in zip(figure.axes, SIZES.values(), strict=True):
        heights = [sum(bars.get_data().values) for bars in axes.patches]
        assert heights == pytest.approx([share * len(values), (1 - share) * len(values)], abs=1)  # sizes come in pairs
        threshold = float(axes.get_title().rpartition(" ")[2])
        below = (values.abs() < threshold * 0.9).float().mean()
        assert below <= share and (share == 0 or (values.abs() < threshold * 1.1).float().mean() >= share - 0.01)
