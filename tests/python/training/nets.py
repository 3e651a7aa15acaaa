"""What the training tests share: a model with every kind of layer, its data, and the formula in plain torch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import lycore

RANK = 4


class Net(nn.Module):
    """3x3 convolutions, one of them strided, a 1x1 one, and Linear layers, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.ModuleDict({"down": nn.Conv2d(12, 16, 3, stride=2, padding=1), "point": nn.Conv2d(16, 16, 1)})
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 10, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.silu(self.stem(x))
        x = self.body["point"](functional.silu(self.body["down"](x)))
        return self.mlp(x.flatten(2).transpose(1, 2)).mean(1)


LAYERS = ["stem", "body.down", "body.point", "mlp.0", "mlp.2"]


def net(seed: int = 0) -> Net:
    """The frozen base; the same for the same seed."""
    torch.manual_seed(seed)
    return Net().requires_grad_(False)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and goal number so and so, a function of the number alone. The noise keeps the loss away from 0."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    means = x.mean((2, 3)).repeat(1, 4)[:, :10]
    return x, 3 * means + 0.1 * torch.randn(means.shape, generator=generator)


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    """The model's mean squared error on one batch."""
    x, goal = batch(number)
    return functional.mse_loss(model(x), goal)


def attached(model: nn.Module, config: dict | None = None, *, noise: float = 0.0, prefix: str = "") -> lycore.Network:
    """A built network on all layers. Fresh factors have up = 0, which hides most faults: `noise` overwrites them."""
    network = lycore.Network({"network_dim": RANK, "network_alpha": 3, **(config or {})})
    network.attach(model, prefix=prefix)
    network.build()
    fill(network, noise)
    return network


def fill(network: lycore.Network, noise: float) -> None:
    """Gives the parameters normal values of this deviation; 0 leaves them."""
    if noise:
        generator = torch.Generator().manual_seed(77)
        network.parameters.copy_(noise * torch.randn(network.parameters.shape, generator=generator))
        network.refresh()


def key_of(layer: str, factor: str) -> str:
    """How a factor ("up" or "down") of a layer is called in the file."""
    return f"lora_unet_{layer.replace('.', '_')}.lora_{factor}.weight"


class Factors:
    """Where a network's factors lie in its flat buffers, learned from a file of their indices."""

    def __init__(self, network: lycore.Network, folder: Path) -> None:
        self.network = network
        kept = network.parameters.clone()
        network.parameters.copy_(torch.arange(kept.numel(), dtype=torch.float32))
        network.save(folder / "indices.safetensors")
        network.parameters.copy_(kept)
        saved = load_file(folder / "indices.safetensors")
        self.places = {key: value.long() for key, value in saved.items() if key.endswith(".weight")}

    def values(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters by the file's keys."""
        return {key: self.network.parameters[place] for key, place in self.places.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """A copy of the gradients by the file's keys."""
        return {key: self.network.gradients[place] for key, place in self.places.items()}


def explicit(
    layer: nn.Module, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, bias: bool = True
) -> torch.Tensor:
    """`layer` with the weight W + scale * up @ down, in float64; without bias and base when `bias` is false."""
    delta = scale * (up.double().flatten(1) @ down.double().flatten(1)).reshape(layer.weight.shape)
    weight = layer.weight.double() + delta if bias else delta
    shift = layer.bias.double() if bias and layer.bias is not None else None
    if isinstance(layer, nn.Linear):
        return functional.linear(x.double(), weight, shift)
    return layer._conv_forward(x.double(), weight, shift)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest wanted value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
