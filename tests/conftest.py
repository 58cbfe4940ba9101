"""One thread for every test: the nets are so small that a second one costs more than it brings."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
