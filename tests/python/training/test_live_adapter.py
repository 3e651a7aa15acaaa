"""The adapter taken out of a run that goes on is the one that a file of that step holds."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lycore

from .nets import LAYERS, attached, batch, loss_of, net


def run(config: dict) -> tuple[nn.Module, lycore.Network]:
    """A model and the network on it."""
    model = net()
    return model, attached(model, {"learning_rate": 1e-2, "conv_dim": 6} | config)


def train(model: nn.Module, network: lycore.Network, steps: range) -> None:
    for number in steps:
        loss_of(model, number).backward()
        network.step()


def merged(weights: dict[str, torch.Tensor], adapter: object, strength: float) -> dict[str, torch.Tensor]:
    """What a stack makes of the weights."""
    weights = {name: weight.clone() for name, weight in weights.items()}
    stack = lycore.Stack(weights)
    stack.add(adapter, strength)
    assert stack.apply().changed == len(LAYERS)
    return weights


@pytest.mark.parametrize("precision", ["float", "fp16"])
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamWScheduleFree"])
def test_a_snapshot_merges_as_the_file_saved_at_its_step(tmp_path, optimizer, precision):
    model, network = run({"optimizer_type": optimizer, "save_precision": precision})
    train(model, network, range(5))
    loss_of(model, 5).backward()
    snapshot = network.adapter()
    network.save(tmp_path / "then.safetensors")
    network.step()
    # Training goes on, with the modules on the layers, and the snapshot stays.
    train(model, network, range(6, 9))
    network.save(tmp_path / "later.safetensors")
    saved = load_file(tmp_path / "then.safetensors")
    taken = {f"{m.name}.{t.name}": t.torch() for m in snapshot.modules for t in m.tensors.values()}
    assert taken.keys() == saved.keys() and all(torch.equal(taken[key], saved[key]) for key in saved)
    for dtype in (torch.float32, torch.bfloat16):
        weights = {f"{name}.weight": model.get_submodule(name).weight.to(dtype) for name in LAYERS}
        for strength in (0.75, -1.0):
            live, then, later = (
                merged(weights, adapter, strength)
                for adapter in (snapshot, tmp_path / "then.safetensors", tmp_path / "later.safetensors")
            )
            assert all(torch.equal(live[name], then[name]) for name in live)
            assert not any(torch.equal(live[name], later[name]) for name in live)
    report = snapshot.report()
    assert report["summary"]["readable"] == report["summary"]["keys"] == len(saved)
    assert report["facts"]["training"]["steps"] == 5
    # It is what the file is, also beside the weights and after the network is gone.
    network.close()
    x = torch.randn(3, 16)
    weights = {"mlp.0.weight": model.mlp[0].weight.clone()}
    beside = []
    for adapter in (snapshot, tmp_path / "then.safetensors"):
        stack = lycore.Stack(weights)
        stack.add(adapter, 0.5)
        beside.append(stack.forward("mlp.0.weight", x, torch.zeros(3, 32)))
    assert torch.equal(*beside) and beside[0].abs().max() > 0


def test_snapshots_do_not_touch_the_training():
    with pytest.raises(lycore.TrainError, match="not built"):
        lycore.Network().adapter()
    model, network = run({})
    fresh = {t.name: t.torch() for t in network.adapter().modules[0].tensors.values()}
    assert fresh["lora_up.weight"].abs().max() == 0 < fresh["lora_down.weight"].abs().max()
    for number in range(6):
        loss_of(model, number).backward()
        network.adapter()
        network.step()
        with torch.no_grad():
            before = model(batch(500)[0])
            with lycore.Stack({f"{n}.weight": model.get_submodule(n).weight.clone() for n in LAYERS}) as stack:
                stack.add(network.adapter())
                stack.apply()
            assert torch.equal(model(batch(500)[0]), before)
    other, plain = run({})
    train(other, plain, range(6))
    assert torch.equal(network.parameters, plain.parameters)
