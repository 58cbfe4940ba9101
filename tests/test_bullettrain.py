"""BulletTrain: sorting against numpy, the average in closed form, steps that are really spared, and its saved state."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nets import batch, net
from photos import image_set, image_split

from semkit.images.files import read_tensors, write_tensors
from semkit.nets.engine import Engine, count_passes, predict, training_logits
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe, Interrupted, craft
from semkit.protections.state import FIELDS
from semkit.training.bullettrain import BulletTrain, Mined, Mining, mining, spread
from semkit.training.learning import accuracy, fit
from semkit.training.objectives import AugMix, Mart, Plain, Trades, mixed
from semkit.training.perturb import PGD, Clean, Uniform, shrunk
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
BULLET = BulletTrain(PGD(8, 3, 4), PGD(8, 1, 8))
CRAFT = CraftRecipe(
    Uniform(4), BulletTrain(PGD(4, 3), PGD(4, 1)), steps=1, samples=1, surrogate="tiny", sgd=SGD(steps=12, batch=8)
)


def generator():
    return torch.Generator().manual_seed(5)


def answers(n=40, classes=4):
    p = torch.randn(n, classes, generator=generator(), dtype=torch.float64).mul(2).softmax(1)
    return p, torch.arange(n) % classes


def setting(n=12):
    """(model, x, y): a net with opinions, of whose images about two thirds are labelled as it says."""
    model, (x, _) = net(opinion=3.0), batch(n)
    y = predict(model, x).argmax(1)
    y[::3] = (y[::3] + 1) % 4
    return model, x, y


# -- sorting -----------------------------------------------------------------------------------------------------------


def test_the_spread_is_numpys_and_signed():
    p, y = answers()
    wanted = p.numpy().std(1) * np.where(p.numpy().argmax(1) == y.numpy(), 1, -1)
    np.testing.assert_allclose(spread(p, y).numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("average", [0.0, 0.1, 0.3, 0.95, 1.0])
def test_the_groups_are_those_of_the_rule(average):
    p, y = answers()
    v = spread(p, y).numpy()
    threshold = max(0, np.quantile(v.astype(np.float32), 1 - average))
    with mining(Mined(average)) as mined:
        outlier, boundary, robust = (index.tolist() for index in Mining().sort(p, y))
    assert outlier == np.flatnonzero(v < 0).tolist()
    assert robust == np.flatnonzero(v > threshold).tolist()
    assert sorted(outlier + boundary + robust) == list(range(len(y)))
    assert mined.counts == [mined.last] and mined.last == (len(outlier), len(boundary), len(robust))


def test_nothing_is_robust_before_it_has_proved_to_be_and_all_right_ones_at_the_end():
    p, y = answers()
    right = int((p.argmax(1) == y).sum())
    with mining(Mined(0.0)) as first, mining(Mined(1.0)) as last:
        Mining().sort(p, y)
        assert last.last == (len(y) - right, 0, right)
    with mining(first):
        Mining().sort(p, y)
    assert first.last == (len(y) - right, right, 0)


def test_the_average_goes_to_gamma_times_the_accuracy():
    with mining() as mined:
        for step in range(1, 30):
            Mining(gamma=0.5, memory=0.9).learn(6, 8)
            assert mined.average == pytest.approx(0.5 * 0.75 * (1 - 0.9**step), rel=1e-12)


def test_shares_add_up_and_are_nothing_before_the_first_batch():
    p, y = answers()
    with mining() as mined:
        assert mined.now == mined.shares == {}
        Mining().sort(p, y)
        Mining().sort(p[:10], y[:10])
    assert sum(mined.now.values()) == pytest.approx(1) and sum(map(sum, mined.counts)) == 50 and sum(mined.last) == 10


def test_outside_of_a_run_every_batch_is_the_first():
    model, x, y = setting()
    one, two = (BULLET(model, x, y, generator()) for _ in range(2))
    assert torch.equal(one, two)
    with mining() as mined:
        BULLET(model, x, y, generator())
    assert sum(mined.last) == len(x)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("climbs", [False, True], ids=["label", "divergence"])
def test_every_group_gets_its_own_steps_and_no_image_more(climbs):
    model, x, y = setting()
    target = predict(model, x).softmax(1) if climbs else None
    with mining(Mined(0.3)), count_passes() as passes:
        a = BULLET(model, x, y, generator(), target=target)
    with mining(Mined(0.3)):
        outlier, boundary, robust = Mining().sort(predict(model, x).softmax(1), y)
    assert min(map(len, (outlier, boundary, robust))) > 0
    assert passes.input_gradient == 3 * len(boundary) + len(robust)
    assert passes.forward == (0 if climbs else len(x))
    assert torch.equal(a[outlier], x[outlier])
    drawn = PGD(8).draw(x, generator())
    for perturbation, chosen in ((BULLET.boundary, boundary), (BULLET.robust, robust)):
        part = target[chosen] if climbs else None
        wanted = perturbation.apply(model, x[chosen], y[chosen], drawn[chosen], part)
        assert torch.equal(a[chosen], wanted) and not torch.equal(a[chosen], x[chosen])


def test_outliers_get_steps_where_they_are_given_some():
    model, x, y = setting()
    bullet = replace(BULLET, outlier=PGD(8, 2, 6))
    with mining(Mined(0.3)), count_passes() as passes:
        a = bullet(model, x, y, generator())
    with mining(Mined(0.3)):
        outlier, boundary, robust = Mining().sort(predict(model, x).softmax(1), y)
    assert passes.input_gradient == 2 * len(outlier) + 3 * len(boundary) + len(robust)
    wanted = bullet.outlier.apply(model, x[outlier], y[outlier], PGD(8).draw(x, generator())[outlier])
    assert torch.equal(a[outlier], wanted)
    with mining(Mined(0.3)):
        others = torch.cat([boundary, robust])
        assert torch.equal(a[others], BULLET(model, x, y, generator())[others])


def test_where_all_are_boundary_images_it_is_pgd_bit_for_bit():
    model, x, _ = setting()
    y = predict(model, x).argmax(1)
    assert torch.equal(BULLET(model, x, y, generator()), BULLET.boundary(model, x, y, generator()))


def test_where_all_are_outliers_it_is_nothing():
    model, x, y = setting()
    y = (predict(model, x).argmax(1) + 1) % 4
    with count_passes() as passes:
        assert torch.equal(BULLET(model, x, y, generator()), x)
    assert passes.input_gradient == 0


@pytest.mark.parametrize("objective", [Plain(), Trades(), Mart(), AugMix()], ids=repr)
def test_what_it_learns_is_the_accuracy_of_the_training_pass_on_what_it_returns(objective):
    (model, x, _), weak = setting(), BulletTrain(PGD(1, 2), PGD(1, 1))
    y = training_logits(copy.deepcopy(model), x).argmax(1)  # some of them fall
    twin, drawn = copy.deepcopy(model), generator()
    with mining() as mined:
        objective(model, x, y, weak, generator())
    a = weak(twin, x, y, drawn, target=objective.target(twin, x) if isinstance(objective, Trades) else None)
    views = [mixed(a, generator=drawn) for _ in range(2)] if isinstance(objective, AugMix) else []
    right = (training_logits(twin, torch.cat([a, *views]))[: len(y)].argmax(1) == y).float().mean().item()
    assert 0 < mined.average == pytest.approx(0.1 * 0.8 * right)


def test_robust_accuracy_needs_no_steps_for_what_is_wrong_already():
    images, model = image_set(40, classes=4), net(opinion=3.0)
    still = PGD(8, 3, 4, random_start=False)
    with count_passes() as spared:
        mine = accuracy(model, images, BulletTrain(still, still))
    with count_passes() as full:
        assert accuracy(model, images, still) == mine
    assert spared.input_gradient < full.input_gradient


def test_a_perturbation_of_two_radii_and_shares_beyond_one_are_refused():
    with pytest.raises(ValueError, match="one radius for all, not 4 and 8"):
        BulletTrain(PGD(8), PGD(4))
    with pytest.raises(ValueError, match="one radius for all, not 4 and 8"):
        replace(BULLET, outlier=PGD(4))
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="gamma is a share, 0 to 1"):
            Mining(gamma=bad)
        with pytest.raises(ValueError, match="memory is a share, 0 to 1"):
            Mining(memory=bad)


def test_it_prints_itself_and_shrinks_as_its_parts_do():
    assert eval(repr(BULLET)) == BULLET and hash(BULLET) == hash(replace(BULLET))
    assert shrunk(BULLET, 0.5) == BulletTrain(PGD(4, 3, 2), PGD(4, 1, 4))
    assert shrunk(BULLET, 0.01) == Clean() and shrunk(BULLET, 1) == BULLET
    assert (BULLET.radius, BULLET.passes) == (8, 3)


# -- in training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Plain(), Trades(), Mart()], ids=repr)
def test_a_learner_costs_what_the_shares_say_and_tells_them(objective):
    told, split = [], image_split(classes=4)
    recipe = LearnRecipe(BULLET, "tiny", SGD(steps=6, batch=16), evaluations=1, objective=objective)
    done = fit(split.train, split.test, recipe, lab=Lab(ENGINE, on_step=lambda *how: told.append(how[3]) and None))
    n = 6 * 16
    outlier, boundary, robust = (round(n * done.mined.shares[kind]) for kind in ("outlier", "boundary", "robust"))
    assert outlier + boundary + robust == n
    assert done.passes.input_gradient == 3 * boundary + robust < recipe.cost(len(split.train)).input_gradient
    assert done.passes.training == n * objective.passes
    assert done.passes.forward == len(split.test) + n
    assert np.mean([m["boundary"] for m in told]) == pytest.approx(done.mined.shares["boundary"])
    again = fit(split.train, split.test, recipe, lab=Lab(ENGINE))
    assert again.losses == done.losses  # nothing is left over from the run before


@pytest.mark.whole
def test_a_crafting_that_was_stopped_goes_on_to_the_same_bytes_and_its_average_matters(tmp_path):
    images, shares = image_set(32, classes=4), []

    def stopped(path, at):
        with pytest.raises(Interrupted):
            craft(images, CRAFT, lab=Lab(ENGINE, on_step=lambda what, step, *_: step == at), checkpoint=path)

    whole = craft(images, CRAFT, lab=Lab(ENGINE, on_step=lambda *how: shares.append(how[3].get("outlier")) and None))
    stopped(tmp_path / "state", 7)
    tensors, record = read_tensors(tmp_path / "state", FIELDS)
    assert record["mined"]["average"] > 0 and 0 <= shares[6] <= 1
    assert (last := record["mined"]["counts"][-1])[0] / sum(last) == shares[6]
    rest = craft(images, CRAFT, lab=Lab(ENGINE), checkpoint=tmp_path / "state")
    assert torch.equal(rest.noise, whole.noise) and rest.losses == whole.losses and rest.passes == whole.passes
    write_tensors(tmp_path / "twin", tensors, {**record, "mined": vars(Mined(1.0))})
    assert craft(images, CRAFT, lab=Lab(ENGINE), checkpoint=tmp_path / "twin").losses != whole.losses
