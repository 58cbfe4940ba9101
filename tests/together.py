"""Two processes run this side by side; the first one prints what came out as JSON. Not a test by itself."""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from photos import image_set
from torch import nn

from semkit import parallel
from semkit.craft import CraftRecipe, Interrupted, craft
from semkit.engine import Engine, train_step
from semkit.learn import LearnRecipe, fit
from semkit.perturb import PGD, Uniform
from semkit.schedule import SGD
from semkit.storage import AUTO, Storage, free_memory

ENGINE = Engine("cpu", "float64")
SGD_STEPS = SGD(steps=6, batch=8)
CRAFT = CraftRecipe(Uniform(4), PGD(4, 1), steps=1, samples=1, start="warm", surrogate="tiny", sgd=SGD_STEPS)
LEARN = LearnRecipe(PGD(4, 1), model="tiny", sgd=SGD(steps=4, batch=8), evaluations=2)


def linear_step() -> list[float]:
    """The weights of a linear model after a step of SGD, each process on its share of eight images."""
    images, model = parallel.mine(image_set(8)), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 576).reshape(3, 192))
        model[1].bias.zero_()
    model.double()
    x = images.images.double() / 255
    train_step(model, torch.optim.SGD(model.parameters(), 0.1), x, images.labels)
    return model[1].weight.flatten().tolist()


def exchange() -> dict:
    rank, size = parallel.place()
    tensors = [torch.full((2,), float(rank)), torch.full((1, 1), 10.0 * rank)]
    parallel.average_(tensors)
    return {
        "average": [t.flatten().tolist() for t in tensors],
        "total": parallel.total(rank + 1),
        "every": parallel.every(rank),
        "first": parallel.first(f"from {rank}"),
        "whole": parallel.whole(torch.arange(7)[rank::size], 7).tolist(),
        "stream": list(parallel.stream()),
    }


def same_everywhere(images, recipe) -> bool:
    """Whether the surrogates of all processes are equal to the last bit."""
    made = craft(images, recipe, engine=ENGINE).surrogate.state_dict()
    others = parallel.every(made)
    return all(torch.equal(made[name], other[name]) for other in others for name in made if "num_batches" not in name)


def interrupted(images, folder: Path) -> torch.Tensor:
    """Noise of a run that is stopped twice; before it goes on, one process loses its newest state."""
    state = folder / "noise.state"
    for stop in (3, 5):
        with contextlib.suppress(Interrupted):
            on_step = lambda step, *_, stop=stop: step == stop  # noqa: E731
            craft(images, CRAFT, engine=ENGINE, checkpoint=state, every=0, on_step=on_step)
        newest = max(folder.glob("*1of2*"), key=lambda path: path.stat().st_mtime_ns)
        newest.unlink()
    return craft(images, CRAFT, engine=ENGINE, checkpoint=state).noise


def streaming() -> list:
    """Where a large set goes, and what is said to a wish that cannot be."""
    try:
        return [AUTO.scratch(free_memory()), Storage("disk")]
    except ValueError as error:
        return [AUTO.scratch(free_memory()), str(error)]


def main(folder: Path) -> None:
    images = image_set(21)
    if os.environ.get("LOSE"):
        craft(images, CRAFT, engine=ENGINE, on_step=lambda *_: os.kill(int((folder / "pid").read_text()), 9))
    made = craft(images, CRAFT, engine=ENGINE)
    learned = fit(images, image_set(9, seed=1), LEARN, engine=ENGINE)
    print(json.dumps({
        "exchange": parallel.together(exchange), "linear": parallel.together(linear_step), "alone": linear_step(),
        "same": parallel.together(same_everywhere, images, CRAFT), "noise": made.noise.flatten().tolist(),
        "shape": list(made.noise.shape), "passes": made.passes.total, "cost": CRAFT.cost(20).total,
        "resumed": interrupted(images, folder).flatten().tolist(), "last": learned.last,
        "curve": [step for step, _ in learned.curve], "learner_passes": learned.passes.total,
        "streaming": streaming(),
    }))  # fmt: skip


def group_threads() -> list[str]:
    """The threads of this process that belong to a group, by name, where the system tells (Linux)."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        with parallel.group() as leads:
            if leads:
                main(Path(sys.argv[1]))
            else:
                (Path(sys.argv[1]) / "pid").write_text(str(os.getpid()))
                parallel.serve()
    finally:  # a thread that outlives its group may abort the process at its end
        assert not group_threads()
