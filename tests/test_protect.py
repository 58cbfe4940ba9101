"""Protected folders: what is written, what `check` finds, and the numbers of the report."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import CLASSES, make_corrupt
from photos import contents, make_photos
from PIL import Image
from safetensors.numpy import load_file

from semkit.__main__ import main
from semkit.app.checking import OutputError, check, load_originals, protected_split
from semkit.app.folder import protect
from semkit.images.files import is_image_name
from semkit.images.loading import DataError, load
from semkit.images.picture import read_image
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.methods import RandomGrey, craft_recipe
from semkit.protections.noise import NoiseError
from semkit.protections.noise import load as load_noise
from semkit.training.recipes import SGD

QUICK = ["--preset", "quick", "--precision", "float32"]


def noises(out):
    return load_file(out / "noise.safetensors")["noise"]


def quick(**how):
    """A recipe of 4 steps: what is written hangs on the noise, not on how well it protects."""
    return replace(craft_recipe("sem", "quick", size=8, **how), sgd=SGD(steps=4, batch=32))


@pytest.fixture(scope="module")
def hostile(hostile_folder, tmp_path_factory):
    """(the folder, its image names, OUT): the hostile folder, protected by the command."""
    folder, names = hostile_folder
    out = tmp_path_factory.mktemp("protected") / "out"
    assert main(["protect", str(folder), str(out), *QUICK]) == 0
    return folder, names, out


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """(photos, OUT) of a small run: 20 RGB images of the working size."""
    folder = tmp_path_factory.mktemp("small")
    photos = make_photos(folder / "photos", 20)
    protect(str(photos), folder / "out", quick(), size=8)
    return photos, folder / "out"


@pytest.mark.whole
def test_every_hostile_file_has_a_protected_one_of_its_name_size_mode_and_alpha_within_the_radius(hostile):
    folder, names, out = hostile
    assert len(names) >= 200
    found = load_originals(str(folder))
    assert sorted(found.images.files) == names
    assert {p.relative_to(out / "images").as_posix() for p in (out / "images").rglob("*.png")} == set(found.outputs)
    modes = Counter()
    for name, output in zip(found.images.files, found.outputs, strict=True):
        assert Path(output).parent == Path(name).parent and Path(output).name.startswith(Path(name).stem)
        before, after = read_image(folder / name), Image.open(out / "images" / output)
        assert (after.format, after.mode, after.size) == ("PNG", before.mode, before.size)
        apart = np.abs(np.asarray(after).astype(int) - np.asarray(before))
        assert apart.max() <= 8
        assert before.mode in ("L", "RGB") or not apart[..., -1].any()
        modes[before.mode] += 1
    assert set(modes) == {"L", "LA", "RGB", "RGBA"}


@pytest.mark.whole
def test_check_passes_the_hostile_folder_and_counts_every_file(hostile, capsys):
    folder, names, out = hostile
    assert main(["check", str(folder), str(out)]) == 0
    same = json.loads((out / "report.json").read_text())["unchanged_files"]  # flat extremes, files of one pixel
    assert capsys.readouterr().out == f"{len(names)} files checked against radius 8: 0 problems, {same} unchanged\n"


@pytest.mark.whole
def test_the_report_says_what_was_done_with_what_and_what_it_did(hostile):
    _, names, out = hostile
    report = json.loads((out / "report.json").read_text())
    assert report["images"] == report["protected"] == len(names)
    assert (report["skipped"], report["ignored"]) == ([], [f"{CLASSES[1]}/notes.txt"])
    assert (report["seed"], report["device"], report["precision"], report["radius"]) == (0, "cpu", "float32", 8)
    assert report["torch"] == torch.__version__ and report["semkit"]
    assert report["recipe"]["noise_side"] == "Uniform(radius=4.0, norm='linf')"
    assert report["passes"] == craft_recipe("sem", "quick").cost(len(names)).total
    assert report["seconds"] > 0 and 0 < report["clipped_fraction"] < 0.5
    assert 30 < report["psnr_db"] < 48 and 0.5 < report["ssim"] < 1
    assert 0.3 < report["after_resize_to_working_size"]["noise_correlation"] <= 1
    size = report["size"]
    assert f"crafted at {size} x {size} pixels and resized" in report["noise_size"]
    assert "semkit learn IMAGES --protected" in report["noise_size"]
    assert not (out / "unfinished").exists()


def shift(path, levels):
    """Moves one value of the image file by so many levels, away from the edges of the box."""
    image = np.array(Image.open(path))
    image[0, 0, 0] = image[0, 0, 0] + levels if image[0, 0, 0] < 128 else image[0, 0, 0] - levels
    Image.fromarray(image).save(path)


def test_check_finds_a_value_one_level_beyond_the_radius_and_none_at_it(small, capsys):
    photos, out = small
    for name, apart in (("a/00", 8), ("b/01", 9)):
        shutil.copy(photos / f"{name}.png", out / "images" / f"{name}.png")
        shift(out / "images" / f"{name}.png", apart)
    assert main(["check", str(photos), str(out)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "b/01.png: differs by 9 levels, the radius is 8",
        "20 files checked against radius 8: 1 problems",
    ]
    assert main(["check", str(photos), str(out), "--radius", "9"]) == 0


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (lambda path: path.unlink(), "a/00.png: missing"),
        (lambda path: shutil.copy(path, path.with_name("stray.jpg")), "a/stray.jpg: no original of it"),
        (lambda path: Image.open(path).resize((9, 8)).save(path), "a/00.png: the original has 8x8 pixels"),
        (lambda path: Image.open(path).convert("L").save(path), "a/00.png: the original has mode RGB"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "a/00.png: "),
    ],
    ids=["missing", "stray", "size", "mode", "damaged"],
)
def test_check_names_what_was_tampered_with(small, tamper, problem):
    photos, out = small
    tamper(out / "images" / "a" / "00.png")
    found = check(str(photos), out)
    assert len(found["problems"]) == 1 and problem in found["problems"][0]


@pytest.mark.parametrize("radius", [float("nan"), float("inf"), -1, 0.03, "eight"])
def test_check_takes_no_radius_that_is_none(small, radius):
    photos, out = small
    with pytest.raises(ValueError, match="radius"):
        check(str(photos), out, radius=radius)
    assert check(str(photos), out, radius="8")["radius"] == 8


def test_files_that_are_as_their_originals_are_counted(small, tmp_path, capsys):
    photos, out = small
    for name in ("a/00.png", "b/01.png"):
        shutil.copy(photos / name, out / "images" / name)
    assert main(["check", str(photos), str(out)]) == 0
    assert capsys.readouterr().out == "20 files checked against radius 8: 0 problems, 2 unchanged\n"
    grey = shutil.copytree(photos, tmp_path / "in")
    for path in grey.rglob("*.png"):  # at radius 1 grey images keep many values: their noise is a mean of three
        Image.open(path).convert("L").resize((1, 1)).save(path)
    assert main(["protect", str(grey), str(tmp_path / "grey"), "--radius", "1", "--size", "8", *QUICK]) == 0
    same = json.loads((tmp_path / "grey/report.json").read_text())["unchanged_files"]
    assert same and f"\n{same} of the protected files have the pixels of their originals" in capsys.readouterr().out


def test_check_names_the_first_ten_of_many(small, capsys):
    photos, out = small
    shutil.rmtree(out / "images")
    assert main(["check", str(photos), str(out)]) == 1
    *named, more, total = capsys.readouterr().out.splitlines()
    assert len(named) == 10 and named[0] == "a/00.png: missing" and more == "and 10 more" and "20 problems" in total


def test_check_finds_a_changed_alpha_channel(tmp_path):
    photos = make_photos(tmp_path / "in", 6)
    for path in photos.rglob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    protect(str(photos), tmp_path / "out", quick(), size=8)
    assert not check(str(photos), tmp_path / "out")["problems"]
    path = tmp_path / "out/images/a/00.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 3] -= 1
    Image.fromarray(pixels).save(path)
    assert check(str(photos), tmp_path / "out")["problems"] == ["a/00.png: the alpha channels differ"]


def test_the_files_are_the_images_plus_the_stored_noise_cut_to_the_box_and_the_report_counts_the_cuts(tmp_path):
    photos = make_photos(tmp_path / "in", 37)
    for i, path in enumerate(sorted(photos.rglob("*.png"))):  # much that is near black and white, so that the box cuts
        image = np.array(Image.open(path))
        image[: i % 8] = 253 if i % 2 else 2
        Image.fromarray(image).save(path)
    report = protect(str(photos), tmp_path / "out", quick(), size=8)
    files = [*sorted(photos.glob("a/*")), *sorted(photos.glob("b/*"))]
    noise = noises(tmp_path / "out").astype(int).transpose(0, 2, 3, 1)
    before = np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)
    written = [Image.open(tmp_path / "out/images" / path.relative_to(photos)) for path in files]
    after = np.stack([np.asarray(image) for image in written]).astype(int)
    raw = before + noise
    assert (after == raw.clip(0, 255)).all()
    assert report["clipped_fraction"] == round(float(((raw < 0) | (raw > 255)).mean()), 4) > 0.05
    assert report["mean_effective_noise"] == round(float(np.abs(after - before).mean()), 3)
    assert report["psnr_db"] == round(10 * np.log10(255**2 / ((after - before) ** 2).mean()), 2)


def test_the_last_ragged_batch_gets_noise_of_its_own_as_strong_as_the_rest(tmp_path):
    protect(str(make_photos(tmp_path / "in", 37)), tmp_path / "out", quick(), size=8)  # in batches of 32
    noise = noises(tmp_path / "out")
    share = (np.abs(noise) > 2).mean(axis=(1, 2, 3))
    assert share[32:].min() > 0.5 and abs(share[32:].mean() - share[:32].mean()) < 0.2
    assert len({image.tobytes() for image in noise}) == 37


def test_class_wise_noise_is_one_per_class(tmp_path):
    protect(str(make_photos(tmp_path / "in", 21, classes=3)), tmp_path / "out", quick(class_wise=True), size=8)
    noise = noises(tmp_path / "out").reshape(3, 7, -1)  # files come class by class
    assert (noise == noise[:, :1]).all() and noise.any(axis=(1, 2)).all()
    assert len({kind[0].tobytes() for kind in noise}) == 3


def test_a_fraction_of_every_class_is_protected_and_the_rest_written_unchanged(tmp_path):
    photos = make_photos(tmp_path / "in", 24)
    for i in range(12, 24, 2):
        (photos / "a" / f"{i:02d}.png").unlink()  # 6 of class a, 12 of class b
    report = protect(str(photos), tmp_path / "out", quick(), size=8, fraction=0.5)
    changed = Counter()
    for path in sorted(photos.rglob("*.png")):
        protected = np.asarray(Image.open(tmp_path / "out/images" / path.relative_to(photos)))
        changed[path.parent.name] += int((protected != np.asarray(Image.open(path))).any())
    assert changed == {"a": 3, "b": 6} and report["protected"] == 9 and report["images"] == 18
    assert noises(tmp_path / "out").any(axis=(1, 2, 3)).sum() == 9
    assert not check(str(photos), tmp_path / "out")["problems"]


def test_check_names_a_file_that_was_to_be_left_as_it_was_and_was_changed_within_the_radius(tmp_path):
    photos, out = make_photos(tmp_path / "in", 8), tmp_path / "out"
    protect(str(photos), out, RandomGrey(8), size=8, fraction=0.5)
    left = next(name for name, png in contents(out / "images").items() if png == (photos / name).read_bytes())
    shift(out / "images" / left, 1)
    assert check(str(photos), out)["problems"] == [f"{left}: differs by 1 levels, and was to be left as it was"]
    report = json.loads((out / "report.json").read_text())
    for name in ("recipe", "fraction", "seed"):  # without a fraction all are held to the radius, as they always were
        del report[name]
    (out / "report.json").write_text(json.dumps(report))
    assert not check(str(photos), out)["problems"]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(pristine, tmp_path):
    photos, out = pristine
    protect(str(photos), tmp_path / "same", quick(), size=8)
    protect(str(photos), tmp_path / "other", quick(), size=8, seed=1)
    same, other, first = (contents(folder / "images") for folder in (tmp_path / "same", tmp_path / "other", out))
    assert same == first and noises(tmp_path / "same").tobytes() == noises(out).tobytes()
    assert all(other[name] != first[name] for name in first)


def test_a_finished_run_asked_to_resume_is_reported_and_left_alone(small):
    photos, out = small
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    report = protect(str(photos), out, quick(), size=8, resume=True)
    assert report == json.loads((out / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_run_of_which_files_are_missing_is_made_again_to_the_same_bytes(small):
    photos, out = small
    before = contents(out)
    for spoil in (lambda: shutil.rmtree(out / "images/a"), (out / "noise.safetensors").unlink):
        spoil()
        protect(str(photos), out, quick(), size=8, resume=True)
        after = contents(out)
        assert after.pop("report.json") and {**after, "report.json": before["report.json"]} == before


def test_a_second_run_into_a_folder_that_another_one_has_begun_is_refused(tmp_path):
    photos, out = make_photos(tmp_path / "in", 8), tmp_path / "out"

    def second(what, step, *_):
        if (what, step) != ("crafting noise", 1):
            return
        with pytest.raises(OutputError, match=r"was begun with other settings \(recipe\)"):
            protect(str(photos), out, quick(radius=60), size=8)
        with pytest.raises(OutputError, match="exists; --resume continues it"):
            protect(str(photos), out, quick(), size=8)
        with pytest.raises(OutputError, match="another run is at work on the output"):
            protect(str(photos), out, quick(), size=8, resume=True)

    with pytest.raises(MemoryError):  # as the forecast may: other settings must be free to be tried
        protect(str(photos), out, quick(radius=60), size=8, on_start=lambda _: bytes(2**62))
    assert protect(str(photos), out, quick(), size=8, lab=Lab(on_step=second))["radius"] == 8
    assert not check(str(photos), out)["problems"]


@pytest.mark.parametrize(
    ("link", "to", "named"),
    [("images", "", "images/a"), ("images/a", "a", "images/a"), ("unfinished", "", "unfinished")],
)
def test_nothing_is_written_through_a_link_to_the_originals(small, tmp_path, link, to, named):
    photos, out = small
    shutil.rmtree(out / link, ignore_errors=True)
    (out / "report.json").unlink()
    (out / link).symlink_to(photos / to)
    before = contents(photos)
    with pytest.raises(OutputError, match=f"out/{named} is a link out of"):
        protect(str(photos), out, quick(), size=8, resume=True)
    assert contents(photos) == before


@pytest.mark.parametrize(
    "how",
    [
        {"seed": None}, {"seed": 1.5}, {"seed": "0"}, {"seed": 2**64}, {"seed": -1}, {"size": 10**9}, {"size": 2**62},
        {"fraction": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_before_anything_is_written(tmp_path, how):
    photos = make_photos(tmp_path / "in", 4)
    with pytest.raises(ValueError, match=next(iter(how))):
        protect(str(photos), tmp_path / "out", quick(), **{"size": 8, **how})
    assert not (tmp_path / "out").exists()


def test_numbers_from_numpy_and_a_one_for_yes_are_written_and_checked_as_numbers(tmp_path):
    photos, out = make_photos(tmp_path / "in", 12), tmp_path / "out"
    how = dict(fraction=np.float32(0.5), size=np.int64(8), limit=np.int64(8), seed=np.int64(1), skip_unreadable=1)
    report = protect(str(photos), out, RandomGrey(np.float32(8)), **how)
    assert (report["images"], report["protected"], report["skip_unreadable"]) == (8, 4, True)
    assert not check(str(photos), out)["problems"]


def test_the_name_of_a_method_is_no_recipe_and_the_line_says_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"recipe must be one as sk.craft_recipe\('sem'\) gives it, got 'em'"):
        protect(str(make_photos(tmp_path / "in", 4)), tmp_path / "out", "em", size=8)
    assert not (tmp_path / "out").exists()


def test_an_unknown_surrogate_is_refused_where_it_is_named():
    with pytest.raises(ValueError, match="unknown model 'resnet19'; did you mean resnet18"):
        craft_recipe("sem", "quick", surrogate="resnet19")


def test_a_net_that_cannot_take_the_images_is_refused_before_anything_is_written(tmp_path):
    photos, recipe = make_photos(tmp_path / "in", 4), replace(quick(), surrogate="vgg16_bn")
    with pytest.raises(ValueError, match="vgg16_bn needs images of 32 pixels or more, got 8"):
        protect(str(photos), tmp_path / "out", recipe, size=8)
    assert not (tmp_path / "out").exists()


def test_an_empty_name_is_not_the_current_folder(small, tmp_path, monkeypatch):
    photos, out = small
    monkeypatch.chdir(photos)
    with pytest.raises(DataError, match="the name of the images is empty"):
        protect("", tmp_path / "new", quick(), size=8)
    with pytest.raises(DataError, match="the name of the images is empty"):
        check("", out)
    monkeypatch.chdir(out)
    with pytest.raises(OutputError, match="the name of the output is empty"):
        check(str(photos), "")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(OutputError, match="the name of the output is empty"):
        protect(str(photos), "", quick(), size=8)
    assert not (tmp_path / "new").exists() and not contents(tmp_path / "empty")


def test_only_the_training_part_of_a_divided_folder_is_protected(tmp_path):
    make_photos(tmp_path / "in/train", 8)
    make_photos(tmp_path / "in/test", 4, seed=1)
    report = protect(str(tmp_path / "in"), tmp_path / "out", quick(), size=8)
    names = contents(tmp_path / "out/images")
    assert report["images"] == len(names) == 8 and all(name.startswith("train/") for name in names)
    assert not check(str(tmp_path / "in"), tmp_path / "out")["problems"]


def test_a_named_set_keeps_its_own_size_whatever_size_the_nets_see_and_learners_need_the_same_limit(tmp_path):
    out = tmp_path / "out"
    protect("shapes", out, quick(), size=8, limit=20)
    files = sorted((out / "images").rglob("*.png"))
    assert len(files) == 20 and {read_image(path).size for path in files} == {(32, 32)}
    assert not check("shapes", out)["problems"]
    split = load("shapes", size=8)
    limited = [replace(split, train=split.train.limit(n)) for n in (20, 30)]
    assert len(protected_split(limited[0], "shapes", out).train) == 20
    with pytest.raises(OutputError, match="protects 20 images, these are 30: use one --limit"):
        protected_split(limited[1], "shapes", out)


def test_unreadable_files_are_left_out_and_listed_where_asked_for(tmp_path):
    photos = make_photos(tmp_path / "in", 8)
    bad = [f"a/{name}" for name in make_corrupt(photos / "a") if is_image_name(name)]
    with pytest.raises(DataError, match=r"a/bomb.png.*--skip-unreadable"):
        protect(str(photos), tmp_path / "out", quick(), size=8)
    assert not (tmp_path / "out").exists()
    report = protect(str(photos), tmp_path / "out", quick(), size=8, skip_unreadable=True)
    assert report["images"] == 8 and sorted(report["skipped"]) == bad
    found = check(str(photos), tmp_path / "out")
    assert not found["problems"] and sorted(found["skipped"]) == bad


def test_a_limit_counts_files_that_can_be_read(tmp_path):
    photos = make_photos(tmp_path / "in", 8)
    for path in sorted((photos / "b").iterdir())[:-1]:
        path.write_bytes(b"no image")
    report = protect(str(photos), tmp_path / "out", quick(), size=8, limit=2, skip_unreadable=True)
    names = contents(tmp_path / "out/images")
    assert report["images"] == len(names) == 2 and len(report["skipped"]) == 3 and "b/07.png" in names
    assert not check(str(photos), tmp_path / "out")["problems"]


def test_learners_are_given_the_protected_training_images_and_the_clean_test_images(pristine):
    photos, out = pristine
    split = load(str(photos), size=8)
    protected = protected_split(split, str(photos), out)
    assert protected.test is split.test
    assert (protected.train.labels == split.train.labels).all() and protected.train.files == split.train.files
    for image, name in zip(protected.train.images, split.train.files, strict=True):
        assert (image.numpy().transpose(1, 2, 0) == np.asarray(Image.open(out / "images" / name))).all()
    assert (protected.train.images != split.train.images).any(dim=(1, 2, 3)).all()


def test_protected_files_of_other_images_are_refused(pristine, small, tmp_path):
    photos, out = small
    others = make_photos(tmp_path / "others", 20, seed=5)
    with pytest.raises(OutputError, match="protects other images"):
        protected_split(load(str(others), size=8), str(others), out)
    (out / "images/a/00.png").unlink()
    (out / "images/a/02.png").unlink()
    with pytest.raises(OutputError, match="must hold a protected file for every training image"):
        protected_split(load(str(photos), size=8), str(photos), out)


def test_noise_of_other_images_is_refused(pristine, tmp_path):
    photos, out = pristine
    assert load_noise(out / "noise.safetensors", images=load_originals(str(photos), size=8).images).radius == 8
    others = load_originals(str(make_photos(tmp_path / "in", 20, seed=5)), size=8).images
    with pytest.raises(NoiseError, match="crafted for other images"):
        load_noise(out / "noise.safetensors", images=others)


def test_a_radius_that_is_no_whole_number_is_kept_to_as_well(tmp_path):
    photos = make_photos(tmp_path / "in", 6)
    protect(str(photos), tmp_path / "out", quick(radius=7.5), size=8)
    assert np.abs(noises(tmp_path / "out")).max() == 7
    assert not check(str(photos), tmp_path / "out")["problems"]


@pytest.mark.parametrize("job", ["reading images", "crafting noise", "writing images"])
def test_asked_to_stop_every_job_stops_at_once_and_the_run_goes_on_to_the_same_bytes(pristine, tmp_path, job):
    photos, out = pristine
    told = []

    def stop(what, step, *_):
        told.append((what, step))
        return what == job and step == 3

    with pytest.raises(Interrupted, match=r"stopped"):
        protect(str(photos), tmp_path / "out", quick(), size=8, lab=Lab(on_step=stop))
    assert told[-1] == (job, 3) and not (tmp_path / "out/report.json").exists()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out/.semkit-0.tmp").write_bytes(b"what a kill would have left")
    protect(str(photos), tmp_path / "out", quick(), size=8, resume=True)
    ours, theirs = contents(tmp_path / "out"), contents(out)
    assert ours.pop("report.json") and theirs.pop("report.json")
    assert ours == theirs


def test_check_stops_when_it_is_asked_to(pristine):
    photos, out = pristine
    with pytest.raises(Interrupted, match="stopped while checking images, 3 of 20"):
        check(str(photos), out, on_step=lambda what, step, *_: what == "checking images" and step == 3)
