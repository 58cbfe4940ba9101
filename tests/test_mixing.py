"""Mixed images: the labels' weights, the loss by its two cross-entropies, and every draw from the run's own seed."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from nets import batch, net
from photos import image_split

from semkit.analysis.study import grid
from semkit.countermeasures.trainers import ClassBlur, RandomBlur
from semkit.images.pixels import drawn_seed, seeded
from semkit.nets.engine import Engine, logits
from semkit.nets.lab import Lab
from semkit.protections.crafting import Interrupted
from semkit.training.bullettrain import BulletTrain
from semkit.training.learning import fit
from semkit.training.objectives import MIXTURES, Mixed
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
BOTH = pytest.mark.parametrize("by", MIXTURES)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def setting(n=8):
    """(a fresh net for four classes, x, y) in float64; neighbours in the batch are of different classes."""
    return net(torch.float64, opinion=3.0), *batch(n, dtype=torch.float64, size=16)


def share(q, y):
    """lambda, read from the labels of the first mixture."""
    return q[0, y[0]].item()


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_is_of_an_image_and_the_one_before_and_so_are_its_labels(by, seed):
    _, x, y = setting()
    z, q = Mixed(by, 4).mixture(x, y, generator(seed))
    lam = share(q, y)
    assert 0 < lam < 1 and z.dtype == q.dtype == x.dtype
    wanted = np.zeros((8, 4))
    for i in range(8):
        wanted[i, y[i]] += lam
        wanted[i, y[i - 1]] += 1 - lam
    np.testing.assert_allclose(q, wanted, atol=1e-12)
    if by == "mixup":
        np.testing.assert_allclose(z, lam * x + (1 - lam) * x[[7, *range(7)]], atol=1e-12)
    else:
        other = (z != x).any(1)  # no value of one image is another's
        assert torch.equal(z.permute(0, 2, 3, 1)[other], x.roll(1, 0).permute(0, 2, 3, 1)[other])
        assert other.float().mean().item() == pytest.approx(1 - lam) and torch.equal(*other[:2])
        rows, columns = other[0].any(1).sum(), other[0].any(0).sum()
        assert rows * columns == other[0].sum()  # a box


@BOTH
def test_the_loss_is_the_weighted_sum_of_two_cross_entropies(by):
    model, x, y = setting()
    z, q = Mixed(by, 4).mixture(x, y, generator())
    with torch.no_grad():
        answers = logits(model.train(), z)
    own, other = F.cross_entropy(answers, y).item(), F.cross_entropy(answers, y.roll(1)).item()
    ours = Mixed(by, 4)(*setting(), Clean(), generator()).item()
    lam = share(q, y)
    assert ours == pytest.approx(lam * own + (1 - lam) * other, rel=1e-12)
    for twin in (own, other, (1 - lam) * own + lam * other):  # labels forgotten, or the wrong way round
        assert ours != pytest.approx(twin, rel=1e-3)


@BOTH
@pytest.mark.parametrize("attack", [PGD(8, 4), Uniform(8), RandomBlur(), ClassBlur(3, 2)], ids=repr)
def test_a_perturbation_is_of_the_mixture_and_climbs_its_own_loss(by, attack):
    model, x, y = setting()
    g = generator()
    z, q = Mixed(by, 4).mixture(x, y, g)
    a = attack(model, z, q.argmax(1), g, target=q)
    with torch.no_grad():
        wanted = F.cross_entropy(logits(model.train(), a), q).item()
    assert Mixed(by, 4)(*setting(), attack, generator()).item() == pytest.approx(wanted, rel=1e-12)
    if isinstance(attack, PGD):
        losses = {}
        for name, images in (("before", z), ("mixed", a), ("one label", attack(model, z, y.roll(1), generator()))):
            with torch.no_grad():
                losses[name] = F.cross_entropy(logits(model.eval(), images), q).item()
        assert losses["mixed"] > max(losses["before"], losses["one label"])


@BOTH
def test_shares_are_beta_distributed(by):
    x, y = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    for alpha in (0.2, 1, 8):
        g = generator()
        lams = np.array([share(Mixed(by, 2, alpha).mixture(x, y, g)[1], y) for _ in range(150)])
        if by == "mixup":
            assert abs(lams.mean() - 0.5) < 0.1 and lams.var() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.3)
        assert len(set(lams)) > (140 if by == "mixup" else 60) and 0 <= lams.min() and lams.max() <= 1


@BOTH
def test_draws_follow_from_the_given_generator_alone_and_leave_torchs_own_alone(by):
    _, x, y = setting()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = Mixed(by, 4).mixture(x, y, generator())
    assert torch.equal(torch.rand(3), expected)
    again, other = (Mixed(by, 4).mixture(x, y, generator(seed)) for seed in (5, 6))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1]) and not torch.equal(one[0], other[0])


def test_a_lent_generator_is_given_back_after_an_error_and_without_a_source_draws_go_on():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        torch.rand(2)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        one = torch.rand(2)
    with seeded(3):
        assert torch.equal(torch.rand(2), one)
    assert drawn_seed() != drawn_seed() and drawn_seed(generator()) == drawn_seed(generator())


@BOTH
@pytest.mark.parametrize("perturbation", [Clean(), PGD(4, 1)], ids=repr)
def test_a_learner_of_one_seed_is_the_same_to_the_byte_and_costs_what_it_says(by, perturbation):
    split, made = image_split(), []
    recipe = LearnRecipe(perturbation, "tiny", SGD(steps=4, batch=8), evaluations=1, objective=Mixed(by, 2))
    for seed in (0, 0, 1):
        torch.rand(1)  # what torch's own generator does between runs is no matter
        done = fit(split.train, split.test, recipe, seed=seed, lab=Lab(ENGINE))
        made.append((done.losses, *(value.numpy().tobytes() for value in done.model.state_dict().values())))
        assert done.passes.total == recipe.cost(len(split.train)).total
    assert made[0] == made[1] != made[2]
    assert len(set(made[0][0])) == 4


@pytest.mark.whole
def test_a_grid_that_was_stopped_goes_on_to_the_rows_of_one_that_was_not(tmp_path):
    split = image_split()
    learners = {r: LearnRecipe(PGD(r, 1), "tiny", SGD(steps=4, batch=8), evaluations=1) for r in (0, 4)}

    def rows(cache, on_step=None):
        how = dict(countermeasures=["mixup", "cutmix", "colorjitter"])
        found = grid(split, {"clean": None}, learners, lab=Lab(ENGINE, tmp_path / cache, on_step), **how)
        return found.drop(columns=[name for name in found if "seconds" in name])

    told = []
    with pytest.raises(Interrupted):
        rows("stopped", lambda what, step, *_: told.append(what) or ("cutmix" in what and step == 2))
    assert len(set(told)) == 3 and len(list((tmp_path / "stopped").glob("learner-*"))) == 2
    pd.testing.assert_frame_equal(rows("stopped"), rows("whole"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mixed("mixin", 4), "unknown mixture 'mixin'; did you mean mixup"),
        (lambda: Mixed("mixup", 0), "classes must be a whole number >= 1"),
        (lambda: Mixed("mixup", 4, 0), "alpha must be a finite number above 0, got 0"),
        (lambda: Mixed("mixup", 4, float("nan")), "alpha must be a finite number above 0"),
        (lambda: Mixed("mixup", 4)(*setting(), BulletTrain()), "BulletTrain sorts images by their label"),
    ],
)
def test_what_makes_no_sense_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
