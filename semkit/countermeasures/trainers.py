"""Countermeasures in training: TrivialAugment, perturbations that blur or add noise, nets pretrained on clean images.

Source of all but TrivialAugment: Sadasivan et al., CUDA, CVPR 2023, whose authors test their protection against them.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semkit.images.augment import Augment, FlipCrop
from semkit.images.imageset import ImageSet
from semkit.images.pixels import LEVEL, check_count, check_radius, seeded, to_draw, to_float
from semkit.nets.engine import input_gradient, predict
from semkit.protections.cuda import blur, convolve
from semkit.training.learning import LearnRecipe, Pretrained, accuracy
from semkit.training.perturb import Perturbation

LARGEST = 5.0  # entry of a filter under ascent, in size


@cache
def _trivial():
    from torchvision.transforms import v2  # takes two seconds to import

    return v2.TrivialAugmentWide()


@dataclass(frozen=True)
class TrivialAugment:
    """The augmentation `first`, then for each image a random operation of random strength, by torchvision.

    Made in 8-bit levels on the CPU, so it has no gradient. Source: Müller & Hutter, ICCV 2021 (the wide space).
    """

    first: Augment = FlipCrop()

    def output_size(self, size: int) -> int:
        return self.first.output_size(size)

    def draw(self, n: int, size: tuple[int, int], generator: Generator) -> tuple:
        """(first's draws, a seed for each image)."""
        drawn = self.first.draw(n, size, generator)
        return drawn, torch.randint(2**62, (n,), generator=generator, device=generator.device)

    def apply(self, x: Tensor, drawn: tuple) -> Tensor:
        before, seeds = drawn
        x = self.first.apply(x, before)
        levels, done = (255 * x).round().clamp(0, 255).to("cpu", torch.uint8), []
        for image, seed in zip(levels, seeds.tolist(), strict=True):
            with seeded(seed):
                done.append(_trivial()(image))
        return torch.empty_like(x).copy_(to_float(torch.stack(done)))


def rescaled(x: Tensor) -> Tensor:
    """x [N,C,H,W] with every image scaled linearly to the range 0 to 1; a constant image becomes 0."""
    low = x.amin((1, 2, 3), keepdim=True)
    span = x.amax((1, 2, 3), keepdim=True) - low
    return (x - low) / span.clamp_min(torch.finfo(x.dtype).eps)


@dataclass(frozen=True)
class RandomBlur(Perturbation):
    """Filter every image with a random filter of its own, drawn as CUDA draws those of the classes: augmentation.

        entries ~ U(0, strength), one of them, at random, 1;  the result divided by its maximum

    This is a trainer who knows the protection and lacks only its key.
    """

    kernel: int = 3
    strength: float = 0.3
    radius = 0.0
    passes = 0

    def __post_init__(self):
        check_count(self.kernel, "kernel", 2)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength:g}")

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

    sigma in levels; 127.5 is half of the range, as published. Not clipped to the box, because so much noise would be
    lost in part. Such a net knows noisy images only, so a row has its accuracy as Smoothed too, as `smoothed`. Raises
    ValueError for a sigma that looks like a fraction. Source: Cohen et al., ICML 2019.
    """

    sigma: float = 127.5
    radius = 0.0
    passes = 0

    def __post_init__(self):
        object.__setattr__(self, "sigma", check_radius(self.sigma, "sigma"))

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """sigma n, shaped x."""
        return to_draw(x).normal_(0, 1, generator=generator) * (self.sigma * LEVEL)

    def apply(self, model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor, target: Tensor | None = None) -> Tensor:
        return x + drawn

    def further(self, model: nn.Module, test: ImageSet) -> dict[str, float]:
        """smoothed: the accuracy of the smoothed net."""
        return {"smoothed": accuracy(Smoothed(model, self), test)}


class Smoothed(nn.Module):
    """A smoothed net: how many of `copies` noisy copies of each image the net gives to each class, [N,classes].

    The net must have been prepared by an Engine. Every pass draws new noise, from `seed` on; predict and accuracy take
    it as any other net. Raises ValueError for no copies.
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
    """DAT: blur every class of the batch with the filter that maximises the learner's loss, found by gradient ascent.

        w_c <- clip(w_c + rate * d/dw_c mean over the batch of CE(f(rescaled(blur(x, w_y))), y), -5, 5)

    `steps` times, in eval mode; the learner trains on rescaled(blur(x, w_y)). Filter size, 10 steps, rate .1 and the
    clip at 5 are published. Chosen here: w_c starts as the identity in every batch, and there is no bias, which
    rescaling would remove.
    """

    kernel: int = 5
    steps: int = 10
    rate: float = 0.1
    radius = 0.0
    whole_batch = True

    def __post_init__(self):
        check_count(self.kernel, "kernel", 2)
        check_count(self.steps, "steps")

    @property
    def passes(self) -> int:
        """Input gradients per image."""
        return self.steps

    def draw(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Nothing for each image: [N,C,H,0]."""
        return x[..., :0]

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


def finetune(recipe: LearnRecipe, spare: ImageSet) -> LearnRecipe:
    """Train the learner on clean images, `spare`, first; then go on with all layers at a tenth of the learning rate."""
    slow = replace(recipe.sgd, lr=recipe.sgd.lr / 10)
    return replace(recipe, sgd=slow, pretrained=Pretrained(spare, recipe))


def probe(recipe: LearnRecipe, spare: ImageSet) -> LearnRecipe:
    """As finetune, but only the last layer goes on learning (linear probe)."""
    tuned = finetune(recipe, spare)
    return replace(tuned, pretrained=replace(tuned.pretrained, last_layer=True))
