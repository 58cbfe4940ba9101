"""Every protection by its name, with its recipe at every preset: PROTECTIONS, and the recipes of a sweep.

>>> sk.PROTECTIONS["sem"].label, sk.PROTECTIONS["sem"].radius
('SEM', 8)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from semkit.images.augment import JPEG, GaussianBlur, Grey, Identity, OneOf, ResizedCrop
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count, check_name, check_radius, check_seed, check_share, settle
from semkit.nets.lab import Lab
from semkit.nets.models import LARGE, MODELS, check_model
from semkit.protections.base import RADIUS, Crafted, NoiseRecipe, Option, Protection, Recipe
from semkit.protections.crafting import CraftRecipe
from semkit.protections.cuda import CUDA
from semkit.protections.noise import check_noise_radius
from semkit.training.perturb import PGD, Clean, Uniform
from semkit.training.recipes import PRESETS, SGD, STRIDE1, LearnRecipe, attack, learn_recipe

SIDES = {"none": "em", "random": "sem", "adversarial": "rem"}  # noise side -> the published method that has it
# "noise side/surrogate side" -> how it was published, or with what it differs from that.
PUBLISHED = {"none/none": "EM+EOT", "random/adversarial": "SEM", "adversarial/adversarial": "REM"}


def _fields(method: str, preset: str, radius: float) -> dict:
    """The fields of a CraftRecipe at a preset, except its two sides."""
    if preset == "quick":
        how = dict(steps=2, samples=1, start="zero", surrogate="tiny")
        return dict(step_size=radius / 2, sgd=SGD(steps=10, batch=32), **how)
    if preset == "paper":
        return dict(step_size=radius / 5)
    if preset == "paper, large":
        how = dict(steps=7, samples=4, augment=ResizedCrop(224), surrogate=STRIDE1)
        return dict(step_size=radius / 4, sgd=SGD(steps=3000, batch=128, milestones=(1200, 2400)), **how)
    # Warm starts spread the noise steps over many visits.
    demo, how = preset == "demo", dict(start="warm", surrogate="tiny")
    if method == "em":  # its own small steps, no curriculum
        return dict(steps=1, samples=1, step_size=radius / 10, sgd=SGD(steps=400 if demo else 930, batch=64), **how)
    how |= dict(fade_in=0.5, ramp=0.8)
    if demo:
        return dict(steps=1, samples=2, step_size=3 / 8 * radius, sgd=SGD(steps=600, batch=64), **how)
    # Small batches, because more steps of the surrogate help more than more images in each.
    return dict(steps=3, samples=1, step_size=radius / 4, sgd=SGD(steps=2232, batch=16), **how)


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
    """The CraftRecipe of em, rem or sem at a preset; radii in pixel levels, size: side of the images in pixels.

    The noise side and the surrogate side of em are Clean, Clean (Huang et al., ICLR 2021), of rem PGD, PGD (Fu et al.,
    ICLR 2022), of sem Uniform, PGD (Liu et al., AAAI 2024); at perturbation_radius 0 all are em's.

    quick: seconds, for tests; protects little. demo: for the embedded images. lesson: minutes on two cores; its SEM
    takes a twentieth of the published noise step's passes and, on CIFAR-10, protects more from AT (results/README.md,
    frontier). paper: the released recipe of SEM and REM for CIFAR-10 and CIFAR-100, and for the ImageNet subset from 64
    pixels on. Its EM has their EOT samples, random starts and steps, not the warm starts and schedule of Huang et al.
    Raises ValueError for unknown names and radii out of range.

    >>> sk.craft_recipe("sem", "lesson").cost(4000).total
    186976
    """
    check_name(preset, PRESETS, "preset")
    radius, r = RADIUS.parse(radius), check_radius(perturbation_radius, "perturbation_radius")
    preset = "paper, large" if preset == "paper" and size >= LARGE else preset
    pgd = {
        "quick": attack(r, 1), "demo": attack(r, 2), "lesson": attack(r, 1), "paper": PGD(r),
        "paper, large": PGD(r, 7, r / 4 or None),
    }[preset]  # fmt: skip
    sides = {"sem": (Uniform(r), pgd), "rem": (pgd, pgd), "em": (Clean(), Clean())}
    fields = _fields(check_name(method, tuple(sides), "method"), preset, radius)
    recipe = CraftRecipe(*sides[method if r else "em"], radius, **fields)
    start = "warm" if class_wise else recipe.start
    return replace(recipe, surrogate=surrogate or recipe.surrogate, class_wise=class_wise, start=start, colour=colour)


def large_batches(preset: str = "lesson", **own) -> CraftRecipe:
    """The lesson preset's SEM for batches of 64: two noise steps of two EOT samples, two steps of ascent.

    Achromatic noise is built on it, because the preset's batches of 16 weaken it by some 10 points (results/README.md,
    worst-column); so is gpu-check, for its large batches. At the other presets it is their SEM. own: as of
    craft_recipe.

    >>> sk.methods.large_batches().sgd.batch, sk.methods.large_batches("demo") == sk.craft_recipe("sem", "demo")
    (64, True)
    """
    recipe = craft_recipe("sem", preset, **own)
    if preset != "lesson":
        return recipe
    side, sgd = recipe.surrogate_side, SGD(steps=930, batch=64)
    side = attack(side.radius, 2) if side.passes else side
    return replace(recipe, surrogate_side=side, steps=2, samples=2, step_size=3 / 8 * recipe.radius, sgd=sgd)


def grey_recipe(preset: str = "lesson", **own) -> CraftRecipe:
    """Achromatic SEM: the same noise in R, G and B, because grey-scale removes all colour and JPEG most of it.

    This kit's own, large_batches without colour. Where noise starts warm, its passes go into noise steps of one EOT
    sample each. Mean protection was higher with them; three seeds do not decide it (results/README.md, worst-column).
    own: as of craft_recipe.

    >>> sk.methods.grey_recipe().steps, sk.methods.grey_recipe().samples
    (4, 1)
    """
    recipe = large_batches(preset, **{"colour": 0, **own})
    return replace(recipe, steps=recipe.steps * recipe.samples, samples=1) if recipe.start == "warm" else recipe


def jpeg_recipe(preset: str = "lesson", **own) -> CraftRecipe:
    """Achromatic SEM whose augmentations t ~ T end with nothing, grey-scale, Gaussian blur or JPEG 10, on both sides.

    This kit's own: the surrogate and its noise then see what a trainer's JPEG, blur or grey-scale leaves of the noise.
    Built on large_batches, as sem-grey. own: the other arguments of craft_recipe.
    """
    recipe = large_batches(preset, **{"colour": 0, **own})
    return replace(recipe, augment=OneOf((Identity(), Grey(), GaussianBlur(), JPEG(10)), recipe.augment))


@dataclass(frozen=True)
class RandomGrey(NoiseRecipe):
    """A control without a surrogate: every class has one random pattern of lighter and darker grey squares.

        noise of class k = radius * random signs, one for every `block` x `block` pixels and all three channels

    Raises ValueError for a radius that int8 noise cannot have.

    >>> RandomGrey(8, block=16).apply(sk.shapes.embedded(20, 10).train)[0]
    ImageSet('shapes', 20 images of 32x32, 10 classes)
    """

    radius: float = 8
    block: int = 4

    def __post_init__(self):
        settle(self, radius=check_noise_radius, block=partial(check_count, least=1))

    def craft(self, images: ImageSet, *, seed: int, lab: Lab, **_) -> Crafted:
        """The noise: the pattern of each image's class."""
        height, width = images.images.shape[2:]
        down, across = (torch.arange(side) // self.block for side in (height, width))
        shape = (len(images.classes), 1, int(down[-1]) + 1, int(across[-1]) + 1)
        generator = torch.Generator().manual_seed(check_seed(seed))
        signs = 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1
        patterns = int(self.radius) * signs[:, :, down][..., across].expand(-1, 3, -1, -1)
        return Crafted(patterns[images.labels.cpu()])


PERTURBATION = Option("perturbation_radius", 4, "AT radius that the noise is made to resist, in levels", check_radius)
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
SEM_GREY = Protection("grey SEM", ("#E69F00", "<", "-"), grey_recipe, (*OPTIONS, COLOUR))
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
    """The label of a method in tables and figures; an unknown name is its own label."""
    return METHODS[method].label if method in METHODS else method


def options_of(protections: dict[str, Protection]) -> dict[str, tuple[Option, list[str]]]:
    """The options of these protections: name -> (option, the methods that have it)."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for method, protection in protections.items():
        for option in protection.options:
            found.setdefault(option.name, (option, []))[1].append(method)
    return found


def sweep_recipes(
    methods: Iterable[str],
    radii: Iterable[float],
    preset: str = "lesson",
    *,
    size: int = 32,
    surrogate: str | None = None,
    learner: str | None = None,
) -> tuple[dict[str, Recipe | None], dict[float, LearnRecipe]]:
    """(crafts, learners) for study.grid: methods by name, with "clean" for unprotected images, and training radii.

    surrogate, learner: nets in place of the preset's; methods without a surrogate stay as they are. Raises ValueError
    for unknown names, and for a surrogate where no method has one.

    >>> crafts, learners = sk.sweep_recipes(["clean", "sem"], [0, 4])
    >>> list(crafts), list(learners)
    (['clean', 'sem'], [0, 4])
    """
    crafts, methods = {}, [check_name(name, tuple(METHODS), "method") for name in methods]
    if surrogate and not any(SURROGATE in METHODS[name].options for name in methods):
        raise ValueError(f"no surrogate in {', '.join(methods)}: leave the surrogate {surrogate} out")
    for name in methods:
        protection = METHODS[name]
        own = {"surrogate": surrogate} if SURROGATE in protection.options else {}
        crafts[name] = protection.recipe(preset, size=size, **own)
    return crafts, {r: learn_recipe(preset, perturbation_radius=r, learner=learner, size=size) for r in radii}
