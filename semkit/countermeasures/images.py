"""What a trainer does to the training images first, to be rid of the protection; test images stay as they are.

By image: a function of uint8 images [N,3,H,W] that looks at nothing else. By set: one that needs the labels too. By
batch: an augmentation of the learner. By loss: what its steps go down on. All values are rounded, none is cut off.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semkit.countermeasures.transform import Transform, transformed
from semkit.images.augment import Augment, ColorJitter, Cutout
from semkit.images.imageset import ImageSet
from semkit.images.picture import through_jpeg
from semkit.images.pixels import add_noise, check_count, check_name, to_float
from semkit.nets.engine import Engine
from semkit.nets.models import check_net
from semkit.training.learning import LearnRecipe
from semkit.training.mixing import MIXTURES, Mixed
from semkit.training.objectives import Plain

BATCH = 1000  # images that a bilateral blur holds as floats


def none(images: Tensor) -> Tensor:
    """The images as they are, to compare with."""
    return images


def jpeg(images: Tensor, quality: int = 10) -> Tensor:
    """Each image as JPEG of the given quality (1 to 95, colour at half resolution), and back.

    Source: Liu et al., Image Shortcut Squeezing, ICML 2023.
    """
    if check_count(quality, "quality", 1) > 95:
        raise ValueError(f"quality must be 1 to 95, got {quality}")
    done = torch.empty_like(images)
    for i, image in enumerate(images):
        levels = image.permute(1, 2, 0).cpu().contiguous().numpy()
        done[i] = torch.from_numpy(through_jpeg(levels, quality)).permute(2, 0, 1)
    return done


def grayscale(images: Tensor) -> Tensor:
    """All three channels the luma .299 R + .587 G + .114 B. Source: Liu et al., ICML 2023."""
    red, green, blue = images.to(torch.int32).unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16  # Pillow's fixed point
    return luma.to(torch.uint8)[:, None].expand_as(images).contiguous()


def bitdepth(images: Tensor, bits: int = 2) -> Tensor:
    """Each value the nearest of 2^bits evenly spaced ones from 0 to 255. Source: Liu et al., ICML 2023."""
    if not 1 <= check_count(bits, "bits") <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    step = 255 / (2**bits - 1)
    return ((images / step).round() * step).round().to(torch.uint8)


def _smooth(images: Tensor, weights: Sequence[int]) -> Tensor:
    """The images filtered by whole `weights` down and across, divided by their sum; mirrored at the border."""
    from scipy import ndimage  # half a second that importing semkit need not pay

    total, area = images.cpu().numpy().astype(np.int32), sum(weights) ** 2
    for axis in (2, 3):
        total = ndimage.correlate1d(total, weights, axis, mode="mirror")
    return torch.from_numpy(((total + area // 2) // area).astype(np.uint8)).to(images.device)


def mean(images: Tensor) -> Tensor:
    """The mean of 3 x 3 pixels, as REM's and SEM's code filters."""
    return _smooth(images, (1, 1, 1))


def gaussian(images: Tensor) -> Tensor:
    """The Gaussian of 3 x 3 pixels, 1/4 1/2 1/4 down and across: sigma .85. (With sigma .1 it would do nothing.)"""
    return _smooth(images, (1, 2, 1))


def median(images: Tensor) -> Tensor:
    """The median of 3 x 3 pixels, the border's pixels repeated outside."""
    from scipy import ndimage

    done = ndimage.median_filter(images.cpu().numpy(), (1, 1, 3, 3), mode="nearest")
    return torch.from_numpy(done).to(images.device)


def _neighbours(x: Tensor, radius: int) -> Iterator[tuple[int, Tensor]]:
    """(squared distance, the pixel there) for all offsets within the circle; mirrored at the border."""
    (height, width), padded = x.shape[2:], F.pad(x, [radius] * 4, mode="reflect")
    for down in range(-radius, radius + 1):
        reach = math.isqrt(radius**2 - down**2)
        for right in range(-reach, reach + 1):
            top, left = radius + down, radius + right
            yield down**2 + right**2, padded[..., top : top + height, left : left + width]


def bilateral(images: Tensor, diameter: int = 9, sigma_colour: float = 75, sigma_space: float = 75) -> Tensor:
    """The mean of the pixels in a circle, those alike counting most: edges stay. As REM's and SEM's code filters.

        weight = exp(-distance^2 / 2 sigma_space^2 - (|R - R'| + |G - G'| + |B - B'|)^2 / 2 sigma_colour^2)

    Distances in pixels, colours in levels. Source: Tomasi & Manduchi, ICCV 1998.
    """

    def blurred(part: Tensor) -> Tensor:
        x = part.float()
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for squared, there in _neighbours(x, diameter // 2):
            apart = (there - x).abs().sum(1, keepdim=True)
            weight = (-squared / (2 * sigma_space**2) - apart**2 / (2 * sigma_colour**2)).exp()
            total, weights = total + weight * there, weights + weight
        return (total / weights).round().to(torch.uint8)

    return torch.cat([blurred(part) for part in images.split(BATCH)])


def linear_softmax(x: Tensor, labels: Tensor, steps: int = 100) -> Tensor:
    """[K,D]: weights of the bias-free linear classifier of x [N,D] with the least cross-entropy, by L-BFGS from 0.

    Less their mean over the classes, which a softmax does not see: of rank K - 1.
    """
    weights = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weights.T, labels)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach() - weights.detach().mean(0)


def projection(images: Tensor, labels: Tensor, steps: int = 100) -> Tensor:
    """Orthogonal projection: what a linear classifier of these images looks at, taken out of them.

        W = linear_softmax(pixels, labels),   x <- x - Q Q' (x - mean),   Q an orthonormal base of W's rows

    Removes linearly separable noise, and of the content what is linear too. The mean image keeps its place (our choice:
    without it the images are the same but for a constant one, which leaves many values below 0, where they are lost).
    Source: Sandoval-Segura et al., NeurIPS 2023.
    """
    x = to_float(images).flatten(1)
    _, sizes, rows = torch.linalg.svd(linear_softmax(x, labels, steps), full_matrices=False)
    base = rows[sizes > 1e-5 * sizes[0]]
    projected = x - (x - x.mean(0)) @ base.T @ base
    return (projected * 255).round().clamp(0, 255).to(torch.uint8).view_as(images)


BY_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (none, jpeg, grayscale, bitdepth, mean, gaussian, median, bilateral)
}
BY_SET: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"projection": projection}
BY_BATCH: dict[str, Callable[[Augment], Augment]] = {
    "cutout": lambda augment: Cutout(first=augment),
    "colorjitter": lambda augment: ColorJitter(first=augment),
}
BY_LOSS: dict[str, Callable[[int], Mixed]] = {name: partial(Mixed, name) for name in MIXTURES}  # of how many classes
PURIFIER = "purifier"  # purifier=FILE: each image moved by Transform(FILE), the file of an external net
COUNTERMEASURES = (*BY_IMAGE, *BY_SET, *BY_BATCH, *BY_LOSS, PURIFIER)


def check_countermeasure(text: str) -> str:
    """`text` if it names a countermeasure; raises ValueError with the nearest name, or where a purifier has no net."""
    name, equals, file = text.partition("=")
    check_name(name if name == PURIFIER else text, COUNTERMEASURES, "countermeasure")
    if name == PURIFIER:
        if not equals:
            raise ValueError("a purifier needs an external net: purifier=FILE, made by semkit learn IMAGES --save FILE")
        check_net(file)
    return text


def _changed(train: ImageSet, name: str, engine: Engine) -> ImageSet:
    if name in BY_IMAGE:
        return train.changed(lambda images, _: BY_IMAGE[name](images))
    if name.startswith(PURIFIER):
        return replace(train, images=transformed(train.images, Transform(name.partition("=")[2]), engine))
    return replace(train, images=BY_SET[name](train.images, train.labels))


def noise_left(images: Tensor, noise: Tensor, change: Callable[[Tensor], Tensor]) -> float:
    """How much of a noise [N,3,H,W] is still there after a countermeasure, as a share of its own length squared.

        <noise, change(images + noise) - change(images)> / <noise, noise>

    1: all of it. 0: nothing along the noise. images uint8, noise int8 in levels. Raises ValueError for no noise.
    """
    protected = add_noise(images, noise)
    noise = protected.double() - images.double()  # what the box leaves of it
    if not noise.any():
        raise ValueError("there is no noise of which something could be left")
    left = change(protected).double() - change(images).double()
    return float((noise * left).sum() / (noise * noise).sum())


def counter(
    train: ImageSet, recipe: LearnRecipe, names: Sequence[str], engine: Engine | None = None
) -> tuple[ImageSet, LearnRecipe]:
    """The training images and the learner's recipe after the countermeasures, applied in the order given.

    engine: runs the purifier's net; Engine() unless given. Only training images come in here. Raises ValueError for an
    unknown name, for a purifier without its net, and for mixed images where the learner has another loss than the plain
    one.
    """
    for name in map(check_countermeasure, names):
        if name in BY_BATCH:
            recipe = replace(recipe, augment=BY_BATCH[name](recipe.augment))
        elif name in BY_LOSS:
            if recipe.objective != Plain():
                raise ValueError(f"{name} needs a learner on the plain cross-entropy, it is on {recipe.objective}")
            recipe = replace(recipe, objective=BY_LOSS[name](len(train.classes)))
        elif name != "none":
            train = replace(_changed(train, name, engine or Engine()), name=f"{train.name}, {name}")
    return train, recipe
