"""The rules of the lessons hold for every notebook, and reject broken twins; nbval sees a claim turned round."""

import ast
import csv
import inspect
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import semkit as sk

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARK = "# NBVAL_CHECK_OUTPUT"
WORDS = "supported|undecided|contradicted|True|False"  # True and False: what one run shows, without an interval


def code(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def prose(nb):
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def parsed(cell):
    return ast.parse("\n".join(line for line in cell.source.splitlines() if line[:1] not in ("%", "!")))


def outputs(nb, kind):
    """What the outputs show of a mime type; a stream or a traceback is text/plain."""
    for output in (output for cell in code(nb) for output in cell.outputs):
        plain = output.get("text", "\n".join(output.get("traceback", ())))
        yield {**output.get("data", {}), **({"text/plain": plain} if plain else {})}.get(kind, "")


def said(cell):
    """What the outputs of a cell show as text."""
    return [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs]


def minutes(nb):
    found = re.search(r"(\d+) minutes", nb.cells[0].source)
    return found and found[1]


# --- the rules: each yields what is wrong


def executed(nb, path):
    counts = [cell.execution_count for cell in code(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not executed from top to bottom: {counts}"


def quiet(nb, path):
    for cell in code(nb):
        allowed = "raises-exception" in cell.metadata.get("tags", ())
        for output in cell.outputs:
            if output.get("name") == "stderr" or (output.output_type == "error" and not allowed):
                yield f"stderr or an error below {cell.source[:40]!r}"


def light(nb, path):
    if path.stat().st_size > 1_000_000:
        yield f"{path.stat().st_size:,} bytes"


def short_cells(nb, path):
    lengths = [len(cell.source.strip().splitlines()) for cell in code(nb)]
    if max(lengths) > 12 or statistics.median(lengths) > 4:
        yield f"cells of up to {max(lengths)} lines, median {statistics.median(lengths)}"


def one_import(nb, path):
    found = [name for cell in code(nb) for line in ast.walk(parsed(cell)) for name in imported(line)]
    if found not in ([], ["semkit as sk"]):
        yield f"of the kit only `import semkit as sk`, once: {found}"


def imported(node):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("semkit"):
        yield f"from {node.module}"
    elif isinstance(node, ast.Import):
        yield from (ast.unparse(name) for name in node.names if name.name.startswith("semkit"))


def known_names(nb, path):
    """What a notebook takes from the kit, sk.NAME and sk.MODULE.NAME, exists."""
    for node in (node for cell in code(nb) for node in ast.walk(parsed(cell)) if isinstance(node, ast.Attribute)):
        names = ast.unparse(node).split(".")
        if names[0] == "sk" and len(names) <= 3:
            module = sk if len(names) == 2 else getattr(sk, names[1], None)
            if (len(names) == 2 or inspect.ismodule(module)) and not hasattr(module, names[-1]):
                yield f"{'.'.join(names)} does not exist"


def short_functions(nb, path):
    for node in (node for cell in code(nb) for node in ast.walk(parsed(cell))):
        if isinstance(node, ast.ClassDef):
            yield f"class {node.name} belongs in the package"
        elif isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 8:
            yield f"{node.name} is longer than 8 lines"


def cell_count(nb, path):
    least = 1 if path.name.startswith("00") else 12
    if not least <= len(code(nb)) <= 25:
        yield f"{len(code(nb))} code cells"


def described(nb, path):
    if any(outputs(nb, "image/png")):
        yield "a picture without alternative text: end the cell with figures.show"
    for page in outputs(nb, "text/html"):
        if page.count("<img") != len(re.findall(r'<img alt="[^"]+"', page)):
            yield "an image without alternative text"
        if page.count("<figure") != len(re.findall(r"<figcaption>.+?</figcaption></figure>", page)):
            yield "a figure without a caption"


def verdicts(nb, path):
    marked = [cell for cell in code(nb) if "NBVAL" in cell.source]
    if not marked:
        yield "no verdict cell"
    for cell in marked:
        if cell.source.splitlines()[0] != MARK or cell.source.count("NBVAL") != 1:
            yield f"{MARK} must stand alone on the first line of its cell"
        lines = "".join(output.get("text", "") for output in cell.outputs).splitlines()
        if not any(re.search(rf": ({WORDS})\b", line) for line in lines):
            yield f"a verdict ends in one of {WORDS}"
        if any(re.search(r"\d\.\d", line.rpartition(": ")[2]) for line in lines):
            yield "a verdict says no measured number"


def finished(nb, path):
    for left in re.findall(r"TODO|FIXME|\bREAD-[A-Z]+|\b[A-Z]+-READING\b", "\n".join(cell.source for cell in nb.cells)):
        yield f"{left} left"


def links(nb, path):
    for link in re.findall(r"\]\(([^)#\s]+)", prose(nb)):
        if "://" not in link and not (path.parent / link).exists():
            yield f"{link} does not exist"


def parts(nb, path):
    hidden = [cell for cell in code(nb) if cell.metadata.get("jupyter", {}).get("source_hidden")]
    told = [text for cell in hidden for text in said(cell)]
    names = [node.id for cell in code(nb) for node in ast.walk(parsed(cell)) if isinstance(node, ast.Name)]
    has = {
        "a title that is a question": re.match(r"# .+\?\n", nb.cells[0].source),
        "minutes at the top": minutes(nb),
        "a guess": "guess" in prose(nb).lower(),
        "a knob in upper case": any(re.fullmatch(r"[A-Z][A-Z_]+", name) for name in names),
        "a panel": any("panel(" in cell.source.lower() for cell in code(nb)),
        "an exercise": any(text.startswith(("not attempted: ", "not yet")) for cell in code(nb) for text in said(cell)),
        "a folded solution that its checker passes": any(text.startswith("right: ") for text in told),
        "sources": re.search(r"^#+ .*sources", prose(nb), re.I | re.M),
        "what is not shown": re.search(r"not shown", prose(nb), re.I),
    }
    yield from (f"there is not {part}" for part, found in has.items() if not found)


def portable(nb, path):
    if nb.metadata.kernelspec.name != "python3" or "widgets" in nb.metadata:
        yield "kernel python3 and no widgets' state, please"
    text = "\n".join([*(cell.source for cell in nb.cells), *outputs(nb, "text/plain")])
    for place in re.findall(r"(?<![\w.])/(?:home|root|tmp|opt|work|Users)/\S*", text):
        yield f"a path of one machine: {place}"


def mapped(nb, path):
    if not path.name.startswith("00"):
        return
    rows = dict(re.findall(r"\]\((\w+\.ipynb)\) *\| *(\d+) minutes", prose(nb)))
    for lesson in sorted({*path.parent.glob("0[1-9]*.ipynb"), *path.parent.glob("1[0-4]*.ipynb")}):
        if rows.get(lesson.name) != (wanted := minutes(nbformat.read(lesson, 4))):
            yield f"{lesson.name}, {wanted} minutes, is not in the map as such"


RULES = [
    executed, quiet, light, short_cells, one_import, known_names, short_functions, cell_count, described, verdicts,
    finished, links, parts, portable, mapped,
]  # fmt: skip


def problems(path):
    nb = nbformat.read(path, 4)
    return [(rule, problem) for rule in RULES for problem in rule(nb, path)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_rules(path):
    assert [f"{rule.__name__}: {problem}" for rule, problem in problems(path)] == []


# --- the broken twins


def told(text):
    return new_output("execute_result", {"text/plain": text}, execution_count=1)


def sound(path):
    """A notebook that keeps every rule."""
    page = '<figure><img alt="a line"><figcaption>quick preset</figcaption></figure>'
    cells = [new_code_cell(f"x{i} = {i}") for i in range(8)] + [
        new_code_cell("RADIUS = 8", outputs=[new_output("execute_result", {"text/html": page})]),
        new_code_cell(f"{MARK}\nprint('more:', 2 > 1)", outputs=[new_output("stream", text="more: True (+)\n")]),
        new_code_cell("panels.figure_panel(draw)"),
        new_code_cell("check_f(f)", outputs=[told("not attempted: write f")]),
        new_code_cell("f", metadata={"jupyter": {"source_hidden": True}}),
    ]
    cells[-1].outputs = [told("right: so it is")]
    for count, cell in enumerate(cells):
        cell.execution_count = count + 1
    top = new_markdown_cell(f"# Why?\n\n*5 minutes.* Your guess? [this page]({path.name})")
    cells = [top, *cells, new_markdown_cell("## Sources and what is not shown\n\nA paper.")]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def source(cell, text):
    return lambda nb: nb.cells[cell].update(source=text)


def output(cell, *args, **how):
    return lambda nb: nb.cells[cell].update(outputs=[new_output(*args, **how)])


def page(html):
    return output(9, "execute_result", {"text/html": html})


def longer(nb):
    for cell in nb.cells[1:9]:
        cell.source = "\n".join(["1"] * 5)


TWINS = [
    (executed, lambda nb: nb.cells[3].update(execution_count=None)),
    (executed, lambda nb: nb.cells[3].update(execution_count=2)),
    (quiet, output(1, "stream", name="stderr", text="a warning")),
    (quiet, output(1, "error")),
    (light, output(1, "stream", text="x" * 1_000_000)),
    (short_cells, source(1, "\n".join(["1"] * 13))),
    (short_cells, longer),
    (one_import, source(1, "from semkit.images import pixels")),
    (one_import, source(1, "import semkit")),
    (known_names, source(1, "sk.unheard_of")),
    (known_names, source(1, "sk.pixels.unheard_of(1)")),
    (short_functions, source(1, "def g():\n" + "\n".join(["    1"] * 8))),
    (short_functions, source(1, "class A: ...")),
    (cell_count, lambda nb: [nb.cells.pop(1), nb.cells.pop(1)] and recount(nb)),
    (cell_count, lambda nb: nb.cells.extend(new_code_cell("1") for _ in range(13)) or recount(nb)),
    (described, output(9, "display_data", {"image/png": "iVBOR"})),
    (described, page("<figure><img><figcaption>quick</figcaption></figure>")),
    (described, page('<figure><img alt=""><figcaption>quick</figcaption></figure>')),
    (described, page('<figure><img alt="a line"></figure>')),
    (verdicts, source(10, "print('more:', 2 > 1)")),
    (verdicts, source(10, f"{MARK} please\nprint('more:', 2 > 1)")),
    (verdicts, source(10, f"1\n{MARK}\nprint('more:', 2 > 1)")),
    (verdicts, output(10, "stream", text="more: 2\n")),
    (verdicts, output(10, "stream", text="more: True, by 0.31\n")),
    (finished, lambda nb: nb.cells.append(new_markdown_cell("TODO-READ"))),
    (finished, lambda nb: nb.cells.append(new_markdown_cell("FIGURE-READING At which radius?"))),
    (links, lambda nb: nb.cells.append(new_markdown_cell("[next](gone.ipynb)"))),
    (parts, source(0, "# Because\n\n5 minutes. Your guess?")),
    (parts, source(0, "# Why?\n\nYour guess?")),
    (parts, source(0, "# Why?\n\n5 minutes.")),
    (parts, source(9, "radius = 8")),
    (parts, source(11, "1")),
    (parts, lambda nb: nb.cells[12].update(metadata={}, outputs=[])),
    (parts, lambda nb: nb.cells[13].update(metadata={})),
    (parts, output(13, "stream", text="wrong\n")),
    (parts, lambda nb: nb.cells.pop()),
    (portable, output(12, "stream", text="not attempted: write it\nFile /home/ann/kit/exercises.py:3")),
    (portable, source(1, "open('/tmp/rows.csv')")),
    (portable, lambda nb: nb.metadata.update(widgets={})),
]


def recount(nb):
    for count, cell in enumerate(code(nb)):
        cell.execution_count = count + 1


def test_a_sound_notebook_passes(tmp_path):
    path = tmp_path / "01_sound.ipynb"
    nbformat.write(sound(path), path)
    assert problems(path) == []


@pytest.mark.parametrize("rule, spoil", TWINS, ids=[f"{i}-{rule.__name__}" for i, (rule, _) in enumerate(TWINS)])
def test_a_rule_rejects_its_broken_twin(rule, spoil, tmp_path):
    path = tmp_path / "01_broken.ipynb"
    nb = sound(path)
    spoil(nb)
    nbformat.write(nb, path)
    assert {found for found, _ in problems(path)} == {rule}


@pytest.mark.parametrize("name", ["01_sound", "10_sound", "14_sound"])
@pytest.mark.parametrize("row, right", [("5 minutes", True), ("6 minutes", False), ("", False)])
def test_the_map_must_name_every_lesson_and_its_minutes(row, right, name, tmp_path):
    lesson, index = tmp_path / f"{name}.ipynb", tmp_path / "00_index.ipynb"
    nbformat.write(sound(lesson), lesson)
    nb = sound(index)
    nb.cells.append(new_markdown_cell(f"| [Why?]({name}.ipynb) | {row} |"))
    nbformat.write(nb, index)
    assert [rule for rule, _ in problems(index)] == [mapped] * (not right)


# --- a claim turned round


def names(statement):
    """The names that a statement reads, binds, and changes in place."""
    nodes = list(ast.walk(statement))
    added = {node.target.id for node in nodes if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)} - added
    own = {node.arg for node in nodes if isinstance(node, ast.arg)} | stored
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} - own
    parts = [node for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
    changed = added | {node.value.id for node in parts if isinstance(node.value, ast.Name)} - own
    imported = {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return read, {statement.name} if isinstance(statement, ast.FunctionDef) else stored | imported, changed


def needed(cells, last):
    """The statements that cells[last] stands on: those that bound or changed a name that it, or one of them, reads."""
    chosen, wanted = [], set()
    for cell in reversed(cells[: last + 1]):
        for statement in reversed(parsed(cell).body):
            read, bound, changed = names(statement)
            if cell is cells[last] or wanted & (bound | changed):
                wanted = wanted - bound | read
                chosen.insert(0, ast.unparse(statement))
    return "\n".join(chosen[: -len(parsed(cells[last]).body)])


def of_committed_rows(path):
    """Every verdict cell on committed rows alone, after a cell of what it needs."""
    cells = code(nbformat.read(path, 4))
    for place, cell in enumerate(cells):
        if not cell.source.startswith(MARK):
            continue
        text = needed(cells, place)
        stands_on = text + cell.source
        if "read_rows(" in stands_on and not re.search(r"craft\(|crafted_|learned_row|\bgrid\(|\.run\(", stands_on):
            yield [new_code_cell(text), cell]


def swapped(rows, one, other):
    """The text of a CSV with the rows of two methods exchanged."""
    head, *lines = csv.reader(rows.splitlines())
    at, turned = head.index("method"), {one: other, other: one}
    for line in lines:
        line[at] = turned.get(line[at], line[at])
    return "\n".join(",".join(f'"{value}"' for value in line) for line in (head, *lines)) + "\n"


CLAIMS = [  # lesson, rows, and two methods whose exchange turns its claim
    ("03_surrogate", "shapes-pairs", "none/adversarial", "adversarial/none"),
    ("05_correlation", "frozen-judge", "none 0", "adversarial 8"),
    ("06_sem", "cifar10-lesson", "em", "sem"),
]


@pytest.mark.whole
def test_nbval_sees_a_claim_that_has_turned_round(tmp_path):
    cells = []  # one notebook, one kernel: of every lesson first its claim as it stands, then the same on turned rows
    for lesson, rows, one, other in CLAIMS:
        claims = of_committed_rows(ROOT / "notebooks" / f"{lesson}.ipynb")
        claim = next(both for both in claims if any(f"results/{rows}" in cell.source for cell in both))
        text = (ROOT / "results" / rows / "rows.csv").read_text()
        for twin, content in ((f"{lesson}/right", text), (f"{lesson}/turned", swapped(text, one, other))):
            (tmp_path / twin / "notebooks").mkdir(parents=True)
            shutil.copytree(ROOT / "results", tmp_path / twin / "results")
            (tmp_path / twin / "results" / rows / "rows.csv").write_text(content)
            cells.append(new_code_cell(f"import os\nos.chdir({str(tmp_path / twin / 'notebooks')!r})"))
            cells += [new_code_cell(cell.source, outputs=cell.outputs, execution_count=1) for cell in claim]
    nbformat.write(new_notebook(cells=cells), tmp_path / "claims.ipynb")
    options = "--nbval-lax --nbval-current-env -p no:cacheprovider --rootdir . -rfE claims.ipynb".split()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *options]
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(Cell \d+)", found.stdout, re.M)
    turned = [f"Cell {place}" for place in range(5, len(cells), 6)]
    assert failed == turned and f"{len(cells) - len(turned)} passed" in found.stdout, found.stdout


def test_needed_is_what_a_cell_stands_on_and_no_more():
    cells = [new_code_cell(text) for text in (
        "import a, b.c as c\nx = a(1)\nslow = c(x)",
        "found = {}\nfor k in x:\n    found[k] = k\nslow += 1\nfound |= {0: 1}",
        "def f(x, n):\n    slow = found\n    return slow, n", "print(f(1, 2), [k for k in found])",
    )]  # fmt: skip
    kept = "import a, b.c as c\nx = a(1)\nfound = {}\nfor k in x:\n    found[k] = k\nfound |= {0: 1}\n"
    assert needed(cells, 3) == kept + "def f(x, n):\n    slow = found\n    return (slow, n)"
