"""Torch's global generator, lent to library code that draws from it: seeded for a block of code, and put back."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from semkit.images.pixels import check_count

_lending = threading.RLock()  # all threads share the one generator


def drawn_seed(generator: torch.Generator | None = None) -> int:
    """A seed drawn from `generator`, or from torch's own without one."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))


def check_seed(seed: int) -> int:
    """`seed` as an int if it is a whole number from 0 to 2**63 - 1, as torch takes it; raises ValueError otherwise."""
    return check_count(seed, "seed", 0, 2**63 - 1)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block, draws on the CPU without a generator follow from `seed`; afterwards from what they did before.

    One thread at a time; a block inside another goes on from its own seed, and the outer one then from where it was.
    """
    with _lending, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs' generators too and leave them so.
        torch.default_generator.manual_seed(seed)
        yield
