"""Tests that need one CUDA device. Without one they skip, or do the same on the CPU where PARALLELDIT_GPU_TESTS_ON=cpu.

Ranks that share a GPU talk over gloo: NCCL takes one rank a GPU. What they send goes through host memory
(shared_device.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.ranks.conftest import RankPool

DEVICE = os.environ.get("PARALLELDIT_GPU_TESTS_ON", "cuda:0")
SHARING = 4
"""The most ranks that share the device."""


@pytest.fixture(scope="session")
def device() -> str:
    if DEVICE != "cpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (PARALLELDIT_GPU_TESTS_ON=cpu does the same on the CPU)")
    return DEVICE


@pytest.fixture(scope="session")
def ranks(device: str) -> Iterator[RankPool]:
    """As the pool of tests/ranks, of processes that may use CUDA."""
    from tests.ranks.conftest import RankPool

    pool = RankPool(SHARING, start="spawn", patience=120 if device == "cpu" else 60)
    yield pool
    pool.close()
