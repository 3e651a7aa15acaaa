"""Time of clip + AdamW + EMA + working copy of 85 M parameters, beside torch's fused pieces. Needs a GPU.

python tests/bench/step.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

import lycore

LAYERS, WIDTH, RANK = 81, 4096, 128
DECAY = 0.999
GOAL = 2.0
"""Milliseconds that AdamW may take on an H100, with all that is around it."""


def median_ms(work: Callable[[], object], rounds: int = 30) -> float:
    """By CUDA events around each round, after five that do not count."""
    times = []
    for index in range(rounds + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if index >= 5:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ours(optimizer: str = "AdamW") -> tuple[float, float, int]:
    """Milliseconds eager and as a graph, and the number of parameters."""
    config = {"network_dim": RANK, "optimizer_type": optimizer, "mixed_precision": "bf16"}
    if "ScheduleFree" not in optimizer:
        config["ema_decay"] = DECAY
    network = lycore.Network(config)
    for index in range(LAYERS):
        network.add(f"layer{index}", torch.nn.Linear(WIDTH, WIDTH, device="meta"))
    network.build("cuda")
    network.gradients.normal_()
    eager = median_ms(lambda: network.step(wait=False))
    replay = network.capture(lambda: network.step(wait=False))
    return eager, median_ms(replay), network.parameter_count


def torchs(one: bool) -> float:
    """AdamW(fused=True), clip_grad_norm_, and foreach for the rest; on one flat tensor, or on one per factor."""
    count = 2 * LAYERS
    shapes = [(count * RANK * WIDTH,)] if one else [(RANK, WIDTH)] * count
    parameters = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    emas = [p.detach().clone() for p in parameters]
    working = [p.detach().bfloat16() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    @torch.no_grad()
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(emas, parameters, 1 - DECAY)
        torch._foreach_copy_(working, parameters)
        torch._foreach_zero_([p.grad for p in parameters])

    return median_ms(step)


def copying(count: int) -> float:
    """One copy in which as many bytes move as in a step of AdamW: 20 read and 22 written for each parameter."""
    source = torch.empty(count * 21, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def main() -> None:
    """Prints the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians, ms")
    print(f"copying as many bytes as AdamW moves: {copying(2 * LAYERS * RANK * WIDTH):.3f}")
    for optimizer in (
        "AdamW",
        "SGDNesterov",
        "Lion",
        "AdamWScheduleFree",
        "RAdamScheduleFree",
        "AdamW8bit",
        "Prodigy",
        "DAdaptAdam",
        "DAdaptLion",
        "Adafactor",
        "CAME",
    ):
        eager, graph, count = ours(optimizer)
        goal = f", at most {GOAL:g}{' **missed**' * (eager > GOAL)}" if optimizer == "AdamW" else ""
        print(f"LyCore {optimizer:<18} {count / 1e6:.1f} M: {eager:.3f}{goal}, in a graph {graph:.3f}")
        torch.cuda.empty_cache()
    print(f"torch AdamW, {2 * LAYERS} tensors: {torchs(False):.3f}, one flat tensor: {torchs(True):.3f}")


if __name__ == "__main__":
    main()
