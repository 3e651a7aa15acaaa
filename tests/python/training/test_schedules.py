"""Learning rates over whole runs beside those of transformers and diffusers, called as sd-scripts calls them."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from torch import nn
from transformers import get_scheduler

import lycore

RATE, STEPS = 3e-4, 60


def rates_of(config: dict, steps: int) -> list[float]:
    """The rates that a network reports, and takes: with SGD and a gradient of 1 the parameters tell."""
    sgd = {"optimizer_type": "SGDNesterov", "optimizer_args": {"momentum": 1e-30}, "max_grad_norm": 0}
    network = lycore.Network({"network_dim": 1, "learning_rate": RATE, **sgd, **config})
    network.add("layer", nn.Linear(3, 3))
    network.build("cpu")
    rates = []
    for _ in range(steps):
        network.parameters.zero_()
        network.gradients.fill_(1)
        rates.append(network.step()["learning_rate"])
        # One rounding to fp32.
        assert -network.parameters[0].item() == pytest.approx(rates[-1], rel=1e-7, abs=1e-30)
    return rates


def rates_of_transformers(name: str, warmup: int, keywords: dict, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    if name == "piecewise_constant":
        schedule = get_piecewise_constant_schedule(optimizer, **keywords)
    else:
        schedule = get_scheduler(name, optimizer, warmup, STEPS, scheduler_specific_kwargs=keywords)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


# By name: what sd-scripts calls the option, and what it passes on (it halves num_cycles where a cycle is a whole wave).
CASES = [
    ("constant", 0, {}, {}),
    ("constant_with_warmup", 13, {}, {}),
    ("linear", 0, {}, {}),
    ("linear", 13, {}, {}),
    ("cosine", 13, {}, {}),
    ("cosine_with_restarts", 0, {"lr_scheduler_num_cycles": 1}, {}),
    ("cosine_with_restarts", 13, {"lr_scheduler_num_cycles": 3}, {"num_cycles": 3}),
    ("polynomial", 0, {}, {}),
    ("polynomial", 13, {"lr_scheduler_power": 2.5}, {"power": 2.5}),
    (
        "polynomial",
        13,
        {"lr_scheduler_power": 0.5, "lr_scheduler_args": {"lr_end": 1e-4}},
        {"power": 0.5, "lr_end": 1e-4},
    ),
    ("inverse_sqrt", 0, {}, {}),
    ("inverse_sqrt", 13, {}, {}),
    ("inverse_sqrt", 13, {"lr_scheduler_timescale": 5}, {"timescale": 5}),
    ("cosine_with_min_lr", 13, {"lr_scheduler_min_lr_ratio": 0.1}, {"min_lr_rate": 0.1, "num_cycles": 0.5}),
    (
        "cosine_with_min_lr",
        0,
        {"lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
        {"min_lr_rate": 0.1, "num_cycles": 1.5},
    ),
    ("warmup_stable_decay", 13, {"lr_decay_steps": 20}, {"num_decay_steps": 20}),
    (
        "warmup_stable_decay",
        13,
        {"lr_decay_steps": 0.25, "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
        {"num_decay_steps": 15, "min_lr_ratio": 0.1, "num_cycles": 1.5},
    ),
    (
        "piecewise_constant",
        0,
        {"lr_scheduler_args": {"step_rules": "1:10,0.1:20,0.01:31,0.005"}},
        {"step_rules": "1:10,0.1:20,0.01:31,0.005"},
    ),
]


@pytest.mark.parametrize(("name", "warmup", "options", "keywords"), CASES)
def test_rates_of_a_whole_run(name, warmup, options, keywords):
    config = {"lr_scheduler": name, "lr_warmup_steps": warmup, "max_train_steps": STEPS, **options}
    got = rates_of(config, STEPS)
    want = rates_of_transformers(name, warmup, keywords, STEPS)
    # The same formula in float64, with another order of operations; the largest is RATE, and a cosine near 0 cancels.
    assert got == pytest.approx(want, rel=1e-12, abs=1e-15 * RATE)
    assert len(set(got)) > 1 or name == "constant"


@pytest.mark.parametrize("name", ["cosine", "cosine_with_min_lr"])
def test_past_the_end_the_rate_stays(name):
    """transformers' cosines rise again; a run that is continued too far should not learn wildly."""
    options = {"lr_scheduler_min_lr_ratio": 0.1} if name == "cosine_with_min_lr" else {}
    got = rates_of({"lr_scheduler": name, "max_train_steps": STEPS, **options}, 2 * STEPS)
    assert got[STEPS:] == pytest.approx([0.1 * RATE if options else 0.0] * STEPS, abs=1e-20)
    assert rates_of_transformers(name, 0, {"min_lr_rate": 0.1} if options else {}, 2 * STEPS)[-1] > 0.9 * RATE
