"""The types behind a protection: its entry in PROTECTIONS, and the recipe that the entry builds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from semkit.images.augment import Augment, FlipCrop
from semkit.images.imageset import ImageSet, stratified_share
from semkit.images.picture import apply_noise
from semkit.images.pixels import check_fraction, check_radius, check_seed
from semkit.nets.engine import Passes, how_run
from semkit.nets.lab import Lab, Store, as_dict, as_json, as_net, kept
from semkit.protections.noise import Noise, clipped, load, save

COST = {"passes": int, "seconds": float | int, "engine": str}  # field -> its type
NOISE_SIZE = (
    "The noise was crafted at {size} x {size} pixels and resized to each image, within the radius. Resizing by a "
    "trainer weakens it: semkit learn IMAGES --protected OUT measures how much."
)


@dataclass(frozen=True)
class Option:
    """An option of a protection, on the command line --name VALUE.

    parse: text -> value, or ValueError; None for a switch without a value. private: never shown or written; required,
    from the command line or the environment `variable`.
    """

    name: str
    default: object
    help: str
    parse: Callable[[str], object] | None = str
    metavar: str | None = None
    private: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return f"SEMKIT_{self.name.upper()}"


def _levels(text: str) -> float:
    if (radius := check_radius(text)) < 1:
        raise ValueError(f"radius must be 1 level at least to change 8-bit images, got {text}")
    return radius


RADIUS = Option("radius", 8, "largest change of a value in levels of 255", _levels)


@dataclass(frozen=True)
class Protection:
    """A protection: its label, its style in figures, its options, and the function that builds its recipe.

    recipe(preset, *, size, **own) -> a Recipe, or None for no protection; own: values of `options` by name.
    style: colour, marker and line. bound: if no radius bounds it, a sentence about that.
    """

    label: str
    style: tuple[str, str, str]
    recipe: Callable[..., "Recipe | None"]
    options: tuple[Option, ...] = ()
    bound: str = ""

    @property
    def radius(self) -> float | None:
        """Its default budget, the largest change of a value in levels; None without one."""
        return next((option.default for option in self.options if option.name == "radius"), None)


@dataclass(frozen=True)
class Change:
    """How a recipe changes the pictures of a folder.

    picture(i, original) -> the protected picture i, at its own size. told: entries of the report. noise: the noise that
    is added, if it is noise.
    """

    picture: Callable[[int, Image.Image], Image.Image]
    told: dict
    noise: Noise | None = None


class Recipe:
    """Base of the recipes of protections, which are frozen dataclasses.

    radius: the largest change of a value in levels, None if no radius bounds it. net: the name of its surrogate, None
    without one; then the result does not depend on the engine. method: the name in PROTECTIONS, needed without a
    radius, because `semkit check` then applies the recipe again.
    """

    radius: float | None = None
    net: str | None = None
    method: str | None = None

    def cost(self, n: int) -> Passes:
        """The passes of protecting n images."""
        return Passes()

    def apply(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> tuple[ImageSet, dict]:
        """(the protected images, the cost of their noise or {})."""
        raise NotImplementedError

    def change(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> Change:
        """How the pictures of a folder are changed at their own size; `images` are the same ones at the nets' size."""
        raise ValueError(f"{self} is made for measurements, not for folders of pictures")

    def tests(self, images: ImageSet, *, seed: int = 0) -> dict[str, ImageSet]:
        """Test sets besides the clean one, by name."""
        return {}

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError for a size of pictures that the recipe cannot change."""


def _left_clean(images: ImageSet, protected: float, seed: int) -> torch.Tensor:
    """Which images stay clean if a share of every class is protected: bool [N]."""
    left = torch.ones(len(images), dtype=torch.bool)
    left[stratified_share(images.labels.cpu(), protected, seed)] = False
    return left


@dataclass(frozen=True)
class PartlyProtected(Recipe):
    """A share of every class as the recipe `whole` protects it, the rest clean; larger shares contain smaller ones.

    `whole` makes its noise for all images, which takes the same passes at every share. Raises ValueError for a share
    outside (0, 1].
    """

    whole: Recipe
    share: float

    def __post_init__(self):
        check_fraction(self.share, "share")

    def apply(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> tuple[ImageSet, dict]:
        protected, cost = self.whole.apply(images, seed=seed, lab=lab)
        left = _left_clean(images, self.share, seed).to(images.images.device)[:, None, None, None]
        return protected.changed(lambda pixels, part: torch.where(left[part], images.images[part], pixels)), cost

    def tests(self, images: ImageSet, *, seed: int = 0) -> dict[str, ImageSet]:
        return self.whole.tests(images, seed=seed)


@dataclass(frozen=True)
class CleanPart(Recipe):
    """The images that PartlyProtected with this share and seed leaves clean, without the others.

    Raises ValueError for a share outside (0, 1).
    """

    share: float

    def __post_init__(self):
        if check_fraction(self.share, "share") == 1:
            raise ValueError("nothing is left clean where all is protected")

    def apply(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> tuple[ImageSet, dict]:
        return images.take(_left_clean(images, self.share, seed)), {}


@dataclass
class Crafted:
    """Noise int8 [N,C,H,W] in levels, the surrogate or None, its loss at every step, and the cost."""

    noise: torch.Tensor
    surrogate: nn.Module | None = None
    losses: list[float] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)
    seconds: float = 0.0


class NoiseRecipe(Recipe):
    """Base of recipes that make noise of at most `radius` levels for a whole set, by their method `craft`.

    A recipe with a net also has augment and sgd, and at_once: the most EOT samples in a batch of its noise step, 0 if
    it takes plain input gradients.
    """

    augment: Augment = FlipCrop()
    at_once: int = 0

    def craft(self, images: ImageSet, *, seed: int, lab: Lab, checkpoint: Path | None) -> Crafted:
        """Make the noise. A long run saves its state in `checkpoint` now and then, and goes on from there."""
        raise NotImplementedError

    def crafted(
        self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None
    ) -> tuple[Noise, dict, nn.Module | None]:
        """(noise, its cost {"passes", "seconds", "engine"}, the surrogate or None), kept in lab.cache.

        Raises ValueError for a damaged file in the cache.
        """
        lab, seed = lab or Lab(), check_seed(seed)
        made = {**as_dict(self), "seed": seed, "precision": lab.engine.precision}

        def make(state: Path | None):
            done = self.craft(images, seed=seed, lab=lab, checkpoint=state)
            noise = Noise(done.noise, self.radius, made, images.fingerprint, images.classes)
            engine = how_run(done.surrogate) if self.net else ""
            cost = {"passes": done.passes.total, "seconds": round(done.seconds, 1), "engine": engine}
            return (noise, cost, done.surrogate)[: len(stores)]

        def read(path: Path) -> Noise:
            noise = load(path, images=images)
            if (noise.recipe, noise.radius, noise.class_wise) != (made, self.radius, False):
                raise ValueError("noise of another recipe")
            return noise

        stores = [Store(".safetensors", save, read), as_json(COST)]
        stores += [as_net(self, images, lab.engine)] if self.net else []
        noise, cost, *nets = kept(lab, "noise", (images.fingerprint, self, seed), make, *stores)
        return noise, cost, nets[0] if nets else None

    def apply(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> tuple[ImageSet, dict]:
        noise, cost, _ = self.crafted(images, seed=seed, lab=lab)
        return images.with_noise(noise.levels), cost

    def change(self, images: ImageSet, *, seed: int = 0, lab: Lab | None = None) -> Change:
        noise, cost, _ = self.crafted(images, seed=seed, lab=lab)
        levels, radius = noise.levels.numpy(), noise.radius
        told = {
            **cost, "radius": radius, "noise_size": NOISE_SIZE.format(size=levels.shape[-1]),
            **clipped(noise, images.images),
        }  # fmt: skip
        return Change(lambda i, original: apply_noise(original, levels[i], radius), told, noise)
