"""The page without a kernel: its numbers are Python's, its sliders take keys, and it needs no network."""

import itertools
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from photos import make_map

from semkit import read_rows
from semkit.__main__ import main
from semkit.analysis.designs import DESIGNS
from semkit.lessons import page, twopixels

MOVED = """() => [0, 1, 0, 1, 0].map(at => {
  const knob = document.getElementById("map-radius"), began = performance.now();
  knob.value = at;
  knob.dispatchEvent(new Event("input"));
  document.getElementById("map-figure").getBoundingClientRect();  // lays the figure out
  return performance.now() - began;
})"""
CUT = """() => [...document.querySelectorAll("section:not([hidden]) svg text")].filter(text => {
  const box = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
  return box.left < all.left || box.right > all.right || box.top < all.top || box.bottom > all.bottom;
}).map(text => text.textContent)"""
RESULTS = Path(__file__).parents[1] / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "semkit.html"
    assert main(["page", str(out), "--results", str(RESULTS)]) == 0
    return out


def test_the_page_is_one_small_file_without_addresses(written):
    text = written.read_text()
    assert len(text) < 2_000_000 and "{{" not in text
    assert not any(word in text for word in ("http:", "https:", "<link", 'src="//', "import("))


def test_a_page_may_be_written_again_and_other_files_may_not(written, tmp_path, capsys):
    assert main(["page", str(written), "--results", str(RESULTS)]) == 0
    mine = tmp_path / "mine.html"
    mine.write_text("my own page")
    assert main(["page", str(mine), "--results", str(RESULTS)]) == 2
    assert mine.read_text() == "my own page" and "name another file" in capsys.readouterr().err


def test_without_results_the_line_says_what_to_name(tmp_path, capsys):
    assert main(["page", str(tmp_path / "new/a.html"), "--results", str(tmp_path)]) == 2
    assert "--results" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_one_seed_has_no_interval_and_two_have():
    assert page.point(pd.Series([0.25])) == {"y": 25.0}
    found = page.point(pd.Series([0.2, 0.3]))
    assert found["y"] == pytest.approx(25) and found["low"] < 25 < found["high"]


def test_the_map_has_a_cell_for_each_setting_with_its_picture(tmp_path):
    assert page.mapped(tmp_path) is None
    rows = make_map(tmp_path)
    found = page.mapped(tmp_path)
    assert found["knobs"] == {"radius": [2, 8], "steps": [75, 600], "perturbation": [0, 4]}
    assert found["cells"].keys() == {"clean", *(f"{r}-{s}-{p}" for r in (2, 8) for s in (75, 600) for p in (0, 4))}
    of = rows.query("method == '8-600-4' and training_radius == 4")["last"]
    assert found["cells"]["8-600-4"]["AT 4/255"] == page.point(of) and "95 % interval of 3 seeds" in found["recipe"]
    assert found["cells"]["8-600-4"]["strip"].startswith("data:image/png") and "strip" not in found["cells"]["clean"]


@pytest.fixture
def opened(written):
    with in_browser(written) as tab:
        yield tab


@contextmanager
def in_browser(written):
    """The page in Chromium; asserts that it complains of nothing and asks no network."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, complaints = browser.new_page(), []
        tab.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        tab.goto(written.as_uri())
        yield tab
        assert complaints == []
        browser.close()


@pytest.mark.browser
@pytest.mark.whole
def test_the_page_computes_what_python_does(opened):
    cases = [(rho, radius, quiet) for rho in (0, 0.1, 0.25, 0.5) for radius in (0, 0.3, 0.5) for quiet in (1, 4, 20)]
    found = opened.evaluate("cases => cases.map(knobs => semkit.accuracy(...knobs))", cases)
    np.testing.assert_allclose(found, [twopixels.accuracy(*case) for case in cases], atol=1e-9)
    at = [-2, -1, -0.3, 0, 1, 1.7]
    np.testing.assert_allclose(opened.evaluate("at => at.map(semkit.loss)", at), twopixels.landscape(np.array(at)))
    for window in (0.2, 0.5, 1, 1.5):
        assert opened.evaluate("semkit.chosen", window) == pytest.approx(twopixels.chosen(window))


@pytest.mark.browser
@pytest.mark.whole
def test_sliders_answer_to_the_keyboard_and_figures_say_it_to_a_screen_reader(opened):
    opened.focus("#rho")
    before = opened.inner_text("#world-answer")
    opened.keyboard.press("ArrowRight")
    after, share = opened.inner_text("#world-answer"), 100 * twopixels.accuracy(0.05)
    assert before != after and f"{share:.1f} %" in after
    assert opened.get_attribute("#world-figure", "aria-label") == after
    opened.focus("#window")
    opened.keyboard.press("End")
    assert "SEM takes the valley" in opened.inner_text("#landscape-answer")
    opened.focus("#training")
    opened.keyboard.press("End")
    assert "SEM 24.9 %" in opened.inner_text("#sweep-answer")


@pytest.mark.browser
@pytest.mark.whole
def test_a_knob_over_the_map_shows_at_once_what_was_measured_there(tmp_path):
    shutil.copytree(RESULTS / "cifar10-lesson", tmp_path / "cifar10-lesson")
    rows = make_map(tmp_path / "map")
    page.write(tmp_path / "page.html", tmp_path)
    with in_browser(tmp_path / "page.html") as tab:
        for knob, key in (("radius", "End"), ("steps", "Home"), ("perturbation", "End")):
            tab.focus(f"#map-{knob}")
            tab.keyboard.press(key)
        of = rows.query("method == '8-75-4'").groupby("training_radius")["last"].mean()
        said = tab.inner_text("#map-answer")
        assert f"ERM {100 * of[0]:.1f} % [" in said and f"AT 4/255 {100 * of[4]:.1f} % [" in said
        assert tab.get_attribute("#map-figure", "aria-label") == said
        src = tab.get_attribute("#map-strip img", "src")
        assert tab.evaluate(CUT) == [], "texts that run out of their figures"
        took = tab.evaluate(MOVED)
        assert min(took) < 300 and tab.get_attribute("#map-strip img", "src") != src


def test_the_committed_map_has_every_setting_of_its_design():
    crafts = DESIGNS["map"]("demo", 32)
    rows, noise = (read_rows(RESULTS / "map" / f"{name}.csv") for name in ("rows", "noise"))
    wanted = [*itertools.product(crafts, (0, 4), range(3))]
    assert sorted(zip(rows["method"], rows["training_radius"], rows["seed"], strict=True)) == sorted(wanted)
    noisy = itertools.product([method for method, recipe in crafts.items() if recipe], range(3))
    assert sorted(zip(noise["method"], noise["seed"], strict=True)) == sorted(noisy)
    assert {strip.stem for strip in (RESULTS / "map" / "strips").glob("*.png")} == {*crafts} - {"clean"}


def test_the_committed_page_is_made_of_the_committed_results():
    assert (RESULTS.parent / "docs" / "semkit.html").read_text() == page.html(RESULTS)
