"""Where labelled images come from: the embedded set, torchvision's sets, and folders of class sub-folders."""

import difflib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semkit.images.files import find_images, is_image_name, shown, split_folders
from semkit.images.imageset import ImageSet, Split, stratified_limit, stratified_split
from semkit.images.imageset import split as split
from semkit.images.picture import UnreadableImage, read_image, working_image
from semkit.images.pixels import check_count
from semkit.images.storage import AUTO, Storage, zeros

NAMES = ("shapes", "cifar10", "cifar100", "svhn")
LARGEST = 16384  # side of the images that nets are given, in pixels
OnStep = Callable[[int, int], object]  # on_step(done, total)


class DataError(ValueError):
    """Images that cannot be used as they are; the message is one line and says what to do."""

    def _render_traceback_(self) -> list[str]:
        """All that a notebook shows of it: the line, and no traceback."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Part:
    """Relative names of image files and their labels."""

    names: tuple[str, ...]
    labels: tuple[int, ...]

    def take(self, index: torch.Tensor) -> "Part":
        """The files at `index`."""
        return Part(tuple(self.names[i] for i in index.tolist()), tuple(self.labels[i] for i in index.tolist()))


@dataclass(frozen=True)
class Folder:
    """A folder of class sub-folders, or of train/ with these in it: train holds all images but those of a test/ (val/).

    `protect` covers train. ignored: names of files, and folders ('name/'), that are not taken for images.
    """

    root: Path
    classes: tuple[str, ...]
    train: Part
    test: Part | None = None
    ignored: tuple[str, ...] = ()


def check_size(size: int) -> int:
    """`size` if images can be resized to size x size; raises ValueError otherwise."""
    return check_count(size, "size", 1, LARGEST)


def scan(root: str | os.PathLike) -> Folder:
    """What a folder of class sub-folders holds; nothing is decoded.

    Raises DataError without the folder, images, two classes, or images in every class.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{shown(root)}: {'a file, not a folder' if root.exists() else 'no such folder'}")
    if not (parts := _parts(root)):
        images, ignored = _class_images(root)
        return Folder(root, tuple(images), _part(images), ignored=ignored)
    images, ignored = zip(*(_class_images(root, below) for below in parts), strict=True)
    for (classes, where), (others, absent) in permutations(zip(images[::-1], parts[::-1], strict=True), 2):
        if extra := sorted(set(classes) - set(others)):
            raise DataError(f"{shown(root)}: class {shown(extra[0])!r} is in {where}/ but not in {absent}/")
    beside = sorted(p.name + "/" * p.is_dir() for p in root.iterdir() if p.name not in parts and p.name[0] != ".")
    return Folder(root, tuple(images[0]), *map(_part, images), ignored=(*beside, *chain(*ignored)))


def _parts(root: Path) -> tuple[str, ...]:
    """The names of train/ and test/ below root, or of train/ alone; () where every sub-folder is a class.

    Raises DataError for a train/ of folders beside one that could be the test images or a class.
    """
    if parts := split_folders(root):
        return parts
    folders = [p for p in root.iterdir() if p.is_dir() and p.name[0] != "."]
    inside = [p for folder in folders if folder.name.lower() == "train" for p in folder.iterdir()]
    if not any(p.is_dir() for p in inside) or any(is_image_name(p.name) for p in inside):
        return ()
    if len(folders) > 1:
        raise DataError(
            f"{shown(root)}: train/ holds folders, no images, and there is no test/ or val/ beside it; give that name "
            "to the folder of test images, another one to train/ if it is a class, or move the other folder away"
        )
    return (folders[0].name,)


def set_name(source: str | os.PathLike) -> str | None:
    """The name in NAMES that `source` is, None for a folder. A Path means a set only where nothing lies at it."""
    name = os.fspath(source)
    return name if name in NAMES and (name is source or not Path(name).exists()) else None


def find_folder(source: str | os.PathLike) -> Folder:
    """scan(source) for what is no set's name; raises DataError with the nearest name if there is no such folder."""
    if not os.fspath(source):
        raise DataError("the name of the images is empty: write a folder or the name of a set")
    if not Path(source).exists():
        near = difflib.get_close_matches(str(source).lower(), NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the sets known by name are {', '.join(NAMES)}"
        raise DataError(f"{shown(source)}: no such folder, and no data set of that name; {hint}")
    return scan(source)


def _class_images(root: Path, below: str = "") -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Class -> names relative to root, for the class sub-folders of root/below; and the names ignored."""
    where, prefix = root / below, below + "/" if below else ""
    listing = find_images(where)
    if not any(listing.images.values()):
        if listing.loose:
            raise DataError(
                f"{shown(where)}: {len(listing.loose)} images but no class folders; put each class in a sub-folder"
            )
        raise DataError(f"{shown(where)}: no images; a folder with one sub-folder of images for each class is needed")
    for name, images in listing.images.items():
        if not images:
            raise DataError(f"{shown(where)}: class {shown(name)!r} has no images; every sub-folder is a class")
    if len(listing.images) == 1:
        raise DataError(f"{shown(where)}: one class only, {shown(name)!r}; at least two are needed")
    images = {name: tuple(prefix + n for n in names) for name, names in listing.images.items()}
    return images, tuple(prefix + n for n in (*listing.loose, *listing.ignored))


def _part(images: dict[str, tuple[str, ...]]) -> Part:
    labels = (label for label, names in enumerate(images.values()) for _ in names)
    return Part(tuple(name for names in images.values() for name in names), tuple(labels))


def _room(n: int, size: int, storage: Storage) -> tuple[torch.Tensor, Path | None]:
    """(zeros uint8 [n,3,size,size], the folder they are mapped from or None); DataError where there is no room."""
    needed = n * 3 * size**2
    scratch = storage.scratch(needed)
    try:
        return zeros((n, 3, size, size), torch.uint8, scratch), scratch
    except PermissionError:
        raise
    except OSError as error:
        what = f"{n} images of {size} x {size} pixels take {needed / 1e9:.3g} GB"
        raise DataError(f"{shown(scratch)}: {error.strerror}: {what}; a smaller size takes less") from None


def load_files(
    root: str | os.PathLike,
    names: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    size: int = 32,
    skip_unreadable: bool = False,
    storage: Storage = AUTO,
    on_step: OnStep | None = None,
) -> tuple[ImageSet, tuple[str, ...]]:
    """The files below root, resized to size x size, as an ImageSet held by `storage`; and the names that were skipped.

    Raises DataError for a file that cannot be read (unless skip_unreadable), and if no file of a class can be.
    """
    check_size(size)
    root, kept, skipped = Path(root), [], []
    images, scratch = _room(len(names), size, storage)
    for i, name in enumerate(names):
        try:
            images[len(kept)] = torch.from_numpy(working_image(read_image(root / name), size))
            kept.append(i)
        except UnreadableImage as error:
            if not skip_unreadable:
                raise DataError(f"{error}; --skip-unreadable (Python: skip_unreadable=True) leaves it out") from None
            skipped.append(name)
        if on_step is not None:
            on_step(i + 1, len(names))
    found = torch.tensor([labels[i] for i in kept], dtype=torch.int64)
    for label in sorted(set(labels) - set(found.tolist())):
        raise DataError(f"{shown(root)}: class {shown(classes[label])!r} has no images that can be read")
    files = tuple(names[i] for i in kept)
    return ImageSet(images[: len(kept)], found, classes, root.resolve().name, files, scratch), tuple(skipped)


def _divided(folder: Folder, train, test, seed: int, limit: int | None) -> tuple:
    """(train, test) of Parts or of ImageSets alike: train is split where test is None, then limited."""
    if test is None:
        labels = torch.as_tensor(train.labels)
        if (counts := labels.bincount()).min() < 2:
            single = shown(folder.classes[counts.argmin()])
            raise DataError(f"{shown(folder.root)}: class {single!r} has one image; training and test need one each")
        train, test = (train.take(index) for index in stratified_split(labels, seed=seed))
    if limit is not None:
        train = train.take(stratified_limit(torch.as_tensor(train.labels), limit, seed))
    return train, test


def load_folder(
    folder: Folder,
    *,
    size: int = 32,
    seed: int = 0,
    limit: int | None = None,
    skip_unreadable: bool = False,
    storage: Storage = AUTO,
    on_step: OnStep | None = None,
) -> Split:
    """The Split of a scanned folder, as `load` gives it."""
    parts = (folder.train, folder.test)
    if not skip_unreadable:  # else what can be read must be known first, so that no class loses all of a part
        parts = _divided(folder, *parts, seed, limit)
    total, before, sets, skipped = sum(len(p.names) for p in parts if p), 0, [], []
    for part in filter(None, parts):
        step = on_step and (lambda done, _, before=before: on_step(before + done, total))
        how = {"size": size, "skip_unreadable": skip_unreadable, "storage": storage, "on_step": step}
        images, left = load_files(folder.root, part.names, part.labels, folder.classes, **how)
        before += len(part.names)
        sets.append(images)
        skipped += left
    if skip_unreadable:
        sets = _divided(folder, sets[0], sets[1] if len(sets) > 1 else None, seed, limit)
    return Split(*sets, tuple(skipped), folder.ignored)


def data_root(root: str | os.PathLike | None = None) -> Path:
    """Where torchvision's sets are: `root`, else $SEMKIT_DATA, else ~/.cache/semkit.

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
    """The set with images of size x size, held by `storage`; itself if they are."""
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
    """The Split of a set by name (shapes, cifar10, cifar100, svhn) or of a folder of class sub-folders.

    Images are resized to size x size; `limit` keeps that many train images, every class in its share; a folder without
    test/ is divided by `seed`. root: where torchvision's sets are (data_root). storage: where the images
    go; large sets go to disk. on_step(done, total): files.
    Raises DataError, with what to do, for whatever cannot be found or read.
    """
    check_size(size)
    if (name := set_name(source)) == "shapes":
        from semkit.images.shapes import shapes

        found = shapes(seed=seed)
    elif name:
        found = _load_torchvision(name, data_root(root), download)
    else:
        how = {"size": size, "seed": seed, "limit": limit, "skip_unreadable": skip_unreadable, "on_step": on_step}
        return load_folder(find_folder(source), storage=storage, **how)
    train = found.train if limit is None else found.train.limit(limit, seed)
    return replace(found, train=resized(train, size, storage), test=resized(found.test, size, storage))
