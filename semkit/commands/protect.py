"""From images to a protected folder: the noise, the protected files, and the report of both."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from semkit import __version__, parallel
from semkit.commands.originals import OnStep, Originals, job, originals
from semkit.commands.protected import OutputError, read_report
from semkit.craft import CraftRecipe
from semkit.data import NAMES
from semkit.engine import Engine
from semkit.files import atomic_write, remove_leftovers, shown
from semkit.image import apply_noise, write_png
from semkit.imageset import ImageSet, check_fraction, stratified_share
from semkit.models import check_model
from semkit.noise import Noise, clipped_fraction, mean_effective, save
from semkit.quality import Quality
from semkit.storage import Storage, blocks, zeros
from semkit.study import as_dict, crafted_noise, key


def check_place(source: str, out: Path) -> None:
    """Raises OutputError if `out` is a file, or if it and the images lie in each other."""
    if source not in NAMES:
        inside, folder = out.resolve(), Path(source).resolve()
        if inside == folder or folder in inside.parents or inside in folder.parents:
            raise OutputError(f"the output {shown(out)} and the images {shown(source)} lie in each other; name another")
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {shown(out)} is a file; name a folder")


def check_request(out: Path, request: dict, resume: bool) -> None:
    """Raises OutputError unless `out` is free, or holds what this request began and `resume` is asked for."""
    run = out / "run.json"
    if not run.exists():
        # Hidden files are no one's work: a kill may leave one of ours.
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise OutputError(f"the output {shown(out)} is not empty; name another folder")
        return
    try:
        begun = json.loads(run.read_text())
    except ValueError:
        raise OutputError(f"{shown(run)} is damaged; name another folder") from None
    differing = [name for name in request if name != "source" and begun.get(name) != request[name]]
    if differing:
        what = ", ".join(name.replace("_", " ") for name in differing)
        raise OutputError(f"the output {shown(out)} was begun with other settings ({what}); name another folder")
    if not resume:
        raise OutputError(f"the output {shown(out)} exists; --resume continues it, or name another folder")


def _check_recipe(recipe: CraftRecipe, fraction: float) -> None:
    check_fraction(fraction)
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
    size: int = 32,
    limit: int | None = None,
    root: str | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    hold: str = "auto",
    resume: bool = False,
    engine: Engine | None = None,
    on_step: OnStep | None = None,
    on_start: Callable[[ImageSet], object] | None = None,
    checkpoint_every: float = 20,
) -> dict:
    """The report of protecting `source`: OUT/images/..., OUT/noise.safetensors and OUT/report.json are written.

    Images keep their names (as .png), sizes and modes; every 8-bit value moves by at most recipe.radius. Noise is
    crafted at size x size and fitted to the native size. `fraction` of every class is protected, the rest written
    unchanged. Stopped by on_step, by Ctrl-C or by a kill, the same call with resume=True goes on to the same bytes;
    the crafting state is saved every checkpoint_every seconds. hold: where images and noise are until they are written,
    "memory", "disk" or "auto" (storage.Storage); the bytes are the same. on_start is given the images that get noise.
    Raises DataError, OutputError or ValueError before anything is written.
    """
    engine, out = engine or Engine(), Path(out)
    _check_recipe(recipe, fraction)
    check_place(source, out)
    how = {"size": size, "limit": limit, "skip_unreadable": skip_unreadable}
    found = originals(source, **how, root=root, download=download, storage=Storage(hold, out), on_step=on_step)
    request = {
        "semkit": __version__, "torch": torch.__version__, "source": str(source),
        "fingerprint": key(found.images.fingerprint, found.outputs), "recipe": as_dict(recipe), "seed": seed,
        "fraction": fraction, **how, "device": torch.device(engine.device).type, "precision": engine.precision,
        "folded": engine.fold, "samples_batched": engine.batch_samples, "compiled": engine.compile,
        "processes": parallel.processes(),
    }  # fmt: skip
    check_request(out, request, resume)
    if not (out / "report.json").exists():
        chosen = stratified_share(found.images.labels, fraction, seed)
        subset = found.images.take(chosen)
        if on_start:
            on_start(subset)
        atomic_write(out / "run.json", as_json(request))
        noise, cost = crafted_noise(
            subset, recipe, seed=seed, engine=engine, cache=out / "unfinished", checkpoint_every=checkpoint_every,
            on_step=on_step and (lambda *step: on_step("crafting noise", *step)),
        )  # fmt: skip
        made = _write(found, chosen, noise, out, on_step)
        remove_leftovers(out, newer=out / "run.json")
        atomic_write(out / "report.json", as_json({**request, **cost, **made, **_effect(noise, subset)}))
    shutil.rmtree(out / "unfinished", ignore_errors=True)  # also where a kill came after the report
    return read_report(out)


def as_json(values: dict) -> bytes:
    """The values as a file of JSON."""
    return json.dumps(values, indent=1, allow_nan=False).encode()


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
    quality = _write_images(found, levels.numpy(), set(chosen.tolist()), noise.radius, out / "images", on_step)
    return {
        "images": len(levels), "protected": len(chosen), "classes": list(found.images.classes), "radius": noise.radius,
        "held": found.images.held, **quality.report(), "skipped": list(found.skipped), "ignored": list(found.ignored),
    }  # fmt: skip


def _write_images(
    found: Originals, noise: np.ndarray, chosen: set[int], radius: float, folder: Path, on_step: OnStep | None
) -> Quality:
    """Writes every image, the chosen ones protected; the Quality of those."""
    quality, told = Quality(len(chosen)), job(on_step, "writing images")
    for i, name in enumerate(found.outputs):
        original = found.read(i)
        protected = apply_noise(original, noise[i], radius) if i in chosen else original
        write_png(protected, folder / name)
        if i in chosen:
            quality.add(original, protected, noise[i])
        if told:
            told(i + 1, len(found.outputs))
    return quality
