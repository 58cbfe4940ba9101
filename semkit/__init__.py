"""semkit: stable unlearnable examples, taught and measured.

    import semkit as sk
    split = sk.load("shapes")

Names are imported when they are first used, so that `import semkit` alone takes no torch.
"""

from importlib import import_module

__version__ = "0.6.0"

PUBLIC = {  # module -> its public names
    "analysis.report": "read_rows",
    "analysis.statistics": "decide interval protection verdict",
    "analysis.study": "crafted_noise crafted_surrogate grid learned_net learned_row",
    "app.folder": "protect",
    "app.checking": "check",
    "countermeasures.registry": "COUNTERMEASURES",
    "images.augment": "FlipCrop Identity ResizedCrop",
    "images.imageset": "ImageSet Split",
    "images.loading": "load",
    "nets.cache": "runs_folder",
    "nets.engine": "Engine",
    "nets.lab": "Interrupted Lab",
    "protections.conversion": "convert",
    "protections.crafting": "CraftRecipe craft",
    "protections.noise": "Noise",
    "protections.recipes": "craft_recipe",
    "protections.registry": "PROTECTIONS sweep_recipes",
    "training.mixing": "AugMix",
    "training.bullettrain": "BulletTrain",
    "training.learning": "LearnRecipe accuracy fit",
    "training.objectives": "Mart Plain Trades",
    "training.perturb": "Clean PGD Uniform",
    "training.presets": "learn_recipe",
    "training.schedule": "SGD",
}
HOMES = {name: module for module, names in PUBLIC.items() for name in names.split()}
__all__ = sorted(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'semkit' has no attribute {name!r}")
    return getattr(import_module(f"semkit.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
