"""Pruned nets drawn into axes that the caller made: accuracy over sparsity, and which weights go."""

from collections.abc import Sequence

import numpy as np

from semkit.analysis.plots import by_method, legend, line, styles, summary


def draw_pruned(clean, robust, rows: Sequence[dict]) -> None:
    """Rows of pruning.pruned_rows: accuracy over sparsity, on clean images and under attack, with 95 % bands.

    A colour a learner. On the left also, dashed, the accuracy before tuning.
    """
    look = styles(by_method(rows))
    for method, mine in by_method(rows).items():
        dashed = {**look[method], "ls": "--"}
        values = (clean, "untuned", dashed), (clean, "clean", look[method]), (robust, "robust", look[method])
        for axes, value, style in values:
            percent = [{"share": 100 * row["sparsity"], "accuracy": 100 * row[value]} for row in mine]
            line(axes, *summary(percent, "share", "accuracy"), label=method, **style)
    robust.plot([], [], color="0.4", ls="--", label="left: before tuning")
    for axes, what in ((clean, "clean images"), (robust, "attacked images")):
        axes.set(xlabel="weights pruned (%)", ylabel=f"accuracy on {what} (%)")
        axes.set(xticks=sorted({100 * row["sparsity"] for row in rows}))
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    legend(robust)


def draw_weights(axes, sizes: np.ndarray, share: float) -> float:
    """How many of the weights are of which size |W|, on a logarithmic scale; those that pruning by `share` takes.

    Returns the threshold.
    """
    count = round(share * len(sizes))
    threshold = float(np.sort(sizes)[count]) if count else 0.0
    bins = np.logspace(-5, 0, 101)
    seen = sizes.clip(bins[0], bins[-1])
    for part, color, label in ((seen < threshold, "#D55E00", "pruned"), (seen >= threshold, "#0072B2", "kept")):
        axes.hist(seen[part], bins, color=color, label=label)
    if threshold:
        axes.axvline(threshold, color="black", lw=1)
    axes.set(xscale="log", xlabel="size of a weight, |W|")
    return threshold
