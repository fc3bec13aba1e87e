"""What all tests of experiments need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    """`benchmarks/` is a folder of scripts, not a package."""
    path = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, path)
    try:
        import reproduce
    finally:
        sys.path.remove(path)
    return reproduce


@pytest.fixture(autouse=True)
def keep_threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)
