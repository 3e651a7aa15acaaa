"""Defects that reviews found, each with the case that shows it."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from lora_formula import product
from safetensors.torch import load_file, save_file

import lycore


def lora(path, name="lora_unet_a", *, out=4, channels=3, alpha=None, **more):
    """A LoRA of rank 2 for one weight; returns its product."""
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(out, 2, generator=generator), torch.randn(2, channels, generator=generator)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, **more}
    save_file(tensors | ({} if alpha is None else {f"{name}.alpha": alpha}), path)
    return product({"up": up.double().numpy(), "down": down.double().numpy()})


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.uint8, torch.int16, torch.float16, torch.bfloat16])
def test_alpha_of_any_dtype_is_handed_out_as_what_it_is(tmp_path, dtype):
    delta = lora(tmp_path / "a.safetensors", alpha=torch.tensor(8).to(dtype))
    adapter = lycore.open(tmp_path / "a.safetensors")
    tensors = {name: tensor.torch() for name, tensor in adapter.modules[0].tensors.items()}
    assert tensors["alpha"].float().item() == 8
    weight = numpy.zeros((4, 3), numpy.float32)
    lycore.weight_merge("w", weight, [(1.0, tensors, None)])
    numpy.testing.assert_allclose(weight, 4 * delta, rtol=1e-5)


def test_an_alpha_beyond_fp32_is_malformed(tmp_path):
    lora(tmp_path / "a.safetensors", alpha=torch.tensor(1e300, dtype=torch.float64))
    with pytest.raises(lycore.LycoreError, match="alpha"):
        lycore.open(tmp_path / "a.safetensors")


def test_one_memory_under_two_names_is_refused():
    weight = numpy.zeros((4, 3), numpy.float32)
    with pytest.raises(lycore.ArgumentError, match=r"`a\.weight` and `b\.weight` are the same memory"):
        lycore.Stack({"a.weight": weight, "b.weight": weight})


def test_a_strength_beyond_fp32_is_refused_and_writes_nothing(tmp_path):
    lora(tmp_path / "a.safetensors")
    weight = numpy.ones((4, 3), numpy.float32)
    stack = lycore.Stack({"a.weight": weight})
    stack.add(tmp_path / "a.safetensors", 1e39)
    with pytest.raises(lycore.ArgumentError, match="1000000000"):
        stack.apply()
    assert (weight == 1).all()


def test_peft_config_counts_for_peft_files_only(tmp_path):
    delta = lora(tmp_path / "kohya.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 64}))
    weight = numpy.zeros((4, 3), numpy.float32)
    stack = lycore.Stack({"a.weight": weight})
    stack.add(tmp_path / "kohya.safetensors")
    stack.apply()
    numpy.testing.assert_allclose(weight, delta, rtol=1e-5)
    stack.restore()
    (tmp_path / "adapter_config.json").write_text("{ this is no JSON")
    assert lycore.open(tmp_path / "kohya.safetensors").modules


def test_two_spellings_of_one_weight_count_once_and_are_reported(tmp_path):
    delta = lora(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    again = {key.replace("lora_unet_a", "unet.a"): value.clone() for key, value in tensors.items()}
    save_file(tensors | again, tmp_path / "b.safetensors")
    weight = numpy.zeros((4, 3), numpy.float32)
    stack = lycore.Stack({"a.weight": weight})
    report = stack.add(tmp_path / "b.safetensors").report()
    stack.apply()
    numpy.testing.assert_allclose(weight, delta, rtol=1e-5)
    assert report["summary"]["matched"] == 2 and report["summary"]["malformed"] == 2
    assert any("another module of this file" in key.get("reason", "") for key in report["keys"])


def test_a_checkpoint_with_impossible_empty_tensors_is_converted(tmp_path):
    lora(tmp_path / "a.safetensors")
    header = {"e": {"dtype": "F32", "shape": [0, 1 << 40], "data_offsets": [0, 0]}}
    header["a.weight"] = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "base.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    out = tmp_path / "out.safetensors"
    report = lycore.merge(tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], out, dtype="fp16")
    assert report["tensors"] == {"changed": 1, "copied": 1}
    assert load_file(out)["a.weight"].dtype == torch.float16


def test_rows_that_overlap_are_not_written():
    stored = torch.zeros(16)
    weight = stored.as_strided((4, 4), (1, 1))
    factors = {"lora_up.weight": torch.ones(4, 1), "lora_down.weight": torch.ones(1, 4)}
    with pytest.raises(lycore.ArgumentError, match="repeat elements"):
        lycore.weight_merge("w", weight, [(1.0, factors, None)])
    assert not stored.any()


def test_a_host_may_load_other_weights_at_strength_zero(tmp_path):
    """With nothing applied, the stack keeps no copy that could bring the old model back."""
    delta = lora(tmp_path / "a.safetensors")
    weight = numpy.zeros((4, 3), numpy.float32)
    stack = lycore.Stack({"a.weight": weight})
    handle = stack.add(tmp_path / "a.safetensors")
    stack.apply()
    handle.strength = 0.0
    stack.apply()
    weight[:] = 5
    handle.strength = 1.0
    stack.apply()
    numpy.testing.assert_allclose(weight, 5 + delta, rtol=1e-5)
    stack.restore()
    assert (weight == 5).all()
