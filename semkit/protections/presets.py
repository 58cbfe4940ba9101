"""The named recipes: which method, at which budget."""

from collections.abc import Iterable
from dataclasses import replace

from semkit.images.augment import ResizedCrop
from semkit.images.pixels import check_name, check_radius
from semkit.nets.models import LARGE
from semkit.protections.crafting import CraftRecipe
from semkit.protections.cuda import ClassFilters
from semkit.training.learning import LearnRecipe
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform
from semkit.training.schedule import SGD

PRESETS = ("quick", "demo", "lesson", "paper")
METHODS = ("sem", "rem", "em")
STRIDE1 = "resnet18_stride1"  # what the released code runs on ImageNet's 224 pixels


def sides(method: str, perturbation_radius: float, pgd: PGD) -> dict[str, Perturbation]:
    """The noise side and the surrogate side of a method, as fields of a CraftRecipe.

    em: Clean, Clean (Huang et al., ICLR 2021). rem: PGD, PGD (Fu et al., ICLR 2022).
    sem: Uniform, PGD (Liu et al., AAAI 2024). At radius 0 all are em.
    """
    noise_side, surrogate_side = {
        "em": (Clean(), Clean()),
        "rem": (pgd, pgd),
        "sem": (Uniform(perturbation_radius), pgd),
    }[check_name(method, METHODS, "method")]
    return dict(noise_side=noise_side, surrogate_side=surrogate_side)


def _pgd(radius: float, steps: int, norm: str = "linf") -> PGD:
    """PGD whose few steps can cross the ball: 10 steps of radius / 5 as released, fewer ones larger."""
    return PGD(radius, steps, radius * max(0.2, 1.2 / steps) or None, norm)  # radius 0 has no step


def _quick(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    return CraftRecipe(
        radius=radius, step_size=radius / 2, steps=2, samples=1, start="zero", surrogate="tiny",
        sgd=SGD(steps=30, batch=32),
        **sides(method, perturbation_radius, _pgd(perturbation_radius, 1)),
    )  # fmt: skip


def _lesson(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    """Warm starts spread noise steps over many visits. EM: its own small steps, no curriculum."""
    if method == "em":
        budget = dict(steps=1, samples=1, step_size=radius / 10)
    else:
        budget = dict(steps=2, samples=2, step_size=3 / 8 * radius, fade_in=0.5, ramp=0.8)
    return CraftRecipe(
        radius=radius, start="warm", surrogate="tiny", sgd=SGD(steps=930, batch=64), **budget,
        **sides(method, perturbation_radius, _pgd(perturbation_radius, 2)),
    )  # fmt: skip


def _demo(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    recipe = _lesson(method, radius, perturbation_radius)
    return replace(recipe, steps=1, sgd=SGD(steps=400 if method == "em" else 600, batch=64))


def _paper(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    both = sides(method, perturbation_radius, PGD(perturbation_radius))
    return CraftRecipe(radius=radius, step_size=radius / 5, **both)


def _paper_large(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    return CraftRecipe(
        radius=radius, step_size=radius / 4, steps=7, samples=4, augment=ResizedCrop(224), surrogate=STRIDE1,
        sgd=SGD(steps=3000, batch=128, milestones=(1200, 2400)),
        **sides(method, perturbation_radius, PGD(perturbation_radius, 7, perturbation_radius / 4 or None)),
    )  # fmt: skip


def craft_recipe(
    method: str = "sem",
    preset: str = "lesson",
    *,
    radius: float = 8,
    perturbation_radius: float = 4,
    surrogate: str | None = None,
    size: int = 32,
    class_wise: bool = False,
) -> CraftRecipe:
    """The CraftRecipe of a method at a preset, radii in pixel levels; size: side of the images.

    quick: seconds, for tests, protects little. demo: for the embedded images. lesson: minutes on two cores; its SEM is
    the cheapest that was found to protect as the published noise step does (results/README.md, cifar10-budgets).
    paper: the released recipe of SEM and REM for CIFAR-10 and CIFAR-100, and from 64 pixels on the one for the ImageNet
    subset; its EM has their EOT samples, random starts and steps, not the warm starts and schedule of Huang et al.
    Raises ValueError for unknown names, and for radii that are none.
    """
    check_name(preset, PRESETS, "preset")
    radius, perturbation_radius = check_radius(radius), check_radius(perturbation_radius, "perturbation_radius")
    made = {"quick": _quick, "demo": _demo, "lesson": _lesson}.get(preset, _paper_large if size >= LARGE else _paper)
    recipe = made(method, radius, perturbation_radius)
    start = "warm" if class_wise else recipe.start
    return replace(recipe, surrogate=surrogate or recipe.surrogate, class_wise=class_wise, start=start)


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
        perturbation = _pgd(perturbation_radius, {"quick": 1, "demo": 2, "lesson": 2, "paper": 10}[preset], norm)
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


def lasting(recipe: CraftRecipe | LearnRecipe, steps: int) -> CraftRecipe | LearnRecipe:
    """The recipe with another number of steps; its learning rate's milestones move along."""
    share = steps / recipe.sgd.steps
    milestones = tuple(round(share * milestone) for milestone in recipe.sgd.milestones)
    return replace(recipe, sgd=replace(recipe.sgd, steps=steps, milestones=milestones))


def sweep_recipes(
    methods: Iterable[str], radii: Iterable[float], preset: str = "lesson", *, size: int = 32
) -> tuple[dict[str, CraftRecipe | ClassFilters | None], dict[float, LearnRecipe]]:
    """(crafts, learners) for study.grid: methods by name, "clean" for unprotected images, and training radii."""
    other = {"clean": None, "cuda": ClassFilters()}
    crafts = {name: other[name] if name in other else craft_recipe(name, preset, size=size) for name in methods}
    return crafts, {r: learn_recipe(preset, perturbation_radius=r, size=size) for r in radii}
