"""On a GPU: the same numbers as everywhere, the host's stream, exact restore. Without one every test says so."""

from __future__ import annotations

import random

import pytest
import torch

import lycore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="skipped: no GPU")

SHAPES = {
    "lora_unet_a_to_q": (96, 64),
    "lora_unet_a_proj_in": (48, 32, 1, 1),
    "lora_unet_b_conv": (40, 24, 3, 3),
    "lora_unet_c_conv": (16, 8, 3),
}
NAMES = {
    "a.to_q.weight": "lora_unet_a_to_q",
    "a.proj_in.weight": "lora_unet_a_proj_in",
    "b.conv.weight": "lora_unet_b_conv",
    "c.conv.weight": "lora_unet_c_conv",
}


def weights_of(dtype: torch.dtype, *, strided: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, module in NAMES.items():
        weight = (torch.randn(SHAPES[module], generator=generator) * 0.5).to("cuda", dtype)
        if strided and weight.ndim == 4:
            weight = weight.to(memory_format=torch.channels_last)
        elif strided:
            weight = torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
        weights[name] = weight
    return weights


def expected(base: torch.Tensor, terms: list[tuple[float, object]]) -> torch.Tensor:
    """The formula in fp64."""
    return base.double().cpu() + sum(strength * torch.from_numpy(delta) for strength, delta in terms)


def compare(got: torch.Tensor, want: torch.Tensor, base: torch.Tensor, magnitude: torch.Tensor) -> tuple[int, int]:
    """fp32: 1e-6 of the summed magnitudes (fp32 sums of a few dozen products).

    16 bit: counts elements that are not the correctly rounded result; none may be further than one ulp at the larger of
    base and result, below which cancellation leaves no bits.
    """
    if got.dtype == torch.float32:
        assert ((got.double().cpu() - want).abs() <= 1e-6 * magnitude).all()
        return 0, got.numel()
    # Through fp64 alone: torch rounds a double to 16 bits by way of float, which can round twice.
    spacing = torch.maximum(want.abs(), base.double().cpu().abs()).clamp_min(2.0**-14)
    ulp = torch.exp2(torch.floor(torch.log2(spacing))) * torch.finfo(got.dtype).eps
    distance = (got.double().cpu() - want).abs()
    assert (distance <= 1.0 * ulp).all()
    own = torch.exp2(torch.floor(torch.log2(want.abs().clamp_min(2.0**-14)))) * torch.finfo(got.dtype).eps
    return int((distance > 0.5 * own * (1 + 1e-9)).sum()), got.numel()


@pytest.mark.parametrize("backup", ["device", "host"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_is_the_formula_and_restore_is_exact(make_lora, dtype, strided, backup):
    weights = weights_of(dtype, strided=strided)
    base = {name: weight.clone() for name, weight in weights.items()}
    loras = [make_lora(f"l{r}", SHAPES, rank=r, alpha=3.0, dtype="float32") for r in (1, 7, 16)]
    # Neither a host that allows TF32 nor one inside autocast may change the numbers.
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda", torch.bfloat16), lycore.Stack(weights, backup=backup) as stack:
            handles = [stack.add(lora.path, strength) for lora, strength in zip(loras, (1.0, -0.3, 0.7), strict=True)]
            stack.apply()
            handles[0].strength = 0.25
            stack.apply()
            wrong = total = 0
            for name, module in NAMES.items():
                terms = [(s, lora.deltas[module]) for lora, s in zip(loras, (0.25, -0.3, 0.7), strict=True)]
                magnitude = base[name].double().cpu().abs()
                for lora, s in zip(loras, (0.25, -0.3, 0.7), strict=True):
                    magnitude = magnitude + abs(s) * torch.from_numpy(lora.magnitudes[module])
                differ, count = compare(weights[name], expected(base[name], terms), base[name], magnitude)
                wrong, total = wrong + differ, total + count
            assert wrong <= total * 1e-3, f"{wrong} of {total} elements are not the correctly rounded result"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    for name, weight in weights.items():
        assert torch.equal(weight, base[name]), name


def test_a_thousand_random_steps_end_at_the_base(make_lora):
    weights = weights_of(torch.bfloat16)
    base = {name: weight.clone() for name, weight in weights.items()}
    loras = [make_lora(f"r{r}", SHAPES, rank=r) for r in (2, 4, 8)]
    chance = random.Random(5)
    stack = lycore.Stack(weights)
    handles = [stack.add(lora.path, 0.0) for lora in loras]
    for _ in range(1000):
        if chance.random() < 0.2:
            stack.restore()
        else:
            chance.choice(handles).strength = chance.choice([0.0, chance.uniform(-2, 2)])
            stack.apply()
    stack.restore()
    for name, weight in weights.items():
        assert torch.equal(weight, base[name]), name


def test_work_goes_to_the_hosts_stream(make_lora):
    """A weight that a slow kernel on the host's stream still writes is merged after it, without a synchronisation."""
    lora = make_lora("s", SHAPES)
    weights = weights_of(torch.float32)
    late = {name: weight * 2 for name, weight in weights.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, weight in weights.items():
            weight.copy_(late[name])
        stack = lycore.Stack(weights)
        stack.add(lora.path, 1.0)
        stack.apply()
    stream.synchronize()
    for name, module in NAMES.items():
        want = expected(late[name], [(1.0, lora.deltas[module])])
        assert (weights[name].double().cpu() - want).abs().max() < 1e-5, name
    with torch.cuda.stream(stream):
        stack.restore()
    stream.synchronize()
    assert all(torch.equal(weights[name], late[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bypass_agrees_with_the_merged_forward(make_lora, dtype):
    lora = make_lora("b", SHAPES, rank=5, alpha=2.0, dtype="float32")
    weights = weights_of(torch.float32)
    stack = lycore.Stack(weights)
    stack.add(lora.path, 0.8)
    x = torch.randn(3, 24, 11, 9, device="cuda").to(dtype)
    layer = {"stride": 2, "padding": 1}
    weight = weights["b.conv.weight"]
    y = torch.nn.functional.conv2d(x.float(), weight, **layer).to(dtype)
    stack.forward("b.conv.weight", x, y, **layer)
    stack.apply()
    with torch.backends.cudnn.flags(allow_tf32=False):
        want = torch.nn.functional.conv2d(x.double(), weight.double(), **layer)
    # fp32 sums of 216 products; in bf16 the base output was rounded before the sum was, 2^-8 each.
    bound = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert ((y.double() - want).norm() / want.norm()).item() < bound


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
