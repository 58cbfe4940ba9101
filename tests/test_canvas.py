"""A figure on a page, in light and dark and for those who cannot see it, and as a file; the look of a method."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from drawn import collisions
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from semkit.analysis import canvas
from semkit.analysis.canvas import styles
from semkit.analysis.designs import noise_sides, pairs
from semkit.protections.methods import SIDES


def drawn():
    """8 x 4 inches with a line in it."""
    figure = canvas.new_figure(8, 4)
    figure.subplots().plot([0, 1])
    return figure


def pictured():
    """8 x 4 inches with an image in it, of more colours than a palette of 256 holds."""
    figure = canvas.new_figure(8, 4)
    figure.subplots().imshow(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), interpolation="nearest")
    return figure


class Page(HTMLParser):
    """The tags with their attributes, and the text, of some HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_shown_figure_has_alternative_text_and_caption_whatever_is_in_them():
    alt, caption = 'SEM < EM & "REM"', "<script>alert(1)</script> & so on"
    formats, _ = DisplayFormatter().format(canvas.show(drawn(), alt=alt, caption=caption))
    assert formats["text/plain"] == alt
    page = Page(formats["text/html"])
    assert [tag for tag, _ in page.tags] == ["figure", "img", "figcaption"]
    assert page.tags[1][1]["alt"] == alt and page.text == caption
    assert [tag for tag, _ in Page(canvas.show(drawn(), alt=alt).html).tags] == ["figure", "img"]


@pytest.mark.whole
def test_an_image_is_twice_as_dense_as_the_page_on_opaque_white_and_keeps_its_colours():
    kind, data = picture(canvas.as_html(pictured(), "alt"))
    with Image.open(io.BytesIO(data)) as image:
        assert kind == "data:image/png" and image.size == (1600, 800)  # on the page it is 800 wide
        rgba = np.asarray(image.convert("RGBA"))
    assert (rgba[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() and (rgba[..., 3] == 255).all()
    assert len({tuple(pixel) for pixel in rgba.reshape(-1, 4)}) > 2000


def test_a_drawing_is_a_small_svg_on_white_whose_text_is_text_and_the_same_in_every_run():
    figure = canvas.titled(drawn(), "What is to be seen")
    kind, data = picture(canvas.as_html(figure, "alt"))
    assert kind == "data:image/svg+xml" and b">What is to be seen</text>" in data and len(data) < 20_000
    assert b"fill: #ffffff" in data[: data.index(b"axes_1")]
    assert picture(canvas.as_html(canvas.titled(drawn(), "What is to be seen"), "alt"))[1] == data


@pytest.mark.parametrize("figure", [drawn, pictured])
def test_a_figure_is_on_white_and_the_caption_takes_the_colour_of_the_page(figure):
    page = Page(canvas.as_html(figure(), "alt", "caption"))
    style = page.tags[1][1]["style"]
    assert "background:white" in style and "width:800px" in style and "max-width:100%" in style
    assert all("color" not in attributes.get("style", "") for _, attributes in page.tags)


def test_a_figure_is_saved_at_print_quality_and_an_unknown_format_leaves_no_file(tmp_path):
    figure = drawn()
    canvas.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2400, 1200)
    canvas.show(figure, alt="alt").save(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="supported formats"):
        canvas.save(figure, tmp_path / "a.painting")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png"]


def test_texts_that_collide_would_be_seen():
    figure = canvas.new_figure(3, 2)
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "two")
    figure.text(0.9, 0.1, "too long for this")
    axes = figure.subplots()
    axes.plot([0, 1], label="line")
    axes.legend()
    assert collisions(figure) == ([("one", "two"), ("legend", "axes")], ["too long for this"])


@pytest.mark.parametrize("design", [pairs, noise_sides])
def test_every_method_of_a_design_has_a_look_of_its_own(design):
    methods = design("demo", 32)
    looks = styles(methods)
    assert len({tuple(look.values()) for look in looks.values()}) == len(methods)
    assert {look["color"] for look in looks.values()} <= {"#000000", "#0072B2", "#D55E00", "#009E73"}


def test_a_pair_has_the_colour_of_its_surrogate_side_and_the_marker_of_its_noise_side():
    look = styles([f"{n}/{s}" for n in SIDES for s in SIDES])
    assert all(look[f"{n}/{s}"]["color"] == look[f"none/{s}"]["color"] for n in SIDES for s in SIDES)
    assert all(look[f"{n}/{s}"]["marker"] == look[f"{n}/none"]["marker"] for n in SIDES for s in SIDES)


def test_pairs_of_one_surrogate_side_have_the_colours_of_their_noise_sides():
    look = styles([f"{noise}/adversarial" for noise in SIDES])
    published = styles(SIDES.values())
    assert [one["color"] for one in look.values()] == [one["color"] for one in published.values()]


@pytest.mark.parametrize(("method", "like"), [("random", "sem"), ("adversarial 4 x2", "rem"), ("none 0", "em")])
def test_a_method_named_by_its_noise_side_has_the_colour_of_that_side(method, like):
    look = styles([method, like, "adversarial, testing"])
    assert look[method]["color"] == look[like]["color"] and look["adversarial, testing"]["color"] == canvas.SPARE[0]


def picture(page):
    """Kind and bytes of the picture of a page."""
    kind, data = Page(page).tags[1][1]["src"].split(";base64,")
    return kind, base64.b64decode(data)


def test_dollars_in_the_name_of_a_folder_are_no_formula(tmp_path):
    canvas.save(canvas.titled(canvas.new_figure(2, 1), "photos $^$, 12 images"), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as drawn:
        assert drawn.size[0] > 100
