"""Finished runs as files, each under the hash of all that its result depends on: a second call is instant."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from semkit.images.files import atomic_write, check_fields, one_line, read_json, shown
from semkit.nets.lab import Lab


def runs_folder() -> Path:
    """Where the notebooks keep finished runs: $SEMKIT_RUNS, else ~/.cache/semkit/runs."""
    return Path(os.environ.get("SEMKIT_RUNS") or Path.home() / ".cache" / "semkit" / "runs")


PACKAGE = Path(__file__).parents[1]
SOURCES = {  # module -> its source, read now: files may change while this process runs the code that it has read
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
    """The modules of the dataclasses in a recipe, and of its functions: their code makes the result."""
    if is_dataclass(value) or callable(value):
        yield getattr(value, "__module__", type(value).__module__)
    inside = vars(value).values() if is_dataclass(value) else value if isinstance(value, tuple | list) else ()
    for part in inside:
        yield from _modules(part)


def code(module: str, *values) -> str:
    """A hash of the code that makes a result: of `module`, of the types in `values`, and of all that they import.

    So a change in a figure leaves the runs of a grid valid. A module outside of this package, such as a notebook, may
    use all of it: the hash is then that of the whole package.
    """
    return _hash_of(frozenset((module, *_modules(values))))


def as_dict(recipe) -> dict:
    """A recipe's fields as JSON can hold them; a perturbation is its own text, "PGD(radius=4, ...)".

    Fields that are left out of its repr are left out here too, because they are private.
    """
    plain = (str, int, float, bool, type(None))
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.repr}
    return {k: v if isinstance(v, plain) else repr(v) for k, v in values.items()}


def key(module: str, *parts) -> str:
    """The name of a run: a hash of all that its result depends on, code(module, *parts) included."""
    return hashlib.sha256(repr((code(module, *parts), torch.__version__, *parts)).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Store:
    """How one result of a run is kept: save(value, path) and load(path) of a file with this ending."""

    ending: str
    save: Callable[[object, Path], object]
    load: Callable[[Path], object]


def as_json(types: Mapping | None = None) -> Store:
    """A Store of what JSON can hold; types: field -> type, checked when it is loaded."""

    def read(path: Path):
        return check_fields(read_json(path), types) if types else read_json(path)

    return Store(".json", lambda value, path: atomic_write(path, json.dumps(value).encode()), read)


def as_weights(build: Callable[[], nn.Module]) -> Store:
    """A Store of a net's state dict; build() makes the net that it is loaded into."""

    def write(model: nn.Module, path: Path) -> None:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        atomic_write(path, safetensors.torch.save(weights))

    def read(path: Path) -> nn.Module:
        model = build()
        model.load_state_dict(safetensors.torch.load_file(path))
        return model

    return Store(".weights", write, read)


def kept(lab: Lab, kind: str, parts: tuple, make: Callable[[Path | None], tuple], *stores: Store) -> tuple:
    """The results of make(state), one for each of `stores`, taken from lab.cache if it was made of the same before.

    `parts`, the engine's settings and the code of make's module are what the results depend on. `state` is a path
    where make may save its progress; it is removed at the end. A run that lacks a file is made again. With lab.cache
    None nothing is kept and state is None. Raises ValueError for a damaged file in the cache, which it names.
    """
    if lab.cache is None:
        return make(None)
    stem = Path(lab.cache) / f"{kind}-{key(make.__module__, *parts, lab.engine.settings())}"
    paths = [stem.with_name(stem.name + store.ending) for store in stores]
    if all(path.exists() for path in paths):
        return tuple(_loaded(store, path) for store, path in zip(stores, paths, strict=True))
    state = stem.with_name(stem.name + ".state")
    results = make(state)
    for store, path, value in zip(stores, paths, results, strict=True):
        store.save(value, path)
    state.unlink(missing_ok=True)
    return results


def _loaded(store: Store, path: Path):
    try:
        if not path.is_file():  # opening a named pipe would wait forever
            raise ValueError("not a file")
        return store.load(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{shown(path)} is damaged ({one_line(error)}); delete it to make it again") from error
