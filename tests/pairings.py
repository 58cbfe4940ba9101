"""How every claim of results/claims.csv is measured from the rows that it names.

MEASURED: {the claim, without what stands in brackets at its end: f(rows, ...)}, rows of each file named. f gives the
values to take the interval of, one for each seed (or round, draw, pair), or (value, low, high).
"""

import pandas as pd

from semkit.analysis.statistics import blocked_difference, correlation, interval, paired, protection
from semkit.lessons import replication, savings, undoing


def last(rows, method, column="last", **where):
    """By seed, a column of a method's rows with these entries."""
    for name, value in {"method": method, **where}.items():
        rows = rows[rows[name] == value]
    return rows.pivot(index="seed", columns="method", values=column)[method]


def less(first, second):
    """First less second, paired by seed."""
    return (first - second).dropna()


def lost(method, radius, than="clean"):
    """Accuracy that learners of this training radius lose to a method's noise, by default against clean images."""
    return lambda rows: less(last(rows, than, training_radius=radius), last(rows, method, training_radius=radius))


def left_of(method):
    """What AT 4 leaves of a protection, less half of what ordinary training loses."""
    return lambda rows: lost(method, 4)(rows) - lost(method, 0)(rows) / 2


def points(pairing):
    return lambda *tables: 100 * pairing(*tables)


def back(method, change):
    """Accuracy that a countermeasure gives back, less half of what the method took."""

    def pairing(rows):
        rows = rows.assign(change=rows["countermeasure"].str.partition("=")[0])
        at = rows.pivot(index="seed", columns=["method", "change"], values="last")
        return at[method, change] - (at["clean", "none"] + at[method, "none"]) / 2

    return pairing


SIDES = ("none", "random", "adversarial")
NINE = [f"{noise}/{surrogate}" for noise in SIDES for surrogate in SIDES]


def side(place, kind, blocked):
    """What a kind of perturbation adds under AT 4, on the noise side (place 0) or the surrogate side (1)."""

    def pairing(rows):
        table = 100 * pd.DataFrame({name: protection(rows, name, 4) for name in NINE})
        more, less = ([at for at, name in enumerate(NINE) if name.split("/")[place] == of] for of in (kind, "none"))
        if blocked:
            return blocked_difference(table, more, less)
        return table.iloc[:, more].mean(axis=1) - table.iloc[:, less].mean(axis=1)

    return pairing


def sides_apart(rows):
    """What an adversarial perturbation adds under AT 4 on the surrogate side, less what it adds on the noise side."""
    return less(*(side(place, "adversarial", blocked=False)(rows) for place in (1, 0)))


def worth(share):
    """ERM on all images, this share of each class protected, less ERM on the clean rest alone."""
    return lambda rows: less(
        last(rows, f"{share}% protected", training_radius=0),
        last(rows, f"the other {100 - share}% alone", training_radius=0),
    )


def rank_correlation(radius, asked=None):
    """Spearman's, of noise robustness and protection over the noise sides' means.

    asked: the radius of the attack, where losses without augmentation say how robust the noise is.
    """

    def pairing(noises, rows):
        noises = replication.judged(noises, asked) if asked else noises
        of = paired(noises, rows, radius).groupby("method", sort=False)
        return correlation(of["noise_robustness"].mean(), of["protection"].mean()).spearman

    return pairing


def taken(method, change, radius=0):
    """Accuracy that a noise takes after a countermeasure: the clean learner's less the protected one's."""
    return lambda rows: lost(method, radius)(rows[rows["countermeasure"] == change])


def elsewhere(net, radius):
    """What sem-grey takes from learners of another net, less two thirds of what it takes from those of tiny."""
    took = taken("sem-grey", "none", radius)
    return lambda rows, others: less(took(others[others["net"] == net]), took(rows) * 2 / 3)


def higher(method, other, radius=0):
    """How much higher learners end on a method's images than on the other's, without a countermeasure."""
    return lambda rows: lost(other, radius, than=method)(rows[rows["countermeasure"] == "none"])


def survival_of(change=None):
    """Spearman's, over methods and countermeasures, or the methods after one: of the noise that is left, and the share
    left of the points that it takes as it is, if they are 10 or more. Of a method in both tables the first one's."""

    def pairing(survival, *tables):
        points = pd.concat([undoing.shares_left(undoing.taken(rows)) for rows in tables])
        points = points[~points.index.duplicated()]
        gains = survival.rename(columns={"countermeasure": "change"}).groupby(["change", "method"])["gain"].mean()
        found = gains.to_frame().join(points, how="inner")
        found = found.loc[change] if change else found
        return correlation(found["gain"], found["left"]).spearman

    return pairing


def work_of(part, net, other):
    """How far a part of its own noise lowers a net's loss, of 1 for the whole noise, less the same of another net."""

    def pairing(rows):
        loss = rows.pivot(index=["net", "seed"], columns="part", values="loss")
        work = (loss["none"] - loss[part]) / (loss["none"] - loss["whole"])
        return less(work[net], work[other])

    return pairing


def late_moves(method):
    """By how much evaluation-time moves raise the loss of the oldest learners more than generation-time ones."""

    def pairing(rows):
        oldest = rows[rows["learner"] == rows["learner"].iloc[-1]]
        raised = oldest.pivot(index="seed", columns=["perturbation", "method"], values="rise")
        return raised["evaluation-time", method] - raised["generation-time", method]

    return pairing


def hardened(judge):
    """The rise of a judge's loss under worst moves, on REM's noise less on SEM's."""

    def pairing(rows):
        rows = rows.assign(rise=-rows[f"{judge}_robustness"] - rows[f"{judge}_loss"])
        return less(*(last(rows, f"{side}/adversarial", "rise") for side in ("adversarial", "random")))

    return pairing


def passes(method, than):
    """Passes of crafting, as a share of another method's."""

    def pairing(rows):
        cost = rows.groupby(["method", "seed"])["noise_passes"].first()
        return cost[method] / cost[than]

    return pairing


def defended(learner):
    """What is left of CUDA's protection after a defence."""
    return lambda rows: less(last(rows, "clean", learner=learner), last(rows, "cuda .3", learner=learner))


def exact(value):
    return value, value, value


def farthest(rows):
    """The largest distance between closed form and Monte-Carlo, in standard errors."""
    names = ("clean", "on_clean", "on_protected")
    return exact(max(((rows[of] - rows[f"{of}_sampled"]).abs() / rows[f"{of}_error"]).max() for of in names))


def one_filter(rows):
    """What one filter for all classes takes, less half of what one for each takes."""
    return lost("one filter", 0)(rows) - lost("cuda .3", 0)(rows) / 2


def seen_as(column):
    """Accuracy of ERM learners on test images with their class's filter, or another's."""
    return lambda rows: last(rows, "cuda .3", column, training_radius=0)


def chance_in_ten(rows):
    return exact(rows.query("d == 10 and norm == 1 and a_minus == 0")["on_clean"].iloc[0])


def in_memory(rows):
    return rows.query("what == 'in memory'")["seconds"]


def fewer(objective, form):
    return lambda rows: savings.fewer(rows, objective, form)


def faster(objective, form, threads):
    return lambda rows: savings.faster(rows, objective, form, threads=threads)


def spared_loss(objective, form, column):
    return lambda rows: savings.lost(rows, objective, column, form)


def pruned(column, share, of_other):
    """RSR at one sparsity less PGD training at another."""
    return lambda rows: less(
        last(rows, "RSR", column, sparsity=share), last(rows, "PGD training", column, sparsity=of_other)
    )


def flattered(rows):
    """Accuracy of RSR under an attack without EOT less that with it, mean over the sparsities."""
    mine = rows[rows["method"] == "RSR"]
    return (mine["naive"] - mine["robust"]).groupby(mine["seed"]).mean()


def behind(attack):
    """Accuracy behind the transform under an attack, less that of AT 4 under the naive one, which is all it meets."""

    def pairing(rows):
        at = rows.pivot(index="seed", columns=["defence", "attack"], values="accuracy")
        return at["transform", attack] - at["AT 4", "naive"]

    return pairing


def training(rows):
    cost = rows.groupby("defence")["training_passes"].first()
    return exact(cost["transform"] / cost["AT 4"])


def gap(labels, contrast):
    """The gap at k/d = 1/64 less a tenth of that at 1, of the same draw."""

    def pairing(rows):
        mine = rows[(rows["labels"] == labels) & (rows["contrast"] == contrast)]
        at = mine.pivot(index="seed", columns="ratio", values="gap")
        return at[1 / 64] - at[1] / 10

    return pairing


def gap_held(one, other, share=1.0):
    """The gap on real images at one (pixels, length of attack) less a share of that at another, same two classes."""

    def pairing(rows):
        at = rows[rows["k"] == 40].pivot(index="pair", columns=["d", "epsilon"], values="gap_held")
        return at[one] - share * at[other]

    return pairing


def off(rows):
    """How far the accuracy held is from that promised, 40 components, l2 0.5, 32x32."""
    chosen = rows.query("d == 3072 and k == 40 and epsilon == 0.5")
    return (chosen["robust_held"] - chosen["robust"]).abs()


A_TENTH = "the gap of the best standard and the best robust accuracy falls to a tenth from k/d = 1 to 1/64"

SEM = {
    "SEM protects from AT 4/255": points(lost("sem", 4)),
    "EM falls: AT 4/255 gives back more than half of what EM took": points(left_of("em")),
    "SEM holds where EM falls: AT 4/255 ends lower on SEM images than on EM images": points(lost("sem", 4, "em")),
    "the same on the embedded images, two processors": points(
        lambda *tables: pd.concat(lost("sem", 4, "em")(rows) for rows in tables)
    ),
    "SEM's recipe without any perturbation, none/none, protects from AT 4/255": points(lost("none/none", 4)),
    "SEM's recipe without any perturbation, none/none, protects from AT 4/255 on CIFAR-10": points(
        lost("none/none", 4)
    ),
    "SEM's perturbations protect from AT 4/255, beside the same recipe without them": points(
        lost("sem", 4, "em, SEM's recipe")
    ),
    "the high part of its own noise does more of the noise's work with a plain net than with an adversarially "
    "trained one, at equal accuracy": work_of("high", "ERM, 330 steps", "AT 4, 600 steps"),
    "the low part of SEM's noise alone, waves of 16 pixels and longer, protects from AT 4/255": points(
        lost("sem, low", 4)
    ),
    "the high part of SEM's noise alone protects from AT 4/255": points(lost("sem, high", 4)),
    "the low part of SEM's noise protects more from AT 4/255 than the high part": points(
        lost("sem, low", 4, "sem, high")
    ),
    "the high part of EM's noise alone protects from ERM": points(lost("em, high", 0)),
    "the low part of EM's noise alone protects from ERM": points(lost("em, low", 0)),
    "the high part of EM's noise protects more from ERM than the low part": points(lost("em, high", 0, "em, low")),
    "an adversarial surrogate side adds more than an adversarial noise side under AT 4/255 on CIFAR-10": sides_apart,
    "SEM takes fewer passes than REM": passes("sem", "rem"),
    "SEM protects from AT 4/255 as well as REM, at most 1.5 points less": points(lost("rem", 4, "sem")),
    "SEM protects more from AT 4/255 than REM": points(lost("sem", 4, "rem")),
    "more robust noise protects less from AT 4/255, a judge of its own for every noise": rank_correlation(4),
    "more robust noise protects less from ERM, a judge of its own for every noise": rank_correlation(0),
    "more robust noise protects less from AT 4/255, one frozen judge a seed": rank_correlation(4),
    "more robust noise protects less from ERM, one frozen judge a seed": rank_correlation(0),
    "hardening noise against 8 levels costs protection from AT 4/255": points(lost("none 0", 4, "adversarial 8")),
    "hardening noise against 8 levels costs protection from ERM": points(lost("none 0", 0, "adversarial 8")),
    "noise that withstands 8 levels better protects less from AT 4/255, 60 noise steps": rank_correlation(4, 8),
    "noise that withstands 8 levels better protects less from ERM, 60 noise steps": rank_correlation(0, 8),
    "noise that withstands 4 levels better protects less from AT 4/255, 60 noise steps": rank_correlation(4, 4),
    "noise that withstands 4 levels better protects less from ERM, 60 noise steps": rank_correlation(0, 4),
    "noise that withstands 8 levels better protects less from AT 4/255 on CIFAR-10, 60 noise steps": rank_correlation(
        4, 8
    ),
    "noise that withstands 8 levels better protects less from ERM on CIFAR-10, 60 noise steps": rank_correlation(0, 8),
    "noise that withstands 4 levels better protects less from AT 4/255 on CIFAR-10, 60 noise steps": rank_correlation(
        4, 4
    ),
    "noise that withstands 4 levels better protects less from ERM on CIFAR-10, 60 noise steps": rank_correlation(0, 4),
    "the same hardening with 60 noise steps costs protection from AT 4/255": points(lost("none 0", 4, "adversarial 8")),
    "the same hardening with 60 noise steps costs protection from ERM": points(lost("none 0", 0, "adversarial 8")),
    "the same hardening costs protection from AT 4/255 on CIFAR-10": points(lost("none 0", 4, "adversarial 8")),
    "the same hardening costs protection from ERM on CIFAR-10": points(lost("none 0", 0, "adversarial 8")),
    "hardened noise, REM's, withstands the worst moves of its own surrogate better than SEM's": hardened("noise"),
    "the same, judged by another seed's surrogate": hardened("other"),
    "the worst moves of the surrogate are not the worst ones of the learner, SEM's noise": late_moves(
        "random/adversarial"
    ),
    "so REM's noise meets the wrong moves, more than SEM's": lambda rows: less(
        late_moves("adversarial/adversarial")(rows), late_moves("random/adversarial")(rows)
    ),
    "20 % of each class protected: all images are worth at most 5 points more to ERM than the clean rest alone": points(
        worth(20)
    ),
    "80 % of each class protected: all images are worth at most 5 points more to ERM than the clean rest alone": points(
        worth(80)
    ),
    "80 % of each class protected take more than half of what 100 % take from ERM": points(
        lambda rows: lost("80% protected", 0)(rows) - lost("sem", 0)(rows) / 2
    ),
    "JPEG at quality 10 gives back more than half of what SEM took": points(back("sem", "jpeg")),
    "grey-scale gives back more than half of what SEM took": points(back("sem", "grayscale")),
    "the more of a noise a countermeasure leaves, the larger the share of its protection that is left": survival_of(),
    "the same among noises, after JPEG at quality 10": survival_of("jpeg"),
    "the same among noises, after grey-scale": survival_of("grayscale"),
    "SEM takes more than 10 points in its worst row of eleven, grey-scale": points(taken("sem", "grayscale")),
    "grey SEM takes more than 10 points in its worst row of eleven, AT 4/255": points(taken("sem-grey", "none", 4)),
    "crafted through JPEG, blur and grey-scale, grey noise takes more than 10 in its worst row": points(
        taken("sem-jpeg", "none", 4)
    ),
    **{
        f"a twentieth of the published noise step's passes protects at most 3 points less, {way}": points(
            lost("plain", radius, "sem")
        )
        for way, radius in {"ERM": 0, "AT 2/255": 2, "AT 4/255": 4}.items()
    },
    "SEM of the lesson preset protects more from AT 4/255 than the published noise step": points(
        lost("sem", 4, "plain")
    ),
    "SEM of the lesson preset protects more from AT 4/255 than 2 x 2 in larger batches": points(
        lost("sem", 4, "2 x 2")
    ),
    "half of the lesson preset's training protects less from AT 4/255": points(lost("sem", 4, "sem, half")),
    "grey SEM takes more than 8 points in the worst of ten test rows, JPEG 5": points(taken("sem-grey", "jpeg-5")),
    **{
        f"grey SEM takes at least two thirds as much from a net without shortcuts, conv4, {way}": points(
            elsewhere("conv4", radius)
        )
        for way, radius in {"as the images are": 0, "under AT 4/255": 4}.items()
    },
    "AT 4/255 gives at most 5 points more on grey SEM than on SEM": points(higher("sem-grey", "sem", 4)),
    "ERM gives at most 5 points more on grey SEM than on SEM": points(higher("sem-grey", "sem")),
}
SEM["a random noise side adds protection from AT 4/255 on CIFAR-10 in batches of 64"] = side(0, "random", blocked=False)
for name, place, kind in (
    ("an adversarial surrogate side", 1, "adversarial"),
    ("a random noise side, SEM's own ingredient,", 0, "random"),
    ("an adversarial noise side, as REM has it,", 0, "adversarial"),
):
    for where in ("", " on CIFAR-10"):
        SEM[f"{name} adds protection from AT 4/255{where}, t over the seeds"] = side(place, kind, blocked=False)
        SEM[f"{name} adds protection from AT 4/255{where}, seed as block"] = side(place, kind, blocked=True)

CUDA = {
    "ERM learners end 25 points or more below clean": lost("cuda .3", 0),
    "some protection is left under AT at 4/255, strength .3": lost("cuda .3", 4),
    "ERM learners end 25 points or more below clean, strength .5": lost("cuda .5", 0),
    "some protection is left under AT at 4/255, strength .5": lost("cuda .5", 4),
    "most of the protection is left under AT at 4/255": left_of("cuda .3"),
    "one filter for all classes protects less than half as much as one for each": one_filter,
    "learners know test images filtered as their class was in training": seen_as("on_own"),
    "learners take test images filtered as another class for that class": seen_as("on_permuted"),
    "the Bayes rule of filtered Gaussian mixtures and its accuracies are as derived": farthest,
    "in ten dimensions the protected data's rule is no better than chance on clean data": chance_in_ten,
    "50,000 images in memory are filtered in 30 seconds or less": in_memory,
}
for text, name in {
    "a random blur in training": "random blur",
    "noise of sigma .5 in training": "smoothing",
    "fine-tuning a pretrained net": "fine-tuned",
    "training a pretrained net's last layer": "last layer",
    "adversarial training in L2 at 0.5": "AT L2 0.5",
    "DAT, the adaptive defence": "DAT",
}.items():
    CUDA[f"most of the protection (half of ERM's 30 points) is left after {text}"] = defended(name)

BULLETTRAIN = {
    "AugMix: BulletTrain is faster, one thread": faster("augmix", "bullettrain", 1),
    "AugMix: BulletTrain takes fewer passes": fewer("augmix", "bullettrain"),
    "AugMix: BulletTrain loses at most 1.5 points of accuracy on corrupted images": spared_loss(
        "augmix", "bullettrain", "corrupted"
    ),
}
for objective in ("TRADES", "MART"):
    for form, name in {"bullettrain": "", "one step": " with one large step for outliers and robust images"}.items():
        told, how = f"{objective}: BulletTrain{name}", (objective.lower(), form)
        BULLETTRAIN |= {
            f"{told} takes fewer passes": fewer(*how),
            f"{told} is faster, one thread": faster(*how, 1),
            f"{told} is faster, two threads": faster(*how, 2),
            f"{told} loses at most 1.5 points of clean accuracy": spared_loss(*how, "clean"),
            f"{told} loses at most 1.5 points of robust accuracy": spared_loss(*how, "attacked"),
        }

RSR = {
    "RSR, 85 % pruned, is more accurate on clean images than PGD training with all weights": pruned("clean", 0.85, 0),
    "RSR, 85 % pruned, is more accurate under PGD than PGD training with all weights": pruned("robust", 0.85, 0),
    "85 % pruned, before tuning, RSR is more accurate on clean images than PGD training": pruned("untuned", 0.85, 0.85),
    "95 % pruned, RSR is more accurate under PGD than PGD training": pruned("robust", 0.95, 0.95),
    "noise in the weights hides gradients: an attack without EOT finds RSR more accurate": flattered,
}

TRANSFORM = {
    "behind the transform a classifier is more robust than AT, attacked as if there were none": behind("naive"),
    "with an external net at hand, the transform costs less training than AT": training,
    "it stays more robust than AT under attacks that know the transform": behind("worst of these"),
    "JPEG at quality 10 gives back more than half of what EM took": back("em", "jpeg"),
}
for method in ("CUDA", "EM", "SEM"):
    told = f"purifying by adversarial examples in a large ball gives back more than half of what {method} took"
    TRANSFORM[told] = back(method.lower(), "purifier")

LATENT = {
    f"Gaussian mixture: {A_TENTH}": gap("mixture", "pixel"),
    f"generalised linear model: {A_TENTH}": gap("probit", "pixel"),
    f"Gaussian mixture, factors that do not grow as they become fewer: {A_TENTH}": gap("mixture", "factor"),
    "a mixture with few factors tells within 5 points what linear rules reach on real images under attack": off,
    "real images: the gap falls as the same images get more pixels, attack of fixed length": gap_held(
        (3072, 0.5), (48, 0.5)
    ),
    "real images: the gap falls by a tenth also where the attack grows with the images": gap_held(
        (3072, 1), (192, 0.25), 0.9
    ),
}

MEASURED = SEM | CUDA | BULLETTRAIN | RSR | TRANSFORM | LATENT


def measured(claim, *tables):
    """(value, low, high) of a claim from the rows of its files."""
    found = MEASURED[claim.partition(" (published")[0]](*tables)
    return found if isinstance(found, tuple) else interval(found)
