"""What a command works on, made from its options: the engine, and the images of a set or a folder."""

from dataclasses import replace

from semkit.app.checking import protected_split
from semkit.app.folder import job
from semkit.app.telling import tell, tell_left_out
from semkit.images.files import shown
from semkit.images.imageset import Split, not_among
from semkit.images.loading import load
from semkit.images.storage import Storage
from semkit.nets.engine import FAST_PATHS, Engine


def engine_of(options) -> Engine:
    """The engine of --device, --precision, --compile and --switch-off."""
    off = {name: value for path in options.switch_off for name, value in FAST_PATHS[path].items()}
    return Engine(options.device, options.precision, compile=options.compile, **off)


def where(options) -> dict:
    """Which images are meant, beside IMAGES itself: keywords of `load`, `protect` and their like."""
    names = ("size", "limit", "download", "skip_unreadable")
    return {"root": options.data, **{name: getattr(options, name) for name in names}}


def load_split(options, limit: int | None, on_step) -> Split:
    """IMAGES, `limit` of them for training; what has to lie on a disk lies on that of --out or --cache."""
    told, folder = job(on_step, "reading images"), vars(options).get("out") or options.cache
    how = dict(seed=options.split_seed, storage=Storage(options.hold, folder), on_step=told)
    return load(options.images, **how, **{**where(options), "limit": limit})


def split_of(options, on_step, without: int | None = None) -> Split:
    """IMAGES, the training images protected where --protected says so; tells which files were left out.

    without: the training images that this limit would take are left out. They are found among the originals, because
    protected images differ from them in every byte.
    """
    split = load_split(options, options.limit, on_step)
    for name in split.skipped:
        tell(options, f"skipped, unreadable: {shown(name)}")
    tell_left_out(options, split.ignored, "the report of learn --json")
    kept, n = range(len(split.train)), len(split.train)
    if without and len(kept := not_among(split.train, load_split(options, without, on_step).train)) < 2:
        raise ValueError(f"--without {without} leaves {len(kept)} of {n} images to train on, 2 are needed")
    if options.protected:
        split = protected_split(split, options.images, options.protected)
    return replace(split, train=split.train.take(kept))
