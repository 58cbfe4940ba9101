"""The images that are to be protected, at the size that nets see and at their own."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from semkit.images.files import output_names
from semkit.images.imageset import ImageSet
from semkit.images.loading import check_size, find_folder, limited, load, load_parts, resized, set_name
from semkit.images.picture import read_image, stored_size
from semkit.images.storage import AUTO, Storage
from semkit.nets.lab import Interrupted

OnStep = Callable[[str, int, int, dict], bool | None]  # on_step(what, step, total, metrics)
NATIVE = 32  # the side of every named set's images


def job(on_step: OnStep | None, what: str) -> Callable[[int, int], None] | None:
    """on_step for a job without metrics, as on_step(done, total); asked to stop, it raises Interrupted."""

    def told(done: int, total: int) -> None:
        if on_step(what, done, total, {}):
            raise Interrupted(f"stopped while {what}, {done} of {total}")

    return told if on_step else None


@dataclass(frozen=True, eq=False)
class Originals:
    """The images to protect: at working size in `images`, at native size by read(i); outputs: relative PNG names.

    size(i): (width, height) of the native one as it is stored, without decoding it.
    """

    images: ImageSet
    outputs: tuple[str, ...]
    read: Callable[[int], Image.Image]
    size: Callable[[int], tuple[int, int]]
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def named_outputs(images: ImageSet) -> tuple[str, ...]:
    """The names of a named set's files: class/00000.png."""
    return tuple(f"{images.classes[label]}/{i:05d}.png" for i, label in enumerate(images.labels.tolist()))


def originals(
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

    A named set's images get the names class/00000.png. Raises DataError for what cannot be read.
    """
    check_size(size)
    if set_name(source):
        native = load(source, size=NATIVE, limit=limit, root=root, download=download).train
        read = lambda i: Image.fromarray(native.images[i].permute(1, 2, 0).contiguous().numpy())  # noqa: E731
        images = resized(native, size, storage)
        return Originals(images, named_outputs(images), read, lambda i: (NATIVE, NATIVE))
    folder = replace(find_folder(source), test=None)
    names = output_names(folder.train.names)
    [images], skipped = load_parts(
        folder, lambda parts: [limited(part, limit) for part in parts], size=size, skip_unreadable=skip_unreadable,
        storage=storage, on_step=job(on_step, "reading images"),
    )  # fmt: skip
    outputs = tuple(names[name] for name in images.files)
    read, stored = (lambda i, do=do: do(folder.root / images.files[i]) for do in (read_image, stored_size))
    return Originals(images, outputs, read, stored, skipped, folder.ignored)
