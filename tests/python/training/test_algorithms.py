"""Every algorithm beside LyCORIS, peft and torch: the same losses at every step, and files that mean the same."""

from __future__ import annotations

import copy
import importlib
import os
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lycore

from .nets import LAYERS, RANK, Net, attached, batch, loss_of, net, off

# Read when it is imported: its fused kernels are not what is compared here.
os.environ["LYCORIS_KERNEL_BACKEND"] = "torch"
lycoris = pytest.importorskip("lycoris", reason="needs LyCORIS, the reference")
peft = pytest.importorskip("peft", reason="needs peft, the reference")

STEPS = 100
RATE = 3e-3
ALPHA = 3.0
"""`attached` has it as network_alpha."""
LOSS_TOLERANCE = 5e-6
"""Relative, at every step, of fp32 sums in another order: some units of 6e-8."""
PARAMETER_TOLERANCE = 1e-4
"""Of a tensor's largest value, after the last step: AdamW divides by the gradient's own size, so the rounding of a
gradient near 0 becomes a whole fraction of a learning rate."""
FORWARD_TOLERANCE = 1e-5
"""Relative to the output's largest value: fp32 merged into the weights beside fp32 next to them."""


class NormNet(Net):
    """The same with a norm of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.stem, nn.GroupNorm(3, 12))
        self.mlp = nn.Sequential(nn.LayerNorm(16), *self.mlp[:2], nn.RMSNorm(32), self.mlp[2])


def norm_net() -> NormNet:
    torch.manual_seed(0)
    model = NormNet().requires_grad_(False)
    for parameter in model.parameters():
        # As trained: fresh norms have weights of 1 and biases of 0.
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@dataclass
class Case:
    """An algorithm in lycore's words and in LyCORIS's."""

    algorithm: str
    """As reports name it."""
    algo: str
    reference: str
    """Its class in `lycoris.modules`."""
    options: dict = field(default_factory=dict)
    """The same for both."""
    model: object = net
    layers: list = field(default_factory=lambda: LAYERS)
    only: dict = field(default_factory=dict)
    """Leaves out what LyCORIS does not know."""
    loads: bool = True
    """Whether `create_lycoris_from_weights` reads its own files of this kind."""

    def network(self, model: nn.Module, prefix: str = "", **config) -> lycore.Network:
        optimizer = {"learning_rate": RATE, "max_grad_norm": 0, "optimizer_args": {"weight_decay": 0}}
        network = attached(model, optimizer | {"algo": self.algo} | self.options | config, prefix=prefix)
        generator = torch.Generator().manual_seed(77)
        # Factors that start at zero hide most faults.
        network.parameters.add_(0.05 * torch.randn(network.parameters.shape, generator=generator))
        network.refresh()
        return network


def lokr(loads: bool = True, **options) -> Case:
    return Case("LoKr", "lokr", "lokr.LokrModule", options, loads=loads)


def oft(**options) -> Case:
    return Case("OFT", "diag-oft", "diag_oft.DiagOFTModule", options)


def boft(**options) -> Case:
    return Case("BOFT", "boft", "boft.ButterflyOFTModule", {"network_dim": 10} | options)


def dora(inner: Case, loads: bool = True, **options) -> Case:
    """`loads`: LyCORIS reads no lengths of inputs."""
    names = " / ".join(f"DoRA ({name})" if name != "LoRA" else "DoRA" for name in inner.algorithm.split(" / "))
    return replace(inner, algorithm=names, options=inner.options | {"dora_wd": True} | options, loads=loads)


CASES = {
    "locon": Case("LoRA / LoCon", "locon", "locon.LoConModule"),
    "locon with a core": Case("LoRA / LoCon", "locon", "locon.LoConModule", {"use_tucker": True}),
    "loha": Case("LoHa", "loha", "loha.LohaModule"),
    "loha of rank 1": Case("LoHa", "loha", "loha.LohaModule", {"network_dim": 1}),
    "loha with cores": Case("LoHa", "loha", "loha.LohaModule", {"use_tucker": True}),
    "lokr": lokr(),
    "lokr of rank 1": lokr(network_dim=1),
    "lokr, unbalanced": lokr(factor=2, unbalanced_factorization=True, loads=False),
    "lokr, whole": lokr(full_matrix=True),
    "lokr, both decomposed": lokr(network_dim=1, decompose_both=True),
    "lokr with a core": lokr(network_dim=2, factor=2, use_tucker=True, loads=False),
    "glora": Case("GLoRA", "glora", "glora.GLoRAModule"),
    "ia3": Case("(IA)^3", "ia3", "ia3.IA3Module", loads=False),
    "ia3 on inputs": Case("(IA)^3", "ia3", "ia3.IA3Module", {"train_on_input": True}, loads=False),
    "diag-oft": oft(),
    "diag-oft, bounded and rescaled": oft(constraint=0.01, rescaled=True),
    "boft": boft(),
    "boft, bounded and rescaled": boft(constraint=0.01, rescaled=True),
    "full": Case("full", "full", "full.FullModule"),
    "norm": Case(
        "norm",
        "norm",
        "norms.NormModule",
        model=norm_net,
        layers=["stem.1", "mlp.0"],
        only={"name_algo_map": {"mlp.3": {"algo": "none"}}},
        loads=False,
    ),
}
CASES |= {
    "dora": dora(CASES["locon"]),
    "dora of inputs": dora(CASES["locon"], loads=False, wd_on_output=False),
    "dora with a core": dora(CASES["locon with a core"]),
    "dora around loha": dora(CASES["loha"]),
    "dora of inputs around loha": dora(CASES["loha"], loads=False, wd_on_output=False),
    "dora around lokr": dora(CASES["lokr"]),
    "dora of inputs around lokr": dora(CASES["lokr"], loads=False, wd_on_output=False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def made(case: Case, layer: nn.Module) -> nn.Module:
    """LyCORIS's module for a layer."""
    file, name = case.reference.split(".")
    options = {"lora_dim": RANK, "alpha": ALPHA} | case.options
    theirs = {"network_dim": "lora_dim", "dora_wd": "weight_decompose", "wd_on_output": "wd_on_out"}
    options |= {theirs[name]: options.pop(name) for name in theirs.keys() & options.keys()}
    if case.algo == "norm":
        options = {}
    return getattr(importlib.import_module(f"lycoris.modules.{file}"), name)("module", layer, 1.0, **options)


def put_on(model: nn.Module, case: Case, saved: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """LyCORIS modules with the values of a file on a model; gives their parameters by the file's keys."""
    found = {}
    for layer in case.layers:
        prefix = f"lora_unet_{layer.replace('.', '_')}."
        values = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        module = made(case, model.get_submodule(layer))
        module.apply_to()
        module.train()
        # What it trains is the weight itself.
        names = {"weight": "diff", "bias": "diff_b"} if case.algo == "full" else {}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(True)
            slot = names.get(name, name)
            with torch.no_grad():
                start = values.pop(slot)
                parameter.copy_(parameter + start if names else start)
            found[prefix + slot] = parameter
        assert values.keys() <= {"alpha", "on_input"}, values.keys()
    return found


def follow(network: lycore.Network, model: nn.Module, reference: nn.Module, trained: list[nn.Parameter]) -> float:
    """Trains both and compares every loss; gives the worst relative difference."""
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0)
    losses, worst = [], 0.0
    for step in range(STEPS):
        want, got = loss_of(reference, step), loss_of(model, step)
        want.backward()
        got.backward()
        optimizer.step()
        optimizer.zero_grad()
        network.step()
        relative = abs(got.item() / want.item() - 1)
        assert relative <= LOSS_TOLERANCE, f"step {step}: {got.item()} instead of {want.item()}"
        losses.append(got.item())
        worst = max(worst, relative)
    ends = [sum(part) for part in (losses[:10], losses[-10:])]
    assert ends[1] < 0.97 * ends[0], f"nothing was learned: {ends}"
    return worst


@cases
def test_losses_and_parameters_follow_lycoris(case, tmp_path):
    model = case.model()
    reference = copy.deepcopy(model)
    network = case.network(model, **case.only)
    network.save(tmp_path / "start.safetensors")
    start = load_file(tmp_path / "start.safetensors")
    bases = {key: value.clone() for key, value in reference.state_dict().items()}
    theirs = put_on(reference, case, start)
    worst = follow(network, model, reference, list(theirs.values()))

    network.save(tmp_path / "end.safetensors")
    end, apart = load_file(tmp_path / "end.safetensors"), {}
    assert theirs.keys() == {key for key in end if not key.endswith((".alpha", ".on_input"))}
    for key, value in theirs.items():
        value = value.detach()
        if case.algo == "full":
            layer = next(n for n in LAYERS if key.startswith(f"lora_unet_{n.replace('.', '_')}."))
            value = value - bases[f"{layer}.{'bias' if key.endswith('_b') else 'weight'}"]
        apart[key] = off(end[key], value)
    print(f"worst: loss {worst:.1e}, parameters {max(apart.values()):.1e}")
    assert max(apart.values()) <= PARAMETER_TOLERANCE, apart


@cases
def test_start_values_are_distributed_as_in_lycoris(case, tmp_path):
    layers = [nn.Linear(192, 256), nn.Conv2d(64, 80, 3), nn.GroupNorm(8, 64)]
    layers = [layer for layer in layers if isinstance(layer, nn.GroupNorm) == (case.algo == "norm")]
    network = attached(nn.Sequential(*layers), {"algo": case.algo} | case.options)
    network.save(tmp_path / "start.safetensors")
    saved = load_file(tmp_path / "start.safetensors")
    torch.manual_seed(5)
    for number, layer in enumerate(layers):
        for name, want in made(case, layer).named_parameters():
            name = {"weight": "diff", "bias": "diff_b"}.get(name, name) if case.algo == "full" else name
            got = saved[f"lora_unet_{number}.{name}"]
            assert got.shape == want.shape, name
            spread, theirs = (tensor.detach().std(correction=0).item() for tensor in (got, want))
            # Five standard errors of a normal deviation; a uniform one's is smaller.
            assert abs(spread - theirs) <= 5 * theirs / want.numel() ** 0.5, name
            # The largest of so many normal values is above 2 deviations, of uniform ones at sqrt(3).
            uniform, theirs = (tensor.abs().max() <= 1.9 * tensor.std() for tensor in (got, want.detach()))
            assert uniform == theirs or want.numel() < 256, name


def test_norms_and_differences_follow_torch():
    """All weights trained by torch itself, an RMSNorm among them."""
    case = Case("", "full", "", {"train_norm": True}, norm_net)
    model = case.model()
    reference = copy.deepcopy(model).requires_grad_(True)
    network = case.network(model)
    network.parameters.zero_()
    worst = follow(network, model, reference, list(reference.parameters()))
    assert network.parameter_count == sum(p.numel() for p in reference.parameters())
    print(f"worst: loss {worst:.1e}")


@cases
def test_files_mean_what_was_trained(case, tmp_path):
    model = case.model()
    with torch.no_grad():
        base = model(batch(500)[0])
        network = case.network(model, prefix="lycoris_")
        tuned = model(batch(500)[0])
        path = tmp_path / "adapter.safetensors"
        network.save(path)
        network.detach()
        assert torch.equal(model(batch(500)[0]), base) and off(tuned, base) > 1e-2
        with lycore.open(path) as adapter:
            algorithms = {m.algorithm for m in adapter.modules}
            assert len(adapter.modules) == len(network.names)
        assert algorithms <= set(case.algorithm.split(" / ")), algorithms
        with lycore.Stack(model) as stack:
            stack.add(path)
            assert stack.apply().changed >= len(network.names)
            assert off(model(batch(500)[0]), tuned) <= FORWARD_TOLERANCE
        # The same values, bit for bit, in a network of another seed.
        other = case.network(model, prefix="lycoris_", seed=9)
        assert other.load_weights(path) == len(network.names)
        assert torch.equal(model(batch(500)[0]), tuned)
        other.detach()
        if case.loads:
            wrapper, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
            assert len(wrapper.loras) == len(network.names)
            wrapper.apply_to()
            assert off(model(batch(500)[0]), tuned) <= FORWARD_TOLERANCE


def test_an_alpha_without_a_rank_is_no_obstacle(tmp_path):
    """LyCORIS writes the alpha of any network_dim beside two whole halves; it has no meaning there."""
    whole = CASES["lokr, whole"]
    network = whole.network(net(), network_dim=1000, network_alpha=7)
    network.save(tmp_path / "adapter.safetensors")
    assert load_file(tmp_path / "adapter.safetensors")["lora_unet_stem.alpha"] == 1000
    other = whole.network(net())
    assert other.load_weights(tmp_path / "adapter.safetensors") == len(LAYERS)
    assert torch.equal(other.parameters, network.parameters)


PEFT = {
    "loha": ("loha", "hada_", lambda: peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=LAYERS), LAYERS),
    "lokr": ("lokr", "lokr_", lambda: peft.LoKrConfig(r=1, alpha=ALPHA, target_modules=LAYERS), LAYERS),
    # Outputs: of a layer without a bias, which peft scales too.
    "ia3": ("ia3", "ia3_l", lambda: peft.IA3Config(target_modules=["mlp.2"], feedforward_modules=[]), ["mlp.2"]),
    "ia3 on inputs": (
        "ia3",
        "ia3_l",
        lambda: peft.IA3Config(target_modules=["mlp.0", "body.point"], feedforward_modules=["mlp.0", "body.point"]),
        ["mlp.0", "body.point"],
    ),
}


@pytest.mark.parametrize(("algo", "mark", "config", "layers"), PEFT.values(), ids=PEFT.keys())
def test_losses_follow_peft(algo, mark, config, layers, tmp_path):
    model, config = net(), config()
    options = {
        "network_dim": getattr(config, "r", 1),
        "train_on_input": bool(getattr(config, "feedforward_modules", ())),
        "name_algo_map": {name: {"algo": "none"} for name in LAYERS if name not in layers},
    }
    case = Case("", algo, "", options)
    # Before the hooks are there.
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    network = case.network(model)
    network.save(tmp_path / "start.safetensors")
    saved = load_file(tmp_path / "start.safetensors")
    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    assert trained and all(mark in name for name in trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            layer, slot = name.removeprefix("base_model.model.").removesuffix(".default").rsplit(".", 1)
            # peft's is 1 + w.
            key, plus = ("weight", 1) if slot == "ia3_l" else (slot, 0)
            start = saved.pop(f"lora_unet_{layer.replace('.', '_')}.{key}")
            parameter.copy_(start.reshape(parameter.shape) + plus)
    assert all(key.endswith((".alpha", ".on_input")) for key in saved), saved.keys()
    print(f"worst: loss {follow(network, model, reference, list(trained.values())):.1e}")
