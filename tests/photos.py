"""Small folders of images that can be told apart, and what Pillow makes of images."""

import io
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from semkit.images.imageset import ImageSet, Split


def pixels(n: int, size: int = 8, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [n,size,size,3] and labels [n]: noise, and a colour channel that grows bright with the label."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 160, (n, size, size, 3))
    labels = np.arange(n) % classes
    images[np.arange(n), ..., labels % 3] += 96
    return images.astype(np.uint8), labels


def make_photos(folder: Path, n: int = 12, size: int = 8, classes: int = 2, seed: int = 0) -> Path:
    """Writes n PNG images folder/a/00.png, folder/b/01.png, ...; returns folder."""
    for i, (image, label) in enumerate(zip(*pixels(n, size, classes, seed), strict=True)):
        path = folder / "abcdefgh"[label] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def image_set(n: int = 40, size: int = 8, classes: int = 2, seed: int = 0) -> ImageSet:
    """The same images as an ImageSet."""
    images, labels = pixels(n, size, classes, seed)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageSet(tensor, torch.from_numpy(labels), tuple("abcdefgh"[:classes]), "photos")


def image_split(n: int = 40, size: int = 8, classes: int = 2) -> Split:
    """n training images and 40 test images."""
    return Split(image_set(n, size, classes), image_set(40, size, classes, seed=1))


def contents(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes, of every file below the folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def each_image(images, change):
    """change(an image [H,W,3] as numpy), image after image, back as a tensor."""
    done = [change(image) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)


def by_pillow(image, kind, quality=10):
    Image.fromarray(image).save(file := io.BytesIO(), kind, quality=quality)
    return np.array(Image.open(file))


def make_map(folder: Path) -> pd.DataFrame:
    """Writes made-up rows and pictures as a sweep of the design `map` does, of 2 x 2 x 2 settings; returns the rows."""
    rng, rows = np.random.default_rng(0), []
    settings = [f"{r}-{s}-{p}" for r in (2, 8) for s in (75, 600) for p in (0, 4)]
    for method, radius, seed in itertools.product(["clean", *settings], (0, 4), range(3)):
        rows.append(
            {"method": method, "training_radius": radius, "seed": seed, "last": round(rng.uniform(0.2, 0.9), 3)}
        )
    (folder / "strips").mkdir(parents=True)
    for method in settings:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "strips" / f"{method}.png")
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    return pd.DataFrame(rows)
