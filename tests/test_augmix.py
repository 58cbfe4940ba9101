"""AugMix: mixtures by seed, the divergence against scipy, the loss against its parts, and passes spared by mining."""

import math

import numpy as np
import pytest
import torch
from nets import batch, net
from photos import image_split
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from semkit.nets.engine import Engine, count_passes, logits, predict
from semkit.nets.lab import Lab
from semkit.training.bullettrain import Mined, Mining, mining
from semkit.training.learning import fit
from semkit.training.objectives import AugMix, disagreement, mixed
from semkit.training.perturb import Clean
from semkit.training.recipes import SGD, LearnRecipe


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def setting(n=12):
    """(model, x, y): a net with opinions, of whose images about two thirds are labelled as it says."""
    model, (x, _) = net(torch.float64, opinion=3.0), batch(n, dtype=torch.float64)
    x = (255 * x).round() / 255
    y = predict(model, x).argmax(1)
    y[::3] = (y[::3] + 1) % 4
    return model, x, y


def test_a_mixture_follows_from_its_generator_alone_and_leaves_torchs_own_alone():
    x, _ = batch(6, size=32)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = mixed(x, 3, generator())
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert torch.equal(one, mixed(x, 3, generator())) and not torch.equal(one, mixed(x, 3, generator(6)))


def test_every_image_has_a_mixture_of_its_own_near_itself():
    x = batch(1, size=32)[0].expand(8, 3, 32, 32)
    out = mixed(x, 3, generator())
    assert out.shape == x.shape and out.dtype == x.dtype and out.min() >= 0 and out.max() <= 1
    assert len({image.numpy().tobytes() for image in out}) == 8
    weak, strong = ((mixed(x, s, generator()) - x).abs().mean() for s in (1, 10))
    assert 0 < weak < strong < 0.5


@pytest.mark.parametrize("k", [2, 3])
def test_the_disagreement_is_scipys_for_two_and_bounded_for_more(k):
    many = torch.randn(k, 20, 5, generator=generator(), dtype=torch.float64) * 3
    found = disagreement(*many)
    p = softmax(many.numpy(), axis=2)
    if k == 2:
        np.testing.assert_allclose(found, jensenshannon(*p, axis=1) ** 2, rtol=1e-9)
    middle = p.mean(0)
    np.testing.assert_allclose(found, (p * np.log(p / middle)).sum(2).mean(0), rtol=1e-9)
    assert 0 < found.min() and found.max() < math.log(k)
    assert disagreement(*[many[0]] * k).abs().max() < 1e-12
    apart = 100 * torch.eye(5, dtype=torch.float64)[:k, None]
    assert disagreement(*apart).item() == pytest.approx(math.log(k))


@pytest.mark.parametrize("mine", [None, Mining()], ids=["plain", "mined"])
def test_the_loss_is_the_sum_it_says_and_the_passes_are_those_it_needs(mine):
    model, x, y = setting()
    _, boundary, robust = range(12), torch.arange(12), ()
    if mine:
        with mining(Mined(0.3)):
            _, boundary, robust = mine.sort(predict(model, x).softmax(1), y)
        assert 0 < len(boundary) < 8 and len(robust) > 0
    draws = generator()
    parts = [x, *(mixed(x[boundary], 3, draws) for _ in range(2))]
    with mining(Mined(0.3)) as mined, count_passes() as passes:
        loss = AugMix(mining=mine)(model, x, y, Clean(), generator())
    assert (passes.training, passes.forward) == (12 + 2 * len(boundary), 12 if mine else 0)
    twin = net(torch.float64, opinion=3.0).train()
    with torch.no_grad():
        clean, *views = logits(twin, torch.cat(parts)).split([12, len(boundary), len(boundary)])
    p = softmax(clean.numpy(), axis=1)
    js = disagreement(clean[boundary], *views).sum().item() / 12
    assert loss.item() == pytest.approx(-np.log(p[range(12), y]).mean() + 12 * js, rel=1e-9)
    if mine:
        stood = sum((view.argmax(1) == y[boundary]).sum().item() for view in views) / 2
        assert mined.average == pytest.approx(0.9 * 0.3 + 0.1 * 0.8 * (len(robust) + stood) / 12)


def test_without_boundary_images_only_the_cross_entropy_is_left():
    model, x, y = setting()
    y = (predict(model, x).argmax(1) + 1) % 4
    with count_passes() as passes:
        loss = AugMix(mining=Mining())(model, x, y, Clean(), generator())
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(logits(net(torch.float64, opinion=3.0).train(), x), y)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12) and passes.training == 12


@pytest.mark.parametrize("mine", [None, Mining()], ids=["plain", "mined"])
def test_a_learner_costs_at_most_what_the_recipe_says(mine):
    split = image_split(classes=4)
    recipe = LearnRecipe(model="tiny", sgd=SGD(steps=6, batch=16), evaluations=1, objective=AugMix(mining=mine))
    done = fit(split.train, split.test, recipe, lab=Lab(Engine("cpu", "float32")))
    most = recipe.cost(len(split.train)).training
    assert done.passes.training == (96 + 2 * round(96 * done.mined.shares["boundary"]) if mine else most) <= most


@pytest.mark.parametrize("bad", [{"weight": -1}, {"severity": 0}, {"severity": 11}, {"severity": 1.5}], ids=repr)
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AugMix(**bad)
