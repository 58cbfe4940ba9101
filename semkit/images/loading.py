"""Where labelled images come from: the embedded set, torchvision's sets, and folders of class sub-folders."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semkit.images.files import find_images, is_image_name, shown
from semkit.images.imageset import AUTO, ImageSet, Split, Storage, stratified_limit, stratified_split, zeros
from semkit.images.picture import UnreadableImage, read_image, working_image
from semkit.images.pixels import check_count, hint_at
from semkit.images.shapes import embedded

NAMES = ("shapes", "cifar10", "cifar100", "svhn")
TESTS = ("test", "val", "valid", "validation", "eval", "dev")  # names of a folder of test images, the first first
Part = dict[str, int]  # image files, as names relative to their folder -> label
SMALLEST, LARGEST = 8, 16384  # side of a net's images, in pixels
OnStep = Callable[[int, int], object]  # on_step(done, total)


class DataError(ValueError):
    """Images that cannot be used as they are; the message is one line and says what to do."""

    def _render_traceback_(self) -> list[str]:
        """Show the message in a notebook without a traceback."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Folder:
    """The image files of a folder: those of train/ and of test/, or all of them as train; relative name -> label.

    ignored: names of files, and of folders ('name/'), that are not images of a class. skipped: see `readable`.
    """

    root: Path
    classes: tuple[str, ...]
    train: Part
    test: Part | None = None
    ignored: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """[train] or [train, test]."""
        return [self.train, self.test] if self.test else [self.train]


def chosen(part: Part, index: Iterable[int]) -> Part:
    """The files at `index`."""
    names = list(part)
    return {names[i]: part[names[i]] for i in index}


def limited(part: Part, n: int | None, seed: int = 0) -> Part:
    """n files, every class in its share and at least once; all files without a limit."""
    return part if n is None else chosen(part, stratified_limit(_labels(part), n, seed).tolist())


def _labels(part: Part) -> torch.Tensor:
    return torch.tensor(list(part.values()), dtype=torch.int64)


def check_size(size: int) -> int:
    """`size` if it can be the side of a net's images, in pixels; raises ValueError otherwise."""
    return check_count(size, "size", SMALLEST, LARGEST)


def scan(root: str | os.PathLike) -> Folder:
    """List a folder of class sub-folders, or of train/ and test/ (val/, ...) with these in each; decodes nothing.

    Raises DataError without the folder, images, two classes, or images in every class.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{shown(root)}: {'a file, not a folder' if root.exists() else 'no such folder'}")
    if not (parts := _parts(root)):
        images, ignored = _class_images(root)
        return Folder(root, tuple(images), _part(images), ignored=ignored)
    images, ignored = zip(*(_class_images(root, below) for below in parts), strict=True)
    for here, there in ((-1, 0), (0, -1)):
        if extra := sorted(set(images[here]) - set(images[there])):
            where = f"is in {parts[here]}/ but not in {parts[there]}/"
            raise DataError(f"{shown(root)}: class {shown(extra[0])!r} {where}")
    beside = sorted(p.name + "/" * p.is_dir() for p in root.iterdir() if p.name not in parts and p.name[0] != ".")
    return Folder(root, tuple(images[0]), *map(_part, images), ignored=(*beside, *chain(*ignored)))


def _parts(root: Path) -> tuple[str, ...]:
    """The names of train/ and test/ below root, or of train/ alone; () if every sub-folder is a class.

    Raises DataError if train/ holds folders and there is another folder beside it: test images or a class.
    """
    folders = sorted((p for p in root.iterdir() if p.is_dir() and p.name[0] != "."), reverse=True)
    named = {p.name.lower(): p for p in folders}
    train, test = named.get("train"), next((named[name] for name in TESTS if name in named), None)
    if train and test:
        return (train.name, test.name)
    inside = list(train.iterdir()) if train else []
    if not any(p.is_dir() for p in inside) or any(is_image_name(p.name) for p in inside):
        return ()
    if len(folders) > 1:
        raise DataError(
            f"{shown(root)}: train/ holds folders, no images, and there is no test/ or val/ beside it; give that name "
            "to the folder of test images, another one to train/ if it is a class, or move the other folder away"
        )
    return (train.name,)


def set_name(source: str | os.PathLike) -> str | None:
    """`source` if it names a set, None for a folder. A Path names a set only if there is no such file or folder."""
    name = os.fspath(source)
    return name if name in NAMES and (name is source or not Path(name).exists()) else None


def find_folder(source: str | os.PathLike) -> Folder:
    """scan(source). Raises DataError with the nearest name of a set if there is no such folder."""
    if not os.fspath(source):
        raise DataError("the name of the images is empty: write a folder or the name of a set")
    if not Path(source).exists():
        raise DataError(f"{shown(source)}: no such folder, and no data set of that name; {hint_at(source, NAMES)}")
    return scan(source)


def _class_images(root: Path, below: str = "") -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Class -> names relative to root, for the class sub-folders of root/below; and the names ignored."""
    where, prefix = root / below, below + "/" if below else ""
    images, loose, ignored = find_images(where)
    if not any(images.values()):
        if loose:
            raise DataError(f"{shown(where)}: {len(loose)} images but no class folders; put each class in a sub-folder")
        raise DataError(f"{shown(where)}: no images; a folder with one sub-folder of images for each class is needed")
    for name, names in images.items():
        if not names:
            raise DataError(f"{shown(where)}: class {shown(name)!r} has no images; every sub-folder is a class")
    if len(images) == 1:
        raise DataError(f"{shown(where)}: one class only, {shown(name)!r}; at least two are needed")
    images = {name: tuple(prefix + n for n in names) for name, names in images.items()}
    return images, tuple(prefix + n for n in (*loose, *ignored))


def _part(images: dict[str, tuple[str, ...]]) -> Part:
    return {name: label for label, names in enumerate(images.values()) for name in names}


def readable(folder: Folder, on_step: OnStep | None = None) -> Folder:
    """The folder without the files that cannot be decoded; `skipped` has their names. Every file is decoded once.

    Raises DataError if a class would be left without images.
    """
    names, skipped = [name for part in folder.parts for name in part], set()
    for done, name in enumerate(names, 1):
        try:
            read_image(folder.root / name)
        except UnreadableImage:
            skipped.add(name)
        if on_step:
            on_step(done, len(names))
    parts = [{name: label for name, label in part.items() if name not in skipped} for part in folder.parts]
    for part, found in zip(folder.parts, parts, strict=True):
        for label in sorted(set(part.values()) - set(found.values())):
            name = shown(folder.classes[label])
            raise DataError(f"{shown(folder.root)}: class {name!r} has no images that can be read")
    left_out = tuple(name for name in names if name in skipped)
    return Folder(folder.root, folder.classes, *parts, ignored=folder.ignored, skipped=left_out)


def _room(n: int, size: int, storage: Storage) -> tuple[torch.Tensor, Path | None]:
    """(zeros uint8 [n,3,size,size], the folder they are mapped from or None); raises DataError if there is no room."""
    needed = n * 3 * size**2
    scratch = storage.scratch(needed)
    try:
        return zeros((n, 3, size, size), torch.uint8, scratch), scratch
    except PermissionError:
        raise
    except OSError as error:
        what = f"{n} images of {size} x {size} pixels take {needed / 1e9:.3g} GB"
        raise DataError(f"{shown(scratch)}: {error.strerror}: {what}; a smaller size takes less") from None


def decode(
    folder: Folder, parts: Sequence[Part], size: int, *, storage: Storage = AUTO, on_step: OnStep | None = None
) -> list[ImageSet]:
    """Decode the files of some parts of a folder, resized to size x size; raises DataError for an unreadable file."""
    sets, done, total = [], count(1), sum(map(len, parts))
    for part in parts:
        images, scratch = _room(len(part), size, storage)
        for image, name in zip(images, part, strict=True):
            try:
                image.copy_(torch.from_numpy(working_image(read_image(folder.root / name), size)))
            except UnreadableImage as error:
                raise DataError(f"{error}; --skip-unreadable (Python: skip_unreadable=True) leaves it out") from None
            if on_step:
                on_step(next(done), total)
        name = folder.root.resolve().name
        sets.append(ImageSet(images, _labels(part), folder.classes, name, tuple(part), scratch))
    return sets


def _train_and_test(folder: Folder, seed: int, limit: int | None) -> list[Part]:
    """[train limited, test]; without test/, train is divided. Raises DataError if a class has a single image then."""
    if folder.test:
        return [limited(folder.train, limit, seed), folder.test]
    labels = _labels(folder.train)
    if (counts := labels.bincount()).min() < 2:
        single = shown(folder.classes[counts.argmin()])
        raise DataError(f"{shown(folder.root)}: class {single!r} has one image; training and test need one each")
    train, test = (chosen(folder.train, index.tolist()) for index in stratified_split(labels, seed=seed))
    return [limited(train, limit, seed), test]


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The folder of torchvision's sets: `root`, else $SEMKIT_DATA, else ~/.cache/semkit.

    Raises DataError for a ~user without a home folder.
    """
    place = Path(root or os.environ.get("SEMKIT_DATA") or "~/.cache/semkit")
    try:
        return place.expanduser()
    except RuntimeError:
        raise DataError(f"{shown(place)}: that home folder is not known; write the whole path in SEMKIT_DATA") from None


def _load_torchvision(name: str, root: Path, download: bool) -> Split:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN}[name]
    sets = []
    for part in ("train", "test"):
        choice = {"split": part} if name == "svhn" else {"train": part == "train"}
        try:
            with warnings.catch_warnings(action="ignore"):  # numpy's, about how the old pickles were written
                found = kind(root, download=download, **choice)
        except (RuntimeError, OSError) as error:
            if download:
                reason = " ".join(str(error).split())
                raise DataError(f"{name} could not be downloaded to {shown(root)}: {reason}") from None
            files = f"{part}_32x32.mat" if name == "svhn" else f"{kind.base_folder}/"
            raise DataError(
                f"{name} is not in {shown(root)} or is broken: add --download (Python: download=True), "
                f"or put {files} there, or point SEMKIT_DATA at it"
            ) from None
        # CIFAR lies in memory as N,H,W,C and SVHN as N,C,H,W.
        images = found.data if name == "svhn" else found.data.transpose(0, 3, 1, 2)
        labels = found.labels if name == "svhn" else found.targets
        classes = tuple(map(str, range(10))) if name == "svhn" else tuple(found.classes)
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        sets.append(ImageSet(pixels, torch.as_tensor(labels, dtype=torch.int64), classes, name))
    return Split(*sets)


def resized(image_set: ImageSet, size: int, storage: Storage = AUTO) -> ImageSet:
    """The set with its images resized to size x size, held by `storage`; itself if they have that size."""
    if image_set.images.shape[2:] == (size, size):
        return image_set
    images, scratch = _room(len(image_set), size, storage)
    for i, image in enumerate(image_set.images):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        images[i] = torch.from_numpy(working_image(picture, size))
    return replace(image_set, images=images, scratch=scratch)


def load(
    source: str | os.PathLike,
    *,
    size: int = 32,
    seed: int = 0,
    limit: int | None = None,
    root: str | os.PathLike | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    storage: Storage = AUTO,
    on_step: OnStep | None = None,
) -> Split:
    """Load a set by name (shapes, cifar10, cifar100, svhn), or a folder with a sub-folder of images for each class.

    Images are resized to size x size. limit: number of training images, every class in its share. A folder without
    test/ is divided by `seed`. root: the folder of torchvision's sets (data_root). skip_unreadable: files that cannot
    be decoded are left out, and named in `skipped`. storage: where the pixels are; large sets go to disk.
    on_step(done, total) counts files, twice with skip_unreadable.
    Raises DataError, which says what to do, for whatever cannot be found or read.

    >>> load("shapes", limit=100).train
    ImageSet('shapes', 100 images of 32x32, 10 classes)
    """
    size = check_size(size)
    if not (name := set_name(source)):
        folder = find_folder(source)
        folder = readable(folder, on_step) if skip_unreadable else folder
        sets = decode(folder, _train_and_test(folder, seed, limit), size, storage=storage, on_step=on_step)
        return Split(*sets, folder.skipped, folder.ignored)
    found = embedded(seed=seed) if name == "shapes" else _load_torchvision(name, data_root(root), download)
    train = resized(found.train.limit(limit, seed), size, storage)
    return replace(found, train=train, test=resized(found.test, size, storage))
