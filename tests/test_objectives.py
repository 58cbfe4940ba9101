"""Objectives: against numpy's own sums, in their limits, down a finite difference, and by the passes they take."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import batch, net
from photos import image_split
from scipy.special import softmax

from semkit.nets.engine import Engine, count_passes, evaluating, input_gradient, logits, predict, step_down, train_step
from semkit.nets.lab import Lab, key
from semkit.training.learning import fit
from semkit.training.objectives import Mart, Plain, Rsr, Trades, divergence
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import SGD, LearnRecipe

EXACT = Engine("cpu", "float64")
ENGINE = Engine("cpu", "float32")
OBJECTIVES = [Plain(), Trades(), Mart(), Rsr()]


def setting():
    """(a fresh model, x, y) in float64, a net with opinions; a train-mode pass moves what its norms remember."""
    return net(torch.float64, opinion=3.0), *batch(8, dtype=torch.float64)


def generator():
    return torch.Generator().manual_seed(5)


def trained(model, x):
    """softmax(f(x)) in train mode, as numpy."""
    with torch.no_grad():
        return softmax(logits(model.train(), x).numpy(), axis=1)


def test_plain_is_the_cross_entropy_on_perturbed_images_alone():
    model, x, y = setting()
    a = PGD(8, 2)(model, x, y, generator())
    ours = Plain()(*setting(), PGD(8, 2), generator()).item()
    assert ours == pytest.approx(-np.log(trained(model, a)[range(8), y]).mean(), rel=1e-12)


def test_trades_is_the_sum_it_says():
    model, x, y = setting()
    a = PGD(8, 2)(model, x, y, generator(), target=predict(model, x).softmax(1))
    p, q = trained(model, x), trained(model, a)
    wanted = (-np.log(p[range(8), y]) + 6 * (p * np.log(p / q)).sum(1)).mean()
    assert Trades()(*setting(), PGD(8, 2), generator()).item() == pytest.approx(wanted, rel=1e-12)


def test_mart_is_the_sum_it_says():
    model, x, y = setting()
    a = PGD(8, 2)(model, x, y, generator())
    p, q = trained(model, x), trained(model, a)
    rows = range(8)
    others = q.copy()
    others[rows, y] = -1
    margin = -np.log(q[rows, y]) - np.log(1 - others.max(1))
    wanted = (margin + 5 * (1 - p[rows, y]) * (p * np.log(p / q)).sum(1)).mean()
    assert Mart()(*setting(), PGD(8, 2), generator()).item() == pytest.approx(wanted, rel=1e-12)


def test_rsr_is_the_sum_it_says():
    model, x, y = setting()
    a = PGD(8, 2)(model, x, y, generator())
    p, q = trained(model, x), trained(model, a)
    size = sum(np.abs(w.detach().numpy()).sum() for w in model.parameters() if w.dim() > 1)
    for lam in (0, 1e-3):
        wanted = (-np.log(p[range(8), y]).mean() - np.log(q[range(8), y]).mean()) / 2 + lam * size
        assert Rsr(lam)(*setting(), PGD(8, 2), generator()).item() == pytest.approx(wanted, rel=1e-12)


def test_rsrs_lasso_pulls_every_weight_towards_zero_by_lam():
    _, without = gradient(Rsr(0))
    _, with_lasso = gradient(Rsr(1e-3))
    signs = torch.cat([(w.sign() if w.dim() > 1 else w * 0).flatten() for w in setting()[0].parameters()])
    torch.testing.assert_close(with_lasso - without, 1e-3 * signs.detach(), rtol=1e-9, atol=1e-12)


def test_a_rival_that_is_certain_costs_much_but_not_everything():
    class Sure(torch.nn.Module):
        def forward(self, x):
            return 1000 * torch.eye(4)[(torch.arange(len(x)) + 1) % 4]

    loss = Mart()(Sure(), *batch(4), Clean())
    assert 1000 < loss < 1100


def gradient(objective, perturbation=Clean()):
    model, x, y = setting()
    loss = objective(model, x, y, perturbation, generator())
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_without_perturbation_or_without_weight_trades_is_training_on_clean_images():
    loss, wanted = gradient(Plain())
    for objective, perturbation in ((Trades(6), Clean()), (Trades(0), PGD(8, 2))):
        same, direction = gradient(objective, perturbation)
        assert same == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(direction, wanted, rtol=1e-9, atol=1e-12)
    assert gradient(Trades(6), PGD(8, 2))[0] > loss


def test_the_divergence_is_never_negative_and_zero_at_home():
    one, other = torch.randn(2, 50, 7, generator=generator(), dtype=torch.float64)
    assert divergence(one, other).min() > 0 and divergence(one, one).abs().max() < 1e-12
    assert not torch.allclose(divergence(one, other), divergence(other, one))


def test_class_probabilities_are_climbed_away_from():
    model, x, y = setting()
    p = predict(model, x).softmax(1)
    assert input_gradient(model, x, p).abs().max() < 1e-12  # KL(p || f(x)) has its least value there
    away = PGD(8, 5)(model, x, y, generator(), target=p)
    found = {}
    for name, a in (("away", away), ("random", Uniform(8)(model, x, y, generator())), ("label", None)):
        a = PGD(8, 5)(model, x, y, generator()) if a is None else a
        found[name] = divergence(p.log(), predict(model, a)).mean().item()
    assert found["away"] > max(found["random"], found["label"])
    with evaluating(model):
        here = away.detach().requires_grad_()
        (wanted,) = torch.autograd.grad(divergence(p.log(), logits(model, here)).sum(), here)
    torch.testing.assert_close(input_gradient(model, away, p), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("perturbation", [Clean(), PGD(8, 3)], ids=repr)
def test_every_pass_of_a_step_is_counted_and_foretold(objective, perturbation):
    recipe = LearnRecipe(perturbation, "tiny", SGD(steps=2, batch=8), evaluations=1, objective=objective)
    split = image_split()
    made = fit(split.train, split.test, recipe, lab=Lab(ENGINE)).passes
    cost = recipe.cost(len(split.train))
    assert (made.input_gradient, made.training) == (cost.input_gradient, cost.training)
    assert made.training == 2 * 8 * objective.passes
    assert made.forward == len(split.test) + (16 if objective == Trades() else 0)  # TRADES asks for the answers at x


def test_a_step_on_plain_is_a_train_step_bit_for_bit():
    weights = []
    for step in (train_step, lambda m, o, x, y: step_down(o, lambda: Plain()(m, x, y, Clean()))):
        model, x, y = setting()
        loss = step(model, torch.optim.SGD(model.parameters(), 0.1), x, y)
        weights.append((loss, *(value.numpy().tobytes() for value in model.state_dict().values())))
    assert weights[0] == weights[1]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_step_goes_down_and_leaves_the_perturbation_in_eval_mode(objective):
    model, x, y = setting()
    modes = []

    class Watch(Uniform):
        def __call__(self, model, *how, **more):
            modes.append([m.training for m in model.modules()])
            return super().__call__(model, *how, **more)

    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    with count_passes():
        losses = [
            step_down(torch.optim.SGD(model.parameters(), 0.01), lambda: objective(model, x, y, Watch(4), None))
            for _ in range(12)
        ]
    assert losses[-1] < losses[0] and len(modes) == 12
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_a_recipe_names_its_objective():
    recipe = LearnRecipe(PGD(8))
    assert recipe == replace(recipe, objective=Plain()) and "objective=Trades(beta=6.0)" in repr(
        replace(recipe, objective=Trades())
    )
    recipes = [replace(recipe, objective=o) for o in (*OBJECTIVES, Trades(1), Mart(1), Rsr(1))]
    assert len({key("semkit.analysis.study", recipe) for recipe in recipes}) == 7


@pytest.mark.parametrize("make", [Trades, Mart, Rsr])
@pytest.mark.parametrize("bad", [-1, float("inf"), float("nan")])
def test_a_weight_that_cannot_be_is_refused(make, bad):
    with pytest.raises(ValueError, match=r"(beta|lam) must be a finite number >= 0"):
        make(bad)
