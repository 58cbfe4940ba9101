"""A figure on a page, in light and dark and for those who cannot see it, and as a file."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from semkit.analysis import canvas as shown


def drawn():
    """8 x 4 inches with a line in it."""
    figure = shown.new_figure(8, 4)
    figure.subplots().plot([0, 1])
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
    formats, _ = DisplayFormatter().format(shown.show(drawn(), alt=alt, caption=caption))
    assert formats["text/plain"] == alt
    page = Page(formats["text/html"])
    assert [tag for tag, _ in page.tags] == ["figure", "img", "figcaption"]
    assert page.tags[1][1]["alt"] == alt and page.text == caption
    assert [tag for tag, _ in Page(shown.show(drawn(), alt=alt).html).tags] == ["figure", "img"]


def test_the_picture_is_opaque_white_and_the_caption_takes_the_colour_of_the_page():
    page = Page(shown.as_html(drawn(), "alt", "caption"))
    _, image = page.tags[1]
    with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as picture:
        assert picture.size == (800, 400)
        rgba = np.asarray(picture.convert("RGBA"))
    assert (rgba[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() and (rgba[..., 3] == 255).all()
    assert "background:white" in image["style"] and "max-width:100%" in image["style"]
    assert all("color" not in attributes.get("style", "") for _, attributes in page.tags)


def test_a_figure_is_saved_at_print_quality_and_an_unknown_format_leaves_no_file(tmp_path):
    figure = drawn()
    shown.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2400, 1200)
    shown.show(figure, alt="alt").save(tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="supported formats"):
        shown.save(figure, tmp_path / "a.painting")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png"]
