"""BulletTrain drawn into axes that the caller made: spreads by kind, what is reached for how many passes, galleries."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from semkit.analysis.measure import interval
from semkit.analysis.pictures import draw_picture
from semkit.analysis.plots import by_method, legend, styles
from semkit.training.bullettrain import KINDS, groups

LOOK = {"outlier": "#0072B2", "boundary": "#D55E00", "robust": "#009E73"}


def draw_spreads(axes, v: torch.Tensor, limit: float) -> None:
    """A histogram of the signed spreads v [N], coloured by kind, with the limit above which images are robust."""
    edges = np.linspace(min(-0.3, float(v.min())), max(0.3, float(v.max())), 41)
    parts = [v[index].tolist() for index in groups(v, limit)]
    names = [f"{kind}: {len(part) / len(v):.0%}" for kind, part in zip(KINDS, parts, strict=True)]
    axes.hist(parts, edges, stacked=True, color=[LOOK[kind] for kind in KINDS], label=names)
    axes.axvline(limit, color="0.2", lw=1, ls=":", label="limit")
    axes.set(xlabel="signed spread of the answers (right > 0 > wrong)", ylabel="images")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small")


def draw_reached(axes, rows: Sequence[dict], x: str, y: str) -> None:
    """A point a method: the mean of column y over that of column x, with the 95 % intervals of both over the rows.

    Both axes start at 0, or below where a mean is, so that a difference looks as large as it is; one row has no
    interval.
    """
    look, lowest = styles(by_method(rows)), 0.0
    for method, mine in by_method(rows).items():
        (mx, *ends_x), (my, *ends_y) = (interval([row[column] for row in mine]) for column in (x, y))
        lowest = min(lowest, my)
        bars = [np.abs(np.array(ends) - mean)[:, None] for mean, ends in ((mx, ends_x), (my, ends_y))]
        axes.errorbar(mx, my, xerr=bars[0], yerr=bars[1], capsize=3, ms=7, label=method, **look[method] | {"ls": ""})
    axes.update_datalim([(0, 0)])  # before the margins are laid round the points
    axes.autoscale_view()
    axes.grid(alpha=0.3)
    axes.set(xlim=(0, None), ylim=(None if lowest < 0 else 0, None))


def draw_gallery(axes: Sequence, pictures: Mapping[str, torch.Tensor]) -> None:
    """A uint8 picture [3,H,W] into one axes each, its name below."""
    for place, (name, picture) in zip(axes, pictures.items(), strict=True):
        draw_picture(place, picture.permute(1, 2, 0).numpy())
        place.set_xlabel(name, fontsize="small")


def draw_panels(panels: Sequence, rows: Sequence[dict], x: str, columns: Mapping[str, str]) -> None:
    """draw_reached into one axes a column; columns: column -> label of its axis. The last one has the legend."""
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        draw_reached(axes, rows, x, column)
        axes.set_ylabel(label)
    legend(panels[-1])
