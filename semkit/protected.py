"""A protected folder read back: its report, the check of every file, and the images that learners get."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from semkit.data import NAMES, Split, find_folder
from semkit.files import is_image_name, output_names, shown
from semkit.image import UnreadableImage, difference, read_image, working_image
from semkit.originals import OnStep, Originals, job, named_outputs, originals
from semkit.storage import Storage, zeros

REPORTED = {"images", "radius", "size", "limit", "skip_unreadable"}  # what `check` needs of a report


class OutputError(ValueError):
    """An output folder that cannot be used; the message says what to do."""


def read_report(out: str | os.PathLike) -> dict:
    """OUT/report.json; raises OutputError where there is none."""
    path = Path(out) / "report.json"
    if not path.exists():
        raise OutputError(f"{shown(path)} is missing; semkit protect writes it when it is done")
    try:
        report = json.loads(path.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or not REPORTED <= report.keys():
        raise OutputError(f"{shown(path)} is damaged; protect the images again, to another folder")
    return report


def _problems(found: Originals, radius: float, folder: Path, on_step: OnStep | None) -> Iterator[str]:
    told = job(on_step, "checking images")
    for i, name in enumerate(found.outputs):
        path = folder / name
        if not path.exists():
            yield f"{shown(name)}: missing"
        else:
            try:
                if (apart := difference(found.read(i), read_image(path))) > radius:
                    yield f"{shown(name)}: differs by {apart} levels, the radius is {radius:g}"
            except UnreadableImage as error:
                yield str(error)
            except ValueError as error:
                yield f"{shown(name)}: {error}"
        if told:
            told(i + 1, len(found.outputs))
    expected = set(found.outputs)
    present = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    for name in present:
        if is_image_name(name) and name not in expected:
            yield f"{shown(name)}: no original of it"


def check(
    source: str,
    out: str | os.PathLike,
    *,
    radius: float | None = None,
    root: str | None = None,
    on_step: OnStep | None = None,
) -> dict:
    """{"checked": n, "radius": r, "problems": [...], "skipped": [...]}: protected files held against their originals.

    Size, mode, alpha, and |difference| <= radius in 8-bit levels; files that are missing or have no original are
    problems too. radius: the report's unless given. Raises DataError and OutputError for what cannot be read.
    """
    report = read_report(out)
    radius = report["radius"] if radius is None else radius
    how = {name: report[name] for name in ("size", "limit", "skip_unreadable")}
    found = originals(source, **how, root=root, storage=Storage(folder=out), on_step=on_step)
    problems = list(_problems(found, radius, Path(out) / "images", on_step))
    return {"checked": len(found.outputs), "radius": radius, "problems": problems, "skipped": list(found.skipped)}


def protected_split(split: Split, source: str, out: str | os.PathLike) -> Split:
    """`split` with each training image replaced by its protected file in OUT, resized as the originals were.

    The test images stay clean. Raises OutputError if files are missing or OUT protects other images.
    """
    report, train = read_report(out), split.train
    if source not in NAMES:
        names = output_names(find_folder(source).train.names)
        outputs = tuple(names[name] for name in train.files)
    elif len(train) == report["images"]:
        outputs = named_outputs(train)
    else:
        raise OutputError(f"{shown(out)} protects {report['images']} images, these are {len(train)}: use one --limit")
    images = zeros(train.images.shape, torch.uint8, train.scratch)
    for i, name in enumerate(outputs):
        try:
            images[i] = torch.from_numpy(working_image(read_image(Path(out) / "images" / name), images.shape[-1]))
        except UnreadableImage as error:
            raise OutputError(f"{error}; {shown(out)} must hold a protected file for every training image") from None
        # A resize averages, so it keeps the radius but for its rounding.
        if (apart := int((images[i].int() - train.images[i].int()).abs().max())) > report["radius"] + 1:
            raise OutputError(f"{shown(out)} protects other images: {shown(name)} is {apart} levels from its original")
    return replace(split, train=replace(train, images=images, name=f"{train.name} protected"))
