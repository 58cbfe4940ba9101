"""Class-wise convolution against scipy's; its filters, which follow from the key and give nothing of it away."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from photos import image_set
from PIL import Image
from scipy import signal, stats

from semkit.protections.cuda import ClassFilters, class_filters, convolve, convolve_picture, convolve_set

KEY = "a private key"


def by_scipy(images, filters):
    """round(255 conv / max conv) of uint8 images, one by one in float64; and where that is nearly a tie."""
    found = []
    for image, kernel in zip(images.double().numpy(), filters.numpy(), strict=True):
        blurred = np.stack([signal.convolve2d(plane, kernel, mode="same") for plane in image])
        found.append(255 * blurred / blurred.max())
    exact = np.stack(found)
    return torch.from_numpy(np.rint(exact)), torch.from_numpy(np.abs(exact % 1 - 0.5) < 1e-3)


def same_levels(images, rounded, tie):
    apart = (images.double() - rounded).abs()
    return bool((apart[~tie] == 0).all() and (apart <= 1).all())


@pytest.fixture(scope="module")
def images():
    return image_set(24, size=10, classes=4)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 10])
def test_convolving_a_set_is_scipys_convolution_of_every_image(images, size):
    filters = class_filters(KEY, 4, size=size)
    rounded, tie = by_scipy(images.images, filters[images.labels])
    protected = convolve_set(images, filters).images
    assert tie.double().mean() < 0.01 and same_levels(protected, rounded, tie)
    assert not same_levels(protected, rounded.roll(1, 3), tie)  # a shift would be seen
    correlated = convolve_set(images, filters.flip(-2, -1)).images  # and the kernel turned round
    assert not same_levels(correlated, rounded, tie)


@given(some.integers(1, 3), some.integers(2, 12), some.integers(2, 12), some.integers(2, 6), some.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_size_in_float64(channels, height, width, k, seed):
    torch.manual_seed(seed)
    x = torch.rand(3, channels, height, width, dtype=torch.float64)
    filters = torch.rand(3, k, k, dtype=torch.float64)
    if k > min(height, width):
        with pytest.raises(ValueError, match=f"a kernel of {k} x {k} is larger than the image, {width} x {height}"):
            convolve(x, filters)
        return
    found = convolve(x, filters)
    for image, kernel, result in zip(x.numpy(), filters.numpy(), found.numpy(), strict=True):
        blurred = np.stack([signal.convolve2d(plane, kernel, mode="same") for plane in image])
        assert np.allclose(result, blurred / blurred.max())


def test_it_is_differentiable_in_images_and_filters():
    torch.manual_seed(0)
    x, filters = (torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in ((2, 2, 4, 5), (2, 3, 3)))
    assert torch.autograd.gradcheck(convolve, (x, filters))


def test_values_are_rounded_to_8_bits_not_cut_off(images):
    filters = class_filters(KEY, 4)
    exact = 255 * convolve(images.images.double() / 255, filters[images.labels])
    apart = convolve_set(images, filters).images - exact
    assert apart.abs().max() < 0.5 + 1e-3 and abs(apart.mean()) < 0.02
    assert abs((exact.floor() - exact).mean()) > 0.4  # what cutting off would do


def test_a_pixel_alone_is_the_filter_and_a_black_image_stays_black():
    images = torch.zeros(2, 3, 7, 7)
    images[0, :, 2, 3] = 0.5
    filters = class_filters(KEY, 2)
    found = convolve(images, filters)
    assert torch.allclose(found[0, :, 1:4, 2:5], filters[0].float().expand(3, 3, 3))
    assert found[0].sum() == pytest.approx(3 * float(filters[0].sum())) and not found[1].any()


def test_no_radius_bounds_the_change(images):
    protected = convolve_set(images, class_filters(KEY, 4))
    assert (protected.images.int() - images.images.int()).abs().max() > 60
    assert (protected.images.amax((1, 2, 3)) == 255).all()
    assert torch.equal(protected.labels, images.labels) and protected.classes == images.classes


def test_filters_are_uniform_with_a_single_one_in_a_random_place():
    filters = class_filters(KEY, 3000, strength=0.4)
    assert filters.shape == (3000, 3, 3) and filters.dtype == torch.float64
    ones = filters == 1
    assert (ones.sum((1, 2)) == 1).all()
    assert stats.kstest(filters[~ones], stats.uniform(0, 0.4).cdf).pvalue > 0.01
    assert stats.chisquare(ones.sum(0).flatten()).pvalue > 0.01


def test_the_key_makes_the_filters_on_every_machine_and_with_every_version():
    filters = class_filters(KEY, 3)
    known = [[0.1692665, 0.1793701, 0.2818448], [0.2994268, 0.1427657, 0.0619247], [0.0408528, 1.0, 0.0467606]]
    assert filters[0].tolist() == [pytest.approx(row, abs=1e-6) for row in known]
    assert torch.equal(class_filters(KEY, 10)[:3], filters)
    for other in (class_filters(KEY + " ", 3), class_filters(KEY.upper(), 3), class_filters(KEY, 4)[1:]):
        assert not torch.isclose(other, filters)[(other < 1) & (filters < 1)].any()
    strong = class_filters(KEY, 3, strength=0.6)
    assert torch.equal(strong == 1, filters == 1) and torch.allclose(strong[strong < 1], 2 * filters[filters < 1])
    assert not torch.isclose(class_filters(KEY, 3, size=5)[:, :3, :3], filters).any()


def test_any_text_can_be_a_key():
    made = [class_filters(key, 1) for key in ("ключ-ключ", "\udcff" * 8, "\ud800" * 8, "12345678", "123456\x0078")]
    assert len({str(filters.tolist()) for filters in made}) == len(made)


def test_the_controls_are_the_same_filters_given_to_other_classes():
    own, one, permuted = (ClassFilters(assignment=how, key=KEY).filters(4) for how in ("own", "one", "permuted"))
    assert torch.equal(one, own[:1].expand(4, 3, 3)) and torch.equal(permuted, own[[1, 2, 3, 0]])
    assert len({str(kernel.tolist()) for kernel in own}) == 4
    with pytest.raises(ValueError, match="unknown assignment 'two'; known are own, one, permuted"):
        ClassFilters(assignment="two")


def test_what_surrounds_an_image_does_not_change_its_bytes():
    many = image_set(600, size=6, classes=3)
    filters = class_filters(KEY, 3)
    whole, alone = convolve_set(many, filters), convolve_set(many.take([7, 300, 599]), filters)
    assert torch.equal(whole.images[[7, 300, 599]], alone.images)


@pytest.mark.parametrize(("mode", "colours"), [("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3)])
def test_a_picture_keeps_mode_size_and_alpha(mode, colours):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 14, 4), dtype=np.uint8)).convert(mode)
    image.info = {"icc_profile": b"a profile"}
    kernel = class_filters(KEY, 1)[0]
    found = convolve_picture(image, kernel)
    assert (found.mode, found.size, found.info) == (mode, (14, 9), image.info)
    before, after = (np.asarray(i).reshape(9, 14, -1) for i in (image, found))
    planes = torch.from_numpy(before[..., :colours].transpose(2, 0, 1).copy())[None]
    rounded, tie = by_scipy(planes, kernel[None])
    assert same_levels(torch.from_numpy(after[..., :colours].transpose(2, 0, 1).copy())[None], rounded, tie)
    assert np.array_equal(before[..., colours:], after[..., colours:])


def test_a_set_and_its_pictures_get_the_same_bytes(images):
    filters = class_filters(KEY, 4)
    whole = convolve_set(images, filters).images
    for i in range(4):
        picture = Image.fromarray(images.images[i].permute(1, 2, 0).numpy())
        alone = np.asarray(convolve_picture(picture, filters[images.labels[i]]))
        assert np.array_equal(alone, whole[i].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("key", ["", "short", "1234567", "       7", None])
def test_a_short_key_is_refused_without_repeating_it(key):
    with pytest.raises(ValueError, match=r"^the key must have 8 characters at least$"):
        class_filters(key, 3)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"strength": float("nan")}, "strength must be above 0 and at most 1, got nan"),
        ({"size": 1}, "kernel must be a whole number >= 2, got 1"),
        ({"size": 2.5}, "kernel must be a whole number >= 2"),
        ({"classes": 0}, "classes must be a whole number >= 1, got 0"),
    ],
)
def test_filters_that_make_no_sense_are_refused(how, reason):
    with pytest.raises(ValueError, match=reason):
        class_filters(KEY, **{"classes": 3, **how})


def test_a_set_that_cannot_be_filtered_is_refused(images):
    with pytest.raises(ValueError, match="a kernel of 11 x 11 is larger than the image, 10 x 10"):
        convolve_set(images, class_filters(KEY, 4, size=11))
    with pytest.raises(ValueError, match="4 classes need as many filters, got 3"):
        convolve_set(images, class_filters(KEY, 3))
    few = replace(images, labels=images.labels * 0)
    assert len(convolve_set(few, class_filters(KEY, 4))) == 24
