"""The folder that a command writes to: OUT/run.json before it works, and for protected images OUT/report.json after."""

import json
import os
import posixpath
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from semkit.images.files import atomic_write, check_fields, lock, one_line, read_json, remove_leftovers, shown
from semkit.images.loading import check_size, find_folder, set_name
from semkit.images.pixels import check_count, check_name, check_radius, check_seed
from semkit.protections.methods import PROTECTIONS

RESULTS = ("rows.csv", "table.md", "figure.png", "noise.csv", "losses.csv", "rises.csv")  # what a sweep writes
TOLD = {
    "protected": int, "unchanged_files": int, "psnr_db": float | int | None, "ssim": float | int | None,
    "seconds": float | int, "held": str, "skipped": list[str], "ignored": list[str],
}  # fmt: skip
# What `check` needs of a report, and of one of images that no radius bounds.
NEEDED = {"images": int, "radius": float | int | None, "size": int, "limit": int | None, "skip_unreadable": bool}
UNBOUNDED = {"recipe": dict, "seed": int, "method": str}
LOCK = ".semkit-lock"  # in OUT, locked while a run works there
GROWING = ("methods", "radii", "countermeasures")  # a sweep may have more of them the next time


class OutputError(ValueError):
    """An output folder that cannot be used; the message says what to do."""


def output_folder(out: str | os.PathLike) -> Path:
    """`out` as a Path; raises OutputError for an empty name, which would mean the current folder."""
    if not os.fspath(out):
        raise OutputError("the name of the output is empty: name a folder")
    return Path(out)


def check_place(source: str, out: Path) -> None:
    """Raises OutputError if `out` is no folder, or if it and the images lie in each other."""
    if not set_name(source):
        inside = Path(os.path.realpath(out))  # resolve() may raise on a link loop
        if any(inside == at or at in inside.parents or inside in at.parents for at in _real_folders(source)):
            raise OutputError(f"the output {shown(out)} and the images {shown(source)} lie in each other; name another")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"the output {shown(out)} is a {'file' if out.exists() else 'broken link'}; name a folder")


def _real_folders(source: str) -> set[Path]:
    """`source` and all folders with images of it, wherever links lead."""
    found = find_folder(source)
    names = chain.from_iterable(part.names for part in (found.train, found.test) if part)
    return {Path(os.path.realpath(path)) for path in {found.root, *((found.root / name).parent for name in names)}}


def check_links(out: Path, outputs: Iterable[str]) -> None:
    """Raises OutputError if a folder that will be written to is a link out of `out`, perhaps to originals."""
    inside = Path(os.path.realpath(out))
    images = {out / "images" / posixpath.dirname(name) for name in outputs}
    for folder in sorted({out / "unfinished", *images}):
        if inside not in Path(os.path.realpath(folder)).parents:
            raise OutputError(f"{shown(folder)} is a link out of {shown(out)}: remove it, or name another folder")


@contextmanager
def only_run(out: Path, request: dict, resume: bool, start: Callable[[], object]) -> Iterator[None]:
    """start(), then OUT/run.json is written; no other process works on OUT meanwhile, nor inside the block.

    Raises OutputError if one does, and as check_request.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "ab") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise OutputError(f"another run is at work on the output {shown(out)}; wait until it is done") from None
        except OSError:  # a file system without locks
            pass
        try:
            check_request(out, request, resume)  # again, because another run may have been here meanwhile
            start()
            write_record(out / "run.json", request)
            (out / "report.json").unlink(missing_ok=True)  # of a finished run of which files are missing
            yield
        finally:
            with suppress(OSError):  # on Windows it is open, and remove_leftovers removes it
                os.unlink(file.name)


def check_request(out: Path, request: dict, resume: bool) -> None:
    """Raises OutputError unless `out` is free, or holds what this request began and `resume` is asked for."""
    if not (out / "run.json").exists():
        # Hidden files are no one's work: a kill may leave one of ours.
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise OutputError(f"the output {shown(out)} is not empty; name another folder")
        return
    _check_same(out, request)
    if not resume:
        raise OutputError(f"the output {shown(out)} exists; --resume continues it, or name another folder")


def claim(out: Path, request: dict) -> None:
    """OUT/run.json says of what the rows, the table and the figure in `out` are, before they are made.

    Raises OutputError if `out` has some that are of other settings, fewer methods, radii and countermeasures excepted,
    or of no known ones. Finished runs, in OUT/runs, are known by themselves.
    """
    request = json.loads(json.dumps(request))
    if (out / "run.json").exists():
        _check_same(out, request, GROWING)
    elif not (out / "runs").is_dir() and (there := [name for name in RESULTS if (out / name).exists()]):
        raise OutputError(f"the output {shown(out)} has a {there[0]} that is no sweep's of semkit; name another folder")
    write_record(out / "run.json", request)
    remove_leftovers(out)


def _check_same(out: Path, request: dict, growing: Collection[str] = ()) -> None:
    """Raises OutputError unless OUT/run.json is that of the request, wherever its images are, or has fewer of some."""
    run = out / "run.json"
    try:
        begun = check_fields(read_json(run), {})
    except ValueError as error:
        raise OutputError(f"{shown(run)} is damaged ({one_line(error)}); name another folder") from None

    def agrees(name: str, now) -> bool:
        before = begun.get(name)
        return before == now or (name in growing and isinstance(before, list) and all(one in now for one in before))

    differing = [name for name, now in request.items() if name != "source" and not agrees(name, now)]
    if differing:
        what = ", ".join(name.replace("_", " ") for name in differing)
        raise OutputError(f"the output {shown(out)} was begun with other settings ({what}); name another folder")


def write_record(path: Path, values: dict) -> None:
    """Write OUT/run.json or OUT/report.json, whole or not at all."""
    atomic_write(path, json.dumps(values, indent=1, allow_nan=False).encode())


def finished(out: Path, names: Iterable[str]) -> bool:
    """Whether OUT/report.json and all files of these names in `out` are there."""
    return all((out / name).exists() for name in ("report.json", *names))


def read_report(out: str | os.PathLike, also: Mapping | None = None) -> dict:
    """OUT/report.json with the fields that `check` needs, and those of check_fields(report, also).

    Raises OutputError where there is none, or where a field is missing or of another kind.
    """
    path = output_folder(out) / "report.json"
    if not path.exists():
        raise OutputError(f"{shown(path)} is missing; semkit protect writes it when it is done")
    try:
        report = check_fields(read_json(path), {**NEEDED, **(also or {})})
        check_size(report["size"])
        if report["limit"] is not None:
            check_count(report["limit"], "limit", 1)
        if report["radius"] is not None:
            check_radius(report["radius"])
        else:
            check_seed(check_fields(report, UNBOUNDED)["seed"])
            check_name(report["method"], tuple(PROTECTIONS), "method")
    except ValueError as error:
        told = f"{shown(path)} is damaged ({one_line(error)})"
        raise OutputError(f"{told}; protect the images again, to another folder") from None
    return report


def tidied(out: Path) -> dict:
    """Remove what only an unfinished run needs, and return OUT/report.json; raises OutputError as read_report."""
    shutil.rmtree(out / "unfinished", ignore_errors=True)  # a kill may have come after the report
    remove_leftovers(out, age=0)
    report = read_report(out)
    return read_report(out, TOLD if report["radius"] is not None else {**TOLD, "bound": str, "largest_change": int})
