"""What a trainer does at every load: against Pillow, scipy and loops; the same draws give the same images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import batch, net
from photos import by_pillow, each_image, image_set
from scipy import ndimage

from semkit.countermeasures.augmentations import Coin, Cutout, Plasma, Sharpened, TrivialAugment, plasma
from semkit.countermeasures.registry import COUNTERMEASURES, UERASER, ByAugment, counter
from semkit.countermeasures.trainers import Worst
from semkit.images.augment import FlipCrop, Identity
from semkit.images.pixels import to_float
from semkit.nets.engine import Engine, predict
from semkit.nets.lab import Lab
from semkit.training.learning import fit
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
LEARN = LearnRecipe(model="tiny", sgd=SGD(steps=3, batch=8), evaluations=1)
IMAGES = image_set(12, 16).images
AT_LOAD = ["jpegload", "coin", "rsk", "ueraser-lite", "trivialaugment", "cutout", "colorjitter"]


def augment_of(name):
    return counter(image_set(10, 16), LEARN, [name])[1].augment


@pytest.mark.parametrize("name", AT_LOAD)
def test_what_is_done_at_every_load_comes_anew_and_the_same_draws_give_the_same_images(name):
    x, how = to_float(IMAGES), augment_of(name)
    assert {each for each, one in COUNTERMEASURES.items() if isinstance(one, ByAugment)} == set(AT_LOAD)
    first, again, other = (how.draw(len(x), (16, 16), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    done = how.apply(x, first)
    assert done.shape == x.shape and 0 <= done.min() and done.max() <= 1
    assert torch.equal(done, how.apply(x, again)) and not torch.equal(done, how.apply(x, other))


def test_jpeg_at_every_load_is_pillows_after_the_crop_and_jpeg_is_pillows_before():
    train, seed = image_set(10, 16), lambda: torch.Generator().manual_seed(0)
    x, how = to_float(train.images), augment_of("jpegload-30")
    cropped = FlipCrop().apply(train.images, FlipCrop().draw(10, (16, 16), seed()))
    after = to_float(each_image(cropped, lambda image: by_pillow(image, "JPEG", 30)))
    assert torch.equal(how.apply(x, how.draw(10, (16, 16), seed())), after)
    stored, recipe = counter(train, LEARN, ["jpeg-30"])
    assert recipe.augment == FlipCrop() and not torch.equal(
        FlipCrop().apply(to_float(stored.images), FlipCrop().draw(10, (16, 16), seed())), after
    )


def test_coin_moves_pixels_as_a_loop_does_and_keeps_even_images():
    x, how = to_float(IMAGES[:2]), Coin(Identity())
    drawn = how.draw(2, (16, 16), torch.Generator().manual_seed(0))
    done, (down, right) = how.apply(x, drawn), drawn[1].numpy().transpose(1, 0, 2, 3)
    assert abs(down).max() <= 2 and abs(down).max() > 1.9 and abs(np.corrcoef(down.ravel(), right.ravel())[0, 1]) < 0.2
    for n, i, j in ((0, 0, 0), (0, 7, 9), (1, 15, 15), (1, 3, 0)):
        place = [i + down[n, i, j]], [j + right[n, i, j]]
        for channel in range(3):
            there = ndimage.map_coordinates(x[n, channel].numpy(), place, order=1, mode="grid-wrap")
            assert done[n, channel, i, j].item() == pytest.approx(there[0], abs=1e-5)
    still = Coin(Identity(), reach=0)
    assert torch.equal(still.apply(x, still.draw(2, (16, 16), torch.Generator())), x)
    even = torch.rand(2, 3, 1, 1).expand(2, 3, 16, 16).contiguous()
    assert torch.equal(how.apply(even, drawn), even)


def test_rsk_without_sharpening_and_filter_changes_nothing_and_with_them_is_scipys():
    from scipy import fft

    x = to_float(IMAGES)
    nothing = Sharpened(Identity(), 1, 0, 1)
    assert torch.allclose(nothing.apply(x, nothing.draw(12, (16, 16), torch.Generator())), x, atol=1e-5)
    how = Sharpened(Identity())
    drawn = how.draw(12, (16, 16), torch.Generator().manual_seed(0))
    kernel = how.kernels(drawn[1])[3].numpy()
    assert kernel[1, 1] == pytest.approx(2.5, abs=0.4) and kernel.sum() == pytest.approx(1, abs=0.8)
    assert kernel[[0, 0, 2, 2], [0, 2, 0, 2]].tolist() == [0] * 4
    for channel in range(3):
        sharp = ndimage.convolve(x[3, channel].numpy(), kernel, mode="mirror").clip(0, 1)
        z = fft.dctn(sharp, norm="ortho")
        z[4:], z[:, 4:] = 0, 0
        low = fft.idctn(z, norm="ortho").clip(0, 1)
        assert np.allclose(how.apply(x, drawn)[3, channel].numpy(), low, atol=1e-5)


def test_plasma_is_the_diamond_square_of_a_loop():
    u, rough = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.7])

    def loop(u, rough):
        grid, stride, s = np.full((9, 9), np.nan), 8, 1.0
        grid[::8, ::8] = u[::8, ::8]
        while stride > 1:
            half, s = stride // 2, s * rough
            for steps in (((half, half), (-half, half), (half, -half), (-half, -half)),
                          ((half, 0), (-half, 0), (0, half), (0, -half))):  # fmt: skip
                for i in range(0, 9, half):
                    for j in range(0, 9, half):
                        near = [(i + a, j + b) for a, b in steps if 0 <= i + a < 9 and 0 <= j + b < 9]
                        if np.isnan(grid[i, j]) and not np.isnan([grid[at] for at in near]).any():
                            grid[i, j] = (1 - s) * np.mean([grid[at] for at in near]) + s * u[i, j]
            stride = half
        return grid

    for done, image, r in zip(plasma(u, rough), u, rough.tolist(), strict=True):
        assert np.allclose(done[0].numpy(), loop(image[0].numpy().astype(float), r), atol=1e-6)
    assert torch.equal(plasma(torch.full((1, 3, 17, 17), 0.4), torch.tensor([0.5])).unique(), torch.tensor([0.4]))
    rougher = plasma(
        torch.rand(50, 1, 33, 33).expand(50, 2, 33, 33).reshape(100, 1, 33, 33), torch.tensor([0.2, 0.9] * 50)
    )
    steps = (rougher[..., 1:] - rougher[..., :-1]).abs().mean((1, 2, 3))
    assert steps[1::2].mean() > 3 * steps[::2].mean()


def test_ueraser_changes_brightness_contrast_and_channels_each_with_chance_one_half():
    x, how = to_float(image_set(400, 8).images), Plasma(Identity())
    drawn = how.draw(400, (8, 8), torch.Generator().manual_seed(0))
    made = drawn[1][2]
    assert (abs(made.float().mean(0) - 0.5) < 0.1).all() and made.unique(dim=0).shape == (8, 3)
    done = how.apply(x, drawn)
    left, shuffled = ~made.any(1), made[:, 2] & ~made[:, :2].any(1)
    assert torch.equal(done[left], x[left])
    assert torch.equal(done[shuffled].sort(1).values, x[shuffled].sort(1).values)
    assert not torch.equal(done[shuffled], x[shuffled])


def trained(recipe):
    return fit(image_set(20, 16), image_set(8, 16), recipe, lab=Lab(ENGINE), seed=1).losses


def test_ueraser_max_of_one_draw_is_lite_bit_for_bit_and_standard_turns_into_lite():
    lite = counter(image_set(4), LEARN, ["ueraser-lite"])[1]
    once, both, never = (replace(LEARN, perturbation=Worst(UERASER, *how)) for how in ((1,), (5,), (5, 0.0)))
    assert trained(once) == trained(lite) == trained(never) != trained(both)
    some = trained(replace(LEARN, perturbation=Worst(UERASER, 5, 0.3)))
    assert some[0] == trained(both)[0] and some[1] != trained(both)[1]
    plain = replace(LEARN, augment=Identity(), perturbation=Worst(FlipCrop(), 1))
    assert trained(plain) == trained(LEARN)


def test_the_largest_loss_of_five_draws_is_no_smaller_than_that_of_the_first_and_is_the_loops():
    model, (x, y) = net(opinion=5), batch(12, 16)
    how = Worst(UERASER, 5)
    drawn = how.draw(x, torch.Generator().manual_seed(0))
    losses = lambda images: F.cross_entropy(predict(model, images), y, reduction="none")  # noqa: E731
    one, five = (losses(Worst(UERASER, n).apply(model, x, y, drawn[:n])) for n in (1, 5))
    assert (five >= one).all() and (five > one + 1e-3).any()
    assert torch.equal(five, torch.stack([losses(UERASER.apply(x, each)) for each in drawn]).amax(0))


def test_trivialaugment_is_torchvisions_on_the_augmented_image_with_a_seed_for_each():
    from torchvision.transforms import v2

    x, how = to_float(IMAGES), counter(image_set(10, 16), LEARN, ["cutout", "trivialaugment"])[1].augment
    assert how == TrivialAugment(Cutout(first=FlipCrop()))
    drawn = how.draw(len(x), x.shape[2:], torch.Generator().manual_seed(0))
    first = (how.first.apply(x, drawn[0]) * 255).round().to(torch.uint8)
    done = how.apply(x, drawn)
    for image, seed, found in zip(first, drawn[1].tolist(), done, strict=True):
        torch.manual_seed(seed)
        assert torch.equal(to_float(v2.TrivialAugmentWide()(image)), found)
    torch.manual_seed(5)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(how.apply(x, drawn), done) and torch.equal(torch.rand(1), after)  # and takes no one's randomness
    assert torch.equal(how.apply(x[3:4], of_image(drawn, 3)), done[3:4])


def of_image(drawn, i):
    """The draws of image i of TrivialAugment(Cutout(FlipCrop()))."""
    (flipped, corner), seeds = drawn
    return tuple(tuple(d[i : i + 1] for d in part) for part in (flipped, corner)), seeds[i : i + 1]
