"""Learners: what the curve is of, what the seed decides, AT at radius 0, and the cost against the passes made."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photos import image_set, image_split
from torchvision.transforms.v2 import CenterCrop

from semkit.analysis.measure import losses, robustness, stability
from semkit.analysis.study import learned_net
from semkit.images.augment import Identity, ResizedCrop
from semkit.images.imageset import Split
from semkit.nets.engine import Engine
from semkit.nets.lab import Interrupted, Lab
from semkit.nets.models import build, load_net
from semkit.protections.crafting import CraftRecipe, craft
from semkit.training.learning import accuracy, fit, pretrained_weights
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import SGD, LearnRecipe, Pretrained

ENGINE = Engine("cpu", "float32")
RECIPE = LearnRecipe(model="tiny", sgd=SGD(steps=12, batch=16), evaluations=4)
SIDES = {"em": (Clean(), Clean()), "rem": (PGD(4, 3), PGD(4, 2)), "sem": (Uniform(4), PGD(4, 2))}


def learn(recipe=RECIPE, split=None, seed=0, lab=Lab(ENGINE), **how):  # noqa: B008
    split = split or image_split()
    return fit(split.train, split.test, recipe, seed=seed, lab=lab, **how)


def trace(learned):
    weights = [value.numpy().tobytes() for value in learned.model.state_dict().values()]
    return weights, learned.losses, learned.curve


def test_an_easy_set_is_learned():
    assert learn(replace(RECIPE, sgd=SGD(steps=30, batch=16))).last > 0.95  # chance is .5


def test_test_images_are_seen_at_the_side_of_the_training_ones():
    recipe, images = replace(RECIPE, augment=ResizedCrop(8)), image_set(10, size=13)
    assert torch.equal(recipe.tested(images).images, CenterCrop(8)(images.images))
    assert recipe.tested(image_set(10, size=6)).images.shape[2:] == (8, 8)
    assert recipe.tested(image_set(10)).images.shape == RECIPE.tested(image_set(10)).images.shape == (10, 3, 8, 8)
    split = image_split(size=12, classes=3)
    done = learn(recipe, split)
    assert done.last == accuracy(done.model, split.test.centre(8))
    assert done.last != accuracy(done.model, split.test)


@pytest.mark.whole
@pytest.mark.parametrize("size", [12, 24])
def test_a_net_for_one_size_learns_from_resized_crops_and_is_kept(tmp_path, size):
    pytest.importorskip("timm")
    recipe = replace(RECIPE, model="deit_tiny", augment=ResizedCrop(16), sgd=SGD(steps=1, batch=8))
    images, net = image_set(8, size), tmp_path / "net.st"
    row, _ = learned_net(images, images, recipe, file=net, lab=Lab(ENGINE))
    assert accuracy(load_net(net, ENGINE), recipe.tested(images)) == row["last"]


def test_adversarial_training_at_radius_0_is_erm_bit_for_bit():
    assert trace(learn(replace(RECIPE, perturbation=PGD(0)))) == trace(learn())
    assert trace(learn(replace(RECIPE, perturbation=PGD(1, 1)))) != trace(learn())


def test_the_seed_decides_everything():
    hard = image_split(classes=3)
    assert trace(learn(split=hard, seed=4)) == trace(learn(split=hard, seed=4))
    assert learn(split=hard, seed=4).curve != learn(split=hard, seed=5).curve


def test_the_curve_ends_with_the_accuracy_of_the_model_that_is_returned():
    split = image_split(classes=3)
    for steps, evaluations, points in ((12, 4, [3, 6, 9, 12]), (7, 3, [3, 6, 7]), (2, 5, [1, 2])):
        done = learn(replace(RECIPE, sgd=SGD(steps=steps, batch=16), evaluations=evaluations), split)
        assert [step for step, _ in done.curve] == points
        assert done.last == done.curve[-1][1] == accuracy(done.model, split.test)
        assert done.best == max(value for _, value in done.curve) >= done.last


@pytest.mark.whole
def test_an_adversarially_trained_learner_is_judged_on_clean_images():
    split = image_split(classes=3)
    done = learn(replace(RECIPE, perturbation=PGD(4, 2), sgd=SGD(steps=30, batch=16)), split)
    assert done.last == accuracy(done.model, split.test)
    assert done.last > accuracy(done.model, split.test, PGD(64, 5))  # which is not what protection means


def test_a_stopped_learner_is_no_learner():
    told = []
    with pytest.raises(Interrupted, match="stopped while training, 5 of 12"):
        learn(lab=Lab(ENGINE, on_step=lambda what, step, *_: told.append(step) or step == 5))
    assert told == [1, 2, 3, 4, 5]


def test_accuracy_is_the_share_of_right_labels_whatever_the_batch():
    model, images = ENGINE.prepare(build("tiny", 2)).eval(), image_set(30)
    with torch.no_grad():
        right = (model(images.images.float() / 255).argmax(1) == images.labels).float().mean().item()
    assert [accuracy(model, images, batch=batch) for batch in (7, 30, 500)] == pytest.approx([right] * 3)


@pytest.mark.parametrize("measured", [accuracy, losses])
@pytest.mark.parametrize("batch", [-1, 0, 1.5])
def test_a_measure_over_batches_that_cannot_be_is_refused_and_is_no_number_by_chance(measured, batch):
    with pytest.raises(ValueError, match="batch must be a whole number >= 1"):
        measured(build("tiny", 2), image_set(4), batch=batch)


@pytest.mark.parametrize("measured", [accuracy, losses, robustness, stability])
def test_a_measure_of_no_images_says_so_and_is_not_nan(measured):
    with pytest.raises(ValueError, match="an image or more"):
        measured(build("tiny", 2), image_set(4).take([]))


def test_a_training_that_diverged_is_no_protection():
    split, hot = image_split(16), SGD(steps=9, batch=8, lr=1e30)
    recipe = CraftRecipe(*SIDES["em"], steps=1, samples=1, surrogate="tiny", sgd=hot)
    for made in (lambda: learn(replace(RECIPE, sgd=hot), split), lambda: craft(split.train, recipe, lab=Lab(ENGINE))):
        with pytest.raises(ValueError, match="the training diverged, its loss is"):
            made()


def test_one_image_or_none_is_too_few_to_train_on():
    images = image_set(16)
    recipe = CraftRecipe(*SIDES["em"], steps=1, samples=1, surrogate="tiny", sgd=SGD(steps=1, batch=8))
    for few in (images.take([]), images.take([0])):
        for made in (lambda: learn(split=Split(few, images)), lambda: craft(few, recipe, lab=Lab(ENGINE))):  # noqa: B023
            with pytest.raises(ValueError, match="training needs 2 images or more, got "):
                made()


@pytest.mark.parametrize(
    "other", [dict(classes=("b", "a")), dict(images=image_set(16, 16).images)], ids=["names", "size"]
)
def test_a_learner_is_not_tested_on_images_of_other_classes_or_another_size(other):
    train = image_set(16)
    with pytest.raises(ValueError, match="test images must have the classes and size of the training images"):
        learn(split=Split(train, replace(train, **other)))


def test_a_seed_from_numpy_is_the_same_seed_and_half_a_seed_is_none():
    assert trace(learn(seed=np.int64(3))) == trace(learn(seed=3))
    for half in (0.5, None, "1"):
        with pytest.raises(ValueError, match="seed must be a whole number >= 0"):
            learn(seed=half)


def test_learner_and_surrogate_of_one_seed_start_from_other_weights():
    still = SGD(steps=2, batch=8, lr=0.0)
    images = image_set(16)
    recipe = CraftRecipe(*SIDES["em"], steps=1, samples=1, surrogate="tiny", sgd=still)
    surrogate = craft(images, recipe, seed=3, lab=Lab(ENGINE)).surrogate
    learner = fit(images, images, LearnRecipe(model="tiny", sgd=still), seed=3, lab=Lab(ENGINE)).model
    for ours, theirs in zip(learner.parameters(), surrogate.parameters(), strict=True):
        assert ours.dim() < 2 or not torch.equal(ours, theirs)


def test_learner_and_surrogate_of_one_seed_see_the_images_in_other_orders():
    orders = []
    for seed in (3, ENGINE.generator(3, "learner").initial_seed()):
        orders.append([index.tolist() for _, index in SGD(steps=2, batch=8).batches(16, seed, ENGINE)])
    assert orders[0] != orders[1]


def test_noise_on_the_training_images_leaves_the_test_images_alone():
    split = image_split()
    noise = torch.full(split.train.images.shape, 8, dtype=torch.int8)
    done = learn(split=Split(split.train.with_noise(noise), split.test))
    assert done.last == accuracy(done.model, image_split().test)
    assert split.test.fingerprint == image_split().test.fingerprint


@pytest.mark.parametrize("n", [*(pytest.param(n, marks=pytest.mark.whole) for n in (5, 16)), 21])
@pytest.mark.parametrize(("method", "class_wise"), list(itertools.product(SIDES, [False, True])))
def test_crafting_costs_what_the_recipe_says(n, method, class_wise):
    recipe = CraftRecipe(
        *SIDES[method], steps=2, samples=2, start="warm", class_wise=class_wise, augment=Identity(), surrogate="tiny",
        sgd=SGD(steps=3, batch=8),
    )  # fmt: skip
    assert craft(image_set(n), recipe, lab=Lab(ENGINE)).passes == recipe.cost(n)


def test_crafting_with_a_ramp_costs_what_the_recipe_says():
    few = {"steps": 1, "samples": 2, "start": "warm", "surrogate": "tiny", "sgd": SGD(steps=5, batch=8)}
    recipe = CraftRecipe(*SIDES["rem"], fade_in=0.5, ramp=0.8, **few)
    assert craft(image_set(13), recipe, lab=Lab(ENGINE)).passes == recipe.cost(13)


@pytest.mark.parametrize("n", [5, 16, 21])
@pytest.mark.parametrize("perturbation", [Clean(), PGD(4, 3), PGD(0), Uniform(4)], ids=repr)
def test_learning_costs_what_the_recipe_says(n, perturbation):
    recipe = replace(RECIPE, perturbation=perturbation, sgd=SGD(steps=3, batch=8))
    made = learn(recipe, Split(image_set(n), image_set(10))).passes
    cost = recipe.cost(n)
    assert (made.input_gradient, made.training) == (cost.input_gradient, cost.training)
    assert made.forward == 10 * 3  # evaluations are forward only and no part of the cost


@pytest.mark.parametrize(("seed", "engine"), [(0, ENGINE), (5, ENGINE), (5, Engine("cpu", "float64"))], ids=repr)
def test_a_pretrained_learner_starts_where_another_of_its_seed_and_engine_ended(seed, engine):
    before, split = image_set(40, seed=7), image_split()
    start, still = Pretrained(before, RECIPE), SGD(steps=1, batch=8, lr=0.0)
    ended = fit(before, before, RECIPE, seed=seed, lab=Lab(engine)).model.state_dict()
    recipe = replace(RECIPE, pretrained=start, sgd=still)
    begun = fit(split.train, split.test, recipe, seed=seed, lab=Lab(engine)).model
    assert all(torch.equal(value, ended[name]) for name, value in begun.named_parameters())
    assert before.fingerprint[:24] in repr(start)


BEFORE = image_set(40, seed=7)


def tuned(last_layer, perturbation=Clean()):
    """(the weights a learner began with, where it ended, its cost): one pretrained on other images."""
    start = Pretrained(BEFORE, RECIPE, last_layer=last_layer)
    done = learn(replace(RECIPE, perturbation=perturbation, pretrained=start, sgd=SGD(steps=6, batch=8)))
    return pretrained_weights(start, 0, Lab(ENGINE)), done.model.state_dict(), done.passes


@pytest.mark.whole
@pytest.mark.parametrize("perturbation", [Clean(), PGD(4, 2)], ids=repr)
def test_of_a_last_layer_learner_the_classifier_alone_moves(perturbation):
    begun, ended, passes = tuned(True, perturbation)
    assert {name for name in begun if not torch.equal(begun[name], ended[name])} == {"9.weight", "9.bias"}
    assert passes.training == 6 * 8
    begun, ended, _ = tuned(False, perturbation)
    assert all(not torch.equal(begun[name], ended[name]) for name in begun)  # statistics of norms among them


def test_a_last_layer_learner_is_a_linear_classifier_of_the_features_it_was_given():
    sgd, split = SGD(steps=6, batch=8), image_split(classes=3)
    start = Pretrained(image_set(40, classes=3, seed=7), RECIPE, last_layer=True)
    done = learn(replace(RECIPE, pretrained=start, sgd=sgd, augment=Identity()), split, seed=2)
    features = ENGINE.prepare(build("tiny", 3))
    features.load_state_dict(pretrained_weights(start, 2, Lab(ENGINE)))
    head, features[-1] = features[-1], torch.nn.Identity()
    optimizer = sgd.optimizer(head)
    for step, index in sgd.batches(len(split.train), ENGINE.generator(2, "learner").initial_seed(), ENGINE):
        x, y = split.train.batch(index)
        with torch.no_grad():
            seen = features.eval()(ENGINE.images(x))
        sgd.set_rate(optimizer, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(head(seen), y)
        loss.backward()
        optimizer.step()
        assert done.losses[step] == pytest.approx(loss.item(), rel=1e-4)
    assert torch.allclose(done.model[-1].weight, head.weight, atol=1e-5)


def test_a_pretrained_recipe_says_whether_the_last_layer_alone_learns():
    both = [repr(Pretrained(BEFORE, RECIPE, last_layer=last)) for last in (False, True)]
    assert "last_layer" not in both[0] and both[1] == both[0][:-1] + ", last_layer=True)"


@pytest.mark.parametrize(
    "judged",
    [
        accuracy,
        lambda net, images: accuracy(net, images, PGD(4, 1)),
        losses,
        robustness,
        lambda net, images: fit(images, images, RECIPE, lab=Lab(ENGINE), start=net),
        lambda net, images: fit(images, images, replace(RECIPE, perturbation=PGD(4, 1)), lab=Lab(ENGINE), start=net),
    ],
    ids=["accuracy", "robust accuracy", "losses", "robustness", "training", "adversarial training"],
)
def test_a_net_with_fewer_outputs_than_the_images_have_classes_is_no_wrong_number(judged):
    with pytest.raises(ValueError, match="the net has 2 outputs, the images 3 classes: take a net for them"):
        judged(build("tiny", 2), image_set(12, classes=3))
    assert accuracy(build("tiny", 3), image_set(12)) >= 0  # a net for more classes answers too
