"""Sets by name, folders of classes as people have them, and the one clear line where they cannot be used."""

import hashlib
import pickle
from pathlib import Path

import hostile
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from semkit import craft_recipe, protect
from semkit.images.loading import DataError, data_root, decode, load, readable, scan


def folder_of(root, *classes, n=5, size=(40, 30)):
    """Writes n images of one colour for each class: class i, image j has the colour (50 i, 20 j, 7)."""
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(n):
            Image.new("RGB", size, (50 * i, 20 * j, 7)).save(root / name / f"{j}.png")
    return root


def test_folder_without_parts_is_split(tmp_path):
    folder_of(tmp_path / "set", "b", "a", "ü")
    steps = []
    parts = load(tmp_path / "set", size=16, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 15) for i in range(1, 16)]
    assert parts.train.classes == parts.test.classes == ("a", "b", "ü") and parts.train.name == "set"
    assert (len(parts.train), len(parts.test)) == (12, 3) and parts.skipped == ()
    for part in (parts.train, parts.test):
        assert part.images.shape == (len(part), 3, 16, 16)
        for image, label, file in zip(part.images, part.labels.tolist(), part.files, strict=True):
            assert file.startswith(part.classes[label] + "/")
            written = np.asarray(Image.open(tmp_path / "set" / file))[0, 0]
            assert (image == torch.from_numpy(written.copy())[:, None, None]).all()
    again = load(str(tmp_path / "set"), size=16)
    assert again.train.files == parts.train.files and again.train.fingerprint == parts.train.fingerprint
    assert load(tmp_path / "set", seed=1).test.files != parts.test.files
    few = load(tmp_path / "set", size=16, limit=6)
    assert len(few.train) == 6 and set(few.train.files) < set(parts.train.files) and few.test.files == parts.test.files
    with pytest.raises(ValueError, match="limit must be at least the number of classes, 3, got 2"):
        load(tmp_path / "set", limit=2)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_with_parts(tmp_path, test):
    folder_of(tmp_path / "train", "a", "b", n=4)
    folder_of(tmp_path / test, "a", "b", n=2)
    (tmp_path / "extra").mkdir()
    (tmp_path / "train" / "list.csv").write_text("")
    found = scan(tmp_path)
    assert list(found.train) == list(f"train/{c}/{i}.png" for c in "ab" for i in range(4))
    assert list(found.train.values()) == [0] * 4 + [1] * 4
    assert list(found.test) == list(f"{test}/{c}/{i}.png" for c in "ab" for i in range(2))
    assert found.ignored == ("extra/", "train/list.csv")
    parts = load(tmp_path, limit=2)
    assert parts.train.labels.tolist() == [0, 1] and parts.test.files == tuple(found.test)
    folder_of(tmp_path / test, "c", n=1)
    with pytest.raises(DataError, match=rf"class 'c' is in {test}/ but not in train/"):
        scan(tmp_path)
    (tmp_path / test / "c").rename(tmp_path / "train" / "c")
    with pytest.raises(DataError, match=rf"class 'c' is in train/ but not in {test}/"):
        scan(tmp_path)


def test_train_and_test_are_found_in_any_case_test_before_val(tmp_path):
    for name, found in (("Val", None), ("Train", "Val/a/0.png"), ("test", "test/a/0.png")):
        folder_of(tmp_path / name, "a", "b", n=1)
        if found:
            whole = scan(tmp_path)
            assert (next(iter(whole.train)), next(iter(whole.test))) == ("Train/a/0.png", found)


def test_a_train_folder_alone_is_divided_as_a_folder_without_parts_is(tmp_path):
    alone, plain = folder_of(tmp_path / "alone/Train", "a", "b").parent, folder_of(tmp_path / "plain", "a", "b")
    Image.new("L", (3, 3)).save(alone / "loose.png")
    found = scan(alone)
    assert found.classes == ("a", "b") and found.test is None and found.ignored == ("loose.png",)
    assert list(found.train) == list(f"Train/{name}" for name in scan(plain).train)
    ours, theirs = load(alone), load(plain)
    assert ours.train.fingerprint == theirs.train.fingerprint and ours.test.fingerprint == theirs.test.fingerprint


def test_a_train_folder_beside_an_unknown_one_is_one_line(tmp_path):
    root = folder_of(tmp_path / "train", "a", "b").parent
    folder_of(root / "holdout", "a", "b")
    clear_line(
        root,
        f"{root}: train/ holds folders, no images, and there is no test/ or val/ beside it; give that name "
        "to the folder of test images, another one to train/ if it is a class, or move the other folder away",
    )
    (root / "holdout").rename(root / "dev")
    assert scan(root).classes == ("a", "b") and next(iter(scan(root).test)) == "dev/a/0.png"


def test_train_may_be_a_class(tmp_path):
    assert scan(folder_of(tmp_path / "flat", "plane", "train")).classes == ("plane", "train")
    mixed = folder_of(tmp_path / "mixed", "plane", "train")
    folder_of(mixed / "train", "old")
    assert scan(mixed).classes == ("plane", "train")


def test_scan_covers_every_file_of_a_hostile_folder(hostile_folder):
    folder, names = hostile_folder
    found = scan(folder)
    assert found.test is None and list(found.train) == names and found.classes == hostile.CLASSES
    assert [name.split("/")[0] for name in names] == [found.classes[label] for label in found.train.values()]
    [whole] = decode(found, [found.train], size=32)
    assert len(whole) == len(names) and readable(found) == found and whole.files == tuple(names)


def clear_line(source, message, **options):
    with pytest.raises(DataError) as error:
        load(source, **options)
    assert "\n" not in str(error.value)
    assert str(error.value) == message


def test_folders_that_cannot_be_used_get_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    clear_line(tmp_path / "file", f"{tmp_path}/file: a file, not a folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    none = "no images; a folder with one sub-folder of images for each class is needed"
    clear_line(empty, f"{empty}: {none}")
    (empty / "a").mkdir()
    clear_line(empty, f"{empty}: {none}")
    one = folder_of(tmp_path / "one", "cats")
    clear_line(one, f"{one}: one class only, 'cats'; at least two are needed")
    (one / "dogs").mkdir()
    (one / "dogs" / "readme.txt").write_text("")
    clear_line(one, f"{one}: class 'dogs' has no images; every sub-folder is a class")
    Image.new("L", (3, 3)).save(one / "dogs" / "only.png")
    clear_line(one, f"{one}: class 'dogs' has one image; training and test need one each")
    flat = folder_of(tmp_path / "flat", ".")
    clear_line(flat, f"{flat}: 5 images but no class folders; put each class in a sub-folder")
    folder_of(tmp_path / "parts" / "train", "a", "b")
    (tmp_path / "parts" / "test").mkdir()
    clear_line(tmp_path / "parts", f"{tmp_path}/parts/test: {none}")


def test_unknown_names_get_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clear_line("CIFAR-10", "CIFAR-10: no such folder, and no data set of that name; did you mean cifar10?")
    clear_line("shape", "shape: no such folder, and no data set of that name; did you mean shapes?")
    known = "known are shapes, cifar10, cifar100, svhn"
    clear_line("my/pets", f"my/pets: no such folder, and no data set of that name; {known}")
    with pytest.raises(DataError, match="pets: no such folder"):
        scan("pets")


def test_corrupt_files(tmp_path):
    root = folder_of(tmp_path, "a", "b")
    (root / "b" / "bad\n.png").write_bytes(b"oops")
    reason = r"/b/bad\n.png: not in an image format that semkit reads"
    clear_line(root, f"{root}{reason}; --skip-unreadable (Python: skip_unreadable=True) leaves it out")
    parts = load(root, skip_unreadable=True)
    assert parts.skipped == ("b/bad\n.png",) and len(parts.train) + len(parts.test) == 10
    for name in ("b/0.png", "b/1.png", "b/2.png"):  # two are left: one for each part, whatever the seed
        (root / name).write_bytes(b"")
    for seed in range(4):
        parts = load(root, seed=seed, limit=2, skip_unreadable=True)
        assert parts.train.labels.tolist() == [0, 1] and sorted(parts.test.labels.tolist()) == [0, 1]
    for path in (root / "b").iterdir():
        path.write_bytes(b"oops")
    clear_line(root, f"{root}: class 'b' has no images that can be read", skip_unreadable=True)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_read_by_torchvision(tmp_path, monkeypatch):
    # Files as CIFAR-10's are, with 4 images each; only the list of checksums is replaced.
    folder, rows = tmp_path / "cifar-10-batches-py", torch.randint(0, 256, (4, 3072), dtype=torch.uint8).numpy()
    folder.mkdir()
    names = [f"c{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for part, labels in (("data_batch_1", [3, 1, 3, 1]), ("test_batch", [1, 3, 1, 3])):
        (folder / part).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", md5(folder / "batches.meta"))
    monkeypatch.setenv("SEMKIT_DATA", str(tmp_path))
    parts = load("cifar10")
    assert np.array_equal(parts.train.images.numpy(), rows.reshape(4, 3, 32, 32))
    assert parts.train.labels.tolist() == [3, 1, 3, 1] and parts.test.labels.tolist() == [1, 3, 1, 3]
    assert parts.train.classes == tuple(names) and parts.train.name == "cifar10" and parts.train.files == ()
    assert len(load("cifar10", limit=2, root=tmp_path).train) == 2
    assert load("cifar10", size=16).test.images.shape == (4, 3, 16, 16)


def test_svhn_is_read_by_torchvision(tmp_path, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": levels, "y": np.uint8([[1], [10], [9], [2], [1]])})
        monkeypatch.setitem(datasets.SVHN.split_list, part, ["", path.name, md5(path)])
    parts = load("svhn", root=tmp_path)
    assert np.array_equal(parts.train.images.numpy(), levels.transpose(3, 2, 0, 1))
    assert parts.train.labels.tolist() == [1, 0, 9, 2, 1] and parts.train.classes == tuple("0123456789")


@pytest.mark.parametrize(
    "name, files",
    [
        ("cifar10", "cifar-10-batches-py/"),
        ("cifar100", "cifar-100-python/"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_sets_that_are_not_there_say_how_to_get_them(tmp_path, monkeypatch, name, files):
    monkeypatch.setenv("SEMKIT_DATA", str(tmp_path / "none"))
    hint = f"add --download (Python: download=True), or put {files} there, or point SEMKIT_DATA at it"
    clear_line(name, f"{name} is not in {tmp_path}/none or is broken: {hint}")
    clear_line(name, f"{name} is not in {tmp_path} or is broken: {hint}", root=tmp_path)
    assert not (tmp_path / "none").exists()


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("SEMKIT_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root() == tmp_path / ".cache" / "semkit"
    monkeypatch.setenv("SEMKIT_DATA", "~/sets")
    assert data_root() == tmp_path / "sets" and str(data_root("here")) == "here"


@pytest.mark.parametrize("root", ["~nosuchuser/x", None])
def test_a_home_folder_that_is_not_known_is_one_line(monkeypatch, root):
    monkeypatch.setenv("SEMKIT_DATA", "~nosuchuser/x")
    said = "~nosuchuser/x: that home folder is not known; write the whole path in SEMKIT_DATA"
    clear_line("cifar10", said, root=root)


def test_a_path_names_a_set_too_unless_a_folder_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(Path("shapes"), limit=10).train.name == "shapes"
    assert protect(Path("shapes"), "out", craft_recipe(preset="quick"), limit=10)["images"] == 10
    folder_of(tmp_path / "shapes", "a", "b")
    assert load(Path("shapes")).train.classes == ("a", "b") and load("shapes", limit=10).train.classes[0] == "bar"
