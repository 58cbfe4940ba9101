"""Figures of images and noise: the pictures are the tensors, and nothing overlaps."""

import numpy as np
import pytest
import torch
from drawn import collisions, drawn_texts, texts
from photos import image_set

from semkit.analysis import pictures
from semkit.analysis.measure import class_means, radial_spectrum

GENERATOR = torch.Generator().manual_seed(0)
NOISES = {m: torch.randint(-8, 9, (12, 3, 8, 8), dtype=torch.int8, generator=GENERATOR) for m in ("em", "sem")}
IMAGES = image_set(12, classes=6)
GROUPS = ["random"] * 4 + ["adversarial, crafting"] * 4 + ["adversarial, testing"] * 4
PLANE = np.random.default_rng(0).normal(size=(12, 2))
FIGURES = {
    "spectrum": lambda: pictures.spectrum_figure(NOISES, title="Spectrum"),
    "class means": lambda: pictures.class_means_figure(NOISES["em"], IMAGES.labels, IMAGES.classes, radius=8),
    "embedding": lambda: pictures.embedding_figure({"PCA": PLANE, "t-SNE": -PLANE}, GROUPS, title="Embedding"),
    "strip": lambda: pictures.strip_figure(IMAGES.images[:3], {m: n[:3] for m, n in NOISES.items()}, radius=8),
    "images": lambda: pictures.images_figure({"one": IMAGES.images, "a long\nlabel": IMAGES.images}, title="Images"),
    "gallery": lambda: pictures.gallery_figure({str(i): IMAGES.images[i] for i in range(11)}, title="Gallery"),
}


@pytest.mark.whole
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_hides_another_or_leaves_the_figure(name):
    figure = FIGURES[name]()
    assert collisions(figure) == ([], []) and len(drawn_texts(figure)) >= 3
    assert figure.get_size_inches()[0] <= 12.5


def test_spectra_are_in_units_of_white_noise():
    (axes,) = pictures.spectrum_figure(NOISES, title="t").axes
    noise = NOISES["sem"].double()
    frequency, power = radial_spectrum(noise)
    assert axes.lines[1].get_xydata().T == pytest.approx(
        np.stack([frequency, power.mean(0) / float(noise.square().mean())])
    )
    assert set(axes.lines[2].get_ydata()) == {1} and axes.get_yscale() == "log"
    assert texts(axes)[:2] == ["EM", "SEM"] and "cycles per pixel" in axes.get_xlabel()


def test_class_means_are_stretched_by_the_scale_of_the_title():
    labels = IMAGES.labels.clone()
    labels[labels == 3] = 1
    figure = pictures.class_means_figure(NOISES["em"], labels, IMAGES.classes, radius=8)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_xlabel() for axes in shown] == ["a", "b", "c", "e", "f"]
    _, means = class_means(NOISES["em"], labels)
    scale = np.quantile(np.abs(means), 0.98)
    assert f"radius 8: ±{scale:.1f} levels as black and white" in figure.get_suptitle()
    for axes, mean in zip(shown, means, strict=True):
        grey = np.moveaxis(np.asarray(axes.images[0].get_array(), float), -1, 0)
        back = (grey - 127.5) * scale / 127.5
        assert back == pytest.approx(mean.clip(-scale, scale), abs=0.51 * scale / 127.5)


def test_the_strip_shows_originals_protected_images_and_noise_of_any_depth():
    noise = NOISES["em"][:2].clone()
    noise[0, :, 0, 0] = torch.tensor([-8, 0, 8], dtype=torch.int8)
    figure = pictures.strip_figure(IMAGES.images[:2], {"em": noise}, radius=8)
    drawn = np.array([axes.images[0].get_array() for axes in figure.axes]).reshape(3, 2, 8, 8, 3)
    original = IMAGES.images[:2].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(drawn[0], original)
    expected = np.clip(original.astype(int) + noise.permute(0, 2, 3, 1).numpy(), 0, 255)
    assert np.array_equal(drawn[1], expected)
    assert drawn[2, 0, 0, 0].tolist() == [0, 128, 255]
    grey = pictures.strip_figure(IMAGES.images[:2, :1], {"em": noise[:, :1]}, radius=8)
    assert grey.axes[0].images[0].get_array().shape == (8, 8)


def test_rows_of_images_are_drawn_as_they_are():
    images = image_set(3).images
    figure = pictures.images_figure({"original": images, "inverted": 255 - images}, title="Images")
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(drawn) == 6 and np.array_equal(drawn[4], 255 - images[1].permute(1, 2, 0).numpy())
    assert [axes.get_ylabel() for axes in figure.axes] == ["original", "", "", "inverted", "", ""]
    assert torch.equal(images, image_set(3).images)


def test_a_gallery_has_a_place_for_every_picture():
    named = {name: torch.full((3, 8, 8), 20 * i, dtype=torch.uint8) for i, name in enumerate("abcde")}
    axes = pictures.gallery_figure(named, columns=3, title="five").axes
    assert [place.get_xlabel() for place in axes if place.axison] == list("abcde") and len(axes) == 6
    assert all(int(axes[i].images[0].get_array().max()) == 20 * i for i in range(5))


def test_an_embedding_has_a_panel_a_view_and_a_look_a_group():
    figure = pictures.embedding_figure({"PCA": PLANE, "t-SNE": -PLANE}, GROUPS, title="t")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("PCA", "t-SNE") and texts(right) == list(dict.fromkeys(GROUPS))
    assert left.lines[1].get_xydata() == pytest.approx(PLANE[4:8])
    assert right.lines[2].get_xydata() == pytest.approx(-PLANE[8:])
    assert len({line.get_color() for line in left.lines}) == 3
    (alone,) = pictures.embedding_figure({"PCA": PLANE}, GROUPS, joined=(GROUPS[4], GROUPS[8]), title="t").axes
    assert [line.get_xydata().tolist() for line in alone.lines[:4]] == [PLANE[[i, i + 4]].tolist() for i in range(4, 8)]
    assert texts(alone) == list(dict.fromkeys(GROUPS))
