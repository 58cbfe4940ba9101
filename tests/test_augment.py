"""Batched augmentation against one image at a time."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from semkit.countermeasures.augmentations import ColorJitter, Cutout, turned
from semkit.countermeasures.pixelwise import gaussian, grayscale, jpeg
from semkit.images.augment import (
    JPEG,
    FlipCrop,
    GaussianBlur,
    Grey,
    Identity,
    OneOf,
    ResizedCrop,
    luma,
)
from semkit.images.pixels import to_float


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(drawn):
    """The tensors of a draw, those of a first augmentation among them."""
    return [t for part in drawn for t in (flat(part) if isinstance(part, tuple) else [part])]


def floats(n, c, h, w, seed=0):
    return torch.rand(n, c, h, w, generator=generator(seed))


def one_by_one(x, drawn, pad):
    """FlipCrop.apply as its docstring says it, in numpy: flip, pad with zeros, cut; image after image."""
    views = []
    for image, flip, top, left in zip(x.numpy(), *drawn, strict=True):
        image = np.flip(image, 2) if flip else image
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        views.append(image[:, top : top + x.shape[2], left : left + x.shape[3]])
    return torch.from_numpy(np.stack(views))


def transposed_one_by_one(g, drawn, pad):
    """The gradient's way back: paste into the padded frame, drop the frame, flip."""
    c, h, w = g.shape[1:]
    views = []
    for image, flip, top, left in zip(g.numpy(), *drawn, strict=True):
        frame = np.zeros((c, h + 2 * pad, w + 2 * pad), g.numpy().dtype)
        frame[:, top : top + h, left : left + w] = image
        image = frame[:, pad : pad + h, pad : pad + w]
        views.append(np.flip(image, 2) if flip else image)
    return torch.from_numpy(np.stack(views))


IMAGES = {
    "float32": floats(40, 3, 7, 9),
    "float64": floats(40, 3, 8, 8).double(),
    "uint8": (255 * floats(40, 3, 9, 6)).to(torch.uint8),
    "int8": (255 * floats(40, 1, 5, 5) - 128).to(torch.int8),
    "channels_last": floats(40, 3, 8, 8).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("pad", [0, 1, 4])
@pytest.mark.parametrize("kind", IMAGES)
def test_flip_crop_equals_a_loop_over_images(kind, pad):
    x, t = IMAGES[kind], FlipCrop(pad)
    drawn = t.draw(len(x), x.shape[2:], generator())
    got = t.apply(x, drawn)
    assert got.dtype == x.dtype and torch.equal(got, one_by_one(x, drawn, pad))


def test_the_comparison_sees_one_image_read_a_pixel_too_far_left():
    x, t = IMAGES["float32"], FlipCrop(2)
    flip, top, left = t.draw(len(x), x.shape[2:], generator())
    left[7] = (left[7] + 1) % 5
    moved = t.apply(x, (flip, top, left))
    left[7] = (left[7] - 1) % 5
    assert not torch.equal(moved, one_by_one(x, (flip, top, left), 2))


def test_gradients_flow_back_through_flip_crop_to_the_pixels_they_came_from():
    x, t = IMAGES["float64"].clone().requires_grad_(), FlipCrop(3)
    drawn = t.draw(len(x), x.shape[2:], generator(4))
    g = floats(*x.shape, seed=5).double()
    got = torch.autograd.grad(t.apply(x, drawn), x, g)[0]
    assert torch.equal(got, transposed_one_by_one(g, drawn, 3))


def test_every_image_draws_its_own_flip_and_place():
    flip, top, left = FlipCrop(4).draw(3600, (32, 32), generator())
    for place in (top, left):
        assert np.allclose(np.bincount(place, minlength=9) / 3600, 1 / 9, atol=0.03)
    assert flip.double().mean().item() == pytest.approx(0.5, abs=0.04)
    # Independent of each other: every one of the 2 x 9 x 9 combinations turns up, about 22 times.
    seen = np.bincount((flip * 81 + top * 9 + left).numpy(), minlength=162)
    assert seen.min() > 4 and seen.max() < 50


def test_without_flip_only_places_are_drawn():
    flip, top, left = FlipCrop(4, flip=False).draw(100, (32, 32), generator())
    assert not flip.any() and len(set(top.tolist())) == len(set(left.tolist())) == 9


@pytest.mark.parametrize("t", [FlipCrop(4), FlipCrop(2, flip=False), ResizedCrop(16), ColorJitter()], ids=repr)
def test_draws_come_from_the_given_generator_only(t):
    before = torch.get_rng_state()
    a, b, c = (flat(t.draw(16, (32, 32), generator(s))) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a, c, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_identity_draws_nothing_and_changes_nothing():
    g, x = generator(), IMAGES["uint8"]
    before = g.get_state()
    assert Identity().apply(x, Identity().draw(len(x), x.shape[2:], g)) is x
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("pad", [-1, 1.5])
def test_flip_crop_refuses_a_pad_that_is_no_count(pad):
    with pytest.raises(ValueError, match="pad"):
        FlipCrop(pad)


# -- resized crops -----------------------------------------------------------------------------------------------------


def in_affine_frame(top, left, height, width, image, flip):
    """A part in pixels as the (width, height, across, down) that ResizedCrop.apply takes."""
    h, w = image
    across, down = (2 * left + width) / w - 1, (2 * top + height) / h - 1
    return [(-1 if flip else 1) * width / w, height / h, across, down]


def test_resized_crop_equals_torchvision_image_by_image():
    x, size = floats(6, 3, 24, 20, seed=3).double(), 12
    parts = [(0, 0, 24, 20, False), (2, 4, 9, 12, True), (5, 1, 12, 12, False), (0, 8, 24, 12, True)]
    parts += [(11, 7, 13, 13, False), (3, 3, 6, 6, True)]
    drawn = torch.tensor([in_affine_frame(*p[:4], (24, 20), p[4]) for p in parts], dtype=torch.float64).T
    got = ResizedCrop(size).apply(x, tuple(drawn))
    for image, view, (top, left, height, width, flip) in zip(x, got, parts, strict=True):
        expected = v2.resized_crop(image[None], top, left, height, width, [size, size], antialias=False)[0]
        expected = v2.horizontal_flip(expected) if flip else expected
        # torchvision cuts first and so repeats the part's rim, ours sees the image go on there: the rim may differ.
        rim = int(np.ceil(size / min(height, width) / 2))
        torch.testing.assert_close(view[:, rim:-rim, rim:-rim], expected[:, rim:-rim, rim:-rim], rtol=0, atol=1e-12)
        whole = (height, width) == (24, 20)
        assert not whole or torch.allclose(view, expected, rtol=0, atol=1e-12)


def test_the_parts_lie_in_the_image_and_have_the_asked_for_area_and_shape():
    h, w = 40, 60
    t = ResizedCrop(16, scale=(0.1, 0.3), ratio=(0.75, 4 / 3))
    width, height, across, down = t.draw(4000, (h, w), generator())
    flipped, width = width < 0, width.abs()
    assert (across.abs() + width <= 1 + 1e-6).all() and (down.abs() + height <= 1 + 1e-6).all()
    area, ratio = width * height, width * w / (height * h)
    assert area.min() >= 0.1 - 1e-6 and area.max() <= 0.3 + 1e-6 and area.mean().item() == pytest.approx(0.2, abs=0.005)
    assert ratio.min() >= 0.75 - 1e-5 and ratio.max() <= 4 / 3 + 1e-5
    assert ratio.log().mean().abs() < 0.02 and flipped.float().mean().item() == pytest.approx(0.5, abs=0.04)
    # Every place is reached: the free room is used from end to end.
    assert [v.item() for v in (across / (1 - width)).aminmax()] == pytest.approx([-1, 1], abs=0.01)


def test_gradients_of_a_resized_crop_agree_with_differences():
    x = floats(2, 1, 6, 5, seed=1).double().requires_grad_()
    t = ResizedCrop(4)
    drawn = t.draw(2, (6, 5), generator(3))
    assert torch.autograd.gradcheck(lambda v: t.apply(v, drawn), (x,))


def test_cutout_greys_a_square_after_the_first_augmentation():
    x, augment = floats(40, 3, 12, 10), Cutout(5, FlipCrop(2))
    drawn = augment.draw(40, (12, 10), generator(3))
    expected = FlipCrop(2).apply(x, drawn[0]).clone()
    for image, top, left in zip(expected, *drawn[1], strict=True):
        image[:, max(0, top) : top + 5, max(0, left) : left + 5] = 0.5
    assert torch.equal(augment.apply(x, drawn), expected)
    centres = torch.stack(drawn[1]) + 2
    assert centres.min() == 0 and centres[0].max() == 11 and centres[1].max() == 9
    assert augment.output_size(12) == 12 and Cutout(5, ResizedCrop(8)).output_size(12) == 8


def test_the_gradient_does_not_pass_the_square():
    x, augment = floats(4, 3, 8, 8).requires_grad_(), Cutout(8, Identity())
    drawn = augment.draw(4, (8, 8), generator())
    (g,) = torch.autograd.grad(augment.apply(x, drawn).sum(), x)
    assert torch.equal(g, (augment.apply(x, drawn) != 0.5).float())


# -- light and colour --------------------------------------------------------------------------------------------------

JITTER = ColorJitter(first=Identity())


def jittered_one_by_one(x, drawn):
    """ColorJitter.apply by torchvision, image after image."""
    views = []
    for image, b, c, s, h in zip(x, *drawn[1], strict=True):
        view = v2.adjust_saturation(v2.adjust_contrast(v2.adjust_brightness(image, b), c), s)
        views.append(v2.adjust_hue(view, h))
    return torch.stack(views)


def test_jitter_is_torchvisions_image_by_image():
    x = floats(60, 3, 9, 7)
    x[0], x[1, 1:], x[2] = 0.5, 0, 1  # grey, red alone, white
    drawn = JITTER.draw(60, (9, 7), generator(2))
    ours, theirs = JITTER.apply(x, drawn), jittered_one_by_one(x, drawn)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-4)  # torchvision's weights of R and G are .2989 and .587
    twin = JITTER.apply(x, (drawn[0], drawn[1].roll(1, 1)))
    assert (twin - theirs).abs().mean() > 0.02


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_share_of_zero_leaves_that_as_it_is_and_the_others_reach_their_ends(name):
    spans = {"brightness": 0.3, "contrast": 0.2, "saturation": 0.1, "hue": 0.05}
    drawn = ColorJitter(**{**spans, name: 0}, first=Identity()).draw(4000, (8, 8), generator())[1]
    for (other, span), values in zip(spans.items(), drawn, strict=True):
        middle, span = other != "hue", 0 if other == name else span
        assert [v.item() for v in values.aminmax()] == pytest.approx([middle - span, middle + span], abs=2e-3)
        assert len(values.unique()) > 3900 or other == name


def test_jitter_of_no_size_changes_nothing_and_comes_after_the_first_augmentation():
    x = floats(20, 3, 8, 8)
    still = ColorJitter(0, 0, 0, 0, FlipCrop(2))
    drawn = still.draw(20, (8, 8), generator(3))
    torch.testing.assert_close(still.apply(x, drawn), FlipCrop(2).apply(x, drawn[0]), rtol=0, atol=1e-6)
    assert ColorJitter(first=ResizedCrop(6)).output_size(8) == 6


def test_a_turn_of_the_circle_is_none_and_a_third_moves_the_channels_on():
    x = floats(3, 3, 5, 5)
    torch.testing.assert_close(turned(x, torch.tensor([0.0, 1, -1])), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned(x, torch.full((3,), 1 / 3)), x.roll(1, 1), rtol=0, atol=1e-5)  # red is green
    grey = luma(x).expand_as(x)
    torch.testing.assert_close(turned(grey, torch.tensor([0.1, 0.2, 0.3])), grey)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((1.5,), "brightness is a share, 0 to 1"),
        ((0, -0.1), "contrast is a share"),
        ((0, 0, 0, 0.6), "hue is 0 to 0.5"),
    ],
)
def test_jitter_of_no_sense_is_refused(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        ColorJitter(*sizes)


# -- what a trainer does to images, as views ---------------------------------------------------------------------------

BYTES = (255 * floats(6, 3, 16, 24)).round().to(torch.uint8)
WAYS = (Identity(), Grey(), GaussianBlur(), JPEG(10))


@pytest.mark.parametrize("quality", [10, 75])
def test_jpeg_gives_what_pillow_decodes(quality):
    got = JPEG(quality).apply(to_float(BYTES), ())
    expected = []
    for image in BYTES.permute(0, 2, 3, 1).numpy():
        Image.fromarray(np.ascontiguousarray(image)).save(file := io.BytesIO(), "JPEG", quality=quality)
        expected.append(np.asarray(Image.open(file)))
    assert torch.equal(got, to_float(torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)))


def test_jpeg_carries_the_gradient_straight_through():
    x = to_float(BYTES).requires_grad_()
    slope = floats(*BYTES.shape, seed=1)
    (JPEG(10).apply(x, ()) * slope).sum().backward()
    assert torch.equal(x.grad, slope)


def test_views_are_what_the_countermeasures_make():
    for way, countermeasure in ((Grey(), grayscale), (GaussianBlur(), gaussian), (JPEG(10), jpeg)):
        got, expected = way.apply(to_float(BYTES), ()), to_float(countermeasure(BYTES))
        assert (got - expected).abs().max() <= 0.51 / 255, way  # they round


def test_one_of_takes_each_way_for_its_share_of_the_images_after_the_first_augmentation():
    t, x = OneOf(WAYS, FlipCrop(2)), 1.2 * floats(400, 3, 8, 8) - 0.1
    first, which = drawn = t.draw(len(x), (8, 8), generator())
    assert all(70 < count < 130 for count in which.bincount(minlength=4))
    got, before = t.apply(x, drawn), FlipCrop(2).apply(x, first).clamp(0, 1)
    for k, way in enumerate(WAYS):
        assert torch.equal(got[which == k], way.apply(before[which == k], ()))
    assert torch.equal(t.apply(x, t.draw(len(x), (8, 8), generator())), got)
    assert t.apply(x[:1], (tuple(d[:1] for d in first), which[:1])).shape == (1, 3, 8, 8)  # most ways get no image


def test_one_of_has_the_gradient_of_the_way_that_each_image_took():
    t, x = OneOf(WAYS, Identity()), floats(40, 3, 8, 8)
    _, which = drawn = t.draw(40, (8, 8), generator())
    slope = floats(40, 3, 8, 8, seed=1)

    def gradient(apply):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(apply(leaf), leaf, slope)[0]

    got = gradient(lambda leaf: t.apply(leaf, drawn))
    for k, way in enumerate(WAYS):
        alone = gradient(lambda leaf, way=way: way.apply(leaf, ()))
        assert torch.allclose(got[which == k], alone[which == k], atol=1e-6)


def test_a_jpeg_quality_that_pillow_does_not_have_is_refused():
    with pytest.raises(ValueError, match="quality must be at most 95, got 100"):
        JPEG(100)
