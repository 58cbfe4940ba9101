"""Finished runs as files, each under the hash of all that its result depends on: a second call is instant."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
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


def _code() -> str:
    """A hash of this package's source files."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(repr((path.relative_to(folder).as_posix(), path.read_bytes())).encode())
    return digest.hexdigest()[:24]


CODE = _code()  # at import, because files may change while this process runs the code that it has read


def as_dict(recipe) -> dict:
    """A recipe's fields as JSON can hold them; a perturbation is its own text, "PGD(radius=4, ...)".

    Fields that are left out of its repr are left out here too, because they are private.
    """
    plain = (str, int, float, bool, type(None))
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.repr}
    return {k: v if isinstance(v, plain) else repr(v) for k, v in values.items()}


def key(*parts) -> str:
    """The name of a run: a hash of everything that its result depends on, this package's code included."""
    return hashlib.sha256(repr((CODE, torch.__version__, *parts)).encode()).hexdigest()[:24]


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

    `parts` and the engine's settings are what the results depend on. `state` is a path where make may save its
    progress; it is removed at the end. A run that lacks a file is made again. With lab.cache None nothing is kept and
    state is None. Raises ValueError for a damaged file in the cache, which it names.
    """
    if lab.cache is None:
        return make(None)
    stem = Path(lab.cache) / f"{kind}-{key(*parts, lab.engine.settings())}"
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


def kept_json(lab: Lab, kind: str, parts: tuple, make: Callable[[], list | dict]):
    """make(), which JSON can hold, kept as `kept` has it."""
    return kept(lab, kind, parts, lambda _: (make(),), as_json())[0]
