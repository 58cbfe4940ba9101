"""Freed memory stays with the process: the system is not asked for it again, unless the user's environment decides."""

import os
import pickle
import subprocess
import sys

import pytest

from semkit.nets.engine import Engine
from semkit.nets.memory import THEIRS

# A small net's pass, 20 times: eight activations, all of them freed.
FAULTS = """
import ctypes, pickle, resource
import torch
from semkit import Engine
from semkit.nets.memory import keep_freed
{first}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def held():
    blocks = [libc.malloc(6_000_000) for _ in range(8)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, 6_000_000)
    for block in blocks:
        libc.free(block)
held(), held()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    held()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, keep_freed.cache_info().currsize and keep_freed())
"""


def faults(first, **environment):
    """(page faults, whether freed memory is kept) of a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in THEIRS} | environment
    asked = [sys.executable, "-c", FAULTS.format(first=first)]
    count, kept = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.split()
    return int(count), kept == "True"


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="only glibc is asked")
def test_a_prepared_net_keeps_what_is_freed_and_without_one_it_comes_back_page_by_page():
    by_message = f"pickle.loads({pickle.dumps(Engine('cpu'))!r}).prepare(torch.nn.Linear(1, 1))"
    kept, yes = faults(by_message)
    given_back, no = faults("Engine('cpu')")
    _, left_alone = faults(by_message, MALLOC_MMAP_THRESHOLD_="100000")
    assert yes and not no and not left_alone
    assert kept < 200 < 100_000 < given_back  # 20 * 8 blocks are 234,000 pages
