"""Countermeasures in training: perturbations of the learner's images, nets pretrained on other images, clean images.

Where no other source is named: Sadasivan et al., CUDA, CVPR 2023, whose authors test their protection against it.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.images.augment import Augment, Identity
from semkit.images.imageset import ImageSet
from semkit.images.pixels import LEVEL, check_count, check_fraction, check_radius, check_share, settle, to_draw
from semkit.nets.engine import input_gradient, predict
from semkit.protections.cuda import blur, convolve
from semkit.training.learning import accuracy
from semkit.training.perturb import Perturbation
from semkit.training.recipes import LearnRecipe, Pretrained

LARGEST = 5.0  # entry of a filter under ascent, in size


def rescaled(x: Tensor) -> Tensor:
    """x [N,C,H,W] with every image scaled linearly to the range 0 to 1; a constant image becomes 0."""
    low = x.amin((1, 2, 3), keepdim=True)
    span = x.amax((1, 2, 3), keepdim=True) - low
    return (x - low) / span.clamp_min(torch.finfo(x.dtype).eps)


@dataclass(frozen=True)
class RandomBlur(Perturbation):
    """Filter each image with a random filter, drawn as CUDA draws the filters of the classes.

        entries ~ U(0, strength), one of them, at random, 1;  the result divided by its maximum

    So the trainer knows the protection, and lacks only its key.
    """

    kernel: int = 3
    strength: float = 0.3

    def __post_init__(self):
        settle(self, kernel=partial(check_count, least=2), strength=check_fraction)

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """The filters, [N,kernel,kernel]."""
        n, k, how = len(x), self.kernel, dict(generator=generator, device=x.device)
        filters = self.strength * torch.rand(n, k * k, **how)
        return filters.scatter_(1, torch.randint(0, k * k, (n, 1), **how), 1.0).view(n, k, k)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        return convolve(x, drawn)


@dataclass(frozen=True)
class Gaussian(Perturbation):
    """x + sigma n with n ~ N(0, 1) for every value: the training for randomised smoothing.

    sigma in levels; 127.5, half of the range, is published. The result is not clipped to the box, because that would
    cut much of the noise. The net has seen noisy images only, so a row also has its accuracy as Smoothed: `smoothed`.
    Raises ValueError for a sigma that looks like a fraction. Source: Cohen et al., ICML 2019.
    """

    sigma: float = 127.5

    def __post_init__(self):
        settle(self, sigma=check_radius)

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """sigma n, shaped x."""
        return to_draw(x).normal_(0, 1, generator=generator) * (self.sigma * LEVEL)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        return x + drawn

    def further(self, model: nn.Module, test: ImageSet) -> dict[str, float]:
        """smoothed: the accuracy of the smoothed net."""
        return {"smoothed": accuracy(Smoothed(model, self), test)}


class Smoothed(nn.Module):
    """A smoothed net: its output [N,classes] counts the votes of `copies` noisy copies of each image.

    `net` must have been prepared by an Engine; predict and accuracy take the smoothed net like any other. Every pass
    draws new noise, from `seed` on. Raises ValueError for copies < 1.
    """

    def __init__(self, net: nn.Module, noise: Gaussian, copies: int = 16, seed: int = 0):
        super().__init__()
        self.net, self.noise, self.engine = net, noise, net.engine
        self.copies = check_count(copies, "copies", 1)
        self._generator = self.engine.generator(seed, "smoothed")

    def forward(self, x: Tensor) -> Tensor:
        answers = (predict(self.net, x + self.noise.draw(x, self._generator)) for _ in range(self.copies))
        return sum(F.one_hot(a.argmax(1), a.shape[1]) for a in answers).to(x.dtype)


@dataclass(frozen=True)
class ClassBlur(Perturbation):
    """DAT: blur each class of the batch with the filter that maximises the learner's loss, by gradient ascent.

        w_c <- clip(w_c + rate * d/dw_c mean over the batch of CE(f(rescaled(blur(x, w_y))), y), -5, 5)

    `steps` times in eval mode; the learner trains on rescaled(blur(x, w_y)). Kernel size, 10 steps, rate .1 and the
    clip at 5 are published. This kit's choices: w_c starts as the identity in every batch, and it has no bias, because
    rescaling removes one.
    """

    kernel: int = 5
    steps: int = 10
    rate: float = 0.1
    whole_batch = True

    def __post_init__(self):
        settle(self, kernel=partial(check_count, least=2), steps=check_count)

    @property
    def passes(self) -> int:
        """Input gradients per image."""
        return self.steps

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        x, k, goal = x.detach(), self.kernel, y if target is None else target
        _, which = y.unique(return_inverse=True)
        filters = x.new_zeros(int(which.max()) + 1, k, k)
        filters[:, k // 2, k // 2] = 1
        for _ in range(self.steps):
            with torch.enable_grad():
                filters.requires_grad_()
                blurred = rescaled(blur(x, filters[which]))
                slope = input_gradient(model, blurred, goal) / len(x)
                (uphill,) = torch.autograd.grad(blurred, filters, slope)
            filters = (filters.detach() + self.rate * uphill).clamp(-LARGEST, LARGEST)
        return rescaled(blur(x, filters[which]))


@dataclass(frozen=True)
class Worst(Perturbation):
    """The draw of an augmentation with the largest loss, for each image, among `draws` of them: UEraser.

        x_adv = t_k(x) with k = argmax of CE(f(t_k(x)), y),  t_1 ... t_draws ~ augment

    f is in eval mode here, and trains on the chosen draws alone; the released code lets batch-norm see all of them.
    until: after this share of the training only the first draw is made. One draw is the augmentation itself. passes
    is 0, because the `draws` forward passes an image have no gradient. Source: Qin et al., UEraser, 2023.
    """

    augment: Augment = Identity()
    draws: int = 5
    until: float = 1.0

    def __post_init__(self):
        settle(self, draws=partial(check_count, least=1), until=check_share)

    def at(self, progress: float) -> "Worst":
        return self if progress < self.until else replace(self, draws=1)

    def draw(self, x: Tensor, generator: Generator | None = None) -> tuple:
        """The draws of the augmentation, one after the other."""
        return tuple(self.augment.draw(len(x), x.shape[2:], generator) for _ in range(self.draws))

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: tuple, target: Tensor | None = None) -> Tensor:
        views, goal = [self.augment.apply(x, one) for one in drawn], y if target is None else target
        if len(views) == 1:
            return views[0]
        losses = torch.stack([F.cross_entropy(predict(model, view), goal, reduction="none") for view in views])
        return torch.stack(views)[losses.argmax(0), torch.arange(len(x), device=x.device)]


def finetune(recipe: LearnRecipe, train: ImageSet, spare: ImageSet) -> LearnRecipe:
    """Train on clean images, `spare`, first; then all layers go on, on `train`, at a tenth of the learning rate."""
    slow = replace(recipe.sgd, lr=recipe.sgd.lr / 10)
    return replace(recipe, sgd=slow, pretrained=Pretrained(spare, recipe))


def probe(recipe: LearnRecipe, train: ImageSet, spare: ImageSet) -> LearnRecipe:
    """As finetune, but only the last layer learns from `train` (linear probe)."""
    tuned = finetune(recipe, train, spare)
    return replace(tuned, pretrained=replace(tuned.pretrained, last_layer=True))


def reweight(recipe: LearnRecipe, train: ImageSet, spare: ImageSet) -> LearnRecipe:
    """DFR, deep feature reweighting: train on `train` first; then only the last layer goes on, on clean images.

    It is probe with the two sets swapped, and shows whether the features that a net learns from protected images are
    still useful. Features are taken at the end of training; the publication takes the best of many checkpoints, an
    oracle. Sources: Kirichenko et al., ICLR 2023; Sandoval-Segura et al., NeurIPS 2023.
    """
    return probe(recipe, spare, train)


def added(train: ImageSet, spare: ImageSet) -> ImageSet:
    """The training images plus clean ones: a trainer with partial clean data."""
    n = len(train)
    both = train.zeros((n + len(spare), *train.images.shape[1:]))
    both[:n], both[n:] = train.images, spare.images
    labels = torch.cat([train.labels, spare.labels.to(train.labels.device)])
    return replace(train, images=both, labels=labels, files=())
