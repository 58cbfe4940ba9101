"""One thread for every test: the nets are so small that a second one costs more than it brings.

Tests are marked `whole` if they start processes, kernels or a browser, run a whole command, panel or exercise, or take
more than about half a second; each of these keeps a cheap one among the unit tests, which are -m "not whole".
Notebooks keep their runs in pytest's cache, so that a second execution is quick and --cache-clear makes them anew.
"""

import os
import shutil
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which is not imported yet, and for the processes that tests start
LONG = {"test_cli", "test_cluster", "test_panels", "test_resume"}  # 15 seconds and more
NUMBERS = {  # what another processor computes with other rounding
    "augment", "augmix", "bullettrain", "corruptions", "craft_oracle", "defences", "engine", "factors", "latent",
    "learn", "measure", "mixing", "mixtures", "models", "noise", "objectives", "perturb", "picture",
    "pixels", "pruning", "quality", "savings", "speed", "transform", "twopixels", "weights",
}  # fmt: skip
WHOLE = {"test_browser", "test_cluster", "test_resume"}


def pytest_configure(config):
    if hasattr(config, "cache"):  # without it they are where the user's are
        os.environ.setdefault("SEMKIT_RUNS", str(config.cache.mkdir("semkit-runs")))


def pytest_collection_modifyitems(items):
    """Notebooks and long files first: of two workers with a file at a time, none is to be left with a long one."""
    here = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    if gone := sorted(({f"test_{name}" for name in NUMBERS} | WHOLE | LONG) - here):
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(gone)}")
    for item in items:
        if item.path.stem in WHOLE:
            item.add_marker("whole")
        if item.path.stem.removeprefix("test_") in NUMBERS:
            item.add_marker("numbers")
    items.sort(key=lambda item: item.path.suffix != ".ipynb" and item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same, alone and after others."""
    import torch  # not above: two workers start two seconds sooner if the process that hands out tests need not have it

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def hostile_folder(tmp_path_factory):
    """(the hostile folder, its image names), to be read only."""
    from hostile import make_hostile

    folder = tmp_path_factory.mktemp("hostile")
    return folder, make_hostile(folder)


@pytest.fixture
def small(pristine, tmp_path):
    """(photos, a copy of OUT to tamper with) of a file's own `pristine`, which is (photos, OUT)."""
    photos, out = pristine
    shutil.copytree(out, tmp_path / "out")
    return photos, tmp_path / "out"
