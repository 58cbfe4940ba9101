"""The house: a folder is a floor, and a floor imports only from those above it in the list."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import semkit
from semkit.nets.lab import imported
from semkit.protections.methods import PROTECTIONS

PACKAGE = Path(__file__).parents[1] / "semkit"
FLOORS = ("images", "nets", "training", "protections", "countermeasures", "analysis", "lessons", "app")
ONLY = {  # outside library -> the modules that may import it
    "matplotlib": {"analysis.canvas"}, "seaborn": {"analysis.canvas", "analysis.figures"},
    "distributed": {"analysis.cluster"}, "argparse": {"app.cli", "app.options"},
    "ipywidgets": {"lessons.panels", "lessons.craftpanel"},
}  # fmt: skip
PRIVATE = ("torch.ops.mkldnn", "torch._C", "make_fx", "torch._dynamo", "torch._inductor")
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE and path.stem != "__init__"
}


def imports(tree):
    """(module, names) of every import in the tree, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def known(tree):
    """The modules of semkit that the tree imports, as floor.module."""
    for module, names in imports(tree):
        paths = [path.removeprefix("semkit.") for path in (module, *(f"{module}.{name}" for name in names))]
        yield from (path for path in dict.fromkeys(paths) if path in MODULES or path in FLOORS)


# A protection is named in its own file and in the dict of all; experiments, which are about some, name those.
OF_PROTECTIONS = {"protections.cuda", "protections.methods", "analysis.designs", "analysis.gpucheck"}
OF_DEVICES = {"analysis.cost", "analysis.speed", "images.imageset", "nets.engine"}  # "cuda"
OF_ONE = {"ClassFilters", "class_filters", "EM", "REM", "SEM", "CUDA"}


def protections_named(tree, names):
    """Protections that the code names: as a text, by what their files define, or by asking for the type of a recipe."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in names:
            yield node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("semkit.protections"):
            yield from (alias.name for alias in node.names if alias.name in OF_ONE)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            yield from (name for name in ("CraftRecipe", "NoiseRecipe", "ClassFilters") if name in ast.unparse(node))


def floor(module):
    return FLOORS.index(module.split(".")[0])


@cache
def parsed():
    return {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


@cache
def uses():
    """Module -> what it imports of the package."""
    return {module: [*known(tree)] for module, tree in parsed().items()}


def test_every_folder_is_a_floor_and_every_module_is_on_one():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOORS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert all(path.count(".") == 1 for path in MODULES)


def test_a_name_of_the_package_means_one_thing():
    names = [*FLOORS, *(module.split(".")[1] for module in MODULES), *semkit.HOMES]
    assert sorted(names) == sorted({*names})


def test_a_module_imports_nothing_from_a_floor_below_its_own():
    assert [(module, other) for module, of in uses().items() for other in of if floor(other) > floor(module)] == []


def test_an_import_from_below_would_be_seen():
    twin = ast.parse(
        "def f():\n    from semkit.app.cli import main\nfrom semkit.analysis import report\nimport semkit.app.cli"
    )
    assert [floor(other) > floor("images.pixels") for other in known(twin)] == 4 * [True]


def test_the_key_of_a_run_has_the_code_of_every_import():
    for module, of in uses().items():
        assert {name.removeprefix("semkit.") for name in imported(f"semkit.{module}")} == {*of} - {*FLOORS}, module


def circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        return found.args[1]
    return []


def test_no_modules_import_one_another_in_a_circle():
    assert circle({module: [m for m in of if m in MODULES] for module, of in uses().items()}) == []
    assert circle({"a": ["b"], "b": ["a"]})


def test_an_outside_library_is_behind_few_modules():
    used = {(name.split(".")[0], module) for module, tree in parsed().items() for name, _ in imports(tree)}
    assert [(name, module) for name, module in used if module not in ONLY.get(name, MODULES)] == []


def test_no_private_part_of_torch_is_used():
    assert [(module, name) for module, path in MODULES.items() for name in PRIVATE if name in path.read_text()] == []


def test_every_module_and_public_function_and_class_says_what_it_is():
    for module, tree in parsed().items():
        defined = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
        silent = [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]
        assert ast.get_docstring(tree) and silent == [], module


def test_no_function_has_the_name_of_its_module():
    defined = ((module, node) for module, tree in parsed().items() for node in tree.body)
    assert not [of for of, node in defined if isinstance(node, ast.FunctionDef) and node.name == of.split(".")[1]]


def test_no_protection_is_a_special_case():
    for module in parsed().keys() - OF_PROTECTIONS:
        names = set(PROTECTIONS) - ({"cuda"} if module in OF_DEVICES else set())
        assert not [*protections_named(parsed()[module], names)] or module.startswith("lessons."), module


def test_a_special_case_would_be_seen():
    twin = ast.parse(
        'if isinstance(recipe, CraftRecipe) or method == "cuda":\n    from semkit.protections.cuda import ClassFilters'
    )
    assert set(protections_named(twin, PROTECTIONS)) == {"CraftRecipe", "cuda", "ClassFilters"}


@pytest.mark.whole
def test_the_package_and_a_lesson_without_a_net_take_no_torch():
    code = "import sys, semkit as sk; sk.show, sk.panels, sk.answers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    import semkit

    assert len(semkit.__all__) == len(set(semkit.__all__))
    assert all(getattr(semkit, name) is not None for name in semkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'shapez'"):
        semkit.shapez  # noqa: B018


def too_long(text):
    """What is longer than a file (330 lines) or a function (45) may be."""
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    long = [node.name for node in functions if node.end_lineno - node.lineno >= 45]
    return long + ["the file"] * (len(text.splitlines()) > 330)


def test_files_and_functions_are_short():
    assert [(module, what) for module, path in MODULES.items() for what in too_long(path.read_text())] == []


def test_what_is_too_long_would_be_seen():
    body = "def f():\n" + 44 * "    1\n"
    assert (too_long(body), too_long(body + "    1\n"), too_long(331 * "1\n")) == ([], ["f"], ["the file"])
