"""Lesson 2: a film of noise arising can be kept and drawn, and the test images tell noise from picture."""

from dataclasses import replace

import pytest
import torch

from semkit.analysis.measure import losses
from semkit.images.loading import load
from semkit.lessons.panels import film_panel
from semkit.lessons.unlearnable import filmed, noise_towards, reading_rows, readings, readings_figure
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.methods import craft_recipe
from semkit.training.recipes import SGD

SPLIT = load("shapes")
TRAIN, TEST = SPLIT.train.limit(40), SPLIT.test.limit(20)
QUICK = replace(craft_recipe("em", "quick", radius=6), sgd=SGD(steps=6, batch=20))
LAB = Lab(Engine("cpu", "float32"))


@pytest.fixture(scope="module")
def film():
    return filmed(TRAIN, QUICK, every=2, lab=LAB)


@pytest.fixture(scope="module")
def surrogate():
    return QUICK.crafted(TRAIN, lab=LAB)[2]


def test_a_film_shows_noise_from_the_first_step_to_the_last(film):
    assert list(film.frames) == list(film.progress.right) == [1, 2, 4, 6]
    size = [noise.abs().float().mean() for noise in film.frames.values()]
    assert size[0] < size[-1] and film.frames[6].abs().max() <= 6
    _, alt, caption = film.draw(1)
    assert alt.startswith("Step 2: the surrogate labels ") and caption.startswith(alt)
    strip = film.strip(frames=4, images=1)
    assert [axes.get_title() for axes in strip.axes[:4]] == ["step 1", "step 2", "step 4", "step 6"]
    shown = [axes.images[0].get_array() for axes in strip.axes[4:8]]
    assert (shown[0] != shown[3]).any() and abs(shown[3].astype(int) - 127).max() > 100  # the noise, stretched


@pytest.mark.whole
def test_a_film_is_kept_and_is_made_too_where_its_noise_was_kept_before(tmp_path, film):
    lab = replace(LAB, cache=tmp_path)
    QUICK.crafted(TRAIN, lab=lab)
    made = filmed(TRAIN, QUICK, every=2, lab=lab)
    assert all(made.frames[step].equal(noise) for step, noise in film.frames.items())
    asked = []
    again = filmed(TRAIN, QUICK, every=2, lab=replace(lab, on_step=lambda *told: asked.append(told)))
    assert not asked and again.progress.right == made.progress.right
    assert all(again.frames[step].equal(noise) for step, noise in made.frames.items())


@pytest.mark.whole
def test_the_play_button_moves_the_film(film):
    panel = film_panel(film.draw, len(film.frames))
    assert "Step 6" in panel.figure.value
    panel.play.value = 0
    assert panel.knobs["frame"].value == 0 and "Step 1" in panel.figure.value


def test_noise_is_made_for_the_labels_that_are_asked_for(surrogate):
    other = (TEST.labels + 1) % 10
    for labels in (TEST.labels, other):
        noise = noise_towards(surrogate, TEST, labels, QUICK)
        before, after = (losses(surrogate, replace(x, labels=labels)).mean() for x in (TEST, TEST.with_noise(noise)))
        assert noise.abs().max() <= 6 and after < before


def test_the_test_images_show_picture_and_noise_together_apart_and_at_odds(surrogate):
    sets = list(readings(surrogate, TEST, QUICK).values())
    clean, own, misled, grey, named = sets
    assert clean is TEST and all(x.labels.equal(TEST.labels) for x in (own, misled, grey))
    assert named.images.equal(misled.images) and named.labels.equal((TEST.labels + 1) % 10)
    change = own.images.int() - TEST.images
    assert 0 < change.abs().max() <= 6 and not own.images.equal(misled.images)
    inside = (TEST.images > 6) & (TEST.images < 249)  # where the box takes nothing
    assert (grey.images.int() - 128)[inside].equal(change[inside])


@pytest.mark.whole
def test_every_learner_of_a_seed_is_asked_the_same(tmp_path):
    split = replace(SPLIT, train=TRAIN, test=TEST)
    rows = reading_rows(split, preset="quick", seeds=[0], tests=20, lab=replace(LAB, cache=tmp_path))
    assert len(rows) == 20 and rows.groupby(["method", "training_radius"]).size().eq(5).all()
    assert rows["right"].between(0, 1).all()
    figure = readings_figure(rows, chance=0.1, title="who reads what")
    assert [axes.get_title() for axes in figure.axes] == ["ERM", "AT 4/255"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(dict.fromkeys(rows["shown"]))


def test_noise_towards_needs_no_whole_batch(surrogate):
    one = noise_towards(surrogate, TEST.limit(10), TEST.limit(10).labels, QUICK)
    assert one.shape == (10, 3, 32, 32) and one.dtype == torch.int8
