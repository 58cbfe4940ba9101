"""Lasso and pruning against loops and torch's own; masks are exact and stay, also under training and injected noise."""

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from photos import image_split
from torch import nn
from torch.nn.utils import prune

from semkit.nets.engine import Engine, predict, train_step
from semkit.nets.injection import alphas, drawing, with_noise_injection
from semkit.nets.lab import Lab
from semkit.training.learning import LearnRecipe, fit
from semkit.training.objectives import Rsr
from semkit.training.perturb import PGD
from semkit.training.schedule import SGD
from semkit.training.sparse import check_sparsity, lasso, pruned, sparsity, weights

ENGINE = Engine("cpu", "float32")
SHARES = (0.0, 0.5, 0.85, 0.95)


def plain():
    return ENGINE.prepare(nets.net()).eval()


def noisy():
    return ENGINE.prepare(with_noise_injection(nets.net())).eval()


def seen(model):
    """The weights that the model's layers multiply with, one draw of them."""
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("make", [plain, noisy])
def test_lasso_is_the_sum_of_all_sizes_and_its_gradient_their_signs(make):
    model = make()
    names = [n for n, p in model.named_parameters() if p.dim() > 1 and "alpha" not in n]
    parameters = dict(model.named_parameters())
    total = sum(abs(value) for name in names for value in parameters[name].flatten().tolist())
    assert lasso(model).item() == pytest.approx(total, rel=1e-5)
    lasso(model).backward()
    for name, parameter in parameters.items():
        expected = parameter.detach().sign() if name in names else None
        assert parameter.grad is expected is None or torch.equal(parameter.grad, expected)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("make", [plain, noisy])
def test_the_pruned_share_is_exact_and_the_smallest_go(make, share):
    model = make()
    whole = torch.cat([w.detach().flatten() for w in weights(model)])
    cut = pruned(model, share)
    kept = torch.cat([w.detach().flatten() for w in weights(cut)])
    gone = kept == 0
    assert gone.sum() == round(share * len(whole)) and sparsity(cut) == gone.sum() / len(whole)
    assert torch.equal(kept[~gone], whole[~gone])
    assert not gone.any() or whole[gone].abs().max() <= whole[~gone].abs().min()
    assert sparsity(model) == 0 and not any((w == 0).any() for w in weights(model))  # a copy was pruned


@pytest.mark.parametrize("share", SHARES[1:])
def test_the_choice_is_that_of_torchs_global_pruning(share):
    model, twin = plain(), nets.net()
    layers = [(m, "weight") for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=share)
    for mine, theirs in zip(weights(pruned(model, share)), seen(twin), strict=True):
        assert torch.equal(mine, theirs)
    one_by_one = nets.net()  # a broken twin: the share of every layer
    for layer, name in [(m, "weight") for m in one_by_one.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        prune.l1_unstructured(layer, name, share)
    pairs = zip(weights(pruned(model, share)), seen(one_by_one), strict=True)
    assert not all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_pruning_nothing_changes_nothing():
    x, _ = nets.batch()
    model = plain()
    torch.testing.assert_close(predict(pruned(model, 0), x), predict(model, x))
    model = noisy()
    cut = pruned(model, 0)
    assert torch.equal(predict(cut, x), predict(model, x))


@pytest.mark.parametrize("make", [plain, noisy])
def test_masked_weights_are_zero_in_every_pass(make):
    model = pruned(make(), 0.85)
    zero = [w == 0 for w in weights(model)]
    for _ in range(2):
        assert all((w[gone] == 0).all() and (w[~gone] != 0).all() for w, gone in zip(seen(model), zero, strict=True))


def test_a_pruned_net_predicts_with_its_kept_weights_also_folded():
    model, (x, _) = pruned(plain(), 0.85), nets.batch()
    by_hand = nets.net().eval()
    layers = [m for m in by_hand.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, kept in zip(layers, weights(model), strict=True):
        layer.weight.data = kept.detach()
    with torch.no_grad():
        torch.testing.assert_close(predict(model, x), by_hand(x))
        assert (by_hand(x) - plain()(x)).abs().max() > 0.01


@pytest.mark.parametrize("make", [plain, noisy])
def test_masks_survive_training_while_the_kept_weights_move(make):
    model, (x, y) = pruned(make(), 0.5), nets.batch()
    before, zero = [w.detach().clone() for w in weights(model)], [w == 0 for w in weights(model)]
    optimizer = SGD(steps=5, batch=6).optimizer(model)
    for _ in range(5):
        train_step(model, optimizer, x, y)
    for now, old, gone in zip(weights(model), before, zero, strict=True):
        assert (now[gone] == 0).all() and (now[~gone] != old[~gone]).any()
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert sparsity(again) == sparsity(model) == pytest.approx(0.5, abs=1e-3)


def test_a_learner_goes_on_from_a_pruned_net_and_keeps_its_masks():
    split, engine = image_split(), Engine("cpu", "float32")
    recipe = LearnRecipe(PGD(8, 1), "tiny+injected", SGD(steps=3, batch=16, lr=0.02), objective=Rsr(0), evaluations=1)
    trained = fit(split.train, split.test, recipe, lab=Lab(engine)).model
    start = pruned(trained, 0.6)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    done = fit(split.train, split.test, recipe, seed=1, lab=Lab(engine), start=start)
    assert done.model is start and sparsity(start) == pytest.approx(0.6, abs=1e-4)
    moved = [name for name, value in start.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("original") for name in moved) and not any(name.endswith("mask") for name in moved)
    again = fit(split.train, split.test, recipe, seed=1, lab=Lab(engine), start=pruned(trained, 0.6))
    assert again.losses == done.losses and again.curve == done.curve


def test_masked_weights_get_no_gradient_and_lasso_does_not_count_them():
    model, (x, y) = pruned(noisy(), 0.85), nets.batch()
    assert lasso(model).item() == pytest.approx(sum(w.abs().sum().item() for w in weights(model)))
    assert lasso(model) < lasso(noisy())
    (F.cross_entropy(model(x), y) + lasso(model)).backward()
    for layer, kept in zip((m for m in model.modules() if hasattr(m, "parametrizations")), weights(model), strict=True):
        assert (layer.parametrizations.weight.original.grad[kept == 0] == 0).all()


def test_pruning_further_takes_the_masked_first_and_never_brings_one_back():
    once = pruned(noisy(), 0.5)
    with torch.no_grad():  # what is masked would be the largest
        for layer, kept in zip(
            (m for m in once.modules() if hasattr(m, "parametrizations")), weights(once), strict=True
        ):
            layer.parametrizations.weight.original[kept == 0] = 9
    twice = pruned(once, 0.85)
    assert sparsity(twice) == pytest.approx(0.85, abs=1e-3) and sparsity(once) == pytest.approx(0.5, abs=1e-3)
    for first, second in zip(weights(once), weights(twice), strict=True):
        assert (second[first == 0] == 0).all()
    assert len(alphas(twice)) == len(alphas(once)) == 7


def test_a_pruned_copy_of_a_noisy_net_makes_the_same_draws():
    model, generator = noisy(), torch.Generator()
    cut = pruned(model, 0.5)
    with drawing(model, generator.manual_seed(1)):
        drawn = seen(model)
    with drawing(cut, generator.manual_seed(1)):
        for whole, kept in zip(drawn, seen(cut), strict=True):
            assert torch.equal(kept, whole * (kept != 0))


def test_bad_input_is_refused():
    for bad in (-0.1, 1, 1.0, 85, float("nan"), None, "much"):
        with pytest.raises(
            ValueError, match=r"sparsity must be a share of the weights in \[0, 1\).*write 0.85 for 85 %"
        ):
            pruned(nets.net(), bad)
    assert check_sparsity("0.85") == 0.85
    with pytest.raises(ValueError, match="before a net is pruned"):
        with_noise_injection(pruned(nets.net(), 0.5))
