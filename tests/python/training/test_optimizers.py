"""Every optimizer beside the program that it follows, over 200 steps of the same gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytest
import torch
from torch import nn

import lycore

from .nets import Factors, attached, net

STEPS = 200


@dataclasses.dataclass
class Case:
    """An optimizer with options, and the same in the other program."""

    name: str
    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    rate: float = 1e-2
    # Of the largest value. Both round to fp32 in every operation, in part in another order, and torch fuses some products
    # with a sum: 2^-24 for each of some operations and 200 steps, where nothing amplifies it.
    tolerance: float = 2e-6
    # Values that may be further off: where the update is a sign, one rounding can turn it.
    outliers: int = 0


class Beside:
    """A network, and parameters of the same values in torch under another program's optimizer."""

    def __init__(self, case: Case, folder, model: nn.Module | None = None) -> None:
        base = {"optimizer_type": case.name, "optimizer_args": case.arguments, "max_grad_norm": 0}
        rate = {} if case.rate == 0 else {"learning_rate": case.rate}
        self.case = case
        self.network = attached(model or net(), {**base, **rate, **case.config}, noise=0.5)
        self.factors = Factors(self.network, folder)
        # In the order of the flat buffer.
        self.places = sorted(self.factors.places.values(), key=lambda place: place.flatten()[0].item())
        padding = torch.ones(self.network.parameters.numel(), dtype=torch.bool)
        for place in self.places:
            padding[place.flatten()] = False
        self.padding = padding
        self.network.parameters[padding] = 0
        self.parameters = [nn.Parameter(self.network.parameters[place].clone()) for place in self.places]
        self.optimizer = case.make(self.parameters, case.rate)
        self.generator = torch.Generator().manual_seed(5)
        scales = [10 ** torch.empty(p.shape).uniform_(-2, 1, generator=self.generator) for p in self.parameters]
        self.scales = [s.requires_grad_(False) for s in scales]
        self.goals = [torch.randn(p.shape, generator=self.generator) for p in self.parameters]

    def gradients(self) -> list[torch.Tensor]:
        """A noisy pull to a goal, of a different strength for every value; it looks at the other program's values only, so
        that a difference does not feed itself."""
        rounds = zip(self.parameters, self.goals, self.scales, strict=True)
        noise = [torch.randn(p.shape, generator=self.generator) for p in self.parameters]
        return [s * (p.detach() - g + n) for (p, g, s), n in zip(rounds, noise, strict=True)]

    def step(self) -> dict[str, Any]:
        """One step of both; gives what the network tells."""
        gradients = self.gradients()
        for place, parameter, gradient in zip(self.places, self.parameters, gradients, strict=True):
            self.network.gradients[place] = gradient
            parameter.grad = gradient.clone()
        done = self.network.step()
        for group in self.optimizer.param_groups:
            if group["lr"] is not None:
                group["lr"] = done["learning_rate"]
        self.optimizer.step()
        return done

    def check(self, values: torch.Tensor | None = None) -> None:
        """The values are those of the other program, and padding is zero."""
        values = self.network.parameters if values is None else values
        got = torch.cat([values[place].flatten() for place in self.places]).double()
        want = torch.cat([p.detach().flatten() for p in self.parameters]).double()
        assert got.isfinite().all()
        off = ((got - want).abs() / want.abs().max()).sort().values
        assert off[-1 - self.case.outliers] <= self.case.tolerance, off[-5:]
        assert (values[self.padding] == 0).all()


def sgd(weight_decay: float = 0.0) -> Callable[..., torch.optim.Optimizer]:
    return lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=weight_decay, nesterov=True)


COSINE = {"lr_scheduler": "cosine", "max_train_steps": STEPS, "lr_warmup_steps": 20}

CASES = {
    "AdamW": Case("AdamW", lambda p, lr: torch.optim.AdamW(p, lr)),
    "AdamW, options": Case(
        "adamw",
        lambda p, lr: torch.optim.AdamW(p, lr, (0.8, 0.95), 1e-6, 0.1),
        {"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        COSINE,
    ),
    "SGDNesterov": Case("SGDNesterov", sgd(), rate=1e-3),
    "SGDNesterov, options": Case(
        "sgdnesterov",
        lambda p, lr: torch.optim.SGD(p, lr, 0.8, weight_decay=0.1, nesterov=True),
        {"momentum": 0.8, "weight_decay": 0.1},
        COSINE,
        rate=1e-3,
    ),
    "Lion": Case("Lion", lambda p, lr: lion_pytorch.Lion(p, lr), outliers=3),
    "Lion, options": Case(
        "LION",
        lambda p, lr: lion_pytorch.Lion(p, lr, (0.8, 0.95), 0.1),
        {"betas": [0.8, 0.95], "weight_decay": 0.1},
        COSINE,
        outliers=3,
    ),
    "Lion, decoupled decay": Case(
        "Lion",
        lambda p, lr: lion_pytorch.Lion(p, lr, weight_decay=1e-3, decoupled_weight_decay=True),
        {"weight_decay": 1e-3, "decoupled_weight_decay": True},
        outliers=3,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_follows_the_program_of_its_authors(case, tmp_path):
    beside = Beside(case, tmp_path)
    before = beside.network.parameters.clone()
    for t in range(STEPS):
        beside.step()
        if t == 0:
            # At once, before a difference could drown in 200 steps.
            beside.check()
    beside.check()
    moved = (beside.network.parameters - before).norm() / before.norm()
    assert moved > 0.05, "nothing was learned"


@pytest.mark.parametrize("name", sorted({case.name.lower() for case in CASES.values()}))
def test_a_resumed_run_ends_on_the_same_bits(name, tmp_path):
    """Cut before the first update, between two updates and within an accumulation; every second one by another process's
    network, whose own values and state have been other ones before."""
    case = next(c for c in CASES.values() if c.name.lower() == name)
    config = {"optimizer_type": name, "max_grad_norm": 0.5, "gradient_accumulation_steps": 3, **case.config}
    config |= {"learning_rate": case.rate} if case.rate else {}
    config |= {"optimizer_args": case.arguments}

    def micro_step(network, t):
        generator = torch.Generator().manual_seed(t)
        pull = torch.randn(network.parameters.shape, generator=generator) + network.parameters
        network.gradients.add_(pull * (network.parameters != 0))
        network.step()

    whole = attached(net(), config, noise=0.5)
    for t in range(45):
        micro_step(whole, t)
    whole.save_state(tmp_path / "whole.safetensors")
    for cut in (0, 30, 31, 32):
        first = attached(net(), config, noise=0.5)
        for t in range(cut):
            micro_step(first, t)
        first.save_state(tmp_path / "cut.safetensors")
        second = attached(net(), config, noise=0.1)
        for t in range(7):
            micro_step(second, 100 + t)
        second.load_state(tmp_path / "cut.safetensors")
        for t in range(cut, 45):
            micro_step(second, t)
        second.save_state(tmp_path / "second.safetensors")
        same = (tmp_path / "second.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert same, f"cut after {cut} micro-steps"


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    network = attached(net(), {"optimizer_type": "Lion"})
    network.save_state(tmp_path / "lion.safetensors")
    other = attached(net(), {"optimizer_type": "SGDNesterov"})
    with pytest.raises(lycore.FileError, match="another optimizer, Lion; this network has SGDNesterov"):
        other.load_state(tmp_path / "lion.safetensors")
