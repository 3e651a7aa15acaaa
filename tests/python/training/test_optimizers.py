"""Every optimizer beside the program that it follows, over 200 steps of the same gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import bitsandbytes
import came_pytorch
import dadaptation
import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
from bitsandbytes.backends.cpu import ops as bitsandbytes_cpu
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers.optimization import Adafactor

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
    rate: float | None = 1e-2
    # Of the largest value. Both round to fp32 in every operation, in part in another order, and torch fuses some
    # products with a sum: 2^-24 for each of some operations and 200 steps, where nothing amplifies it.
    tolerance: float = 1e-6
    # Values that may be further off: a rounding can turn an update that is a sign, or a state that is one of 256.
    outliers: int = 0
    # What has to have changed, relative to the values.
    least: float = 0.05


class Beside:
    """A network, and parameters of the same values in torch under another program's optimizer."""

    def __init__(self, case: Case, folder, model: nn.Module | None = None) -> None:
        base = {"optimizer_type": case.name, "optimizer_args": case.arguments, "max_grad_norm": 0}
        rate = {} if case.rate is None else {"learning_rate": case.rate}
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
        """A noisy pull to a goal, of a different strength for every value.

        It looks at the other program's values only, so that a difference does not feed itself.
        """
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
        print(f"{self.case.name}: {off[-1]:.1e}, without outliers {off[-1 - self.case.outliers]:.1e}")
        assert off[-1 - self.case.outliers] <= self.case.tolerance, off[-5:]
        assert (values[self.padding] == 0).all()


def d_adapted(program: type[torch.optim.Optimizer], **keywords: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda p, lr: program(p, lr, **keywords)


def schedule_free(program: type[torch.optim.Optimizer], **keywords: Any) -> Callable[..., torch.optim.Optimizer]:
    def make(parameters, lr):
        optimizer = program(parameters, lr, **keywords)
        optimizer.train()
        return optimizer

    return make


COSINE = {"lr_scheduler": "cosine", "max_train_steps": STEPS, "lr_warmup_steps": 20}

WARMUP = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20}

# d comes from sums over all values, in which terms cancel. The originals sum in fp32, this library in fp64.
D_TOLERANCE = 1e-5

CASES = {
    "AdamW": Case("AdamW", lambda p, lr: torch.optim.AdamW(p, lr)),
    "AdamW, options": Case(
        "adamw",
        lambda p, lr: torch.optim.AdamW(p, lr, (0.8, 0.95), 1e-6, 0.1),
        {"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        COSINE,
    ),
    "SGDNesterov": Case("SGDNesterov", lambda p, lr: torch.optim.SGD(p, lr, 0.9, nesterov=True), rate=1e-3),
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
    "Adafactor": Case("AdaFactor", lambda p, _: Adafactor(p), rate=None),
    "Adafactor, rising": Case(
        "Adafactor",
        lambda p, _: Adafactor(p, scale_parameter=False, warmup_init=True, beta1=0.9, decay_rate=-0.7),
        {"scale_parameter": False, "warmup_init": True, "beta1": 0.9, "decay_rate": -0.7},
        rate=None,
        # The rate has come to 2e-4.
        least=0.01,
    ),
    "Adafactor, given rate": Case(
        "Adafactor",
        lambda p, lr: Adafactor(
            p, lr, (1e-2, 2.0), clip_threshold=0.5, weight_decay=0.1, relative_step=False, beta1=0.5
        ),
        {"eps": [1e-2, 2.0], "clip_threshold": 0.5, "weight_decay": 0.1, "relative_step": False, "beta1": 0.5},
        COSINE,
    ),
    "CAME": Case("CAME", lambda p, lr: came_pytorch.CAME(p, lr), rate=1e-3),
    "CAME, options": Case(
        "came",
        lambda p, lr: came_pytorch.CAME(p, lr, (1e-2, 1e-3), 0.5, (0.8, 0.95, 0.99), 0.1),
        {"eps": [1e-2, 1e-3], "clip_threshold": 0.5, "betas": [0.8, 0.95, 0.99], "weight_decay": 0.1},
        COSINE,
    ),
    "Prodigy": Case("Prodigy", d_adapted(prodigyopt.Prodigy), rate=1.0, tolerance=D_TOLERANCE),
    "Prodigy, options": Case(
        "prodigy",
        d_adapted(
            prodigyopt.Prodigy,
            betas=(0.8, 0.95),
            beta3=0.9,
            eps=1e-6,
            weight_decay=0.1,
            use_bias_correction=True,
            safeguard_warmup=True,
            d0=1e-4,
            d_coef=0.5,
            growth_rate=1.1,
            # A divisor of the alignment of parameters, so that a count through each of them is one through all.
            slice_p=4,
        ),
        {
            "betas": [0.8, 0.95],
            "beta3": 0.9,
            "eps": 1e-6,
            "weight_decay": 0.1,
            "use_bias_correction": True,
            "safeguard_warmup": True,
            "d0": 1e-4,
            "d_coef": 0.5,
            "growth_rate": 1.1,
            "slice_p": 4,
        },
        COSINE,
        rate=0.7,
        tolerance=D_TOLERANCE,
    ),
    "Prodigy, coupled decay": Case(
        "Prodigy",
        d_adapted(prodigyopt.Prodigy, betas=(0.0, 0.99), weight_decay=0.1, decouple=False),
        {"betas": [0.0, 0.99], "weight_decay": 0.1, "decouple": False},
        rate=1.0,
        tolerance=D_TOLERANCE,
    ),
    "DAdaptAdam": Case("DAdaptAdam", d_adapted(dadaptation.DAdaptAdam), rate=1.0, tolerance=D_TOLERANCE),
    "DAdaptAdam, options": Case(
        "dadaptadam",
        d_adapted(
            dadaptation.DAdaptAdam,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            decouple=True,
            use_bias_correction=True,
            d0=1e-4,
            growth_rate=1.1,
        ),
        {
            "betas": [0.8, 0.95],
            "eps": 1e-6,
            "weight_decay": 0.1,
            "decouple": True,
            "use_bias_correction": True,
            "d0": 1e-4,
            "growth_rate": 1.1,
        },
        COSINE,
        rate=0.7,
        tolerance=D_TOLERANCE,
    ),
    "DAdaptAdam, coupled decay": Case(
        "DAdaptAdam",
        d_adapted(dadaptation.DAdaptAdam, weight_decay=0.1),
        {"weight_decay": 0.1},
        rate=1.0,
        tolerance=D_TOLERANCE,
    ),
    "DAdaptLion": Case("DAdaptLion", d_adapted(dadaptation.DAdaptLion), rate=1.0, tolerance=D_TOLERANCE, outliers=3),
    "DAdaptLion, options": Case(
        "dadaptlion",
        d_adapted(dadaptation.DAdaptLion, betas=(0.8, 0.95), weight_decay=0.1, d0=1e-4),
        {"betas": [0.8, 0.95], "weight_decay": 0.1, "d0": 1e-4},
        COSINE,
        rate=0.7,
        tolerance=D_TOLERANCE,
        outliers=3,
    ),
    "AdamWScheduleFree": Case("AdamWScheduleFree", schedule_free(schedulefree.AdamWScheduleFree)),
    "AdamWScheduleFree, options": Case(
        "adamwschedulefree",
        schedule_free(
            schedulefree.AdamWScheduleFree,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            warmup_steps=30,
            r=0.5,
            weight_lr_power=1.5,
        ),
        {
            "betas": [0.8, 0.95],
            "eps": 1e-6,
            "weight_decay": 0.1,
            "warmup_steps": 30,
            "r": 0.5,
            "weight_lr_power": 1.5,
        },
        WARMUP,
    ),
    "RAdamScheduleFree": Case("RAdamScheduleFree", schedule_free(schedulefree.RAdamScheduleFree)),
    "RAdamScheduleFree, options": Case(
        "radamschedulefree",
        schedule_free(
            schedulefree.RAdamScheduleFree,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            r=0.5,
            weight_lr_power=1.5,
            silent_sgd_phase=False,
        ),
        {
            "betas": [0.8, 0.95],
            "eps": 1e-6,
            "weight_decay": 0.1,
            "r": 0.5,
            "weight_lr_power": 1.5,
            "silent_sgd_phase": False,
        },
        WARMUP,
        rate=1e-3,
    ),
    # Parameters of at least 64 values, which most are; some of them fill their last block of 256 and some do not.
    "AdamW8bit": Case(
        "AdamW8bit",
        lambda p, lr: bitsandbytes.optim.AdamW8bit(p, lr, min_8bit_size=64),
        {"min_8bit_size": 64},
        # A rank of 4 is stored as 8, so blocks of 256 would not hold the same values.
        {"network_dim": 8},
        outliers=3,
    ),
    "AdamW8bit, options": Case(
        "adamw8bit",
        lambda p, lr: bitsandbytes.optim.AdamW8bit(p, lr, (0.8, 0.95), 1e-6, 0.1, min_8bit_size=300),
        {"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "min_8bit_size": 300},
        COSINE,
        outliers=3,
    ),
}


@pytest.fixture(autouse=True)
def _nearest_codes(monkeypatch):
    """bitsandbytes' CPU library looks codes up in equal steps of the value, and so has one code for all below 4e-6 of
    the scale; the paper and its own fallback in torch take the nearest. This is the fallback.
    """

    def quantize(values, codes, scales, out, size):
        blocks = functional.pad(values.flatten(), (0, -values.numel() % size)).view(-1, size)
        scales.copy_(blocks.abs().amax(1))
        scaled = (blocks / scales.where(scales > 0, 1)[:, None]).flatten()[: values.numel()]
        out.copy_((scaled[:, None] - codes).abs().argmin(1).view(out.shape))

    monkeypatch.setattr(bitsandbytes_cpu, "_quant_blockwise_fp32_direct", quantize)


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
    assert moved > case.least, "nothing was learned"


@pytest.mark.parametrize("name", [name for name in CASES if "ScheduleFree" in name])
def test_schedule_free_files_get_the_average(name, tmp_path):
    beside = Beside(CASES[name], tmp_path)
    path = tmp_path / "adapter.safetensors"

    def check_file():
        beside.network.save(path)
        saved = load_file(path)
        values = torch.zeros(beside.network.parameters.shape)
        for key, place in beside.factors.places.items():
            values[place] = saved[key]
        beside.optimizer.eval()
        beside.check(values)
        beside.optimizer.train()

    check_file()
    for t in range(60):
        beside.step()
        if t in (0, 40):
            before = beside.network.parameters.clone()
            check_file()
            assert torch.equal(beside.network.parameters, before), "saving is no part of the training"
            # schedulefree comes back from the average with a rounding; what is compared is the next average, not that.
            for parameter, place in zip(beside.parameters, beside.places, strict=True):
                parameter.data.copy_(before[place])
    check_file()
    # It goes on from a file as a new run would: where it is, and where its average begins.
    beside.network.load_weights(path)
    beside.network.save(tmp_path / "again.safetensors")
    loaded, again = load_file(path), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(loaded[key], again[key]) for key in loaded)


@pytest.mark.parametrize("name", sorted({case.name.lower() for case in CASES.values()}))
def test_a_resumed_run_ends_on_the_same_bits(name, tmp_path):
    """Cut before the first update, between two updates and within an accumulation, and taken up by a network whose own
    values and state have been other ones before.
    """
    case = next(c for c in CASES.values() if c.name.lower() == name)
    config = {"optimizer_type": name, "max_grad_norm": 0.5, "gradient_accumulation_steps": 3, **case.config}
    config |= {} if case.rate is None else {"learning_rate": case.rate}
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


@pytest.mark.parametrize(
    "name", sorted({case.name.lower() for case in CASES.values()} - {"prodigy", "dadaptadam", "dadaptlion"})
)
def test_parameters_are_trained_alike_beside_others(name, tmp_path):
    """Each layer's file is what it is when the layer is trained alone, but for the order of sums over a matrix; only a
    shared d would couple them.
    """
    sizes = {"a": (64, 64), "b": (64, 32), "c": (64, 64), "d": (8, 8), "e": (64, 32)}

    def trained(names: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layers = {key: nn.Linear(*size).requires_grad_(False) for key, size in sizes.items()}
        arguments = {"adamw8bit": {"min_8bit_size": 600}, "adafactor": {"relative_step": False}}.get(name, {})
        config = {"optimizer_type": name, "learning_rate": 1e-2, "max_grad_norm": 0, "optimizer_args": arguments}
        network = lycore.Network({"network_dim": 16, **config})
        for key in names:
            network.add(key, layers[key])
        network.build()
        for step in range(3):
            for key in names:
                x = torch.randn(4, sizes[key][0], generator=torch.Generator().manual_seed(step))
                layers[key](x).square().sum().backward()
            network.step()
        network.save(tmp_path / "a.safetensors")
        return load_file(tmp_path / "a.safetensors")

    together = trained("abcde")
    alone = {name: tensor for key in sizes for name, tensor in trained(key).items()}
    assert together.keys() == alone.keys()
    for key, tensor in together.items():
        assert (tensor - alone[key]).abs().max() <= 1e-6 * tensor.abs().max(), key


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    network = attached(net(), {"optimizer_type": "Lion"})
    network.save_state(tmp_path / "lion.safetensors")
    other = attached(net(), {"optimizer_type": "SGDNesterov"})
    with pytest.raises(lycore.FileError, match="another optimizer, Lion; this network has SGDNesterov"):
        other.load_state(tmp_path / "lion.safetensors")
