"""Notebooks of workers that share the cores get one thread each: kernels of two threads each stall one another."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
