"""Factors of images: known ones are found, promises hold on new images, other libraries say the same."""

import numpy as np
import pytest
import torch
from photos import image_set
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from semkit.lessons.factors import class_rows, dimensions, fitted, pair_rows, pooled, values, withstood
from semkit.lessons.latent import best, latent_model

FOUR = np.eye(4), np.arange(4)


def test_dimensions_of_images_with_known_factors():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 48)) + 1e-4 * rng.standard_normal((400, 48))
    row = dimensions(images.reshape(400, 3, 4, 4))
    assert (row["n"], row["d"], row["components_99%"]) == (400, 48, 5) and 3 < row["participation"] <= 5
    even = np.vstack([np.eye(8), -np.eye(8)])
    assert dimensions(even, shares=(0.5, 1)) == {
        "n": 16, "d": 8, "components_50%": 4, "components_100%": 8, "participation": pytest.approx(8),
    }  # fmt: skip
    labels = rng.integers(0, 2, 400)
    apart = images + 100 * np.outer(labels, np.ones(48))
    assert dimensions(apart)["components_90%"] == 1
    before = apart.copy()
    assert dimensions(apart, labels)["participation"] == pytest.approx(row["participation"], rel=0.05)
    assert np.array_equal(apart, before)
    few = dimensions(rng.standard_normal((10, 48)))
    assert few["components_99%"] <= 9


def test_a_fitted_mixture_keeps_its_promise_on_new_images():
    made, place = latent_model(40, 6, norm=1.5, seed=4), np.linspace(0, 1, 40)
    (x, y), (new, labels) = made.draw(4000, seed=1), made.draw(4000, seed=2)
    model, centre = fitted((x + place).reshape(-1, 2, 4, 5), y, 6)
    for epsilon in (0, 0.8):
        theta, promised = best(model, epsilon)
        held = (labels * ((new + place - centre) @ theta) > epsilon * np.linalg.norm(theta)).mean()
        assert held == pytest.approx(promised, abs=0.02) and promised == pytest.approx(best(made, epsilon)[1], abs=0.02)
    poor, _ = fitted(x, y, 2)
    assert best(poor)[1] < best(model)[1] - 0.03


def test_without_attack_the_rule_is_scikit_learns_discriminant():
    x, y = latent_model(6, 6, norm=1, seed=2).draw(3000)
    lda = LinearDiscriminantAnalysis(solver="eigen").fit(x, y)
    model, centre = fitted(x, y, 6)
    theta, _ = best(model)
    theirs = lda.coef_[0] / np.linalg.norm(lda.coef_[0])
    assert theta == pytest.approx(theirs, abs=1e-6)
    right = withstood(theta, centre, x, y, 0)
    assert abs(right.mean() - lda.score(x, y)) < 0.005


def test_to_withstand_is_to_be_right_after_the_worst_move():
    made = latent_model(12, 4, seed=3)
    x, y = made.draw(500)
    theta, centre = best(made, 0.5)[0], np.linspace(-1, 1, 12)
    worst = x - 0.5 * y[:, None] * theta / np.linalg.norm(theta)
    assert np.array_equal(
        withstood(theta, centre, x.reshape(500, 3, 4) + centre.reshape(3, 4), y, 0.5), worst @ theta * y > 0
    )
    assert withstood(0 * theta, centre, x, y, 9).tolist() == (y > 0).tolist()


def test_rows_of_a_pair_are_the_models_promise_and_what_is_held():
    made = latent_model(36, 5, norm=1.5, seed=4)
    parts = [(x.reshape(-1, 1, 6, 6), 3 + (y > 0)) for x, y in (made.draw(4000, seed=1), made.draw(4000, seed=2))]
    third = [(np.concatenate([x, x[:9]]), np.r_[labels, [7] * 9]) for x, labels in parts]  # another class, left out
    rows = pair_rows(*third, (3, 4), ks=(2, 5), epsilons=(0.5, 1)).to_dict("records")
    assert [(row["k"], row["epsilon"]) for row in rows] == [(2, 0.5), (2, 1), (5, 0.5), (5, 1)]
    for row in rows:
        assert (row["pair"], row["d"], row["n"], row["n_test"]) == ("3/4", 36, 4000, 4000)
        assert row["gap"] == row["standard"] - row["robust"] > 0
        assert row["gap_held"] == pytest.approx(row["standard_held"] - row["robust_held"])
        for name in ("standard", "robust", "gap") if row["k"] == 5 else ():
            assert 0 < row[f"{name}_error"] < 0.01
            assert abs(row[f"{name}_held"] - row[name]) < 3 * row[f"{name}_error"] + 0.01  # mu is an estimate too
    assert rows[2]["standard"] > rows[0]["standard"] + 0.05 and rows[3]["robust"] < rows[2]["robust"]
    alone = pair_rows(*parts, (3, 4), ks=(2,), epsilons=(0.5,))
    assert alone.to_dict("records") == [pytest.approx(rows[0])]


def test_more_pixels_for_the_same_images_is_a_shorter_attack():
    """Every pixel made four: twice as long an image, so an attack of the same length reaches half as far."""
    made = latent_model(16, 4, norm=1.5)
    x, y = made.draw(800)
    small = x.reshape(-1, 1, 4, 4)
    large = small.repeat(2, axis=2).repeat(2, axis=3)

    def row(part, epsilon, **how):
        found = pair_rows((part, y), (part, y), (-1, 1), ks=(4,), epsilons=(epsilon,), **how)
        return found.to_dict("records")[0]

    of = [row(small, 0.4), row(large, 0.8)]
    for name in ("standard", "robust", "gap", "standard_held", "robust_held"):
        assert of[0][name] == pytest.approx(of[1][name], abs=1e-6)
    assert of[1]["d"] == 4 * of[0]["d"]
    assert row(large, 0.4, size=4) == pytest.approx(of[0])


def test_images_are_averaged_as_torch_does_it():
    x = np.random.default_rng(0).random((3, 3, 8, 12))
    assert pooled(x, 4) == pytest.approx(
        torch.nn.functional.interpolate(torch.tensor(x), size=(4, 4), mode="area").numpy()
    )
    assert np.array_equal(pooled(x[..., :8], 8), x[..., :8])


def test_an_image_set_in_and_a_row_a_class_out():
    images = image_set(12, classes=3)
    x, labels = values(images)
    assert x.max() <= 1 and torch.equal(torch.tensor(255 * x).round().byte(), images.images)
    rows = class_rows(x, labels, images.classes).to_dict("records")
    assert [row["class"] for row in rows] == list(images.classes)
    assert rows[1] == {"class": images.classes[1], **dimensions(x[labels == 1])}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: dimensions(np.ones((5, 3))), "images that do not vary have no dimension"),
        (lambda: dimensions(np.ones((1, 3))), "2 images or more"),
        (lambda: dimensions(np.ones((3, 3)), [0, 1]), "a label each"),
        (lambda: fitted(np.eye(4), [1, 1, 1, 1], 1), r"y must be \+1 or -1, and both must occur"),
        (lambda: fitted(np.eye(4), [1, 1, -1, -1], 3), "k must be at most the 2 components that vary, got 3"),
        (lambda: pooled(np.ones((1, 3, 8, 8)), 3), "size must divide 8 and 8, got 3"),
        (lambda: pooled(np.ones((1, 3, 8, 8)), 0), "size must be a whole number >= 1, got 0"),
        (
            lambda: pair_rows((np.eye(4), np.arange(4)), (np.eye(4), np.arange(4)), (0, 9), ks=(1,), epsilons=(1,)),
            "both must",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()
