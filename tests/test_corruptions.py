"""Corruptions: farther from the image the more severe, by seed, and each the thing that its name says."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from semkit.images import corruptions
from semkit.images.corruptions import KINDS, SEVERITIES, corrupted
from semkit.images.imageset import ImageSet
from semkit.images.loading import load

RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog",
    "elastic_transform",
}  # fmt: skip
BLURS = {"defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"}


@pytest.fixture(scope="module")
def images():
    return load("shapes").test.take(slice(0, 60))


def flat(value, n=4):
    return ImageSet(torch.full((n, 3, 32, 32), value, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ("a",))


def change(images, kind, severity, seed=0):
    """The mean change of a value, in levels."""
    return (corrupted(images, kind, severity, seed=seed).images.float() - images.images.float()).abs().mean().item()


def test_there_are_fifteen_of_five():
    assert len(KINDS) == 15 and {len(how) for how in SEVERITIES.values()} == {5}


def grows(images, kind):
    """Whether the mean change grows with every severity."""
    far = [change(images, kind, severity) for severity in range(6)]
    return far[0] == 0 and all(a < b for a, b in pairwise(far))


@pytest.mark.parametrize("kind", KINDS)
def test_the_more_severe_the_farther(kind, images):
    assert grows(images, kind)


def test_a_twin_that_is_milder_at_the_end_is_rejected(images, monkeypatch):
    twin = dict(SEVERITIES)
    twin[corruptions.contrast] = (0.75, 0.5, 0.4, 0.15, 0.3)
    monkeypatch.setattr(corruptions, "SEVERITIES", twin)
    assert not grows(images, "contrast")


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_the_rest_of_the_set_stays(kind, images):
    one, other = corrupted(images, kind, 3, seed=1), corrupted(images, kind, 3, seed=2)
    assert one.images.dtype == torch.uint8 and one.images.shape == images.images.shape
    assert torch.equal(one.labels, images.labels) and one.classes == images.classes and len(one) == 60
    assert torch.equal(one.images, corrupted(images, kind, 3, seed=1).images)
    assert torch.equal(one.images, other.images) == (kind not in RANDOM)
    assert one.fingerprint != images.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_the_same_whatever_follows_it(kind, images):
    assert torch.equal(corrupted(images.take(slice(0, 7)), kind, 3).images, corrupted(images, kind, 3).images[:7])


def test_every_image_has_draws_of_its_own():
    first, second, *_ = corrupted(flat(100), "fog", 3).images
    assert not torch.equal(first, second)


def test_severity_0_is_the_set_itself(images):
    assert all(corrupted(images, kind, 0) is images for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_size_are_taken_too(kind):
    odd = ImageSet(torch.randint(0, 256, (3, 3, 20, 27), dtype=torch.uint8), torch.arange(3), ("a", "b", "c"))
    assert corrupted(odd, kind, 5).images.shape == odd.images.shape


# -- what each of them is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(BLURS))
def test_what_only_moves_values_about_leaves_a_flat_image_alone(kind):
    assert change(flat(100), kind, 5) < 0.5


@pytest.mark.parametrize("severity", [1, 5])
def test_noises_have_the_size_that_they_say(severity):
    of = dict(seed=3)
    grey = flat(128, 40)
    spread = lambda kind: (corrupted(grey, kind, severity, **of).images.float() / 255).std().item()  # noqa: E731
    assert spread("gaussian_noise") == pytest.approx(SEVERITIES[corruptions.gaussian_noise][severity - 1], rel=0.02)
    photons = SEVERITIES[corruptions.shot_noise][severity - 1]
    assert spread("shot_noise") == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.02)
    spoiled = corrupted(grey, "impulse_noise", severity, **of).images
    share = SEVERITIES[corruptions.impulse_noise][severity - 1]
    for value in (0, 255):
        assert (spoiled == value).float().mean().item() == pytest.approx(share / 2, rel=0.1)


def test_contrast_and_brightness_do_what_they_say(images):
    x = images.images.float()
    faded = corrupted(images, "contrast", 3).images.float()
    torch.testing.assert_close(faded.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=0.3)
    np.testing.assert_allclose(faded.std((2, 3)) / x.std((2, 3)), 0.4, atol=0.03)
    dark = flat(100)
    dark.images[:, 0], dark.images[:, 1] = 50, 0
    assert corrupted(dark, "brightness", 5).images[0, :, 0, 0].tolist() == [88, 0, 177]  # 100 + .3 * 255, hue kept
    assert corrupted(flat(0), "brightness", 5).images.unique().tolist() == [76]


def test_gaussian_blur_is_scipys():
    x = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    wanted = ndimage.gaussian_filter(x[0, 0].numpy(), 1.0, mode="nearest", radius=3)
    np.testing.assert_allclose(corruptions._gaussian(x, 1.0)[0, 0], wanted, atol=1e-5)


def test_a_defocused_point_is_a_disk_and_a_moved_image_is_moved():
    point = torch.zeros(1, 3, 33, 33)
    point[..., 16, 16] = 1
    disk = corruptions.defocus_blur(point, 2.0, None)[0, 0]
    assert disk.sum().item() == pytest.approx(1) and (disk > 0).sum() == 21
    assert torch.equal(disk, disk.T) and torch.equal(disk, disk.flip(0))
    one = torch.ones(1, 1, 1)
    there = corruptions._moved(point, 3 * one, -2 * one)[0, 0]
    assert there[18, 13].item() == pytest.approx(1, abs=1e-4)
    streak = corruptions.motion_blur(point, 5, [torch.Generator().manual_seed(0)])[0, 0]
    assert streak.sum().item() == pytest.approx(1, abs=1e-3) and (streak > 0.01).sum() >= 5


def test_pixelated_images_are_blocks_and_jpeg_is_pillows(images):
    small = corrupted(images, "pixelate", 5).images
    assert len(small[0].flatten(1).T.unique(dim=0)) <= 20 * 20
    file = io.BytesIO()
    Image.fromarray(images.images[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    wanted = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(corrupted(images, "jpeg_compression", 5).images[0], wanted)


def test_what_is_unknown_is_refused(images):
    with pytest.raises(ValueError, match="unknown corruption 'rain'; known are gaussian_noise"):
        corrupted(images, "rain", 1)
    for bad in (-1, 6, 1.5):
        with pytest.raises(ValueError, match="severity must be"):
            corrupted(images, "fog", bad)
