"""A protected folder beside its originals: the check of every file, and the images that learners get."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from semkit.analysis import survival
from semkit.app.folder import Originals, job, load_originals, named_outputs
from semkit.app.outputs import OutputError, read_report
from semkit.images.files import is_image_name, output_names, shown
from semkit.images.imageset import ImageSet, stratified_limit, stratified_share
from semkit.images.loading import Split, find_folder, set_name
from semkit.images.picture import UnreadableImage, read_image, working_image
from semkit.images.pixels import check_radius
from semkit.images.quality import difference
from semkit.images.storage import Storage, zeros
from semkit.nets.lab import OnStep
from semkit.protections.methods import PROTECTIONS

# (i, largest difference from the original in levels, original, protected) -> what is wrong with file i, if anything
Judge = Callable[[int, int, Image.Image, Image.Image], str | None]
LEFT_BY_SYSTEMS = ("Thumbs.db", "desktop.ini")
ALIKE = 0.2  # correlation of blocks of pixels: filtered images have more with their originals, other images less


def _within(radius: float) -> Judge:
    """The judge of noise: no value may differ by more than the radius."""

    def judge(i: int, apart: int, original: Image.Image, protected: Image.Image) -> str | None:
        return f"differs by {apart} levels, the radius is {radius:g}" if apart > radius else None

    return judge


def _as_made(report: dict, found: Originals, key: str | None) -> Judge:
    """The judge of filters: a file must be what the recipe makes of its original, or the original if it was left out.

    Without the key only the latter can be judged. Raises OutputError if the report does not say how files were made.
    """
    protection, seed = PROTECTIONS[report["method"]], report["seed"]
    try:
        recipe = protection.recipe("quick", **report["recipe"])
        if recipe.radius is not None:
            raise ValueError(f"{report['method']} has a radius")
        chosen = stratified_share(found.images.labels, recipe.fraction * report.get("fraction", 1), seed)
    except (TypeError, ValueError, OverflowError):
        raise OutputError("report.json is damaged; protect the images again, to another folder") from None
    places = {i: place for place, i in enumerate(chosen.tolist())}
    change = None
    if key is not None:
        recipe = protection.recipe("quick", **{**report["recipe"], "key": key})
    if key is not None or not any(option.private for option in protection.options):
        change = recipe.change(found.images.take(chosen), seed=seed)

    def judge(i: int, apart: int, original: Image.Image, protected: Image.Image) -> str | None:
        if i not in places:
            return f"differs by {apart} levels, and was to be left as it was" if apart else None
        if change is None:
            return None
        apart = difference(change.picture(places[i], original), protected)
        return f"differs by {apart} levels from its original filtered with this key" if apart else None

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
                apart = difference(original, protected)
                unchanged += apart == 0
                if problem := judge(i, apart, original, protected):
                    problems.append(f"{shown(name)}: {problem}")
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

    Size, mode, alpha, and |difference| <= radius in 8-bit levels; files that are missing or have no original are
    problems too. unchanged: how many files have the pixels of their originals. radius: the report's unless given.
    Filtered files have none, None: with the key every value must be that of the filtered original, without it sizes,
    modes, alpha and names are checked, and what was left unprotected.
    Raises DataError and OutputError for what cannot be read, and ValueError for a radius or a key that does not apply.
    """
    report = read_report(out)
    filtered = report["radius"] is None
    if filtered and radius is not None:
        raise ValueError(f"{PROTECTIONS[report['method']].bound}: leave the radius out")
    if key is not None and not filtered:
        raise ValueError(f"{shown(out)} was not filtered: leave the key out")
    if not filtered:
        radius = check_radius(report["radius"] if radius is None else radius)
    how = {name: report[name] for name in ("size", "limit", "skip_unreadable")}
    found = load_originals(source, **how, root=root, storage=Storage(folder=out), on_step=on_step)
    judge = _as_made(report, found, key) if filtered else _within(radius)
    problems, unchanged = _examined(found, judge, Path(out) / "images", on_step)
    return {
        "checked": len(found.outputs), "unchanged": unchanged, "radius": radius, "problems": problems,
        "skipped": list(found.skipped),
    }  # fmt: skip


def likeness(images: torch.Tensor, others: torch.Tensor) -> float:
    """The mean over images uint8 [N,C,H,W] of the correlation of their block means with those of `others`.

    4 x 4 blocks of every channel, less the channel's mean: a filter of a few pixels leaves them as they were, nearly.
    """

    def blocks(x: torch.Tensor) -> torch.Tensor:
        means = F.adaptive_avg_pool2d(x.float(), 4)
        return (means - means.mean((2, 3), keepdim=True)).flatten(1)

    return float(F.cosine_similarity(blocks(images), blocks(others)).mean())


def protected_split(split: Split, source: str, out: str | os.PathLike) -> Split:
    """`split` with each training image replaced by its protected file in OUT, resized as the originals were.

    The test images stay clean. Raises OutputError if files are missing or OUT protects other images.
    """
    report, train = read_report(out), split.train
    if not set_name(source):
        names = output_names(find_folder(source).train.names)
        outputs = tuple(names[name] for name in train.files)
    elif len(train) == report["images"]:
        outputs = named_outputs(train)
    else:
        raise OutputError(f"{shown(out)} protects {report['images']} images, these are {len(train)}: use one --limit")
    return replace(split, train=_protected(train, outputs, out, report))


def _protected(train: ImageSet, outputs: Sequence[str], out: str | os.PathLike, report: dict) -> ImageSet:
    """The set with each image replaced by its protected file, of the name in `outputs`. Raises OutputError."""
    images = zeros(train.images.shape, torch.uint8, train.scratch)
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
    source: str,
    out: str | os.PathLike,
    names: Sequence[str],
    *,
    root: str | None = None,
    on_step: OnStep | None = None,
) -> tuple[dict, pd.DataFrame]:
    """(noise_numbers of OUT, and images, looked_at and radius; survival_rows of it after these countermeasures).

    Where there are many images, of survival.looked_at of them, every class in its share.
    Raises DataError and OutputError for what cannot be read, and ValueError for countermeasures without survival.
    """
    report = read_report(out)
    how = {name: report[name] for name in ("size", "limit", "skip_unreadable")}
    found = load_originals(source, **how, root=root, storage=Storage(folder=out), on_step=on_step)
    n, radius = max(survival.looked_at(report["size"]), len(found.images.classes)), report["radius"]
    chosen = stratified_limit(found.images.labels, n)
    clean = found.images.take(chosen)
    protected = _protected(clean, [found.outputs[i] for i in chosen.tolist()], out, report)
    numbers = survival.noise_numbers(clean, protected, radius)
    told = {"images": len(found.outputs), "looked_at": len(clean), "radius": radius, **numbers}
    return told, survival.survival_rows(clean, protected, names)
