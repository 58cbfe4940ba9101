"""What is done to weights: injected noise and its draws, the lasso, masks that stay; against loops and torch's own."""

import copy
from dataclasses import replace

import nets
import pytest
import torch
import torch.nn.functional as F
from photos import image_set, image_split
from torch import nn
from torch.nn.utils import prune

from semkit.images.pixels import LEVEL, box
from semkit.nets import models
from semkit.nets.engine import Engine, batches_per_pass, input_gradient, predict, train_step
from semkit.nets.lab import Interrupted, Lab
from semkit.nets.weights import (
    ChannelNoise,
    alphas,
    check_sparsity,
    drawing,
    lasso,
    layer_weights,
    pruned,
    sparsity,
    with_noise_injection,
)
from semkit.protections.crafting import CraftRecipe, _straight_through, craft, noise_step
from semkit.training.learning import accuracy, fit
from semkit.training.objectives import Rsr
from semkit.training.perturb import EOT, PGD, Clean
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
DOUBLE = Engine("cpu", "float64")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(engine=ENGINE, seed=0):
    return engine.prepare(with_noise_injection(nets.net(), seed)).eval()


def draws_of(weight, alpha, n=2000, stream=5):
    """[n, *weight.shape]: what is added to the weight in n passes."""
    noise = ChannelNoise(weight, stream)
    noise.alpha.data = alpha
    with torch.no_grad():
        return torch.stack([noise(weight) - weight for _ in range(n)])


def test_injected_noise_has_the_law_of_the_formula():
    weight = torch.randn(4, 3, 3, 3, generator=generator(), dtype=torch.float64) + 2
    alpha = torch.tensor([0.0, 0.1, 0.25, -1.0], dtype=torch.float64).view(4, 1, 1, 1)
    found = draws_of(weight, alpha)
    wanted = alpha.abs().flatten() * weight.std()  # of the whole layer, not of the channel
    n = found[:, 0].numel()
    assert found.std((0, 2, 3, 4)) == pytest.approx(wanted, rel=4 / (2 * n) ** 0.5)
    assert (found.mean((0, 2, 3, 4)).abs() <= 4 * wanted / n**0.5).all()
    assert abs(weight[1].std() / weight.std() - 1) > 0.05  # the comparison tells the two apart
    pairs = found[:, 1:].flatten(1)
    assert abs(torch.corrcoef(torch.stack([pairs[:-1].flatten(), pairs[1:].flatten()]))[0, 1]) < 0.01  # of two passes
    assert torch.corrcoef(pairs.T[:20]).triu(1).abs().max() < 5 / 2000**0.5  # of two weights


def test_alpha_and_weights_have_the_gradients_of_finite_differences():
    model, (x, y) = noisy(DOUBLE), nets.batch(dtype=torch.float64)

    def loss(step=0.0, at=None, along=None):
        with torch.no_grad():
            if at is not None:
                at += step * along
        with drawing(model, generator(7)):
            return F.cross_entropy(model(x), y)

    weight = model[1].parametrizations.weight.original
    for parameter in (*alphas(model)[1:3], alphas(model)[-1], weight, model[2].weight):
        (gradient,) = torch.autograd.grad(loss(), [parameter])
        along = torch.randn(parameter.shape, generator=generator(3), dtype=torch.float64)
        if parameter is weight:  # without a change of std(W), which gets no gradient
            centred = weight.detach() - weight.detach().mean()
            along -= along.mean()
            along -= centred * (along * centred).sum() / centred.pow(2).sum()
        h = 1e-6
        numeric = (loss(h, parameter, along) - loss(-2 * h, parameter, along)).item() / (2 * h)
        loss(h, parameter, along)
        assert numeric == pytest.approx((gradient * along).sum().item(), rel=1e-5, abs=1e-9)


def test_the_global_generator_is_left_alone_and_the_seed_decides():
    before = torch.get_rng_state()
    x, _ = nets.batch()
    first, again, other = (predict(noisy(seed=seed), x) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    built = [models.build("tiny+injected", 4, seed).state_dict() for seed in (1, 1, 2)]
    same = [all(torch.equal(built[0][name], of[name]) for name in built[0]) for of in built]
    assert same == [True, True, False]
    assert torch.equal(torch.get_rng_state(), before)


def test_every_pass_draws_anew_in_train_and_in_eval_mode():
    model, (x, _) = noisy(), nets.batch()
    assert not torch.equal(predict(model, x), predict(model, x))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


def test_a_net_without_injection_or_with_alpha_0_is_unchanged():
    x, _ = nets.batch()
    plain, still = ENGINE.prepare(nets.net()).eval(), noisy()
    for alpha in alphas(still):
        alpha.data.zero_()
    torch.testing.assert_close(predict(still, x), predict(plain, x))
    assert alphas(plain) == [] and len(alphas(still)) == 7  # a stem, 2 x 2 and a shortcut, the head
    assert {"1.weight"} <= plain.state_dict().keys()
    with drawing(plain, generator()):
        pass
    fresh, injected = models.build("tiny", 4, 3), models.build("tiny+injected", 4, 3)
    assert torch.equal(fresh[1].weight, injected[1].parametrizations.weight.original)


def test_the_folded_pass_makes_the_draws_of_the_model_itself():
    model, (x, _) = noisy(), nets.batch()
    assert model.folded.why_not is None and model.folded.pairs == []
    nets.far_from_fresh(model)
    with drawing(model, generator(1)), torch.no_grad():
        expected = model(x), model(x)
    with drawing(model, generator(1)):
        got = predict(model, x), predict(model, x)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_drawing_from_a_generator_leaves_the_nets_own_stream_where_it_was():
    model, twin, (x, _) = noisy(), noisy(), nets.batch()
    predict(model, x), predict(twin, x)
    with drawing(model, generator(1)):
        first = predict(model, x)
    with drawing(model, generator(1)):
        assert torch.equal(predict(model, x), first)
    assert torch.equal(predict(model, x), predict(twin, x))


def test_a_saved_net_goes_on_with_the_draws_it_would_have_made():
    model, (x, _) = noisy(), nets.batch()
    predict(model, x)
    saved = copy.deepcopy(model.state_dict())
    expected = predict(model, x)
    again = noisy(seed=9)
    again.load_state_dict(saved)
    assert torch.equal(predict(again, x), expected)


def test_alpha_is_trained_and_does_not_decay():
    model, (x, y) = noisy(), nets.batch()
    decay = SGD(steps=10, batch=6, weight_decay=0.5)
    optimizer = decay.optimizer(model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert len(decay.optimizer(nets.net()).param_groups) == 1
    with torch.no_grad():  # no gradient but decay's
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    weight = model[1].parametrizations.weight.original.clone()
    optimizer.step()
    assert all((alpha == 0.25).all() for alpha in alphas(model))
    torch.testing.assert_close(model[1].parametrizations.weight.original, weight * (1 - 0.1 * 0.5))
    train_step(model, optimizer, x, y)
    assert all((alpha != 0.25).any() for alpha in alphas(model))


RECIPE = LearnRecipe(model="tiny+injected", perturbation=PGD(4, 1), sgd=SGD(steps=4, batch=16), evaluations=2)


@pytest.mark.whole
def test_learners_with_injection_are_the_same_twice_and_judging_them_changes_nothing():
    split = image_split()
    state = torch.get_rng_state()
    runs = [fit(split.train, split.test, LearnRecipe(**{**vars(RECIPE), "evaluations": e}), lab=Lab(ENGINE))
            for e in (2, 2, 4)]  # fmt: skip
    assert runs[0].losses == runs[1].losses == runs[2].losses and runs[0].curve == runs[1].curve
    assert runs[0].curve[-1] == runs[2].curve[-1]
    attacked = [accuracy(runs[0].model, split.test, EOT(8, 2, draws=2)) for _ in range(2)]
    assert attacked[0] == attacked[1] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.whole
def test_a_crafting_with_an_injected_surrogate_resumes_to_the_same_bytes(tmp_path):
    recipe = CraftRecipe(PGD(4, 1), PGD(4, 1), steps=1, samples=1, surrogate="tiny+injected", sgd=SGD(steps=4, batch=8))
    images = image_set(16)
    whole = craft(images, recipe, lab=Lab(ENGINE))
    how = dict(checkpoint=tmp_path / "state")
    with pytest.raises(Interrupted):
        craft(images, recipe, lab=Lab(ENGINE, on_step=lambda what, step, *_: step == 2), **how)
    assert torch.equal(craft(images, recipe, lab=Lab(ENGINE), **how).noise, whole.noise)


@pytest.mark.parametrize("side", [Clean(), PGD(4, 2)], ids=str)
def test_every_eot_sample_of_a_noise_step_has_a_draw_of_its_own(side):
    (x, y), recipe = nets.batch(dtype=torch.float64), CraftRecipe(side, samples=3)
    assert batches_per_pass(DOUBLE.prepare(nets.net()), x) > 3 and DOUBLE.batch_samples
    found = {}
    for engine in (DOUBLE, replace(DOUBLE, batch_samples=False)):
        model = noisy(engine)
        first = int(model[1].parametrizations.weight[0].stream)
        found[engine.batch_samples] = noise_step(model, x, y, torch.zeros_like(x), recipe, generator())
        assert int(model[1].parametrizations.weight[0].stream) - first == 3 * (side.passes + 1)
    assert torch.equal(found[True], found[False])


def test_one_draw_for_all_samples_would_be_seen():
    (x, y), recipe = nets.batch(dtype=torch.float64), CraftRecipe(Clean(), samples=3)
    sums = []
    for samples in (1, 3):
        model, rng, delta = noisy(DOUBLE), generator(), torch.zeros_like(x)
        parts = (_straight_through(model, x + delta, x, y, recipe, rng, samples) for _ in range(3 // samples))
        sums.append(sum(parts))
    assert (sums[0] - sums[1]).abs().max() > 0.05 * sums[0].abs().max()


def test_an_eot_gradient_is_the_mean_of_single_ones():
    model, (x, y) = noisy(DOUBLE), nets.batch(dtype=torch.float64)
    eot = EOT(8, draws=5)
    with drawing(model, generator(1)):
        single = torch.stack([input_gradient(model, x, y) for _ in range(5)])
    with drawing(model, generator(1)):
        torch.testing.assert_close(eot.gradient(model, x, y), single.mean(0))
    assert (single[0] - single[1]).abs().max() > 0.05 * single.abs().max()
    assert eot.passes == 5 * 10 and EOT(0).passes == 0 and isinstance(eot, PGD)


def test_eot_takes_the_steps_of_its_gradient():
    model, (x, y) = noisy(), nets.batch()
    with drawing(model, generator(1)):
        mean = EOT(8, draws=3).gradient(model, x, y)
    with drawing(model, generator(1)):
        got = EOT(8, 1, 2, random_start=False, draws=3)(model, x, y)
    torch.testing.assert_close(got, box(x + 2 * LEVEL * mean.sign()))
    one, plain = EOT(8, 3, draws=1), PGD(8, 3)
    with drawing(model, generator(1)):
        expected = plain(model, x, y, generator())
    with drawing(model, generator(1)):
        assert torch.equal(one(model, x, y, generator()), expected)


@pytest.mark.whole
def test_the_mean_of_draws_points_where_the_expected_loss_grows():
    model, (x, y) = noisy(DOUBLE), nets.batch(dtype=torch.float64)
    truth, eight, one = (EOT(8, draws=draws).gradient(model, x, y).flatten() for draws in (400, 8, 1))
    near = [float(F.cosine_similarity(found, truth, dim=0)) for found in (eight, one)]
    assert near[0] > near[1] + 0.05


def test_bad_injections_are_refused():
    with pytest.raises(ValueError, match="noise is injected once"):
        with_noise_injection(noisy())
    with pytest.raises(ValueError, match="draws must be a whole number >= 1, got 0"):
        EOT(8, draws=0)
    with pytest.raises(ValueError, match=r"unknown model 'tinny'; did you mean tiny"):
        models.build("tinny+injected", 10)
    with pytest.raises(ValueError, match="looks like a fraction"):
        EOT(8 / 255)


# -- masks ------------------------------------------------------------------------------------------------------------


SHARES = (0.0, 0.5, 0.85, 0.95)


def plain():
    return ENGINE.prepare(nets.net()).eval()


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
    whole = torch.cat([w.detach().flatten() for w in layer_weights(model)])
    cut = pruned(model, share)
    kept = torch.cat([w.detach().flatten() for w in layer_weights(cut)])
    gone = kept == 0
    assert gone.sum() == round(share * len(whole)) and sparsity(cut) == gone.sum() / len(whole)
    assert torch.equal(kept[~gone], whole[~gone])
    assert not gone.any() or whole[gone].abs().max() <= whole[~gone].abs().min()
    assert sparsity(model) == 0 and not any((w == 0).any() for w in layer_weights(model))  # a copy was pruned


@pytest.mark.parametrize("share", SHARES[1:])
def test_the_choice_is_that_of_torchs_global_pruning(share):
    model, twin = plain(), nets.net()
    layers = [(m, "weight") for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=share)
    for mine, theirs in zip(layer_weights(pruned(model, share)), seen(twin), strict=True):
        assert torch.equal(mine, theirs)
    one_by_one = nets.net()  # a broken twin: the share of every layer
    for layer, name in [(m, "weight") for m in one_by_one.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        prune.l1_unstructured(layer, name, share)
    pairs = zip(layer_weights(pruned(model, share)), seen(one_by_one), strict=True)
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
    zero = [w == 0 for w in layer_weights(model)]
    for _ in range(2):
        assert all((w[gone] == 0).all() and (w[~gone] != 0).all() for w, gone in zip(seen(model), zero, strict=True))


def test_a_pruned_net_predicts_with_its_kept_weights_also_folded():
    model, (x, _) = pruned(plain(), 0.85), nets.batch()
    by_hand = nets.net().eval()
    layers = [m for m in by_hand.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer, kept in zip(layers, layer_weights(model), strict=True):
        layer.weight.data = kept.detach()
    with torch.no_grad():
        torch.testing.assert_close(predict(model, x), by_hand(x))
        assert (by_hand(x) - plain()(x)).abs().max() > 0.01


@pytest.mark.parametrize("make", [plain, noisy])
def test_masks_survive_training_while_the_kept_weights_move(make):
    model, (x, y) = pruned(make(), 0.5), nets.batch()
    before, zero = [w.detach().clone() for w in layer_weights(model)], [w == 0 for w in layer_weights(model)]
    optimizer = SGD(steps=5, batch=6).optimizer(model)
    for _ in range(5):
        train_step(model, optimizer, x, y)
    for now, old, gone in zip(layer_weights(model), before, zero, strict=True):
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
    assert lasso(model).item() == pytest.approx(sum(w.abs().sum().item() for w in layer_weights(model)))
    assert lasso(model) < lasso(noisy())
    (F.cross_entropy(model(x), y) + lasso(model)).backward()
    for layer, kept in zip(
        (m for m in model.modules() if hasattr(m, "parametrizations")), layer_weights(model), strict=True
    ):
        assert (layer.parametrizations.weight.original.grad[kept == 0] == 0).all()


def test_pruning_further_takes_the_masked_first_and_never_brings_one_back():
    once = pruned(noisy(), 0.5)
    with torch.no_grad():  # what is masked would be the largest
        for layer, kept in zip(
            (m for m in once.modules() if hasattr(m, "parametrizations")), layer_weights(once), strict=True
        ):
            layer.parametrizations.weight.original[kept == 0] = 9
    twice = pruned(once, 0.85)
    assert sparsity(twice) == pytest.approx(0.85, abs=1e-3) and sparsity(once) == pytest.approx(0.5, abs=1e-3)
    for first, second in zip(layer_weights(once), layer_weights(twice), strict=True):
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


def test_bad_sparsities_are_refused():
    for bad in (-0.1, 1, 1.0, 85, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity is a share, 0 to 1, got|sparsity of 1 leaves no weight"):
            pruned(nets.net(), bad)
    assert check_sparsity("0.85") == 0.85
    with pytest.raises(ValueError, match="before a net is pruned"):
        with_noise_injection(pruned(nets.net(), 0.5))
