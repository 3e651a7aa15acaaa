"""One formula everywhere: merged forward, bypass, training forward and what training saved agree, in random cases."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from pathlib import Path

import formula
import pytest
import torch
from safetensors.torch import save_file
from threads import one_thread as one_thread
from torch import nn

import lycore

pytestmark = pytest.mark.usefixtures("library")

CASES = 240
TOLERANCE = 1e-5
"""fp32, relative to the largest element of the output in float64. Outputs are sums of at most 600 products, added in
another order on every path: errors of some 2^-24 sqrt(600) = 1.5e-6 of a typical output."""
KEYS = ("stride", "padding", "dilation", "groups")


@dataclass
class Case:
    """A layer, an input, and an adapter file for it."""

    model: nn.Module
    x: torch.Tensor
    path: Path
    rank: int
    alpha: float
    tucker: bool
    text: str

    @property
    def layer(self) -> nn.Module:
        return self.model.layer

    def merged_by_formula(self, strength: float) -> torch.Tensor:
        """The output in float64."""
        exact = copy.deepcopy(self.model).double()
        (change,) = formula.read(self.path).values()
        weight = exact.layer.weight
        weight.data += torch.from_numpy(strength * change.delta(weight))
        return exact.layer(self.x.double())

    def bypass(self, stack: lycore.Stack) -> torch.Tensor:
        """What the untouched layer and the stack's forward give together."""
        sliding = {key: getattr(self.layer, key) for key in KEYS} if hasattr(self.layer, "kernel_size") else {}
        return stack.forward("layer.weight", self.x, self.layer(self.x).contiguous(), **sliding)


def make_case(seed: int, folder: Path) -> Case:
    """Axes, kernel, sliding, groups, rank, alpha and Tucker all random; every kind of layer comes equally often."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    axes, groups = seed % 4, 1
    if axes == 0:
        layer: nn.Module = nn.Linear(rng.randint(1, 80), rng.randint(1, 80), bias=rng.random() < 0.5)
        size = [*(rng.randint(1, 4) for _ in range(rng.randint(1, 3))), layer.in_features]
    else:
        groups = rng.choice([1, 1, 2, 3])
        kernel = [rng.choice([1, 1, 2, 3, 3, 5] if axes < 3 else [1, 2, 3]) for _ in range(axes)]
        sliding = {
            "stride": [rng.randint(1, 3) for _ in range(axes)],
            "padding": [rng.randint(0, 2) for _ in range(axes)],
            "dilation": [rng.randint(1, 2) for _ in range(axes)],
        }
        channels = [groups * rng.randint(1, 12 // axes) for _ in range(2)]
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        layer = conv(*channels, kernel, groups=groups, bias=rng.random() < 0.5, **sliding)
        size = [rng.randint(1, 3), channels[0], *(rng.randint(9, 11 if axes < 3 else 9) for _ in range(axes))]
    rank, alpha = rng.choice([1, 2, 3, 7, 8, 16]), rng.choice([1.0, 2.0, 0.3, 5.5, 16.0])
    shape, ones = list(layer.weight.shape), [1] * axes
    tucker = math.prod(shape[2:]) > 1 and rng.random() < 0.4
    factors = {"lora_down.weight": [rank, *shape[1:]], "lora_up.weight": [shape[0], rank, *ones]}
    if tucker:
        factors |= {"lora_down.weight": [rank, shape[1], *ones], "lora_mid.weight": [rank, rank, *shape[2:]]}
    # The delta is about as large as the weight: a strength or a scale that is off cannot hide.
    weight_std = float(layer.weight.detach().square().mean().sqrt())
    std = (weight_std / (alpha / rank * rank ** (1.0 if tucker else 0.5))) ** (1 / len(factors))
    tensors = {f"lora_unet_layer.{key}": torch.randn(s, generator=generator) * std for key, s in factors.items()}
    tensors["lora_unet_layer.alpha"] = torch.tensor(alpha)
    path = folder / f"{seed}.safetensors"
    save_file(tensors, path)
    x = torch.randn(size, generator=generator)
    model = nn.Sequential()
    model.add_module("layer", layer.requires_grad_(False))
    return Case(model, x, path, rank, alpha, tucker, f"seed {seed}: {layer}, rank {rank}, tucker {tucker}")


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want).abs().max() / want.abs().max())


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    torch.manual_seed(17)
    folder = tmp_path_factory.mktemp("agreement")
    return [make_case(seed, folder) for seed in range(CASES)]


def check(worst: dict[str, float], what: str) -> None:
    name = max(worst, key=worst.__getitem__)
    print(f"{what}: {len(worst)} cases, worst {worst[name]:.2e} at {name}")
    wrong = [f"{error:.2e} at {name}" for name, error in worst.items() if not error <= TOLERANCE]
    assert not wrong, f"{what}: {len(wrong)} of {len(worst)}: {wrong[:5]}"


def test_the_cases_are_various(cases):
    kinds = {type(case.layer).__name__ for case in cases}
    assert kinds == {"Linear", "Conv1d", "Conv2d", "Conv3d"}
    convolutions = [case.layer for case in cases if hasattr(case.layer, "groups")]
    for key in KEYS:
        plain = 0 if key == "padding" else 1
        others = [c for c in convolutions if any(v != plain for v in torch.as_tensor(getattr(c, key)).flatten())]
        assert len(others) >= 50, key
    assert sum(case.tucker for case in cases) >= 50
    assert sum(case.tucker and case.layer.groups > 1 for case in cases) >= 10


def test_merged_and_bypass_are_the_formula(cases):
    merged, bypass = {}, {}
    for number, case in enumerate(cases):
        strength = (1.0, 0.7, -0.3)[number % 3]
        want = case.merged_by_formula(strength)
        base = case.layer.weight.clone()
        with lycore.Stack(case.model) as stack:
            stack.add(case.path, strength)
            bypass[case.text] = distance(case.bypass(stack), want)
            assert torch.equal(case.layer.weight, base), "the bypass leaves the weight alone"
            stack.apply()
            merged[case.text] = distance(case.layer(case.x), want)
        assert torch.equal(case.layer.weight, base)
        assert distance(case.layer(case.x), want) > 1e-2, "the adapter must show"
    check(merged, "merged")
    check(bypass, "bypass")


def network_of(case: Case) -> lycore.Network:
    """Training on the case's layer, started from its file."""
    network = lycore.Network({"network_dim": case.rank, "network_alpha": case.alpha})
    assert network.attach(case.model) == ["layer"]
    network.build()
    assert network.load_weights(case.path) == 1
    return network


@pytest.mark.usefixtures("torch_library")
def test_training_and_what_it_saves_are_the_formula(cases, tmp_path):
    """Training knows no Tucker core, so those cases are in the test above and below only."""
    training, saved, bypass = {}, {}, {}
    for case in cases:
        if case.tucker:
            continue
        want = case.merged_by_formula(1.0)
        network = network_of(case)
        training[case.text] = distance(case.model(case.x), want)
        network.save(tmp_path / "saved.safetensors")
        network.close()
        with lycore.open(tmp_path / "saved.safetensors") as adapter, lycore.Stack(case.model) as stack:
            assert [(m.name, m.rank, m.alpha) for m in adapter.modules] == [
                ("lora_unet_layer", case.rank, pytest.approx(case.alpha, rel=1e-7))
            ]
            stack.add(adapter)
            bypass[case.text] = distance(case.bypass(stack), want)
            stack.apply()
            saved[case.text] = distance(case.layer(case.x), want)
    assert len(training) >= 140
    check(training, "training")
    check(saved, "saved and merged")
    check(bypass, "saved and bypass")


@pytest.mark.usefixtures("torch_library")
def test_training_refuses_a_tucker_core(cases):
    """Rather than train without it."""
    case = next(case for case in cases if case.tucker)
    with pytest.raises(lycore.FileError, match="lora_mid"):
        network_of(case)
    for hook in list(case.layer._forward_hooks):
        del case.layer._forward_hooks[hook]
