"""From IMAGES to a protected folder: OUT/images, OUT/report.json, and for noise OUT/noise.safetensors."""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semkit import __version__
from semkit.app import outputs
from semkit.app.outputs import OutputError
from semkit.images.files import output_names, shown
from semkit.images.imageset import ImageSet, check_fraction, stratified_share
from semkit.images.loading import check_size, decode, find_folder, load, readable, resized, set_name
from semkit.images.picture import BYTES_PER_PIXEL, read_image, stored_size, write_png
from semkit.images.pixels import check_seed
from semkit.images.quality import Quality
from semkit.images.storage import AUTO, Storage, blocks, free_memory, zeros
from semkit.nets.lab import Interrupted, Lab, OnStep, as_dict, code
from semkit.nets.models import check_model
from semkit.protections.base import Change, Recipe
from semkit.protections.noise import Noise, save

NOISE = "noise.safetensors"
COMPARED = 20  # files of an interrupted run that tell whether its key is the one that is given now
NATIVE = 32  # the side of every named set's images
SMALL = 1 << 26  # bytes; where less is free, that is not because of one image


def job(on_step: OnStep | None, what: str) -> Callable[[int, int], None] | None:
    """on_step for a job without metrics, as on_step(done, total); asked to stop, it raises Interrupted."""

    def told(done: int, total: int) -> None:
        if on_step(what, done, total, {}):
            raise Interrupted(f"stopped while {what}, {done} of {total}")

    return told if on_step else None


@dataclass(frozen=True, eq=False)
class Originals:
    """The images to protect. images: at the size that nets see; outputs: the names of their PNGs, with '/'.

    native: the set at its own size; for a folder None, as its files are read from `root` when they are needed.
    """

    images: ImageSet
    outputs: tuple[str, ...]
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
    storage: Storage = AUTO,
    on_step: OnStep | None = None,
) -> Originals:
    """The images of `source` that protection covers: a named set's training images, or all of a folder (its train/).

    Raises DataError for what cannot be read.
    """
    check_size(size)
    if set_name(source):
        native = load(source, size=NATIVE, limit=limit, root=root, download=download).train
        return Originals(resized(native, size, storage), named_outputs(native), native)
    told, folder = job(on_step, "reading images"), replace(find_folder(source), test=None)
    names = output_names(folder.train.names)
    folder = readable(folder, told) if skip_unreadable else folder
    [images] = decode(folder, [folder.train.limit(limit)], size, storage=storage, on_step=told)
    named = tuple(names[name] for name in images.files)
    return Originals(images, named, None, folder.root, folder.skipped, folder.ignored)


def _found(
    source: str,
    out: Path,
    *,
    size: int = 32,
    limit: int | None = None,
    root: str | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    hold: str = "auto",
    on_step: OnStep | None = None,
) -> tuple[Originals, dict]:
    """(the images to protect, how they were chosen). Raises DataError, and OutputError if `out` cannot be written to.

    hold: where images are until they are written, "memory", "disk" or "auto"; the others: as of `load_originals`.
    """
    outputs.check_place(source, out)
    how = {"size": size, "limit": limit, "skip_unreadable": skip_unreadable}
    found = load_originals(source, **how, root=root, download=download, storage=Storage(hold, out), on_step=on_step)
    outputs.check_links(out, found.outputs)
    return found, {"source": str(source), **how}


def _record(found: Originals, recipe: Recipe, share: float, seed: int, lab: Lab) -> dict:
    """What OUT depends on, besides how its images were chosen. A fraction is told where it always was."""
    told = as_dict(recipe)
    fraction = {"fraction": share}
    return {
        "semkit": __version__, "code": code(__name__, recipe), "torch": torch.__version__,
        "fingerprint": hashlib.sha256(repr((found.images.fingerprint, found.outputs)).encode()).hexdigest()[:24],
        "recipe": told | fraction if "fraction" in told else told, "seed": seed,
        **({} if "fraction" in told else fraction), **({"method": recipe.method} if recipe.radius is None else {}),
        **(lab.engine.settings() if recipe.net else {}),
    }  # fmt: skip


def _check_images(found: Originals, chosen: Collection[int], recipe: Recipe) -> None:
    """Raises ValueError that names the first image for which memory is short, or of a size that cannot be changed."""
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


def _check_settings(recipe: Recipe, fraction: float, checkpoint_every: float) -> None:
    check_fraction(fraction)
    if not isinstance(checkpoint_every, int | float) or not checkpoint_every >= 0:
        raise ValueError(f"checkpoint_every must be a number of seconds >= 0, got {checkpoint_every!r}")
    if recipe.radius is not None and recipe.radius < 1:
        raise ValueError(f"radius must be 1 level at least to protect 8-bit images, got {recipe.radius:g}")
    if recipe.net:
        check_model(recipe.net)


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
    checkpoint_every: float = 20,
    **reading,
) -> dict:
    """Protect `source`: writes OUT/images/..., OUT/report.json and for noise OUT/noise.safetensors; returns the report.

    Images keep their names (as .png), sizes and modes. Noise is crafted at size x size and fitted to each image's own
    size, where an 8-bit value moves by at most recipe.radius. `fraction` (times the recipe's own) of every class is
    protected, the rest is written unchanged. After a stop or a kill the same call with resume=True goes on to the same
    bytes; the state of a crafting is saved every checkpoint_every seconds. on_start is given the images that are
    protected. reading: size (32), limit, root, download, skip_unreadable and hold ("memory", "disk" or "auto").
    Raises DataError, OutputError or ValueError before anything is written; none of them shows a private key.

        report = sk.protect("PHOTOS", "OUT", sk.craft_recipe("sem", "lesson", radius=8))
    """
    lab, out, seed = lab or Lab(), outputs.output_folder(out), check_seed(seed)
    _check_settings(recipe, fraction, checkpoint_every)
    found, how = _found(source, out, on_step=lab.on_step, **reading)
    share, noisy = fraction * recipe.fraction, recipe.radius is not None
    request = {**_record(found, recipe, share, seed, lab), **how}
    index = stratified_share(found.images.labels, share, seed)
    subset, chosen = found.images.take(index), {i: place for place, i in enumerate(index.tolist())}
    _check_images(found, chosen, recipe)
    unfinished = replace(lab, cache=out / "unfinished")
    changed = partial(recipe.change, subset, seed=seed, lab=unfinished, every=checkpoint_every)
    at_once = None if noisy else changed()  # may refuse, and takes no time
    outputs.check_request(out, request, resume)
    if at_once:
        _check_begun(found, chosen, at_once, out)
    written = [*[NOISE] * noisy, *(f"images/{name}" for name in found.outputs)]
    if not outputs.finished(out, written):
        with outputs.only_run(out, request, resume, lambda: on_start and on_start(subset)):
            made = _write(found, chosen, at_once or changed(), out, lab.on_step)
            outputs.write_record(out / "report.json", {**request, **made})
    return outputs.tidied(out)


def _check_begun(found: Originals, chosen: Mapping[int, int], change: Change, out: Path) -> None:
    """Raises OutputError if files that are there already are not what this key makes of their originals."""
    there = ((i, place) for i, place in chosen.items() if (out / "images" / found.outputs[i]).exists())
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
        levels = zeros(images.images.shape, torch.int8, images.scratch)
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
