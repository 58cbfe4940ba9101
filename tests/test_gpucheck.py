"""The prepared GPU run, on a CPU and tiny: right numbers, a part after the other, a time limit, and resume."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from semkit.__main__ import main
from semkit.analysis import gpucheck
from semkit.images.imageset import limit_test
from semkit.images.loading import load
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab

SMALL = replace(gpucheck.TINY, batch=8, visits=1, erm_epochs=1, batches=(4,), products=(64,))


@pytest.fixture(scope="module")
def split():
    return limit_test(load("shapes", limit=20), 20)


@pytest.mark.whole
@pytest.mark.numbers
def test_the_numbers_of_a_right_device_pass():
    rows = gpucheck.numbers("cpu", n=16)
    assert len(rows) == 8 and all(row["right"] for row in rows), rows


def test_a_device_that_computes_something_else_is_told():
    exact = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert gpucheck.error_of(exact.float(), exact) < gpucheck.BARS["float32"] / 10
    assert gpucheck.error_of(exact.flip(3), exact) > 10 * gpucheck.BARS["bfloat16"]
    assert gpucheck.error_of(2 * exact, exact) == pytest.approx(1)


@pytest.mark.whole  # torch.compile starts a compiler
def test_a_path_that_fails_says_why_and_the_others_have_a_rate():
    rows = list(gpucheck.speeds(Engine("cpu", "float32"), SMALL))
    rates = {row["path"]: row for row in rows}
    assert rates["engine"]["images_per_second"] > 0 and 0 < rates["engine"]["share"]
    assert "CUDA" in rates["CUDA graph"]["why_not"]


def test_a_scale_of_half_a_million_passes_asks_for_a_ninth_of_the_published_ones():
    noises = {row["method"]: job for row, job, _ in gpucheck.jobs(50_000, gpucheck.Scale()) if row["what"] == "noise"}
    passes = {method: recipe.cost(50_000).total for method, recipe in noises.items()}
    assert passes["sem"] < passes["sem, published"] / 8
    assert all(noises[method].sgd.batch == 512 for method in ("sem", "em"))


@pytest.mark.whole  # torch.compile starts a compiler
def test_what_does_not_fit_is_skipped_with_its_time_and_made_at_the_next_call(split, tmp_path):
    lab = Lab(Engine("cpu", "float32"))
    rows = gpucheck.run(split, tmp_path, limit=0, scale=SMALL, lab=lab)
    assert rows["skipped"].notna().all() and "needs" in rows["skipped"][0]
    gpucheck.run(split, tmp_path, limit=600, scale=SMALL, lab=lab)
    rows = pd.read_csv(tmp_path / "rows.csv")
    done = rows[rows["skipped"].isna()] if "skipped" in rows else rows
    assert {"sem", "em", "clean"} <= set(done["method"]) and done["last"].notna().sum() >= 12
    assert (tmp_path / "noise-sem-00.npz").stat().st_size < 16e6


@pytest.mark.whole
def test_the_command_makes_all_of_it_tiny(tmp_path, monkeypatch):
    # torch's cache of compiled code does not know ATEN_CPU_CAPABILITY: code of another setting crashes the process.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    out = str(tmp_path / "out")
    assert main(["gpu-check", "shapes", out, "--tiny", "--device", "cpu", "--limit", "40"]) == 0
    assert all(row["right"] for row in json.loads((tmp_path / "out" / "numbers.json").read_text()))
    assert pd.read_csv(tmp_path / "out" / "rows.csv")["passes"].notna().sum() >= 14
    # Numbers and speeds of a tiny run, or of another device, would be taken for those of the full one.
    assert main(["gpu-check", "shapes", out, "--device", "cpu", "--limit", "40"]) == 2
