"""What else a file can be: pickled, cut to a prefix of its ranks, with biases and norms."""

from __future__ import annotations

import json

import numpy
import pytest
from safetensors.numpy import load_file, save_file

import lycore


def test_a_pickled_adapter_is_the_same_adapter(tmp_path, make_lora):
    torch = pytest.importorskip("torch")
    lora = make_lora("a", {"lora_unet_x_to_q": (6, 5), "lora_unet_x_conv": (4, 3, 3, 3)})
    tensors = {name: torch.from_numpy(value.copy()) for name, value in lora.tensors.items()}
    for name, options in (("new", {}), ("old", {"_use_new_zipfile_serialization": False})):
        path = tmp_path / f"{name}.pt"
        torch.save({"state_dict": tensors, "epoch": 3}, path, **options)
        weights = {"x.to_q.weight": numpy.zeros((6, 5), numpy.float32)}
        stack = lycore.Stack(weights)
        stack.add(path)
        stack.apply()
        assert numpy.allclose(weights["x.to_q.weight"], lora.deltas["lora_unet_x_to_q"], rtol=1e-6, atol=1e-7)
    with lycore.open(path) as adapter:
        adapter.save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in lora.tensors.items()}


def test_a_pickle_with_code_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"a.lora_up.weight": torch.zeros(2, 2), "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(lycore.FileError, match=r"exec.*refused"):
        lycore.open(tmp_path / "evil.pt")


def test_every_prefix_of_dylora_is_the_formula(tmp_path, make_lora, rng):
    lora = make_lora("dy", {"lora_unet_a": (7, 5), "lora_unet_b": (4, 3, 3, 3)}, rank=6, alpha=3.0, dtype="float32")
    adapter = lycore.open(lora.path)
    for rank in (1, 2, 5, 6, 9):
        weights = {"a.weight": numpy.zeros((7, 5), numpy.float32), "b.weight": numpy.zeros((4, 3, 3, 3), numpy.float32)}
        prefix = adapter.prefix(rank)
        assert {module.rank for module in prefix.modules} == {min(rank, 6)}
        with lycore.Stack(weights) as stack:
            stack.add(prefix)
            stack.apply()
            for name in "ab":
                up = lora.tensors[f"lora_unet_{name}.lora_up.weight"].astype("f8")
                down = lora.tensors[f"lora_unet_{name}.lora_down.weight"].astype("f8")
                r = min(rank, 6)
                want = 3.0 / r * up.reshape(len(up), -1)[:, :r] @ down[:r].reshape(r, -1)
                assert numpy.allclose(weights[f"{name}.weight"].reshape(want.shape), want, rtol=1e-6, atol=1e-7)
        prefix.save(tmp_path / "cut.safetensors")
        cut = load_file(tmp_path / "cut.safetensors")
        assert cut["lora_unet_a.lora_up.weight"].shape == (7, min(rank, 6))
    with pytest.raises(lycore.ArgumentError, match="at least 1"):
        adapter.prefix(0)
    save_file({"lora_unet_a.diff": numpy.zeros((7, 5), numpy.float32)}, tmp_path / "full.safetensors")
    with pytest.raises(lycore.UnsupportedError, match="ranks"):
        lycore.open(tmp_path / "full.safetensors").prefix(2)


def test_biases_and_norms_of_a_module_are_targets(tmp_path, rng):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4, bias=False))
    new = {
        "lycoris_0.diff": (4, 5),
        "lycoris_0.diff_b": (4,),
        "lycoris_1.w_norm": (4,),
        "lycoris_1.b_norm": (4,),
        "lycoris_2.diff": (4, 4),
        "lycoris_2.diff_b": (4,),
    }
    tensors = {name: rng.standard_normal(shape).astype(numpy.float32) for name, shape in new.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with lycore.Stack(model) as stack:
        report = stack.add(tmp_path / "a.safetensors", 0.5).report()
        stack.apply()
        for name, source in {
            "0.weight": "lycoris_0.diff",
            "0.bias": "lycoris_0.diff_b",
            "1.weight": "lycoris_1.w_norm",
            "1.bias": "lycoris_1.b_norm",
        }.items():
            want = before[name].double() + 0.5 * torch.from_numpy(tensors[source]).double()
            assert torch.allclose(model.state_dict()[name].double(), want, rtol=1e-6, atol=1e-7), name
    # The last layer has no bias: its weight is changed, and the report says what is not.
    assert {k["key"]: k["status"] for k in report["keys"] if k["status"] != "matched"} == {
        "lycoris_2.diff_b": "unmatched"
    }
    assert {m["module"]: m.get("bias") for m in report["modules"]} == {
        "lycoris_0": "0.bias",
        "lycoris_1": "1.bias",
        "lycoris_2": None,
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_control_lora_grows_its_input_and_sets_norms(tmp_path, rng):
    """Black Forest Labs' control LoRAs: PEFT's keys, biases, whole norms, and an input with more channels."""
    h, path = 6, tmp_path / "control.safetensors"
    file = {
        "img_in.lora_A.weight": (2, 8),
        "img_in.lora_B.weight": (h, 2),
        "img_in.lora_B.bias": (h,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
    }
    file = {name: rng.standard_normal(shape).astype(numpy.float32) for name, shape in file.items()}
    save_file(file, path)
    base = {
        "img_in.weight": (h, 4),
        "img_in.bias": (h,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
    }
    base = {name: rng.standard_normal(shape).astype(numpy.float32) for name, shape in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    report = lycore.merge(tmp_path / "base.safetensors", [path], tmp_path / "out.safetensors")
    assert report["adapters"][0]["summary"]["matched"] == 4
    out = load_file(tmp_path / "out.safetensors")
    grown = numpy.pad(base["img_in.weight"].astype("f8"), ((0, 0), (0, 4)))
    want = grown + file["img_in.lora_B.weight"].astype("f8") @ file["img_in.lora_A.weight"].astype("f8")
    assert out["img_in.weight"].shape == (h, 8) and numpy.allclose(out["img_in.weight"], want, rtol=1e-6, atol=1e-6)
    assert numpy.allclose(out["img_in.bias"], base["img_in.bias"] + file["img_in.lora_B.bias"], rtol=1e-6, atol=1e-6)
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    assert out[norm].tobytes() == file[norm].tobytes()
    # Memory of a fixed size cannot grow: that module is left out with the reason, the others are applied.
    stack = lycore.Stack({name: value.copy() for name, value in base.items()})
    keys = {k["key"]: k for k in stack.add(path).report()["keys"]}
    assert keys["img_in.lora_A.weight"]["status"] == "malformed"
    assert "grow" in keys["img_in.lora_A.weight"]["reason"] and keys[norm]["status"] == "matched"
    with lycore.open(path) as adapter:
        adapter.save(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert {key.removeprefix("base_model.model.") for key in again} == file.keys()


def test_the_report_says_what_a_user_asks(tmp_path, make_lora):
    metadata = {
        "ss_output_name": "cat",
        "modelspec.trigger_phrase": "a photo of sks cat",
        "ss_network_dim": "4",
        "ss_tag_frequency": json.dumps({"10_cat": {"cat": 12, "sofa": 3}}),
    }
    lora = make_lora("a", {"lora_unet_x_to_q": (6, 5)}, metadata=metadata)
    report = lycore.open(lora.path).report()
    assert report["modules"][0]["shape"] == [6, 5] and report["modules"][0]["bytes"] == 6 * 4 * 2 + 4 * 5 * 2 + 2
    text = lycore.report_text(report)
    assert "a photo of sks cat" in text and "cat" in text and max(map(len, text.splitlines())) <= 100
