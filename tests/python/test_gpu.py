"""On a GPU: the same numbers as everywhere, the host's stream, exact restore. Without one every test says so."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from safetensors.torch import save_file

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


def test_a_bypass_of_a_large_convolution_is_exact(make_lora):
    """Large enough for cuDNN's TF32 kernels, which libtorch uses for convolutions unless it is told not to."""
    lora = make_lora("c", {"lora_unet_big": (320, 320, 3, 3)}, rank=32, alpha=32.0, dtype="float32")
    weight = torch.zeros(320, 320, 3, 3, device="cuda")
    stack = lycore.Stack({"big.weight": weight})
    stack.add(lora.path, 1.0)
    x = torch.randn(2, 320, 48, 48, device="cuda")
    y = torch.zeros(2, 320, 48, 48, device="cuda")
    before = torch.backends.cudnn.conv.fp32_precision
    stack.forward("big.weight", x, y, padding=1)
    assert torch.backends.cudnn.conv.fp32_precision == before
    delta = torch.from_numpy(lora.deltas["lora_unet_big"]).cuda()
    want = torch.nn.functional.conv2d(x.double(), delta, padding=1)
    # fp32 sums of 2880 and 32 products: TF32 would be off by 3e-4.
    assert ((y.double() - want).norm() / want.norm()).item() < 1e-6


LORA = {"lora_up.weight": (24, 4, 1, 1), "lora_down.weight": (4, 8, 3, 3)}
LOHA = {"hada_w1_a": (24, 5), "hada_w1_b": (5, 72), "hada_w2_a": (24, 5), "hada_w2_b": (5, 72)}
LOKR = {"lokr_w1": (4, 2), "lokr_w2": (6, 4, 3, 3)}
# Every algorithm on a weight of [24, 8, 3, 3].
MODULES = {
    "loha": LOHA,
    "loha_tucker": {"hada_w1_a": (5, 24), "hada_w1_b": (5, 8), "hada_w2_a": (5, 24), "hada_w2_b": (5, 8)}
    | {"hada_t1": (5, 5, 3, 3), "hada_t2": (5, 5, 3, 3)},
    "lokr": LOKR,
    "lokr_factors": {"lokr_w1_a": (4, 3), "lokr_w1_b": (3, 2), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 36)},
    "lokr_tucker": {"lokr_w1": (4, 2), "lokr_t2": (3, 3, 3, 3), "lokr_w2_a": (3, 6), "lokr_w2_b": (3, 4)},
    "full": {"diff": (24, 8, 3, 3)},
    "ia3_out": {"weight": (1, 24, 1, 1)},
    "ia3_in": {"weight": (1, 8, 1, 1)},
    "dora": LORA | {"dora_scale": (24, 1, 1, 1)},
    "dora_in": LORA | {"dora_scale": (1, 8, 1, 1)},
    "dora_loha": LOHA | {"dora_scale": (24, 1, 1, 1)},
    "dora_lokr": LOKR | {"dora_scale": (24,)},
    "glora": {"a1.weight": (8, 4, 1, 1), "a2.weight": (4, 8, 1, 1), "b1.weight": (24, 4, 1, 1)}
    | {"b2.weight": (4, 8, 3, 3)},
    "oft": {"oft_blocks": (4, 6, 6), "rescale": (24, 1, 1, 1)},
    "boft": {"oft_blocks": (2, 6, 4, 4), "rescale": (24, 1, 1, 1)},
    "oft_peft": {"oft_R.weight": (12, 15)},
    "boft_peft": {"boft_R": (2, 12, 6, 6), "boft_s": (24, 1)},
    "set": {"set_weight": (24, 8, 3, 3)},
}
READS_WEIGHT = ("ia3", "dora", "glora", "oft", "boft", "set")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
def test_every_algorithm_as_on_the_cpu(tmp_path, kind, dtype):
    """The CPU's numbers are compared with LyCORIS' elsewhere; the sums differ in order only."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    tensors = MODULES[kind]
    file = {f"lora_unet_a.{name}": random(*shape) for name, shape in tensors.items()}
    if "peft" not in kind:
        file["lora_unet_a." + ("on_input" if "ia3" in kind else "alpha")] = torch.tensor(int(kind != "ia3_out"))
    save_file(file, tmp_path / "a.safetensors")
    base = random(24, 8, 3, 3).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        weight = base.clone().to(device)
        generator.manual_seed(10)
        x, y = random(2, 8, 9, 9), random(2, 24, 9, 9)
        with lycore.Stack({"a.weight": weight}) as stack:
            stack.add(tmp_path / "a.safetensors", 0.7)
            x, y = x.to(device), y.to(device)
            stack.forward("a.weight", x, y, padding=1)
            stack.apply()
            results.append((weight.float().cpu().clone(), y.cpu()))
            # As a host does that does its own bookkeeping, with the factors on the device.
            own = base.clone().to(device)
            module = lycore.open(tmp_path / "a.safetensors").modules[0]
            there = {name: tensor.torch().to(device) for name, tensor in module.tensors.items()}
            lycore.weight_merge("a", own, [(0.7, there, None)])
            assert (own - weight).abs().max() <= (1e-5 if dtype == torch.float32 else 2.0**-7)
        assert torch.equal(weight.cpu(), base)
    (cpu, cpu_out), (gpu, gpu_out) = results
    assert ((cpu_out - gpu_out).norm() / cpu_out.norm()).item() < (1e-5 if kind.startswith(READS_WEIGHT) else 1e-6)
    if dtype == torch.float32:
        assert (cpu - gpu).abs().max() <= 1e-6 * (1 + cpu.abs().max())
    else:
        assert (cpu != gpu).float().mean() <= 1e-3


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


def test_calls_on_two_threads_leave_the_hosts_precision_as_it_was(make_lora):
    """One call opens while another one is inside: the second must not take the first one's setting for the host's."""
    stacks = []
    for name in ("one", "two"):
        stacks.append(lycore.Stack(weights_of(torch.float32)))
        stacks[-1].add(make_lora(name, SHAPES).path, 1.0)
    before = torch.backends.cudnn.conv.fp32_precision
    inside, opened = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> bool:
        inside.set()
        # The other call ends last, so that it is the one that could leave its own idea of the setting behind.
        assert opened.wait(10)
        return True

    def wait_for_the_first(done: int, total: int) -> bool:
        opened.set()
        if done == total:
            first.join(10)
        return True

    first = threading.Thread(target=lambda: stacks[0].apply(progress=wait))
    first.start()
    assert inside.wait(10)
    stacks[1].apply(progress=wait_for_the_first)
    first.join()
    assert torch.backends.cudnn.conv.fp32_precision == before
