"""Countermeasures by name: everything that a trainer does about protected images. Test images are never changed.

To add one, write a function and add a line to COUNTERMEASURES; it then works on the command line, in grids and figures.
Two need no entry: adversarial training at any radius is a learner with PGD(radius), and early stopping is a row's
`best` in place of its `last`, an oracle, because `best` is chosen on the test images.

>>> sk.COUNTERMEASURES["jpeg"].label, sk.registry.named("jpeg-30").option
('JPEG {}', 30)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from semkit.countermeasures import pixelwise, trainers
from semkit.countermeasures.augmentations import Coin, ColorJitter, Cutout, Plasma, Sharpened, TrivialAugment
from semkit.countermeasures.transform import Transform, transformed
from semkit.images.augment import JPEG, Identity, OneOf
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_name
from semkit.nets.engine import Engine
from semkit.nets.models import check_net
from semkit.training.objectives import Mixed, Plain
from semkit.training.perturb import PGD, Clean
from semkit.training.recipes import LearnRecipe

QUALITIES, PERCENT = range(1, 96), range(1, 101)


@dataclass(frozen=True)
class Countermeasure:
    """What a trainer does about protected images: to the images, or to the learner. This one does nothing.

    label: for figures; {} stands for the option. change: what the kind calls (see below), the option last.
    option: the number of NAME-N, or the file of NAME=FILE. allowed: the numbers that it may be.
    """

    label: str
    change: Callable | None = None
    option: int | str | None = None
    allowed: range = range(0)

    @property
    def spelling(self) -> str:
        """What may follow the name."""
        return "[-N]" if self.allowed else ""

    def check(self) -> None:
        """Raises ValueError if a file that it needs is missing."""

    def needs(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> str:
        """What this countermeasure needs and does not have, "" if nothing."""
        return ""

    def learner(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> LearnRecipe:
        """The changed recipe. train: the images that the learner would get so far."""
        return recipe

    def images(self, train: ImageSet, spare: ImageSet | None, engine: Engine) -> ImageSet:
        """The changed training images."""
        return train

    def _changed(self, *given):
        return self.change(*given) if self.option is None else self.change(*given, self.option)


class ByImage(Countermeasure):
    """change(images) -> images, both uint8 [N,3,H,W], each image by itself."""

    def fitted(self, train: ImageSet, engine: Engine) -> Callable[[Tensor], Tensor]:
        """The change of images uint8 [N,3,H,W], fitted to the training set where it depends on it."""
        return self._changed

    def images(self, train: ImageSet, spare: ImageSet | None, engine: Engine) -> ImageSet:
        change = self.fitted(train, engine)
        return train.changed(lambda images, _: change(images))


class BySet(ByImage):
    """change(images, labels) -> a change of images, fitted to the whole training set."""

    def fitted(self, train: ImageSet, engine: Engine) -> Callable[[Tensor], Tensor]:
        if not len(train):
            raise ValueError(f"{self.label.format(self.option)} is fitted to an image or more, got none")
        return self._changed(train.images, train.labels)


class ByNet(ByImage):
    """change(images, engine, file) -> images, uint8 [N,3,H,W]: needs the net in NAME=FILE."""

    spelling = "=FILE"

    def check(self) -> None:
        if self.option is None:
            raise ValueError("a purifier needs an external net: purifier=FILE, made by semkit learn IMAGES --save FILE")
        check_net(self.option)

    def fitted(self, train: ImageSet, engine: Engine) -> Callable[[Tensor], Tensor]:
        return lambda images: self._changed(images, engine)


class ByAugment(Countermeasure):
    """change(augment) -> the learner's augmentation."""

    def learner(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> LearnRecipe:
        return replace(recipe, augment=self._changed(recipe.augment))


class ByLoss(Countermeasure):
    """change(classes) -> objective: in place of the plain cross-entropy, for that many classes."""

    def needs(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> str:
        plain = recipe.objective == Plain()
        return "" if plain else f"a learner on the plain cross-entropy, it is on {recipe.objective}"

    def learner(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> LearnRecipe:
        return replace(recipe, objective=self._changed(len(train.classes)))


class ByPerturbation(Countermeasure):
    """change() -> the perturbation with which an ERM learner then trains."""

    def needs(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> str:
        erm = recipe.perturbation == Clean()
        return "" if erm else f"an ERM learner (radius 0), this one has {recipe.perturbation}"

    def learner(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> LearnRecipe:
        return replace(recipe, perturbation=self._changed())


@dataclass(frozen=True)
class BySpare(Countermeasure):
    """change(recipe, train, spare) -> recipe: needs clean images in addition to the training set.

    option N: N % as many clean images as training images; without one all that there are.
    trained_on(train, spare) -> the images that are trained on, where these are others than `train`.
    """

    trained_on: Callable[[ImageSet, ImageSet], ImageSet] | None = None

    def _wanted(self, train: ImageSet) -> int:
        return round(len(train) * self.option / 100) if self.option else 1

    def _clean(self, train: ImageSet, spare: ImageSet) -> ImageSet:
        return spare.limit(self._wanted(train)) if self.option else spare

    def needs(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> str:
        there, wanted, n = len(spare) if spare else 0, self._wanted(train), len(train)
        if there < max(1, wanted):
            number, found = (f"{wanted} ", f", of which there are {there}") if there else ("", "")
            return f"{number}spare clean images: the test images that --test-limit N leaves over{found}"
        if (spare.classes, spare.images.shape[1:]) != (train.classes, train.images.shape[1:]):
            return f"spare clean images of the classes and size of {train!r}, got {spare!r}"
        if not self.option or wanted >= (classes := len(spare.labels.unique())):
            return ""
        few = f"a clean image of each of the {classes} classes, but {self.option} % of {n} training images are {wanted}"
        return f"{few}: write N >= {math.ceil(100 * classes / n)} in NAME-N, or train on more images"

    def learner(self, recipe: LearnRecipe, train: ImageSet, spare: ImageSet | None) -> LearnRecipe:
        return self.change(recipe, train, self._clean(train, spare)) if self.change else recipe

    def images(self, train: ImageSet, spare: ImageSet | None, engine: Engine) -> ImageSet:
        return self.trained_on(train, self._clean(train, spare)) if self.trained_on else train


UERASER = TrivialAugment(Plasma(Identity()))

COUNTERMEASURES: dict[str, Countermeasure] = {  # jpeg: of the stored image; jpegload: after crop and flip, every time
    "none": Countermeasure("none"),
    "jpeg": ByImage("JPEG {}", pixelwise.jpeg, 10, QUALITIES),
    "jpegload": ByAugment("JPEG {} at load", lambda first, quality: OneOf((JPEG(quality),), first), 10, QUALITIES),
    "grayscale": ByImage("grey-scale", pixelwise.grayscale),
    "grayjpeg": ByImage("grey-scale, JPEG {}", pixelwise.grayjpeg, 10, QUALITIES),
    "webp": ByImage("WebP {}", pixelwise.webp, 10, PERCENT),
    "resize": ByImage("resize to {} %", pixelwise.resize, 50, PERCENT),
    "bitdepth": ByImage("bit depth {}", pixelwise.bitdepth, 2, range(1, 9)),
    "mean": ByImage("mean", pixelwise.mean),
    "gaussian": ByImage("Gaussian blur", pixelwise.gaussian),
    "median": ByImage("median", pixelwise.median),
    "bilateral": ByImage("bilateral", pixelwise.bilateral),
    "projection": BySet("projection", pixelwise.projection),
    "denoise": BySet("denoised at {}", pixelwise.denoiser, 43, range(129)),
    "purifier": ByNet("purifier", lambda images, engine, file: transformed(images, Transform(file), engine)),
    "cutout": ByAugment("cutout", lambda first: Cutout(first=first)),
    "colorjitter": ByAugment("colour jitter", lambda first: ColorJitter(first=first)),
    "trivialaugment": ByAugment("TrivialAugment", TrivialAugment),
    "coin": ByAugment("COIN", Coin),
    "rsk": ByAugment("RSK, low-pass", Sharpened),
    "ueraser-lite": ByAugment("UEraser lite", lambda first: TrivialAugment(Plasma(first))),
    "ueraser": ByPerturbation("UEraser", partial(trainers.Worst, UERASER, until=0.3)),
    "ueraser-max": ByPerturbation("UEraser max", partial(trainers.Worst, UERASER)),
    "mixup": ByLoss("mixup", partial(Mixed, "mixup")),
    "cutmix": ByLoss("cutmix", partial(Mixed, "cutmix")),
    "randomblur": ByPerturbation("random blur", trainers.RandomBlur),
    "smoothing": ByPerturbation("smoothing", trainers.Gaussian),
    "at-l2": ByPerturbation("AT L2 0.5", partial(PGD, 127.5, norm="l2")),
    "dat": ByPerturbation("DAT", trainers.ClassBlur),
    "finetune": BySpare("fine-tuned", trainers.finetune),
    "lastlayer": BySpare("last layer", trainers.probe),
    "dfr": BySpare("DFR, {} % clean", trainers.reweight, 10, PERCENT, lambda train, spare: spare),
    "addclean": BySpare("{} % clean added", None, 20, PERCENT, trainers.added),
    "onlyclean": BySpare("{} % clean alone", None, 20, PERCENT, lambda train, spare: spare),
}


def named(text: str) -> Countermeasure:
    """The countermeasure of NAME, NAME-N or NAME=FILE; raises ValueError with the nearest name for an unknown one.

    >>> named("jpeg-30").option, named("jpeg").option
    (30, 10)
    """
    name, equals, file = text.partition("=")
    if equals and isinstance(COUNTERMEASURES.get(name), ByNet):
        return replace(COUNTERMEASURES[name], option=file)
    name, _, number = text.rpartition("-")
    if number.isdecimal() and name in COUNTERMEASURES and (allowed := COUNTERMEASURES[name].allowed):
        if int(number) not in allowed:
            raise ValueError(f"{name}-N takes N from {allowed[0]} to {allowed[-1]}, got {number}")
        return replace(COUNTERMEASURES[name], option=int(number))
    return COUNTERMEASURES[check_name(text, tuple(COUNTERMEASURES), "countermeasure")]


def check_countermeasure(text: str) -> str:
    """`text` if it names a countermeasure and the file that it needs is there; raises ValueError otherwise."""
    named(text).check()
    return text


def label_of(text: str) -> str:
    """The label of a countermeasure for figures; its own text if it is unknown, as in rows of another version.

    >>> label_of("jpeg-30"), label_of("purifier=external.safetensors")
    ('JPEG 30', 'purifier')
    """
    try:
        return named(text).label.format(named(text).option)
    except ValueError:
        return text


def place_of(text: str) -> int:
    """The place of a countermeasure in COUNTERMEASURES, to sort rows by; unknown ones come last."""
    try:
        return [each.label for each in COUNTERMEASURES.values()].index(named(text).label)
    except ValueError:
        return len(COUNTERMEASURES)


def check_list(names: Sequence[str]) -> Sequence[str]:
    """`names` if they are a list; raises ValueError for one name alone, whose letters would be taken for names."""
    if isinstance(names, str):
        raise ValueError(f"countermeasures must be a list of names: write [{names!r}]")
    return names


def learner_after(
    recipe: LearnRecipe, names: Sequence[str], train: ImageSet, spare: ImageSet | None = None
) -> LearnRecipe:
    """The learner's recipe after the countermeasures, in this order, before any image is changed.

    spare: clean images besides the training set. Raises ValueError for an unknown name, a missing file, and what a
    countermeasure needs and does not have.
    """
    for name in check_list(names):
        each = named(name)
        each.check()
        if need := each.needs(recipe, train, spare):
            raise ValueError(f"{name} needs {need}")
        recipe = each.learner(recipe, train, spare)
    return recipe


def counter(
    train: ImageSet,
    recipe: LearnRecipe,
    names: Sequence[str],
    engine: Engine | None = None,
    spare: ImageSet | None = None,
) -> tuple[ImageSet, LearnRecipe]:
    """(training images, learner's recipe) after the countermeasures, applied in the order given.

    engine: runs the purifier's net, Engine() by default. spare and errors: as in learner_after.
    """
    learner_after(recipe, names, train, spare)  # raises before any image is changed
    for name in names:
        recipe = learner_after(recipe, [name], train, spare)
        changed = named(name).images(train, spare, engine or Engine())
        train = train if changed is train else replace(changed, name=f"{train.name}, {name}")
    return train, recipe
