"""semkit: stable unlearnable examples, taught and measured.

    import semkit as sk
    split = sk.load("shapes")
    sk.measure.cosine(a, b)   # a module, found by its name

The public names and every module are attributes, imported when they are first used, so that `import semkit` alone takes
no torch.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.6.0"

PUBLIC = {  # module -> its public names
    "analysis.canvas": "show",
    "analysis.figures": (
        "accuracy_figure countermeasures_figure lines_figure losses_figure rises_figure scatter_figure"
    ),
    "analysis.pictures": (
        "class_means_figure embedding_figure gallery_figure images_figure spectrum_figure strip_figure"
    ),
    "analysis.report": "read_rows",
    "analysis.statistics": "correlation decide interval paired protection verdict",
    "analysis.study": "crafted_noise crafted_surrogate grid learned_net learned_row",
    "app.folder": "protect",
    "app.checking": "check",
    "countermeasures.registry": "COUNTERMEASURES",
    "images.imageset": "ImageSet Split",
    "images.loading": "load",
    "nets.engine": "Engine",
    "nets.lab": "Interrupted Lab runs_folder",
    "protections.conversion": "convert",
    "protections.crafting": "CraftRecipe craft",
    "protections.methods": "PROTECTIONS craft_recipe sweep_recipes",
    "training.bullettrain": "BulletTrain",
    "training.learning": "accuracy fit",
    "training.perturb": "Clean PGD Uniform",
    "training.recipes": "LearnRecipe SGD learn_recipe",
}
HOMES = {name: f"semkit.{module}" for module, names in PUBLIC.items() for name in names.split()}
MODULES = {path.stem: f"semkit.{path.parent.name}.{path.stem}" for path in Path(__file__).parent.glob("*/[!_]*.py")}
__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    if name in MODULES:
        return import_module(MODULES[name])
    raise AttributeError(f"module 'semkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *HOMES, *MODULES]
