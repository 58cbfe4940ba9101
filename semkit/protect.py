"""From images to protected image files and back to the check of every one of them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semkit import __version__
from semkit.craft import CraftRecipe, Interrupted
from semkit.data import NAMES, Split, find_folder, load, load_files
from semkit.engine import Engine
from semkit.files import (
    UnreadableImage,
    apply_noise,
    atomic_write,
    difference,
    is_image_name,
    output_names,
    read_image,
    shown,
    working_image,
    write_png,
)
from semkit.imageset import ImageSet, stratified_limit
from semkit.models import check_model
from semkit.noise import Noise, clipped_fraction, effective, save
from semkit.quality import Quality
from semkit.study import as_dict, crafted_noise, key

OnStep = Callable[[str, int, int, dict], bool | None]  # on_step(what, step, total, metrics)
REPORTED = {"images", "radius", "size", "limit", "skip_unreadable"}  # what `check` needs of a report
NATIVE = 32  # the side of every named set's images


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
    """The images to protect: at working size in `images`, at native size by read(i); outputs: relative PNG names."""

    images: ImageSet
    outputs: tuple[str, ...]
    read: Callable[[int], Image.Image]
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def _named_outputs(images: ImageSet) -> tuple[str, ...]:
    return tuple(f"{images.classes[label]}/{i:05d}.png" for i, label in enumerate(images.labels.tolist()))


def originals(
    source: str,
    *,
    size: int = 32,
    limit: int | None = None,
    root: str | None = None,
    download: bool = False,
    skip_unreadable: bool = False,
    on_step: OnStep | None = None,
) -> Originals:
    """The images of `source` that protection covers: a named set's training images, or all of a folder (its train/).

    A named set's images get the names class/00000.png. Raises DataError for what cannot be read.
    """
    if source in NAMES:
        native = load(source, size=NATIVE, limit=limit, root=root, download=download).train
        read = lambda i: Image.fromarray(native.images[i].permute(1, 2, 0).contiguous().numpy())  # noqa: E731
        images = native
        if size != NATIVE:
            resized = [torch.from_numpy(working_image(read(i), size)) for i in range(len(native))]
            images = replace(native, images=torch.stack(resized))
        return Originals(images, _named_outputs(images), read)
    folder = find_folder(source)
    names, part = output_names(folder.train.names), folder.train
    if limit is not None:
        part = part.take(stratified_limit(torch.tensor(part.labels), limit))
    images, skipped = load_files(
        folder.root, part.names, part.labels, folder.classes, size=size, skip_unreadable=skip_unreadable,
        on_step=job(on_step, "reading images"),
    )  # fmt: skip
    outputs = tuple(names[name] for name in images.files)
    return Originals(images, outputs, lambda i: read_image(folder.root / images.files[i]), skipped, folder.ignored)


def _check_place(source: str, out: Path) -> None:
    """Raises OutputError if `out` is a file, or if it and the images lie in each other."""
    if source not in NAMES:
        inside, folder = out.resolve(), Path(source).resolve()
        if inside == folder or folder in inside.parents or inside in folder.parents:
            raise OutputError(f"the output {shown(out)} and the images {shown(source)} lie in each other; name another")
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {shown(out)} is a file; name a folder")


def _check_request(out: Path, request: dict, resume: bool) -> None:
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
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction:g}")
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
    the crafting state is saved every checkpoint_every seconds. on_start is given the images that get noise.
    Raises DataError, OutputError or ValueError before anything is written.
    """
    engine, out = engine or Engine(), Path(out)
    _check_recipe(recipe, fraction)
    _check_place(source, out)
    how = {"size": size, "limit": limit, "skip_unreadable": skip_unreadable}
    found = originals(source, **how, root=root, download=download, on_step=on_step)
    request = {
        "semkit": __version__, "torch": torch.__version__, "source": str(source),
        "fingerprint": key(found.images.fingerprint, found.outputs), "recipe": as_dict(recipe), "seed": seed,
        "fraction": fraction, **how, "device": torch.device(engine.device).type, "precision": engine.precision,
    }  # fmt: skip
    _check_request(out, request, resume)
    if (out / "report.json").exists():
        shutil.rmtree(out / "unfinished", ignore_errors=True)  # a kill after the report may have left it
        return read_report(out)

    chosen = _chosen(found.images, fraction, seed)
    subset = found.images.take(chosen)
    if on_start:
        on_start(subset)
    atomic_write(out / "run.json", _json(request))
    noise, cost = crafted_noise(
        subset, recipe, seed=seed, engine=engine, cache=out / "unfinished", checkpoint_every=checkpoint_every,
        on_step=on_step and (lambda *step: on_step("crafting noise", *step)),
    )  # fmt: skip
    levels = torch.zeros(found.images.images.shape, dtype=torch.int8)
    levels[chosen] = noise.levels
    whole = Noise(levels, recipe.radius, noise.recipe, found.images.fingerprint, found.images.classes)
    save(whole, out / "noise.safetensors")
    quality = _write(found, levels.numpy(), set(chosen.tolist()), recipe.radius, out / "images", on_step)
    report = {
        **request, "images": len(found.images), "protected": len(chosen), "classes": list(found.images.classes),
        "radius": recipe.radius, **cost, **_effect(noise, subset), **quality, "skipped": list(found.skipped),
        "ignored": list(found.ignored),
    }  # fmt: skip
    atomic_write(out / "report.json", _json(report))
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    return report


def _chosen(images: ImageSet, fraction: float, seed: int) -> torch.Tensor:
    """Indices of `fraction` of every class, an image at least."""
    least = len(images.labels.unique())
    return stratified_limit(images.labels, max(least, round(fraction * len(images))), seed)


def _effect(noise: Noise, images: ImageSet) -> dict:
    """What the box leaves of the noise, which is what a learner meets."""
    left = effective(noise, images.images).float().abs().mean()
    clipped = clipped_fraction(noise, images.images)
    return {"clipped_fraction": round(clipped, 4), "mean_effective_noise": round(float(left), 3)}


def _json(values: dict) -> bytes:
    return json.dumps(values, indent=1, allow_nan=False).encode()


def _write(found: Originals, noise: np.ndarray, chosen: set[int], radius: float, folder: Path, on_step) -> dict:
    """Writes every image, the chosen ones protected, and returns what the noise did to those."""
    quality, told = Quality(len(chosen)), job(on_step, "writing images")
    for i, name in enumerate(found.outputs):
        original = found.read(i)
        protected = apply_noise(original, noise[i], radius) if i in chosen else original
        write_png(protected, folder / name)
        if i in chosen:
            quality.add(original, protected, noise[i])
        if told:
            told(i + 1, len(found.outputs))
    return quality.report()


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
    found = originals(source, **how, root=root, on_step=on_step)
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
        outputs = _named_outputs(train)
    else:
        raise OutputError(f"{shown(out)} protects {report['images']} images, these are {len(train)}: use one --limit")
    images = torch.empty_like(train.images)
    for i, name in enumerate(outputs):
        try:
            images[i] = torch.from_numpy(working_image(read_image(Path(out) / "images" / name), images.shape[-1]))
        except UnreadableImage as error:
            raise OutputError(f"{error}; {shown(out)} must hold a protected file for every training image") from None
        # A resize averages, so it keeps the radius but for its rounding.
        if (apart := int((images[i].int() - train.images[i].int()).abs().max())) > report["radius"] + 1:
            raise OutputError(f"{shown(out)} protects other images: {shown(name)} is {apart} levels from its original")
    return replace(split, train=replace(train, images=images, name=f"{train.name} protected"))
