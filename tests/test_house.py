"""The house: lower floors know nothing of upper ones, one module per outside library, every public name explained."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "semkit"
FLOORS = (
    {"pixels", "files", "image", "mixtures", "latent", "injection", "chance", "memory"},
    {"augment", "imageset", "folding", "models", "storage"},
    {"engine", "shapes", "data", "noise", "quality", "convolve", "factors"},
    {"netfile", "perturb", "schedule", "state", "foreign", "convert", "stopwatch", "sparse", "bullettrain", "shown"},
    {"objectives", "corruptions", "transform"},
    {"augmix", "mixing"},
    {"craft", "defences", "learn", "measure", "patterns", "plain", "elsewhere"},
    {
        "presets", "countermeasures", "prediction", "study", "obfuscated", "designs", "cluster", "plots", "dots",
        "originals", "jobs", "sets", "bench", "exercises", "pruning", "sparseplots",
    },
    {"mixtureplots", "methodoptions", "telling"},
    {
        "spared",
        "spareplots",
        "benchreport",
        "crafting",
        "exercises_extensions",
        "figures",
        "outputs",
        "pictures",
        "protect",
        "protected",
        "report",
    },
    {"filtered", "options", "progress", "inputs"},
    {"folders", "learners", "noisefiles", "timing", "lab"},
    {"cli", "panels", "craftpanel"},
)  # fmt: skip
ONLY = {
    "matplotlib": {"shown"}, "distributed": {"cluster"}, "ipywidgets": {"panels", "craftpanel"},
    "argparse": {"options"}, "torchmetrics": {"quality"},
}  # fmt: skip
FILES = {path.stem: path for path in PACKAGE.rglob("[!_]*.py")}
DOTTED = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): name for name, path in FILES.items()}
MODULES = sorted(FILES)


def imports(tree):
    """(module, names) of every import in the tree, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def known(tree):
    """The modules of semkit that the tree imports."""
    for module, names in imports(tree):
        yield from (DOTTED[path] for path in [module, *(f"{module}.{name}" for name in names)] if path in DOTTED)


def floor(module):
    return next(number for number, modules in enumerate(FLOORS) if module in modules)


def test_every_module_has_a_floor():
    assert len(MODULES) == len(list(PACKAGE.rglob("[!_]*.py")))  # names are told apart without their folders
    assert sorted(set().union(*FLOORS)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_knows_only_its_floor_and_those_below(module):
    tree = ast.parse(FILES[module].read_text())
    assert [other for other in known(tree) if floor(other) > floor(module)] == []


def test_an_import_from_above_would_be_seen():
    twin = ast.parse("def f():\n    from semkit.cli import main\nfrom semkit import report\nimport semkit.speed.bench")
    assert [floor(other) > floor("pixels") for other in known(twin)] == [True, True, True]


def test_a_function_is_no_module_of_the_same_name():
    twins = ast.parse("from semkit.files import shown\nfrom semkit.drawings import shown")
    assert list(known(twins)) == ["files", "shown"]


@pytest.mark.parametrize("module", MODULES)
def test_an_outside_library_is_behind_one_module(module):
    tree = ast.parse(FILES[module].read_text())
    used = {name.split(".")[0] for name, _ in imports(tree)}
    assert [name for name, where in ONLY.items() if name in used and module not in where] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_and_class_says_what_it_is(module):
    tree = ast.parse(FILES[module].read_text())
    defined = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    silent = [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert ast.get_docstring(tree) and silent == []
