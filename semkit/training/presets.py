"""How learners are trained at every preset."""

from dataclasses import replace

from semkit.images.augment import ResizedCrop
from semkit.images.pixels import check_name, check_radius
from semkit.nets.models import LARGE
from semkit.training.learning import LearnRecipe
from semkit.training.perturb import PGD, Clean
from semkit.training.schedule import SGD

PRESETS = ("quick", "demo", "lesson", "paper")
STRIDE1 = "resnet18_stride1"  # what the released code runs on ImageNet's 224 pixels


def attack(radius: float, steps: int, norm: str = "linf") -> PGD:
    """PGD whose steps can cross the ball however few they are: 10 steps of radius / 5 as released, fewer larger ones.

    >>> attack(4, 2).step_size, attack(4, 10).step_size
    (2.4, 0.8)
    """
    return PGD(radius, steps, radius * max(0.2, 1.2 / steps) or None, norm)  # radius 0 has no step


def learn_recipe(
    preset: str = "lesson",
    *,
    perturbation_radius: float = 0,
    norm: str = "linf",
    learner: str | None = None,
    size: int = 32,
) -> LearnRecipe:
    """The LearnRecipe of a preset: ERM at perturbation_radius 0, else adversarial training at that radius, in levels.

    paper: the released protocol of SEM and REM; from 64 pixels on that for the ImageNet subset. Raises ValueError for
    unknown names.
    """
    check_name(preset, PRESETS, "preset")
    perturbation_radius = check_radius(perturbation_radius, "perturbation_radius")
    large = preset == "paper" and size >= LARGE
    perturbation = Clean()
    if large and perturbation_radius:
        perturbation = PGD(perturbation_radius, 8, perturbation_radius / 4, norm)
    elif perturbation_radius:
        perturbation = attack(perturbation_radius, {"quick": 1, "demo": 2, "lesson": 2, "paper": 10}[preset], norm)
    recipe = {
        "quick": LearnRecipe(model="tiny", sgd=SGD(steps=30, batch=32), evaluations=2),
        "demo": LearnRecipe(model="tiny", sgd=SGD(steps=600 if perturbation_radius else 700, batch=64), evaluations=5),
        # A step of ERM costs a third of one of AT: more of them.
        "lesson": LearnRecipe(
            model="tiny", sgd=SGD(steps=930 if perturbation_radius else 2400, batch=64), evaluations=10
        ),
        "paper": LearnRecipe(model=STRIDE1, augment=ResizedCrop(224)) if large else LearnRecipe(),
    }[preset]
    return replace(recipe, perturbation=perturbation, model=learner or recipe.model)


def lasting(recipe, steps: int):
    """A recipe, of a learner or of noise, with another number of steps; its milestones move along.

    >>> lasting(learn_recipe("paper"), 400).sgd.milestones
    (160, 320)
    """
    share = steps / recipe.sgd.steps
    milestones = tuple(round(share * milestone) for milestone in recipe.sgd.milestones)
    return replace(recipe, sgd=replace(recipe.sgd, steps=steps, milestones=milestones))
