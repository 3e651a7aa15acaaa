"""Training on a GPU: the same numbers as elsewhere, in a host that uses TF32 too."""

from __future__ import annotations

import torch
from hosts import ONLY_GPU

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
