"""What starts from the layer's own weight (DoRA, OFT, BOFT, T-LoRA), and LoRAs that train a part of themselves: beside
LyCORIS, peft and torch. The loss curves of those that LyCORIS computes like us are in test_algorithms.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import lycore

from .nets import LAYERS, RANK, Factors, attached, batch, explicit, fill, key_of, loss_of, net, off
from .test_algorithms import ALPHA, LOSS_TOLERANCE, RATE, STEPS, Case, follow, put_on

modules = pytest.importorskip("lycoris.modules.tlora", reason="needs LyCORIS, the reference")
peft = pytest.importorskip("peft", reason="needs peft, the reference")

POINTS = [layer for layer in LAYERS if layer not in ("stem", "body.down")]
"""The layers without a kernel."""
NO_KERNELS = {"name_algo_map": {layer: {"algo": "none"} for layer in LAYERS if layer not in POINTS}}
PLAIN = {"learning_rate": RATE, "max_grad_norm": 0, "optimizer_args": {"weight_decay": 0}}
ON_WEIGHTS = {
    "dora": {"algo": "lora", "dora_wd": True},
    "dora of inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "diag-oft": {"algo": "diag-oft", "rescaled": True},
    "boft": {"algo": "boft", "network_dim": 10, "rescaled": True},
    "tlora": {"algo": "tlora"} | NO_KERNELS,
}
on_weights = pytest.mark.parametrize("options", ON_WEIGHTS.values(), ids=ON_WEIGHTS.keys())


@on_weights
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_module_changes_nothing(options, dtype):
    """Not a bit, in 16 bits too, where LyCORIS's DoRA shrinks every weight by half a percent."""
    model = net().to(dtype)
    x = batch(0)[0].to(dtype)
    want = model(x)
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    network = attached(model, options | {"mixed_precision": precision})
    assert network.names and torch.equal(model(x), want)


@on_weights
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_small_change_keeps_its_digits_in_bf16(options, kind, tmp_path):
    """A change of some thousandths, on a bf16 weight. Of bf16(W + dW) - W, LyCORIS's way, half would be lost."""
    torch.manual_seed(4)
    layer = nn.Linear(64, 80) if kind == "linear" else nn.Conv2d(8, 80, 1 if options["algo"] == "tlora" else 3)
    layer = layer.requires_grad_(False).bfloat16().float()
    x = torch.randn(2, *layer.weight.shape[1:2], *[9] * (layer.weight.ndim - 2)).bfloat16().float()
    base, changes = layer(x).double(), []
    for precision in ("no", "bf16"):
        network = lycore.Network(options | {"network_dim": 10, "mixed_precision": precision})
        network.add("layer", layer)
        network.build()
        network.save(tmp_path / "start.safetensors")
        saved = load_file(tmp_path / "start.safetensors")
        generator = torch.Generator().manual_seed(5)
        for name, value in saved.items():
            if not name.endswith("alpha"):
                saved[name] = value + 3e-4 * torch.randn(value.shape, generator=generator)
        save_file(saved, tmp_path / "moved.safetensors")
        network.load_weights(tmp_path / "moved.safetensors")
        # The output stays in fp32.
        changes.append(layer(x).double() - base)
        network.detach()
    size, apart = ((a.norm() / b.norm()).item() for a, b in ((changes[0], base), (changes[1] - changes[0], changes[0])))
    print(f"a change of {size:.1e}, in bf16 {apart:.1e} off")
    # Inputs and factors have 8 bits, so has the sum: 2^-9 each, mostly less.
    assert 1e-4 < size < 1e-2 and apart < 0.01


def lycoris_tlora(sig_type: str) -> Case:
    return Case("T-LoRA", "tlora", "tlora.TLoraModule", {"sig_type": sig_type}, layers=POINTS, only=NO_KERNELS)


@pytest.mark.parametrize("masked", [False, True], ids=["all ranks", "ranks by timestep"])
@pytest.mark.parametrize("sig_type", ["principal", "last", "middle"])
def test_tlora_follows_lycoris(sig_type, masked, tmp_path):
    case = lycoris_tlora(sig_type)
    model = net()
    reference = copy.deepcopy(model)
    network = attached(model, PLAIN | {"algo": "tlora"} | case.options | case.only)
    network.save(tmp_path / "start.safetensors")
    saved = load_file(tmp_path / "start.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, value in saved.items():
        if not name.endswith("alpha"):
            saved[name] = value + 0.05 * torch.randn(value.shape, generator=generator)
    save_file(saved, tmp_path / "moved.safetensors")
    assert network.load_weights(tmp_path / "moved.safetensors") == len(POINTS)
    theirs = put_on(reference, case, saved)
    if not masked:
        print(f"worst: loss {follow(network, model, reference, list(theirs.values())):.1e}")
        return
    optimizer = torch.optim.AdamW(theirs.values(), lr=RATE, weight_decay=0)
    ranks = set()
    try:
        for step in range(STEPS):
            mask = modules.compute_timestep_mask(step * 37 % 1000, 1000, RANK, alpha=0.8)
            ranks.add(int(mask.sum()))
            modules.set_timestep_mask(mask)
            network.set_ranks(mask.mean().item())
            want, got = loss_of(reference, step), loss_of(model, step)
            want.backward()
            got.backward()
            optimizer.step()
            optimizer.zero_grad()
            network.step()
            assert abs(got.item() / want.item() - 1) <= LOSS_TOLERANCE, f"step {step}: {got} instead of {want}"
    finally:
        modules.clear_timestep_mask()
    assert ranks == {1, 2, 3, 4}


def test_tlora_starts_from_the_singular_vectors_of_the_weight(tmp_path):
    for sig_type, first in (("principal", 0), ("last", 6), ("middle", 3)):
        layer = nn.Linear(10, 14).requires_grad_(False)
        network = lycore.Network({"algo": "tlora", "network_dim": 4, "sig_type": sig_type})
        network.add("layer", layer)
        network.build()
        network.save(tmp_path / "start.safetensors")
        saved = load_file(tmp_path / "start.safetensors")
        p, q, values = (
            saved[f"lora_unet_layer.{name}"] for name in ("p_layer.weight", "q_layer.weight", "lambda_layer")
        )
        u, s, v = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        part = slice(first, first + 4)
        assert off(values[0], s[part]) < 1e-6
        assert off((p * values) @ q, (u[:, part] * s[part]) @ v[part]) < 1e-6


def test_what_a_size_or_kernel_rules_out_is_said():
    with pytest.raises(lycore.ArgumentError, match="kernel") as refused:
        attached(net(), {"algo": "tlora"})
    assert "name_algo_map" in str(refused.value)
    with pytest.raises(lycore.ArgumentError, match="12 outputs") as refused:
        attached(net(), {"algo": "boft", "network_dim": 4})
    assert "network_dim to 6" in str(refused.value)


def test_a_share_of_ranks_beyond_one_is_refused():
    network = attached(net(), {"algo": "tlora"} | NO_KERNELS)
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(lycore.ArgumentError, match="share"):
            network.set_ranks(share)


def test_dora_computes_as_peft_does(tmp_path):
    """Outputs, and the gradients of the lengths; those of the factors differ, since peft takes |V| for a constant."""
    model = net()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, use_dora=True)
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    network = attached(model, PLAIN | {"dora_wd": True})
    network.save(tmp_path / "start.safetensors")
    saved = load_file(tmp_path / "start.safetensors")
    generator = torch.Generator().manual_seed(3)
    lengths = {}
    for layer in LAYERS:
        module = reference.base_model.model.get_submodule(layer)
        name = f"lora_unet_{layer.replace('.', '_')}.dora_scale"
        magnitude = module.lora_magnitude_vector["default"].weight
        # What training begins with is the same.
        assert off(saved[name].flatten(), magnitude.detach().flatten()) < 1e-6
        parameters = {
            key_of(layer, "down"): module.lora_A["default"].weight,
            key_of(layer, "up"): module.lora_B["default"].weight,
            name: magnitude,
        }
        with torch.no_grad():
            for key, parameter in parameters.items():
                saved[key] += 0.1 * torch.randn(saved[key].shape, generator=generator)
                parameter.copy_(saved[key].reshape(parameter.shape))
        lengths[name] = magnitude
    save_file(saved, tmp_path / "moved.safetensors")
    assert network.load_weights(tmp_path / "moved.safetensors") == len(LAYERS)
    assert off(model(batch(0)[0]), reference(batch(0)[0])) < 1e-5
    factors = Factors(network, tmp_path)
    factors.places = {k: v.long() for k, v in load_file(tmp_path / "indices.safetensors").items() if k in lengths}
    loss_of(model, 0).backward()
    loss_of(reference, 0).backward()
    for name, gradient in factors.gradients().items():
        assert off(gradient.flatten(), lengths[name].grad.flatten()) < 1e-5, name


def test_lora_fa_is_lora_with_down_as_it_starts(tmp_path):
    case = Case("LoRA / LoCon", "lora-fa", "locon.LoConModule")
    model = net()
    reference = copy.deepcopy(model)
    network = case.network(model)
    network.save(tmp_path / "start.safetensors")
    start = load_file(tmp_path / "start.safetensors")
    theirs = put_on(reference, case, start)
    ups = [parameter for name, parameter in theirs.items() if name.endswith("lora_up.weight")]
    assert network.parameter_count == sum(up.numel() for up in ups)
    print(f"worst: loss {follow(network, model, reference, ups):.1e}")
    network.save(tmp_path / "end.safetensors")
    end = load_file(tmp_path / "end.safetensors")
    kept = {name for name in end if torch.equal(start[name], end[name])}
    assert kept == {name for name in end if not name.endswith("lora_up.weight")}
    # Files of plain LoRAs and back.
    assert attached(net(), {"algo": "lora-fa"}).load_weights(tmp_path / "end.safetensors") == len(LAYERS)


class One(nn.Module):
    """A layer, so that one module draws."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("nested", [False, True], ids=["the block", "all up to it"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 5), lambda: nn.Conv2d(3, 5, 3)], ids=["linear", "conv"])
def test_dylora_trains_the_prefix_that_it_draws(make, nested, tmp_path):
    """Beside torch, told by the output which prefix it was: alpha / b times the first b ranks, as its file is read."""
    torch.manual_seed(1)
    plain = make().requires_grad_(False)
    layer, shape = copy.deepcopy(plain), (6, 7) if isinstance(plain, nn.Linear) else (6, 3, 5, 4)
    options = {"algo": "dylora", "network_dim": 6, "block_size": 2, "nested": nested}
    network = lycore.Network(PLAIN | options | {"network_alpha": 3})
    network.add("layer", layer)
    network.build()
    fill(network, 0.3)
    down, up = (Factors(network, tmp_path).values()[key_of("layer", name)] for name in ("down", "up"))
    down, up = (factor.clone().requires_grad_() for factor in (down, up))
    optimizer = torch.optim.AdamW([down, up], lr=RATE, weight_decay=0)
    generator = torch.Generator().manual_seed(2)
    drawn = []
    for step in range(STEPS):
        x = torch.randn(shape, generator=generator)
        got = layer(x)
        outputs = {b: explicit(plain, x, down[:b], up[:, :b], 3 / b).float() for b in (2, 4, 6)}
        b = min(outputs, key=lambda b: off(got.detach(), outputs[b].detach()))
        drawn.append(b)
        first = 0 if nested else b - 2
        parts = [(down[:first].detach(), down[first:b]), (up[:, :first].detach(), up[:, first:b])]
        want = explicit(plain, x, torch.cat(parts[0]), torch.cat(parts[1], 1), 3 / b).float()
        assert off(got.detach(), want.detach()) < 1e-5, f"step {step}"
        goal = torch.randn(got.shape, generator=generator)
        functional.mse_loss(got, goal).backward()
        functional.mse_loss(want, goal).backward()
        network.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert min(drawn.count(b) for b in (2, 4, 6)) > STEPS / 6
    network.save(tmp_path / "adapter.safetensors")
    saved = load_file(tmp_path / "adapter.safetensors")
    for name, want in (("down", down), ("up", up)):
        assert off(saved[key_of("layer", name)], want.detach()) < 1e-4
    # Whatever the prefix, the file cut there is what was trained; outside of training there are all ranks.
    x = torch.randn(shape, generator=generator)
    network.evaluate(True)
    whole = layer(x).detach()
    network.detach()
    for b in (2, 4, 6):
        with lycore.open(tmp_path / "adapter.safetensors") as adapter, adapter.prefix(b) as cut:
            cut.save(tmp_path / "cut.safetensors")
        with lycore.Stack(One(layer)) as stack:
            stack.add(tmp_path / "cut.safetensors")
            stack.apply()
            assert off(layer(x), explicit(plain, x, down[:b], up[:, :b], 3 / b).detach()) < 1e-4
            if b == 6:
                assert off(layer(x), whole) < 1e-5


@pytest.mark.parametrize(
    ("algo", "trained", "algorithm"),
    [
        ("lora", {"dora_wd": True}, "DoRA"),
        ("loha", {"dora_wd": True}, "DoRA (LoHa)"),
        ("tlora", {}, "T-LoRA"),
        ("lora", {}, "LoRA"),
    ],
)
def test_a_run_takes_its_algorithm_from_a_file(algo, trained, algorithm, tmp_path):
    model = net()
    network = attached(model, {"algo": algo, "network_dim": 3, "network_alpha": 1.5} | trained | NO_KERNELS)
    for step in range(3):
        loss_of(model, step).backward()
        network.step()
    want = model(batch(0)[0])
    network.save(tmp_path / "weights.safetensors")
    network.detach()
    # LoRA-FA and DyLoRA write plain LoRAs, and stay what they are.
    algo = "lora-fa" if algorithm == "LoRA" else "lora"
    config = {"network_weights": str(tmp_path / "weights.safetensors"), "dim_from_weights": True, "algo": algo}
    other = attached(model, config)
    assert torch.equal(model(batch(0)[0]), want) and len(other.names) == len(POINTS)
    assert (other.parameter_count < network.parameter_count) == (algo == "lora-fa")
    other.save(tmp_path / "again.safetensors")
    with lycore.open(tmp_path / "again.safetensors") as adapter:
        assert {m.algorithm for m in adapter.modules} & {algorithm}
