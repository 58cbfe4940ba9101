"""What a trainer does first: against loops, Pillow, scipy and scikit-learn; and never to test images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import by_pillow, each_image, image_set, image_split
from PIL import Image
from scipy import ndimage

from semkit.analysis.cost import passes_of
from semkit.analysis.study import grid, grid_recipes, learned_row
from semkit.countermeasures.augmentations import ColorJitter, Cutout
from semkit.countermeasures.pixelwise import (
    bilateral,
    bitdepth,
    dct_matrix,
    denoiser,
    gaussian,
    jpeg,
    linear_softmax,
    projection,
)
from semkit.countermeasures.registry import (
    COUNTERMEASURES,
    UERASER,
    ByImage,
    check_countermeasure,
    counter,
    label_of,
    place_of,
)
from semkit.countermeasures.trainers import ClassBlur, Gaussian, RandomBlur, Worst
from semkit.images.augment import FlipCrop
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.training.learning import fit, pretrained_weights
from semkit.training.objectives import Mixed, Trades
from semkit.training.perturb import PGD
from semkit.training.recipes import SGD, LearnRecipe

ENGINE = Engine("cpu", "float32")
LEARN = LearnRecipe(model="tiny", sgd=SGD(steps=3, batch=8), evaluations=1)
IMAGES = image_set(12, 16).images
BY_IMAGE = {name: each.change for name, each in COUNTERMEASURES.items() if type(each) is ByImage}
MIXED = ("mixup", "cutmix")
CLEAN = ("dfr", "addclean", "onlyclean")  # train on other images too, or only
NEEDS_A_FILE = "purifier"


def by_pillow_grey(image):
    return np.array(Image.fromarray(image).convert("L").convert("RGB"))


def by_pillow_half(image):
    height, width = image.shape[:2]
    half = Image.fromarray(image).resize((width // 2, height // 2), Image.BICUBIC)
    return np.array(half.resize((width, height), Image.BICUBIC))


def windows(image, pad):
    """[H,W,9,3]: the 3 x 3 pixels around every pixel, padded as numpy names it."""
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), pad)
    height, width = image.shape[:2]
    return np.stack([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], 2)


def weighted(image, weights):
    return np.floor(windows(image, "reflect").transpose(0, 1, 3, 2) @ (np.array(weights) / sum(weights)) + 0.5)


def bilateral_loop(image, reach=4, sigma=75):
    height, width, _ = image.shape
    padded = np.pad(image.astype(float), ((reach, reach), (reach, reach), (0, 0)), "reflect")
    done = np.empty(image.shape)
    offsets = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1) if i * i + j * j <= reach**2]
    for y in range(height):
        for x in range(width):
            there = np.array([padded[y + reach + i, x + reach + j] for i, j in offsets])
            distance = np.array([i * i + j * j for i, j in offsets])
            apart = np.abs(there - image[y, x].astype(float)).sum(1)
            weight = np.exp(-(distance + apart**2) / (2 * sigma**2))
            done[y, x] = (weight[:, None] * there).sum(0) / weight.sum()
    return done


ORACLES = {
    "jpeg": lambda image: by_pillow(image, "JPEG"),
    "webp": lambda image: by_pillow(image, "WEBP"),
    "resize": by_pillow_half,
    "grayscale": by_pillow_grey,
    "grayjpeg": lambda image: by_pillow(by_pillow_grey(image), "JPEG"),
    "bitdepth": lambda image: np.array([0, 85, 170, 255])[np.abs(image[..., None] - np.arange(0, 256, 85)).argmin(-1)],
    "mean": lambda image: weighted(image, [1] * 9),
    "gaussian": lambda image: weighted(image, [1, 2, 1, 2, 4, 2, 1, 2, 1]),
    "median": lambda image: np.median(windows(image, "edge"), 2),
    "bilateral": lambda image: bilateral_loop(image).round(),
}


@pytest.mark.parametrize("name", BY_IMAGE)
def test_a_countermeasure_is_what_a_loop_or_pillow_makes(name):
    images = IMAGES[:2] if name == "bilateral" else IMAGES
    before = images.clone()
    done = BY_IMAGE[name](images)
    apart = (done.double() - each_image(images, ORACLES[name]).double()).abs()
    assert done.dtype == torch.uint8 and done.shape == images.shape and torch.equal(images, before)
    assert apart.max() <= (1 if name == "bilateral" else 0) and (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("name", BY_IMAGE)
def test_a_countermeasure_does_something(name):
    assert (BY_IMAGE[name](IMAGES) != IMAGES).float().mean() > 0.3


def test_a_gaussian_of_sigma_a_tenth_would_do_nothing():
    twin = ndimage.gaussian_filter(IMAGES.numpy().astype(float), (0, 0, 0.1, 0.1)).round().astype(np.uint8)
    assert np.array_equal(twin, IMAGES.numpy()) and not torch.equal(gaussian(IMAGES), IMAGES)


@pytest.mark.parametrize("name", ["mean", "gaussian", "median", "bilateral", "resize"])
def test_an_even_image_stays_as_it_is(name):
    even = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 12, 12) * 51
    assert torch.equal(BY_IMAGE[name](even.contiguous()), even)


def test_the_parameters_have_their_limits():
    assert torch.equal(bitdepth(IMAGES, 8), IMAGES)
    assert torch.equal(bitdepth(IMAGES, 1).unique(), torch.tensor([0, 255], dtype=torch.uint8))
    fine = bilateral(IMAGES[:2], sigma_colour=0.1)
    assert torch.equal(fine, IMAGES[:2])  # nothing else has the same colour
    apart = [(jpeg(IMAGES, quality).float() - IMAGES.float()).abs().mean() for quality in (5, 10, 50, 95)]
    assert apart == sorted(apart, reverse=True)
    with pytest.raises(ValueError, match="bits must be at most 8, got 9"):
        bitdepth(IMAGES, 9)
    with pytest.raises(ValueError, match="quality must be at most 95, got 100"):
        jpeg(IMAGES, 100)


def test_values_are_rounded_not_cut_off():
    """Cut-off values would be darker by half a level on average."""
    for name in ("mean", "gaussian", "bilateral"):
        assert abs((BY_IMAGE[name](IMAGES).float() - IMAGES.float()).mean()) < 0.35, name


def separable(strength=8, seed=0):
    """60 random images with a fixed pattern of +-strength levels for each of 3 classes, and their labels."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(60) % 3
    content = rng.integers(30, 220, (60, 3, 6, 6))
    pattern = rng.choice([-strength, strength], (3, 3, 6, 6))
    return torch.from_numpy((content + pattern[labels]).astype(np.uint8)), labels


def test_the_linear_classifier_spans_what_scikit_learns_spans():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    labels = (x @ rng.normal(size=(5, 3)) + 2 * rng.gumbel(size=(400, 3))).argmax(1)
    theirs = LogisticRegression(fit_intercept=False, C=1e8, tol=1e-10, max_iter=1000).fit(x, labels).coef_
    ours = linear_softmax(torch.from_numpy(x), torch.from_numpy(labels)).numpy()
    assert np.allclose(ours - ours.mean(0), theirs - theirs.mean(0), atol=1e-3)


def test_the_projection_takes_the_classes_patterns_and_leaves_the_rest():
    protected, labels = separable()
    classes = torch.nn.functional.one_hot(labels).double()
    means = classes.T / classes.sum(0)[:, None]  # [3,60]: averages the images of a class

    def between(images):
        of_class = means @ images.double().flatten(1)
        return (of_class - of_class.mean(0)).norm()

    done = projection(protected, labels)(protected)
    assert done.dtype == torch.uint8 and between(done) < 0.3 * between(protected)
    x = protected.double().flatten(1) / 255
    weights = linear_softmax(x.float(), labels).double()
    looked_at = lambda images: (weights @ (images.double().flatten(1) / 255 - x.mean(0)).T).std()  # noqa: E731
    assert looked_at(done) < 0.02 * looked_at(protected)
    inside = torch.linalg.qr(weights.T).Q[:, :2]
    left = lambda images: images - images @ inside @ inside.T  # noqa: E731
    assert (left(done.double().flatten(1)) - left(protected.double().flatten(1))).abs().mean() < 0.6  # rounding


def test_a_projection_fitted_to_other_labels_leaves_the_patterns():
    protected, labels = separable()
    twin = projection(protected, labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))])(protected)
    apart = lambda images: (images[labels == 0].double().mean(0) - images[labels == 1].double().mean(0)).norm()  # noqa: E731
    assert apart(twin) > 2 * apart(projection(protected, labels)(protected))


def test_a_projection_made_twice_changes_nothing_more():
    protected, labels = separable()
    change = projection(protected, labels)
    assert (change(change(protected)).int() - change(protected).int()).abs().max() <= 1  # rounding


def test_the_dct_keeps_energy_and_is_scipys():
    from scipy import fft

    x = np.random.default_rng(0).normal(size=(6, 10))
    z = dct_matrix(6).numpy() @ x @ dct_matrix(10).numpy().T
    assert np.allclose(z, fft.dctn(x, norm="ortho")) and (z**2).sum() == pytest.approx((x**2).sum())


def test_denoising_at_sigma_0_changes_nothing_and_its_gain_is_wieners():
    labels = torch.zeros(12, dtype=torch.int64)
    assert torch.equal(denoiser(IMAGES, labels, 0)(IMAGES), IMAGES)
    rng = np.random.default_rng(0)
    white = torch.from_numpy(rng.normal(128, 20, (4000, 3, 4, 4)).round().clip(0, 255).astype(np.uint8))
    change = denoiser(white, labels, 40)
    shift = change(white + 30).double().mean() - change(white).double().mean()
    assert shift == pytest.approx(30 * 20**2 / (20**2 + 40**2), abs=0.6)
    noisy = change(white.float().mean(0).round().to(torch.uint8).expand_as(white).contiguous())
    assert noisy.double().std(0).mean() == pytest.approx(40 * 0.2, rel=0.05)  # what is left of the noise that it adds


def test_denoising_makes_noisy_images_better():
    x = torch.linspace(40, 200, 16)
    smooth = (x[:, None] + x).div(2).expand(60, 3, 16, 16) + 20 * torch.arange(-1, 2).repeat(20)[:, None, None, None]
    noise = torch.randint(-8, 9, smooth.shape, generator=torch.Generator().manual_seed(0))
    images, apart = (smooth + noise).round().to(torch.uint8), lambda a: (a.double() - smooth).square().mean()
    assert apart(denoiser(images, None, 10)(images)) < 0.6 * apart(images)


def test_several_are_applied_in_the_order_given():
    train = image_set(10, 16)
    both, _ = counter(train, LEARN, ["bitdepth", "jpeg"])
    assert torch.equal(both.images, jpeg(bitdepth(train.images))) and both.name == "photos, bitdepth, jpeg"
    assert not torch.equal(both.images, counter(train, LEARN, ["jpeg", "bitdepth"])[0].images)
    same, recipe = counter(train, LEARN, ["none"])
    assert same.fingerprint == train.fingerprint and same.name == train.name and recipe == LEARN


def test_what_is_by_batch_is_the_learners_augmentation():
    train = image_set(10, 16)
    same, recipe = counter(train, LEARN, ["cutout"])
    assert same is train and recipe == replace(LEARN, augment=Cutout(first=FlipCrop()))
    same, recipe = counter(train, LEARN, ["cutout", "colorjitter"])
    assert same is train and recipe == replace(LEARN, augment=ColorJitter(first=Cutout(first=FlipCrop())))


def test_what_is_by_loss_is_the_learners_objective():
    train = image_set(10, 16, classes=3)
    for name in MIXED:
        same, recipe = counter(train, LEARN, [name])
        assert same is train and recipe == replace(LEARN, objective=Mixed(name, 3))
    for objective, names in ((Trades(), ["mixup"]), (LEARN.objective, ["cutmix", "mixup"])):
        with pytest.raises(ValueError, match="mixup needs a learner on the plain cross-entropy, it is on"):
            counter(train, replace(LEARN, objective=objective), names)


IN_TRAINING = {
    "randomblur": {"perturbation": RandomBlur()}, "smoothing": {"perturbation": Gaussian()},
    "ueraser": {"perturbation": Worst(UERASER, 5, 0.3)}, "ueraser-max": {"perturbation": Worst(UERASER, 5)},
    "dat": {"perturbation": ClassBlur()}, "at-l2": {"perturbation": PGD(127.5, 10, 25.5, "l2")},
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TRAINING)
def test_what_is_done_in_training_is_the_learners_perturbation(name):
    train = image_set(10, 16)
    same, recipe = counter(train, LEARN, [name])
    assert same is train and recipe == replace(LEARN, **IN_TRAINING[name])
    with pytest.raises(ValueError, match=r"needs an ERM learner \(radius 0\), this one has PGD"):
        counter(train, replace(LEARN, perturbation=PGD(4)), [name])


def test_fine_tuning_begins_with_a_net_of_spare_clean_images_and_says_where_they_are_missing():
    train, spare = image_set(10, 16), image_set(20, 16, seed=3)
    for name, last_layer in (("finetune", False), ("lastlayer", True)):
        same, recipe = counter(train, LEARN, [name], spare=spare)
        begun = recipe.pretrained
        assert (begun.images, begun.recipe, begun.last_layer) == (spare, LEARN, last_layer)
        assert same is train and recipe == replace(LEARN, sgd=SGD(steps=3, batch=8, lr=0.01), pretrained=begun)
        with pytest.raises(ValueError, match="needs spare clean images: the test images that --test-limit N leaves"):
            counter(train, LEARN, [name])


def test_dfr_trains_on_protected_images_first_and_its_last_layer_on_a_few_clean_ones():
    train, spare = image_set(40, 16), image_set(40, 16, seed=3)
    seen, recipe = counter(train, LEARN, ["grayscale", "dfr-20"], spare=spare)
    begun = recipe.pretrained
    assert torch.equal(begun.images.images, BY_IMAGE["grayscale"](train.images)) and begun.last_layer
    assert recipe == replace(LEARN, sgd=SGD(steps=3, batch=8, lr=0.01), pretrained=begun) and begun.recipe == LEARN
    assert (
        len(seen) == 8 and torch.equal(seen.images, spare.limit(8).images) and seen.name == "photos, grayscale, dfr-20"
    )
    before = pretrained_weights(begun, 0, Lab(ENGINE))
    after = fit(seen, spare, recipe, lab=Lab(ENGINE)).model.state_dict()
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {"9"}


def test_clean_images_are_added_or_are_alone_and_too_few_are_said():
    train, spare = image_set(40, 16), image_set(40, 16, seed=3)
    both, recipe = counter(train, LEARN, ["addclean-25"], spare=spare)
    assert len(both) == 50 and recipe == LEARN and torch.equal(both.images[:40], train.images)
    alone, _ = counter(train, LEARN, ["onlyclean-25"], spare=spare)
    assert torch.equal(alone.images, both.images[40:]) and torch.equal(alone.labels, both.labels[40:])
    for name in CLEAN:
        with pytest.raises(ValueError, match=f"{name}.* needs spare clean images: the test images that --test-limit N"):
            counter(train, LEARN, [name])
    with pytest.raises(ValueError, match=r"dfr-50 needs 20 spare clean images: .* leaves over, of which there are 4"):
        counter(train, LEARN, ["dfr-50"], spare=image_set(4, 16))


@pytest.mark.parametrize("other", [{"classes": ("b", "a")}, {"images": image_set(20, 8).images}], ids=["names", "size"])
@pytest.mark.parametrize("name", ["addclean", "finetune", "dfr-50"])
def test_clean_images_of_other_classes_or_another_size_are_refused(name, other):
    spare = replace(image_set(20, 16, seed=3), **other)
    with pytest.raises(ValueError, match=f"{name} needs spare clean images of the classes and size of "):
        counter(image_set(20, 16), LEARN, [name], spare=spare)


def test_a_percentage_of_a_tiny_set_that_is_less_than_an_image_of_each_class_says_which_is_enough():
    train, spare = image_set(12, 16, classes=3), image_set(12, 16, classes=3, seed=3)
    for name in CLEAN:
        said = rf"{name}-10 needs a clean image of each of the 3 classes, but 10 % of 12 .* 1: write N >= 25 in NAME-N"
        with pytest.raises(ValueError, match=said):
            counter(train, LEARN, [f"{name}-10"], spare=spare)
        counter(train, LEARN, [f"{name}-25"], spare=spare)
    with pytest.raises(ValueError, match="dfr needs a clean image of each of the 3 classes"):
        counter(train, LEARN, ["onlyclean-50", "dfr"], spare=spare)


@pytest.mark.whole
@pytest.mark.parametrize("cached", [False, True])
def test_two_learners_of_a_seed_share_one_pretraining_where_a_cache_keeps_it_and_every_step_is_told(tmp_path, cached):
    split, told, rows = image_split(20), [], []
    watched = Lab(ENGINE, tmp_path if cached else None, lambda what, step, total, _: told.append((what, step, total)))
    spare = image_set(20, seed=3)
    for name in ("finetune", "lastlayer"):
        if cached:
            spare = image_set(20, seed=3)  # as in another process
        how = dict(countermeasures=[name], spare=spare, seed=1)
        rows.append(learned_row(split.train, split.test, LEARN, lab=watched, **how))
        alone = learned_row(split.train, split.test, LEARN, lab=Lab(ENGINE), **{**how, "spare": image_set(20, seed=3)})
        assert rows[-1]["pretrained_seed"] == 1 and rows[-1]["curve"] == alone["curve"]
    once = [("pretraining, seed 1", n, 3) for n in (1, 2, 3)]
    assert [step for step in told if "pretraining" in step[0]] == (once if cached else 2 * once)


@pytest.mark.whole
def test_labels_are_kept_and_a_changed_set_or_learner_is_another_run(tmp_path):
    split, made = replace(image_split(20), spare=image_set(20, seed=3)), set()
    names = [name for name in COUNTERMEASURES if name != NEEDS_A_FILE]
    for name in names:
        train, recipe = counter(split.train, LEARN, [name], spare=split.spare)
        learned_row(train, split.test, recipe, lab=Lab(ENGINE, tmp_path))
        if name not in CLEAN:
            assert torch.equal(train.labels, split.train.labels) and train.files == split.train.files
        made.add((train.fingerprint, repr(recipe)))
    assert len(made) == len(names)
    assert len(list(tmp_path.glob("learner-*"))) == len(names)


def test_a_number_after_the_name_is_the_quality_or_the_bits():
    train = image_set(10, 16)
    assert torch.equal(counter(train, LEARN, ["jpeg-30"])[0].images, jpeg(train.images, 30))
    assert torch.equal(counter(train, LEARN, ["jpeg-10"])[0].images, counter(train, LEARN, ["jpeg"])[0].images)
    for nothing in ("bitdepth-8", "resize-100", "denoise-0"):
        assert torch.equal(counter(train, LEARN, [nothing])[0].images, train.images)
    grey = counter(train, LEARN, ["grayscale", "jpeg-30"])[0].images
    assert torch.equal(counter(train, LEARN, ["grayjpeg-30"])[0].images, grey)
    fine = each_image(train.images, lambda image: by_pillow(image, "WEBP", 90))
    assert torch.equal(counter(train, LEARN, ["webp-90"])[0].images, fine)
    refused = {"jpeg-96": "jpeg-N takes N from 1 to 95, got 96", "jpeg-x": "did you mean jpeg", "-5": "known are"}
    for text, reason in {**refused, "mean-3": "did you mean mean", "jpeg=3": "did you mean jpeg"}.items():
        with pytest.raises(ValueError, match=reason):
            check_countermeasure(text)


def test_figures_have_a_label_and_a_place_for_every_name_and_unknown_ones_come_last():
    names = list(COUNTERMEASURES)
    assert len({label_of(name) for name in names}) == len(names) and [place_of(name) for name in names] == [
        *range(len(names))
    ]
    assert label_of("jpeg-30") == "JPEG 30" and place_of("jpeg-30") == place_of("jpeg")
    assert label_of("purifier=gone.safetensors") == "purifier" and place_of("purifier=gone") == place_of("purifier")
    assert label_of("of another version") == "of another version" and place_of("of another version") == len(names)


def test_a_grid_has_every_countermeasure_or_refuses_before_anything_is_made(tmp_path):
    split, never = image_split(20), Lab(ENGINE, tmp_path, lambda *_: pytest.fail("a run has begun"))
    for learners, name, reason in (({4: replace(LEARN, perturbation=PGD(4))}, "dat", "dat needs an ERM learner"),
                                   ({0: LEARN}, "finetune", "needs spare clean images"),
                                   ({0: LEARN}, "purifier", "needs an external net")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            grid(split, {"clean": None}, learners, countermeasures=["none", name], lab=never)
    names, spared = ["none", "jpeg-30", "dat", "lastlayer"], replace(split, spare=image_set(20, seed=3))
    rows = grid(spared, {"clean": None}, {0: LEARN}, countermeasures=names, lab=Lab(ENGINE))
    assert list(rows["countermeasure"]) == names
    assert list(rows["passes"]) == [24, 24, 24 * 11, 24]
    cost = passes_of(grid_recipes(spared, {"clean": None}, {0: LEARN}, names), 20).total
    assert cost == rows["passes"].sum() + 24  # and the pretraining


def test_what_is_done_to_the_training_images_is_not_done_to_the_test_images():
    split, how = image_split(60), {"lab": Lab(ENGINE), "seed": 1}
    recipe = replace(LEARN, sgd=SGD(steps=20, batch=16))
    row = learned_row(split.train, split.test, recipe, countermeasures=("grayscale",), **how)
    train, test = (counter(part, LEARN, ["grayscale"])[0] for part in (split.train, split.test))
    done, grey = (fit(train, tested, recipe, **how) for tested in (split.test, test))
    assert row["curve"] == [list(point) for point in done.curve] != [list(point) for point in grey.curve]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown countermeasure 'greyscale'; did you mean grayscale\?"):
        counter(image_set(4), LEARN, ["greyscale"])


def test_one_name_alone_is_not_taken_for_a_list_of_letters():
    split = image_split(4)
    for call in (
        lambda: counter(split.train, LEARN, "jpeg"),
        lambda: learned_row(split.train, split.test, LEARN, countermeasures="jpeg"),
        lambda: grid(split, {"clean": None}, {0: LEARN}, countermeasures="jpeg"),
    ):
        with pytest.raises(ValueError, match=r"must be a list of names: write \['jpeg'\]"):
            call()


@pytest.mark.parametrize("name", ["projection", "denoise"])
def test_what_is_fitted_to_the_images_says_so_where_there_are_none(name):
    with pytest.raises(ValueError, match="is fitted to an image or more, got none"):
        counter(image_set(4).take([]), LEARN, [name])
