"""What the command line says and returns: reports, help, and one clear line for whatever it is given wrongly."""

import io
import json
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hostile import make_corrupt
from matplotlib.text import Text
from photos import contents, image_split, make_photos
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from semkit import __version__
from semkit.__main__ import main
from semkit.analysis import cluster
from semkit.analysis.figures import sweep_figure
from semkit.analysis.report import read_rows
from semkit.app.cli import COMMANDS
from semkit.images.loading import load
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.nets.models import build, save_net
from semkit.protections.methods import craft_recipe

QUICK = ["--preset", "quick", "--size", "8"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with 8 photos in `photos`."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", 8)
    return tmp_path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with 8 photos in `photos`, and what protect made of them in `out`; to be read only."""
    folder = tmp_path_factory.mktemp("pristine")
    make_photos(folder / "photos", 8)
    assert main(["protect", str(folder / "photos"), str(folder / "out"), *QUICK]) == 0
    return folder


@pytest.fixture
def finished(pristine, here):
    """The current folder, with the same 8 photos and a copy of `out`."""
    shutil.copytree(pristine / "out", here / "out")
    return here


def run(*arguments):
    """The exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def complaint(capsys, *arguments):
    """The one line on stderr of a call that must exit with 2 and print nothing else."""
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("semkit: ") and said.err.count("\n") == 1, said
    return said.err


def one_class(folder):
    for path in (folder / "photos/b").iterdir():
        path.rename(folder / "photos/a" / ("b" + path.name))
    (folder / "photos/b").rmdir()


def a_file(folder):
    (folder / "photos").rename(folder / "moved")
    (folder / "photos").touch()


def no_readable_image(folder):
    for path in (folder / "photos/b").iterdir():
        path.write_bytes(b"no image")


BAD_FOLDERS = {
    "missing": (lambda folder: (folder / "photos").rename(folder / "gone"), [], "photos: no such folder"),
    "empty": (lambda folder: [p.unlink() for p in (folder / "photos").rglob("*.png")], [], "no images; a folder with"),
    "a file": (a_file, [], "photos: a file, not a folder"),
    "one class": (one_class, [], "one class only, 'a'; at least two are needed"),
    "corrupt file": (no_readable_image, [], "photos/b/01.png: not in an image format that semkit reads; --skip-unrea"),
    "empty class": (no_readable_image, ["--skip-unreadable"], "class 'b' has no images that can be read"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_and_nothing_is_written(here, capsys, kind):
    spoil, more, words = BAD_FOLDERS[kind]
    spoil(here)
    before = contents(here)
    assert words in complaint(capsys, "protect", "photos", "out", *QUICK, *more)
    assert contents(here) == before and not (here / "out").exists()


BAD_OPTIONS = [
    (["--radius", "0.03"], "looks like a fraction of 1; write pixel levels: 8, not 8/255"),
    (["--radius", "-8"], "radius must be a finite number of pixel levels >= 0, got -8"),
    (["--radius", "nan"], "finite number of pixel levels"),
    (["--radius", "eight"], "radius must be a number of pixel levels, got 'eight'"),
    (["--radius", "0"], "radius must be 1 level at least"),
    (["--radius", "300"], "radius must be at most 127 levels"),
    (["--perturbation-radius", "0.03"], "looks like a fraction"),
    (["--limit", "-3"], "N must be a whole number >= 2, got -3"),
    (["--limit", "0"], "a whole number >= 2"),
    (["--limit", "2.5"], "a whole number >= 2, got '2.5'"),
    (["--limit", "²"], "a whole number"),
    (["--size", "0"], "a whole number >= 8"),
    (["--seed", "-1"], "a whole number >= 0, got -1"),
    (["--seed", str(2**64)], f"N must be at most {2**63 - 1}, got {2**64}"),
    (["--fraction", "0"], "fraction must be above 0 and at most 1, got 0"),
    (["--fraction", "1.5"], "fraction must be above 0 and at most 1, got 1.5"),
    (["--fraction", "nan"], "fraction must be above 0 and at most 1, got nan"),
    (["--method", "sam"], "unknown method 'sam'; did you mean sem?"),
    (["--preset", "leson"], "unknown preset 'leson'; did you mean lesson?"),
    (["--surrogate", "resnet-18"], "did you mean resnet18?"),
    (["--device", "gpu"], "device must be auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
    (["--precision", "float16"], "did you mean bfloat16?"),
    (["--perturbation-radius", "1e308"], "radius must be at most 1e+12 pixel levels, got 1e+308"),
    (["--size", "1000000000"], "size must be at most 16384, got 1000000000"),
    (["--size", str(2**62)], "size must be at most 16384"),
    (["--fraction", "1.0000001"], "fraction must be above 0 and at most 1, got 1.0000001"),
    (["--method", "cuda", "--key", "12345678", "--kernel", str(2**63 - 1)], "kernel must be at most 255"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
]


def words_of(value):
    return " ".join(value) if isinstance(value, list) else ""


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=words_of)
def test_a_bad_option_is_one_line_and_nothing_is_written(here, capsys, options, words):
    assert words in complaint(capsys, "protect", "photos", "out", "--preset", "quick", *options)
    assert not (here / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["protect photos out", "learn photos", "sweep photos --out out", "demo --out out"])
def test_no_gpu_where_one_is_asked_for_is_one_line(here, capsys, command):
    assert "torch sees no CUDA GPU; write cpu or auto" in complaint(capsys, *command.split(), "--device", "cuda")
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["protct", "photos", "out"], "unknown command 'protct'; did you mean protect?"),
        ([], "arguments are required: COMMAND"),
        (["protect", "photos"], "arguments are required: OUT"),
        (["protect", "cifr10", "out"], "did you mean cifar10?"),
        (["protect", "cifar10", "out", "--data", "nowhere"], "cifar10 is not in nowhere or is broken: add --download"),
        (["learn", "photos", "--learner", "tinny"], "did you mean tiny?"),
        (["learn", "photos", "--seeds", "0"], "a whole number >= 1"),
        (["learn", "photos", "--split-seed", str(2**64)], f"N must be at most {2**63 - 1}"),
        (["learn", "photos", "--norm", "l3"], "unknown norm"),
        (["learn", "photos", "--protected", "nowhere"], "nowhere/report.json is missing; semkit protect writes it"),
        (["learn", "photos", "--limit", "1"], "a whole number >= 2"),
        (["check", "photos", "nowhere"], "nowhere/report.json is missing; semkit protect writes it"),
        (["check", "photos", "photos"], "photos/report.json is missing"),
        (["sweep", "photos", "--out", "o", "--methods", "sam"], "did you mean sem?"),
        (["sweep", "photos", "--out", "o", "--radii", "0.02"], "looks like a fraction"),
        (["sweep", "photos", "--out", "o", "--learner-steps", "-1"], "a whole number >= 1, got -1"),
        (["convert", "nothing.npy", "x.safetensors"], "nothing.npy"),
        (["convert", "nothing.npy", "x.safetensor"], "did you mean .safetensors?"),
        (["lab", "nothing.ipynb"], "no notebook nothing.ipynb"),
    ],
    ids=words_of,
)
def test_bad_words_are_one_line(here, capsys, command, words):
    before = contents(here)
    assert words in complaint(capsys, *command)
    assert contents(here) == before


def test_a_limit_below_the_number_of_classes_is_one_line(here, capsys):
    make_photos(here / "three", 9, classes=3)
    words = "limit must be at least the number of classes, 3, got 2"
    assert words in complaint(capsys, "protect", "three", "out", "--limit", 2, *QUICK)
    assert not (here / "out").exists()


def test_images_and_output_that_lie_in_each_other_are_one_line(here, capsys):
    before = contents(here)
    for images, out in (("photos", "photos/out"), ("photos", "photos"), ("photos", "."), ("./photos", "photos/a")):
        assert "lie in each other; name another" in complaint(capsys, "protect", images, out, *QUICK)
    (here / "link").symlink_to(here / "photos")
    assert "lie in each other" in complaint(capsys, "protect", "photos", "link/out", *QUICK)
    (here / "link").unlink()
    (here / "elsewhere").mkdir()
    (here / "photos/a").rename(here / "elsewhere/a")
    (here / "photos/a").symlink_to(here / "elsewhere/a")
    for out in ("elsewhere/a/out", "elsewhere/a", "elsewhere"):
        assert "lie in each other" in complaint(capsys, "protect", "photos", out, *QUICK)
    (here / "photos/a").unlink()
    (here / "elsewhere/a").rename(here / "photos/a")
    assert contents(here) == before


def test_an_output_that_is_taken_is_one_line_and_left_alone(finished, capsys):
    (finished / "file").touch()
    (finished / "mine").mkdir()
    (finished / "mine/thesis.txt").write_text("years of work")
    before = contents(finished)
    protect = ["protect", "photos", *QUICK]
    assert "is a file; name a folder" in complaint(capsys, *protect, "file")
    for more in ([], ["--resume"]):
        assert "is not empty; name another folder" in complaint(capsys, *protect, "mine", *more)
        for option, what in (("--seed", "seed"), ("--radius", "recipe"), ("--limit", "images, limit")):
            said = complaint(capsys, *protect, "out", *more, option, 6)
            assert f"was begun with other settings ({what}); name another folder" in said
    assert "--resume continues it, or name another folder" in complaint(capsys, *protect, "out")
    (finished / "photos/a/00.png").write_bytes((finished / "photos/b/01.png").read_bytes())
    assert "other settings (images)" in complaint(capsys, *protect, "out", "--resume")
    (finished / "photos/a/00.png").write_bytes(before["photos/a/00.png"])
    assert contents(finished) == before


def test_the_same_run_may_be_resumed_under_another_name_of_the_folder(finished):
    assert run("protect", finished / "photos", "./out", "--resume", *QUICK) == 0


RESUME = ["protect", "photos", "out", "--resume", *QUICK]
CHECK = ["check", "photos", "out"]
LEARN = ["learn", "photos", "--protected", "out", *QUICK]


@pytest.mark.parametrize("text", ['{"radius": ', "[]", "null", "[" * 100_000, None], ids=lambda text: str(text)[:9])
@pytest.mark.parametrize(
    ("file", "command"), [("run.json", RESUME), ("report.json", RESUME), ("report.json", CHECK), ("report.json", LEARN)]
)
def test_a_damaged_record_is_one_line(finished, capsys, file, command, text):
    (finished / "out" / file).unlink()
    if text is None:
        os.mkfifo(finished / "out" / file)
    else:
        (finished / "out" / file).write_text(text)
    assert f"out/{file} is damaged (" in complaint(capsys, *command)


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        *((CHECK, "radius", value) for value in ("8", float("nan"), float("inf"), -1, 0.03, True, 10**400)),
        *((CHECK, "size", value) for value in (32.0, None, 0, 10**9, 10**30)),
        *((CHECK, "limit", value) for value in ("x", 0)), (CHECK, "skip_unreadable", 1), (CHECK, "images", ...),
        *((LEARN, field, "8") for field in ("radius", "images", "limit")),
        *((RESUME, "seconds", value) for value in (..., "x", None, 10**400)),
        *((RESUME, "skipped", value) for value in (..., 3, [3])), (RESUME, "psnr_db", "x"), (RESUME, "protected", ...),
    ],
    ids=lambda value: str(value)[:12] if not isinstance(value, list) or len(value) == 1 else value[0],
)  # fmt: skip
def test_a_report_with_a_field_that_is_missing_or_cannot_be_is_one_line(finished, capsys, command, field, value):
    report = json.loads((finished / "out/report.json").read_text())
    report = {name: old for name, old in {**report, field: value}.items() if old is not ...}
    (finished / "out/report.json").write_text(json.dumps(report))
    said = complaint(capsys, *command)
    assert "out/report.json is damaged (" in said and field in said


def test_links_that_lead_to_themselves_are_one_line(here, capsys):
    (here / "loop").symlink_to(here / "loop")
    assert "loop: no such folder" in complaint(capsys, "protect", "loop", "out", *QUICK)
    assert not (here / "out").exists()
    assert "loop is a broken link; name a folder" in complaint(capsys, "protect", "photos", "loop", *QUICK)


def test_unreadable_files_are_left_out_and_listed_where_asked_for(here, capsys):
    make_corrupt(here / "corrupt")
    (here / "corrupt/empty.jpg").rename(here / "photos/a/two\nlines.jpg")
    assert run("protect", "photos", "out", "--skip-unreadable", *QUICK) == 0
    assert "skipped, unreadable: a/two\\nlines.jpg\n" in capsys.readouterr().out
    assert json.loads((here / "out/report.json").read_text())["skipped"] == ["a/two\nlines.jpg"]
    assert run("check", "photos", "out") == 0
    assert "not protected, unreadable: a/two\\nlines.jpg\n" in capsys.readouterr().out


@pytest.mark.whole
def test_learners_of_a_part_of_a_folder_want_the_whole_of_it_protected(here, capsys):
    assert run("protect", "photos", "part", "--limit", 4, *QUICK) == run("protect", "photos", "out", *QUICK) == 0
    capsys.readouterr()
    learn = ["learn", "photos", "--limit", 4, *QUICK, "--protected"]  # a folder is divided first, so these are others
    assert "for every training image: protect without --limit 4" in complaint(capsys, *learn, "part")
    assert run(*learn, "out") == 0


@pytest.mark.whole
def test_noise_that_is_trained_to_stand_nothing_is_made(here):
    for method in ("sem", "rem"):
        assert run("protect", "photos", method, "--method", method, "--perturbation-radius", 0, *QUICK) == 0


@pytest.mark.whole
def test_what_is_no_image_of_a_class_is_named(here, capsys):
    for name in ("loose.png", "a/phone.heic", "a/notes.txt", "b/Thumbs.db"):
        (here / "photos" / name).write_bytes((here / "photos/a/00.png").read_bytes())
    line = "left out, not taken for images of a class: loose.png, a/notes.txt, a/phone.heic and 1"
    for command in (["protect", "photos", "out"], ["learn", "photos"], ["learn", "photos", "--protected", "out"]):
        assert run(*command, *QUICK) == 0
        assert f"{line} more, all in " in capsys.readouterr().out
    make_photos(here / "parts/train", 8), make_photos(here / "parts/test", 8), make_photos(here / "parts/val", 8)
    assert run("learn", "parts", *QUICK, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["ignored"] == ["val/"] and "class: val/\n" in said.err


def test_protected_files_of_another_set_are_one_line(finished, capsys):
    make_photos(finished / "others", 8, seed=5)
    said = complaint(capsys, "learn", "others", "--protected", "out", *QUICK)
    assert "out protects other images: a/" in said and "levels from its original" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["photos/a/00.png", "photos/a", "photos"])
def test_what_may_not_be_read_is_one_line(here, capsys, name):
    mode = (here / name).stat().st_mode
    (here / name).chmod(0)
    said = complaint(capsys, "protect", "photos", "out", *QUICK)
    (here / name).chmod(mode)
    assert f"{name}: Permission denied" in said and not (here / "out").exists()


def test_names_that_are_no_text_are_printed_all_the_same(here, capsys):
    (here / os.fsdecode(b"photos/a/\xff.png")).write_bytes(b"no image")
    assert "photos/a/\\xff.png" in complaint(capsys, "protect", "photos", "out", *QUICK)
    assert run("protect", "photos", "out", "--skip-unreadable", *QUICK) == 0
    assert "a/\\xff.png" in capsys.readouterr().out


class _Malicious:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_malicious_pickle_is_one_line_and_does_nothing(here, capsys):
    (here / "noise.pkl").write_bytes(pickle.dumps(_Malicious()))
    assert "noise.pkl" in complaint(capsys, "convert", "noise.pkl", "noise.safetensors")
    assert not (here / "harmed").exists() and not (here / "noise.safetensors").exists()


def test_convert_takes_the_unit_that_its_complaint_asks_for(here, capsys):
    np.save(here / "noise.npy", np.full((2, 3, 4, 4), 0.9))
    assert "say unit levels or fraction" in complaint(capsys, "convert", "noise.npy", "noise.safetensors")
    assert run("convert", "noise.npy", "noise.safetensors", "--unit", "levels", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "destination": "noise.safetensors", "shape": [2, 3, 4, 4], "radius": 1,
    }  # fmt: skip
    assert "exists already" in complaint(capsys, "convert", "noise.npy", "noise.safetensors", "--unit", "levels")


REPORTS = {
    "check": (["check", "photos", "out"], {"checked", "unchanged", "radius", "problems", "skipped"}),
    "learn": (["learn", "photos", *QUICK, "--seeds", "2"], {"rows", "last", "recipe", "images", "test_images"}),
    "learn protected": (["learn", "photos", "--protected", "out", *QUICK], {"rows", "last"}),
    "protect": (["protect", "photos", "new", *QUICK], {"psnr_db", "passes"}),
}


@pytest.mark.parametrize("command", REPORTS)
def test_json_alone_is_on_stdout_where_it_is_asked_for(pristine, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(pristine)
    arguments, names = REPORTS[command]
    assert run(*[tmp_path / "new" if word == "new" else word for word in arguments], "--json") == 0
    assert names <= json.loads(capsys.readouterr().out).keys()


def test_without_json_the_report_is_on_stdout_the_cost_on_stderr_and_no_bar_where_there_is_no_terminal(here, capsys):
    assert run("protect", "photos", "out", *QUICK) == 0
    said = capsys.readouterr()
    assert (
        said.out.startswith("8 of 8 images protected in out/images (radius 8, PSNR ")
        and said.out.count("\n") == 1
        and "None" not in said.out
    )
    assert said.err.startswith("SEM noise for 8 images, quick preset, tiny at 8 px: ") and "s\n" in said.err
    assert said.err.count("\n") == 1 and "\r" not in said.err
    assert run("learn", "photos", *QUICK) == 0
    said = capsys.readouterr()
    assert said.out.startswith("seed 0: clean test accuracy last ") and said.out.count("\n") == 1
    assert said.err.startswith("1 x ERM: tiny on ImageSet('photos', 6 images of 8x8") and "\r" not in said.err
    assert re.search(r", \d+ passes on cpu, at most about \d+ s\n$", said.err)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_are_drawn_on_a_terminal(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    assert run("protect", "photos", "out", *QUICK) == 0
    drawn = terminal.getvalue()
    assert all(f"\r{job}: " in drawn for job in ("reading images", "crafting noise", "writing images"))
    assert "\rSEM noise for 8 images" in drawn  # not in the middle of a bar's line
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_every_option_is_for(capsys, command):
    assert run(*command.split(), "--help") == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: semkit") and said.err == ""
    described = re.sub(r"\n {10,}", "  ", said.out[said.out.index("options:") :])  # help may stand on the next line
    bare = [line for line in described.splitlines() if line.startswith("  -") and "  " not in line.strip()]
    assert not bare


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_of_help_says_what_must_be_given(capsys, command):
    assert run(command, "--help") == 0
    usage, *rest = capsys.readouterr().out.splitlines()
    given = rest[: rest.index("options:")]
    assert re.findall(r"[A-Z]+", usage.replace("--out DIR", "")) == re.findall(r"^  ([A-Z]+)", "\n".join(given), re.M)


def test_the_version_is_told(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"semkit {__version__}\n"


def test_check_exits_with_1_where_a_file_is_missing(finished, capsys):
    (finished / "out/images/a/00.png").unlink()
    assert run("check", "photos", "out", "--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["a/00.png: missing"]


@pytest.mark.whole
def test_sweep_writes_rows_table_and_figure_and_a_second_call_finds_its_runs(here, capsys):
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "em", "--radii", "0", "--seeds", "1", *QUICK]
    assert run(*sweep, "--json") == 0
    said = capsys.readouterr()
    assert [row["method"] for row in json.loads(said.out)] == ["clean", "em"] and "\r" not in said.err
    assert (here / "out/figure.png").stat().st_size and Image.open(here / "out/figure.png").convert("L")
    runs = contents(here / "out/runs")
    assert run(*sweep) == 0
    assert capsys.readouterr().out.startswith("| trained on")
    assert contents(here / "out/runs") == runs


def test_a_sweep_draws_noise_at_its_own_radius():
    split, made = image_split(20), {"em": craft_recipe("em", "quick", size=8, radius=2)}
    rows = pd.DataFrame([{"method": "em", "training_radius": 0, "seed": 0, "last": 0.5, "preset": "quick"}])
    figure = sweep_figure(rows, split.train, made, Lab(Engine("cpu", "float32")))
    assert any("±2 as" in text.get_text() for text in figure.findobj(Text))


@pytest.mark.whole
def test_what_a_killed_sweep_left_is_gone_after_the_next_one_begins(here):
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "--radii", "0", "--seeds", "1", *QUICK]
    assert run(*sweep) == 0
    for name in ("out/.semkit-0.tmp", "out/runs/.semkit-1.tmp"):
        (here / name).write_bytes(b"half of a result")
        os.utime(here / name, (0, 0))
    assert run(*sweep) == 0
    assert not list((here / "out").rglob(".*"))


def test_a_wrong_scheduler_is_refused_before_the_images_are_read(here, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWERS", 1)
    (here / "photos/a/00.png").write_bytes(b"no image")
    sweep = ["sweep", "photos", "--out", "out", *QUICK, "--scheduler", "tcp://127.0.0.1:9"]
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in complaint(capsys, *sweep)
    assert not (here / "out").exists()


@pytest.mark.whole
def test_a_sweep_of_shorter_learners_measures_its_noise(here):
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "em", "--radii", "0", "--seeds", "1", *QUICK]
    assert run(*sweep, "--learner-steps", 5, "--measure-noise") == 0
    for name in ("rows.csv", "noise.csv", "losses.csv", "rises.csv"):
        assert set(read_rows(here / "out" / name)["preset"]) == {"quick, 5 learner steps"}


def test_a_sweep_takes_other_nets_for_its_surrogates_and_learners(here, capsys):
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "em", "--radii", "0", "--seeds", "1", *QUICK]
    assert run(*sweep, "--surrogate", "conv4", "--learner", "small") == 0
    assert set(read_rows(here / "out/rows.csv")["preset"]) == {"quick, learner small, surrogate conv4"}
    [surrogate] = map(load_file, (here / "out/runs").glob("*.weights"))
    wanted = build("conv4", 2, size=8).state_dict()
    assert {name: w.shape for name, w in surrogate.items()} == {name: w.shape for name, w in wanted.items()}
    capsys.readouterr()
    assert "--learner: unknown model 'smal'; did you mean small" in complaint(capsys, *sweep, "--learner", "smal")
    assert "begun with other settings (learner)" in complaint(capsys, *sweep, "--surrogate", "conv4")


@pytest.mark.whole
def test_a_design_is_measured_and_a_second_call_finds_its_runs(here):
    sweep = ["sweep", "photos", "--out", "out", "--design", "stability", "--measure-noise", "--seeds", "1", *QUICK]
    assert run(*sweep, "--learner-steps", 6) == 0
    rows, noise, rises = (read_rows(here / f"out/{name}.csv") for name in ("rows", "noise", "rises"))
    assert (len(rows), len(noise), len(rises)) == (4 * 3, 3, 3 * 3 * 3)
    before = contents(here / "out")
    assert run(*sweep, "--learner-steps", 6) == 0
    assert contents(here / "out") == before


@pytest.mark.whole
def test_strips_show_protected_images_above_their_noise(here):
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "em", "cuda", "--radii", "0", "--strips", *QUICK]
    assert run(*sweep, "--seeds", 1, "--learner-steps", 1) == 0
    assert [*contents(here / "out/strips")] == ["em.png"]
    picture = np.asarray(Image.open(here / "out/strips/em.png")).astype(int)
    train = load("photos", size=8).train
    for k in (0, 1):
        first = train.images[train.labels.tolist().index(k)].permute(1, 2, 0).numpy().astype(int)
        protected, noise = picture[:8, 8 * k : 8 * k + 8], picture[8:, 8 * k : 8 * k + 8]
        change, inside = protected - first, (protected > 0) & (protected < 255)  # at the ends less of the noise is seen
        assert 0 < np.abs(change).max() <= 8
        assert (np.abs(noise - 127.5 * (1 + change / 8))[inside] <= 1).all()  # -8 levels black, +8 white


@pytest.mark.whole
def test_the_learners_of_a_design_train_as_long_as_asked_for(here, capsys):
    sweep = ["sweep", "photos", "--out", "out", "--design", "cuda-defences", "--seeds", "1", *QUICK, "--test-limit", 2]
    make_photos(here / "photos/train", 8), make_photos(here / "photos/test", 8, seed=1)
    shutil.rmtree(here / "photos/a"), shutil.rmtree(here / "photos/b")
    assert run(*sweep, "--learner-steps", 3, "--json") == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert {row["learner"] for row in rows} >= {"fine-tuned", "last layer", "DAT"}
    assert {row["curve"][-1][0] for row in rows} == {3} and {row["preset"] for row in rows} == {
        "quick, 3 learner steps"
    }
    passes = sum(row["passes"] for row in rows) + 3 * 6  # and the pretraining on the six images that are left
    assert f" {passes:,} passes" in said.err


def test_what_a_design_leaves_no_room_for_is_refused_in_one_line(here, capsys):
    sweep = ["sweep", "photos", "--out", "out", "--design"]
    for own in (("--radii", "0", "4"), ("--learner", "small")):
        said = complaint(capsys, *sweep, "cuda-defences", *own)
        assert "--design cuda-defences has learners of its own: leave --radii and --learner out" in said
    for own in (("--methods", "em"), ("--surrogate", "small")):
        said = complaint(capsys, *sweep, "pairs", *own)
        assert "--design pairs has methods of its own: leave --methods and --surrogate out" in said
    assert "leave --measure-noise out" in complaint(capsys, *sweep, "cuda", "--measure-noise")
    assert not (here / "out").exists()


@pytest.mark.whole
def test_fine_tuned_learners_without_images_to_begin_with_are_said_to_be_missing(here, capsys):
    how = ["--design", "cuda-defences", "--seeds", "1", "--learner-steps", 1, *QUICK]
    assert run("sweep", "photos", "--out", "out", *how) == 0
    said = capsys.readouterr().err
    assert "no fine-tuned learners: they begin with the test images that --test-limit N leaves over" in said


@pytest.mark.whole
def test_protected_images_are_left_out_by_their_originals(here, capsys):
    assert run("protect", "photos", "out", *QUICK) == 0
    learn = ["learn", "photos", "--protected", "out", *QUICK, "--json", "--without"]
    capsys.readouterr()
    assert run(*learn, "2") == 0
    assert "4 images of 8x8" in json.loads(capsys.readouterr().out)["images"]
    assert "--without 6 leaves 0 of" in complaint(capsys, *learn, "6")


@pytest.mark.whole
def test_every_report_says_how_the_passes_were_made(here, capsys):
    protect = ["protect", "photos", *QUICK, "--precision", "float32", "--switch-off"]
    assert run(*protect, "folding", "channels_last", "--", "out") == 0
    report = json.loads((here / "out/report.json").read_text())
    assert report["engine"] == (
        "cpu, float32, not channels_last (switched off), not folded (switched off), "
        "samples batched up to 32 MiB a tensor, freed memory kept"
    )
    assert (report["folded"], report["channels_last"]) == (False, False)
    assert run(*protect, "memory", "batching", "--", "out2") == 0
    assert json.loads((here / "out2/report.json").read_text())["engine"] == (
        "cpu, float32, channels_last, folded, not samples batched up to 32 MiB a tensor (switched off), "
        "not freed memory kept (switched off)"
    )
    capsys.readouterr()
    how = [*QUICK, "--precision", "float32", "--json"]
    assert run("learn", "photos", *how) == 0
    usual = "cpu, float32, channels_last, folded, samples batched up to 32 MiB a tensor, freed memory kept"
    assert [row["engine"] for row in json.loads(capsys.readouterr().out)["rows"]] == [usual]
    assert run("sweep", "photos", *how, "--seeds", 1, "--radii", 0, "--methods", "clean", "em", "--out", "rows") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["noise_engine"]) for row in rows] == [(usual, None), (usual, usual)]
    assert json.loads((here / "rows/run.json").read_text())["engine"] == Engine("cpu", "float32").settings()


@pytest.mark.filterwarnings("default:torch.compile failed")
def test_where_compiling_fails_one_line_says_so_and_the_report_why(here, capsys, monkeypatch):
    def no_compiler(graph):
        raise OSError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert run("protect", "photos", "out", *QUICK, "--compile") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert said == ["semkit: torch.compile failed, the net runs uncompiled: no C++ compiler"]
    assert ", folded, not compiled (no C++ compiler), " in json.loads((here / "out/report.json").read_text())["engine"]


@pytest.mark.whole
def test_rows_of_another_sweep_and_what_is_not_of_semkit_are_left_alone(here, capsys):
    sweep = ["sweep", "photos", "--methods", "clean", "--radii", 0, "--seeds", 1, *QUICK, "--out"]
    (here / "file").touch()
    (here / "mine").mkdir()
    (here / "mine/figure.png").write_text("years of work")
    assert run(*sweep, "out") == 0
    capsys.readouterr()
    before = contents(here)
    assert "file is a file; name a folder" in complaint(capsys, *sweep, "file")
    assert "mine has a figure.png that is not of this command; name" in complaint(capsys, *sweep, "mine")
    assert "lie in each other" in complaint(capsys, *sweep, "photos/out")
    others = (
        ("--methods", "em", "methods"), ("--radii", 4, "radii"), ("--limit", 4, "images"),
        ("--precision", "float64", "engine"),
    )  # fmt: skip
    for option, value, what in others:
        said = complaint(capsys, *sweep, "out", option, value)
        assert f"was begun with other settings ({what}); name another folder" in said
    assert contents(here) == before
    assert "file is a file" in complaint(capsys, "demo", "--out", "file")
    assert run(*sweep, "out", "--seeds", 2) == 0


@pytest.mark.parametrize(
    ("command", "file"),
    [(["bench", "--quick", "--out"], "table.md"), (["gpu-check", "photos"], "rows.csv"),
     (["gpu-check", "photos"], "speed.json")],
)  # fmt: skip
def test_bench_and_gpu_check_leave_files_of_others_alone(here, capsys, command, file):
    (here / "mine").mkdir()
    (here / "mine" / file).write_text("years of work")
    before = contents(here)
    assert f"mine has a {file} that is not of this command" in complaint(capsys, *command, "mine")
    assert contents(here) == before


@pytest.mark.whole
def test_a_sweep_may_grow_and_one_of_an_older_semkit_is_taken_over(here, capsys):
    sweep = ["sweep", "photos", "--radii", 0, "--seeds", 1, *QUICK, "--out", "out", "--json", "--methods"]
    assert run(*sweep, "clean") == 0
    [clean] = json.loads(capsys.readouterr().out)
    runs = contents(here / "out/runs")
    (here / "out/run.json").unlink()  # 0.2 wrote none
    assert run(*sweep, "em", "clean") == 0
    assert clean in json.loads(capsys.readouterr().out) and runs.items() < contents(here / "out/runs").items()
    assert "other settings (methods)" in complaint(capsys, *sweep, "clean")


def test_learn_reports_its_countermeasures_and_changes_the_training_images_only(here, capsys):
    assert run("learn", "photos", "--countermeasure", "grayscale", "jpeg", "--json", *QUICK) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["countermeasures"] == ["grayscale", "jpeg"] and "photos, grayscale, jpeg" in report["images"]
    assert "did you mean jpeg?" in complaint(capsys, "learn", "photos", "--countermeasure", "jpg")


@pytest.mark.whole
def test_a_sweep_with_countermeasures_names_them_and_without_them_has_no_such_column(here, capsys):
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "em", "--radii", "0", "--seeds", "1", *QUICK]
    assert run(*sweep, "--countermeasures", "none", "jpeg", "mixup", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["countermeasure"] for row in rows] == 2 * ["none", "jpeg", "mixup"]
    assert Image.open(here / "out/figure.png").convert("L")
    lines = [line.split("|")[1].strip() for line in (here / "out/table.md").read_text().splitlines()]
    assert lines[2:] == ["clean images", "clean images, jpeg", "clean images, mixup", "EM", "EM, jpeg", "EM, mixup"]
    runs = contents(here / "out/runs")
    shutil.copytree(here / "out/runs", here / "plain/runs")
    sweep[sweep.index("out")] = "plain"
    assert run(*sweep, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    strip = lambda row: {name: value for name, value in row.items() if name != "countermeasure"}  # noqa: E731
    assert plain == [strip(row) for row in rows if row["countermeasure"] == "none"]
    assert contents(here / "plain/runs") == runs
    assert "did you mean median?" in complaint(capsys, *sweep, "--countermeasures", "medain")


@pytest.mark.whole
def test_what_a_trainer_does_in_training_works_in_learn_and_in_a_sweep(here, capsys):
    learn = ["learn", "photos", *QUICK, "--json", "--countermeasure"]
    assert run(*learn, "jpeg-30", "smoothing") == 0
    report = json.loads(capsys.readouterr().out)
    assert "photos, jpeg-30" in report["images"] and "Gaussian(sigma=127.5)" in report["recipe"]
    assert 0 <= report["rows"][0]["smoothed"] <= 1
    assert "finetune needs spare clean images" in complaint(capsys, *learn, "finetune")
    assert "dat needs an ERM learner" in complaint(capsys, *learn, "dat", "--perturbation-radius", "4")
    assert "jpeg-N takes N from 1 to 95, got 0" in complaint(capsys, *learn, "jpeg-0")
    make_photos(here / "photos/train", 8), make_photos(here / "photos/test", 8, seed=1)
    shutil.rmtree(here / "photos/a"), shutil.rmtree(here / "photos/b")
    assert run(*learn, "finetune", "--test-limit", 2, "--seeds", 2) == 0
    said = capsys.readouterr()
    assert [row["pretrained_seed"] for row in json.loads(said.out)["rows"]] == [0, 1]
    assert f" {2 * 10 * (8 + 6):,} passes" in said.err  # a pretraining on the six images that are left, for every seed
    sweep = ["sweep", "photos", "--out", "out", "--methods", "clean", "--seeds", "1", *QUICK, "--test-limit", 2]
    names = ["none", "randomblur", "smoothing", "at-l2", "dat", "finetune", "lastlayer"]
    refused = complaint(capsys, *sweep, "--countermeasures", *names)
    assert "randomblur needs an ERM learner (radius 0), this one has PGD" in refused
    assert run(*sweep, "--radii", 0, "--countermeasures", *names, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["countermeasure"] for row in rows] == names
    assert [name for name, row in zip(names, rows, strict=True) if row.get("pretrained_seed") == 0] == names[-2:]
    assert Image.open(here / "out/figure.png").convert("L")


@pytest.mark.whole
def test_a_net_that_learn_saves_is_a_purifier_and_the_net_of_a_transform(here, capsys):
    assert "net.st: no such net; semkit learn IMAGES --save net.st makes" in complaint(
        capsys, "learn", "photos", "--countermeasure", "purifier=net.st"
    )
    assert "net.st: no such net" in complaint(capsys, "transform", "photos", "net.st", "--out", "out")
    learn = ["learn", "photos", *QUICK]
    assert "one net can be saved: --seeds 1" in complaint(capsys, *learn, "--save", "net.st", "--seeds", "2")
    assert run(*learn, "--limit", "4", "--without", "2", "--save", "net.st", "--json") == 0
    assert "2 images of 8x8" in json.loads(capsys.readouterr().out)["images"]
    assert "net.st exists already" in complaint(capsys, *learn, "--save", "net.st")
    assert run(*learn, "--countermeasure", "purifier=net.st", "--json") == 0
    assert "photos, purifier=net.st" in json.loads(capsys.readouterr().out)["images"]
    transform = ["transform", "photos", "net.st", "--out", "out", "--seeds", "1", "--attacked", "2", *QUICK]
    assert "radius 0 attacks nothing" in complaint(capsys, *transform, "--radius", 0)
    assert run(*transform, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["defence"] for row in rows} == {"ERM", "AT 4", "transform"}
    assert Image.open(here / "out/figure.png").convert("L")
    kept = contents(here / "out")
    assert run(*transform) == 0
    assert capsys.readouterr().out.startswith("| classifier") and contents(here / "out") == kept
    assert (here / "out/table.md").read_text().splitlines()[2].split("|")[4].strip() == "-"


@pytest.mark.whole
def test_names_that_the_terminal_cannot_print_do_not_spoil_the_exit_code(here, capsys, monkeypatch):
    (here / "photos/a/ねこ.png").write_bytes(b"no image")
    said = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", said)
    assert run("protect", "photos", "out", "--skip-unreadable", *QUICK) == 0
    assert b"skipped, unreadable: a/\\u306d\\u3053.png\n" in said.buffer.getvalue()


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=words_of)
def test_closed_streams_change_no_exit_code(finished, monkeypatch, closed):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert run("check", "photos", "out") == 0
    (finished / "out/images/a/00.png").unlink()
    assert run("check", "photos", "out") == 1
    assert run("check", "photos", "nowhere") == 2


def test_a_reader_that_is_gone_changes_no_exit_code(finished, capsys, monkeypatch):
    for code in (0, 1):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert run("check", "photos", "out") == code
        (finished / "out/images/a/00.png").unlink(missing_ok=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stderr_changes_no_exit_code_and_under_stdout_it_is_one_line(finished, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run("check", "photos", "nowhere") == 2
    monkeypatch.undo()
    monkeypatch.chdir(finished)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run("check", "photos", "out", "--json") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_not_said_to_work_the_next_time(here, capsys):
    assert run("protect", "photos", "a" * 300) == 2
    said = capsys.readouterr().err
    assert "File name too long" in said and "goes on" not in said


@pytest.mark.parametrize("command", [
    ["learn", ""], ["learn", "photos", "--protected", ""], ["learn", "photos", "--cache", ""],
    ["learn", "photos", "--save", ""], ["learn", "photos", "--data", ""], ["sweep", "", "--out", "out"],
    ["sweep", "photos", "--out", ""], ["transform", "photos", "", "--out", "out"], ["protect", "", "out"],
    ["protect", "photos", ""], ["check", "photos", ""], ["convert", "", "x.npy"], ["lab", ""], ["bench", "--out", ""],
], ids=words_of)  # fmt: skip
def test_an_empty_name_is_no_current_folder(here, capsys, command):
    before = contents(here)
    said = complaint(capsys, *command)
    assert "got an empty one; is it a variable that is not set?" in said or ": no such net" in said
    assert contents(here) == before


@pytest.mark.parametrize("without", [5, 6, 1000])
def test_a_learner_that_is_left_one_image_or_none_is_one_line(here, capsys, without):
    left = max(0, 6 - without)
    said = complaint(capsys, "learn", "photos", "--without", without, *QUICK)
    assert f"--without {without} leaves {left} of 6 images to train on, 2 are needed" in said


def test_more_seeds_than_anyone_waits_for_are_one_line(here, capsys):
    assert "N must be at most 9999" in complaint(capsys, "learn", "photos", "--seeds", 2**62)


def test_what_is_not_understood_is_named_unless_it_may_be_a_piece_of_a_key(here, capsys):
    words = "unrecognized arguments: three 'four; quote what has spaces in it"
    assert words in complaint(capsys, "protect", "photos", "out", "three", "'four")
    for command in (["--key", "my", "secret"], ["--kye=secret"], ["--kye", "secret"]):
        assert "secret" not in complaint(capsys, "protect", "photos", "out", *command)


@pytest.mark.whole
def test_a_net_whose_weights_are_not_numbers_is_one_line(here, capsys):
    assert run("learn", "photos", *QUICK, "--save", "net.st") == 0
    with safe_open(here / "net.st", framework="pt") as file:
        record = file.metadata()
    weights = load_file(here / "net.st")
    weights["1.weight"][0] = float("nan")
    save_file(weights, here / "bad.st", record)
    capsys.readouterr()
    assert run("learn", "photos", *QUICK, "--countermeasure", "purifier=bad.st") == 2
    assert "bad.st is no net that semkit can read: it has weights that are no finite" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_lab_as_root_is_one_line(here, capsys, monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(here))
    (here / "lesson.ipynb").write_text("{}")
    assert "JupyterLab does not run as root: use another account" in complaint(capsys, "lab", "lesson.ipynb")


def test_check_finds_added_files_of_every_kind_and_linked_folders(finished, capsys):
    added = ("a/phone.heic", "a/more.jfif", "a/.hidden.png", "b/new.avif", "tool.exe", "c/x.png")
    for name in (*added, ".DS_Store", "a/Thumbs.db"):
        (finished / "out/images" / name).parent.mkdir(exist_ok=True)
        (finished / "out/images" / name).touch()
    (finished / "out/images/d").symlink_to(finished / "photos/a")
    assert run("check", "photos", "out", "--json") == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems == [f"{name}: no original of it" for name in sorted((*added, "d"))]


def test_protected_images_are_not_taken_for_clean_ones_to_test_on(finished, capsys):
    shutil.copytree(finished / "out/images", finished / "report/images")
    for images in ("out/images", "out"):
        said = complaint(capsys, "learn", images, *QUICK)
        assert f"{images} is protected, test images too: learn IMAGES --protected " in said
    assert "is protected" in complaint(capsys, "sweep", "out/images", "--out", "rows", *QUICK)
    assert run("learn", "report/images", *QUICK) == 0  # a folder of that name which protect did not write
    (finished / "out/images").rename(finished / "train")
    (finished / "out/images").mkdir()
    (finished / "train").rename(finished / "out/images/train")
    shutil.copytree(finished / "photos", finished / "out/images/test")
    assert run("learn", "out/images", *QUICK) == 0  # with clean test images of its own


def test_runs_are_not_kept_among_the_images_where_the_next_call_would_take_them_for_a_class(here, capsys):
    assert "lie in each other; name another" in complaint(capsys, "learn", "photos", "--cache", "photos/runs", *QUICK)
    (here / "file").touch()
    assert "the output file is a file; name a folder" in complaint(capsys, "learn", "photos", "--cache", "file", *QUICK)
    assert "the output file is a file; name a folder" in complaint(capsys, "bench", "--quick", "--out", "file")
    assert sorted(path.name for path in (here / "photos").iterdir()) == ["a", "b"]


def test_a_net_that_cannot_be_saved_is_not_trained_first(here, capsys):
    (here / "file").touch()
    assert run("learn", "photos", "--save", "file/net.st", *QUICK) == 2
    said = capsys.readouterr()
    assert said.out == "" and "semkit: file: " in said.err and "goes on" not in said.err and "--cache" not in said.err


def test_a_refused_transform_leaves_its_folder_free_for_the_right_one(here, capsys):
    make_photos(here / "three", 30, classes=3)
    (here / "bad.st").write_bytes(b"no net")
    transform = ["transform", "three", "bad.st", "--out", "out", *QUICK]
    assert run(*transform) == 2 and "bad.st is no net that semkit can read" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_tilde_after_an_equals_sign_is_the_home_folder(here, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    assert run("protect", "photos", "~/out", *QUICK) == 0
    assert (here / "home/out/report.json").exists() and not (here / "~").exists()


@pytest.mark.whole
def test_a_net_for_images_of_one_size_is_refused_for_others_before_a_folder_is_claimed(here, capsys):
    pytest.importorskip("timm")
    net = build("deit_tiny", 2, size=8)
    save_net(net, here / "net.st", net="deit_tiny", classes=("a", "b"), size=8)
    quick = ["--preset", "quick", "--size", "12"]
    for command in (
        ["learn", "photos", "--countermeasure", "purifier=net.st"],
        ["transform", "photos", "net.st", "--out", "out"],
    ):
        assert "net.st takes images of another size: give both one --size" in complaint(capsys, *command, *quick)
    assert not (here / "out").exists()
