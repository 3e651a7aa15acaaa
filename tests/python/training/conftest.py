"""Training needs torch and the build with libtorch; the folder's tests are skipped, with the reason, without them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs torch")


@pytest.fixture(autouse=True)
def _one_thread(torch_library):
    """The models are tiny: where cores are shared, waiting for a second thread takes fifty times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_time(monkeypatch):
    """Files tell when their training began and ended: runs that shall be equal are so to the byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
