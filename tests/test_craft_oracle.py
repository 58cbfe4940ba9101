"""The noise step and whole crafting runs against a plain float64 loop, in all nine settings, with broken twins.

The loop is written from the published algorithm: images are augmented one at a time, samples follow each other, the
straight-through gradient comes from torch's autograd over the whole graph, and SGD is spelled out. It shares random
draws with semkit.protections.crafting (by asking the same generators in the same order) and the nets, nothing else.
"""

import itertools
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semkit.countermeasures.trainers import ClassBlur
from semkit.images.augment import FlipCrop, ResizedCrop
from semkit.images.imageset import ImageSet
from semkit.nets import engine, models
from semkit.nets.engine import FAST_PATHS, Engine, how_run
from semkit.nets.lab import Lab
from semkit.protections.crafting import CraftRecipe
from semkit.training.bullettrain import BulletTrain, mining
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import SGD

crafting = import_module("semkit.protections.crafting")  # the package's own name `craft` is the function
ENGINE = Engine("cpu", "float64")
LEVEL = 1 / 255
SIDES = {"none": Clean(), "random": Uniform(4), "adversarial": PGD(4, 3, 1.1)}
NINE = list(itertools.product(SIDES, SIDES))
EM, SEM, REM = ("none", "none"), ("random", "adversarial"), ("adversarial", "adversarial")


def recipe_of(noise_side, surrogate_side):
    return CraftRecipe(
        noise_side=SIDES[noise_side],
        surrogate_side=SIDES[surrogate_side],
        radius=8,
        step_size=1.6,
        steps=2,
        samples=3,
        augment=FlipCrop(2),
        surrogate="micro",
        sgd=SGD(steps=5, batch=4, lr=0.1, milestones=(2, 4)),
    )


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """A net small enough for loops, under a name that recipes can use."""
    monkeypatch.setitem(models.MODELS, "micro", lambda classes, size=32: models.small(classes, size, (4, 8)))


def surrogate():
    """A net whose batch statistics are far from a batch's own, so that eval and train mode differ."""
    model, generator = models.build("micro", 3, seed=1), torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
    return ENGINE.prepare(model)


def images(n=10, size=8):
    """Random images with a third of their pixels at or near black or white, where the box cuts."""
    x = torch.randint(-100, 356, (n, 3, size, size), generator=torch.Generator().manual_seed(2))
    return ImageSet(x.clamp(0, 255).to(torch.uint8), torch.arange(n) % 3, ("a", "b", "c"))


def frame(shape):
    """An empty batch with the memory order of the kit's own, so that one generator fills both alike."""
    return torch.empty(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


# -- the reference -----------------------------------------------------------------------------------------------------


def view(image, flip, top, left, pad):
    """One image's own flip and crop."""
    image = image.flip(2) if flip else image
    padded = torch.zeros(3, image.shape[1] + 2 * pad, image.shape[2] + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + image.shape[1], pad : pad + image.shape[2]] = image
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


def views(x, drawn, pad):
    return torch.stack([view(image, *d, pad) for image, *d in zip(x, *drawn, strict=True)])


def perturbed(side, model, z, y, generator, fault=""):
    """z moved as the side asks: not at all, by a uniform draw, or by ascent from one."""
    if side == "none":
        return z
    carried = fault == "carried through the perturbation"
    radius, z = 4 * LEVEL, z if carried else z.detach()
    u = frame(z.shape).uniform_(-radius, radius, generator=generator)
    a = (z + (0 if fault == "start in the middle" else u)).clamp(0, 1)
    if side == "random":
        return a
    for _ in range(3):
        leaf = a.detach().requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
        a = a + (-1 if fault == "inner descent" else 1) * 1.1 * LEVEL * slope.sign()
        if fault != "outside the ball":
            a = torch.minimum(torch.maximum(a, z - radius), z + radius)
        a = a.clamp(0, 1)
    return a


def reference_gradient(model, x, y, delta, recipe, side, generator, fault="", rows=None):
    """The sum over samples of the straight-through gradient of the mean loss, and each sample's draws.

    rows: which delta is an image's own, if they are shared.
    """
    model.train(fault == "train mode")
    delta = delta.detach().requires_grad_()
    total, draws = torch.zeros_like(delta), []
    for _ in range(recipe.samples):
        drawn = recipe.augment.draw(len(x), x.shape[2:], generator)
        if fault == "one crop for all":
            drawn = tuple(d[:1].expand(len(x)) for d in drawn)
        own = y if fault == "noise of the label's row" else rows
        protected = torch.stack([x[i] + delta[i if own is None else own[i]] for i in range(len(x))])
        if fault != "outside the box":  # clamp's gradient at exactly 0 and 1 is not the same in every torch
            protected = torch.where((protected < 0) | (protected > 1), protected.detach().clamp(0, 1), protected)
        z = views(protected, drawn, recipe.augment.pad)
        if fault == "noise of the view":  # stored as if it were that of the image
            z = (views(x, drawn, recipe.augment.pad) + delta).clamp(0, 1)
        a = perturbed(side, model, z, y, generator, fault)
        if fault == "gradient at the unperturbed image":
            a = z
        if fault != "carried through the perturbation":
            a = z + (a - z).detach()
        g = torch.autograd.grad(F.cross_entropy(model(a), y), delta)[0]
        total = g if fault == "last sample only" else total + g
        draws.append(drawn)
    return total, draws


def reference_noise_step(model, x, y, delta, recipe, side, generator, fault="", rows=None):
    g, _ = reference_gradient(model, x, y, delta, recipe, side, generator, fault, rows)
    delta = delta + (1 if fault == "ascent" else -1) * 1.6 * LEVEL * g.sign()
    return delta if fault == "outside the radius" else delta.clamp(-8 * LEVEL, 8 * LEVEL)


def reference_noise(model, x, y, recipe, side, generator):
    delta = frame(x.shape).uniform_(-8 * LEVEL, 8 * LEVEL, generator=generator)
    for _ in range(recipe.steps):
        delta = reference_noise_step(model, x, y, delta, recipe, side, generator)
    return delta


def reference_craft(data, recipe, sides, seed, fault=""):
    """A whole run: noise int8 [N,C,H,W], the surrogate, the losses."""
    model = ENGINE.prepare(models.build("micro", 3, seed))
    velocity = [torch.zeros_like(w) for w in model.parameters()]
    x_all, noise, losses = data.images.double() / 255, torch.zeros(data.images.shape, dtype=torch.int8), []
    for step, index in recipe.sgd.batches(len(data), seed, ENGINE):
        generator, x, y = ENGINE.generator(seed, "step", step), x_all[index], data.labels[index]
        delta = reference_noise(model, x, y, recipe, sides[0], generator)
        noise[index] = (255 * delta).round().to(torch.int8)
        delta = delta if fault == "noise not rounded" else noise[index].double() / 255
        z = views(x + delta, recipe.augment.draw(len(x), x.shape[2:], generator), recipe.augment.pad).clamp(0, 1)
        model.train(fault == "attacked in train mode")
        a = perturbed(sides[1], model, z, y, generator)
        model.train()
        loss = F.cross_entropy(model(a), y)
        rate = 0.1 * (1 if step < 2 else 0.1 if step < 4 else 0.01)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for w, v, g in zip(model.parameters(), velocity, gradients, strict=True):
            v.mul_(0.9).add_(g + 5e-4 * w.detach())
            w.data -= rate * v
        losses.append(loss.item())
    for part, first in enumerate(range(0, len(data), 4)):
        index = torch.arange(first, min(first + 4, len(data)))
        if fault == "stale last batch" and len(index) < 4:
            break
        generator = ENGINE.generator(seed, "remake", part)
        delta = reference_noise(model, x_all[index], data.labels[index], recipe, sides[0], generator)
        noise[index] = (255 * delta).round().to(torch.int8)
    return noise, model, losses


# -- one noise step ----------------------------------------------------------------------------------------------------


def difference(sides, fault=""):
    """How far our noise step is from the reference's, after the same draws, from noise that fills the ball."""
    recipe, data = recipe_of(*sides), images(6)
    x, y = ENGINE.images(data.images), data.labels
    delta = frame(x.shape).uniform_(-8 * LEVEL, 8 * LEVEL, generator=torch.Generator().manual_seed(3))
    ours = crafting.noise_step(surrogate(), x, y, delta, recipe, ENGINE.generator(5))
    reference = reference_noise_step(surrogate(), x, y, delta, recipe, sides[0], ENGINE.generator(5), fault)
    return (ours - reference).abs().max().item()


@pytest.mark.parametrize("sides", NINE, ids="-".join)
def test_a_noise_step_agrees_with_the_loop(sides):
    assert difference(sides) <= 1e-9


@pytest.mark.parametrize(
    ("sides", "fault"),
    [
        (SEM, "carried through the perturbation"),
        (SEM, "gradient at the unperturbed image"),
        (SEM, "outside the box"),
        (SEM, "outside the radius"),
        (SEM, "one crop for all"),
        (SEM, "noise of the view"),
        (SEM, "noise of the label's row"),
        (SEM, "last sample only"),
        (SEM, "train mode"),
        (SEM, "ascent"),
        (REM, "carried through the perturbation"),
        (REM, "train mode"),
        (REM, "start in the middle"),
        (REM, "inner descent"),
        (REM, "outside the ball"),
    ],
    ids=str,
)
def test_a_loop_with_a_fault_does_not_agree(sides, fault):
    assert difference(sides, fault) > 1e-3


@pytest.mark.parametrize("sides", NINE, ids="-".join)
def test_no_gradient_of_the_loop_is_so_small_that_rounding_could_turn_its_sign(sides):
    data = images(6)
    x, generator = ENGINE.images(data.images), torch.Generator().manual_seed(3)
    delta = frame(x.shape).uniform_(-8 * LEVEL, 8 * LEVEL, generator=generator)
    g, _ = reference_gradient(surrogate(), x, data.labels, delta, recipe_of(*sides), sides[0], ENGINE.generator(5))
    assert g[g != 0].abs().min() > 1e-10 and (g != 0).double().mean() > 0.5


@pytest.mark.parametrize("side", SIDES)
def test_the_noise_of_a_batch_agrees_with_the_loop(side):
    recipe, data = recipe_of(side, "none"), images(6)
    x, y = ENGINE.images(data.images), data.labels
    stored = ENGINE.images(torch.zeros(x.shape, dtype=torch.int8))
    ours = crafting.noise_of_batch(surrogate(), x, y, stored, recipe, ENGINE.generator(5))
    reference = reference_noise(surrogate(), x, y, recipe, side, ENGINE.generator(5))
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)


WIDEST = 3 * 8 * 8 * 8  # bytes an image: its own, as the first convolution makes four channels of half its sides


@pytest.mark.parametrize("most, wanted", [(0, 1), (2 * 6 * WIDEST, 1), (2 * 6 * WIDEST + 1, 2), (10**6, 3)])
def test_samples_in_one_pass_of_the_net_are_the_samples_one_by_one(most, wanted, monkeypatch):
    monkeypatch.setitem(engine.TENSOR, "cpu", most)
    data, model = images(6), surrogate()
    x, y, delta = ENGINE.images(data.images), data.labels, frame(data.images.shape).zero_()
    for side in SIDES:
        recipe = recipe_of(side, "none")
        ours = crafting.noise_step(model, x, y, delta, recipe, ENGINE.generator(5))
        monkeypatch.setitem(vars(model), "engine", replace(ENGINE, batch_samples=False))
        one_by_one = crafting.noise_step(model, x, y, delta, recipe, ENGINE.generator(5))
        monkeypatch.setitem(vars(model), "engine", ENGINE)
        torch.testing.assert_close(ours, one_by_one, rtol=0, atol=1e-12)
    assert min(3, engine.batches_per_pass(model, x)) == wanted


@pytest.mark.parametrize("size", [4, 8, 16])
def test_how_many_samples_make_a_pass_is_asked_at_the_size_that_the_net_sees(size, monkeypatch):
    monkeypatch.setitem(engine.TENSOR, "cpu", 2 * 6 * WIDEST + 1)
    data, model, given, gradient = images(6), surrogate(), [], crafting.input_gradient
    x = torch.nn.functional.interpolate(ENGINE.images(data.images), size)
    recipe = replace(recipe_of(*SEM), augment=ResizedCrop(8), samples=3)
    monkeypatch.setattr(crafting, "input_gradient", lambda m, a, y: given.append(len(a)) or gradient(m, a, y))
    crafting.noise_step(model, x, data.labels, torch.zeros_like(x), recipe, ENGINE.generator(5))
    assert given == [12, 6]


@pytest.mark.parametrize(
    "side", [BulletTrain(PGD(4, 3), PGD(4, 1, 4)), ClassBlur(steps=2)], ids=lambda s: type(s).__name__
)
def test_a_noise_side_that_looks_at_the_whole_batch_gets_one_sample_after_the_other(side):
    data, recipe, found = images(6), replace(recipe_of(*SEM), noise_side=side), []
    x, y, delta = ENGINE.images(data.images), data.labels, frame(data.images.shape).zero_()
    for batched in (True, False):
        model = surrogate()
        model.engine = replace(ENGINE, batch_samples=batched)
        with mining() as mined:
            for _ in range(2):
                delta = crafting.noise_step(model, x, y, delta, recipe, ENGINE.generator(5))
        found.append((delta, mined))
        delta = torch.zeros_like(x)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("path", FAST_PATHS)
def test_a_crafting_that_does_not_take_a_fast_path_makes_the_same_noise(path):
    slow = replace(ENGINE, **FAST_PATHS[path])
    with_it, without = (crafting.craft(images(6), recipe_of(*SEM), lab=Lab(engine)) for engine in (ENGINE, slow))
    assert torch.equal(with_it.noise, without.noise) and with_it.losses == pytest.approx(without.losses, abs=1e-9)
    told = how_run(with_it.surrogate), how_run(without.surrogate)
    assert "not" not in told[0] and "(switched off)" in told[1]


def test_a_warm_start_begins_at_the_stored_noise_and_zero_at_none():
    data = images(6)
    x, y = ENGINE.images(data.images), data.labels
    stored = ENGINE.images(torch.randint(-8, 9, x.shape, generator=torch.Generator().manual_seed(4)).to(torch.int8))
    for start, delta in (("warm", stored), ("zero", torch.zeros_like(stored))):
        recipe, generator = replace(recipe_of(*SEM), start=start), ENGINE.generator(5)
        ours = crafting.noise_of_batch(surrogate(), x, y, stored, recipe, ENGINE.generator(5))
        for _ in range(2):
            delta = reference_noise_step(surrogate(), x, y, delta, recipe, "random", generator)
        torch.testing.assert_close(ours, delta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_a_class_wise_noise_step_agrees_with_the_loop(side):
    recipe, data, rows = recipe_of(side, "none"), images(6), torch.tensor([1, 0, 1, 1, 2, 0])
    x, y = ENGINE.images(data.images), data.labels
    delta = frame((3, 3, 8, 8)).uniform_(-8 * LEVEL, 8 * LEVEL, generator=torch.Generator().manual_seed(3))
    ours = crafting.noise_step(surrogate(), x, y, delta, recipe, ENGINE.generator(5), rows)
    reference = reference_noise_step(surrogate(), x, y, delta, recipe, side, ENGINE.generator(5), rows=rows)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)
    by_another_row = reference_noise_step(surrogate(), x, y, delta, recipe, side, ENGINE.generator(5), rows=y)
    assert (ours - by_another_row).abs().max() > 1e-3


def test_the_noise_gradient_agrees_with_finite_differences():
    """Without a perturbation the straight-through gradient is the exact one, so differences of the loss give it."""
    data = images(2, size=6)
    x, y, recipe, model = ENGINE.images(data.images), data.labels, recipe_of("none", "none"), surrogate()
    delta = frame(x.shape).uniform_(-4 * LEVEL, 4 * LEVEL, generator=torch.Generator().manual_seed(3))
    g, draws = reference_gradient(model, x, y, delta, recipe, "none", ENGINE.generator(5))

    def loss(d):
        with torch.no_grad():
            protected = (x + d).clamp(0, 1)
            return sum(F.cross_entropy(model(views(protected, drawn, 2)), y).item() for drawn in draws)

    slopes, h = torch.zeros_like(delta), 1e-6
    for place in itertools.product(*map(range, delta.shape)):
        moved = delta.clone()
        moved[place] += h
        up = loss(moved)
        moved[place] -= 2 * h
        slopes[place] = (up - loss(moved)) / (2 * h)
    torch.testing.assert_close(g, slopes, rtol=1e-5, atol=1e-8)
    # The kit's step goes down exactly these slopes, and leaves the pixels alone that no view shows.
    step = crafting.noise_step(model, x, y, delta, recipe, ENGINE.generator(5)) - delta
    assert slopes[slopes.abs() > 1e-7].numel() > 0.5 * slopes.numel()
    down = torch.where(slopes.abs() > 1e-7, -1.6 * LEVEL * slopes.sign(), 0)
    torch.testing.assert_close(step, down, rtol=0, atol=1e-12)


# -- whole runs --------------------------------------------------------------------------------------------------------


def run_difference(sides, fault=""):
    """The largest difference in noise levels, weights and losses of a run of ours and of the reference."""
    recipe, data = recipe_of(*sides), images()
    ours = crafting.craft(data, recipe, seed=6, lab=Lab(ENGINE))
    noise, model, losses = reference_craft(data, recipe, sides, 6, fault)
    state, expected = ours.surrogate.state_dict(), model.state_dict()
    apart = [(state[k].double() - expected[k].double()).abs().max().item() for k in expected]
    apart += [abs(a - b) for a, b in zip(ours.losses, losses, strict=True)]
    return max(*apart, (ours.noise.int() - noise.int()).abs().max().item())


@pytest.mark.parametrize(
    "sides", [pytest.param(s, marks=[pytest.mark.whole] * (s not in (EM, SEM, REM))) for s in NINE], ids="-".join
)
def test_a_whole_run_agrees_with_the_loop(sides):
    assert run_difference(sides) <= 1e-9


@pytest.mark.parametrize("fault", ["noise not rounded", "attacked in train mode", "stale last batch"])
def test_a_run_with_a_fault_does_not_agree(fault):
    assert run_difference(SEM, fault) > 1e-6


def test_a_run_leaves_the_images_alone_and_the_noise_within_its_radius():
    data = images()
    before = data.images.clone()
    made = crafting.craft(data, recipe_of(*SEM), seed=6, lab=Lab(ENGINE))
    assert torch.equal(data.images, before)
    assert made.noise.dtype == torch.int8 and made.noise.shape == data.images.shape and made.noise.abs().max() == 8
