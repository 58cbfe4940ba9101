"""From images to a folder of them filtered class by class (CUDA). Nothing that is written holds the key."""

import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from semkit.app.originals import OnStep, Originals
from semkit.app.outputs import begin, reported, requested, write_images
from semkit.app.protected import OutputError, output_folder
from semkit.images.files import shown
from semkit.images.imageset import stratified_share
from semkit.images.picture import read_image
from semkit.protections.cuda import ClassFilters, check_kernel, convolve_picture

Filter = Callable[[int, Image.Image], Image.Image]  # (place, original) -> filtered
UNBOUNDED = "no radius bounds a convolution: a value may move by any number of levels"
COMPARED = 20  # files of an interrupted run that tell whether the key is the one it was begun with


def protect_by_filters(
    source: str,
    out: str | os.PathLike,
    recipe: ClassFilters,
    key: str,
    *,
    seed: int = 0,
    resume: bool = False,
    on_step: OnStep | None = None,
    **reading,
) -> dict:
    """The report of filtering `source`: OUT/images/... and OUT/report.json are written.

    Images keep their names (as .png), sizes and modes, and are filtered at their own size, each by the filter that the
    key gives its class; recipe.fraction of every class, chosen by the seed, the rest is written unchanged. Stopped by
    on_step, by Ctrl-C or by a kill, the same call with resume=True goes on to the same bytes. reading: size (32), to
    which nets will resize them, limit, root, download, skip_unreadable and hold, as of outputs.requested.
    Raises DataError, OutputError or ValueError, none of which repeats the key, before anything is written.
    """
    out = output_folder(out)
    found, request = requested(source, out, recipe, seed, on_step=on_step, **reading)
    seed = request["seed"]
    request |= {"method": "cuda"}
    filters = recipe.filters(key, len(found.images.classes))
    filtered = lambda i, original: convolve_picture(original, filters[found.images.labels[i]])  # noqa: E731
    chosen = stratified_share(found.images.labels, recipe.fraction, seed).tolist()
    _check_sizes(found, chosen, recipe.kernel)
    begin(out, request, resume)
    _check_begun(found, chosen, filtered, out)
    written = [f"images/{name}" for name in found.outputs]
    return reported(out, request, written, lambda: _write(found, chosen, filtered, out, on_step))


def _write(found: Originals, chosen: list[int], filtered: Filter, out: Path, on_step: OnStep | None) -> dict:
    """Writes the images, the chosen ones filtered; what the report says of them."""
    began = time.monotonic()
    told, quality = write_images(found, chosen, filtered, out, on_step=on_step)
    del told["after_resize_to_working_size"]  # of noise that is added
    seconds = round(time.monotonic() - began, 1)
    return {**told, "radius": None, "bound": UNBOUNDED, "largest_change": quality.largest, "seconds": seconds}


def _check_sizes(found: Originals, chosen: list[int], kernel: int) -> None:
    """Raises ValueError, with the name, for the first image to be filtered that is smaller than the kernel."""
    for i in chosen:
        try:
            check_kernel(kernel, *found.size(i))
        except ValueError as error:
            raise ValueError(f"{shown(found.outputs[i])}: {error}") from None


def _check_begun(found: Originals, chosen: list[int], filtered: Filter, out: Path) -> None:
    """Raises OutputError if files that are there already are not what this key makes of their originals."""
    there = (i for i in chosen if (out / "images" / found.outputs[i]).exists())
    for i in islice(there, COMPARED):
        wanted = filtered(i, found.read(i))
        if not np.array_equal(np.asarray(wanted), np.asarray(read_image(out / "images" / found.outputs[i]))):
            raise OutputError(f"the output {shown(out)} was begun with another key; name another folder")
