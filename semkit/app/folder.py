"""From images to a protected folder: the noise, the protected files, and the report of both."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from semkit.analysis.study import crafted_noise
from semkit.app.originals import OnStep, Originals
from semkit.app.outputs import begin, finished, reported, requested, write_images
from semkit.app.protected import output_folder
from semkit.images.imageset import ImageSet, check_fraction, stratified_share
from semkit.images.picture import apply_noise
from semkit.images.storage import blocks, zeros
from semkit.nets.lab import Lab
from semkit.nets.models import check_model
from semkit.protections.crafting import CraftRecipe
from semkit.protections.noise import Noise, clipped_fraction, mean_effective, save

NOISE_SIZE = (
    "The noise was crafted at {size} x {size} pixels and resized to the size of each image, within the radius there; "
    "what a trainer who resizes the images still meets is measured by semkit learn IMAGES --protected OUT."
)


def _check_settings(recipe: CraftRecipe, fraction: float, checkpoint_every: float) -> None:
    check_fraction(fraction)
    if not isinstance(checkpoint_every, int | float) or not checkpoint_every >= 0:
        raise ValueError(f"checkpoint_every must be a number of seconds >= 0, got {checkpoint_every!r}")
    if recipe.radius < 1:
        raise ValueError(f"radius must be 1 level at least to protect 8-bit images, got {recipe.radius:g}")
    check_model(recipe.surrogate)


def protect(
    source: str,
    out: str | os.PathLike,
    recipe: CraftRecipe,
    *,
    seed: int = 0,
    fraction: float = 1.0,
    resume: bool = False,
    lab: Lab | None = None,
    on_start: Callable[[ImageSet], object] | None = None,
    checkpoint_every: float = 20,
    **reading,
) -> dict:
    """The report of protecting `source`: OUT/images/..., OUT/noise.safetensors and OUT/report.json are written.

    Images keep their names (as .png), sizes and modes; every 8-bit value moves by at most recipe.radius. Noise is
    crafted at size x size and fitted to the native size. `fraction` of every class is protected, the rest written
    unchanged. Stopped by on_step, by Ctrl-C or by a kill, the same call with resume=True goes on to the same bytes;
    the crafting state is saved every checkpoint_every seconds. on_start is given the images that get noise. reading:
    size (32), limit, root, download, skip_unreadable and hold, as of outputs.requested.
    Raises DataError, OutputError or ValueError before anything is written.
    """
    lab, out = lab or Lab(), output_folder(out)
    on_step = lab.on_step
    _check_settings(recipe, fraction, checkpoint_every)
    found, request = requested(source, out, recipe, seed, on_step=on_step, **reading)
    seed = request["seed"]
    request |= {"fraction": fraction, **lab.engine.settings()}
    chosen = stratified_share(found.images.labels, fraction, seed)
    subset = found.images.take(chosen)
    written = ["noise.safetensors", *(f"images/{name}" for name in found.outputs)]
    created = begin(out, request, resume)
    try:
        if on_start and not finished(out, written):
            on_start(subset)
    except BaseException:
        if created:  # nothing else was made: other settings may be tried, such as those that need less memory
            (out / "run.json").unlink(missing_ok=True)
        raise

    def make() -> dict:
        noise, cost = crafted_noise(
            subset, recipe, seed=seed, lab=replace(lab, cache=out / "unfinished"), checkpoint_every=checkpoint_every
        )  # fmt: skip
        return {**cost, **_write(found, chosen, noise, out, on_step), **_effect(noise, subset)}

    report = reported(out, request, written, make)
    shutil.rmtree(out / "unfinished", ignore_errors=True)  # also where a kill came after the report
    return report


def _effect(noise: Noise, images: ImageSet) -> dict:
    """What the box leaves of the noise, which is what a learner meets."""
    clipped, left = (measure(noise, images.images) for measure in (clipped_fraction, mean_effective))
    return {"clipped_fraction": round(clipped, 4), "mean_effective_noise": round(left, 3)}


def _write(found: Originals, chosen: torch.Tensor, noise: Noise, out: Path, on_step: OnStep | None) -> dict:
    """Writes the noise of all images, 0 for those not chosen, and the images; what the report says of them."""
    levels = noise.levels
    if len(chosen) < len(found.images):
        levels = zeros(found.images.images.shape, torch.int8, found.images.scratch)
        for part in blocks(noise.levels):
            levels[chosen[part]] = noise.levels[part]
    whole = Noise(levels, noise.radius, noise.recipe, found.images.fingerprint, found.images.classes)
    save(whole, out / "noise.safetensors")
    levels, radius = levels.numpy(), noise.radius
    add = lambda i, original: apply_noise(original, levels[i], radius)  # noqa: E731
    told, _ = write_images(found, chosen.tolist(), add, out, noise=levels, on_step=on_step)
    return {**told, "radius": radius, "noise_size": NOISE_SIZE.format(size=levels.shape[-1])}
