"""Training on a GPU: the same numbers as elsewhere, in a host that uses TF32 too."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import ONLY_GPU
from torch import nn
from torch.nn import functional

import lycore

pytestmark = ONLY_GPU


def test_training_on_the_gpu_follows_the_cpu():
    """100 steps of the same problem on both; fp32 sums in another order, so losses agree to 1e-4 relative."""

    def losses(device: str) -> list[float]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)
        )
        x, target = torch.randn(16, 3, 6, 6), torch.randn(16, 10)
        net = net.to(device).requires_grad_(False)
        x, target = x.to(device), target.to(device)
        network = lycore.Network({"network_dim": 4, "network_alpha": 2, "learning_rate": 1e-2, "seed": 4})
        network.attach(net)
        network.build(device)
        found = []
        with torch.backends.cudnn.flags(allow_tf32=False):
            for _ in range(100):
                loss = torch.nn.functional.mse_loss(net(x), target)
                loss.backward()
                network.step()
                found.append(loss.item())
        network.detach()
        return found

    cpu, gpu = losses("cpu"), losses("cuda")
    assert cpu[-1] < cpu[0] / 2
    assert max(abs(a - b) / a for a, b in zip(cpu, gpu, strict=True)) < 1e-4


def test_training_a_convolution_is_exact_in_a_host_that_uses_tf32():
    """Forward and gradients against fp64; the host's own setting is as before."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(320, 320, 3, padding=1, bias=False).cuda().requires_grad_(False)
    layer.weight.zero_()
    net = torch.nn.Sequential(layer)
    network = lycore.Network({"network_dim": 32, "network_alpha": 32})
    network.attach(net)
    network.build("cuda")
    network.parameters.normal_(std=0.05)
    network.refresh()
    # The flat buffer begins with the parameters in the order of the file: down, then up.
    sizes = ((32, 320, 3, 3), (320, 32))
    count = 32 * 320 * 9
    down, up = (
        part.double().reshape(size).requires_grad_()
        for part, size in zip(network.parameters[: count + 320 * 32].split([count, 320 * 32]), sizes, strict=True)
    )
    x = torch.randn(2, 320, 48, 48, device="cuda", requires_grad=True)
    wide = x.detach().double().requires_grad_()
    before = torch.backends.cudnn.conv.fp32_precision
    y = net(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.backends.cudnn.conv.fp32_precision == before
    want = torch.nn.functional.conv2d(wide, torch.einsum("or,rikl->oikl", up, down), padding=1)
    want.backward(grad.double())
    pairs = [(y, want), (x.grad, wide.grad), (network.gradients[:count], down.grad.flatten())]
    for got, exact in pairs:
        # fp32 sums of up to 4608 products; TF32 would be off by 3e-4.
        assert ((got.double() - exact).norm() / exact.norm()).item() < 1e-5


DORA = {"dora_wd": True}
ALGORITHMS = {
    "lora": {},
    "lora, tucker": {"use_tucker": True},
    "lora-fa": {"algo": "lora-fa"},
    "dora": DORA,
    "dora, rank 40": DORA | {"network_dim": 40},
    "dora of inputs": DORA | {"wd_on_output": False},
    "dylora": {"algo": "dylora", "block_size": 2},
    "loha": {"algo": "loha"},
    "loha, wide": {"algo": "loha", "network_dim": 24},
    "lokr": {"algo": "lokr", "network_dim": 100},
    "lokr, thin": {"algo": "lokr", "factor": 2, "network_dim": 2, "decompose_both": True},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "ia3 of inputs": {"algo": "ia3", "train_on_input": True},
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft, 24": {"algo": "diag-oft", "network_dim": 24},
    "boft": {"algo": "boft", "network_dim": 8, "name_algo_map": {"2": {"algo": "none"}}},
    "full": {"algo": "full"},
    "tlora": {"algo": "tlora", "name_algo_map": {"0": {"algo": "none"}}},
}


class Trained:
    """A small model with an adapter in training, moved away from its start."""

    def __init__(self, options: dict, device: str, precision: str):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # An odd number of channels, so that rows are not aligned; only BOFT has no blocks for it.
        model = nn.Sequential(
            nn.Conv2d(3, 48, 3, padding=1), nn.Flatten(2), nn.Linear(36, 35), nn.SiLU(), nn.Linear(35, 128)
        )
        self.model = copy.deepcopy(model).to(device, dtype).requires_grad_(False)
        config = {"network_dim": 4, "network_alpha": 3, "learning_rate": 1e-3, "mixed_precision": precision, "seed": 4}
        self.network = lycore.Network(config | options)
        self.network.attach(self.model)
        self.network.build(device)
        start = 0.05 * torch.randn(self.network.parameters.shape, generator=torch.Generator().manual_seed(7))
        self.network.parameters.add_(start.to(device))
        self.network.refresh()
        self.x = torch.randn(4, 3, 6, 6).to(device, dtype).requires_grad_()
        self.goal = torch.randn(4, 48, 128).to(device, dtype)

    def loss(self) -> torch.Tensor:
        loss = functional.mse_loss(self.model(self.x).float(), self.goal.float())
        loss.backward()
        return loss.detach()

    def step(self) -> torch.Tensor:
        loss = self.loss()
        self.network.step(wait=False)
        return loss


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_gradients_are_those_of_the_cpu(options, precision):
    """Of the parameters and of the input: sums in another order in fp32, roundings to 8 bits on the way in bf16."""
    gpu, cpu = Trained(options, "cuda", precision), Trained(options, "cpu", precision)
    # Start values that are computed (T-LoRA's) may come in another order or sign.
    gpu.network.parameters.copy_(cpu.network.parameters)
    gpu.network.refresh()
    gpu.loss(), cpu.loss()
    pairs = [(gpu.network.gradients, cpu.network.gradients), (gpu.x.grad, cpu.x.grad)]
    for got, want in pairs:
        got, want = got.cpu().double(), want.double()
        assert want.norm() > 0
        assert ((got - want).norm() / want.norm()).item() < (2e-5 if precision == "no" else 2e-2)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_algorithm_is_the_same_in_a_graph(options):
    eager, captured = Trained(options, "cuda", "bf16"), Trained(options, "cuda", "bf16")
    step = captured.network.capture(captured.step)
    for _ in range(10):
        want = eager.step()
        assert torch.equal(step(), want)
    assert torch.equal(captured.network.parameters, eager.network.parameters)
