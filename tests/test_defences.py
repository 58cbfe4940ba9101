"""Blurring against filters: the ascent ascends, its gradient is that of a loop, and random filters are the family's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import batch, net
from scipy import stats

from semkit.analysis.report import read_rows
from semkit.analysis.statistics import interval
from semkit.countermeasures.trainers import LARGEST, ClassBlur, Gaussian, RandomBlur, Smoothed, rescaled
from semkit.nets.engine import Engine, count_passes, logits, predict
from semkit.protections.cuda import blur, convolve


def loss(model, x, y):
    return float(F.cross_entropy(logits(model.eval(), x), y).detach())


def test_rescaling_reaches_from_0_to_1_and_keeps_the_order():
    x = torch.tensor([[[[2.0, 5, 3]]], [[[-1, -1, -1]]]])
    assert torch.allclose(rescaled(x), torch.tensor([[[[0, 1, 1 / 3]]], [[[0, 0, 0]]]]))


def by_hand(model, x, y, how):
    """ClassBlur as a loop over classes, with torch's own transposed convolution."""
    k, filters = how.kernel, {}
    for label in y.tolist():
        filters[label] = torch.zeros(1, 1, k, k, dtype=x.dtype)
        filters[label][..., k // 2, k // 2] = 1

    def filtered():
        each = [F.conv_transpose2d(image[:, None], filters[int(label)], padding=k // 2)[:, 0]
                for image, label in zip(x, y, strict=True)]  # fmt: skip
        return rescaled(torch.stack(each))

    for _ in range(how.steps):
        for weight in filters.values():
            weight.requires_grad_()
        F.cross_entropy(logits(model, filtered()), y).backward()
        filters = {c: (w + how.rate * w.grad).detach().clamp(-LARGEST, LARGEST) for c, w in filters.items()}
    return filtered().detach()


@pytest.mark.parametrize("how", [ClassBlur(3, 3, 5.0), ClassBlur(5, 2, 2.0)], ids=repr)
def test_the_ascent_is_that_of_a_loop_with_a_transposed_convolution_per_class(how):
    model, (x, y) = net(torch.float64, opinion=5).eval(), batch(dtype=torch.float64)
    assert torch.allclose(how(model, x, y), by_hand(model, x, y, how), atol=1e-9)


def test_the_ascent_ascends_and_images_of_a_class_share_a_filter():
    model, (x, y) = net(opinion=5), batch(12)
    x[4], y[4] = x[0], y[0]
    before, after = rescaled(x), ClassBlur(3, 10, 1.0)(model, x, y)
    assert loss(model, after, y) > loss(model, before, y) + 0.05
    assert torch.allclose(after[0], after[4], atol=1e-6) and not torch.allclose(after[0], before[0], atol=1e-2)
    assert after.shape == x.shape and 0 <= after.min() and after.max() <= 1


def test_soft_labels_are_climbed_and_sharp_ones_are_labels():
    model, (x, y) = net(torch.float64, opinion=5), batch(6, dtype=torch.float64)
    how, sharp = ClassBlur(3, 3, 5.0), F.one_hot(y, 4).double()
    assert torch.allclose(how(model, x, y, target=sharp), how(model, x, y), atol=1e-12)
    assert not torch.allclose(how(model, x, y, target=sharp.roll(1, 0)), how(model, x, y), atol=1e-4)
    blurs = (RandomBlur()(None, x, y, torch.Generator().manual_seed(1), target) for target in (None, sharp))
    assert torch.equal(*blurs)


def test_no_step_is_rescaling_alone_and_every_step_is_a_pass():
    model, (x, y) = net(), batch()
    assert torch.equal(ClassBlur(5, 0)(model, x, y), rescaled(x))
    with count_passes() as passes:
        ClassBlur(3, 4)(model, x, y)
    assert passes.input_gradient == 4 * len(x) == ClassBlur(3, 4).passes * len(x)


def test_a_steep_ascent_stays_within_its_clip_and_weights_get_no_gradient():
    model, (x, y) = net(opinion=50), batch()
    found = ClassBlur(3, 5, 1e6)(model, x, y)
    assert torch.isfinite(found).all() and not found.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_random_blur_draws_a_filter_of_the_family_for_every_image():
    x = torch.zeros(400, 3, 9, 9)
    x[:, :, 4, 4] = 1  # a point alone shows its filter
    found = RandomBlur(3, 0.4)(None, x, None, torch.Generator().manual_seed(0))[:, 0, 3:6, 3:6]
    ones = found == 1
    assert (ones.sum((1, 2)) == 1).all() and set(ones.flatten(1).int().argmax(1).tolist()) == set(range(9))
    rest = found[~ones]
    assert rest.max() < 0.4 and rest.min() >= 0 and abs(rest.mean() - 0.2) < 0.01
    assert len({image.numpy().tobytes() for image in found}) == 400


def test_random_blur_is_seeded_and_convolves():
    x = batch(5)[0]
    draws = [RandomBlur()(None, x, None, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    point = torch.zeros_like(x)
    point[:, :, 4, 4] = 1
    filters = RandomBlur()(None, point, None, torch.Generator().manual_seed(1))[:, 0, 3:6, 3:6]
    assert torch.allclose(draws[0], convolve(x, filters), atol=1e-6)
    assert not torch.allclose(draws[0], blur(x, filters), atol=1e-2)


def test_gaussian_noise_is_seeded_of_its_sigma_and_not_cut_off():
    x = batch(200, size=16)[0]
    one, again, other = (Gaussian(51)(None, x, None, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    noise, cut_off = ((255 * (values - x)).double().flatten()[::5].numpy() for values in (one, one.clamp(0, 1)))
    assert stats.kstest(noise, "norm", (0, 51)).pvalue > 0.01 > stats.kstest(cut_off, "norm", (0, 51)).pvalue
    assert torch.equal(Gaussian(0)(None, x, None), x) and Gaussian().sigma == 127.5


ENGINE = Engine("cpu", "float64")


class Plane(torch.nn.Module):
    """Class 1 where w x > threshold, else class 0."""

    def __init__(self, w, threshold):
        super().__init__()
        self.w, self.threshold = torch.nn.Parameter(w), threshold

    def forward(self, x):
        above = x.flatten(1) @ self.w - self.threshold
        return torch.stack([-above, above], 1)


@pytest.mark.whole
def test_the_votes_on_a_plane_are_binomial_with_the_normal_share_on_its_side():
    x, w = batch(5, dtype=torch.float64)[0], torch.linspace(-1, 1, 3 * 8 * 8, dtype=torch.float64)
    away = x.flatten(1) @ w
    net = ENGINE.prepare(Plane(w, away.mean().item()))
    share = torch.special.ndtr((away - away.mean()) / (0.2 * w.norm()))
    votes = Smoothed(net, Gaussian(51), copies=4000)(x)
    assert (votes.sum(1) == 4000).all()
    assert (abs(votes[:, 1] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5 + 1e-9).all()
    assert ((votes[:, 1] > 40) & (votes[:, 1] < 3960)).sum() >= 3  # the test could fail
    assert torch.equal(predict(Smoothed(net, Gaussian(51), 8, seed=3), x), Smoothed(net, Gaussian(51), 8, seed=3)(x))
    assert torch.equal(Smoothed(net, Gaussian(0), 3)(x).argmax(1), predict(net, x).argmax(1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Gaussian(8 / 255), "sigma=0.0313725 looks like a fraction"),
        (lambda: Smoothed(ENGINE.prepare(net()), Gaussian(), 0), "copies must be a whole number >= 1"),
        (lambda: ClassBlur(1), "kernel must be a whole number >= 2"),
        (lambda: ClassBlur(3, -1), "steps must be a whole number"),
        (lambda: RandomBlur(1), "kernel must be"),
        (lambda: RandomBlur(3, 0), "strength must be above 0 and at most 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


LEFT = {"random blur": 22, "smoothing": 1, "fine-tuned": 20, "last layer": 4, "AT L2 0.5": 4, "DAT": 1}  # in points


def test_what_is_left_after_a_defence():
    rows = read_rows(Path(__file__).parents[1] / "results" / "cuda" / "defences.csv")
    last = rows.pivot(index="seed", columns=["learner", "method"], values="last")
    assert last.size == len(rows) == 36
    for defence, points in LEFT.items():
        left = interval(100 * (last[defence, "clean"] - last[defence, "cuda .3"]))
        assert round(left[0]) == points and (left[0] >= 15) == (defence in ("random blur", "fine-tuned"))
        assert (left[1] > 0) == (defence != "smoothing")
