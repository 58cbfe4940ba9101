"""What every protection does, whichever it is, and that one more is an entry of PROTECTIONS and nothing else."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import image_set, make_photos
from PIL import Image

from semkit.__main__ import main
from semkit.analysis.report import read_rows
from semkit.app.folder import protect
from semkit.nets.engine import Engine
from semkit.nets.lab import Lab
from semkit.protections.base import RADIUS, Change, CleanPart, Crafted, NoiseRecipe, PartlyProtected, Protection, Recipe
from semkit.protections.methods import METHODS, PROTECTIONS, label_of, sweep_recipes

LAB = Lab(Engine("cpu", "float32"))


@dataclass(frozen=True)
class Stripes(NoiseRecipe):
    """Every second column brighter, the others darker: noise that no net makes."""

    radius: float = 8

    def craft(self, images, **how):
        """The same noise for all."""
        noise = torch.full(images.images.shape, -int(self.radius), dtype=torch.int8)
        noise[..., ::2] = int(self.radius)
        return Crafted(noise)


@dataclass(frozen=True)
class Darker(Recipe):
    """Every value halved: a change without a radius and without a key."""

    method = "darker"

    def apply(self, images, *, seed=0, lab=None):
        """(the darker images, {})."""
        return type(images)(images.images // 2, images.labels, images.classes), {}

    def change(self, images, *, seed=0, lab=None):
        """Half of every value of a picture."""
        return Change(
            lambda i, original: original.point(lambda value: value // 2), {"radius": None, "bound": "nothing bounds it"}
        )


@pytest.fixture
def two_more(monkeypatch):
    """PROTECTIONS with two more entries, one with a radius and one without."""
    more = {
        "stripes": Protection(
            "Stripes", ("#56B4E9", "P", ":"), lambda preset, size=32, **own: Stripes(**own), (RADIUS,)
        ),
        "darker": Protection(
            "Darker", ("#E69F00", "X", ":"), lambda preset, size=32: Darker(), (), "nothing bounds it"
        ),
    }
    for name, protection in more.items():
        monkeypatch.setitem(PROTECTIONS, name, protection)
        monkeypatch.setitem(METHODS, name, protection)


def run(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


SHORT = ("sem", "cuda")  # one of each style, of which the others are variants


@pytest.mark.parametrize(
    "method", [name if name in SHORT else pytest.param(name, marks=pytest.mark.whole) for name in PROTECTIONS]
)
def test_every_protection_keeps_its_budget_and_its_cost_and_says_who_it_is(method):
    protection, images = PROTECTIONS[method], image_set(24)
    recipe = protection.recipe("quick", size=images.images.shape[-1])
    protected, cost = recipe.apply(images, seed=3, lab=LAB)
    apart = (protected.images.int() - images.images.int()).abs().max()
    assert 0 < apart and (recipe.radius is None or apart <= recipe.radius)
    assert recipe.radius == protection.radius and bool(protection.bound) == (recipe.radius is None)
    assert cost.get("passes", 0) == recipe.cost(len(images)).total
    assert torch.equal(recipe.apply(images, seed=3, lab=LAB)[0].images, protected.images)
    assert recipe.radius is not None or recipe.method == method  # a report names it: no radius checks its files


def test_no_two_methods_have_one_label_or_one_look():
    for found in ([one.label for one in METHODS.values()], [one.style for one in METHODS.values()]):
        assert len(set(found)) == len(found)
    assert (label_of("clean"), label_of("sem"), label_of("none/random")) == ("clean images", "SEM", "none/random")


@pytest.mark.whole
def test_one_more_protection_is_an_entry_and_nothing_else(two_more, tmp_path, capsys):
    photos = make_photos(tmp_path / "in", 12)
    for method in ("stripes", "darker"):
        out = tmp_path / method
        assert run("protect", photos, out, "--method", method, "--size", "8", "--fraction", "0.5") == 0
        assert json.loads((out / "report.json").read_text())["protected"] == 6
        assert run("check", photos, out) == 0 and " 0 problems" in capsys.readouterr().out
        assert run("learn", photos, "--protected", out, "--preset", "quick", "--size", "8") == 0
    sweep = ["sweep", photos, "--size", "8", "--preset", "quick", "--radii", "0", "--seeds", "1", "--methods"]
    assert run(*sweep, "clean", "stripes", "--out", tmp_path / "noise") == 0
    assert "| Stripes " in capsys.readouterr().out and (tmp_path / "noise/figure.png").exists()
    assert run(*sweep, "stripes", "darker", "--out", tmp_path / "both") == 0
    assert list(read_rows(tmp_path / "both/rows.csv")["method"]) == ["stripes", "darker"]


def test_files_that_are_not_what_a_protection_without_a_key_makes_are_found(two_more, tmp_path):
    photos, out = make_photos(tmp_path / "in", 8), tmp_path / "out"
    protect(str(photos), out, Darker(), size=8)
    assert run("check", photos, out) == 0
    path = out / "images/a/00.png"
    Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    assert run("check", photos, out) == 1


def test_an_option_of_another_protection_is_refused_by_name(two_more, tmp_path, capsys):
    for wrong, words in (
        (["--method", "stripes", "--surrogate", "tiny"], "--surrogate: not for --method stripes"),
        (["--method", "darker", "--radius", "8"], "--radius: not for --method darker (nothing bounds it)"),
        (["--method", "stripe"], "unknown method 'stripe'; did you mean stripes?"),
    ):
        assert run("protect", tmp_path, tmp_path / "out", *wrong) == 2
        assert words in capsys.readouterr().err


def test_a_share_of_every_class_is_protected_and_its_rest_is_what_is_left_clean():
    images = image_set(60, 8, classes=3)
    whole, before = Stripes().apply(images, lab=LAB)[0].images, torch.zeros(60, dtype=torch.bool)
    for share in (1e-9, 0.2, 0.6, 0.9):
        mixture, cost = PartlyProtected(Stripes(), share).apply(images, seed=1, lab=LAB)
        changed = (mixture.images != images.images).flatten(1).any(1)
        assert images.labels[changed].bincount().tolist() == [max(1, round(20 * share))] * 3
        assert torch.equal(mixture.images[changed], whole[changed]) and torch.equal(mixture.labels, images.labels)
        rest, _ = CleanPart(share).apply(images, seed=1)
        assert torch.equal(rest.images, images.images[~changed]) and torch.equal(rest.labels, images.labels[~changed])
        assert changed[before].all() and cost["passes"] == 0
        before = changed
    assert not torch.equal(PartlyProtected(Stripes(), 0.9).apply(images, seed=2, lab=LAB)[0].images, mixture.images)
    assert torch.equal(PartlyProtected(Stripes(), 1).apply(images, lab=LAB)[0].images, whole)
    for wrong in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            PartlyProtected(Stripes(), wrong)
    with pytest.raises(ValueError, match="nothing is left clean where all is protected"):
        CleanPart(1)


def test_a_recipe_that_is_made_for_measurements_changes_no_pictures(tmp_path):
    photos = str(make_photos(tmp_path / "in", 8))
    for recipe in (CleanPart(0.5), PartlyProtected(Stripes(), 0.5)):
        with pytest.raises(ValueError, match="is made for measurements, not for folders of pictures"):
            protect(photos, tmp_path / "out", recipe, size=8)
    with pytest.raises(ValueError, match="unknown method 'cud'"):
        sweep_recipes(["cud"], [0])
    assert not (tmp_path / "out").exists()


def test_the_worked_example_of_contributing_protects():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    file = text.split("```python\n")[1].split("# semkit/protections/methods.py")[0]
    exec(file, made := {"__name__": "grain"})
    assert "import" in file and "protections.methods" not in file  # which imports this file
    images, recipe = image_set(20, 8, classes=2), made["GRAIN"].recipe("quick", size=8)
    change = recipe.apply(images, lab=LAB)[0].images.int() - images.images.int()
    assert recipe.radius == 8 == change.abs().max()
