"""What a reader of a figure sees: its texts and whether they collide, its legend, its means and intervals."""

from itertools import combinations

import numpy as np
from matplotlib.text import Text


def drawn_texts(figure):
    """Every text with its box in pixels, ticks outside their axis left out."""
    figure.canvas.draw()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks() + axis.get_minor_ticks()
            off = [t for t in ticks if not axes.axison or not low - 1e-9 <= t.get_loc() <= high + 1e-9]
            hidden |= {label for tick in off for label in (tick.label1, tick.label2)}
    seen = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden]
    return [(text.get_text(), text.get_window_extent().padded(-1)) for text in seen]


def collisions(figure):
    """Pairs of texts that overlap or a legend that covers its axes, and texts that leave the figure."""
    texts = drawn_texts(figure)
    legends = [(axes, axes.get_legend()) for axes in figure.axes if axes.get_legend()]
    covering = [("legend", "axes") for axes, legend in legends if legend.get_window_extent().overlaps(axes.bbox)]
    width, height = figure.canvas.get_width_height()
    overlapping = [(a, b) for (a, box), (b, other) in combinations(texts, 2) if box.overlaps(other)]
    return overlapping + covering, [t for t, b in texts if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]


def texts(axes):
    """The entries of the legend."""
    return [text.get_text() for text in axes.get_legend().get_texts()]


def bands(axes):
    """Of every band its ends by x: {x: (low, high)}."""
    found = [np.round(band.get_paths()[0].vertices, 9) for band in axes.collections]
    at = [{x: band[band[:, 0] == x, 1] for x in {*band[:, 0]}} for band in found]
    return [{x: (ends.min(), ends.max()) for x, ends in band.items()} for band in at]


def error_bars(axes, looks, values=1):
    """Of each of `looks` its means [K,2] and the ends [K,2] of their intervals; values: the axis of the values."""
    lines = [line.get_xydata() for line in axes.lines if line.get_linestyle() != ":" and len(line.get_xdata())]
    size = len(lines) // looks  # a look is a line of its means, then a bar a place
    each = [lines[start : start + size] for start in range(0, len(lines), size)]
    ends = [[(np.fmin.reduce(bar[:, values]), np.fmax.reduce(bar[:, values])) for bar in bars] for _, *bars in each]
    return [(means, np.array(found)) for (means, *_), found in zip(each, ends, strict=True)]
