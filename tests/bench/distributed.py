"""Training by several processes, one per GPU: that they equal one process, and what a step of them takes.

    torchrun --nproc-per-node 2 tests/bench/distributed.py

Every model first trains on the first GPU alone and then on all, with the same batch per GPU: perfect is the same time.
The stand-in is a stack of Linear layers; the U-Net is SDXL of diffusers with random weights, where diffusers is there.
`--device cpu` shows that the program runs, by gloo.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "plugin")]

import torch
from torch import distributed, nn

import lycore

UPDATES = 20
CLOSE = 1e-5
"""Relative to the largest parameter: fp32, summed in another order."""
Loss = Callable[[], torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per row")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    device = None
    if cuda:
        # The rank on this machine; torchrun sets it.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo", device_id=device)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    apart = distance(arguments.device, rank, world)
    models = {"stand-in": stand_in, "U-Net of SDXL, 1024 px" if cuda else "U-Net, tiny": u_net}
    rows = [times(name, made, arguments, rank, world) for name, made in models.items()]
    distributed.destroy_process_group()
    if rank == 0:
        machine = torch.cuda.get_device_name() if cuda else "CPU"
        print(f"{world} x {machine}, torch {torch.__version__}\n")
        heads = ("rank 32, batch 1 per process", "parameters, M", "1 process, ms", f"{world}, ms", "speed-up")
        print(
            f"| {' | '.join(heads)} | all-reduce alone, ms |\n|---|---|---|---|---|---|", *filter(None, rows), sep="\n"
        )
        verdict = "" if apart <= CLOSE else " **missed**"
        print(f"\n{UPDATES} updates of {world} processes with a share of the batch, against one with all of it: equal")
        print(f"between the processes to the bit; relative distance {apart:.1e} (at most {CLOSE:g}){verdict}")
    return 0


def distance(device: str, rank: int, world: int) -> float:
    """Trains alone with whole batches and together with shares of them; how far the parameters then are apart."""
    flat = []
    for ranks in (1, world):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64)).to(device).requires_grad_(False)
        network = lycore.Network({"network_dim": 8, "learning_rate": 5e-3, "max_grad_norm": 0.1, "seed": rank})
        network.attach(model)
        network.build()
        network.broadcast()
        for _ in range(UPDATES):
            # The same in every process.
            x = torch.randn(8 * world, 64).to(device)
            share = x.chunk(ranks)[rank % ranks]
            nn.functional.mse_loss(model(share), share.roll(1, 1)).backward()
            if ranks > 1:
                network.all_reduce()
            network.step()
        flat.append(network.parameters.clone())
    all_of_them = [torch.empty_like(flat[1]) for _ in range(world)]
    distributed.all_gather(all_of_them, flat[1])
    assert all(torch.equal(theirs, flat[1]) for theirs in all_of_them), "the processes' parameters are not equal"
    return ((flat[1] - flat[0]).abs().max() / flat[0].abs().max()).item()


def stand_in(device: str) -> tuple[nn.Module, Loss]:
    """Linear layers in bf16, as wide as SDXL's, on a GPU; else small."""
    width, depth, rows = (1280, 200, 1024) if device == "cuda" else (64, 4, 8)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = nn.Sequential(*(nn.Linear(width, width, device=device, dtype=dtype) for _ in range(depth)))
    x = torch.randn(rows, width, device=device, dtype=dtype)
    return model, lambda: model(x).float().square().mean()


def u_net(device: str) -> tuple[nn.Module, Loss]:
    import trainers

    host = trainers.Host(trainers.Setting("sdxl" if device == "cuda" else "tiny", device))
    return host.unet, host.loss


def times(
    name: str, made: Callable[[str], tuple[nn.Module, Loss]], arguments: Any, rank: int, world: int
) -> str | None:
    """A row of the table."""
    try:
        model, loss = made(arguments.device)
    except ImportError as problem:
        if rank == 0:
            print(f"not measured: {name}: {problem}", file=sys.stderr)
        return None
    cuda = arguments.device == "cuda"
    network = lycore.Network({"network_dim": 32, "mixed_precision": "bf16" if cuda else "no"})
    network.attach(model.requires_grad_(False), preset="attn-mlp" if made is u_net else None)
    network.build()
    network.broadcast()
    torch.manual_seed(rank)

    def step(reduce: bool) -> None:
        loss().backward()
        if reduce:
            network.all_reduce()
        network.step()

    def median(work: Callable[[], object]) -> float:
        work()
        ms = []
        for _ in range(arguments.steps):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            ms.append((time.perf_counter() - start) * 1e3)
        return statistics.median(ms)

    alone = median(lambda: step(False)) if rank == 0 else 0.0
    distributed.barrier()
    together, reduction = median(lambda: step(True)), median(network.all_reduce)
    count = network.parameter_count / 1e6
    network.close()
    return f"| {name} | {count:.1f} | {alone:.1f} | {together:.1f} | {world * alone / together:.2f} | {reduction:.2f} |"


if __name__ == "__main__":
    raise SystemExit(main())
