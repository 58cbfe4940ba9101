"""From images to a folder of them filtered class by class (CUDA). Nothing that is written holds the key."""

import os
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from semkit import __version__
from semkit.commands.originals import OnStep, Originals, job, originals
from semkit.commands.protect import as_json, check_place, check_request
from semkit.commands.protected import OutputError, read_report
from semkit.files import atomic_write, remove_leftovers, shown
from semkit.image import read_image, write_png
from semkit.imageset import stratified_share
from semkit.neighbours.convolve import ClassFilters, check_kernel, convolve_picture
from semkit.quality import Quality
from semkit.storage import Storage
from semkit.study import as_dict
from semkit.study import key as hashed

UNBOUNDED = "no radius bounds a convolution: a value may move by any number of levels"
COMPARED = 20  # files of an interrupted run that tell whether the key is the one it was begun with


def protect_by_filters(
    source: str,
    out: str | os.PathLike,
    recipe: ClassFilters,
    key: str,
    *,
    seed: int = 0,
    size: int = 32,
    limit: int | None = None,
    root: str | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    hold: str = "auto",
    resume: bool = False,
    on_step: OnStep | None = None,
) -> dict:
    """The report of filtering `source`: OUT/images/... and OUT/report.json are written.

    Images keep their names (as .png), sizes and modes, and are filtered at their own size, each by the filter that the
    key gives its class; recipe.fraction of every class, chosen by the seed, the rest is written unchanged. Stopped by
    on_step, by Ctrl-C or by a kill, the same call with resume=True goes on to the same bytes. size: to which nets will
    resize them. hold: where they are meanwhile (storage.Storage).
    Raises DataError, OutputError or ValueError, none of which repeats the key, before anything is written.
    """
    out = Path(out)
    check_place(source, out)
    how = {"size": size, "limit": limit, "skip_unreadable": skip_unreadable}
    found = originals(source, **how, root=root, download=download, storage=Storage(hold, out), on_step=on_step)
    filters = recipe.filters(key, len(found.images.classes))
    chosen = stratified_share(found.images.labels, recipe.fraction, seed).tolist()
    request = {
        "semkit": __version__, "torch": torch.__version__, "source": str(source), "method": "cuda",
        "fingerprint": hashed(found.images.fingerprint, found.outputs), "recipe": as_dict(recipe), "seed": seed, **how,
    }  # fmt: skip
    _check_sizes(found, chosen, recipe.kernel)
    check_request(out, request, resume)
    _check_begun(found, chosen, filters, out)
    if not (out / "report.json").exists():
        atomic_write(out / "run.json", as_json(request))
        began = time.monotonic()
        quality = _write_images(found, set(chosen), filters, out / "images", on_step)
        remove_leftovers(out, newer=out / "run.json")
        made = {
            "images": len(found.outputs), "protected": len(chosen), "classes": list(found.images.classes),
            "radius": None, "bound": UNBOUNDED, "largest_change": quality.largest, "held": found.images.held,
            "seconds": round(time.monotonic() - began, 1), **quality.report(),
            "skipped": list(found.skipped), "ignored": list(found.ignored),
        }  # fmt: skip
        del made["after_resize_to_working_size"]  # of noise that is added
        atomic_write(out / "report.json", as_json({**request, **made}))
    return read_report(out)


def _check_sizes(found: Originals, chosen: list[int], kernel: int) -> None:
    """Raises ValueError, with the name, for the first image to be filtered that is smaller than the kernel."""
    for i in chosen:
        try:
            check_kernel(kernel, *found.size(i))
        except ValueError as error:
            raise ValueError(f"{shown(found.outputs[i])}: {error}") from None


def _check_begun(found: Originals, chosen: list[int], filters: torch.Tensor, out: Path) -> None:
    """Raises OutputError if files that are there already are not what this key makes of their originals."""
    there = (i for i in chosen if (out / "images" / found.outputs[i]).exists())
    for i in islice(there, COMPARED):
        wanted = convolve_picture(found.read(i), filters[found.images.labels[i]])
        if not np.array_equal(np.asarray(wanted), np.asarray(read_image(out / "images" / found.outputs[i]))):
            raise OutputError(f"the output {shown(out)} was begun with another key; name another folder")


def _write_images(
    found: Originals, chosen: set[int], filters: torch.Tensor, folder: Path, on_step: OnStep | None
) -> Quality:
    """Writes every image, the chosen ones filtered; the Quality of those."""
    quality, told = Quality(len(chosen)), job(on_step, "writing images")
    for i, name in enumerate(found.outputs):
        original = protected = found.read(i)
        if i in chosen:
            protected = convolve_picture(original, filters[found.images.labels[i]])
            quality.add(original, protected)
        write_png(protected, folder / name)
        if told:
            told(i + 1, len(found.outputs))
    return quality
