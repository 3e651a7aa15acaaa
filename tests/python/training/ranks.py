"""A process of several that train together, for test_distributed.py: `python -m training.ranks JSON`, with RANK and
WORLD_SIZE in its environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

import lycore

from .nets import attached, batch, net

UPDATES = 20


def train(config: dict, rank: int = 0, world: int = 1) -> dict[str, list]:
    """Trains with this process' share of each batch; returns the parameters and what `step` said, of every update."""
    model = net()
    network = attached(model, config | {"seed": rank})
    start = network.parameters.clone()
    if world > 1:
        network.broadcast()
    told: dict[str, list] = {"start": [start], "parameters": [network.parameters.clone()], "done": []}
    for number in range(UPDATES * config["gradient_accumulation_steps"]):
        x, goal = (part.chunk(world)[rank] for part in batch(number))
        nn.functional.mse_loss(model(x), goal).backward()
        if world > 1:
            network.all_reduce()
        done = network.step()
        if done["updated"]:
            told["parameters"].append(network.parameters.clone())
            told["done"].append(done)
    if world > 1:
        told["refused"] = [refused(network, rank, config["gradient_accumulation_steps"])]
    return told


def refused(network: lycore.Network, rank: int, micro_steps: int) -> bool:
    """Whether this process' step fails after another one alone has met a gradient that is not finite."""
    if rank > 0:
        network.gradients[0] = float("nan")
    try:
        for _ in range(micro_steps):
            network.all_reduce()
            network.step()
    except lycore.TrainError:
        return True
    return False


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(asked["folder"])
    # They meet in a file: no port that another program may take.
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(train(asked["config"], rank, world), folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
