"""Folders filtered class by class: what is written, that the key is nowhere in it, and what `check` finds."""

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import kinds
from photos import contents, make_photos
from PIL import Image

from semkit.__main__ import main
from semkit.analysis.report import read_rows
from semkit.app.checking import OutputError, check, likeness, load_originals, protected_split
from semkit.app.folder import protect
from semkit.images.imageset import ImageSet
from semkit.images.loading import load
from semkit.images.picture import read_image
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.cuda import ClassFilters, class_filters, convolve_set
from semkit.protections.methods import craft_recipe

KEY = "s3cret xylo7 phr4ze"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("SEMKIT_KEY", raising=False)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """(photos, OUT) of 20 RGB images of the working size, filtered."""
    folder = tmp_path_factory.mktemp("filtered")
    photos = make_photos(folder / "photos", 20)
    protect(str(photos), folder / "out", ClassFilters(key=KEY), size=8)
    return photos, folder / "out"


def run(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def test_files_are_what_filtering_the_set_gives_whatever_the_batch(pristine):
    photos, out = pristine
    found = load_originals(str(photos), size=8)
    wanted = convolve_set(found.images, class_filters(KEY, 2)).images
    for image, name in zip(wanted, found.outputs, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / "images" / name)), image.permute(1, 2, 0).numpy())


def test_every_kind_of_file_keeps_its_name_size_mode_and_alpha(tmp_path):
    rng = np.random.default_rng(0)
    for size in ((33, 31), (7, 20)):
        for i, (name, content) in enumerate(kinds(rng, *size).items()):
            path = tmp_path / "in" / "ab"[i % 2] / f"{size[0]} {name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    report = protect(str(tmp_path / "in"), tmp_path / "out", ClassFilters(5, 0.5, key=KEY))
    found, modes = load_originals(str(tmp_path / "in")), Counter()
    for i, output in enumerate(found.outputs):
        before = found.read(i)
        with Image.open(tmp_path / "out/images" / output) as after:
            assert (after.format, after.mode, after.size) == ("PNG", before.mode, before.size)
            if before.mode.endswith("A"):
                assert (np.asarray(after)[..., -1] == np.asarray(before)[..., -1]).all()
        assert sorted(found.size(i)) == sorted(before.size)
        modes[before.mode] += 1
    assert set(modes) == {"L", "LA", "RGB", "RGBA"} and report["images"] == len(found.outputs)
    assert not check(str(tmp_path / "in"), tmp_path / "out", key=KEY)["problems"]


def test_the_report_says_that_no_radius_bounds_it_and_how_far_it_went(pristine):
    photos, out = pristine
    report = json.loads((out / "report.json").read_text())
    assert (report["method"], report["radius"], report["images"], report["protected"]) == ("cuda", None, 20, 20)
    assert report["recipe"] == {"kernel": 3, "strength": 0.3, "assignment": "own"} and report["fraction"] == 1
    assert "no radius bounds" in report["bound"] and not (out / "noise.safetensors").exists()
    names = [path.relative_to(photos) for path in photos.rglob("*.png")]
    pairs = [[np.asarray(Image.open(f / name)).astype(int) for f in (photos, out / "images")] for name in names]
    assert report["largest_change"] == max(np.abs(before - after).max() for before, after in pairs) > 60
    psnr = 10 * np.log10(255**2 / np.mean([(before - after) ** 2 for before, after in pairs]))
    assert report["psnr_db"] == round(psnr, 2)


def everything(folder):
    """All that is below the folder, names and contents, as one text of bytes."""
    return b"\n".join(name.encode() + content for name, content in contents(folder).items())


def test_the_key_is_in_nothing_that_is_written_said_or_raised(tmp_path, capsys, monkeypatch):
    photos = make_photos(tmp_path / "in", 8)
    monkeypatch.setenv("SEMKIT_KEY", KEY)
    protecting = ["protect", photos, tmp_path / "out", "--method", "cuda", "--size", "8", "--json"]
    assert run(*protecting) == 0 and run(*protecting) == 2  # the second time the folder is there
    assert run("check", photos, tmp_path / "out", "--json") == 0
    sweep = ["sweep", photos, "--out", tmp_path / "rows", "--methods", "cuda", "--radii", "0", "--seeds", "1"]
    assert run(*sweep, "--preset", "quick", "--size", "8") == 0
    said = capsys.readouterr()
    pieces = [KEY, *KEY.split()]
    assert not any(piece in said.out + said.err for piece in pieces)
    assert not any(piece.encode() in everything(tmp_path) for piece in pieces)
    for wrong in (
        ["--kernel", "20"],
        ["--strength", "7"],
        ["--fraction", "2"],
        ["--frob=" + KEY],
        [KEY, "--frob", KEY],
    ):
        assert run("protect", photos, tmp_path / "new", "--method", "cuda", "--key", KEY, *wrong) == 2
        said = capsys.readouterr()
        assert said.err.startswith("semkit: ") and said.err.count("\n") == 1 and KEY not in said.err + said.out
        assert not any(piece in said.err for piece in pieces), said.err


def test_the_key_typed_and_the_key_of_the_environment_are_one(pristine, tmp_path, monkeypatch):
    photos, out = pristine
    assert run("protect", photos, tmp_path / "typed", "--method", "cuda", "--size", "8", "--key", KEY) == 0
    monkeypatch.setenv("SEMKIT_KEY", "another key altogether")
    assert run("protect", photos, tmp_path / "both", "--method", "cuda", "--size", "8", "--key", KEY) == 0
    assert run("protect", photos, tmp_path / "other", "--method", "cuda", "--size", "8") == 0
    images = [
        contents(folder / "images") for folder in (out, tmp_path / "typed", tmp_path / "both", tmp_path / "other")
    ]
    assert images[0] == images[1] == images[2] and all(images[3][name] != images[0][name] for name in images[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "cuda"], "needs a private key: put it into the environment variable SEMKIT_KEY"),
        (["--method", "cuda", "--key", ""], "the key must have 8 characters at least"),
        (["--method", "cuda", "--key", "seven77"], "the key must have 8 characters at least"),
        (["--method", "cuda", "--key", KEY, "--kernel", "9"], "png: a kernel of 9 x 9 is larger than the image, 8 x 8"),
        (["--method", "cuda", "--key", KEY, "--kernel", "1"], "a whole number >= 2, got 1"),
        (["--method", "cuda", "--key", KEY, "--strength", "0"], "strength must be above 0 and at most 1, got 0"),
        (["--method", "cuda", "--key", KEY, "--strength", "1.5"], "strength must be above 0 and at most 1, got 1.5"),
        (["--method", "cuda", "--key", KEY, "--strength", "nan"], "strength must be above 0 and at most 1, got nan"),
        (["--method", "cuda", "--key", KEY, "--fraction", "0"], "fraction must be above 0 and at most 1, got 0"),
        (["--method", "cuda", "--key", KEY, "--radius", "8"], "--radius: not for --method cuda (no radius bounds a"),
        (["--method", "cuda", "--key", KEY, "--class-wise"], "--class-wise: not for --method cuda"),
        (["--key", KEY], "--key: not for --method sem"),
        (["--method", "em", "--kernel", "5", "--strength", "0.4"], "--kernel, --strength: not for --method em"),
    ],
)
def test_what_makes_no_sense_is_one_line_without_the_key_and_nothing_is_written(tmp_path, capsys, options, words):
    photos = make_photos(tmp_path / "photos", 8)
    assert run("protect", photos, tmp_path / "out", "--size", "8", *options) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err and KEY not in said.err
    assert not (tmp_path / "out").exists()


def test_help_tells_where_a_typed_key_stays(capsys):
    assert run("protect", "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "stays in the shell's history" in told and "environment variable SEMKIT_KEY" in told


def test_a_fraction_of_every_class_is_filtered_the_rest_is_as_it_was_and_check_knows_which(tmp_path):
    photos = make_photos(tmp_path / "in", 24)
    report = protect(str(photos), tmp_path / "out", ClassFilters(key=KEY), size=8, seed=2, fraction=0.5)
    changed = {}
    for path in sorted(photos.rglob("*.png")):
        name = path.relative_to(photos).as_posix()
        protected = np.asarray(Image.open(tmp_path / "out/images" / name))
        changed[name] = bool((protected != np.asarray(Image.open(path))).any())
    assert Counter(name[0] for name, is_changed in changed.items() if is_changed) == {"a": 6, "b": 6}
    assert (report["protected"], report["fraction"]) == (12, 0.5)
    assert not check(str(photos), tmp_path / "out", key=KEY)["problems"]
    report["recipe"]["fraction"] = report.pop("fraction")  # as 0.5 wrote it
    (tmp_path / "out/report.json").write_text(json.dumps(report))
    assert not check(str(photos), tmp_path / "out", key=KEY)["problems"]
    untouched = next(name for name, is_changed in changed.items() if not is_changed)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "out/images" / untouched)
    for key in (KEY, None):
        (problem,) = check(str(photos), tmp_path / "out", key=key)["problems"]
        assert untouched in problem and "was to be left as it was" in problem


def one_level(path):
    image = np.array(Image.open(path))
    image[0, 0, 0] += 1 if image[0, 0, 0] < 128 else -1
    Image.fromarray(image).save(path)


@pytest.mark.parametrize(
    ("tamper", "problem", "without_key"),
    [
        (one_level, "a/00.png: differs by 1 levels from its original filtered with this key", False),
        (lambda path: path.unlink(), "a/00.png: missing", True),
        (lambda path: shutil.copy(path, path.with_name("stray.jpg")), "a/stray.jpg: no original of it", True),
        (lambda path: Image.open(path).resize((9, 8)).save(path), "a/00.png: the original has 8x8 pixels", True),
        (lambda path: Image.open(path).convert("L").save(path), "a/00.png: the original has mode RGB", True),
    ],
    ids=["value", "missing", "stray", "size", "mode"],
)
def test_check_names_what_was_tampered_with(small, tamper, problem, without_key):
    photos, out = small
    tamper(out / "images/a/00.png")
    assert [problem in found for found in check(str(photos), out, key=KEY)["problems"]] == [True]
    assert len(check(str(photos), out)["problems"]) == without_key


def test_check_says_what_it_held_the_files_against(pristine, capsys, monkeypatch):
    photos, out = pristine
    assert run("check", photos, out) == 0
    assert (
        capsys.readouterr().out == "20 files checked without the key: size, mode and name, not the values: 0 problems\n"
    )
    monkeypatch.setenv("SEMKIT_KEY", KEY)
    assert run("check", photos, out) == 0
    assert capsys.readouterr().out == "20 files checked against the filters of the key: 0 problems\n"
    assert run("check", photos, out, "--key", "not the key of it") == 1
    assert "20 problems" in capsys.readouterr().out
    assert run("check", photos, out, "--radius", "8") == 2
    assert "no radius bounds a convolution: leave the radius out" in capsys.readouterr().err


def test_a_key_means_nothing_for_noise_and_the_environments_is_not_looked_at(tmp_path, capsys, monkeypatch):
    photos = make_photos(tmp_path / "in", 8)
    recipe = craft_recipe("em", "quick", size=8)
    protect(str(photos), tmp_path / "out", replace(recipe, sgd=replace(recipe.sgd, steps=2)), size=8)
    assert run("check", photos, tmp_path / "out", "--key", KEY) == 2
    assert "was not filtered: leave the key out" in capsys.readouterr().err
    monkeypatch.setenv("SEMKIT_KEY", KEY)
    assert run("check", photos, tmp_path / "out") == 0


@pytest.mark.parametrize("what", ["reading images", "writing images"])
def test_stopped_it_goes_on_to_the_same_bytes(pristine, tmp_path, what):
    photos, whole = pristine
    stop = lambda job, step, *_: (job, step) == (what, 3)  # noqa: E731
    with pytest.raises(Interrupted):
        protect(str(photos), tmp_path / "out", ClassFilters(key=KEY), size=8, lab=Lab(on_step=stop))
    assert not (tmp_path / "out/report.json").exists()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/.semkit-0.tmp").write_bytes(b"what a kill would have left")
    protect(str(photos), tmp_path / "out", ClassFilters(key=KEY), size=8, resume=True)
    ours, theirs = contents(tmp_path / "out"), contents(whole)
    assert ours.pop("report.json") and theirs.pop("report.json") and ours == theirs


def test_a_run_goes_on_with_its_own_key_and_settings_only(small, tmp_path):
    photos, out = small
    how = dict(size=8, resume=True)
    before = contents(out)
    report = protect(str(photos), out, ClassFilters(key=KEY), **how)  # finished: left alone
    assert contents(out) == before and report == json.loads(before["report.json"])
    for finished in (True, False):
        if not finished:
            (out / "report.json").unlink()
        with pytest.raises(OutputError, match="was begun with another key; name another folder") as error:
            protect(str(photos), out, ClassFilters(key="not the key of it"), **how)
        assert "not the key" not in str(error.value)
        with pytest.raises(OutputError, match=r"was begun with other settings \(recipe\)"):
            protect(str(photos), out, ClassFilters(strength=0.4, key=KEY), **how)


def test_learners_get_the_filtered_training_images_and_other_images_are_refused(pristine, tmp_path, capsys):
    photos, out = pristine
    split = load(str(photos), size=8)
    protected = protected_split(split, str(photos), out)
    assert protected.test is split.test
    for image, name in zip(protected.train.images, split.train.files, strict=True):
        assert (image.numpy().transpose(1, 2, 0) == np.asarray(Image.open(out / "images" / name))).all()
    others = make_photos(tmp_path / "others", 20, seed=5)
    with pytest.raises(OutputError, match="protects other images: the correlation with the originals is"):
        protected_split(load(str(others), size=8), str(others), out)
    assert run("learn", photos, "--protected", out, "--preset", "quick", "--size", "8") == 0
    assert "clean test accuracy last" in capsys.readouterr().out


def test_likeness_is_one_for_the_same_images_high_for_filtered_ones_and_low_for_others():
    images = load("shapes", limit=40).train
    filtered = convolve_set(images, class_filters(KEY, 10, strength=1.0)).images
    assert likeness(images.images, images.images) == pytest.approx(1)
    assert likeness(filtered, images.images) > 0.8 > 0.3 > likeness(images.images.roll(7, 0), images.images)
    assert likeness(images.images // 2, images.images) > 0.99


def test_a_report_that_does_not_say_how_is_damaged(small):
    photos, out = small
    report = json.loads((out / "report.json").read_text())
    recipes = ({"kernel": 3, "sigma": 1}, {"kernel": 10**30}, {"strength": 10**400}, {"strength": "x"}, None)
    for wrong in (*({"recipe": value} for value in recipes), *({"seed": value} for value in ("x", 1.5, 10**30, -1))):
        (out / "report.json").write_text(json.dumps({**report, **wrong}))
        with pytest.raises(OutputError, match=r"report.json is damaged.*; protect the images again"):
            check(str(photos), out, key=KEY)


def test_a_named_set_is_filtered_at_its_own_size(tmp_path):
    protect("shapes", tmp_path / "out", ClassFilters(key=KEY), size=16, limit=20)
    files = sorted((tmp_path / "out/images").rglob("*.png"))
    assert len(files) == 20 and {read_image(path).size for path in files} == {(32, 32)}
    assert not check("shapes", tmp_path / "out", key=KEY)["problems"]


def test_the_measured_seconds_are_below_the_bar():
    rows = read_rows(Path(__file__).parents[1] / "results/cuda/seconds.csv")
    in_memory = rows[rows["what"] == "in memory"]
    assert len(in_memory) == 3 and (in_memory["images"] == 50_000).all() and (in_memory["seconds"] <= 30).all()
    images = ImageSet(torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), torch.arange(2000) % 2, ("a", "b"))
    began = time.monotonic()
    convolve_set(images, class_filters(KEY, 2))
    assert time.monotonic() - began < 30 * 2000 / 50_000 * 20  # a busy machine may take 20 times as long
