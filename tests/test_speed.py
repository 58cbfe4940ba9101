"""The speed report: what is timed is what it says, its arithmetic by hand, its tables and figure show its numbers.

The plain reference against the engine, in float64 and with the same random draws, and twins that must not agree.
"""

import copy
import itertools
import json
import os
import signal
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from semkit.__main__ import main
from semkit.analysis import speed
from semkit.analysis.cost import gradient_flops
from semkit.analysis.report import bench_figure, bench_tables
from semkit.analysis.speed import plain_noise_step, plain_train_step, plain_views
from semkit.images.augment import FlipCrop
from semkit.images.pixels import LEVEL, uniform
from semkit.nets import models
from semkit.nets.engine import FAST_PATHS, Engine, count_passes, input_gradient, keep_freed, train_step
from semkit.nets.lab import Interrupted, Lab
from semkit.protections import crafting
from semkit.protections.crafting import CraftRecipe
from semkit.training.perturb import PGD, Clean, Uniform

CPU = Engine("cpu", "float32")
EXACT = Engine("cpu", "float64")
PLAN = speed.Plan(nets=("tiny",), batch=4, rounds=1, samples=3, attack_steps=2, sets=(8, 16), set_rounds=1, memory=())
SIDES = {"EM": Clean(), "SEM": Uniform(4), "REM": PGD(4, 3, 1.1)}


# -- the plain reference -----------------------------------------------------------------------------------------------


def recipe_of(side):
    return CraftRecipe(noise_side=side, steps=2, samples=3, augment=FlipCrop(2))


def nets():
    """The same net twice, its batch statistics far from a batch's own: prepared by the engine, and as it is."""
    model, generator = models.small(3, widths=(4, 8)).double(), torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.3, 2, generator=generator)
            module.weight.data.uniform_(0.5, 2, generator=generator)
    return EXACT.prepare(copy.deepcopy(model)), model


def batch(n=6, size=8):
    """Images with a third of their values at or near black or white, where the box cuts; labels."""
    levels = torch.randint(-100, 356, (n, 3, size, size), generator=torch.Generator().manual_seed(2))
    return EXACT.images(levels.clamp(0, 255).to(torch.uint8)), torch.arange(n) % 3


def apart(side, **changed):
    """The largest difference in delta after one noise step of both from noise that fills the ball.

    changed: what is different in the recipe of the plain one.
    """
    (fast, slow), (x, y), recipe = nets(), batch(), recipe_of(side)
    delta = uniform(x, 8 * LEVEL, torch.Generator().manual_seed(3))
    other = replace(recipe, **changed)
    ours = crafting.noise_step(fast, x, y, delta, recipe, EXACT.generator(5))
    reference = plain_noise_step(slow, x, y, delta, other, EXACT.generator(5))
    return (ours - reference).abs().max().item()


@pytest.mark.parametrize("method", SIDES)
def test_a_noise_step_is_the_engines(method):
    assert apart(SIDES[method]) <= 1e-12


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("EM", dict(samples=2)),
        ("EM", dict(step_size=1.5)),
        ("EM", dict(augment=FlipCrop(3))),
        ("SEM", dict(noise_side=Uniform(5))),
        ("SEM", dict(noise_side=PGD(4, 1, 1.1))),
        ("REM", dict(noise_side=PGD(4, 2, 1.1))),
        ("REM", dict(noise_side=PGD(4, 3, 1.3))),
    ],
    ids=str,
)
def test_another_recipe_does_not_agree(method, changed):
    assert apart(SIDES[method], **changed) > 1e-4


@pytest.mark.parametrize("method", SIDES)
def test_the_noise_of_a_batch_is_the_engines(method):
    (fast, slow), (x, y), recipe = nets(), batch(), recipe_of(SIDES[method])
    ours = crafting.noise_of_batch(fast, x, y, torch.zeros_like(x), recipe, EXACT.generator(5))
    generator = EXACT.generator(5)
    start = reference = uniform(x, recipe.radius * LEVEL, generator)
    for _ in range(recipe.steps):
        reference = plain_noise_step(slow, x, y, reference, recipe, generator)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    assert (ours - start).abs().max() > 1e-3


@pytest.mark.parametrize("method", SIDES)
def test_two_steps_of_training_are_the_engines(method):
    (fast, slow), (x, y), side, t = nets(), batch(), SIDES[method], FlipCrop(2)
    ours, theirs = (torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4) for model in (fast, slow))
    for step in range(2):
        generator = EXACT.generator(step)
        z = t.apply(x, t.draw(len(x), x.shape[2:], generator))
        loss = train_step(fast, ours, side(fast, z, y, generator), y)
        generator = EXACT.generator(step)
        seen = plain_views(x, t.draw(len(x), x.shape[2:], generator), t.pad)
        assert loss == pytest.approx(plain_train_step(slow, theirs, seen, y, side, generator), rel=1e-9)
    state, expected = fast.state_dict(), slow.state_dict()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=1e-9)
    start = nets()[1].state_dict()
    assert max((expected[name] - start[name]).abs().max().item() for name in expected) > 1e-2


def test_a_view_is_the_flipped_padded_and_cut_image():
    image = torch.arange(6.0).view(1, 1, 2, 3)

    def view(*drawn):
        return plain_views(image, [torch.tensor([d]) for d in drawn], 1).tolist()

    assert view(False, 1, 1) == image.tolist()
    assert view(True, 2, 0) == [[[[0, 5, 4], [0, 0, 0]]]]


# -- timing ------------------------------------------------------------------------------------------------------------


def test_all_is_timed_in_turn_after_a_round_to_warm_up_and_can_be_stopped():
    numbers, told = itertools.count(), []
    runs = {name: lambda: next(numbers) for name in "ab"}
    lab = Lab(CPU, on_step=lambda *step: told.append(step), what="tiny")
    assert speed.in_turn(runs, 2, lab) == {"a": [2, 4], "b": [3, 5]}
    assert told == [("tiny", step, 6, {}) for step in range(1, 7)]
    with pytest.raises(Interrupted):
        speed.in_turn(runs, 2, Lab(CPU, on_step=lambda what, step, total, metrics: step == 2))
    assert next(numbers) == 8


def where():
    """(Process, whether it was asked to keep what it frees, how many engines and plain paths it has made nets for)."""
    return os.getpid(), bool(keep_freed.cache_info().currsize), speed.works.cache_info().currsize


@pytest.mark.whole
def test_what_keeps_no_memory_is_timed_in_another_process_and_one_clear_line_says_that_it_was_killed():
    speed.works.cache_clear()
    with speed.second_process() as process:
        runs = speed.runs_of_net(PLAN, "tiny", CPU, process)
        alone = ("EM noise step", "plain"), ("input gradient", "engine without memory")
        assert all(0 < runs[key]() < 10 for key in alone if key in runs)
        number, keeps, made = process.submit(where).result()
        assert number != os.getpid() and not keeps and made == 1 + keep_freed() and where()[2] == 0
        os.kill(number, signal.SIGTERM)
        with pytest.raises(ChildProcessError, match="was killed, for want of memory perhaps; a smaller --batch"):
            runs["SEM noise step", "plain"]()


def test_the_hardware_is_named():
    found = speed.hardware(CPU)
    assert found["processor"] and found["threads"] == torch.get_num_threads() and found["gpu"] is None
    assert found["precision"] == "float32" and found["torch"] == torch.__version__ and json.dumps(found)


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


PASSES = {"EM noise step": 3, "SEM noise step": 3, "REM noise step": 9, "AT training step": 3}


def test_both_paths_make_the_passes_that_the_plan_says():
    for plain in (True, False):
        timed = speed.works(PLAN, "tiny", CPU, plain)
        timed["EM noise step"]()  # once for the shape the engine looks how large its tensors are
        for work, passes in PASSES.items():
            with heads_called() as calls:
                timed[work]()
            # The plain path gives the net one sample after another, the engine all of a noise step at once.
            assert sum(calls) == 4 * passes and (calls == [4] * passes or not plain), (work, plain)


def test_every_engine_makes_one_pass_for_the_input_gradient():
    engine = replace(CPU, precision="bfloat16", compile=True)
    others = speed.switched_off(engine)
    names = {"bfloat16", "batching", "channels_last", "compile", "folding"}
    assert set(others) == names | ({"memory"} if keep_freed() else set())
    for other in (replace(other, compile=False) for other in others.values()):
        with count_passes() as passes:
            speed.works(PLAN, "tiny", other, False)["input gradient"]()
        assert (passes.input_gradient, passes.training) == (4, 0)


def test_switching_off_changes_one_thing_and_the_gradient_stays():
    others = speed.switched_off(EXACT)
    assert set(others) == set(FAST_PATHS) - (set() if keep_freed() else {"memory"})
    x, y = EXACT.images(torch.arange(4 * 3 * 32 * 32).view(4, 3, 32, 32).to(torch.uint8)), torch.arange(4)
    expected = input_gradient(EXACT.prepare(models.build("tiny", 10)), x, y)
    for name, other in others.items():
        changed = {field.name for field in fields(other) if getattr(other, field.name) != getattr(EXACT, field.name)}
        assert changed == set(FAST_PATHS[name])
        model = other.prepare(models.build("tiny", 10))
        torch.testing.assert_close(input_gradient(model, x, y), expected, rtol=1e-9, atol=1e-12)


def test_what_is_off_already_is_not_switched_off():
    off = {name: value for path in FAST_PATHS.values() for name, value in path.items()}
    assert speed.switched_off(Engine("cpu", "float32", **off)) == {}


def test_operations_are_counted_as_by_hand():
    macs = 3 * 24 * 9 * 16**2 + 2 * 24 * 24 * 9 * 16**2  # stem, first block
    for inside, outside, side in ((24, 48, 8), (48, 96, 4)):
        macs += (inside * 9 + outside * 9 + inside) * outside * side**2
    macs += 96 * 10
    assert gradient_flops("tiny", 5) == 2 * 2 * macs * 5


@pytest.mark.whole
def test_the_memory_of_a_set_is_its_images_and_noise_and_not_what_this_process_holds():
    held = torch.ones(2**28 // 4)  # 256 MiB, which a peak inherited from here would show
    kept = 2 * 12_000 * 3 * 32 * 32
    used = speed.memory_of_crafting(12_000, 32, 4, CPU)
    assert kept <= used < kept + 2**27 and len(held)


@pytest.mark.parametrize(
    ("changed", "words"),
    [(dict(nets=("resnet81",)), "did you mean"), (dict(batch=1), "batch"), (dict(rounds=0), "rounds")],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        speed.Plan(**changed)


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


ROWS = speed.rows_of_net("tiny", 64, "float32", SECONDS)


def test_ratios_are_taken_round_by_round():
    times = [r for r in ROWS if r["kind"] == "time"]
    slow = row(times, "SEM noise step", "plain")
    assert [slow[k] for k in ("seconds", "seconds_low", "seconds_high")] == [8, 6, 9]
    # 6/1, 9/3, 8/2: the median of these, not 8/2 of the medians by chance, nor 6/3 and 9/1 of the ends.
    assert [slow[k] for k in ("ratio", "ratio_low", "ratio_high")] == [4, 3, 6]
    assert row(times, "input gradient", "engine without folding")["ratio"] == 1
    assert row(times, "SEM noise step", "engine")["ratio"] == 1 and len(times) == 4


def test_the_share_of_the_matmul_rate_is_taken_round_by_round():
    [rate] = [r for r in ROWS if r["kind"] == "rate"]
    flops = gradient_flops("tiny", 64)
    # The larger product does 8 times as much: in the same time, in 10 times the time, in twice the time.
    fastest = [2 * 2048**3, 2 * 1024**3 / 0.2, 2 * 2048**3 / 8]
    assert rate["gradient_flops"] == flops / 0.5 and rate["matmul_flops"] == sorted(fastest)[1]
    shares = sorted(flops / g / m for g, m in zip((0.5, 0.4, 0.8), fastest, strict=True))
    assert [rate[k] for k in ("share_low", "share", "share_high")] == pytest.approx(shares)


def test_sets_are_compared_with_the_smallest():
    rows = speed.rows_of_sets("tiny", {100: [200, 400], 800: [2400, 3200]})
    assert [(r["images"], r["seconds"], r["ratio"], r["ratio_high"]) for r in rows] == [
        (100, 3, 1, 1), (800, 3.5, 1.25, 1.5),
    ]  # fmt: skip


# -- for people --------------------------------------------------------------------------------------------------------


@pytest.fixture
def result():
    rows = [*ROWS, *speed.rows_of_sets("tiny", {100: [0.2], 800: [2.4]})]
    for n, used in ((800, 2**29), (80, None)):
        rows.append({"kind": "memory", "net": "tiny", "images": n, "size": 32, "batch": 4, "bytes": used})
    plan = {"batch": 4, "samples": 1, "attack_steps": 2, "rounds": 3, "set_rounds": 1}
    return {"hardware": speed.hardware(CPU), "plan": plan, "rows": rows}


def test_the_table_says_every_row_once(result):
    text = bench_tables(result)
    for words in (
        "tiny | SEM noise step | plain | 8 (6 to 9) | 4 (3 to 6)",
        "tiny | SEM noise step | engine | 2 (1 to 3) | 1 (1 to 1)",
        "tiny | input gradient | engine without folding | 0.8 (0.5 to 0.8) | 1 (1 to 2)",
        "tiny | 100 | 0.002 (0.002 to 0.002) | 1 (1 to 1)",
        "tiny | 800 | 0.003 (0.003 to 0.003) | 1.5 (1.5 to 1.5)",
        "tiny | 800 | 32 | 4 | 536,870,912",
        "tiny | 80 | 32 | 4 | not known, its process failed",
        "batch 4 of 32 px, samples a noise step: 1, ascent steps in REM and AT: 2; medians of 3 rounds",
    ):
        assert " ".join(text.split()).count(words) == 1, words
    assert torch.__version__ in text and "| tiny | float32 " in text


def test_the_figure_shows_the_ratios_with_their_range_and_the_cost_by_set(result):
    panels = bench_figure(result).axes
    bars = [[patch.get_width() for patch in axes.patches] for axes in panels[:2]]
    assert bars == [[4], [1]]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["tiny: SEM noise step"]
    reach = panels[0].collections[0].get_segments()[0][:, 0]
    assert reach.tolist() == [3, 6]
    assert panels[2].lines[0].get_ydata().tolist() == [2, 3]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["100", "800"]


def test_the_committed_result_is_still_read():
    folder = Path(__file__).parents[1] / "results/bench"
    committed = json.loads((folder / "bench.json").read_text())
    assert bench_tables(committed) + "\n" == (folder / "table.md").read_text()
    assert len(bench_figure(committed).axes[0].patches) == 10


def test_nothing_switched_off_is_an_empty_panel(result):
    result["rows"] = [r for r in result["rows"] if r.get("path") != "engine without folding"]
    assert [len(axes.patches) for axes in bench_figure(result).axes] == [1, 0, 0]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_the_command_reports_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    too_much = (2**45, 32, 4)
    monkeypatch.setattr(speed, "QUICK", replace(PLAN, memory=(too_much,)))
    out = tmp_path / "out"
    assert main(["bench", "--quick", "--samples", "1", "--precision", "float32", "--json", "--out", str(out)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found == json.loads((out / "bench.json").read_text())
    assert found["plan"]["samples"] == 1 and found["hardware"]["precision"] == "float32"
    rows = {kind: [r for r in found["rows"] if r["kind"] == kind] for kind in ("time", "rate", "set", "memory")}
    assert sum(map(len, rows.values())) == len(found["rows"]) and [r["images"] for r in rows["set"]] == [32, 64]
    works = {(r["work"], r["path"]) for r in rows["time"]}
    assert works >= set(itertools.product(PASSES, ("plain", "engine")))
    assert works >= {("input gradient", f"engine without {name}") for name in ("channels_last", "folding")}
    assert ("SEM noise step", "engine without batching") in works
    assert all(r["seconds_low"] <= r["seconds"] <= r["seconds_high"] for r in rows["time"] + rows["set"])
    assert [r["bytes"] for r in rows["memory"]] == [None]
    assert said.err.startswith("tiny on cpu in float32, rounds: 1\n")
    assert (out / "table.md").read_text() == bench_tables(found) + "\n"
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--models", "resnet81"], "did you mean resnet18?"),
        (["--rounds", "0"], "a whole number >= 1, got 0"),
        (["--out", "taken"], "the output taken is a file; name a folder"),
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
