"""What whole sets cost: seconds an image by the size of the set, and the memory that crafting their noise takes."""

import pickle
import sys
from contextlib import suppress
from subprocess import run

import torch

from semkit.analysis.stopwatch import Run, peak_memory
from semkit.images.augment import FlipCrop
from semkit.images.imageset import ImageSet
from semkit.nets.engine import Engine
from semkit.nets.lab import Interrupted, Lab
from semkit.protections.crafting import CraftRecipe, craft
from semkit.training.perturb import Clean
from semkit.training.schedule import SGD

NET = "tiny"  # what is asked here is about sets, not about nets


def random_images(n: int, size: int) -> ImageSet:
    """n images of `size` pixels with random values, the same at every call, in ten classes."""
    levels = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(levels, torch.arange(n) % 10, tuple("0123456789"))


def _recipe(steps: int, batch: int) -> CraftRecipe:
    sgd = SGD(steps=steps, batch=batch)
    return CraftRecipe(surrogate_side=Clean(), steps=1, samples=1, augment=FlipCrop(), surrogate=NET, sgd=sgd)


def set_seconds(batches: int, batch: int, times: int, engine: Engine, tell: Run) -> float:
    """Seconds per image of crafting noise for a set: its final visit, and a training visit for one image in eight.

    The mean of so many `times`. tell() is called after every step, on one batch.
    """
    images, recipe = random_images(batches * batch, 32), _recipe(batches // 8, batch)
    made = [craft(images, recipe, lab=Lab(engine, on_step=lambda *_: tell())) for _ in range(times)]
    return sum(crafted.seconds for crafted in made) / times / len(images)


def _craft_a_little(n: int, size: int, batch: int, engine: Engine) -> None:
    """Two steps of training and two of the final pass: whatever crafting n images ever holds at a time."""
    with suppress(Interrupted):
        craft(random_images(n, size), _recipe(2, batch), lab=Lab(engine, on_step=lambda what, step, *_: step == 4))


def memory_here(n: int, size: int, batch: int, engine: Engine) -> int:
    """`set_memory` for a process that has done nothing yet."""
    _craft_a_little(4, 32, 2, engine)  # torch's own: what it loads and keeps
    before = peak_memory(engine.device)
    _craft_a_little(n, size, batch, engine)
    return peak_memory(engine.device) - before


def set_memory(n: int, size: int, batch: int, engine: Engine) -> int | None:
    """Bytes above torch's own that crafting n images of `size` pixels holds at most, images and noise included.

    Asked of a fresh process, since a process's peak never falls; None if that one failed, for want of memory perhaps.
    """
    code = f"import pickle; from {memory_here.__module__} import memory_here; "
    code += f"print(memory_here({n}, {size}, {batch}, pickle.loads(bytes.fromhex({pickle.dumps(engine).hex()!r}))))"
    # A session of its own: Ctrl-C is for this process, and what was asked is not interrupted half-way.
    asked = run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, check=False)
    return None if asked.returncode else int(asked.stdout)
