"""A fixture for the modules of this folder. Not in a conftest.py: the tests beside the folder import theirs by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The oracles' models are tiny: one thread is faster than many, and does not wait for what else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
