"""A figure made, shown at the end of a notebook's cell, and saved; the only module that imports matplotlib."""

import base64
import html
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semkit.images.files import atomic_write


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches, that belongs to no window and to no global state: safe in any thread."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bytes(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()


def as_html(figure: Figure, alt: str, caption: str = "") -> str:
    """The figure as HTML: <figure> with the alternative text that a notebook's own picture output would drop.

    The picture is on white with a margin; the caption has the colour of the page's text, light or dark.
    """
    picture = base64.b64encode(_bytes(figure, "png", 100)).decode()
    style = "max-width:100%;box-sizing:border-box;padding:8px;background:white"
    image = f'<img alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{picture}">'
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure style="margin:0 0 1em">{image}{below}</figure>'


@dataclass(frozen=True, repr=False)
class Shown:
    """What a notebook's cell ends with: a page shows the HTML, a terminal the alternative text; save writes a file."""

    html: str
    alt: str
    figure: Figure

    def save(self, path: str | Path) -> None:
        """The figure as a file at print quality, without its caption; the suffix of the path says the format."""
        save(self.figure, path)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.alt


def show(figure: Figure, *, alt: str, caption: str = "") -> Shown:
    """The figure for the end of a notebook's cell, with alternative text for those who cannot see it and a caption."""
    return Shown(as_html(figure, alt, caption), alt, figure)


def save(figure: Figure, path: str | Path) -> None:
    """The figure as a file at print quality; the suffix of the path says the format."""
    atomic_write(path, _bytes(figure, Path(path).suffix[1:], 300))
