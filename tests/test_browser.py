"""The lesson's panel in headless Chromium, under JupyterLab and under Voilà, on this machine's loopback only.

Needs the extra `browser` and a Chromium: on PATH, at $CHROMIUM, or fetched by `playwright install chromium`.
$SEMKIT_SHOTS: a folder for screenshots, to be looked at.
"""

import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from semkit.nets.lab import runs_folder

pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_sem.ipynb"
SLIDER = "radius ρu"
MINUTES = 10 * 60_000  # milliseconds: for all cells with nothing kept from earlier runs, on a busy machine
SECONDS = 60_000
SINCE_NOW = """element => {
  const began = performance.now();
  window.changed = new Promise(done => {
    const seen = new MutationObserver(() => { seen.disconnect(); done(performance.now() - began); });
    seen.observe(element, {childList: true, subtree: true});
  });
}"""
SETTINGS = {
    # All cells are in the page, those out of sight too.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def expect(found):
    """Playwright's expect. It and nbformat take seconds to import, for which the unit tests need not wait."""
    from playwright import sync_api

    return sync_api.expect(found)


def nbformat():
    import nbformat

    return nbformat


@pytest.fixture(scope="module")
def chromium():
    """A running browser; skips where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install 'semkit[browser]'")
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    with api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install one, or run playwright install chromium")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox for root
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a copy of the notebook, not run yet, for JupyterLab saves what it runs; the runs kept so far."""
    place = tmp_path_factory.mktemp("browser")
    book = nbformat().read(NOTEBOOK, 4)
    for cell in code(book):
        cell.execution_count, cell.outputs = None, []
    (place / "notebooks").mkdir()
    nbformat().write(book, place / "notebooks" / NOTEBOOK.name)
    shutil.copy(NOTEBOOK.with_name("00_index.ipynb"), place / "notebooks")
    (place / "results").symlink_to(NOTEBOOK.parents[1] / "results")
    if runs_folder().exists():  # as links: what is made here must not make the next time too quick to watch
        shutil.copytree(runs_folder(), place / "runs", copy_function=os.symlink)
    return place


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def shot(page, folder, name):
    where = Path(os.environ.get("SEMKIT_SHOTS") or folder)
    where.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=where / f"{name}.png", timeout=SECONDS)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server(folder, port, module, *arguments, ready):
    """`python -m module` at a port of the loopback: (process, address), once address + ready answers."""
    places = {
        name: str(folder / part)
        for name, part in {
            "SEMKIT_RUNS": "runs", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
            "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
        }.items()
    }  # fmt: skip
    log, address = folder / f"{module}.log", f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", module, *arguments]
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **places}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(address + ready):
            assert process.poll() is None and time.monotonic() < deadline, f"no {module}: {log.read_text()[-2000:]}"
            time.sleep(0.2)
        yield process, address
    finally:
        process.terminate()  # it ends its kernels itself
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(address):
    try:
        urllib.request.urlopen(address, timeout=5).close()
        return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False


@contextmanager
def opened(chromium, address, path):
    """A page that reaches nothing but the server."""
    with chromium.new_context(viewport={"width": 1280, "height": 1500}) as context:
        context.route(lambda url: not url.startswith(address), lambda route: route.abort())
        page = context.new_page()
        page.goto(address + path, wait_until="commit", timeout=MINUTES)
        yield page


def run_all(page, book):
    """Runs all cells of the notebook in JupyterLab; asserts that none fails."""
    page.locator(".jp-NotebookPanel").wait_for(timeout=MINUTES)
    page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=MINUTES)
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=MINUTES)
    command(page, "Run", "runmenu:run-all")
    stars = page.locator(".jp-CodeCell .jp-InputPrompt", has_text="*")

    def finished():
        expect(stars).to_have_count(0, timeout=MINUTES)
        command(page, "File", "docmanager:save")
        page.wait_for_timeout(1000)
        try:
            cells = code(nbformat().read(book, 4))
        except nbformat().reader.NotJSONError:  # it is being written
            return False
        quiet = [cell for cell in cells if "raises-exception" not in cell.metadata.get("tags", ())]
        assert [out for cell in quiet for out in cell.outputs if out.output_type == "error"] == []
        return all(cell.execution_count for cell in cells)

    wait_until(page, finished, "all cells have run", MINUTES)


def command(page, menu, name):
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(f'.lm-Menu-item[data-command="{name}"]').click()


def wait_until(page, holds, what, timeout=SECONDS):
    deadline = time.monotonic() + timeout / 1000
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout / 1000:.0f} s: {what}"
        page.wait_for_timeout(50)


class Panel:
    """The craft panel as it stands in a page."""

    def __init__(self, page):
        self.within = within = page.locator(".semkit-craft").first
        self.status, self.cost, self.stale = (within.locator(f".semkit-{of}") for of in ("status", "cost", "stale"))
        self.pictures = within.locator(".semkit-losses img, .semkit-strip img")
        self.handle = self.slider(SLIDER)
        self.lines = within.locator(".semkit-table tbody tr")
        self.compared = within.locator(".semkit-compared")

    def slider(self, text):
        return self.within.locator(".widget-slider", has_text=text).locator(".noUi-handle")

    def button(self, text):
        return self.within.locator("button.widget-button", has_text=re.compile(f"^{text}$"))

    def width(self):
        """How far the progress bar is, in pixels."""
        return self.within.locator(".widget-hprogress .progress-bar").bounding_box()["width"]

    def radius(self):
        return float(self.handle.get_attribute("aria-valuenow"))

    def sources(self):
        return self.pictures.evaluate_all("all => all.map(one => one.src)")

    def step(self):
        found = re.search(r"step (\d+) of", self.status.inner_text())
        return int(found[1]) if found else 0


def drive(page, folder, name):
    """What a student does: a slider by keyboard, Run, a look at the progress, Stop, and Run again."""
    panel = Panel(page)
    panel.status.wait_for(timeout=MINUTES)
    panel.within.evaluate("element => element.scrollIntoView({block: 'start'})")
    expect(panel.cost).to_contain_text(re.compile(r"passes, about \d"), timeout=MINUTES)
    status, pictures, before = panel.status.inner_text(), panel.sources(), panel.radius()
    assert panel.step() == 0, f"running before Run: {status}"
    panel.handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    wait_until(page, lambda: panel.radius() == before + 3, "the slider moves by keyboard")
    page.wait_for_timeout(1000)
    assert (panel.status.inner_text(), panel.sources()) == (status, pictures), "a slider must not start a run"
    shot(page, folder, f"{name}-1-before")
    panel.button("Run").focus()
    page.keyboard.press("Enter")
    expect(panel.status).to_contain_text(re.compile(r": step \d+ of"), timeout=SECONDS)
    first = panel.width()
    wait_until(page, lambda: panel.width() > first, "the progress bar moves")
    wait_until(page, lambda: panel.sources() not in ([], pictures), "a figure of the new run is there")
    pictures = panel.sources()
    wait_until(page, lambda: panel.sources() != pictures, "the figure changes")
    shot(page, folder, f"{name}-2-running")
    expect(panel.button("Run")).to_be_disabled()
    panel.button("Stop").click()
    expect(panel.status).to_contain_text(re.compile(r"stopped at step \d+ of \d+ .*Run resumes"), timeout=SECONDS)
    stopped = panel.step()
    shot(page, folder, f"{name}-3-stopped")
    panel.button("Run").click()
    expect(panel.status).to_contain_text(re.compile(r": step \d+ of"), timeout=SECONDS)
    assert panel.step() > stopped > 1, "the run must go on where it was stopped"
    panel.handle.focus()
    page.keyboard.press("ArrowRight")
    expect(panel.stale).to_contain_text("have changed", timeout=SECONDS)
    return panel


def run_twice(page, panel, folder):
    """Two short runs that differ in the radius: both are in the table and side by side, with the first one in sight."""
    panel.slider("surrogate steps").focus()
    page.keyboard.press("Home")
    before, radii = panel.lines.count(), []
    for number in (before + 1, before + 2):
        panel.handle.focus()
        page.keyboard.press("ArrowRight")
        radii.append(f"{panel.radius():g}")
        expect(panel.stale).to_contain_text("have changed", timeout=SECONDS)
        panel.button("Run").click()
        assert before == 0 or panel.compared.locator("img").count() > 0, "the last result must not be wiped"
        expect(panel.lines).to_have_count(number, timeout=MINUTES)
        expect(panel.status).to_contain_text("done", timeout=SECONDS)
        expect(panel.compared).to_contain_text(f"B: run {number}, SEM", timeout=SECONDS)
    expect(panel.compared).to_contain_text(f"A: run {before + 1}, SEM", timeout=SECONDS)
    shown = [line.locator("td").all_inner_texts()[:4] for line in panel.lines.all()[:2]]
    assert shown == [["B", str(before + 2), "SEM", radii[1]], ["A", str(before + 1), "SEM", radii[0]]]
    assert panel.compared.locator("figure").count() == 4, "noise and curves of both"
    panel.within.locator(".semkit-table").evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(500)
    shot(page, folder, "lab-4-compared")


def knob_over_the_map(page, panel):
    """The milliseconds from a key at the radius's knob until what was measured there is in the page, several times."""
    measured, took = panel.within.locator(".semkit-measured"), []
    for key, radius in (("Home", 2), ("End", 16)) * 4:
        panel.handle.focus()
        measured.evaluate(SINCE_NOW)
        page.keyboard.press(key)
        took.append(page.evaluate("window.changed"))
        expect(measured).to_contain_text(f"radius ρu {radius},", timeout=SECONDS)
        assert measured.locator("img").count() == 2, "curves over the radius, and a strip"
    return took


@contextmanager
def jupyterlab(folder, *arguments):
    """JupyterLab as `semkit lab` starts it: (process, its address, path of a notebook -> its page's)."""
    port, token = free_port(), secrets.token_hex(16)
    how = dict(ip="127.0.0.1", port=port, port_retries=0, open_browser=False, allow_root=os.geteuid() == 0)
    (folder / "config").mkdir()
    config = json.dumps({"ServerApp": how, "IdentityProvider": {"token": token}})
    (folder / "config" / "jupyter_server_config.json").write_text(config)
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with server(folder, port, "semkit", "lab", *arguments, ready=f"/api/status?token={token}") as (process, address):
        yield process, address, lambda book: f"/doc/tree/{book}?token={token}&reset"


def test_the_panel_in_jupyterlab(chromium, folder):
    with jupyterlab(folder) as (_, address, place_of):
        (opened_first,) = (folder / "runtime").glob("*file-to-run*.html")  # what Jupyter gives to a person's browser
        assert f"{address}/lab/tree/notebooks/00_index.ipynb" in opened_first.read_text()
        with opened(chromium, address, place_of(f"notebooks/{NOTEBOOK.name}")) as page:
            run_all(page, folder / "notebooks" / NOTEBOOK.name)
            panel = drive(page, folder, "lab")
            panel.button("Stop").click()
            expect(panel.status).to_contain_text("stopped", timeout=SECONDS)
            run_twice(page, panel, folder)
            assert min(knob_over_the_map(page, panel)) < 300
            page.evaluate("document.activeElement.blur()")
            page.get_by_role("menuitem", name="Settings", exact=True).click()
            page.locator(".lm-Menu-item", has_text=re.compile("^Theme$")).click()
            page.locator(".lm-Menu-item", has_text=re.compile("^JupyterLab Dark$")).click()
            dark = expect(page.locator("body"))
            dark.to_have_attribute("data-jp-theme-name", "JupyterLab Dark", timeout=SECONDS)
            page.wait_for_timeout(1000)
            shot(page, folder, "lab-5-dark")


SHARED = """\
import threading, time
import semkit as sk
panel = sk.craftpanel.CraftPanel(sk.load("shapes", limit=64, size=64), preset="quick")
panel.radius.value, panel.surrogate_steps.value, panel.learners.value = {radius}, 90, True
panel
---
print(time.time()); panel.wait()
---
print("workers:", [thread.name for thread in threading.enumerate()].count("semkit craft"))"""


class Kernel:
    """A notebook with a craft panel in its page, and what a person does with its kernel."""

    def __init__(self, page, book):
        self.page = page
        run_all(page, book)
        self.panel = Panel(page)

    def run(self, cell):
        self.page.locator(".jp-CodeCell .cm-content").nth(cell).click()
        self.page.keyboard.press("Control+Enter")

    def workers(self):
        """The panel's workers at work, as the kernel counts them."""
        prompt = self.page.locator(".jp-CodeCell").nth(2).locator(".jp-InputPrompt")
        before = prompt.inner_text()
        self.run(2)
        wait_until(self.page, lambda: prompt.inner_text() not in (before, "[*]:"), "workers are counted")
        told = self.page.locator(".jp-CodeCell").nth(2).locator(".jp-OutputArea-output").inner_text()
        return int(told.removeprefix("workers: "))

    def start(self, at=r": step \d+ of"):
        self.panel.button("Run").click()
        expect(self.panel.status).to_contain_text(re.compile(at), timeout=MINUTES)

    def stopped_at(self):
        expect(self.panel.status).to_contain_text("stopped at step", timeout=SECONDS)
        return self.panel.step()

    def interrupt(self):
        since = self.page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output")
        before = since.inner_text()
        self.run(1)
        # Only its output says that the cell runs and can be interrupted: a queued one already has the prompt *.
        wait_until(self.page, lambda: since.count() and since.inner_text() not in (before, ""), "the cell runs")
        command(self.page, "Kernel", "kernelmenu:interrupt")

    def restart(self):
        command(self.page, "Run", "runmenu:restart-and-run-all")
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()
        expect(self.panel.status).to_have_text("not run yet", timeout=MINUTES)

    def table(self):
        """The lines of the panel's table, without A and B."""
        return [line.locator("td").all_inner_texts()[1:] for line in self.panel.lines.all()]


def test_two_kernels_share_their_runs_and_none_is_lost_by_an_interrupt_a_restart_or_a_stop(chromium, tmp_path):
    for name, radius in (("one", 8), ("two", 4)):
        cells = SHARED.format(radius=radius).split("\n---\n")
        how = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = nbformat().v4.new_notebook(cells=[*map(nbformat().v4.new_code_cell, cells)], metadata=how)
        nbformat().write(book, tmp_path / f"{name}.ipynb")
    with (
        jupyterlab(tmp_path, "one.ipynb") as (process, address, place_of),
        opened(chromium, address, place_of("one.ipynb")) as first,
        opened(chromium, address, place_of("two.ipynb")) as second,
    ):
        one, two = Kernel(first, tmp_path / "one.ipynb"), Kernel(second, tmp_path / "two.ipynb")
        one.start(), two.start()
        assert (one.workers(), two.workers()) == (1, 1)
        one.interrupt()
        step = one.stopped_at()
        two.restart()
        assert (one.workers(), two.workers()) == (0, 0)
        one.start()
        assert one.panel.step() > step > 1
        assert one.workers() == 1
        two.start("ERM on protected images, seed 0: step")
        assert two.workers() == 1  # counted at once: on a fast machine `one` may be done before `two` is here
        two.panel.button("Stop").click()
        two.stopped_at()
        kernels = psutil.Process(process.pid).children()  # the server's
        assert len(kernels) == 2 and [child for kernel in kernels for child in kernel.children()] == []
        two.start(r"(ERM|AT 4/255) on")
        for kernel in (one, two):
            expect(kernel.panel.status).to_contain_text("done", timeout=MINUTES)
        for kernel in (one, two):  # whatever is done in a table, it also shows what other kernels have run since
            kernel.panel.within.locator("select", has_text="PSNR").select_option("passes")
            expect(kernel.panel.lines).to_have_count(2, timeout=SECONDS)
        wait_until(first, lambda: one.table() == two.table(), "the same order in both tables")
        first_table = one.table()
        assert "…" not in str(first_table)
        assert sorted(line[2] for line in first_table) == ["4", "8"]
        shot(first, tmp_path, "kernels-1"), shot(second, tmp_path, "kernels-2")
        kept = [*(tmp_path / "runs").glob("learner-*.json")]
        assert len(kept) == 2 + 2 * 2, "clean learners are shared, and no learner is made twice"


@contextmanager
def in_voila(chromium, folder, book):
    """The page of a notebook in Voilà."""
    if not importlib.util.find_spec("voila"):
        pytest.skip("voila is missing: pip install 'semkit[browser]'")
    port = free_port()
    start = str(book), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", "--Voila.port_retries=0"
    with (
        server(folder, port, "voila", *start, ready="/voila/static/") as (_, address),
        opened(chromium, address, "") as page,
    ):
        yield page


def test_the_panel_in_voila(chromium, folder):
    with in_voila(chromium, folder, folder / "notebooks" / NOTEBOOK.name) as page:
        drive(page, folder, "voila").button("Stop").click()


SMALL = """\
import semkit as sk
mine = sk.panels.guess("How wide a window does SEM need?", 0, 10)
mine
---
def draw(window):
    figure, alt, caption = sk.twopixels.draw_landscape(window / 10)
    return mine.on(figure, "x"), f"{alt}; {mine}", caption


sk.panels.figure_panel(draw, window=(1, 15, 5))
---
sk.panels.quiz("Which pit does EM take?", {"deep": "The lowest loss.", "wide": "It does not look around."}, "deep")"""


def test_by_keyboard_alone_a_knob_a_guess_and_a_quiz_change_what_a_screen_reader_says(chromium, folder):
    cells = [*map(nbformat().v4.new_code_cell, SMALL.split("\n---\n"))]
    fold = "<details><summary>Solution</summary>\n\nthe deep one\n\n</details>"
    nbformat().write(
        nbformat().v4.new_notebook(cells=[*cells, nbformat().v4.new_markdown_cell(fold)]), folder / "small.ipynb"
    )
    with in_voila(chromium, folder, folder / "small.ipynb") as page:
        image = page.locator(".semkit-figure img")
        image.wait_for(timeout=MINUTES)
        guess, window = page.locator(".noUi-handle").all()
        alt, before = image.get_attribute("alt"), image.get_attribute("src")
        drawn, _, guessed = alt.rpartition("; ")
        assert guessed == "no guess"
        guess.focus()
        page.keyboard.press("ArrowRight")
        window.focus()
        page.keyboard.press("End")
        expect(image).to_have_attribute("alt", re.compile("; your guess: 6$"), timeout=SECONDS)
        assert not image.get_attribute("alt").startswith(drawn) and image.get_attribute("src") != before
        page.get_by_role("radio").first.focus()
        page.keyboard.press("Space")
        expect(page.locator(".semkit-reply", has_text="right: The lowest loss.")).to_be_visible(timeout=SECONDS)
        solution = page.get_by_text("the deep one")
        expect(solution).to_be_hidden()
        page.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(solution).to_be_visible()
        shot(page, folder, "voila-4-small")
