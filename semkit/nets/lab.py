"""How runs are made and kept: a Lab has the engine, the folder of finished runs, the progress callback, the workers.

A finished run is a file under the hash of all that its result depends on, so a second call is instant.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import torch

from semkit.images.files import atomic_write, check_fields, one_line, read_json, shown, writable
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count, check_nonnegative, settle
from semkit.nets.engine import Engine
from semkit.nets.models import load_net, save_net, size_seen

OnStep = Callable[[str, int, int, dict], bool | None]


class Interrupted(Exception):
    """A run was stopped, because Lab.on_step returned True. Finished runs and the saved state are kept.

    >>> sk.Lab(on_step=lambda *told: True, what="training").report(5, 10, {})
    Traceback (most recent call last):
    semkit.nets.lab.Interrupted: stopped while training, 5 of 10; finished runs are kept
    """


@dataclass(frozen=True)
class Lab:
    """Where and how runs are made.

    engine: device, precision and fast paths. cache: the folder of finished runs, None to keep none.
    on_step(what, step, total, metrics): called after every step of the job `what`; returning True stops the run, which
    raises Interrupted. what: the name of the job. workers: the number of processes over which `grid` spreads its runs,
    of one thread each; scheduler: the address of a Dask scheduler whose workers make them instead. Both need a cache
    that all workers see. checkpoint_every: seconds until the state of an unfinished crafting is saved again, more if
    saving takes longer than a second. Raises ValueError for numbers that cannot be.

        lab = sk.Lab(cache=sk.runs_folder())
        noise, cost = sk.crafted_noise(split.train, sk.craft_recipe("sem", "demo"), lab=lab)
    """

    engine: Engine = field(default_factory=Engine)
    cache: Path | None = None
    on_step: OnStep | None = None
    what: str = ""
    workers: int | None = None
    scheduler: str | None = None
    checkpoint_every: float = 20

    def __post_init__(self):
        settle(self, workers=lambda n, name: n and check_count(n, name), checkpoint_every=check_nonnegative)

    def doing(self, what: str) -> "Lab":
        """This lab with `what` as the name of its job, unless the job has a name already."""
        return self if self.what else replace(self, what=what)

    def report(self, step: int, total: int, metrics: dict) -> None:
        """Report a step of the job to on_step. Raises Interrupted if the run is to stop."""
        if self.on_step and self.on_step(self.what, step, total, metrics):
            raise Interrupted(f"stopped while {self.what}, {step} of {total}; finished runs are kept")


# -- the key of a run --------------------------------------------------------------------------------------------------

PACKAGE = Path(__file__).parents[1]
SOURCES = {  # module -> its source, read at import, because files may change while the process runs
    ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)): path.read_text("utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Not ast, because ast.parse raises SystemError in Python 3.11 when two threads call it at once.
IMPORT = re.compile(r"^\s*(?:from|import) (semkit[.\w]*)(?: import (\([^)]*\)|.*))?", re.MULTILINE)


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports, inside its functions too."""
    found = IMPORT.findall(SOURCES[module])
    names = {f"{where}.{name}" for where, names in found for name in re.findall(r"\w+", names)}
    return (names | {where for where, _ in found}) & SOURCES.keys()


@functools.cache
def _hash_of(modules: frozenset[str]) -> str:
    """A hash of the source of these modules and of all that they import; of the whole package for a module outside."""
    found, new = set(), set(modules if modules <= SOURCES.keys() else SOURCES)
    while new:
        found |= new
        new = set().union(*map(imported, new)) - found
    return hashlib.sha256(repr([(name, SOURCES[name]) for name in sorted(found)]).encode()).hexdigest()[:24]


def _modules(value) -> Iterator[str]:
    """The modules that define a recipe and the dataclasses and functions inside it."""
    if is_dataclass(value) or callable(value):
        yield getattr(value, "__module__", type(value).__module__)
    inside = vars(value).values() if is_dataclass(value) else value if isinstance(value, tuple | list) else ()
    for part in inside:
        yield from _modules(part)


def code(module: str, *values) -> str:
    """A hash of the code that makes a result: `module`, the types in `values`, and all modules that they import.

    A change in a figure thus leaves the runs of a grid valid. For a module outside of this package, such as a notebook,
    it is a hash of the whole package, because the module may use all of it.
    """
    return _hash_of(frozenset((module, *_modules(values))))


def key(module: str, *parts) -> str:
    """The name of a run: a hash of all that its result depends on, code(module, *parts) included."""
    return hashlib.sha256(repr((code(module, *parts), torch.__version__, *parts)).encode()).hexdigest()[:24]


# -- finished runs -----------------------------------------------------------------------------------------------------


def runs_folder() -> Path:
    """The folder where the notebooks keep finished runs.

    $SEMKIT_RUNS, else ~/.cache/semkit/runs.

        lab = sk.Lab(cache=sk.runs_folder())
    """
    return Path(os.environ.get("SEMKIT_RUNS") or Path.home() / ".cache" / "semkit" / "runs")


def as_dict(recipe) -> dict:
    """The fields of a recipe as JSON can hold them; a perturbation is its repr, "PGD(radius=4, ...)".

    Private fields, those with repr=False, are left out.
    """
    plain = (str, int, float, bool, type(None))
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.repr}
    return {k: v if isinstance(v, plain) else repr(v) for k, v in values.items()}


@dataclass(frozen=True)
class Store:
    """How one result of a run is kept: save(value, path) and load(path) of a file with this ending."""

    ending: str
    save: Callable[[object, Path], object]
    load: Callable[[Path], object]


def as_json(types: Mapping | None = None) -> Store:
    """A Store for JSON values. types: field -> type, checked at loading."""

    def read(path: Path):
        return check_fields(read_json(path), types) if types else read_json(path)

    return Store(".json", lambda value, path: atomic_write(path, json.dumps(value).encode()), read)


def as_net(recipe, images: ImageSet, engine: Engine) -> Store:
    """A Store for the net of a recipe for these images; a loaded net is on the engine, in eval mode and frozen."""
    how = {"net": recipe.net, "classes": images.classes, "size": size_seen(recipe, images)}
    return Store(".weights", lambda model, path: save_net(model, path, **how), lambda path: load_net(path, engine))


def kept(lab: Lab, kind: str, parts: tuple, make: Callable[[Path | None], tuple], *stores: Store) -> tuple:
    """The results of make(state), one per Store, loaded from lab.cache if they are there, else made and saved there.

    The results depend on `parts`, the engine's settings and the code of make's module. `state` is a path where make may
    save its progress; it is removed at the end. If one file of a run is missing, the run is made again. With lab.cache
    None nothing is kept and state is None. Raises ValueError with the name of a damaged file.
    """
    if lab.cache is None:
        return make(None)
    stem = Path(lab.cache) / f"{kind}-{key(make.__module__, *parts, lab.engine.settings())}"
    paths = [stem.with_name(stem.name + store.ending) for store in stores]
    if all(path.exists() for path in paths):
        return tuple(_loaded(store, path) for store, path in zip(stores, paths, strict=True))
    state = stem.with_name(stem.name + ".state")
    writable(stem.parent)  # what cannot be kept is not made first
    results = make(state)
    for store, path, value in zip(stores, paths, results, strict=True):
        store.save(value, path)
    state.unlink(missing_ok=True)
    return results


def _loaded(store: Store, path: Path):
    try:
        return store.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown(path)} is damaged ({one_line(error)}); delete it to make it again") from error
