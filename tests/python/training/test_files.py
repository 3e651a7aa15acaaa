"""What training writes is an ordinary kohya adapter: here, in LyCORIS and in peft it computes what was trained."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lycore

from .nets import LAYERS, RANK, attached, batch, key_of, loss_of, net, off

CONFIG = {"learning_rate": 1e-2, "conv_dim": 6, "conv_alpha": 5, "output_name": "trained", "training_comment": "ä"}
TOLERANCE = 1e-5
"""Relative to the output's largest value: fp32 merged into the weights beside fp32 next to them."""


class Trained:
    """A model after some steps, and what it computed then."""

    def __init__(self, prefix: str = "") -> None:
        self.model = net()
        self.base = self.output()
        self.network = attached(self.model, CONFIG, prefix=prefix)
        for number in range(15):
            loss_of(self.model, number).backward()
            self.network.step()
        self.tuned = self.output()
        assert off(self.tuned, self.base) > 0.1

    def output(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(batch(500)[0])

    def save(self, path: Path, *arguments, **named) -> Path:
        self.network.save(path, *arguments, **named)
        return path


@pytest.fixture
def trained():
    return Trained()


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and data section of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_the_saved_adapter_merges_to_the_trained_forward(trained, tmp_path):
    path = trained.save(tmp_path / "adapter.safetensors")
    trained.network.detach()
    assert torch.equal(trained.output(), trained.base)
    with lycore.open(path) as adapter:
        modules = {m.name: (m.algorithm, m.rank, m.alpha) for m in adapter.modules}
        report = adapter.report()
    large, small = ("LoCon", 6, 5.0), ("LoRA", RANK, 3.0)
    expected = {"stem": large, "body.down": large, "mlp.0": small, "mlp.2": small}
    for layer, what in expected.items():
        assert modules[f"lora_unet_{layer.replace('.', '_')}"] == what
    assert modules["lora_unet_body_point"][1:] == (RANK, 3.0)
    assert report["summary"]["modules"] == len(LAYERS) and report["summary"]["keys"] == 3 * len(LAYERS)
    with lycore.Stack(trained.model) as stack:
        stack.add(path)
        assert stack.apply().changed == len(LAYERS)
        assert off(trained.output(), trained.tuned) <= TOLERANCE
    assert torch.equal(trained.output(), trained.base)


def test_a_saved_adapter_is_taken_up_bit_for_bit(trained, tmp_path):
    path = trained.save(tmp_path / "adapter.safetensors")
    values = trained.network.parameters.clone()
    trained.network.detach()
    other = attached(trained.model, CONFIG | {"seed": 9})
    assert other.load_weights(path) == len(LAYERS)
    assert torch.equal(other.parameters, values)
    assert torch.equal(trained.output(), trained.tuned)


def test_metadata_and_hash(trained, tmp_path):
    added = {"ss_base_model_version": "sdxl_base_v1-0", "own": "ö"}
    path = trained.save(tmp_path / "adapter.safetensors", metadata=added)
    header, data = parts(path)
    metadata = header["__metadata__"]
    assert all(isinstance(value, str) for value in metadata.values())
    expected = added | {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": "3",
        "ss_steps": "15",
        "ss_epoch": "0",
        "ss_v2": "False",
        "ss_training_started_at": "1700000000",
        "ss_training_finished_at": "1700000000",
        "ss_learning_rate": "0.01",
        "ss_lr_scheduler": "constant",
        "ss_output_name": "trained",
        "ss_training_comment": "ä",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "6", "conv_alpha": "5"}
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    # The same parameters are the same file; other ones have another hash.
    again = trained.save(tmp_path / "again.safetensors", metadata=added)
    assert again.read_bytes() == path.read_bytes()
    loss_of(trained.model, 20).backward()
    trained.network.step()
    changed = parts(trained.save(tmp_path / "again.safetensors"))[0]["__metadata__"]
    assert changed["ss_steps"] == "16" and changed["sshs_model_hash"] != metadata["sshs_model_hash"]


@pytest.mark.parametrize(
    ("name", "dtype", "rounding"), [("fp16", torch.float16, 2**-11), ("bf16", torch.bfloat16, 2**-8)]
)
def test_half_precision_files_are_the_rounded_values(trained, tmp_path, name, dtype, rounding):
    exact = load_file(trained.save(tmp_path / "fp32.safetensors"))
    path = trained.save(tmp_path / "half.safetensors", name)
    saved = load_file(path)
    assert saved.keys() == exact.keys()
    for key, value in saved.items():
        if key.endswith(".alpha"):
            assert value.dtype == torch.float32 and torch.equal(value, exact[key])
        else:
            assert value.dtype == dtype and torch.equal(value, exact[key].to(dtype)), key
    header, data = parts(path)
    assert header["__metadata__"]["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    trained.network.detach()
    with lycore.Stack(trained.model) as stack:
        stack.add(path)
        stack.apply()
        # Each factor is off by half a unit at most; what it does to the output depends on the layers after it.
        assert 0 < off(trained.output(), trained.tuned) <= 8 * rounding


def test_lycoris_computes_the_same(tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="needs LyCORIS, the reference")
    trained = Trained(prefix="lycoris_")
    path = trained.save(tmp_path / "adapter.safetensors")
    trained.network.detach()
    wrapper, _ = lycoris.create_lycoris_from_weights(1.0, str(path), trained.model)
    assert sorted(m.lora_name for m in wrapper.loras) == sorted("lycoris_" + n.replace(".", "_") for n in LAYERS)
    wrapper.apply_to()
    apart = off(trained.output(), trained.tuned)
    print(f"off by {apart:.1e}")
    assert apart <= TOLERANCE
    wrapper.restore()
    assert torch.equal(trained.output(), trained.base)


def test_peft_computes_the_same(trained, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft, the reference")
    saved = load_file(trained.save(tmp_path / "adapter.safetensors"))
    trained.network.detach()
    convolutions = ["stem", "body.down"]
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=3,
        target_modules=LAYERS,
        rank_pattern=dict.fromkeys(convolutions, 6),
        alpha_pattern=dict.fromkeys(convolutions, 5),
    )
    model = peft.get_peft_model(copy.deepcopy(trained.model), config)
    names = {"down": "lora_A", "up": "lora_B"}
    state = {f"base_model.model.{n}.{p}.weight": saved[key_of(n, f)] for n in LAYERS for f, p in names.items()}
    loaded = peft.set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    with torch.no_grad():
        apart = off(model(batch(500)[0]), trained.tuned)
    print(f"off by {apart:.1e}")
    assert apart <= TOLERANCE


def test_values_that_the_dtype_cannot_hold_are_not_written(trained, tmp_path):
    trained.network.parameters[0] = 1e6
    path = trained.save(tmp_path / "adapter.safetensors")
    before = path.read_bytes()
    with pytest.raises(lycore.TrainError, match=r"lora_unet_body_down\.lora_down\.weight"):
        trained.save(path, "fp16")
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["adapter.safetensors"]
    with pytest.raises(lycore.ArgumentError, match="fp8"):
        trained.save(path, "fp8")


def test_weights_that_do_not_fit_are_all_named_and_none_is_taken(trained, tmp_path):
    path = trained.save(tmp_path / "adapter.safetensors")
    other = attached(net(1), {"network_dim": RANK + 1, "network_alpha": 3, "conv_dim": 6, "conv_alpha": 5})
    before = other.parameters.clone()
    with pytest.raises(lycore.FileError) as caught:
        other.load_weights(path)
    for layer in ("mlp.0", "mlp.2", "body.point"):
        for factor in ("down", "up"):
            assert key_of(layer, factor) in caught.value.message
    assert "stem" not in caught.value.message
    assert torch.equal(other.parameters, before)
