"""Every protection by its name, with its recipe at every preset: PROTECTIONS, and the recipes of a sweep."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from semkit.images.augment import JPEG, Augment, GaussianBlur, Grey, Identity, OneOf, ResizedCrop
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count, check_name, check_radius, check_share
from semkit.nets.lab import Lab
from semkit.nets.models import LARGE, MODELS, check_model
from semkit.protections.base import Crafted, NoiseRecipe, Option, Protection, Recipe
from semkit.protections.crafting import CraftRecipe
from semkit.protections.cuda import CUDA
from semkit.protections.noise import check_noise_radius
from semkit.training.learning import LearnRecipe
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform
from semkit.training.presets import PRESETS, STRIDE1, attack, learn_recipe
from semkit.training.schedule import SGD

ERROR_MINIMISING = ("sem", "rem", "em")
SIDES = {"none": "em", "random": "sem", "adversarial": "rem"}  # noise side -> the published method that has it
# "noise side/surrogate side" -> how it was published, or with what it differs from that.
PUBLISHED = {"none/none": "EM+EOT", "random/adversarial": "SEM", "adversarial/adversarial": "REM"}


def sides(method: str, perturbation_radius: float, pgd: PGD) -> dict[str, Perturbation]:
    """The noise side and the surrogate side of a method, as fields of a CraftRecipe.

    em: Clean, Clean (Huang et al., ICLR 2021). rem: PGD, PGD (Fu et al., ICLR 2022).
    sem: Uniform, PGD (Liu et al., AAAI 2024). At radius 0 all are em.
    """
    noise_side, surrogate_side = {
        "em": (Clean(), Clean()),
        "rem": (pgd, pgd),
        "sem": (Uniform(perturbation_radius), pgd),
    }[check_name(method, ERROR_MINIMISING, "method")]
    return dict(noise_side=noise_side, surrogate_side=surrogate_side)


def _quick(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    return CraftRecipe(
        radius=radius, step_size=radius / 2, steps=2, samples=1, start="zero", surrogate="tiny",
        sgd=SGD(steps=30, batch=32),
        **sides(method, perturbation_radius, attack(perturbation_radius, 1)),
    )  # fmt: skip


def _lesson(method: str, radius: float, perturbation_radius: float) -> CraftRecipe:
    """Warm starts spread noise steps over many visits. EM: its own small steps, no curriculum."""
    if method == "em":
        budget = dict(steps=1, samples=1, step_size=radius / 10)
    else:
        budget = dict(steps=2, samples=2, step_size=3 / 8 * radius, fade_in=0.5, ramp=0.8)
    return CraftRecipe(
        radius=radius, start="warm", surrogate="tiny", sgd=SGD(steps=930, batch=64), **budget,
        **sides(method, perturbation_radius, attack(perturbation_radius, 2)),
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
    colour: float = 1,
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
    return replace(recipe, surrogate=surrogate or recipe.surrogate, class_wise=class_wise, start=start, colour=colour)


def processed(augment: Augment) -> OneOf:
    """`augment`, then what a trainer does to images in one line: nothing, grey-scale, a Gaussian blur or JPEG 10."""
    return OneOf((Identity(), Grey(), GaussianBlur(), JPEG(10)), augment)


def jpeg_recipe(preset: str = "lesson", **own) -> CraftRecipe:
    """Achromatic SEM whose views, on both sides, are `processed`, so that the noise is also learned after JPEG.

    This kit's own; options as of craft_recipe.
    """
    recipe = craft_recipe("sem", preset, **{"colour": 0, **own})
    return replace(recipe, augment=processed(recipe.augment))


@dataclass(frozen=True)
class RandomGrey(NoiseRecipe):
    """A control that no net crafts: each class has one pattern of grey squares, each lighter or darker at random.

        noise of class k = radius * random signs, one for every `block` x `block` pixels and all three channels

    Raises ValueError for a radius that int8 noise cannot have.
    """

    radius: float = 8
    block: int = 4

    def __post_init__(self):
        object.__setattr__(self, "radius", check_noise_radius(self.radius))
        object.__setattr__(self, "block", check_count(self.block, "block", 1))

    def craft(self, images: ImageSet, *, seed: int, lab: Lab, **_) -> Crafted:
        """The noise: the pattern of each image's class."""
        height, width = images.images.shape[2:]
        down, across = (torch.arange(side) // self.block for side in (height, width))
        shape = (len(images.classes), 1, int(down[-1]) + 1, int(across[-1]) + 1)
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1
        patterns = int(self.radius) * signs[:, :, down][..., across].expand(-1, 3, -1, -1)
        return Crafted(patterns[images.labels.cpu()])


def _levels(text: str) -> float:
    if check_radius(text) < 1:
        raise ValueError(f"radius must be 1 level at least to change 8-bit images, got {text}")
    return float(text)


RADIUS = Option("radius", 8, "largest change of a value in levels of 255", _levels)
PERTURBATION = Option("perturbation_radius", 4, "radius the noise is trained to stand, in levels", check_radius)
SURROGATE = Option("surrogate", None, f"one of {', '.join(MODELS)}", check_model)
CLASS_WISE = Option("class_wise", False, "one noise per class instead of one per image", None)
COLOUR = Option(
    "colour", 0, "share of the radius by which red, green and blue may differ, 0 to 1",
    partial(check_share, name="colour"),
)  # fmt: skip
OPTIONS = (RADIUS, PERTURBATION, SURROGATE, CLASS_WISE)

# Okabe and Ito's colours, which colour-blind readers can tell apart; marker and line say the same again.
EM = Protection("EM", ("#0072B2", "s", "--"), partial(craft_recipe, "em"), OPTIONS)
REM = Protection("REM", ("#009E73", "^", "-."), partial(craft_recipe, "rem"), OPTIONS)
SEM = Protection("SEM", ("#D55E00", "D", "-"), partial(craft_recipe, "sem"), OPTIONS)
EM_GREY = Protection("grey EM", ("#56B4E9", "X", "--"), partial(craft_recipe, "em", colour=0), (*OPTIONS, COLOUR))
SEM_GREY = Protection("grey SEM", ("#E69F00", "P", "-"), partial(craft_recipe, "sem", colour=0), (*OPTIONS, COLOUR))
SEM_JPEG = Protection("grey SEM + JPEG", ("#882255", "p", "-"), jpeg_recipe, (*OPTIONS, COLOUR))
RANDOM_GREY = Protection(
    "random grey", ("#999999", "h", ":"), lambda preset, *, size=32, radius=8: RandomGrey(radius), (RADIUS,)
)

PROTECTIONS: dict[str, Protection] = {
    "em": EM, "rem": REM, "sem": SEM, "cuda": CUDA,
    "em-grey": EM_GREY, "sem-grey": SEM_GREY, "sem-jpeg": SEM_JPEG, "random-grey": RANDOM_GREY,
}  # fmt: skip
DEFAULT = "sem"
CLEAN = Protection("clean images", ("#000000", "o", "-"), lambda preset, *, size=32: None)
METHODS = {"clean": CLEAN, **PROTECTIONS}  # what a sweep may train on


def label_of(method: str) -> str:
    """How a row's method is called where people read it."""
    return METHODS[method].label if method in METHODS else method


def options_of(protections: dict[str, Protection]) -> dict[str, tuple[Option, list[str]]]:
    """Every option that these protections have of their own, by name, with the names of those that have it."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for method, protection in protections.items():
        for option in protection.options:
            found.setdefault(option.name, (option, []))[1].append(method)
    return found


def sweep_recipes(
    methods: Iterable[str], radii: Iterable[float], preset: str = "lesson", *, size: int = 32
) -> tuple[dict[str, Recipe | None], dict[float, LearnRecipe]]:
    """(crafts, learners) for study.grid: methods by name, "clean" for unprotected images, and training radii."""
    crafts = {name: METHODS[check_name(name, tuple(METHODS), "method")].recipe(preset, size=size) for name in methods}
    return crafts, {r: learn_recipe(preset, perturbation_radius=r, size=size) for r in radii}
