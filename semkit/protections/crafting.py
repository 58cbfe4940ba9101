"""The error-minimising noise of a whole set: the noise step and the surrogate step, alternating."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from semkit.images.augment import Augment, FlipCrop, as_one
from semkit.images.imageset import ImageSet, taken
from semkit.images.pixels import LEVEL, box, check_count, check_share, check_step_size, settle, to_levels, uniform
from semkit.nets.engine import Engine, Passes, batches_per_pass, count_passes, input_gradient, step_down
from semkit.nets.lab import Interrupted, Lab
from semkit.nets.models import check_model, fresh
from semkit.protections.base import Crafted, NoiseRecipe
from semkit.protections.noise import check_noise_radius
from semkit.protections.state import State
from semkit.training.bullettrain import mining
from semkit.training.objectives import Plain
from semkit.training.perturb import PGD, Perturbation, Uniform, shrunk
from semkit.training.recipes import SGD

STARTS = ("random", "zero", "warm")


@dataclass(frozen=True)
class CraftRecipe(NoiseRecipe):
    """How noise is crafted; the defaults are SEM's released CIFAR-10 recipe. Radii and step_size in pixel levels.

    noise_side, surrogate_side: the perturbation inside each objective. EM: Clean, Clean; REM: PGD, PGD;
    SEM: Uniform, PGD.
    start: the noise that a batch starts from: "random" (the released recipe), "zero", or "warm" (its last noise).
    class_wise: one noise per class, carried from batch to batch.
    fade_in: share of the steps over which the images' contrast rises from 0 to 1; ramp: share of the steps over which
    the radii of both sides rise. Both are this kit's and 0 in the published recipes. They help short runs, because the
    surrogate then learns the noise before it learns the content.
    colour: R, G and B of a pixel's noise differ by at most 2 * colour * radius levels, before rounding. 1: no limit.
    0: achromatic noise, equal in all three, because grey-scale removes all colour, and JPEG most of it.
    surrogate_augment: augmentation of the surrogate step, by default `augment`.
    Raises ValueError for settings out of range. Source: Liu et al., AAAI 2024.

    >>> em = sk.CraftRecipe(noise_side=sk.Clean(), surrogate_side=sk.Clean(), samples=1)
    >>> em.cost(50_000).input_gradient
    6900000
    """

    noise_side: Perturbation = Uniform(4)
    surrogate_side: Perturbation = PGD(4)
    radius: float = 8
    step_size: float = 1.6
    steps: int = 10
    samples: int = 5
    start: str = "random"
    class_wise: bool = False
    fade_in: float = 0.0
    ramp: float = 0.0
    colour: float = 1.0
    augment: Augment = FlipCrop()
    surrogate_augment: Augment | None = None
    surrogate: str = "resnet18"
    sgd: SGD = SGD(steps=5000, batch=128, milestones=(2000, 4000))

    def __post_init__(self):
        check_model(self.surrogate)
        settle(self, radius=check_noise_radius, step_size=check_step_size)
        settle(self, steps=check_count, samples=partial(check_count, least=1))
        settle(self, fade_in=check_share, ramp=check_share, colour=check_share)
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")
        if self.class_wise and self.start != "warm":
            raise ValueError("class-wise noise is carried from batch to batch: write start='warm'")

    @property
    def net(self) -> str:
        return self.surrogate

    @property
    def at_once(self) -> int:
        """The most EOT samples that go through the net as one batch."""
        return 1 if self.noise_side.whole_batch else self.samples

    def craft(self, images: ImageSet, **how) -> Crafted:
        """craft(images, self, **how)."""
        return craft(images, self, **how)

    def at(self, step: int) -> "CraftRecipe":
        """The recipe at a step, with the radii that the ramp has reached."""
        share = (step / self.sgd.steps) / self.ramp if self.ramp else 1.0
        if share >= 1:
            return self
        sides = dict(noise_side=shrunk(self.noise_side, share), surrogate_side=shrunk(self.surrogate_side, share))
        return replace(self, **sides)

    def contrast(self, step: int) -> float:
        """The contrast of the images at a step, 0 to 1."""
        return min(1.0, (step / self.sgd.steps) / self.fade_in) if self.fade_in else 1.0

    def cost(self, n: int) -> Passes:
        """The passes of crafting noise for n images."""
        batch = min(self.sgd.batch, n)
        passes = Passes(training=self.sgd.steps * batch)
        for step in range(self.sgd.steps):
            now = self.at(step)
            each = self.steps * self.samples * (1 + now.noise_side.passes) + now.surrogate_side.passes
            passes.input_gradient += batch * each
        if not self.class_wise:
            passes.input_gradient += n * self.steps * self.samples * (1 + self.noise_side.passes)
        return passes


def noise_step(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    delta: torch.Tensor,
    recipe: CraftRecipe,
    generator: torch.Generator,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of descent on the surrogate's loss, over `samples` draws of t and of the noise side (EOT).

        z = box(t(x + delta));  a = noise_side(z)
        g = sum over samples of d<z, grad_a L(f(a), y)> / d delta
        delta <- clip(delta - step_size * sign(g), radius)

    Straight-through: the gradient is taken at the perturbed image a, and passed on as if it were taken at z.
    With colour 0, sign(g) is the sign of the sum of g over R, G and B.
    x [N,C,H,W] in [0,1], y [N], delta [N,C,H,W] with |delta| <= radius/255 -> the new delta. Class-wise noise: delta
    [M,C,H,W], and rows [N], which delta each image has. Source: Liu et al., AAAI 2024; EM: Huang et al., ICLR 2021.

        delta = sk.crafting.noise_step(net, x, y, torch.zeros_like(x), recipe, engine.generator(0))
    """
    protected = x + (delta if rows is None else delta[rows])
    seen = x.new_empty(*x.shape[:2], *map(recipe.augment.output_size, x.shape[2:]))  # for its shape only
    total, at_once = None, min(recipe.at_once, batches_per_pass(model, seen))
    for done in range(0, recipe.samples, at_once):
        slope = _straight_through(model, protected, seen, y, recipe, generator, min(at_once, recipe.samples - done))
        total = slope if total is None else total.add_(slope)
    if rows is not None:
        total = torch.zeros_like(delta).index_put_((rows,), total, accumulate=True)
    return _within(delta.sub(_direction(total, recipe.colour), alpha=recipe.step_size * LEVEL), recipe)


def _direction(slope: torch.Tensor, colour: float) -> torch.Tensor:
    """The sign of the gradient, mixed with the sign of its sum over the channels: colour 1 is all of the first."""
    if colour == 1:
        return slope.sign_()
    grey = slope.sum(1, keepdim=True).sign_()
    return torch.lerp(grey.expand_as(slope), slope.sign_(), colour)


def _within(delta: torch.Tensor, recipe: CraftRecipe) -> torch.Tensor:
    """Clip delta to the radius and the colour budget; delta is overwritten."""
    radius = recipe.radius * LEVEL
    if recipe.colour < 1:
        low, high = delta.aminmax(dim=1, keepdim=True)
        middle, apart = (low + high) / 2, recipe.colour * radius
        delta = middle + (delta - middle).clamp_(-apart, apart)
    return delta.clamp_(-radius, radius)


def _straight_through(model, protected, seen, y, recipe: CraftRecipe, generator, samples: int) -> torch.Tensor:
    """The g of noise_step over some of the samples, as one batch of samples * N images.

    The random numbers are drawn sample by sample; `seen` has the shape of t(x).
    """
    leaf, draws, drawn = protected.detach().requires_grad_(), [], []
    for _ in range(samples):
        draws.append(recipe.augment.draw(len(leaf), leaf.shape[2:], generator))
        drawn.append(recipe.noise_side.draw(seen, generator))
    with torch.enable_grad():
        z = box(as_one([recipe.augment.apply(leaf, one) for one in draws]))
    y = y if samples == 1 else y.repeat(samples)
    a = recipe.noise_side.apply(model, z.detach(), y, as_one(drawn))
    return torch.autograd.grad(z, leaf, input_gradient(model, a, y))[0]


def noise_of_batch(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    stored: torch.Tensor,
    recipe: CraftRecipe,
    generator: torch.Generator,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The noise of a batch after `steps` noise steps; `stored` is its last noise, where a warm start begins."""
    delta = stored
    if recipe.start == "random":
        delta = _within(uniform(stored, recipe.radius * LEVEL, generator), recipe)
    elif recipe.start == "zero":
        delta = torch.zeros_like(stored)
    for _ in range(recipe.steps):
        delta = noise_step(model, x, y, delta, recipe, generator, rows)
    return delta


def _rounded(delta: torch.Tensor, recipe: CraftRecipe) -> torch.Tensor:
    limit = int(recipe.radius)  # a radius of 7.5 must not round to 8
    return to_levels(delta).clamp(-limit, limit)


def _faded(x: torch.Tensor, contrast: float) -> torch.Tensor:
    """Images of lower contrast: mean + contrast * (x - mean), with each image's own mean colour."""
    mean = x.mean((2, 3), keepdim=True)
    return x if contrast == 1 else mean + contrast * (x - mean)


def _train(images: ImageSet, recipe: CraftRecipe, seed: int, engine: Engine, state: State):
    """Alternate noise steps on a batch and a step of the surrogate on its noisy images; yields after each batch."""
    for step, index in recipe.sgd.batches(len(images), seed, engine, start=state.step):
        generator = engine.generator(seed, "step", step)
        x, y = images.batch(index)
        x = _faded(engine.images(x), recipe.contrast(step))
        now = recipe.at(step)
        kept, rows = y.unique(return_inverse=True) if recipe.class_wise else (index, None)
        kept = kept.to(state.noise.device)
        delta = noise_of_batch(state.surrogate, x, y, engine.images(state.noise[kept]), now, generator, rows)
        state.noise[kept] = _rounded(delta, recipe).to(state.noise.device)
        delta = engine.images(state.noise[kept])
        augment = recipe.surrogate_augment or recipe.augment
        drawn = augment.draw(len(x), x.shape[2:], generator)
        z = box(augment.apply(x + (delta if rows is None else delta[rows]), drawn))
        recipe.sgd.set_rate(state.optimizer, step)
        loss = partial(Plain(), state.surrogate, z, y, now.surrogate_side, generator)
        state.losses.append(step_down(state.optimizer, loss))
        yield


def _remake(images: ImageSet, recipe: CraftRecipe, seed: int, engine: Engine, state: State):
    """Make all noise once more with the final surrogate, batch by batch, the ragged last one too."""
    first = state.step - recipe.sgd.steps
    for part in range(first, math.ceil(len(images) / recipe.sgd.batch)):
        index = slice(part * recipe.sgd.batch, (part + 1) * recipe.sgd.batch)
        generator = engine.generator(seed, "remake", part)
        x, y = images.batch(index)
        x = engine.images(x)
        delta = noise_of_batch(state.surrogate, x, y, engine.images(state.noise[index]), recipe, generator)
        state.noise[index] = _rounded(delta, recipe)
        yield


def _fresh(images: ImageSet, recipe: CraftRecipe, seed: int, engine: Engine) -> State:
    """The state before the first step: fresh weights, no noise."""
    model = engine.prepare(fresh(recipe, images, seed))
    shape = (len(images.classes) if recipe.class_wise else len(images), *images.images.shape[1:])
    return State(images.zeros(shape, torch.int8), model, optimizer=recipe.sgd.optimizer(model))


def craft(
    images: ImageSet, recipe: CraftRecipe, *, seed: int = 0, lab: Lab | None = None, checkpoint: Path | None = None
) -> Crafted:
    """Craft noise for every image of a set: noise steps and surrogate steps in turn, then one pass over all images.

        crafted = sk.craft(split.train, sk.craft_recipe("sem", "demo"))
        protected = split.train.with_noise(crafted.noise)

    The same call gives the same noise on one machine. lab.on_step gets the metrics "loss", "passes", "noise" and
    "surrogate" after every step. checkpoint: a file where the state is saved every lab.checkpoint_every seconds and
    when the run is stopped; a run that finds it there goes on from it, and gives the same noise as without an
    interruption. Raises Interrupted when lab.on_step asks to stop, and ValueError if the state is damaged, or belongs
    to another recipe, seed, engine or image set.
    """
    lab = (lab or Lab()).doing("crafting noise")
    made_by = repr((recipe, seed, lab.engine.settings(), images.fingerprint))
    images = images.to(lab.engine.device)
    state = _fresh(images, recipe, seed, lab.engine)
    phases = (_train,) if recipe.class_wise else (_train, _remake)
    total = recipe.sgd.steps + (0 if recipe.class_wise else math.ceil(len(images) / recipe.sgd.batch))
    if checkpoint and checkpoint.exists():
        state.load(checkpoint, made_by, total)
    began, saved, pause = time.monotonic() - state.seconds, time.monotonic(), lab.checkpoint_every
    with count_passes(state.passes), mining(state.mined):
        for _ in chain.from_iterable(phase(images, recipe, seed, lab.engine, state) for phase in phases):
            state.step += 1
            state.seconds = time.monotonic() - began
            metrics = {"loss": state.losses[-1], "passes": state.passes.total, **state.mined.now}
            try:
                lab.report(state.step, total, {**metrics, "noise": state.noise, "surrogate": state.surrogate})
            except Interrupted:
                if checkpoint:
                    state.save(checkpoint, made_by)
                raise
            if checkpoint and time.monotonic() - saved > pause:
                pause = lab.checkpoint_every * max(1, state.save(checkpoint, made_by))
                saved = time.monotonic()
    noise = taken(state.noise, images.labels, images.scratch) if recipe.class_wise else state.noise
    noise = noise.cpu()  # a GPU is done with its last steps only here
    return Crafted(noise, state.surrogate, state.losses, state.passes, time.monotonic() - began)
