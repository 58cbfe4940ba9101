"""semkit: stable unlearnable examples, taught and measured."""

__version__ = "0.5.0"  # before the imports: the modules record it

from semkit.augment import FlipCrop, Identity, ResizedCrop
from semkit.commands.protect import protect
from semkit.commands.protected import check
from semkit.convert import convert
from semkit.craft import CraftRecipe, craft
from semkit.data import load
from semkit.engine import Engine
from semkit.imageset import ImageSet, Split
from semkit.learn import LearnRecipe, accuracy, fit
from semkit.measure import interval
from semkit.neighbours.augmix import AugMix
from semkit.neighbours.bullettrain import BulletTrain
from semkit.noise import Noise
from semkit.objectives import Mart, Plain, Trades
from semkit.perturb import PGD, Clean, Uniform
from semkit.presets import craft_recipe, learn_recipe, sweep_recipes
from semkit.report import read_rows
from semkit.schedule import SGD
from semkit.study import crafted_noise, crafted_surrogate, grid, learned_row, runs_folder

__all__ = [
    "PGD", "SGD", "AugMix", "BulletTrain", "Clean", "CraftRecipe", "Engine", "FlipCrop", "Identity", "ImageSet",
    "LearnRecipe", "Mart", "Noise", "Plain", "ResizedCrop", "Split", "Trades", "Uniform", "accuracy", "check",
    "convert", "craft", "craft_recipe", "crafted_noise", "crafted_surrogate", "fit", "grid", "interval",
    "learn_recipe", "learned_row", "load", "protect", "read_rows", "runs_folder", "sweep_recipes",
]  # fmt: skip
