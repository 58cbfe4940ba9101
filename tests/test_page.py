"""The page without a kernel: its numbers are Python's, its sliders take keys, and it needs no network."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from semkit.__main__ import main
from semkit.lessons import page, twopixels

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
    assert main(["page", str(tmp_path / "a.html"), "--results", str(tmp_path)]) == 2
    assert "--results" in capsys.readouterr().err and not (tmp_path / "a.html").exists()


def test_one_seed_has_no_interval_and_two_have():
    assert page.point(pd.Series([0.25])) == {"y": 25.0}
    found = page.point(pd.Series([0.2, 0.3]))
    assert found["y"] == pytest.approx(25) and found["low"] < 25 < found["high"]


def test_the_map_has_a_cell_for_each_setting(tmp_path):
    setting = dict(steps=75, perturbation=4, training_radius=0, seed=0)
    rows = pd.DataFrame([dict(setting, radius=r, last=r / 100) for r in (2, 8)])
    found = page.mapped(rows, tmp_path)
    assert found["knobs"] == {"radius": [2, 8], "steps": [75], "perturbation": [4]}
    assert [cell["learners"]["ERM"]["y"] for cell in found["cells"]] == [pytest.approx(2), pytest.approx(8)]


@pytest.fixture
def opened(written):
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
    assert "SEM 32.9 %" in opened.inner_text("#sweep-answer")


def test_the_committed_page_is_made_of_the_committed_results():
    assert (RESULTS.parent / "docs" / "semkit.html").read_text() == page.html(RESULTS)
