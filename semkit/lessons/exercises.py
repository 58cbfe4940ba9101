"""Checkers of the core lessons' exercises; an extension's checker is in its lesson's file.

Each takes what the student wrote and returns a Reply: see `answers`.

>>> sk.exercises.check_luma(lambda noise: noise)
not yet, because it returns the noise as it is
>>> sk.exercises.check_luma.hint(1)
hint 1 of 3: Take the three channels apart: red, green, blue = noise.unbind(1), each [N,H,W].
"""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from semkit.images.pixels import LEVEL
from semkit.lessons.answers import check_tensor, checker, reject
from semkit.lessons.surrogates import objection
from semkit.protections.crafting import CraftRecipe
from semkit.training.perturb import PGD, Clean, Perturbation, Uniform


@checker(
    "Protection is asked of clean test images only: rows[rows['tested_on'] == 'clean'].",
    "Pair by seed: pivot(index='seed', columns='trained_on', values='right'), and drop seeds that lack one of the two.",
    "100 * (table['clean'] - table['protected']).mean(), in points.",
)
def check_points_lost(points_lost: Callable) -> str:
    """Whether points_lost(rows) is the protection: 100 times the mean over seeds of clean less protected accuracy.

    rows: a DataFrame with trained_on and tested_on ("clean" or "protected"), seed, and right, a share of 1. Seeds that
    lack one of the two learners are left out.

        sk.exercises.check_points_lost(lambda rows: 0.5)  # not yet, because this is a share of 1: ...
    """
    found = {"clean": {"clean": (0.8, 0.9, 0.4), "protected": (0.8, 0.8, 0.3)},
             "protected": {"clean": (0.4, 0.3), "protected": (1.0, 0.9)}}  # fmt: skip
    rows = pd.DataFrame(
        [dict(trained_on=trained, tested_on=tested, seed=seed, right=right) for trained, both in found.items()
         for tested, shares in both.items() for seed, right in enumerate(shares)]
    )  # fmt: skip
    mine = points_lost(rows.copy())
    assert np.ndim(mine) == 0, "it returns many numbers: the mean over seeds is one number"
    reject(mine, {
        "this is of protected images: a learner of protected images does well there, and nobody asks": -15,
        "this is a gain: take the learner of protected images from that of clean ones": -50,
        "seed 2 has a learner of clean images only, so it cannot be paired: leave it out": 35,
        "this is a share of 1: a point is a hundredth of it": 0.5,
    })  # fmt: skip
    assert abs(mine - 50) < 1e-6, f"of these rows it is 40 and 60 points for seeds 0 and 1, so 50, not {mine:.4g}"
    return "this is sk.protection, and every lesson's measure"


@checker(
    "gradient(a) is the slope of the loss at images a. Ask for it at the images that the surrogate sees.",
    "Only the gradient's sign counts, and the loss must fall: delta - recipe.step_size / 255 * sign.",
    "Three lines: g = gradient((x + delta).clamp(0, 1)); a step of recipe.step_size / 255 against g.sign(); the clip.",
)
def check_noise_step(noise_step: Callable) -> str:
    """Whether noise_step(gradient, x, delta, recipe) is delta after one noise step of EM, without augmentation.

        delta <- clip(delta - step_size * sign(gradient(box(x + delta))), radius)

    gradient(a) is the gradient of the loss at images a [N,C,H,W]; x, delta on the [0, 1] scale. Source: Huang et al.,
    ICLR 2021.

        sk.exercises.check_noise_step(noise_step)  # or check_noise_step.hint(1)
    """
    x, delta, slopes, recipe = _step_asked(Clean(), 1)
    gradient, seen = _recorded(lambda a, place: slopes[0].clone())
    mine = noise_step(gradient, x.clone(), delta.clone(), recipe)
    assert len(seen) == 1, f"it asks for the gradient {len(seen)} times: a noise step of EM needs it once"
    assert seen[0].shape == x.shape, f"the gradient was asked at {list(seen[0].shape)}, not at {list(x.shape)}"
    assert not torch.equal(seen[0], x), "the gradient is taken at x: the surrogate sees x + delta"
    assert 0 <= seen[0].min() and seen[0].max() <= 1, "x + delta leaves [0, 1], where no image is: clip it"
    assert torch.allclose(seen[0], (x + delta).clamp(0, 1)), "the gradient is not taken at x + delta"
    _check_moved(mine, delta, slopes[0], recipe)
    return "SEM takes the gradient at random copies of x + delta: one line more"


def _made(means: Mapping[str, float], spread: float = 6.0, residual: float = 0.4, seeds: int = 5) -> pd.DataFrame:
    """Points with these means; seeds differ by `spread` in all recipes alike and by `residual` in each."""
    rng = np.random.default_rng(0)
    table = rng.normal(0, residual, (seeds, len(means)))
    table += np.array(list(means.values())) - table.mean(0) + rng.normal(0, spread, (seeds, 1))
    return pd.DataFrame(table, columns=list(means))


@checker(
    "Leave out what the budget does not pay for. Which of the rest protects most on average?",
    "A recipe is as good as that one, as far as can be told, unless sk.surrogates.beats(points, best, recipe).",
    "Of the recipes that the best one does not beat, take the cheapest: min(fine, key=passes.get).",
)
def check_choose(choose: Callable) -> str:
    """Whether choose(points, passes, budget) is the cheapest recipe that no affordable recipe measurably beats.

    points: protection, a line a seed and a column a recipe; passes: recipe -> its passes; beats is sk.surrogates.beats.
    """
    passes = {"A": 100, "B": 180, "C": 180, "D": 300}
    for means, budget in (
        ({"A": 15, "B": 22, "C": 20, "D": 30}, 200),
        ({"A": 15, "B": 21, "C": 15, "D": 21.2}, 400),
        ({"A": 15.1, "B": 15, "C": 14.9, "D": 15.2}, 400),
        ({"A": 15, "B": 12, "C": 18, "D": 25}, 300),
    ):
        points = _made(means)
        recipe = choose(points.copy(), dict(passes), budget)
        against = objection(points, passes, budget, recipe)
        assert not against, against
    return "the cheapest recipe that nothing affordable measurably beats: pay for what can be shown, and for no more"


@checker(
    "One draw: u has the shape of x, every value uniform within the radius, and x + u stays in [0, 1].",
    "radius is in levels, x on the [0, 1] scale: one level is 1/255. sk.Uniform(radius)(None, x, None) is box(x + u).",
    "Sum loss(...) over `draws` fresh perturbations, divide by draws, and turn the sign: high stability is low loss.",
)
def check_stability(stability: Callable) -> str:
    """Whether stability(loss, x, radius, draws) is minus the mean of loss(box(x + u)) over draws of u.

    loss takes images [N,C,H,W] and gives a number; u is uniform within `radius` levels, fresh for every draw.
    """
    x, radius, draws = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16), 4, 5
    loss, seen = _recorded(lambda a, place: 1.0 + place)  # 1, 2, ... draws
    mine = stability(loss, x.clone(), radius, draws)
    _check_draws("loss", seen, x, radius, draws)
    wanted = -(draws + 1) / 2
    assert abs(float(mine) - wanted) < 1e-6, f"minus the mean of the losses is {wanted}, not {float(mine):g}"
    return "as defined here, with a fresh draw each time"


@checker(
    "np.polyfit(z, x, 1) is the line, with slope and intercept; np.polyval(line, z) are its values. Subtract them.",
    "Do the same for y, and correlate what is left of both.",
    "np.corrcoef gives a 2 x 2 table: the correlation is at [0, 1].",
)
def check_partial(partial: Callable) -> str:
    """Whether partial(x, y, z) is Pearson's correlation of x and y with z held fixed, three arrays of one length.

        (r_xy - r_xz * r_yz) / sqrt((1 - r_xz ** 2) * (1 - r_yz ** 2))

    The same as the correlation of what is left of x and of y after a straight line in z.
    """
    z, own_x, own_y = np.random.default_rng(0).normal(size=(3, 40))
    x, y, z = 5 + 2 * z + own_x, 3 * z - 0.4 * own_x + own_y, z + 4
    (_, xy, xz), (_, _, yz), _ = np.corrcoef((x, y, z))
    wanted = (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)) ** 0.5
    mine = partial(x.copy(), y.copy(), z.copy())
    assert np.ndim(mine) == 0, "it returns a table: corrcoef(a, b)[0, 1] is one number"
    assert abs(mine - xy) > 1e-6, f"this is the plain correlation, {xy:.2f}: take z out of x and of y first"
    out_of_one = (xy - xz * yz) / (1 - np.array([xz, yz]) ** 2) ** 0.5
    assert np.abs(mine - out_of_one).min() > 1e-6, "z was taken out of one of the two only"
    assert abs(mine - wanted) < 1e-6, f"with z fixed it is {wanted:.2f}, not {mine:.2f}: a line has slope and intercept"
    return f"in the checker's test data the plain correlation is {xy:.2f}, and {wanted:.2f} with z fixed"


@checker(
    "Where is the gradient taken? At random copies of z = box(x + delta): recipe.noise_side(None, z, None) draws one.",
    "Draw `samples` fresh copies, sum their gradients, and only then take the sign.",
    "Step down by step_size / 255 along the sign of the sum, then clip delta to radius / 255 on both sides.",
)
def check_sem_step(sem_step: Callable) -> str:
    """Whether sem_step(gradient, x, delta, recipe) is delta after one noise step of SEM, without augmentation.

        delta <- clip(delta - step_size * sign(sum over draws of gradient(noise_side(box(x + delta)))), radius)

    with `samples` draws. gradient(a) is the gradient of the loss at images a [N,C,H,W]; x, delta on the [0, 1] scale,
    recipe a CraftRecipe whose noise side is Uniform. Source: Liu et al., AAAI 2024.
    """
    x, delta, slopes, recipe = _step_asked(Uniform(4), 3)
    gradient, seen = _recorded(lambda a, place: slopes[place % recipe.samples])
    mine = sem_step(gradient, x.clone(), delta.clone(), recipe)
    near_x = [a.shape == x.shape and (a - x).abs().max() <= 1.05 * recipe.noise_side.radius * LEVEL for a in seen]
    assert not near_x or not all(near_x), "the gradient is taken around x: take it around x + delta"
    _check_draws("gradient", seen, (x + delta).clamp(0, 1), recipe.noise_side.radius, recipe.samples)
    votes = {"the first draw": slopes[0], "the last draw": slopes[-1], "a vote of the signs": slopes.sign().sum(0)}
    told = "this follows {}: sum the gradients, then take the sign"
    reject(mine, {told.format(name): _moved(delta, direction, recipe) for name, direction in votes.items()})
    _check_moved(mine, delta, slopes.sum(0), recipe)
    return "with PGD in place of the uniform draw this is a noise step of REM, with no draw one of EM"


def _step_asked(noise_side: Perturbation, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CraftRecipe]:
    """x and delta [2,3,8,8], a slope of each draw [samples,2,3,8,8], and the recipe of a step that a student writes."""
    recipe = CraftRecipe(noise_side=noise_side, radius=8, step_size=3, samples=samples)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, 3, 8, 8), generator=generator)
    delta = (torch.rand(x.shape, generator=generator) * 2 - 1) * recipe.radius * LEVEL
    return x, delta, torch.randn((samples, *x.shape), generator=generator), recipe


def _recorded(answer: Callable) -> tuple[Callable, list[torch.Tensor]]:
    """(a function of images, the images it was asked at): its n-th call returns answer(images, n), n from 0."""
    seen = []

    def asked(a: torch.Tensor):
        seen.append(a.detach().clone())
        return answer(a, len(seen) - 1)

    return asked, seen


def _moved(delta: torch.Tensor, slope: torch.Tensor, recipe: CraftRecipe, most: float | None = None) -> torch.Tensor:
    """delta after a step against the sign of the slope, clipped to the radius or to `most`."""
    most = most or recipe.radius * LEVEL
    return (delta - recipe.step_size * LEVEL * slope.sign()).clamp(-most, most)


def _check_moved(mine: torch.Tensor, delta: torch.Tensor, slope: torch.Tensor, recipe: CraftRecipe) -> None:
    """Raises AssertionError unless `mine` is delta after a step against the sign of the slope."""
    check_tensor(mine, delta)
    reject(mine, {
        "this climbs the loss: error-minimising noise goes down": _moved(delta, -slope, recipe),
        "delta has left the radius: clip it after the step": _moved(delta, slope, recipe, 9),
    })  # fmt: skip
    reach, right = mine.abs().max() / LEVEL, _moved(delta, slope, recipe)
    assert reach <= recipe.radius + 1e-3, f"delta reaches {reach:.3g} levels: one level is 1/255"
    assert torch.allclose(mine, right, atol=1e-6), "every value must move by step_size against the slope's sign"


@checker(
    "REM asks the gradient twice: once at z = box(x + delta), to climb, and once where that leads.",
    "Climb: a = box(z + rho / 255 * gradient(z).sign()), with rho = recipe.noise_side.radius.",
    "Then the noise step is as before: down along the sign of gradient(a), and clip delta to the radius.",
)
def check_rem_step(rem_step: Callable) -> str:
    """Whether rem_step(gradient, x, delta, recipe) is delta after one noise step of REM, without augmentation.

        z = box(x + delta);  a = box(z + rho * sign(gradient(z)))
        delta <- clip(delta - step_size * sign(gradient(a)), radius)

    rho is recipe.noise_side.radius: one step of ascent stands for PGD. Source: Fu et al., ICLR 2022.
    """
    x, delta, phase, recipe = _step_asked(PGD(4, 1), 1)
    z, rho = (x + delta).clamp(0, 1), recipe.noise_side.radius * LEVEL

    def slope(a: torch.Tensor, place: int = 0) -> torch.Tensor:
        return torch.sin(60 * a + 6 * phase[0])

    def near(one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and torch.allclose(one, other, atol=1e-6)

    gradient, seen = _recorded(slope)
    mine, a = rem_step(gradient, x.clone(), delta.clone(), recipe), (z + rho * slope(z).sign()).clamp(0, 1)
    assert len(seen) == 2, f"it asks for the gradient {len(seen)} times: once to climb and once to move the noise are 2"
    assert near(seen[0], z), "the first gradient is taken at box(x + delta)"
    assert not near(seen[1], (z - rho * slope(z).sign()).clamp(0, 1)), "the perturbation goes down: an attack climbs"
    assert seen[1].min() >= 0 and seen[1].max() <= 1, "perturbed images leave [0, 1]: clip them to the box"
    assert near(seen[1], a), f"an attack moves every value by rho, {recipe.noise_side.radius:g} levels, along the sign"
    first = "this follows the gradient at x + delta: take the one where the climb ends"
    reject(mine, {first: _moved(delta, slope(z), recipe)})
    _check_moved(mine, delta, slope(a), recipe)
    return "and with 10 steps of ascent for each of 5 samples it costs eleven times what SEM's noise step costs"


def _check_draws(what: str, seen: list[torch.Tensor], z: torch.Tensor, radius: float, draws: int) -> None:
    """Raises AssertionError unless `seen` are `draws` images box(z + u), each u fresh and uniform within the radius."""
    assert len(seen) == draws, f"it asks for the {what} {len(seen)} times, and needs {draws}: once for each draw"
    found = torch.stack(seen)
    assert found.shape[1:] == z.shape, f"the {what} was asked at {list(found.shape[1:])}, not at {list(z.shape)}"
    assert 0 <= found.min() and found.max() <= 1, "perturbed images leave [0, 1]: clip them to the box"
    u = (found - z) / LEVEL
    most = float(u.abs().max())
    assert most > radius / 2, f"u reaches {most:.3g} levels only, and the radius is {radius:g}"
    assert most <= radius + 1e-3, f"u reaches {most:.3g} levels of 1/255, and the radius is {radius:g}"
    assert u.min() < -radius / 2 and u.max() > radius / 2, "u has one sign only: it must be uniform on both sides"
    assert u.flatten(1).std(1).min() > radius / 4, "u is the same number for every pixel: draw one for each"
    assert not torch.equal(found[0], found[1]), "all draws are alike: every draw needs a fresh u"


@checker(
    "Take the three channels apart: red, green, blue = noise.unbind(1), each [N,H,W].",
    "Luma is .299 red + .587 green + .114 blue: the eye sees green best.",
    "All three channels get the same luma: luma[:, None].expand_as(noise).",
)
def check_luma(luma: Callable) -> str:
    """Whether luma(noise) sets all channels to .299 R + .587 G + .114 B, for noise float [N,3,H,W] in levels."""
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    wanted = (weights * noise).sum(1, keepdim=True).expand_as(noise)
    mine = luma(given := noise.clone())
    check_tensor(mine, noise)
    assert torch.equal(given, noise), "it changes the noise in place: make a new tensor"
    assert not torch.allclose(mine, noise), "it returns the noise as it is"
    assert (mine - mine[:, :1]).abs().max() < 1e-5, "the channels differ: grey has R = G = B"
    reject(mine, {
        "this is the plain mean: luma weighs green most and blue least": noise.mean(1, keepdim=True),
        "red and blue are exchanged: the channels are R, G, B": (weights.flip(1) * noise).sum(1, keepdim=True),
    })  # fmt: skip
    assert torch.allclose(mine, wanted, atol=1e-4), "all channels must be .299 R + .587 G + .114 B"
    return "this is all that a grey-scale image keeps of a noise"
