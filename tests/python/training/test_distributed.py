"""Two processes with half of each batch train as one with the whole, and agree to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .nets import off
from .ranks import UPDATES, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")

TESTS = Path(__file__).resolve().parents[1]
CLIP = 0.001
CLOSE = 1e-6
"""Relative to the largest parameter, after 20 updates: sums of fp32 in another order."""


def together(folder: Path, config: dict, world: int = 2) -> list[dict[str, list]]:
    """What each of the processes tells."""
    path = os.pathsep.join([str(TESTS.parents[1] / "plugin"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "training.ranks", json.dumps({"folder": str(folder), "config": config})]
    here = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(world)}
    processes = [subprocess.Popen(command, env=here | {"RANK": str(rank)}) for rank in range(world)]
    try:
        assert [process.wait(300) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_grad_norm": CLIP},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0},
    ],
    ids=["AdamW", "accumulated and clipped", "Prodigy"],
)
def test_two_processes_with_half_of_the_batch_are_one_with_all_of_it(tmp_path, config):
    config = {"learning_rate": 5e-3, "gradient_accumulation_steps": 1, **config}
    alone, (first, second) = train(config), together(tmp_path, config)
    # Their seeds differ, and the first one's start values are taken by both.
    assert not torch.equal(first["start"][0], second["start"][0])
    assert torch.equal(first["start"][0], alone["start"][0])
    assert len(alone["parameters"]) == UPDATES + 1
    for ours, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(ours, theirs)
    assert first["done"] == second["done"]
    for ours, whole in zip(first["parameters"], alone["parameters"], strict=True):
        assert off(ours, whole) <= CLOSE
    for ours, whole in zip(first["done"], alone["done"], strict=True):
        assert ours["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=CLOSE)
    assert min(done["gradient_norm"] for done in alone["done"]) > CLIP, "nothing was clipped"
    assert off(alone["parameters"][0], alone["parameters"][-1]) > 0.05, "nothing was learned"
    # One process with a gradient that is not finite stops all.
    assert first["refused"] == second["refused"] == [True]
