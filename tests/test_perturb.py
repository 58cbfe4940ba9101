"""The perturbations against ART, against closed forms, and within their limits."""

import copy

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import batch
from scipy import stats
from torch import nn

from semkit.countermeasures.trainers import ClassBlur, Gaussian, RandomBlur
from semkit.images.pixels import LEVEL, NORMS, random_point
from semkit.nets.engine import count_passes
from semkit.training.bullettrain import BulletTrain, Mined, mining
from semkit.training.perturb import EOT, NFGSM, PGD, Clean, Uniform

ORDER = {"linf": np.inf, "l2": 2, "l1": 1}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lengths(delta, norm):
    return np.array([np.linalg.norm(d.double().numpy().ravel(), ORDER[norm]) for d in delta])


def net(dtype=torch.float32):
    """Opinions strong enough to be attacked."""
    return nets.net(dtype, opinion=30).eval()


# -- against an independent library ------------------------------------------------------------------------------------


def art_pgd(model, x, y, radius, step_size, steps, order):
    from art.attacks.evasion import ProjectedGradientDescentNumpy
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=x.shape[1:],
        nb_classes=4,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentNumpy(
        classifier, norm=order, eps=radius * LEVEL, eps_step=step_size * LEVEL, max_iter=steps, verbose=False
    )
    return torch.from_numpy(attack.generate(x.numpy(), np.eye(4)[y]))


# For l2 the images keep away from the box's walls: ART clips to the box before it projects, we do so after.
@pytest.mark.parametrize(
    ("norm", "radius", "step_size", "steps", "low", "high"),
    [("linf", 8, 1.6, 10, 0, 1), ("linf", 4, 3, 5, 0, 1), ("l2", 64, 12.8, 10, 0.3, 0.7), ("l2", 32, 4, 3, 0.3, 0.7)],
)
def test_pgd_agrees_with_art(norm, radius, step_size, steps, low, high):
    model, (x, y) = net(), batch(8, low, high)
    expected = art_pgd(copy.deepcopy(model), x, y, radius, step_size, steps, ORDER[norm])
    got = PGD(radius, steps, step_size, norm, random_start=False)(model, x, y)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # The same comparison tells one step more or less, and descent from ascent.
    other = PGD(radius, steps - 1, step_size, norm, random_start=False)(model, x, y)
    assert (other - expected).abs().max() > 1e-3
    assert (2 * x - got - expected).abs().max() > 1e-3


# -- closed forms ------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two classes with score difference <w, x>: the loss of class 0 climbs along w everywhere, that of 1 along -w."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.flatten())

    def forward(self, x):
        score = x.flatten(1) @ self.w
        return torch.stack([-score / 2, score / 2], 1)


def best_direction(w, norm, share=0.01):
    if norm == "linf":
        return w.sign()
    if norm == "l2":
        return w / w.pow(2).sum().sqrt()
    largest = w.abs().flatten().argsort(descending=True)[: max(1, int(share * w.numel()))]
    d = torch.zeros(w.numel(), dtype=w.dtype)
    d[largest] = w.flatten()[largest].sign() / len(largest)
    return d.view_as(w)


@pytest.mark.parametrize("steps", [1, 3, 5, 9])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_on_a_linear_model_walks_straight_to_the_sphere(norm, steps):
    # 192 pixels: an l1 step changes one; 432: four.
    for size in (8, 12):
        x, _ = batch(4, 0.3, 0.7, torch.float64, size)
        w, y = torch.randn(3, size, size, generator=generator(7), dtype=torch.float64), torch.tensor([0, 1, 1, 0])
        got = PGD(40, steps, 10, norm, random_start=False)(Linear(w), x, y)
        sign = (1 - 2 * y.double()).view(-1, 1, 1, 1)
        expected = x + min(10 * steps, 40) * LEVEL * sign * best_direction(w, norm)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_linf_pgd_on_a_linear_model_forgets_its_start_and_respects_the_box():
    x, y = batch(4, dtype=torch.float64)[0], torch.tensor([0, 1, 0, 1])
    w = torch.randn(3, 8, 8, generator=generator(7), dtype=torch.float64)
    got = PGD(8, 10, 2)(Linear(w), x, y, generator())
    expected = (x + 8 * LEVEL * (1 - 2 * y.double()).view(-1, 1, 1, 1) * w.sign()).clamp(0, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_n_fgsm_takes_one_step_of_the_radius_from_twice_the_radius_and_leaves_the_ball():
    x, y = batch(4, dtype=torch.float64)[0], torch.tensor([0, 1, 0, 1])
    w = torch.randn(3, 8, 8, generator=generator(7), dtype=torch.float64)
    start = (x + 2 * random_point(x, 8 * LEVEL, "linf", generator(3))).clamp(0, 1)
    expected = (start + 8 * LEVEL * (1 - 2 * y.double()).view(-1, 1, 1, 1) * w.sign()).clamp(0, 1)
    got = NFGSM(8)(Linear(w), x, y, generator(3))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert 20 * LEVEL < (got - x).abs().max() <= 24 * LEVEL
    projected = PGD(8, 1, 8)(Linear(w), x, y, generator(3))
    assert (projected - x).abs().max() <= 8 * LEVEL * (1 + 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_raises_the_loss_above_a_random_point_of_the_same_ball(norm):
    model, (x, y) = net(), batch(16)
    radius = {"linf": 8, "l2": 100, "l1": 3000}[norm]
    losses = [
        F.cross_entropy(model(p(model, x, y, generator())), y).item()
        for p in (Clean(), Uniform(radius, norm), PGD(radius, 10, norm=norm))
    ]
    assert losses[2] > losses[0] + 0.1 and losses[2] > losses[1] + 0.1


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_without_steps_is_its_random_start(norm):
    model, (x, y) = net(), batch()
    got = PGD(20, 0, norm=norm)(model, x, y, generator(3))
    assert torch.equal(got, (x + random_point(x, 20 * LEVEL, norm, generator(3))).clamp(0, 1))
    assert torch.equal(got, Uniform(20, norm)(model, x, y, generator(3)))
    assert torch.equal(PGD(20, 0, norm=norm, random_start=False)(model, x, y), x)


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_is_clean(norm):
    model, (x, y) = net(), batch()
    assert torch.equal(Clean()(model, x, y), x)
    for p in (PGD(0, norm=norm), PGD(0, 3, 1, norm), Uniform(0, norm), NFGSM(0)):
        assert torch.equal(p(model, x, y, generator()), x)


def test_uniform_follows_its_law_and_piles_up_at_the_box():
    half = torch.full((50, 3, 8, 8), 0.5, dtype=torch.float64)
    u = (Uniform(4)(None, half, None, generator()) - half) / LEVEL
    assert stats.kstest(u.flatten(), stats.uniform(-4, 8).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(u.flatten(1)[:, :2].T)[0, 1]) < 0.5
    clipped = Uniform(4)(None, torch.zeros_like(half), None, generator())
    assert (clipped == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


# -- limits ------------------------------------------------------------------------------------------------------------

EVERY = [Clean(), Uniform(8), NFGSM(8), PGD(8, 4, 3)]
EVERY += [p for norm in ("l2", "l1") for p in (Uniform(100, norm), PGD(100, 4, 60, norm))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", EVERY, ids=repr)
def test_ball_box_dtype_and_shape_hold(p, dtype):
    model, (x, y) = net(dtype), batch(dtype=dtype)
    x[:, :, :4] = x[:, :, :4].round()  # half of the pixels at the walls
    kept = x.clone()
    got = p(model, x, y, generator())
    assert got.dtype == dtype and got.shape == x.shape and not got.requires_grad
    assert got.min() >= 0 and got.max() <= 1
    reach = 3 * p.radius if isinstance(p, NFGSM) else p.radius
    assert lengths(got - x, getattr(p, "norm", "linf")).max() <= reach * LEVEL * (1 + 1e-5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", EVERY, ids=repr)
def test_the_model_is_left_as_it_was_and_attacked_in_eval_mode(p, training):
    model, (x, y) = net(), batch()
    expected = p(model, x, y, generator())
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    got = p(model, x, y, generator())
    assert torch.equal(got, expected)
    assert all(m.training is training for m in model.modules())
    assert all(w.grad is None and w.requires_grad for w in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("p", EVERY[1:], ids=repr)
def test_draws_come_from_the_given_generator_only(p):
    model, (x, y) = net(), batch()
    before = torch.get_rng_state()
    a, b, c = (p(model, x, y, generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("x", [255 * batch()[0], batch()[0] - 0.5, batch()[0] * torch.nan, (255 * batch()[0]).byte()])
def test_images_that_are_not_in_0_to_1_are_refused_and_not_cut_to_white(x):
    for p in (PGD(4, 1), Uniform(4), Clean()):
        with pytest.raises(ValueError, match=r"x must be floats in \[0, 1\], got torch"):
            p(net(), x, batch()[1])


def test_pgd_works_where_gradients_are_switched_off():
    model, (x, y) = net(), batch()
    expected = PGD(8)(model, x, y, generator())
    with torch.no_grad():
        assert torch.equal(PGD(8)(model, x, y, generator()), expected)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [*EVERY, PGD(), PGD(4, random_start=False), PGD(127.5, norm="l2")], ids=repr)
def test_a_perturbation_is_a_value_that_prints_itself(p):
    again = eval(repr(p))
    assert again == p and hash(again) == hash(p) and {p: 1}[again] == 1
    with pytest.raises(AttributeError):
        p.radius = 1


def test_different_perturbations_differ():
    others = [PGD(4), PGD(4, 9), PGD(4, step_size=1), PGD(4, norm="l2"), PGD(4, random_start=False), Uniform(4)]
    assert len({*EVERY, *others}) == len(EVERY) + 6


def test_the_default_step_is_a_fifth_of_the_radius():
    assert PGD(4) == PGD(4, step_size=0.8) and PGD(8).step_size == 1.6


COSTS = [
    (Clean(), 0),
    (Uniform(4), 0),
    (PGD(4), 10),
    (PGD(4, 3), 3),
    (PGD(0), 0),
    (PGD(4, 0), 0),
    (NFGSM(4), 1),
    (NFGSM(0), 0),
]


@pytest.mark.parametrize(("p", "passes"), COSTS, ids=repr)
def test_a_perturbation_knows_its_cost(p, passes):
    model, (x, y) = net(), batch()
    with count_passes() as counted:
        p(model, x, y, generator())
    assert p.passes == passes and counted.input_gradient == passes * len(x)


SIDES = Clean(), Uniform(4), NFGSM(4), PGD(4, 3), EOT(4, 3, draws=2), RandomBlur(), Gaussian(), ClassBlur(steps=3)


@pytest.mark.parametrize("side", [*SIDES, BulletTrain()], ids=lambda side: type(side).__name__)
def test_a_perturbation_knows_whether_an_image_depends_on_the_others_of_its_batch(side):
    model, (x, y) = net(torch.float64), batch(8, dtype=torch.float64)
    y = torch.where(y < 2, model(x).argmax(1), y)  # half of them right: of every kind that BulletTrain knows
    drawn = side.draw(x, generator())
    with mining(Mined(average=0.4)):
        alone = torch.cat([side.apply(model, *(part[i : i + 1] for part in (x, y, drawn))) for i in range(8)])
    with mining(Mined(average=0.4)):
        together = side.apply(model, x, y, drawn)
    assert torch.allclose(alone, together, rtol=0, atol=1e-9) is not side.whole_batch


@pytest.mark.parametrize("make", [Uniform, PGD])
def test_bad_settings_are_refused_with_what_to_write(make):
    with pytest.raises(ValueError, match="write pixel levels: 8, not 8/255"):
        make(8 / 255)
    with pytest.raises(ValueError, match="radius"):
        make(-8)
    with pytest.raises(ValueError, match="unknown norm"):
        make(8, norm="l3")


BAD_STEPS = [{"steps": -1}, {"steps": 2.5}, {"step_size": -1}, {"step_size": float("nan")}]


@pytest.mark.parametrize("bad", BAD_STEPS, ids=repr)
def test_bad_steps_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PGD(8, **bad)
