"""Checkers of the notebooks' exercises: each takes what the student wrote and says in one line what is wrong with it.

They raise AssertionError, or print a line that begins with "right:".
"""

import functools
from collections.abc import Callable

import numpy as np
import torch

from semkit.images.pixels import LEVEL, add_noise
from semkit.protections.crafting import CraftRecipe
from semkit.training.perturb import PGD, Clean, Uniform


class NotYet(AssertionError):
    """What a checker raises. A notebook shows its one line, not the checker's code, which gives the answer away."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this
        return [f"not yet: {self}"]


def checker(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
    """The check, with NotYet in place of a bare AssertionError."""

    @functools.wraps(check)
    def told(answer: Callable) -> None:
        try:
            check(answer)
        except AssertionError as wrong:
            raise NotYet(*wrong.args) from None

    return told


@checker
def check_protected(protected: Callable) -> None:
    """Tells whether protected(images, delta) is uint8 round(clip(images + 255 * delta, 0, 255)).

    images uint8 [N,C,H,W]; delta floats on the [0, 1] scale, at most 8/255 in size. Raises AssertionError if not.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[0], images[1] = 0, 255
    levels = torch.randint(-8, 9, images.shape, generator=generator)
    delta = (levels + torch.rand(images.shape, generator=generator) * 0.8 - 0.4).clamp(-8, 8) * LEVEL
    before = images.clone()
    mine = protected(images, delta)
    assert isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}"
    assert torch.equal(images, before), "the student's images were changed in place: add to a copy"
    assert mine.dtype == torch.uint8, f"images are uint8, this is {mine.dtype}"
    assert mine.shape == images.shape, f"the shape must stay {list(images.shape)}, this is {list(mine.shape)}"
    wanted, change = add_noise(images, levels.to(torch.int8)), mine.int() - images.int()
    assert change.abs().max() < 100, "some values wrapped around: clip to 0..255 before they become uint8"
    assert (change < 0).any(), "the negative half of the noise is lost: add first, clip afterwards"
    off = (mine.int() - wanted.int()).abs().max()
    assert off == 0, f"values are off by up to {off}: round to the nearest level, since uint8 cuts the fraction off"
    print("right: nothing but the box takes noise away")


@checker
def check_stability(stability: Callable) -> None:
    """Tells whether stability(loss, x, radius, draws) is minus the mean of loss(box(x + u)) over draws of u.

    loss takes images [N,C,H,W] and gives a number; u is uniform within `radius` levels, fresh for every draw. Raises
    AssertionError if not.
    """
    x, radius, draws, seen = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16), 4, 5, []

    def loss(a: torch.Tensor) -> float:
        seen.append(a.detach().clone())
        return float(len(seen))  # 1, 2, ... draws

    mine = stability(loss, x.clone(), radius, draws)
    assert len(seen) == draws, f"the loss is asked once a draw, {draws} times, not {len(seen)} times"
    found = torch.stack(seen)
    assert found.shape[1:] == x.shape, f"the loss was given {list(found.shape[1:])}, not images {list(x.shape)}"
    moved = (found - x) / LEVEL
    assert 0 <= found.min() and found.max() <= 1, "perturbed images leave [0, 1]: clip them to the box"
    assert moved.abs().max() <= radius + 1e-3, f"u reaches {moved.abs().max():.3g} levels: one level is 1/255"
    assert moved.min() < -radius / 2, "u is never far below zero: it must be uniform on both sides"
    assert moved.max() > radius / 2, f"u is at most {moved.max():.3g} levels, the radius is {radius}"
    assert moved.std((1, 2, 3, 4)).min() > radius / 4, "u must differ from pixel to pixel"
    assert not torch.equal(found[0], found[1]), "every draw needs a fresh u"
    wanted = -(draws + 1) / 2
    assert abs(float(mine) - wanted) < 1e-6, f"minus the mean of the losses is {wanted}, this is {float(mine):g}"
    print("right: as defined here, with a fresh draw each time")


@checker
def check_step_passes(step_passes: Callable) -> None:
    """Tells whether step_passes(recipe) is the passes that one training step of crafting takes for an image.

        steps * samples * (1 + noise_side.passes) + surrogate_side.passes + 1

    recipe: a CraftRecipe. Raises AssertionError if not.
    """
    asked = (
        (Clean(), Clean(), 1, 1, 2, "one to move the noise, one to train the surrogate"),
        (Clean(), Clean(), 10, 5, 51, "the noise moves `steps` times, each time with `samples` passes"),
        (Clean(), PGD(4), 10, 5, 61, "the surrogate side's ascent comes on top, once a step"),
        (Uniform(4), PGD(4), 10, 5, 61, "drawing a random perturbation takes no pass"),
        (PGD(4), Clean(), 10, 5, 551, "the noise side's ascent is made anew for every sample of every noise step"),
        (PGD(4, 3), PGD(4, 7), 2, 4, 40, "each side has its own number of steps"),
    )
    for noise_side, surrogate_side, steps, samples, wanted, why in asked:
        mine = step_passes(CraftRecipe(noise_side, surrogate_side, steps=steps, samples=samples))
        of = f"{noise_side} / {surrogate_side} with {steps} noise steps of {samples} samples"
        assert mine == wanted, f"{of} takes {wanted} passes, not {mine}: {why}"
    print("right: EM with random crops takes 51, SEM 61, REM 561 in the published recipe")


@checker
def check_partial(partial: Callable) -> None:
    """Tells whether partial(x, y, z) is Pearson's correlation of x and y with z held, three arrays of one length.

        (r_xy - r_xz * r_yz) / sqrt((1 - r_xz ** 2) * (1 - r_yz ** 2))

    The same as the correlation of what is left of x and of y after a straight line in z. Raises AssertionError if not.
    """
    z, own_x, own_y = np.random.default_rng(0).normal(size=(3, 40))
    x, y, z = 5 + 2 * z + own_x, 3 * z - 0.4 * own_x + own_y, z + 4
    (_, xy, xz), (_, _, yz), _ = np.corrcoef((x, y, z))
    wanted = (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5
    mine = partial(x.copy(), y.copy(), z.copy())
    assert np.ndim(mine) == 0 and mine is not None, "return one number, not a table: corrcoef(a, b)[0, 1]"
    assert abs(mine - xy) > 1e-6, f"this is the plain correlation, {xy:.2f}: take z out of x and of y first"
    out_of_one = (xy - xz * yz) / (1 - np.array([xz, yz]) ** 2) ** 0.5
    assert np.abs(mine - out_of_one).min() > 1e-6, "z was taken out of one of the two only"
    assert abs(mine - wanted) < 1e-6, f"with z held it is {wanted:.2f}, not {mine:.2f}: a line has slope and intercept"
    print(f"right: the plain correlation is {xy:.2f}, with z held {wanted:.2f}")


@checker
def check_moved(moved: Callable) -> None:
    """Tells whether moved(before, after) is the largest |after - before| of two uint8 images, in levels, as a number.

    Raises AssertionError if not.
    """
    before = torch.tensor([[10, 200, 30, 128]], dtype=torch.uint8)
    up, down = torch.tensor([[[13, 206, 30, 130]], [[3, 200, 28, 129]]], dtype=torch.uint8)
    for after, wanted, why in (
        (before.clone(), 0, "nothing moved"),
        (up, 6, "the largest change counts, in levels, not the mean and not a share of 255"),
        (down, 7, "a value may fall as well as rise; and uint8 wraps, 3 - 10 is 249, so subtract in a wider type"),
    ):
        mine = moved(before.clone(), after)
        assert mine is not None, "it returns nothing: end with return"
        assert int(torch.as_tensor(mine).numel()) == 1, "return one number, the largest of all"
        assert float(mine) == wanted, f"here it is {wanted}, not {float(mine):g}: {why}"
    print("right: this is what `semkit check` holds against the radius")


@checker
def check_sem_step(sem_step: Callable) -> None:
    """Tells whether sem_step(gradient, x, delta, recipe) is delta after one noise step of SEM, without augmentation.

        delta <- clip(delta - step_size * sign(sum over draws of gradient(noise_side(box(x + delta)))), radius)

    with `samples` draws. gradient(a) is the gradient of the loss at images a [N,C,H,W]; x, delta on the [0, 1] scale,
    recipe a CraftRecipe whose noise side is Uniform. Raises AssertionError if not. Source: Liu et al., AAAI 2024.
    """
    recipe = CraftRecipe(noise_side=Uniform(4), radius=8, step_size=3, samples=3)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, 3, 8, 8), generator=generator)
    delta = (torch.rand(x.shape, generator=generator) * 2 - 1) * recipe.radius * LEVEL
    slopes, seen = torch.randn((recipe.samples, *x.shape), generator=generator), []

    def gradient(a: torch.Tensor) -> torch.Tensor:
        seen.append(a.detach().clone())
        return slopes[(len(seen) - 1) % recipe.samples]

    mine = sem_step(gradient, x.clone(), delta.clone(), recipe)
    _check_draws(seen, x, delta, recipe)
    assert isinstance(mine, torch.Tensor) and mine.shape == x.shape, f"return the new delta, a tensor {list(x.shape)}"
    radius, step = recipe.radius * LEVEL, recipe.step_size * LEVEL

    def moved(direction: torch.Tensor, near: float = radius) -> torch.Tensor:
        return (delta - step * direction).clamp(-near, near)

    def is_mine(other: torch.Tensor) -> bool:
        return torch.allclose(mine, other, atol=1e-6)

    total = slopes.sum(0)
    assert not is_mine(moved(-total.sign())), "this climbs the loss: error-minimising noise goes down"
    assert not is_mine(moved(total.sign(), 9)), "delta has left the radius: clip it after the step"
    votes = {"the first draw": slopes[0], "the last draw": slopes[-1], "a vote of the signs": slopes.sign().sum(0)}
    for name, direction in votes.items():
        assert not is_mine(moved(direction.sign())), f"this follows {name}: sum the gradients, then take the sign"
    assert mine.abs().max() <= radius + 1e-6, f"delta reaches {mine.abs().max() / LEVEL:.3g} levels: one level is 1/255"
    assert is_mine(moved(total.sign())), "every value moves by step_size levels against the sign of the sum, no further"
    print("right: with PGD in place of the uniform draw this is a noise step of REM, with no draw one of EM")


def _check_draws(seen: list[torch.Tensor], x: torch.Tensor, delta: torch.Tensor, recipe: CraftRecipe) -> None:
    """Raises AssertionError unless what was seen is `samples` fresh draws of the noise side at box(x + delta)."""
    asked = f"the gradient is asked once a draw, {recipe.samples} times"
    assert len(seen) == recipe.samples, f"{asked}, not {len(seen)} times"
    found = torch.stack(seen)
    assert found.shape[1:] == x.shape, f"the gradient is asked at {list(found.shape[1:])}, not at {list(x.shape)}"
    assert 0 <= found.min() and found.max() <= 1, "images leave [0, 1]: clip x + delta, and what is drawn around it"
    z, most = (x + delta).clamp(0, 1), recipe.noise_side.radius * LEVEL
    assert (found - x).abs().max() > 1.05 * most, "the gradient is taken around x: take it around x + delta"
    away = found - z
    assert away.abs().max() <= most + 1e-6, f"draws are within {recipe.noise_side.radius:g} levels of box(x + delta)"
    assert away.abs().max() > most / 2, "nothing random is added: call recipe.noise_side"
    assert not torch.equal(found[0], found[1]), "every draw needs a fresh perturbation"
