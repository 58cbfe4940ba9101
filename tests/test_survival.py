"""What is left of a noise after countermeasures: closed forms, Pillow, and what semkit inspect tells of a folder."""

import io
import json
import shutil
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import collisions
from photos import by_pillow, contents, each_image, image_set, make_photos
from PIL import Image

from semkit.__main__ import main
from semkit.analysis.report import as_objects
from semkit.analysis.survival import (
    SEEN,
    along,
    in_words,
    noise_left,
    noise_numbers,
    predicted_survival,
    separability,
    spectrum_shares,
    survival_figure,
    survival_rows,
)
from semkit.countermeasures.registry import COUNTERMEASURES
from semkit.images.imageset import ImageSet
from semkit.images.picture import ssim
from semkit.lessons import undoing
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.base import Crafted, NoiseRecipe

SET = image_set(24, 16, classes=3)
CLEAN = ImageSet(SET.images.clamp(10, 240), SET.labels, SET.classes, "photos")


def random(shape=CLEAN.images.shape, seed=0):
    return torch.randint(-8, 9, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def rows_of(noise, names, clean=CLEAN):
    rows = survival_rows(clean, clean.with_noise(noise), names, engine=Engine("cpu", "float32"))
    assert list(rows["countermeasure"]) == list(names)
    return rows.set_index("countermeasure")


def test_what_changes_nothing_leaves_all_of_the_noise():
    rows = rows_of(random(), ["none", "bitdepth-8", "resize-100", "denoise-0"])
    assert np.allclose(rows, 1, atol=1e-12)


def test_grey_noise_is_left_by_grey_scale_and_a_third_of_random_colours():
    grey = random()[:, :1].expand(-1, 3, -1, -1).contiguous()
    alike = ImageSet(CLEAN.images[:, :1].expand_as(CLEAN.images).contiguous(), CLEAN.labels, CLEAN.classes)
    assert np.allclose(rows_of(grey, ["grayscale"], alike), 1, atol=0.02)
    gain, cosine = rows_of(random(), ["grayscale"]).loc["grayscale"]
    assert gain == pytest.approx(1 / 3, abs=0.03) and cosine == pytest.approx(0.499, abs=0.03)


def test_what_is_left_by_a_mean_is_a_ninth_of_independent_values():
    assert rows_of(random(), ["mean"])["gain"].item() == pytest.approx(1 / 9, abs=0.04)


def test_gain_and_cosine_of_jpeg_are_those_of_pillow_over_all_images():
    noise = random(seed=1)
    protected = CLEAN.with_noise(noise)
    left = [each_image(part.images, lambda image: by_pillow(image, "JPEG", 30)).numpy().astype(float).ravel()
            for part in (protected, CLEAN)]  # fmt: skip
    left, d = left[0] - left[1], noise.numpy().astype(float).ravel()
    gain, cosine = rows_of(noise, ["jpeg-30"]).loc["jpeg-30"]
    assert gain == pytest.approx(left @ d / (d @ d))
    assert cosine == pytest.approx(left @ d / np.linalg.norm(left) / np.linalg.norm(d))


def test_at_every_load_the_noise_is_compared_after_the_same_crop_and_flip():
    rows = rows_of(random(), ["cutout", "coin", "jpegload-95", "jpeg-95"])
    assert rows["gain"]["cutout"] == pytest.approx(rows["cosine"]["cutout"] ** 2)  # a part of it, and nothing else
    assert abs(rows["gain"]["jpegload-95"] - rows["gain"]["jpeg-95"]) < 0.1
    assert 0 < rows["gain"]["coin"] < 0.5


def test_a_projection_is_fitted_to_the_protected_images_and_takes_linear_noise_alone():
    pattern = random((3, 3, 8, 8)).sign() * 8
    clean = image_set(60, 8, classes=3, seed=2)
    flat = ImageSet(torch.full_like(clean.images, 128) + clean.images % 4, clean.labels, clean.classes)
    linear = rows_of(pattern[flat.labels], ["projection"], flat)
    assert linear["gain"].item() < 0.5 < 0.9 < rows_of(random(flat.images.shape), ["projection"], flat)["gain"].item()


def test_without_noise_and_for_what_is_not_in_the_images_one_line_says_so():
    with pytest.raises(ValueError, match="the protected images are their originals"):
        survival_rows(CLEAN, CLEAN, ["jpeg"])
    for name in ("mixup", "dat", "addclean"):
        with pytest.raises(ValueError, match=f"{name} changes the training, not the images"):
            rows_of(random(), [name])
    with pytest.raises(ValueError, match="needs an external net"):
        rows_of(random(), ["purifier"])
    with pytest.raises(ValueError, match="did you mean median"):
        rows_of(random(), ["medain"])


def test_noise_left_is_the_gain_of_any_change():
    noise, middle = random(), CLEAN.images
    assert noise_left(middle, noise, torch.clone) == 1
    assert noise_left(middle, noise, lambda images: torch.full_like(images, 7)) == 0
    assert along(noise, torch.zeros_like(noise)) == (0, 0)
    assert noise_left(middle, noise, lambda images: images // 2) == pytest.approx(0.5, abs=0.02)
    jpeg = COUNTERMEASURES["jpeg"].change
    assert noise_left(middle, noise, jpeg) == pytest.approx(rows_of(noise, ["jpeg"])["gain"].item())
    with pytest.raises(ValueError, match="there is no noise"):
        noise_left(middle, torch.zeros_like(noise), torch.clone)


def test_random_noise_has_a_third_of_its_energy_in_grey_and_a_flat_spectrum():
    big = random((200, 3, 16, 16))
    told = noise_numbers(big_set := image_of(128, big), big_set.with_noise(big), 8)
    assert told["achromatic"] == pytest.approx(1 / 3, abs=0.01)
    assert list(told["spectrum"].values()) == pytest.approx([1 / 64, 5 / 64, 15 / 64, 43 / 64], abs=0.005)
    assert told["rms"] == pytest.approx(np.sqrt(24), abs=0.03) and told["at_bound"] == pytest.approx(2 / 17, abs=0.01)
    assert told["separability"] == pytest.approx(told["chance"], abs=0.12) == pytest.approx(1 / 3, abs=0.12)


def image_of(level, noise):
    """Even images, as many as the noise has, of three classes in turn."""
    images = torch.full(noise.shape, level, dtype=torch.uint8)
    return ImageSet(images, torch.arange(len(noise)) % 3, ("a", "b", "c"))


def test_one_frequency_is_in_its_band_and_a_constant_in_the_first():
    i = np.arange(16)
    for name, u in (("0", 0), ("1-2", 2), ("3-5", 5), ("6+", 7)):
        wave = np.cos(np.pi * u * (2 * i + 1) / 16)
        noise = torch.from_numpy(np.tile(wave, (2, 3, 19, 1)))  # 19 rows: three of them fill no block
        assert spectrum_shares(noise)[name] == pytest.approx(1)
    assert sum(spectrum_shares(random()).values()) == pytest.approx(1)


def test_noise_of_its_class_is_separable_and_one_image_a_class_is_too_few():
    labels = torch.arange(60) % 3
    weak = random((3, 3, 8, 8), seed=3)[labels] + random((60, 3, 8, 8), seed=4)
    assert separability(weak, labels) == 1
    assert separability(weak[:3], labels[:3]) is None
    told = noise_numbers(image_of(128, weak[:3]), image_of(128, weak[:3]).with_noise(weak[:3]), None)
    rows = as_objects(rows_of(random(), ["jpeg"]).reset_index())
    assert told["separability"] is None and told["at_bound"] is None and told["ssim"] is None
    assert "a class has a single image" in in_words(told, survival_rows(CLEAN, CLEAN.with_noise(random()), ["jpeg"]))
    assert set(rows[0]) == {"countermeasure", "gain", "cosine"}


def test_psnr_and_ssim_are_those_of_the_images():
    noise = random()
    told, protected = noise_numbers(CLEAN, CLEAN.with_noise(noise), 8), CLEAN.with_noise(noise)
    assert told["psnr_db"] == pytest.approx(10 * np.log10(255**2 / noise.double().square().mean().item()))
    each = [ssim(*pair) for pair in zip(CLEAN.images, protected.images, strict=True)]
    assert told["ssim"] == pytest.approx(np.mean(each))


@dataclass(frozen=True)
class Grain(NoiseRecipe):
    """Random noise of its seed; made without a net."""

    radius: float = 8
    grey: bool = False

    def craft(self, images, *, seed, lab, checkpoint):
        noise = random(images.images.shape, seed)
        return Crafted(noise[:, :1].expand_as(noise).contiguous() if self.grey else noise)


def test_predicted_survival_has_a_row_for_every_method_seed_and_countermeasure():
    crafts, lab = {"clean": None, "colour": Grain(), "grey": Grain(grey=True)}, Lab(Engine("cpu", "float32"))
    rows = predicted_survival(CLEAN, crafts, ["none", "jpeg", "grayscale"], seeds=(0, 1), lab=lab)
    assert list(rows) == ["method", "seed", "countermeasure", "gain", "cosine"] and len(rows) == 12
    mine = rows.set_index(["method", "seed", "countermeasure"])["gain"]
    assert mine["colour", 1, "jpeg"] == rows_of(random(seed=1), ["jpeg"])["gain"].item() != mine["colour", 0, "jpeg"]
    assert mine["grey", 0, "grayscale"] > 0.9 > 0.4 > mine["colour", 0, "grayscale"] and mine["grey", 1, "none"] == 1


def test_the_figure_names_every_countermeasure_and_hides_nothing():
    protected = CLEAN.with_noise(random())
    rows = survival_rows(CLEAN, protected)
    figure = survival_figure(rows, noise_numbers(CLEAN, protected, 8), title="Random noise")
    left, right = figure.axes
    assert collisions(figure) == ([], []) and len(left.get_yticklabels()) == len(SEEN) == len(rows)
    assert [bar.get_width() for bar in right.patches][-1] == pytest.approx(100 / 3, abs=3)


# --- semkit inspect


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    make_photos(folder / "photos", 12)
    quick = ["--preset", "quick", "--size", "8"]
    assert main(["protect", str(folder / "photos"), str(folder / "out"), *quick]) == 0
    return folder


@pytest.fixture
def here(pristine, tmp_path, monkeypatch):
    """A current folder with `photos` and its protected `out`."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspect(*words):
    try:
        return main(["inspect", "photos", "out", *words])
    except SystemExit as end:
        return end.code


def test_inspect_tells_of_a_folder_what_its_files_say(here, capsys):
    before = contents(here)
    assert inspect("--countermeasures", "none", "grayscale", "--json") == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    pictures = sorted((here / "photos").rglob("*.png"))
    levels = lambda path: np.array(Image.open(path)).astype(float)  # noqa: E731
    noise = np.stack(
        [levels(here / "out/images" / path.relative_to(here / "photos")) - levels(path) for path in pictures]
    )
    assert told["images"] == told["looked_at"] == 12 and told["radius"] == 8
    assert told["rms"] == pytest.approx(np.sqrt((noise**2).mean()))
    assert told["at_bound"] == pytest.approx((abs(noise) == 8).mean())
    assert [row["countermeasure"] for row in told["survival"]] == ["none", "grayscale"]
    assert told["survival"][0]["gain"] == 1 and "| grayscale " in said.err
    assert contents(here) == before  # nothing is written unless it is asked for


def test_inspect_has_a_table_of_all_countermeasures_and_a_figure_that_it_does_not_overwrite(here, capsys):
    assert inspect("--figure", "noise.png") == 0
    said, picture = capsys.readouterr().out, (here / "noise.png").read_bytes()
    assert [name for name in SEEN if f"| {name} " not in said] == [] and "12 of 12 images looked at" in said
    assert Image.open(io.BytesIO(picture)).size[0] > 1000
    assert inspect("--figure", "noise.png") == 2
    assert "noise.png exists already" in capsys.readouterr().err and (here / "noise.png").read_bytes() == picture
    assert inspect("--figure", "noise.doc") == 2  # before the images are looked at
    assert "format of a figure" in capsys.readouterr().err and not (here / "noise.doc").exists()


def test_inspect_says_what_is_missing_or_of_other_images(here, capsys):
    assert inspect("--countermeasures", "mixup") == 2
    assert "mixup changes the training" in capsys.readouterr().err
    first = next((here / "out/images").rglob("*.png"))
    first.unlink()
    assert inspect() == 2 and first.name in capsys.readouterr().err
    shutil.rmtree(here / "out")
    assert inspect() == 2 and "report.json is missing" in capsys.readouterr().err


def learned(**last):
    """Rows of clean images and a noise, two seeds: as they are, after JPEG and a purifier, under AT; last of 1."""
    ways = (("none", 0), ("jpeg", 0), ("purifier=net.safetensors", 0), ("none", 4))
    return [
        {
            "method": method,
            "countermeasure": way,
            "training_radius": radius,
            "seed": seed,
            "last": of[place] + seed / 100,
        }
        for method, of in last.items()
        for place, (way, radius) in enumerate(ways)
        for seed in (0, 1)
    ]


def test_what_a_noise_takes_is_paired_with_clean_images_after_the_same_change():
    rows = learned(clean=(0.6, 0.5, 0.3, 0.4), sem=(0.2, 0.4, 0.3, 0.3), weak=(0.55, 0.5, 0.3, 0.4))
    points = undoing.taken(rows[:-1])  # a seed of weak is missing
    assert points.groupby(["method", "change"])["points"].mean().round(6).to_dict() == {
        ("sem", "none"): 40, ("sem", "jpeg"): 10, ("sem", "purifier"): 0, ("sem", "AT 4/255"): 10,
        ("weak", "none"): 5, ("weak", "jpeg"): 0, ("weak", "purifier"): 0, ("weak", "AT 4/255"): 0,
    }  # fmt: skip
    assert len(points) == 15
    left = undoing.shares_left(points)
    assert left.round(6).to_dict() == {("jpeg", "sem"): 25, ("purifier", "sem"): 0}  # weak takes too little
    figure = undoing.taken_figure(points, ["sem"], ["none", "AT 4/255"], title="Taken")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["none", "AT 4/255"]


def test_the_worst_row_is_the_one_whose_interval_reaches_lowest():
    rows = [
        {"method": "sem", "change": change, "seed": seed, "points": points}
        for change, both in {"none": (30, 31), "jpeg": (10, 10.1), "AT 4/255": (4, 30)}.items()
        for seed, points in enumerate(both)
    ]
    change, points = undoing.worst(pd.DataFrame(rows), "sem", ["none", "jpeg", "AT 4/255"])
    assert change == "AT 4/255" and points.to_dict() == {0: 4, 1: 30}
    assert undoing.worst(pd.DataFrame(rows), "sem", ["none", "jpeg"])[0] == "jpeg"
