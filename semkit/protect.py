"""From images to protected image files and back to the check of every one of them."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semkit import __version__
from semkit.craft import CraftRecipe
from semkit.data import NAMES, Split, load, load_files, scan
from semkit.engine import Engine
from semkit.files import (
    UnreadableImage,
    apply_noise,
    atomic_write,
    difference,
    is_image_name,
    noise_survival,
    output_names,
    read_image,
    shown,
    working_image,
    write_png,
)
from semkit.imageset import ImageSet, stratified_limit
from semkit.noise import Noise, clipped_fraction, effective, save
from semkit.study import as_dict, crafted_noise, key

OnStep = Callable[[str, int, int, dict], bool | None]  # on_step(what, step, total, metrics)
QUALITY_SAMPLE = 200  # images on which PSNR and SSIM are taken


class OutputError(ValueError):
    """An output folder that cannot be used; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Originals:
    """The images to protect: at working size in `images`, at native size by read(i); outputs: relative PNG names."""

    images: ImageSet
    outputs: tuple[str, ...]
    read: Callable[[int], Image.Image]
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def originals(
    source: str,
    *,
    size: int = 32,
    seed: int = 0,
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
        images = load(source, size=size, seed=seed, limit=limit, root=root, download=download).train
        labels = images.labels.tolist()
        outputs = tuple(f"{images.classes[label]}/{i:05d}.png" for i, label in enumerate(labels))
        return Originals(images, outputs, lambda i: Image.fromarray(images.images[i].permute(1, 2, 0).numpy()))
    folder = scan(source)
    names = output_names(folder.train.names)
    part = folder.train
    if limit is not None:
        part = part.take(stratified_limit(torch.tensor(part.labels), limit, seed))
    told = on_step and (lambda done, total: on_step("reading images", done, total, {}))
    images, skipped = load_files(
        folder.root, part.names, part.labels, folder.classes, size=size, skip_unreadable=skip_unreadable, on_step=told
    )
    outputs = tuple(names[name] for name in images.files)
    return Originals(images, outputs, lambda i: read_image(folder.root / images.files[i]), skipped, folder.ignored)


def check_output(source: str, out: Path, request: dict, resume: bool) -> dict | None:
    """The report of an output folder that is complete already, else None once it may be written to.

    Raises OutputError if it lies in the images, holds something else, another recipe, or an unfinished run without
    `resume`.
    """
    if source not in NAMES:
        inside, folder = out.resolve(), Path(source).resolve()
        if inside == folder or folder in inside.parents or inside in folder.parents:
            raise OutputError(f"the output {shown(out)} and the images {shown(source)} lie in each other; name another")
    if out.exists() and not out.is_dir():
        raise OutputError(f"the output {shown(out)} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    run = out / "run.json"
    if not run.exists():
        raise OutputError(f"the output {shown(out)} is not empty; name another folder")
    if json.loads(run.read_text()) != request:
        raise OutputError(f"the output {shown(out)} was begun with other images or settings; name another folder")
    if not resume:
        raise OutputError(f"the output {shown(out)} exists; --resume continues it, or name another folder")
    report = out / "report.json"
    return json.loads(report.read_text()) if report.exists() else None


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
) -> dict:
    """The report of protecting `source`: OUT/images/..., OUT/noise.safetensors and OUT/report.json are written.

    Images keep their names (as .png), sizes and modes; every 8-bit value moves by at most recipe.radius. Noise is crafted
    at size x size and fitted to the native size. `fraction` of every class is protected, the rest written unchanged.
    Stopped by on_step, by Ctrl-C or by a kill, the same call with resume=True goes on to the same bytes.
    Raises DataError, OutputError or ValueError before anything is written.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction:g}")
    engine, out = engine or Engine(), Path(out)
    found = originals(
        source, size=size, seed=seed, limit=limit, root=root, download=download, skip_unreadable=skip_unreadable,
        on_step=on_step,
    )  # fmt: skip
    request = {
        "semkit": __version__, "images": key(found.images.fingerprint, found.outputs), "source": str(source),
        "recipe": as_dict(recipe), "seed": seed, "fraction": fraction, "size": size, "limit": limit,
        "skip_unreadable": skip_unreadable, "precision": engine.precision,
    }  # fmt: skip
    if (report := check_output(source, out, request, resume)) is not None:
        return report
    atomic_write(out / "run.json", json.dumps(request, indent=1).encode())

    least = len(found.images.classes)  # an image of every class
    chosen = stratified_limit(found.images.labels, max(least, round(fraction * len(found.images))), seed)
    subset = found.images.take(chosen)
    if on_start:
        on_start(subset)
    told = on_step and (lambda *step: on_step("crafting noise", *step))
    noise, cost = crafted_noise(
        subset, recipe, seed=seed, engine=engine, cache=out / "unfinished", on_step=told
    )
    levels = torch.zeros(found.images.images.shape, dtype=torch.int8)
    levels[chosen] = noise.levels
    noise = Noise(levels, recipe.radius, noise.recipe, found.images.fingerprint, found.images.classes)
    save(noise, out / "noise.safetensors")
    quality = _write(found, levels.numpy(), recipe.radius, out / "images", on_step)
    report = {
        **request, "images": len(found.images), "protected": len(chosen), "classes": list(found.images.classes),
        "radius": recipe.radius, "device": str(engine.device), "torch": torch.__version__, **cost,
        "clipped_fraction": round(clipped_fraction(noise, found.images.images), 4),
        "mean_effective_noise": round(float(effective(noise, found.images.images)[chosen].float().abs().mean()), 3),
        **quality, "skipped": list(found.skipped), "ignored": list(found.ignored),
    }  # fmt: skip
    atomic_write(out / "report.json", json.dumps(report, indent=1).encode())
    for path in (out / "unfinished").iterdir():
        path.unlink()
    (out / "unfinished").rmdir()
    return report


def _write(found: Originals, noise: np.ndarray, radius: float, folder: Path, on_step: OnStep | None) -> dict:
    """Writes every protected image and returns what the noise did to the images: PSNR, SSIM, survival of a resize."""
    count = len(found.outputs)
    sampled = set(np.linspace(0, count - 1, min(count, QUALITY_SAMPLE)).astype(int).tolist())
    squares, values, unchanged, similar, survival = 0.0, 0, 0, [], []
    for i, name in enumerate(found.outputs):
        original = found.read(i)
        protected = apply_noise(original, noise[i], radius)
        write_png(protected, folder / name)
        apart = np.asarray(protected.convert("RGB"), np.float64) - np.asarray(original.convert("RGB"))
        squares, values = squares + float((apart**2).sum()), values + apart.size
        unchanged += not apart.any()
        if i in sampled:
            similar += _ssim(original, protected)
            if noise[i].any():
                survival.append(noise_survival(original, protected, noise[i]))
        if on_step and on_step("writing images", i + 1, count, {}):
            raise KeyboardInterrupt
    correlation, share = np.mean(survival, axis=0) if survival else (math.nan, math.nan)
    return {
        "unchanged_files": unchanged,
        "psnr_db": round(10 * math.log10(255**2 * values / squares), 2) if squares else None,
        "ssim": round(float(np.mean(similar)), 4) if similar else None,
        "after_resize_to_working_size": {"noise_correlation": round(correlation, 3), "noise_share": round(share, 3)},
    }


def _ssim(original: Image.Image, protected: Image.Image) -> list[float]:
    """The structural similarity of the pair, in a list; none for images smaller than its 11-pixel window."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(original.size) < 11:
        return []
    pair = [torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1)[None] for image in (protected, original)]
    return [float(structural_similarity_index_measure(*pair, data_range=255.0))]


def _problems(found: Originals, radius: float, folder: Path, on_step: OnStep | None) -> Iterator[str]:
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
        if on_step:
            on_step("checking images", i + 1, len(found.outputs), {})
    expected = set(found.outputs)
    present = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    for name in present:
        if is_image_name(name) and name not in expected:
            yield f"{shown(name)}: no original of it"


def read_report(out: str | os.PathLike) -> dict:
    """OUT/report.json; raises OutputError where there is none."""
    path = Path(out) / "report.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise OutputError(f"{shown(path)} is missing or damaged; semkit protect writes it when it is done") from None


def check(
    source: str,
    out: str | os.PathLike,
    *,
    radius: float | None = None,
    root: str | None = None,
    on_step: OnStep | None = None,
) -> dict:
    """{"checked": n, "radius": r, "problems": [...]}: every protected file held against its original.

    Size, mode, alpha, and |difference| <= radius in 8-bit levels; files that are missing or have no original are
    problems too. radius: the report's unless given. Raises DataError and OutputError for what cannot be read.
    """
    report = read_report(out)
    radius = report["radius"] if radius is None else radius
    how = {name: report[name] for name in ("size", "seed", "limit", "skip_unreadable")}
    found = originals(source, **how, root=root)
    problems = list(_problems(found, radius, Path(out) / "images", on_step))
    return {"checked": len(found.outputs), "radius": radius, "problems": problems}


def protected_split(split: Split, source: str, out: str | os.PathLike, *, root: str | None = None) -> Split:
    """`split` with each training image replaced by its protected file in OUT, resized as the originals were.

    The test images stay clean. Raises OutputError if files are missing or OUT protects other images.
    """
    report, train = read_report(out), split.train
    if source in NAMES:
        how = {name: report[name] for name in ("seed", "limit")}
        if how["limit"] is not None and len(train) != report["images"]:
            raise OutputError(f"{shown(out)} protects {report['images']} images; add --limit {how['limit']}")
        outputs = tuple(f"{train.classes[label]}/{i:05d}.png" for i, label in enumerate(train.labels.tolist()))
    else:
        names = output_names(scan(source).train.names)
        outputs = tuple(names[name] for name in train.files)
    images = torch.empty_like(train.images)
    for i, name in enumerate(outputs):
        try:
            images[i] = torch.from_numpy(working_image(read_image(Path(out) / "images" / name), images.shape[-1]))
        except UnreadableImage as error:
            raise OutputError(f"{error}; {shown(out)} must hold a protected file for every training image") from None
    protected = ImageSet(images, train.labels, train.classes, f"{train.name} protected", train.files)
    return Split(protected, split.test, split.skipped)
