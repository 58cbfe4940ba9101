"""A protected folder beside its originals: its report, the check of every file, and the images that learners get."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from semkit.analysis import survival
from semkit.images.files import check_fields, is_image_name, one_line, output_names, read_json, shown
from semkit.images.imageset import ImageSet, Split, Storage, stratified_limit, stratified_share
from semkit.images.loading import check_size, decode, find_folder, limited, load, readable, resized, set_name
from semkit.images.picture import UnreadableImage, difference, read_image, stored_size, working_image
from semkit.images.pixels import check_count, check_name, check_radius, check_seed
from semkit.nets.lab import Interrupted, OnStep
from semkit.protections.methods import PROTECTIONS

# What `check` needs of a report, and of one of images that no radius bounds; what `protect` tells beside it.
NEEDED = {"images": int, "radius": float | int | None, "size": int, "limit": int | None, "skip_unreadable": bool}
UNBOUNDED = {"recipe": dict, "seed": int, "method": str}
TOLD = {
    "protected": int, "unchanged_files": int, "psnr_db": float | int | None, "ssim": float | int | None,
    "seconds": float | int, "held": str, "skipped": list[str], "ignored": list[str],
}  # fmt: skip
TOLD_UNBOUNDED = {"bound": str, "largest_change": int}
NATIVE = 32  # the side of every named set's images
# (i, original i) -> what file i is held against, by how many levels it may differ, and what is said if it does
Judge = Callable[[int, Image.Image], tuple[Image.Image, float, str]]
LEFT_BY_SYSTEMS = ("Thumbs.db", "desktop.ini")
ALIKE = 0.2  # correlation of blocks of pixels: filtered images have more with their originals, other images less


class OutputError(ValueError):
    """An output folder that cannot be used; the message says what to do."""


def job(on_step: OnStep | None, what: str) -> Callable[[int, int], None] | None:
    """on_step for a job without metrics, as on_step(done, total); asked to stop, it raises Interrupted."""

    def told(done: int, total: int) -> None:
        if on_step(what, done, total, {}):
            raise Interrupted(f"stopped while {what}, {done} of {total}")

    return told if on_step else None


@dataclass(frozen=True, eq=False)
class Originals:
    """The images to protect. images: at the size that nets see; outputs: the names of their PNGs, with '/'.

    how: how they were chosen, as run.json has it. native: the set at its own size; for a folder None, as its files are
    read from `root` when they are needed.
    """

    images: ImageSet
    outputs: tuple[str, ...]
    how: dict
    native: ImageSet | None = None
    root: Path = Path()
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def read(self, i: int) -> Image.Image:
        """Image i at its own size. Raises UnreadableImage."""
        if self.native is None:
            return read_image(self.root / self.images.files[i])
        return Image.fromarray(self.native.images[i].permute(1, 2, 0).contiguous().numpy())

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i as it is stored, without decoding it."""
        return stored_size(self.root / self.images.files[i]) if self.native is None else (NATIVE, NATIVE)


def named_outputs(images: ImageSet) -> tuple[str, ...]:
    """The names of a named set's files: class/00000.png."""
    return tuple(f"{images.classes[label]}/{i:05d}.png" for i, label in enumerate(images.labels.tolist()))


def load_originals(
    source: str,
    *,
    size: int = 32,
    limit: int | None = None,
    root: str | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    hold: str = "auto",
    place: str | os.PathLike | None = None,
    on_step: OnStep | None = None,
) -> Originals:
    """The images of `source` that protection covers: a named set's training images, or all of a folder (its train/).

    hold: where their pixels are, "memory", "disk" (that of the folder `place`) or "auto": what fits.
    Raises DataError for what cannot be read.
    """
    size, limit, storage = check_size(size), limit and check_count(limit, "limit", 1), Storage(hold, place)
    how = {"source": str(source), "size": size, "limit": limit, "skip_unreadable": bool(skip_unreadable)}
    if set_name(source):
        native = load(source, size=NATIVE, limit=limit, root=root, download=download).train
        return Originals(resized(native, size, storage), named_outputs(native), how, native)
    told, folder = job(on_step, "reading images"), replace(find_folder(source), test=None)
    names = output_names(folder.train)
    folder = readable(folder, told) if skip_unreadable else folder
    [images] = decode(folder, [limited(folder.train, limit)], size, storage=storage, on_step=told)
    named = tuple(names[name] for name in images.files)
    return Originals(images, named, how, None, folder.root, folder.skipped, folder.ignored)


def read_report(out: str | os.PathLike, *, whole: bool = False) -> dict:
    """OUT/report.json with the fields that `check` needs; whole: with all that `protect` tells.

    Raises OutputError where there is none, or where a field is missing or of another kind.
    """
    path = output_folder(out) / "report.json"
    if not path.exists():
        raise OutputError(f"{shown(path)} is missing; semkit protect writes it when it is done, to its OUT")
    try:
        report = check_fields(read_json(path), {**NEEDED, **(TOLD if whole else {})})
        check_size(report["size"])
        if report["limit"] is not None:
            check_count(report["limit"], "limit", 1)
        if report["radius"] is not None:
            check_radius(report["radius"])
        else:
            check_seed(check_fields(report, {**UNBOUNDED, **(TOLD_UNBOUNDED if whole else {})})["seed"])
            check_name(report["method"], tuple(PROTECTIONS), "method")
    except ValueError as error:
        told = f"{shown(path)} is damaged ({one_line(error)})"
        raise OutputError(f"{told}; protect the images again, to another folder") from None
    return report


def output_folder(out: str | os.PathLike) -> Path:
    """`out` as a Path; raises OutputError for an empty name, which would mean the current folder."""
    if not os.fspath(out):
        raise OutputError("the name of the output is empty: name a folder")
    return Path(out)


def _originals_of(
    report: dict, source: str, out: str | os.PathLike, root: str | None, told: OnStep | None
) -> Originals:
    """The images that the report is about."""
    how = {name: report[name] for name in ("size", "limit", "skip_unreadable")}
    return load_originals(source, **how, root=root, place=out, on_step=told)


def _judge(report: dict, found: Originals, radius: float | None, key: str | None) -> Judge:
    """A file must be within the radius, or what filters make of its original; the original itself if it was left out.

    Filters cannot be judged without the key. Raises OutputError if the report does not say how files were made.
    """
    seed, change = report.get("seed"), None
    try:
        protection = PROTECTIONS[report["method"]] if radius is None else None
        told = dict(report.get("recipe", {}))
        fraction = told.pop("fraction", 1) * report.get("fraction", 1)  # in the recipe until 0.6
        chosen = stratified_share(found.images.labels, fraction, seed)
        recipe = protection and protection.recipe("quick", **told)
        if recipe and recipe.radius is not None:
            raise ValueError(f"{report['method']} has a radius")
    except (TypeError, ValueError, OverflowError):
        raise OutputError("report.json is damaged; protect the images again, to another folder") from None
    places = {i: place for place, i in enumerate(chosen.tolist())}
    if key is not None:
        recipe = protection.recipe("quick", **{**told, "key": key})
    if recipe and (key is not None or not any(option.private for option in protection.options)):
        change = recipe.change(found.images.take(chosen), seed=seed)

    def judge(i: int, original: Image.Image) -> tuple[Image.Image, float, str]:
        if i not in places:
            return original, 0, ", and was to be left as it was"
        if radius is not None:
            return original, radius, f", the radius is {radius:g}"
        if change is None:
            return original, math.inf, ""
        return change.picture(places[i], original), 0, " from its original filtered with this key"

    return judge


def _examined(found: Originals, judge: Judge, folder: Path, on_step: OnStep | None) -> tuple[list[str], int]:
    """Compare every file with its original: (what is wrong, how many files have the pixels of their originals)."""
    problems, unchanged, told = [], 0, job(on_step, "checking images")
    for i, name in enumerate(found.outputs):
        path = folder / name
        if not path.exists():
            problems.append(f"{shown(name)}: missing")
        else:
            try:
                original, protected = found.read(i), read_image(path)
                apart, (wanted, most, words) = difference(original, protected), judge(i, original)
                unchanged += apart == 0
                if wanted is not original:
                    apart = difference(wanted, protected)
                if apart > most:
                    problems.append(f"{shown(name)}: differs by {apart} levels{words}")
            except UnreadableImage as error:
                problems.append(str(error))
            except ValueError as error:
                problems.append(f"{shown(name)}: {error}")
        if told:
            told(i + 1, len(found.outputs))
    return [*problems, *(f"{shown(name)}: no original of it" for name in _strays(folder, found.outputs))], unchanged


def _strays(folder: Path, outputs: Sequence[str]) -> Iterator[str]:
    """Files below the folder that are not among the outputs, of any name, because a trainer may read other formats.

    Links to folders too, but not what operating systems leave in folders.
    """
    expected = {parent for name in outputs for parent in (name, *map(str, PurePosixPath(name).parents))}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts) and not is_image_name(path.name)
        passed_over = hidden or path.name in LEFT_BY_SYSTEMS
        if not passed_over and name.as_posix() not in expected and (path.is_symlink() or not path.is_dir()):
            yield name.as_posix()


def check(
    source: str,
    out: str | os.PathLike,
    *,
    radius: float | None = None,
    key: str | None = None,
    root: str | None = None,
    on_step: OnStep | None = None,
) -> dict:
    """{"checked": n, "unchanged": n, "radius": r, "problems": [...], "skipped": [...]}: files compared with originals.

    Size, mode, alpha, and |difference| <= radius in 8-bit levels, 0 for images that were to be left as they were; files
    that are missing or have no original are problems too. unchanged: how many files have the pixels of their originals.
    radius: the report's unless given. Filtered files have none, None: with the key every value must be that of the
    filtered original, without it the values of filtered files are not checked.
    Raises DataError and OutputError for what cannot be read, and ValueError for a radius or a key that does not apply.

        sk.check("PHOTOS", "OUT")["problems"]  # [] if every file is as it should be
    """
    report = read_report(out)
    filtered = report["radius"] is None
    if filtered and radius is not None:
        raise ValueError(f"{PROTECTIONS[report['method']].bound}: leave the radius out")
    if key is not None and not filtered:
        raise ValueError(f"{shown(out)} was not filtered: leave the key out")
    if not filtered:
        radius = check_radius(report["radius"] if radius is None else radius)
    found = _originals_of(report, source, out, root, on_step)
    problems, unchanged = _examined(found, _judge(report, found, radius, key), Path(out) / "images", on_step)
    return {
        "checked": len(found.outputs), "unchanged": unchanged, "radius": radius, "problems": problems,
        "skipped": list(found.skipped),
    }  # fmt: skip


def likeness(images: torch.Tensor, others: torch.Tensor) -> float:
    """The mean over images uint8 [N,C,H,W] of the correlation of their block means with those of `others`.

    4 x 4 blocks of every channel, less the channel's mean: a filter of a few pixels leaves them as they were, nearly.
    """
    means = (F.adaptive_avg_pool2d(x.float(), 4) for x in (images, others))
    centred = ((x - x.mean((2, 3), keepdim=True)).flatten(1) for x in means)
    return float(F.cosine_similarity(*centred).mean())


def protected_split(split: Split, source: str, out: str | os.PathLike) -> Split:
    """`split` with each training image replaced by its protected file in OUT, resized as the originals were.

    The test images stay clean. Raises OutputError if files are missing or OUT protects other images.
    """
    report, train = read_report(out), split.train
    if not set_name(source):
        names = output_names(find_folder(source).train)
        outputs = tuple(names[name] for name in train.files)
    elif len(train) == report["images"]:
        outputs = named_outputs(train)
    else:
        raise OutputError(f"{shown(out)} protects {report['images']} images, these are {len(train)}: use one --limit")
    return replace(split, train=_protected(train, outputs, out, report))


def _protected(train: ImageSet, outputs: Sequence[str], out: str | os.PathLike, report: dict) -> ImageSet:
    """The set with each image replaced by its protected file, of the name in `outputs`. Raises OutputError."""
    images = train.zeros()
    for i, name in enumerate(outputs):
        try:
            images[i] = torch.from_numpy(working_image(read_image(Path(out) / "images" / name), images.shape[-1]))
        except UnreadableImage as error:
            needed = f"{shown(out)} must hold a protected file for every training image"
            hint = "" if report["limit"] is None else f": protect without --limit {report['limit']}"
            raise OutputError(f"{error}; {needed}{hint}") from None
        # A resize averages, so it keeps the radius but for its rounding.
        apart = int((images[i].int() - train.images[i].int()).abs().max())
        if report["radius"] is not None and apart > report["radius"] + 1:
            raise OutputError(f"{shown(out)} protects other images: {shown(name)} is {apart} levels from its original")
    if report["radius"] is None and (like := likeness(images, train.images)) < ALIKE:
        raise OutputError(f"{shown(out)} protects other images: the correlation with the originals is {like:.2f}")
    return replace(train, images=images, name=f"{train.name} protected")


def inspected(
    source: str, out: str | os.PathLike, names: Sequence[str], *, root: str | None = None, on_step: OnStep | None = None
) -> tuple[dict, pd.DataFrame]:
    """(noise_numbers of OUT, and images, looked_at and radius; survival_rows of it after these countermeasures).

    Where there are many images, of survival.looked_at of them, every class in its share.
    Raises DataError and OutputError for what cannot be read, and ValueError for countermeasures without survival.
    """
    report = read_report(out)
    found = _originals_of(report, source, out, root, on_step)
    n, radius = max(survival.looked_at(report["size"]), len(found.images.classes)), report["radius"]
    chosen = stratified_limit(found.images.labels, n)
    clean = found.images.take(chosen)
    protected = _protected(clean, [found.outputs[i] for i in chosen.tolist()], out, report)
    numbers = survival.noise_numbers(clean, protected, radius)
    told = {"images": len(found.outputs), "looked_at": len(clean), "radius": radius, **numbers}
    return told, survival.survival_rows(clean, protected, names)
