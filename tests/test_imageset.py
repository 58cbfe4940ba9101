"""Sets of labelled images: what they check, their fingerprint, and seeded parts with every class in its share."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import image_split

from semkit.images.imageset import ImageSet, limit_test, stratified_limit, stratified_split


def images(n=12, classes=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    names = tuple(f"class {c}" for c in range(classes))
    return ImageSet(pixels, torch.arange(n) % classes, names, "random", tuple(f"{i}.png" for i in range(n)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(12, 3, 8, 8)}, r"images must be uint8 \[N,3,H,W\], got torch.float32 \[12, 3, 8, 8\]"),
        ({"images": torch.zeros(12, 1, 8, 8, dtype=torch.uint8)}, r"images must be uint8 \[N,3,H,W\]"),
        ({"labels": torch.zeros(12)}, r"labels must be int64 \[12\], got torch.float32 \[12\]"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, r"labels must be int64 \[12\], got torch.int64 \[11\]"),
        ({"labels": [0] * 12}, "labels must be a torch tensor, got list"),
        ({"images": np.zeros((12, 3, 8, 8), np.uint8)}, "images must be a torch tensor, got ndarray"),
        ({"classes": ("a", "b")}, "labels must be 0 to 1, got 0 to 2"),
        ({"labels": torch.full((12,), -1)}, "labels must be 0 to 2, got -1 to -1"),
        ({"files": ("a.png",)}, "12 images, but 1 file names"),
    ],
)
def test_an_image_set_checks_itself(change, message):
    whole = images()
    fields = {name: getattr(whole, name) for name in ("images", "labels", "classes", "name", "files")}
    with pytest.raises(ValueError, match=message):
        ImageSet(**fields | change)


def test_take():
    whole = images()
    for index in ([3, 1], torch.tensor([3, 1]), slice(2, 9, 3), torch.arange(12) > 7):
        part, place = whole.take(index), torch.arange(12)[index].tolist()
        assert torch.equal(part.images, whole.images[index]) and torch.equal(part.labels, whole.labels[index])
        assert part.files == tuple(f"{i}.png" for i in place) and part.classes == whole.classes
    assert len(whole) == 12 and repr(whole) == "ImageSet('random', 12 images of 8x8, 3 classes)"


def test_fingerprint_sees_pixels_labels_shape_and_order():
    whole = images()
    reshaped = ImageSet(whole.images.reshape(12, 3, 4, 16), whole.labels, whole.classes)
    relabelled = ImageSet(whole.images, whole.labels.flip(0), whole.classes)
    changed = whole.images.clone()
    changed[7, 1, 2, 3] ^= 1
    others = [reshaped, relabelled, whole.take(range(11, -1, -1)), ImageSet(changed, whole.labels, whole.classes)]
    assert len({s.fingerprint for s in (whole, *others)}) == 5
    assert whole.fingerprint == images().fingerprint == whole.to("cpu").fingerprint
    channels_last = ImageSet(whole.images.contiguous(memory_format=torch.channels_last), whole.labels, whole.classes)
    assert whole.fingerprint == channels_last.fingerprint


def test_with_noise_is_the_clipped_sum():
    whole = images()
    noise = torch.randint(-8, 9, whole.images.shape, dtype=torch.int8)
    protected = whole.with_noise(noise)
    expected = (whole.images.numpy().astype(int) + noise.numpy()).clip(0, 255)
    assert np.array_equal(protected.images.numpy(), expected) and protected.files == whole.files
    with pytest.raises(ValueError, match=r"noise must be int8 \[12, 3, 8, 8\] as the images are, got torch.int8 \[3"):
        whole.with_noise(noise[:3])
    with pytest.raises(ValueError, match="noise must be int8"):
        whole.with_noise(noise.float())


some_labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(torch.tensor)


@settings(deadline=None)
@given(some_labels, st.integers(1, 60), st.integers(0, 3))
def test_limit_is_stratified(labels, n, seed):
    classes = labels.unique()
    if n < min(len(classes), len(labels)):
        with pytest.raises(ValueError, match=f"limit must be at least the number of classes, {len(classes)}, got {n}"):
            stratified_limit(labels, n, seed)
        return
    index = stratified_limit(labels, n, seed)
    assert index.tolist() == sorted(set(index.tolist())) and len(index) == min(n, len(labels))
    for c in classes:
        share, kept = n * (labels == c).sum() / len(labels), (labels[index] == c).sum()
        assert kept >= 1 and (n >= len(labels) or kept <= share + len(classes))
    assert torch.equal(index, stratified_limit(labels, n, seed))


@settings(deadline=None)
@given(some_labels, st.floats(0.01, 0.99), st.integers(0, 3))
def test_split_is_stratified(labels, share, seed):
    counts = labels.bincount()
    if (counts == 1).any():
        with pytest.raises(ValueError, match=r"class \d has a single image: one is needed to train, one to test"):
            stratified_split(labels, share, seed)
        return
    train, test = stratified_split(labels, share, seed)
    assert sorted(train.tolist() + test.tolist()) == list(range(len(labels)))
    for c in labels.unique():
        size = int((labels == c).sum())
        assert int((labels[test] == c).sum()) == min(max(round(share * size), 1), size - 1)


def test_seeds_choose_and_equal_classes_stay_equal():
    whole = images(120)
    assert whole.limit(60, 0).labels.bincount().tolist() == [20, 20, 20]
    assert whole.limit(60, 0).files != whole.limit(60, 1).files
    assert whole.limit(120) is whole
    train, test = (whole.take(index) for index in stratified_split(whole.labels, 0.25, seed=3))
    assert test.labels.bincount().tolist() == [10, 10, 10]
    assert set(train.files) | set(test.files) == set(whole.files)
    assert test.files != whole.take(stratified_split(whole.labels, 0.25, seed=4)[1]).files
    with pytest.raises(ValueError, match="test_share must be between 0 and 1, got 1"):
        stratified_split(whole.labels, 1)


def test_limiting_the_test_images_spares_some_that_are_in_neither_part():
    split = image_split(20)
    limited = limit_test(split, 12)
    spare = limited.spare
    assert torch.equal(limited.test.images, split.test.limit(12).images) and limited.train is split.train
    seen = {image.numpy().tobytes() for image in limited.test.images}
    assert len(spare) == 20 and spare.labels.bincount().tolist() == [10, 10]
    assert not seen & {image.numpy().tobytes() for image in spare.images}
    assert limit_test(split, None) is split and limit_test(split, 40) is split and split.spare is None
