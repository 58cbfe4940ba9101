"""environment.yml asks conda-forge for what pyproject.toml asks PyPI for, in the same ranges."""

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
ON_PYPI = {
    "pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn", "playwright-python": "playwright",
}  # fmt: skip


def conda(text):
    """Package, as PyPI calls it -> range, of every dependency but pip."""
    found = dict(
        re.fullmatch(r"  - (\S+) ?(.*)", line).groups() for line in text.split("dependencies:\n")[1].splitlines()
    )
    assert found.pop("pip") == ""
    return {ON_PYPI.get(name, name): bounds for name, bounds in found.items()}


def pypi(text):
    project = tomllib.loads(text)["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = dict(re.fullmatch(r"([\w-]+)(.*)", each).groups() for each in wanted)
    return found | {"python": project["requires-python"]}


def test_conda_users_get_the_same_ranges():
    text, ours = ((ROOT / name).read_text() for name in ("environment.yml", "pyproject.toml"))
    assert conda(text) == pypi(ours)
    assert conda(text.replace("numpy >=2.0", "numpy >=1.0")) != pypi(ours)  # a broken twin
    assert "channels:\n  - conda-forge\ndependencies" in text
