"""From IMAGES to a folder of results: OUT/run.json before the work, and for protected images OUT/report.json after it.

A protected folder holds OUT/images, and for noise OUT/noise.safetensors.
"""

import hashlib
import json
import os
import posixpath
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from semkit import __version__
from semkit.app.checking import Originals, OutputError, job, load_originals, output_folder, read_report
from semkit.images.files import atomic_write, check_fields, lock, one_line, read_json, remove_leftovers, shown
from semkit.images.imageset import ImageSet, blocks, free_memory, stratified_share
from semkit.images.loading import find_folder, set_name
from semkit.images.picture import BYTES_PER_PIXEL, Quality, read_image, write_png
from semkit.images.pixels import check_fraction, check_seed
from semkit.nets.lab import Lab, OnStep, as_dict, code
from semkit.nets.models import fresh
from semkit.protections.base import Change, Recipe
from semkit.protections.noise import Noise, save

NOISE = "noise.safetensors"
RESULTS = (  # what commands write to OUT
    "rows.csv", "table.md", "figure.png", "noise.csv", "losses.csv", "rises.csv", "bench.json", "numbers.json",
    "speed.json",
)  # fmt: skip
LOCK = ".semkit-lock"  # in OUT, locked while a run works there
GROWING = ("methods", "radii", "countermeasures")  # a sweep may have more of them the next time
COMPARED = 20  # files of an interrupted run that tell whether its key is the one that is given now
SMALL = 1 << 26  # bytes; where less is free, that is not because of one image


def check_place(source: str | None, out: Path) -> None:
    """Raises OutputError if `out` is no folder, or if it and the images, where there are some, lie in each other."""
    if source is not None and not set_name(source):
        inside = Path(os.path.realpath(out))  # resolve() may raise on a link loop
        if any(inside == at or at in inside.parents or inside in at.parents for at in _real_folders(source)):
            raise OutputError(f"the output {shown(out)} and the images {shown(source)} lie in each other; name another")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"the output {shown(out)} is a {'file' if out.exists() else 'broken link'}; name a folder")


def check_clean(source: str) -> None:
    """Raises ValueError for the images of a protected folder, unless they have test images of their own."""
    at = Path(os.path.realpath(source))
    out = at.parent if at.name == "images" else at
    with suppress(OutputError):  # no folder that semkit protected
        if not set_name(source) and read_report(out) and not (out != at and find_folder(source).test):
            raise ValueError(f"{shown(source)} is protected, test images too: learn IMAGES --protected {shown(out)}")


def _real_folders(source: str) -> set[Path]:
    """`source` and all folders with images of it, wherever links lead."""
    found = find_folder(source)
    names = chain.from_iterable(found.parts)
    return {Path(os.path.realpath(path)) for path in {found.root, *((found.root / name).parent for name in names)}}


def check_links(out: Path, outputs: Iterable[str]) -> None:
    """Raises OutputError if a folder that will be written to is a link out of `out`, perhaps to originals."""
    inside = Path(os.path.realpath(out))
    images = {out / "images" / posixpath.dirname(name) for name in outputs}
    for folder in sorted({out / "unfinished", *images}):
        if inside not in Path(os.path.realpath(folder)).parents:
            raise OutputError(f"{shown(folder)} is a link out of {shown(out)}: remove it, or name another folder")


@contextmanager
def only_run(out: Path, request: dict, resume: bool, start: Callable[[], object]) -> Iterator[None]:
    """Lock OUT, call start() and write OUT/run.json; the lock is held until the block ends.

    Raises OutputError if another process holds the lock, and as check_request.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "ab") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise OutputError(f"another run is at work on the output {shown(out)}; wait until it is done") from None
        except OSError:  # a file system without locks
            pass
        try:
            check_request(out, request, resume)  # again, because another run may have been here meanwhile
            start()
            write_record(out / "run.json", request)
            (out / "report.json").unlink(missing_ok=True)  # of a finished run of which files are missing
            yield
        finally:
            with suppress(OSError):  # on Windows it is open, and remove_leftovers removes it
                os.unlink(file.name)


def check_request(out: Path, request: dict, resume: bool) -> None:
    """Raises OutputError unless `out` is free, or holds what this request began and `resume` is asked for."""
    if not (out / "run.json").exists():
        # Hidden files are no one's work: a kill may leave one of ours.
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise OutputError(f"the output {shown(out)} is not empty; name another folder")
        return
    _check_same(out, request)
    if not resume:
        raise OutputError(f"the output {shown(out)} exists; --resume continues it, or name another folder")


def claim(out: Path, request: dict) -> None:
    """Write OUT/run.json, the settings of the rows, the table and the figure that are about to be made.

    Raises OutputError if `out` has some that are of other settings, fewer methods, radii and countermeasures excepted,
    or of no known ones. Finished runs, in OUT/runs, are known by themselves.
    """
    request = json.loads(json.dumps(request))
    if (out / "run.json").exists():
        _check_same(out, request, GROWING)
    elif not (out / "runs").is_dir() and (there := [name for name in RESULTS if (out / name).exists()]):
        raise OutputError(f"the output {shown(out)} has a {there[0]} that is not of this command; name another folder")
    write_record(out / "run.json", request)
    remove_leftovers(out)


def _check_same(out: Path, request: dict, growing: Collection[str] = ()) -> None:
    """Raises OutputError unless OUT/run.json is that of the request, wherever its images are, or has fewer of some."""
    run = out / "run.json"
    try:
        begun = check_fields(read_json(run), {})
    except ValueError as error:
        raise OutputError(f"{shown(run)} is damaged ({one_line(error)}); name another folder") from None

    def agrees(name: str, now) -> bool:
        before = begun.get(name)
        return before == now or (name in growing and isinstance(before, list) and all(one in now for one in before))

    differing = [name for name, now in request.items() if name != "source" and not agrees(name, now)]
    if differing:
        what = ", ".join(differing).replace("_", " ").replace("fingerprint", "images")
        raise OutputError(f"the output {shown(out)} was begun with other settings ({what}); name another folder")


def write_record(path: Path, values: dict) -> None:
    """Write OUT/run.json or OUT/report.json, whole or not at all."""
    atomic_write(path, json.dumps(values, indent=1, allow_nan=False).encode())


def tidied(out: Path) -> dict:
    """Remove what only an unfinished run needs, and return OUT/report.json; raises OutputError as read_report."""
    shutil.rmtree(out / "unfinished", ignore_errors=True)  # a kill may have come after the report
    remove_leftovers(out, age=0)
    return read_report(out, whole=True)


def _record(found: Originals, recipe: Recipe, fraction: float, seed: int, lab: Lab) -> dict:
    """What OUT depends on."""
    beside = {} if recipe.radius is not None else {"method": recipe.method}
    print_of = hashlib.sha256(repr((found.images.fingerprint, found.outputs)).encode()).hexdigest()[:24]
    return {
        "semkit": __version__, "code": code(__name__, recipe), "torch": torch.__version__, "fingerprint": print_of,
        "recipe": as_dict(recipe), "seed": seed, "fraction": fraction, **beside,
        **(lab.engine.settings() if recipe.net else {}), **found.how,
    }  # fmt: skip


def _check_images(found: Originals, chosen: Collection[int], recipe: Recipe) -> None:
    """Raises ValueError for images that the net cannot take, and with the first that memory or the recipe cannot."""
    if recipe.net:
        fresh(recipe, found.images)
    free = free_memory()
    for i, name in enumerate(found.outputs):
        width, height = found.size(i)
        if free is not None and (needed := width * height * BYTES_PER_PIXEL) > max(free, SMALL):
            raise OutputError(
                f"{shown(name)} of {width} x {height} pixels takes {needed / 1e9:.1f} GB of memory to protect, "
                f"{free / 1e9:.1f} GB are free: make it smaller or leave it out"
            )
        try:
            if i in chosen:
                recipe.check_size(width, height)
        except ValueError as error:
            raise ValueError(f"{shown(name)}: {error}") from None


def _check_recipe(recipe: Recipe) -> None:
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be one as sk.craft_recipe('sem') gives it, got {recipe!r:.40}")
    if recipe.radius is not None and recipe.radius < 1:
        raise ValueError(f"radius must be 1 level at least to protect 8-bit images, got {recipe.radius:g}")


def protect(
    source: str,
    out: str | os.PathLike,
    recipe: Recipe,
    *,
    seed: int = 0,
    fraction: float = 1.0,
    resume: bool = False,
    lab: Lab | None = None,
    on_start: Callable[[ImageSet], object] | None = None,
    **reading,
) -> dict:
    """Protect `source`: writes OUT/images/..., OUT/report.json and for noise OUT/noise.safetensors; returns the report.

    Images keep their names (as .png), sizes and modes. Noise is crafted at size x size and fitted to each image's own
    size, where an 8-bit value moves by at most recipe.radius. `fraction` of every class is protected,
    the rest is written unchanged. After a stop or a kill the same call with resume=True goes on to the same bytes.
    on_start is given the images that are protected.
    reading: size (32), limit, root, download, skip_unreadable and hold ("memory", "disk" or "auto").
    Raises DataError, OutputError or ValueError before anything is written; none of them shows a private key.

        report = sk.protect("PHOTOS", "OUT", sk.craft_recipe("sem", "lesson", radius=8))
    """
    out, seed, fraction = output_folder(out), check_seed(seed), check_fraction(fraction)
    lab = replace(lab or Lab(), cache=out / "unfinished")
    _check_recipe(recipe)
    check_place(source, out)
    found = load_originals(source, place=out, on_step=lab.on_step, **reading)
    check_links(out, found.outputs)
    noisy, request = recipe.radius is not None, _record(found, recipe, fraction, seed, lab)
    chosen = {i: place for place, i in enumerate(stratified_share(found.images.labels, fraction, seed).tolist())}
    subset = found.images.take(list(chosen))
    _check_images(found, chosen, recipe)
    changed = partial(recipe.change, subset, seed=seed, lab=lab)
    at_once = None if noisy else changed()  # may refuse, and takes no time
    check_request(out, request, resume)
    _check_begun(found, chosen, at_once, out)
    written = ["report.json", *[NOISE] * noisy, *(f"images/{name}" for name in found.outputs)]
    if not all((out / name).exists() for name in written):
        with only_run(out, request, resume, lambda: on_start and on_start(subset)):
            made = _write(found, chosen, at_once or changed(), out, lab.on_step)
            write_record(out / "report.json", {**request, **made})
    return tidied(out)


def _check_begun(found: Originals, chosen: Mapping[int, int], change: Change | None, out: Path) -> None:
    """Raises OutputError if files that are there already are not what a filter's key makes of their originals."""
    there = ((i, place) for i, place in chosen.items() if change and (out / "images" / found.outputs[i]).exists())
    for i, place in islice(there, COMPARED):
        wanted, held = change.picture(place, found.read(i)), read_image(out / "images" / found.outputs[i])
        if not np.array_equal(np.asarray(wanted), np.asarray(held)):
            raise OutputError(f"the output {shown(out)} was begun with another key; name another folder")


def _write(found: Originals, chosen: Mapping[int, int], change: Change, out: Path, on_step: OnStep | None) -> dict:
    """Write the noise, if any, and the images; return what the report says of them."""
    began = time.monotonic()
    if change.noise:
        save(_of_all(change.noise, list(chosen), found.images), out / NOISE)
    quality = _write_images(found, chosen, change, out, on_step)
    told = quality.report()
    if not change.noise:
        del told["after_resize_to_working_size"]  # of noise that is added
        told |= {"largest_change": quality.largest, "seconds": round(time.monotonic() - began, 1)}
    return {
        **change.told, "images": len(found.outputs), "protected": len(chosen), "classes": list(found.images.classes),
        "held": found.images.held, **told, "skipped": list(found.skipped), "ignored": list(found.ignored),
    }  # fmt: skip


def _of_all(noise: Noise, chosen: Sequence[int], images: ImageSet) -> Noise:
    """The noise of all images: that of the chosen ones, 0 for the others."""
    levels = noise.levels
    if len(chosen) < len(images):
        levels = images.zeros(dtype=torch.int8)
        for part in blocks(noise.levels):
            levels[chosen[part]] = noise.levels[part]
    return Noise(levels, noise.radius, noise.recipe, images.fingerprint, images.classes)


def _write_images(
    found: Originals, chosen: Mapping[int, int], change: Change, out: Path, on_step: OnStep | None
) -> Quality:
    """Write every image to OUT/images, the chosen ones changed, the others as they are; return their Quality."""
    quality, told = Quality(len(chosen)), job(on_step, "writing images")
    for i, name in enumerate(found.outputs):
        try:
            original, place = found.read(i), chosen.get(i)
            written = original if place is None else change.picture(place, original)
            write_png(written, out / "images" / name)
            if place is not None:
                quality.add(original, written, change.noise and change.noise.levels[place].numpy())
        except MemoryError:
            raise MemoryError(f"{shown(name)}, {' x '.join(map(str, found.size(i)))} pixels") from None
        if told:
            told(i + 1, len(found.outputs))
    return quality
