"""How robust a classifier behind an input transform is: naive and adaptive attacks, rows, table and figure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor, nn

from semkit.analysis.report import cell, markdown
from semkit.analysis.statistics import Rows
from semkit.analysis.study import learned_net
from semkit.countermeasures.transform import Behind, Transform, transformed
from semkit.images.imageset import ImageSet, Split
from semkit.lessons.answers import check_tensor, checker
from semkit.nets.engine import count_passes, predict
from semkit.nets.lab import Lab
from semkit.nets.weights import drawing
from semkit.training.perturb import EOT, PGD, Clean, Perturbation
from semkit.training.recipes import LearnRecipe

if TYPE_CHECKING:
    from semkit.analysis.canvas import Figure  # matplotlib takes a second that the command need not pay

BATCH = 100
STEPS, DRAWS = 10, 4  # of an attack; of one step of EOT
ATTACKS = {  # attack, in rising order of what it knows -> its name in the figure
    "none": "no attack", "naive": "naive:\nPGD on $f$", "external": "PGD on the\nexternal net", "BPDA": "BPDA",
    "BPDA+EOT": "BPDA + EOT", "worst of these": "worst of\nthese",
}  # fmt: skip
Attacks = Mapping[str, tuple[nn.Module, Perturbation]]  # name -> (net whose loss is climbed, perturbation)


def plain_attacks(classifier: nn.Module, radius: float) -> Attacks:
    """No attack, and PGD, for a classifier without a transform."""
    return {"none": (classifier, Clean()), "naive": (classifier, PGD(radius, STEPS))}


def transform_attacks(classifier: nn.Module, transform: Transform, radius: float, seed: int = 0) -> Attacks:
    """No attack and four attacks on f(g(.)), in rising order of what they know.

    naive: PGD on f alone, the paper's weak threat model. external: PGD on the external net, whose answer g writes into
    the image. BPDA: PGD on f(g(.)) with the gradient of g replaced by the identity. BPDA+EOT: the same on the mean of
    DRAWS gradients with a random start in g, because a deterministic g jumps and its random twin is smooth on average.
    """
    pgd, twin = PGD(radius, STEPS), replace(transform, random_start=True)
    return {
        **plain_attacks(classifier, radius),
        "external": (transform.net(classifier.engine), pgd),
        "BPDA": (Behind(classifier, transform, seed), pgd),
        "BPDA+EOT": (Behind(classifier, twin, seed), EOT(radius, STEPS, draws=DRAWS)),
    }


def survived(judge: nn.Module, attack: tuple[nn.Module, Perturbation], images: ImageSet, *, seed: int = 0) -> Tensor:
    """[N] bool: which images the judge still classifies correctly after an attack, (net, perturbation)."""
    (net, perturbation), engine = attack, judge.engine
    images, right = images.to(engine.device), []
    generator = engine.generator(seed, "attack, injected noise")
    with drawing(judge, generator), drawing(net, generator):
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            x, y = engine.images(images.images[part]), images.labels[part]
            x_adv = perturbation(net, x, y, engine.generator(seed, "attack", start))
            right.append((predict(judge, x_adv).argmax(1) == y).cpu())
    return torch.cat(right)


def attacked_rows(judge: nn.Module, attacks: Attacks, images: ImageSet, *, seed: int = 0) -> pd.DataFrame:
    """Rows of the judge's accuracy under each attack, and under the worst of them for each image.

    attack_passes: input gradients per image, those inside the transform included.
    """
    rows, left = [], torch.ones(len(images), dtype=torch.bool)
    for name, attack in attacks.items():
        with count_passes() as passes:
            right = survived(judge, attack, images, seed=seed)
        left &= right
        rows.append((name, right.float().mean().item(), round(passes.input_gradient / len(images), 1)))
    rows.append(("worst of these", left.float().mean().item(), sum(passes for *_, passes in rows)))
    return pd.DataFrame(rows, columns=["attack", "accuracy", "attack_passes"])


def defence_rows(
    split: Split,
    transform: Transform,
    learners: Mapping[float, LearnRecipe],
    *,
    radius: float,
    attacked: int,
    seeds: Sequence[int] = (0,),
    lab: Lab | None = None,
) -> pd.DataFrame:
    """Rows of defences x attacks x seeds: learners by their training radius, and learner 0 (ERM) behind the transform.

    Behind the transform ERM is trained on g(x) of the training images. A stratified subset of `attacked` test images is
    attacked at `radius`; clean_accuracy is over all of them. training_passes includes those of the transform.
    """
    lab, rows = lab or Lab(), []
    parts = (split.train, split.test)
    moved = Split(*(replace(part, images=transformed(part.images, transform, lab.engine)) for part in parts))
    images = split.test.limit(attacked)
    for seed in seeds:
        for r, recipe in [*learners.items(), ("transform", learners[0])]:
            behind = r == "transform"
            name = "transform" if behind else f"AT {r:g}" if r else "ERM"
            job = lab.doing(f"{name}, seed {seed}")
            seen = moved if behind else split
            row, net = learned_net(seen.train, seen.test, recipe, seed=seed, lab=job)
            attacks = transform_attacks(net, transform, radius, seed) if behind else plain_attacks(net, radius)
            judge = Behind(net, transform, seed) if behind else net
            cost = row["passes"] + behind * transform.passes * len(split.train)
            about = {"defence": name, "seed": seed, "radius": radius, "n": len(images), "clean_accuracy": row["last"]}
            about["engine"] = row["engine"]
            found = attacked_rows(judge, attacks, images, seed=seed)
            rows.append(pd.DataFrame({**about, "training_passes": cost}, found.index).join(found))
    return pd.concat(rows, ignore_index=True)


def defences_table(rows: Rows) -> str:
    """Rows of defence_rows in Markdown: a line per defence, a column per attack, accuracy in %.

    ± half the 95 % interval over seeds; - where an attack does not apply to the defence.
    """
    rows = pd.DataFrame(rows)
    cells = rows.groupby(["defence", "attack"])["accuracy"].agg(cell).unstack()
    cells = cells.loc[rows["defence"].unique(), sorted(cells, key=list(ATTACKS).index)]
    cells["passes of training"] = rows.groupby("defence")["training_passes"].first().map("{:,}".format)
    return markdown(cells.rename_axis("classifier").reset_index())


def defences_figure(rows: Rows, *, chance: float | None = None, title: str) -> "Figure":
    """Accuracy under each of ATTACKS, points by defence with 95 % intervals over seeds.

    Attacks that need a transform list the defences without one as "not applicable".

        sk.defences.defences_figure(sk.read_rows("../results/transform/rows.csv"), chance=0.1, title="Behind g")
    """
    from semkit.analysis import canvas

    rows = pd.DataFrame(rows)
    rows["accuracy"] *= 100
    figure, look = canvas.new_figure(9, 4), canvas.styles(rows["defence"].unique())
    axes = figure.subplots()
    canvas.draw_points(axes, rows, "attack", "accuracy", by="defence", order=list(ATTACKS))
    for place, attack in enumerate(ATTACKS):
        tried = set(rows["defence"][rows["attack"] == attack])
        missing = [name for name in look if name not in tried]
        if missing:
            text = "not applicable:\n" + "\n".join(missing)
            axes.text(place, 98, text, ha="center", va="top", fontsize="small", color="0.4")
    canvas.chance_line(axes.axhline, chance)
    axes.set(ylim=(0, 100), xlabel=None, ylabel="accuracy (%)")
    axes.set_xticks(range(len(ATTACKS)), ATTACKS.values())
    axes.grid(axis="y", alpha=0.3)
    canvas.legend(axes)
    return canvas.titled(figure, title)


@checker(
    "y.detach() has the value of y and no gradient.",
    "Write g(x) as x plus something: forwards the something counts, backwards only the x.",
    "The something is g(x) - x, detached.",
)
def check_straight_through(straight_through: Callable) -> str:
    """Whether straight_through(g, x) has the value of g(x), and the gradient of the identity.

    g takes and gives a tensor [N,C,H,W]; it may have a gradient of its own, or none.

    >>> check_straight_through(lambda g, x: g(x))
    not yet, because no gradient flows to x: add the detached difference to x
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for g in (lambda x: (4 * x).round() / 4, lambda x: x**2):
        start = x.clone().requires_grad_()
        value = straight_through(g, start)
        check_tensor(value, x)
        assert torch.allclose(value.detach(), g(x)), "forwards it is not g(x): an attack must meet what f meets"
        assert torch.equal(start.detach(), x), "it changes x in place: add to a copy"
        assert value.requires_grad, "no gradient flows to x: detach the difference g(x) - x only"
        (gradient,) = torch.autograd.grad((weight * value).sum(), start, allow_unused=True)
        assert gradient is not None and gradient.any(), "no gradient flows to x: add the detached difference to x"
        assert torch.allclose(gradient, weight), "g's own gradient comes in: backwards it must be the identity"
    return "forwards g, backwards the identity, and the obfuscated gradient is no longer in the way"
