"""Accuracies as points with 95 % intervals, a place for each countermeasure or attack, drawn into the caller's axes."""

from collections.abc import Sequence

from semkit.analysis.measure import learner
from semkit.analysis.plots import legend, reference, styles, summary
from semkit.countermeasures import registry
from semkit.protections.registry import label_of

ATTACKS = {  # of obfuscated.transform_attacks, in the order of what they know
    "none": "no attack", "naive": "naive:\nPGD on $f$", "external": "PGD on the\nexternal net", "BPDA": "BPDA",
    "BPDA+EOT": "BPDA + EOT", "worst of these": "worst of\nthese",
}  # fmt: skip


def draw_countermeasures(panels: Sequence, rows: Sequence[dict], chance: float | None = None) -> None:
    """Accuracy across, a line a countermeasure in the registry's order, a point a method; an axes a training radius."""
    names, methods = (list(dict.fromkeys(row[column] for row in rows)) for column in ("countermeasure", "method"))
    names.sort(key=registry.place_of)
    look = styles(methods)
    for axes, radius in zip(panels, sorted({row["training_radius"] for row in rows}), strict=True):
        for place, method in enumerate(methods):
            mine = [row for row in rows if (row["method"], row["training_radius"]) == (method, radius)]
            points = [{"place": names.index(row["countermeasure"]), "last": 100 * row["last"]} for row in mine]
            at, mean, low, high = summary(points, "place", "last")
            at = at + 0.15 * (place - (len(methods) - 1) / 2)  # so that no interval hides another
            style = {**look[method], "ls": "", "label": label_of(method)}
            axes.errorbar(mean, at, xerr=[mean - low, high - mean], capsize=2, ms=5, **style)
        if chance is not None:
            axes.axvline(100 * chance, color="0.4", lw=1, ls=":", label=f"chance ({100 * chance:.3g} %)")
        axes.set(xlim=(0, 100), xlabel="accuracy on clean test images (%)")
        axes.set_title(learner(radius), fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set(yticks=range(len(names)), yticklabels=map(registry.label_of, names), ylim=(len(names) - 0.5, -0.5))
    legend(panels[-1])


def draw_defences(axes, rows: Sequence[dict], chance: float | None = None) -> None:
    """Accuracy over the attacks of ATTACKS, points and intervals a defence; some need a transform."""
    defences, names = list(dict.fromkeys(row["defence"] for row in rows)), list(ATTACKS)
    for place, (defence, look) in enumerate(styles(defences).items()):
        mine = [row for row in rows if row["defence"] == defence]
        points = [{"at": names.index(row["attack"]), "accuracy": 100 * row["accuracy"]} for row in mine]
        at, mean, low, high = summary(points, "at", "accuracy")
        at = at + 0.12 * (place - (len(defences) - 1) / 2)
        axes.errorbar(at, mean, [mean - low, high - mean], capsize=3, ms=6, label=defence, **{**look, "ls": ""})
    if chance is not None:
        reference(axes, 100 * chance, f"chance ({100 * chance:.3g} %)")
    axes.set(ylim=(0, 100), ylabel="accuracy (%)", xticks=range(len(names)), xticklabels=ATTACKS.values())
    axes.grid(axis="y", alpha=0.3)
    legend(axes)
