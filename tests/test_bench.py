"""The bench: what it times is what it says, its arithmetic by hand, its tables and figure show its numbers."""

import itertools
import json
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pages import fresh_pages, killed_at_work, saying_where
from torch import nn

from semkit.analysis import bench, benchreport, elsewhere, figures, sets, stopwatch
from semkit.app.cli import main
from semkit.nets import models
from semkit.nets.engine import Engine, count_passes, input_gradient, keep_freed
from semkit.protections.crafting import Interrupted

CPU = Engine("cpu", "float32")
PLAN = bench.Plan(
    nets=("tiny",), batch=4, rounds=2, samples=3, attack_steps=2, sets=(8, 16), set_rounds=2, compiled=False, memory=()
)


# -- the stopwatch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def seconds_pass(monkeypatch):
    """A clock that moves only when it is told to."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_runs_are_timed_in_turn_and_short_ones_by_the_mean_of_many_calls(seconds_pass):
    called, durations = [], {"a": itertools.cycle([0.06, 0.02]), "b": itertools.chain([9.0], itertools.count(2.0))}
    told = []

    def run(name):
        called.append(name)
        seconds_pass(next(durations[name]))

    clocks = {name: partial(stopwatch.clock, partial(run, name), device="cpu") for name in "ab"}
    seconds = stopwatch.in_turn(clocks, 2, lambda: told.append(len(called)))
    # a: called twice, 0.02 s the second time, so 10 calls last 0.2 s, and one before. b: more than a second, so once.
    assert "".join(called) == "aab" + 2 * ("a" * 11 + "b")
    assert told == [2, 3, 14, 15, 26, 27]
    assert seconds["a"] == pytest.approx([0.04, 0.04]) and seconds["b"] == [2.0, 3.0]


@pytest.mark.whole
def test_clocks_elsewhere_are_of_another_process_that_keeps_no_memory(tmp_path):
    keep_freed()
    with elsewhere.clocks(saying_where, tmp_path / "where", device="cpu") as clock_of:
        assert 0 < clock_of("a work")(1) < 10
    process, asked = (tmp_path / "where").read_text().split()
    assert int(process) != os.getpid() and asked == "0"


@pytest.mark.whole
def test_another_process_that_is_killed_is_one_clear_line():
    line = "was killed, for want of memory perhaps; a smaller --batch"
    with elsewhere.clocks(killed_at_work, device="cpu") as clock_of, pytest.raises(ChildProcessError, match=line):
        clock_of("a work")(1)


def test_the_hardware_is_named():
    where = stopwatch.hardware(CPU)
    assert where["processor"] and where["threads"] == torch.get_num_threads() and where["gpu"] is None
    assert where["precision"] == "float32" and where["torch"] == torch.__version__ and json.dumps(where)


def test_peak_memory_rises_with_what_is_held_and_never_falls():
    before, pages = stopwatch.peak_memory("cpu"), Path("/proc/self/statm")
    now = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0
    held = fresh_pages(before - now + 2**26)  # up to the peak, and 64 MiB beyond
    after = stopwatch.peak_memory("cpu")
    assert 2**25 < after - before < 2**27 or not now
    del held
    assert stopwatch.peak_memory("cpu") > after - 2**22  # the kernel counts pages in batches


# -- what is timed -----------------------------------------------------------------------------------------------------


@contextmanager
def heads_called():
    """How many times a net's last layer is called, and on how many images: one call is one forward pass."""
    calls = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: calls.append(len(output)) if isinstance(module, nn.Linear) else None
    )
    try:
        yield calls
    finally:
        hook.remove()


PASSES = {"EM noise step": 3, "SEM noise step": 3, "REM noise step": 9, "AT training step": 3, "augmentation": 0}


def test_both_paths_make_the_passes_that_the_plan_says():
    timed = bench.timed_runs(PLAN, "tiny", CPU)
    for (work, passes), path in itertools.product(PASSES.items(), ("plain", "engine")):
        with heads_called() as calls:
            timed[work, path]()
        # The plain path gives the net one sample after another, the engine all of a noise step at once.
        assert sum(calls) == 4 * passes and (path == "engine" or calls == [4] * passes), (work, path)


def test_every_path_of_the_input_gradient_is_one_pass_and_the_matrix_product_is_known():
    timed = bench.timed_runs(PLAN, "tiny", replace(CPU, precision="bfloat16"))
    paths = {path for work, path in timed if work == "input gradient"}
    assert paths == {"engine", *(f"engine without {name}" for name in ("bfloat16", "channels_last", "folding"))}
    for path in paths:
        with count_passes() as passes:
            timed["input gradient", path]()
        assert (passes.input_gradient, passes.training) == (4, 0)
    for side in (1024, 2048):
        product = timed["matrix product", str(side)]
        assert [(t.shape, t.dtype) for t in product.args] == [((side, side), torch.bfloat16)] * 2
        assert product.func is torch.mm


def test_a_switch_turns_one_thing_off_and_the_gradient_stays():
    engine = Engine("cpu", "float64")
    others = bench.switches(engine)
    gradient, batching = "input gradient", ("SEM noise step", "engine, samples one by one")
    assert others.pop(batching).batch_samples is False
    assert set(others) == {(gradient, f"engine without {name}") for name in ("channels_last", "folding")}
    assert (gradient, "engine without bfloat16") in bench.switches(replace(engine, precision="bfloat16"))
    data = sets.random_images(4, 32)
    expected = input_gradient(engine.prepare(models.build("tiny", 10)), engine.images(data.images), data.labels)
    for path, other in others.items():
        switched = ("precision", "layout", "fold")
        changed = [name for name in switched if getattr(other, name) != getattr(engine, name)]
        assert len(changed) == 1, path
        model, x = other.prepare(models.build("tiny", 10)), other.images(data.images)
        assert (model.folded is None) == (changed == ["fold"])
        assert x.is_contiguous() == (changed == ["layout"])
        torch.testing.assert_close(input_gradient(model, x, data.labels), expected, rtol=1e-9, atol=1e-12)


def test_a_compiled_engine_is_timed_beside_the_one_that_is_not():
    others = bench.switches(Engine("cpu", "float32", compile=True), compiled=True)
    compiled = {path: other.compile for (_, path), other in others.items()}
    assert compiled.pop("engine without compile") is compiled.pop("engine without folding") is False
    assert set(compiled.values()) == {True} and "engine with compile" not in compiled


def test_operations_are_counted_as_by_hand():
    macs = 3 * 24 * 9 * 16**2 + 2 * 24 * 24 * 9 * 16**2  # stem, first block
    for inside, outside, side in ((24, 48, 8), (48, 96, 4)):
        macs += (inside * 9 + outside * 9 + inside) * outside * side**2
    macs += 96 * 10
    assert bench.gradient_flops("tiny", 5) == 2 * 2 * macs * 5


def test_the_cost_of_a_set_counts_every_image_and_can_be_stopped():
    told = []
    assert sets.set_seconds(8, 4, 1, CPU, lambda: told.append(0)) > 0
    assert len(told) == 1 + 8  # a training step, and the final pass over 8 batches
    sets.set_seconds(8, 4, 2, CPU, lambda: told.append(0))
    assert len(told) == 3 * (1 + 8)
    # A small set is crafted twice a round where the largest has 16 times as many images.
    assert (PLAN.times(8), replace(PLAN, sets=(8, 128)).times(8), replace(PLAN, sets=(8, 128)).times(128)) == (1, 2, 1)

    def stop():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        sets.set_seconds(8, 4, 1, CPU, stop)


@pytest.mark.whole
def test_the_memory_of_a_set_is_its_images_and_noise_and_not_what_this_process_holds():
    held = torch.ones(2**28 // 4)  # 256 MiB, which a peak inherited from here would show
    kept = 2 * 12_000 * 3 * 32 * 32
    used = sets.set_memory(12_000, 32, 4, CPU)
    assert kept <= used < kept + 2**27 and len(held)


@pytest.mark.whole
def test_the_memory_of_a_set_that_does_not_fit_is_not_known():
    assert sets.set_memory(2**45, 32, 4, CPU) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [(dict(nets=("resnet81",)), "did you mean"), (dict(batch=1), "batch"), (dict(rounds=0), "rounds")],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        bench.Plan(**changed)


def test_a_plan_takes_what_is_given_and_leaves_what_is_not():
    assert bench.planned() == bench.Plan()
    given = bench.planned(quick=True, rounds=7, batch=None, out="elsewhere")
    assert given == replace(bench.QUICK, rounds=7)


# -- rows --------------------------------------------------------------------------------------------------------------


SECONDS = {
    ("SEM noise step", "plain"): [6.0, 9.0, 8.0],
    ("SEM noise step", "engine"): [1.0, 3.0, 2.0],
    ("input gradient", "engine"): [0.5, 0.4, 0.8],
    ("input gradient", "engine without folding"): [0.5, 0.8, 0.8],
    ("matrix product", "1024"): [1.0, 0.2, 4.0],
    ("matrix product", "2048"): [1.0, 2.0, 8.0],
}


def row(rows, work, path):
    return next(r for r in rows if (r["work"], r["path"]) == (work, path))


def test_ratios_are_taken_round_by_round():
    rows = bench.time_rows("tiny", SECONDS)
    slow = row(rows, "SEM noise step", "plain")
    assert [slow[k] for k in ("seconds", "seconds_low", "seconds_high")] == [8, 6, 9]
    # 6/1, 9/3, 8/2: the median of these, not 8/2 of the medians by chance, nor 6/3 and 9/1 of the ends.
    assert [slow[k] for k in ("ratio", "ratio_low", "ratio_high")] == [4, 3, 6]
    assert row(rows, "input gradient", "engine without folding")["ratio"] == 1
    assert row(rows, "SEM noise step", "engine")["ratio"] == 1 and len(rows) == 4


def test_the_share_of_the_matmul_rate_is_taken_round_by_round():
    rate = bench.rate_row("tiny", 64, "float32", SECONDS)
    flops = bench.gradient_flops("tiny", 64)
    # The larger product does 8 times as much: in the same time, in 10 times the time, in twice the time.
    fastest = [2 * 2048**3, 2 * 1024**3 / 0.2, 2 * 2048**3 / 8]
    assert rate["gradient_flops"] == flops / 0.5 and rate["matmul_flops"] == sorted(fastest)[1]
    shares = sorted(flops / g / m for g, m in zip((0.5, 0.4, 0.8), fastest, strict=True))
    assert [rate[k] for k in ("share_low", "share", "share_high")] == pytest.approx(shares)


def test_sets_are_compared_with_the_smallest():
    rows = bench.set_rows({100: [2.0, 4.0], 800: [3.0, 4.0]})
    assert [(r["images"], r["seconds"], r["ratio"], r["ratio_high"]) for r in rows] == [
        (100, 3, 1, 1), (800, 3.5, 1.25, 1.5),
    ]  # fmt: skip


# -- for people --------------------------------------------------------------------------------------------------------


@pytest.fixture
def result():
    rows = [*bench.time_rows("tiny", SECONDS), bench.rate_row("tiny", 64, "float32", SECONDS)]
    rows += bench.set_rows({100: [2e-3], 800: [3e-3]})
    rows.append({"kind": "memory", "net": "tiny", "images": 800, "size": 32, "batch": 4, "bytes": 2**29})
    plan = {"batch": 4, "samples": 1, "attack_steps": 2, "rounds": 3, "set_rounds": 1}
    return {"hardware": stopwatch.hardware(CPU), "plan": plan, "rows": rows}


def test_the_table_says_every_row_once(result):
    text = benchreport.markdown(result)
    for words in (
        "| tiny | SEM noise step | 8e+03 ms (6e+03 to 9e+03) | 2e+03 ms (1e+03 to 3e+03) | 4.00 (3.00 to 6.00) |",
        "| tiny | input gradient | engine without folding | 800 ms (500 to 800) | 1.00 (1.00 to 2.00) |",
        "tiny, 100 images: 2 ms (2 to 2) an image, 1.00",
        "tiny, 800 images: 3 ms (3 to 3) an image, 1.50 (1.50 to 1.50) of the smallest set's",
        "tiny, 800 images of 32 px, batch 4: peak memory above torch's own 0.50 GiB",
        "batch 4 of 32 px, samples a noise step: 1, ascent steps in REM and AT: 2; medians of 3 rounds",
    ):
        assert text.count(words) == 1, words
    assert torch.__version__ in text and "float32" in text and "% (" in text


def test_the_figure_shows_the_ratios_with_their_range_and_the_cost_by_set(result):
    panels = figures.new_figure(12, 3).subplots(1, 3)
    benchreport.draw(panels, result)
    bars = [[patch.get_width() for patch in axes.patches] for axes in panels[:2]]
    assert bars == [[4], [1]]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["tiny: SEM noise step"]
    reach = panels[0].collections[0].get_segments()[0][:, 0]
    assert reach.tolist() == [3, 6]
    assert panels[2].lines[0].get_ydata().tolist() == [2, 3]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["100", "800"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_the_command_reports_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", replace(PLAN, rounds=1, sets=(8,), set_rounds=1))
    monkeypatch.setattr(stopwatch, "SHORTEST", 0.001)
    out = tmp_path / "out"
    assert main(["bench", "--quick", "--samples", "1", "--precision", "float32", "--json", "--out", str(out)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found == json.loads((out / "bench.json").read_text())
    assert found["plan"]["samples"] == 1 and found["hardware"]["precision"] == "float32"
    assert {r["kind"] for r in found["rows"]} == {"time", "rate", "set"}
    works = {(r["work"], r["path"]) for r in found["rows"] if r["kind"] == "time"}
    assert works >= set(itertools.product(PASSES, ("plain", "engine")))
    assert all(r["seconds_low"] <= r["seconds"] <= r["seconds_high"] for r in found["rows"] if r["kind"] != "rate")
    assert said.err.startswith("tiny on cpu in float32, rounds: 1; about ")
    assert (out / "table.md").read_text() == benchreport.markdown(found) + "\n"
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.whole
def test_a_bench_that_is_stopped_returns_nothing():
    steps = []

    def on_step(what, step, total, metrics):
        steps.append((what, step, total))
        return step == 2

    with pytest.raises(Interrupted):
        bench.bench(PLAN, CPU, on_step=on_step, say=lambda text: None)
    total = 3 * len(bench.timed_runs(PLAN, "tiny", CPU))
    assert steps == [("tiny", 1, total), ("tiny", 2, total)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--models", "resnet81"], "did you mean resnet18?"),
        (["--rounds", "0"], "a whole number >= 1 is needed, got 0"),
        (["--out", "taken"], "taken: File exists"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    try:
        code = main(["bench", *words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.count("\n") == 1 and complaint in said.err
