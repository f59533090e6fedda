"""How many threads this process computes with."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def limit_threads(count: int) -> None:
    """From now on torch and the linear algebra of numpy and scipy, which torch's own setting leaves alone, each use at
    most `count` threads: two pools on one core wait for each other more than they compute.
    """
    torch.set_num_threads(count)
    threadpool_limits(count)
