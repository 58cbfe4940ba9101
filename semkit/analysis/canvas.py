"""Making figures, showing them in notebooks and saving them; the style that all figures share."""

import base64
import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path
from threading import Lock

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semkit.analysis.statistics import interval
from semkit.images.files import atomic_write

# Okabe and Ito's colours, which colour-blind readers can tell apart; marker and line say the same again.
KINDS = {  # BulletTrain's three kinds of images
    "outlier": ("#0072B2", "v", "-"),
    "boundary": ("#D55E00", "o", "-"),
    "robust": ("#009E73", "^", "-"),
}
SPARE = ("#CC79A7", "#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#000000")
DPI = 200  # twice the density of a page, whose pixels are 1/100 inch
SETTINGS = Lock()  # matplotlib's settings are of the whole process, and panels draw in threads


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches, without a window or pyplot's global state: safe in any thread."""
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def titled(figure: Figure, title: str, panels: Sequence = (), names: Sequence[str] = ()) -> Figure:
    """The figure with its title and the names of its panels; a panel that is alone is named in the title."""
    if len(panels) == 1:
        title = f"{title} ({names[0]})"
    else:
        for axes, name in zip(panels, names, strict=True):
            axes.set_title(name, fontsize="medium")
    figure.suptitle(title, fontsize="medium", parse_math=False)  # a folder's name may hold dollars
    return figure


def styles(methods: Iterable[str]) -> dict[str, dict]:
    """Method -> its color, marker and ls. A pair "noise side/surrogate side": marker and line by its noise side.

    A pair's colour tells its surrogate side, or where all have the same one, its noise side; the colour of a method
    such as "random 4" tells its noise side too.

    >>> styles(["none/none", "adversarial/random"])["adversarial/random"]
    {'color': '#D55E00', 'marker': '^', 'ls': '-.'}
    """
    from semkit.protections.methods import METHODS, SIDES  # takes torch, which a figure without methods need not

    known, methods = {name: method.style for name, method in METHODS.items()} | KINDS, list(methods)
    alike = len({method.partition("/")[2] for method in methods if "/" in method}) == 1
    colours, markers = cycle(SPARE), cycle("os^DvPX*<>")

    def style(method: str) -> tuple[str, str, str]:
        first, _, second = method.partition("/")
        if first in SIDES and second in SIDES:
            return known[SIDES[first if alike else second]][0], *known[SIDES[first]][1:]
        if method in known or method in SIDES:
            return known[SIDES.get(method, method)]
        side = re.match(r"(none|random|adversarial)(?=/| \d)", method)
        return known[SIDES[side[0]]][0] if side else next(colours), next(markers), "-"

    return {method: dict(zip(("color", "marker", "ls"), style(method), strict=True)) for method in methods}


def student(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the mean's 95 % interval, as seaborn's `errorbar` wants them."""
    return interval(values)[1:]


def draw_lines(
    axes, rows: pd.DataFrame, x: str, y: str, *, errorbar: Callable | tuple = student, label: str = "{}", **style
) -> None:
    """Means of column y over column x, a line a method, in the band of their 95 % interval over rows (seeds).

    errorbar: seaborn's, for another band. label: of a method, {} its name. style: of all lines, before the methods'.
    """
    from semkit.protections.methods import label_of

    look = styles(rows["method"].unique())
    for method, mine in rows.groupby("method", sort=False):
        how = {**look[method], "ms": 4, "label": label.format(label_of(method)), **style}
        band = dict(errorbar=errorbar, err_kws={"alpha": 0.15, "lw": 0})
        sns.lineplot(mine, x=x, y=y, ax=axes, legend=False, **band, **how)
    axes.grid(alpha=0.3)


def draw_points(axes, rows: pd.DataFrame, x: str, y: str, *, by: str = "method", joined: bool = False, **how) -> None:
    """Means with 95 % intervals over rows (seeds) as points side by side at each place, a look a value of column `by`.

    One of x and y is the place, the other the value. joined: the points of a look are joined by its line.
    """
    look = styles(rows[by].unique())
    colour, marker, line = ([style[of] for style in look.values()] for of in ("color", "marker", "ls"))
    apart = (0.04 if joined else 0.12) * (len(look) - 1)
    sns.pointplot(
        rows, x=x, y=y, hue=by, hue_order=list(look), palette=colour, markers=marker, ax=axes,
        linestyles=line if joined else "none", errorbar=student,
        dodge=apart, capsize=0.04, linewidth=1.5, markersize=5, markeredgewidth=0, **how,
    )  # fmt: skip


def reference(line: Callable, value: float, label: str) -> None:
    """A dotted reference line; line: axhline or axvline of the axes."""
    line(value, color="0.4", lw=1, ls=":", label=label)


def chance_line(line: Callable, chance: float | None) -> None:
    """A reference line at the accuracy of guessing, in %; chance: of 1, or None for no line."""
    if chance is not None:
        reference(line, 100 * chance, f"chance ({100 * chance:.3g} %)")


def legend(axes, title: str | None = None) -> None:
    """The legend to the right of the axes, where it hides nothing; reference lines come last."""
    from semkit.protections.methods import label_of

    found = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[0] in axes.lines)
    if not found:
        raise ValueError("there are no rows to draw: look at the names by which they were chosen")
    handles, labels = zip(*((handle, label_of(label)) for handle, label in found), strict=True)
    where = dict(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    axes.legend(handles, labels, title=title, fontsize="small", title_fontsize="small", alignment="left", **where)


def minus(text: str) -> str:
    """The text with typographic minus signs, as matplotlib writes them."""
    return text.replace("-", "\N{MINUS SIGN}")


def _bytes(figure: Figure, kind: str, dpi: int) -> bytes:
    """The figure as a file; an SVG has its text as text, and the same bytes in every run."""
    buffer = BytesIO()
    with SETTINGS, rc_context({"svg.fonttype": "none", "svg.hashsalt": "semkit"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def as_html(figure: Figure, alt: str, caption: str = "") -> str:
    """The figure as HTML: <figure> with the alternative text that a notebook's own picture output would drop.

    A drawing is an SVG, a figure with images in it a PNG at twice the density of a page. It is on white with a margin;
    the caption has the colour of the page's text, light or dark.
    """
    kind, name = ("png", "png") if any(axes.images for axes in figure.axes) else ("svg", "svg+xml")
    picture, width = base64.b64encode(_bytes(figure, kind, DPI)).decode(), round(100 * figure.get_size_inches()[0])
    style = f"width:{width}px;max-width:100%;box-sizing:border-box;padding:8px;background:white"
    image = f'<img alt="{html.escape(alt)}" style="{style}" src="data:image/{name};base64,{picture}">'
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure style="margin:0 0 1em">{image}{below}</figure>'


@dataclass(frozen=True, repr=False)
class Shown:
    """A figure at the end of a notebook's cell: HTML on a page, the alternative text in a terminal."""

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
    """The figure for the end of a notebook's cell, with alternative text for those who cannot see it and a caption.

    >>> show(new_figure(3, 2), alt="An empty figure", caption="n = 3").alt
    'An empty figure'
    """
    return Shown(as_html(figure, alt, caption), alt, figure)


def save(figure: Figure, path: str | Path) -> None:
    """The figure as a file at print quality; the suffix of the path says the format."""
    atomic_write(path, _bytes(figure, Path(path).suffix[1:], 300))
