"""The noise container: what is saved comes back, and every check of load rejects its broken twin."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from semkit.protections.noise import (
    Noise,
    NoiseError,
    check_fits,
    clipped,
    load,
    save,
)

FINGERPRINT = "ab12" * 16


def make(n=5, radius=8, seed=0, **record):
    levels = np.random.default_rng(seed).integers(-radius, radius + 1, (n, 3, 4, 6), dtype=np.int8)
    levels[0, 0, 0, :2] = -radius, radius
    return Noise(torch.from_numpy(levels), radius, **record)


def image_set(noise, fingerprint=FINGERPRINT):
    return SimpleNamespace(images=torch.zeros(noise.levels.shape, dtype=torch.uint8), fingerprint=fingerprint)


@pytest.fixture
def whole():
    recipe = {"method": "sem", "steps": 3, "sides": ("PGD", 4.0), "nested": {"ü": None}}
    return make(recipe=recipe, fingerprint=FINGERPRINT, classes=("cat", "дог"), version="0.0.9")


def test_saved_and_loaded_is_the_same(whole, tmp_path):
    save(whole, tmp_path / "noise.safetensors")
    back = load(tmp_path / "noise.safetensors", images=image_set(whole))
    assert torch.equal(back.levels, whole.levels)
    for name in ("radius", "recipe", "fingerprint", "classes", "version", "class_wise"):
        assert getattr(back, name) == getattr(whole, name), name
    assert back.recipe["sides"] == ["PGD", 4.0]


def test_the_file_is_plain_safetensors(whole, tmp_path):
    path = tmp_path / "noise.safetensors"
    save(whole, path)
    held = load_file(path)
    assert list(held) == ["noise"] and torch.equal(held["noise"], whole.levels)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["noise"]["dtype"] == "I8"
    assert json.loads(header["__metadata__"]["semkit"])["classes"] == ["cat", "дог"]


def test_same_noise_same_bytes_and_no_other_file(whole, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save(whole, tmp_path / name)
    save(replace(whole, levels=whole.levels.contiguous(memory_format=torch.channels_last)), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux lists what a process has mapped")
def test_whoever_may_read_other_new_files_may_read_the_noise(whole, tmp_path):
    save(whole, tmp_path / "noise.safetensors")
    (tmp_path / "other").touch()
    assert os.stat(tmp_path / "noise.safetensors").st_mode == os.stat(tmp_path / "other").st_mode


def test_loaded_levels_are_mapped_from_the_file(whole, tmp_path):
    path = tmp_path / "noise.safetensors"
    save(whole, path)
    back = load(path)
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    back.levels.zero_()  # a private mapping: the file stays as it is
    assert torch.equal(load(path).levels, whole.levels)


def written(path, levels, record):
    metadata = None if record is None else {"semkit": record if isinstance(record, str) else json.dumps(record)}
    save_file({"noise": levels}, path, metadata=metadata)
    return path


RECORD = {"radius": 8, "recipe": {}, "fingerprint": None, "classes": [], "version": "0.1.0", "class_wise": False}
LEVELS = make().levels
BEYOND = LEVELS.clone()
BEYOND[1, 2, 3, 4] = -9


def without(name):
    return {key: value for key, value in RECORD.items() if key != name}


@pytest.mark.parametrize(
    ("levels", "record", "says"),
    [
        (LEVELS.to(torch.int16), RECORD, "int8"),
        (LEVELS.float() / 255, RECORD, "int8"),
        (LEVELS[0], RECORD, "N x C x H x W"),
        (LEVELS.permute(0, 2, 3, 1).contiguous(), RECORD, "N x C x H x W"),
        (LEVELS[:0], RECORD, "N x C x H x W"),
        (BEYOND, RECORD, "9 levels, its radius is 8"),
        (LEVELS, {**RECORD, "radius": 7.99}, "8 levels, its radius is 7.99"),
        (LEVELS, {**RECORD, "radius": 8 / 255}, "write pixel levels"),
        (LEVELS, {**RECORD, "radius": float("nan")}, "finite"),
        (LEVELS, {**RECORD, "radius": 10**400}, "finite"),
        (LEVELS, {**RECORD, "radius": [8]}, "number of pixel levels"),
        (LEVELS, {**RECORD, "recipe": [1]}, r"not noise: recipe is \[1\]"),
        (LEVELS, {**RECORD, "classes": "ab"}, "classes is 'ab'"),
        (LEVELS, {**RECORD, "classes": 3}, "classes is 3"),
        (LEVELS, {**RECORD, "fingerprint": 3}, "fingerprint is 3"),
        (LEVELS, {**RECORD, "version": None}, "version is None"),
        (LEVELS, {**RECORD, "class_wise": True, "classes": ["a", "b"]}, "5 rows for 2 classes"),
        (LEVELS, None, "no semkit metadata"),
        (LEVELS, "{", "metadata is damaged"),
        (LEVELS, "[]", "metadata is damaged"),
        (LEVELS, "[" * 100_000, "metadata is damaged"),
        *[(LEVELS, without(name), f"KeyError '{name}'") for name in RECORD],
    ],
)
def test_load_refuses(tmp_path, levels, record, says):
    path = written(tmp_path / "noise.safetensors", levels, record)
    with pytest.raises(NoiseError, match=says) as caught:
        load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_load_accepts_what_the_refused_files_are_twins_of(tmp_path):
    assert torch.equal(load(written(tmp_path / "noise.safetensors", LEVELS, RECORD)).levels, LEVELS)


@pytest.mark.parametrize("kept", [0, 7, 8, 60, -1])
def test_load_refuses_truncated_files(whole, tmp_path, kept):
    path = tmp_path / "noise.safetensors"
    save(whole, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(NoiseError, match="not a readable safetensors file"):
        load(path)


def test_load_refuses_what_is_no_noise_file(tmp_path):
    with pytest.raises(NoiseError, match="not a readable"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(NoiseError, match="not a readable"):
        load(tmp_path)
    save_file({"delta": LEVELS}, tmp_path / "other.safetensors", metadata={"semkit": json.dumps(RECORD)})
    with pytest.raises(NoiseError, match="no tensor named noise"):
        load(tmp_path / "other.safetensors")


def test_load_refuses_noise_of_other_images(whole, tmp_path):
    path = tmp_path / "noise.safetensors"
    save(whole, path)
    with pytest.raises(NoiseError, match=r"other images \(fingerprint ab12ab12.. against cd34cd34..\): craft again"):
        load(path, images=image_set(whole, "cd34" * 16))
    with pytest.raises(NoiseError, match=r"shape \(5, 3, 4, 6\), the images \(4, 3, 4, 6\)"):
        load(path, images=image_set(make(4)))


def test_noise_without_fingerprint_fits_by_shape():
    check_fits(make(), image_set(make()))
    with pytest.raises(NoiseError, match="shape"):
        check_fits(make(), image_set(make(6)))


def test_class_wise_noise_fits_by_image_shape():
    check_fits(make(2, class_wise=True, fingerprint=FINGERPRINT), image_set(make(7)))
    with pytest.raises(NoiseError, match="shape"):
        check_fits(make(2, class_wise=True), SimpleNamespace(images=torch.zeros(7, 3, 8, 8), fingerprint=None))


def test_the_lowest_int8_has_an_absolute_value():
    levels = torch.full((1, 1, 1, 1), -128, dtype=torch.int8)  # levels.abs() would be -128, within any radius
    assert Noise(levels, 128).radius == 128
    with pytest.raises(NoiseError, match="128 levels, its radius is 127"):
        Noise(levels, 127)


@pytest.mark.parametrize("recipe", [{"x": torch.zeros(1)}, {"x": float("inf")}, {("a", 1): 2}, {"x": {1}}])
def test_recipes_are_json(recipe):
    with pytest.raises(NoiseError, match="JSON"):
        make(recipe=recipe)


def test_save_leaves_the_old_file_when_it_fails(whole, tmp_path):
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OSError):
        save(whole, tmp_path / "taken.safetensors")
    assert os.listdir(tmp_path) == ["taken.safetensors"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.integers(0, 127))
def test_what_the_box_leaves_of_noise_is_what_numpy_says(seed, radius):
    noise = make(3, radius, seed)
    images = np.random.default_rng(seed + 1).integers(0, 256, noise.levels.shape, dtype=np.uint8)
    left = np.clip(images.astype(int) + noise.levels.numpy(), 0, 255) - images
    told = clipped(noise, torch.from_numpy(images))
    assert told["clipped_fraction"] == pytest.approx((left != noise.levels.numpy()).mean(), abs=6e-5)
    assert told["mean_effective_noise"] == pytest.approx(np.abs(left).mean(), abs=6e-4)
