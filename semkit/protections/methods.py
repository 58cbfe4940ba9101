"""Every protection by its name, and the recipes of a sweep."""

from collections.abc import Iterable

from semkit.images.pixels import check_name
from semkit.protections.base import Option, Protection, Recipe
from semkit.protections.cuda import CUDA
from semkit.protections.recipes import EM, EM_GREY, RANDOM_GREY, REM, SEM, SEM_GREY, SEM_JPEG
from semkit.training.learning import LearnRecipe
from semkit.training.presets import learn_recipe

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
