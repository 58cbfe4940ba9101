"""The embedded images: what the seed decides, and classes alike in number."""

import torch

from semkit.images.loading import load
from semkit.images.shapes import CLASSES, SIZE, embedded


def test_the_seed_decides_every_image():
    made, again, other = (embedded(40, 20, seed=seed) for seed in (3, 3, 4))
    for part in ("train", "test"):
        assert getattr(made, part).fingerprint == getattr(again, part).fingerprint
        assert (getattr(made, part).images != getattr(other, part).images).flatten(1).any(1).all()


def test_what_one_caller_does_to_its_images_reaches_no_other():
    mine = load("shapes").train
    before = mine.fingerprint
    mine.images[0], mine.labels[0] = 0, 9
    assert mine.fingerprint != before == load("shapes").train.fingerprint


def test_classes_are_alike_in_number_and_no_image_is_there_twice():
    split = embedded()
    for part in (split.train, split.test):
        assert part.images.shape == (1000, 3, SIZE, SIZE) and part.classes == CLASSES
        assert part.labels.bincount().tolist() == 10 * [100]
    both = torch.cat([split.train.images, split.test.images])
    assert len({image.numpy().tobytes() for image in both}) == 2000
