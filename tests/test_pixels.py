"""The unit, the box and the balls, against definitions that share no line with semkit.images.pixels."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from semkit.images import pixels
from semkit.images.pixels import LEVEL, NORMS
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.training.perturb import PGD
from semkit.training.recipes import SGD

ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


def lengths(delta, order):
    return np.array([np.linalg.norm(d.ravel(), order) for d in delta.numpy()])


def points(n=40, shape=(3, 4, 5), scale=1.0, seed=0):
    return scale * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the guard ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [8 / 255, 0.031, 0.03, 4 / 255, 0.0157, 16 / 255, 1.6 / 255, 7.5 / 255])
def test_a_radius_typed_as_a_fraction_says_what_to_write(value):
    with pytest.raises(ValueError, match=r"write pixel levels: 8, not 8/255"):
        pixels.check_radius(value)


@pytest.mark.parametrize(
    "value",
    [-1, -8 / 255, math.nan, math.inf, -math.inf, 1e308, 10**400, "eight", None, [8]],
    ids=lambda value: str(value)[:9],
)
def test_what_cannot_be_a_length_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^noise_radius must be"):
        pixels.check_radius(value, "noise_radius")


@pytest.mark.parametrize("value", [0.064, 0.04, 0.1, 0.2, 0.25, 0.4])
def test_small_radii_and_steps_are_real(value):
    assert pixels.check_radius(value) == pixels.check_step_size(value) == value
    assert PGD(2, 50, value / 2).step_size == value / 2


@given(st.floats())
def test_exactly_zero_and_an_eighth_of_a_level_upwards_pass(value):
    if value == 0 or 0.126 <= value <= pixels.MOST_LEVELS:
        assert pixels.check_radius(value) == value
    elif 0 < value < 0.126:
        with contextlib.suppress(ValueError):
            assert pixels.check_radius(value) == value
    else:
        with pytest.raises(ValueError):
            pixels.check_radius(value)


@pytest.mark.parametrize("value", [-1, 1.5, True, math.nan, "ten"])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(ValueError):
        pixels.check_count(value, "steps")


def test_a_count_has_a_least_value():
    assert pixels.check_count(3.0, "samples", 1) == 3
    with pytest.raises(ValueError, match="samples must be a whole number >= 1, got 0"):
        pixels.check_count(0, "samples", 1)


# -- levels ------------------------------------------------------------------------------------------------------------


def test_adding_noise_is_exact_for_every_pixel_and_every_noise_value():
    images, noise = np.meshgrid(np.arange(256), np.arange(-128, 128))
    got = pixels.add_noise(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(noise.astype(np.int8)))
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), np.minimum(np.maximum(images + noise, 0), 255))


def test_the_negative_half_of_the_noise_survives():
    image, noise = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8), torch.full((1, 3, 2, 2), -8, dtype=torch.int8)
    assert (pixels.add_noise(image, noise) == 92).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_comes_back_from_floats(dtype):
    noise = torch.arange(-128, 128, dtype=torch.int8)
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels.to_levels(pixels.to_float(noise, dtype)), noise)
    expected = np.arange(256, dtype=str(dtype).removeprefix("torch.")) / 255
    assert np.array_equal(pixels.to_float(images, dtype).numpy(), expected)


def test_levels_are_rounded_not_truncated():
    level = torch.arange(-127, 128, dtype=torch.float64)
    for part in (-0.49, 0.49):
        got = pixels.to_levels((level + part) * LEVEL)
        assert got.dtype == torch.int8 and torch.equal(got.double(), level)
    truncated = ((level + 0.49) * LEVEL * 255).to(torch.int8).double()
    assert not torch.equal(truncated, level)  # the twin: negative values move towards zero


# -- balls -------------------------------------------------------------------------------------------------------------


def is_projection(v, p, radius, norm):
    """Whether p is the nearest point of the ball to v: p in it, and no point q of it with <v - p, q - p> > 0.

    Necessary and sufficient for any convex set; the largest <v - p, q> over the ball is radius * |v - p|_dual.
    """
    away = v - p
    inside = lengths(p, ORDER[norm]) <= radius + 1e-9
    reach = radius * lengths(away, DUAL[norm])
    return bool(np.all(inside & (reach <= (away * p).flatten(1).sum(1).numpy() + 1e-9)))


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 999), radius=st.floats(0, 30), scale=st.floats(1e-3, 10))
@settings(deadline=None, max_examples=40)
def test_projection_is_the_nearest_point_of_the_ball(norm, seed, radius, scale):
    v = points(6, (3, 2, 2), scale, seed)
    assert is_projection(v, pixels.project(v, radius, norm), radius, norm)


def test_the_check_of_projections_refuses_scaling_into_the_l1_ball():
    v = points()
    scaled = v / v.abs().sum((1, 2, 3), keepdim=True)
    assert lengths(scaled, 1).max() < 1 + 1e-9 and not is_projection(v, scaled, 1, "l1")


def test_l1_projection_against_a_root_finder_and_a_minimiser():
    v = points(12)
    got = pixels.project(v, 2.0, "l1").numpy().reshape(12, -1)
    for row, flat in zip(got, v.numpy().reshape(12, -1), strict=True):
        size = np.abs(flat)
        t = optimize.brentq(lambda t, a=size: np.maximum(a - t, 0).sum() - 2, 0, size.max(), xtol=1e-14)
        assert np.allclose(row, np.sign(flat) * np.maximum(size - t, 0), atol=1e-10)
    short = v[0, 0, 0].numpy()
    bound = {"type": "ineq", "fun": lambda p: 0.5 - np.abs(p).sum()}
    found = optimize.minimize(lambda p: ((p - short) ** 2).sum(), 0.01 * short, constraints=bound, tol=1e-12).x
    assert np.allclose(pixels.project(torch.from_numpy(short)[None], 0.5, "l1")[0], found, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_leaves_what_is_inside_and_treats_every_sample_alone(norm):
    v = points(scale=0.01)
    mixed = torch.cat([v[:1], 1e6 * v[1:2], torch.zeros_like(v[:1])])
    projected = pixels.project(mixed, 2.0, norm)
    assert torch.equal(projected[[0, 2]], mixed[[0, 2]])
    assert lengths(projected[1:2], ORDER[norm]) == pytest.approx(2)
    assert torch.equal(pixels.project(mixed, 0.0, norm), torch.zeros_like(mixed))
    torch.testing.assert_close(pixels.project(projected, 2.0, norm), projected, rtol=0, atol=1e-12)


# In n dimensions a uniform point of the unit ball has |d|^n uniform, and its first coordinate these laws.
N_DIMS = 6
COORDINATE = {
    "linf": lambda d: stats.kstest(np.abs(d), stats.uniform.cdf),
    "l2": lambda d: stats.kstest(d**2, stats.beta(0.5, (N_DIMS + 1) / 2).cdf),
    "l1": lambda d: stats.kstest(np.abs(d), stats.beta(1, N_DIMS).cdf),
}


def follows_uniform_law(d, norm):
    radial = stats.kstest(lengths(d, ORDER[norm]) ** N_DIMS, stats.uniform.cdf).pvalue
    first = d.numpy().reshape(len(d), -1)[:, 0]
    signs = stats.binomtest(int(sum(first > 0)), len(d)).pvalue
    return min(radial, COORDINATE[norm](first).pvalue, signs) > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_are_uniform_in_the_ball(norm):
    like = torch.zeros(4000, 3, 1, 2, dtype=torch.float64)
    d = pixels.random_point(like, 2.5, norm, torch.Generator().manual_seed(1))
    assert lengths(d, ORDER[norm]).max() <= 2.5 + 1e-12
    assert follows_uniform_law(d / 2.5, norm)
    # Twin: points on the sphere, the usual slip, have another radial law.
    assert not follows_uniform_law(d / torch.from_numpy(lengths(d, ORDER[norm])).view(-1, 1, 1, 1), norm)


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_come_from_the_given_generator_only(norm):
    like = torch.zeros(3, 3, 4, 4)
    before = torch.get_rng_state()
    a, b, c = (pixels.random_point(like, 1.0, norm, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", NORMS)
def test_ascent_directions_have_unit_length(norm):
    d = pixels.ascent_direction(points(), norm)
    assert np.allclose(lengths(d, ORDER[norm]), 1, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_no_step_of_unit_length_climbs_faster(norm):
    g = points()
    # With one coordinate's share the l1 step is the steepest one, too.
    climbed = (g * pixels.ascent_direction(g, norm, l1_share=1e-9)).sum((1, 2, 3)).numpy()
    assert np.allclose(climbed, lengths(g, DUAL[norm]), rtol=1e-12)


def test_the_l1_step_shares_itself_among_the_largest_gradients():
    g = points(5, (3, 10, 10))
    d = pixels.ascent_direction(g, "l1", l1_share=0.02).numpy().reshape(5, -1)
    for row, flat in zip(d, g.numpy().reshape(5, -1), strict=True):
        largest = np.argsort(-np.abs(flat))[:6]
        assert set(np.flatnonzero(row)) == set(largest)
        assert np.allclose(row[largest], np.sign(flat[largest]) / 6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_without_gradient_stays_where_it_is(norm):
    g = torch.cat([torch.zeros(1, 3, 4, 5), points(1).float()])
    d = pixels.ascent_direction(g, norm)
    assert not d[0].any() and d[1].any() and d.isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_very_small_gradient_still_gives_a_unit_step(norm):
    # A confident net's float32 gradients fall below 1e-23, where their squares are zero.
    d = pixels.ascent_direction((points(4) * 1e-26).float(), norm)
    assert np.allclose(lengths(d, ORDER[norm]), 1, atol=1e-5)


# -- the box -----------------------------------------------------------------------------------------------------------


def box_slopes(box, dtype):
    """The gradients of box just outside, at and just inside the ends of [0, 1], and in the middle."""
    just = torch.finfo(dtype)
    x = torch.tensor([-1, -2 * just.tiny, 0, just.tiny, 0.5, 1 - just.eps, 1, 1 + just.eps, 2], dtype=dtype)
    assert torch.equal(box(x.requires_grad_()).detach(), x.detach().clamp(0, 1))
    return torch.autograd.grad(box(x).sum(), x)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_box_lets_gradients_through_inside_and_at_its_ends_only(dtype):
    expected = [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert box_slopes(pixels.box, dtype) == expected
    assert box_slopes(lambda x: torch.nn.functional.hardtanh(x, 0, 1), dtype) != expected  # 0 at the ends


@pytest.mark.parametrize("value", [None, "half", [0.5], 1j])
@pytest.mark.parametrize(
    "check", [pixels.check_share, pixels.check_fraction, pixels.check_nonnegative, pixels.check_step_size]
)
def test_what_is_no_number_is_named_and_no_type_error(check, value):
    with pytest.raises(ValueError, match="lr must be a number"):
        check(value, "lr")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: SGD(lr=None), "lr must be a number, got None"),
        (lambda: Lab(checkpoint_every=None), "checkpoint_every must be a number, got None"),
        (lambda: Lab(checkpoint_every=-1), "checkpoint_every must be a finite number >= 0"),
        (lambda: Lab(workers=1.5), "workers must be a whole number >= 0, got 1.5"),
        (lambda: Lab(workers="two"), "workers must be a whole number >= 0, got 'two'"),
        (lambda: Engine(None), "device must be auto, cpu, mps, cuda or cuda:N, got None"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(made, words):
    with pytest.raises(ValueError, match=words):
        made()
