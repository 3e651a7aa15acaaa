"""The ComfyUI node on a host that keeps ComfyUI's contract (`fakes`): the numbers, the uuids, the messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fakes
import pytest
import torch
from safetensors.torch import save_file

BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
Q = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
V = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"
CONV = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
QKV = "diffusion_model.joint_blocks.0.attn.qkv.weight"
ADA = "diffusion_model.final_layer.adaLN.weight"
FC1 = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
H = fakes.HIDDEN


class Host:
    """The fake host with the node in it."""

    def __init__(self, folder, loaded):
        self.folder = folder
        self.package = loaded
        self.Node = loaded.NODE_CLASS_MAPPINGS["LyCoreLoraStack"]
        self.part = lambda name: sys.modules[f"{loaded.__name__}.{name}"]

    def run(self, model, *rows, clip=None):
        """Runs a new node; a row is (file, strength) or (file, strength, strength of the text encoder)."""
        inputs = {}
        for number, row in enumerate(rows, 1):
            name, on_model, on_clip = (*row, 1.0)[:3]
            inputs |= {f"on_{number}": True, f"lora_{number}": name}
            inputs |= {f"strength_model_{number}": on_model, f"strength_clip_{number}": on_clip}
        return self.Node().apply(model, clip, **inputs)

    def save(self, name, modules, metadata=None):
        """Writes a kohya file: module -> (up, down) or (up, down, alpha)."""
        tensors = {}
        for module, (up, down, *alpha) in modules.items():
            tensors[f"{module}.lora_up.weight"], tensors[f"{module}.lora_down.weight"] = up, down
            if alpha:
                tensors[f"{module}.alpha"] = torch.tensor(float(alpha[0]))
        save_file({k: t.clone() for k, t in tensors.items()}, self.folder / name, metadata)


@pytest.fixture
def host(tmp_path, monkeypatch):
    for name, module in fakes.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    loaded = fakes.load_node()
    yield Host(tmp_path, loaded)
    for name in set(sys.modules) - before:
        if name.startswith(loaded.__name__):
            del sys.modules[name]


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def factors(rows, columns, rank=4, seed=0, dtype=torch.float32):
    return rand(rows, rank, seed=seed, dtype=dtype), rand(rank, columns, seed=seed + 1, dtype=dtype)


def delta(up, down, alpha=None):
    """alpha / rank * up @ down in fp64."""
    rank = down.shape[0]
    return (alpha if alpha else rank) / rank * (up.double().flatten(1) @ down.double().flatten(1))


def weight_of(patcher, key):
    return patcher.model.get_parameter(key).data


def assert_rounded_once(result, exact):
    """fp32: 1e-6 relative to the values; fp16 and bf16: what one rounding gives, save where fp32 sums sit on a tie."""
    if result.dtype == torch.float32:
        assert (result.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
        return
    correct = exact.to(result.dtype)
    assert (result == correct).float().mean() >= 0.999
    assert torch.allclose(result.double(), correct.double(), rtol=torch.finfo(result.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_loras_are_merged_in_one_call_and_rounded_once(host, dtype, monkeypatch):
    lycore = host.part("library").find()
    model = fakes.Model()
    model.diffusion_model.add_module("big", torch.nn.Linear(192, 160, bias=False))
    model.to(dtype)
    first, second = factors(160, 192, seed=1, dtype=torch.float16), factors(160, 192, rank=8, seed=3)
    host.save("a.safetensors", {"lora_unet_big": (*first, 2.0)})
    host.save("b.safetensors", {"lora_unet_big": second})
    patched, _, _ = host.run(fakes.Patcher(model), ("a.safetensors", 0.7), ("b.safetensors", -0.3))

    key = "diffusion_model.big.weight"
    assert len(patched.patches[key]) == 1
    calls = []
    native = lycore.weight_merge
    monkeypatch.setattr(lycore, "weight_merge", lambda *a: calls.append(a[0]) or native(*a))
    base = weight_of(patched, key).clone()
    exact = base.double() + 0.7 * delta(*first, 2.0) - 0.3 * delta(*second)
    assert_rounded_once(patched.lowvram_weight(key, dtype), exact)
    assert calls == [key]
    patched.load()
    assert_rounded_once(weight_of(patched, key), exact)


def test_the_host_may_hand_over_any_strides_and_a_narrowed_weight(host):
    up, down = factors(H, H, seed=5)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down)})
    patched, _, _ = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 0.5))
    strength, adapter, *_ = patched.patches[Q][0]
    for weight in (rand(H, H, seed=9).t(), rand(3 * H, 2 * H, seed=9)[H : 2 * H, ::2]):
        before, whole = weight.clone(), weight._base.clone()
        assert adapter.calculate_weight(weight, Q, strength, 1.0, None, lambda a: a) is weight
        assert_rounded_once(weight, before.double() + 0.5 * delta(up, down))
        weight.copy_(before)
        assert torch.equal(weight._base, whole)


def test_strengths_of_the_patch_and_of_the_weight_are_honoured(host):
    up, down = factors(H, H, seed=5)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down)})
    patched, _, _ = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 0.5))
    base = weight_of(patched, Q).clone()
    adapter = patched.patches[Q][0][1]
    result = fakes.calculate_weight([(2.0, adapter, 0.25, None, None)], base.clone(), Q)
    assert_rounded_once(result, 0.25 * base.double() + 2.0 * 0.5 * delta(up, down))
    same = fakes.calculate_weight([(0.0, adapter, 1.0, None, None)], base.clone(), Q)
    assert torch.equal(same, base)


def test_slices_of_a_fused_qkv(host):
    q, v = factors(H, H, seed=1), factors(H, H, rank=2, seed=3)
    tensors = {}
    for name, (up, down) in (("to_q", q), ("to_v", v)):
        tensors[f"transformer.transformer_blocks.0.attn.{name}.lora_B.weight"] = up
        tensors[f"transformer.transformer_blocks.0.attn.{name}.lora_A.weight"] = down
    save_file(tensors, host.folder / "a.safetensors")
    patched, _, report = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 0.5))
    assert "2/2 modules" in report
    base = weight_of(patched, QKV).clone()
    exact = base.double()
    exact[:H] += 0.5 * delta(*q)
    exact[2 * H :] += 0.5 * delta(*v)
    assert len(patched.patches[QKV]) == 1
    patched.load()
    assert_rounded_once(weight_of(patched, QKV), exact)
    assert torch.equal(weight_of(patched, QKV)[H : 2 * H], base[H : 2 * H])


def test_peft_names_behind_its_wrapper_find_the_hosts_aliases(host):
    up, down = factors(H, H, seed=1)
    name = "base_model.model.transformer_blocks.0.attn.to_k"
    unet_keys = fakes.model_lora_keys_unet
    sys.modules["comfy.lora"].model_lora_keys_unet = lambda model, keys: {
        **unet_keys(model, keys),
        name: (QKV, (0, H, H)),
    }
    save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, host.folder / "a.safetensors")
    patched, _, _ = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 1.0))
    exact = weight_of(patched, QKV).double()
    exact[H : 2 * H] += delta(up, down)
    assert_rounded_once(patched.lowvram_weight(QKV, torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_is_applied_to_the_difference(host, dtype):
    up, down = factors(2 * H, H, seed=1)
    name = "transformer.norm_out.linear"
    save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, host.folder / "a.safetensors")
    patched, _, _ = host.run(fakes.Patcher(fakes.Model(dtype)), ("a.safetensors", 0.5))
    exact = weight_of(patched, ADA).double() + 0.5 * fakes.swap_halves(delta(up, down))
    assert_rounded_once(patched.lowvram_weight(ADA, dtype), exact)


def test_convolutions(host):
    up, down = rand(H, 2, 1, 1, seed=1), rand(2, 4, 3, 3, seed=2)
    host.save("a.safetensors", {"lora_unet_down_blocks_0_resnets_0_conv1": (up, down, 1.0)})
    patched, _, report = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 2.0))
    assert "1/1 modules, LoCon, rank 2, alpha 1, strength 2" in report
    exact = weight_of(patched, CONV).double() + 2.0 * delta(up, down, 1.0).reshape(H, 4, 3, 3)
    assert_rounded_once(patched.lowvram_weight(CONV, torch.float32), exact)


def test_dora_oft_biases_and_norms(host):
    model = fakes.Model()
    for name, module in (
        ("big", torch.nn.Linear(10, 8)),
        ("norm", torch.nn.LayerNorm(8)),
        ("turned", torch.nn.Linear(10, 8)),
    ):
        model.diffusion_model.add_module(name, module)
    up, down = factors(8, 10, seed=1)
    tensors = {
        "lora_unet_big.lora_up.weight": up,
        "lora_unet_big.lora_down.weight": down,
        "lora_unet_big.dora_scale": rand(8, 1, seed=3).abs() + 0.5,
        "lora_unet_big.diff_b": rand(8, seed=4),
        "lora_unet_norm.w_norm": rand(8, seed=5),
        "lora_unet_norm.b_norm": rand(8, seed=6),
        "lora_unet_turned.oft_blocks": rand(2, 4, 4, seed=7) * 0.3,
    }
    save_file(tensors, host.folder / "a.safetensors")
    base = {key: value.double().clone() for key, value in model.state_dict().items()}
    patched, _, report = host.run(fakes.Patcher(model), ("a.safetensors", 0.6))
    assert "un" not in report.replace("unet", ""), report
    patched.load()
    unet = "diffusion_model."
    v = base[unet + "big.weight"] + delta(up, down)
    dora = v / v.norm(dim=1, keepdim=True) * tensors["lora_unet_big.dora_scale"].double()
    q = tensors["lora_unet_turned.oft_blocks"].double()
    q, one = q - q.transpose(1, 2), torch.eye(4, dtype=torch.float64)
    r = torch.block_diag(*((one + q) @ torch.linalg.inv(one - q)))
    turned = base[unet + "turned.weight"]
    want = {
        "big.weight": base[unet + "big.weight"] + 0.6 * (dora - base[unet + "big.weight"]),
        "big.bias": base[unet + "big.bias"] + 0.6 * tensors["lora_unet_big.diff_b"].double(),
        "norm.weight": base[unet + "norm.weight"] + 0.6 * tensors["lora_unet_norm.w_norm"].double(),
        "norm.bias": base[unet + "norm.bias"] + 0.6 * tensors["lora_unet_norm.b_norm"].double(),
        "turned.weight": turned + 0.6 * (r.T @ turned - turned),
        "turned.bias": base[unet + "turned.bias"],
    }
    for key, exact in want.items():
        assert_rounded_once(weight_of(patched, unet + key), exact)


def test_unloading_gives_the_weights_back_bit_for_bit(host):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H), f"{BLOCK}attn1_to_v": factors(16, H)})
    model = fakes.Model(torch.float16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    patched, _, _ = host.run(fakes.Patcher(model), ("a.safetensors", 1.3))
    patched.load()
    assert not torch.equal(weight_of(patched, Q), before[Q])
    patched.unload()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_text_encoder_has_its_own_strength_and_stays_as_it_is_without_modules(host):
    up, down = factors(2 * H, H, seed=1)
    te = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (up, down)}
    host.save("both.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H), **te})
    host.save("unet.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    model, clip = fakes.Patcher(fakes.Model()), fakes.Clip(fakes.TextEncoder())

    new_model, new_clip, report = host.run(model, ("both.safetensors", 0.0, 0.4), clip=clip)
    assert new_model is model
    assert "2/2 modules (1 model, 1 text encoder)" in report and "strength 0 / 0.4" in report
    exact = weight_of(new_clip.patcher, FC1).double() + 0.4 * delta(up, down)
    assert_rounded_once(new_clip.patcher.lowvram_weight(FC1, torch.float32), exact)

    new_model, new_clip, _ = host.run(model, ("unet.safetensors", 1.0, 1.0), clip=clip)
    assert new_clip is clip and new_model is not model
    assert not model.patches and not clip.patcher.patches

    _, nothing, report = host.run(model, ("both.safetensors", 1.0, 1.0))
    assert nothing is None
    assert "1/2 modules" in report and "1 modules of text encoders left out: no CLIP is connected" in report


def test_an_identical_stack_does_not_reload_the_model_and_any_difference_does(host):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    host.save("b.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H, seed=7)})
    base = fakes.Patcher(fakes.Model())
    rows = ("a.safetensors", 0.5), ("b.safetensors", 0.25)
    first, again = host.run(base, *rows)[0], host.run(base, *rows)[0]
    assert first.patches_uuid == again.patches_uuid != base.patches_uuid
    first.load()
    again.load()
    assert base.reloads == [0]
    others = [
        host.run(base, rows[0])[0],
        host.run(base, ("a.safetensors", 0.5), ("b.safetensors", 0.2501))[0],
        host.run(base, ("b.safetensors", 0.5), ("a.safetensors", 0.25))[0],
        host.run(fakes.Patcher(base.model), *rows)[0],
        host.run(again, *rows)[0],
    ]
    uuids = {first.patches_uuid, *(other.patches_uuid for other in others)}
    assert len(uuids) == 1 + len(others)

    changed = host.Node.IS_CHANGED(lora_1="a.safetensors")
    assert changed == host.Node.IS_CHANGED(lora_1="a.safetensors")
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H, seed=11)})
    assert host.Node.IS_CHANGED(lora_1="a.safetensors") != changed
    assert host.run(base, *rows)[0].patches_uuid not in uuids


def test_a_file_that_is_overwritten_does_not_change_a_model_in_use(host):
    up, down = factors(H, H)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down)})
    patched, _, _ = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 1.0))
    exact = weight_of(patched, Q).double() + delta(up, down)
    (host.folder / "a.safetensors").write_bytes(b"")
    assert_rounded_once(patched.lowvram_weight(Q, torch.float32), exact)


def test_chained_nodes_make_one_object_of_a_weight(host):
    first, second = factors(H, H, seed=1), factors(H, H, seed=5)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": first, f"{BLOCK}attn2_to_q": first})
    host.save("b.safetensors", {f"{BLOCK}attn1_to_q": second})
    model = fakes.Patcher(fakes.Model(torch.bfloat16))
    once, _, _ = host.run(model, ("a.safetensors", 0.5))
    twice, _, _ = host.run(once, ("b.safetensors", 0.75))
    assert len(twice.patches[Q]) == 1 and len(once.patches[Q]) == 1
    assert len(once.patches[Q][0][1].weights) == 1
    exact = weight_of(model, Q).double() + 0.5 * delta(*first) + 0.75 * delta(*second)
    together, _, _ = host.run(model, ("a.safetensors", 0.5), ("b.safetensors", 0.75))
    results = [patcher.lowvram_weight(Q, torch.bfloat16) for patcher in (twice, together)]
    assert torch.equal(*results)
    assert_rounded_once(results[0], exact)
    assert (results[0] == exact.to(torch.bfloat16)).all()


def test_patches_of_others_are_kept_apart(host):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})

    class Other(fakes.WeightAdapterBase):
        pass

    model = fakes.Patcher(fakes.Model())
    once, _, _ = host.run(model, ("a.safetensors", 0.5))
    once.add_patches({Q: Other()})
    twice, _, _ = host.run(once, ("a.safetensors", 0.5))
    assert [type(entry[1]).__name__ for entry in twice.patches[Q]] == ["LyCoreAdapter", "Other", "LyCoreAdapter"]
    # Here the weight itself is scaled between the two, so that they are not one sum.
    once, _, _ = host.run(model, ("a.safetensors", 0.5))
    once.patches[Q][0] = (0.5, once.patches[Q][0][1], 0.9, None, None)
    twice, _, _ = host.run(once, ("a.safetensors", 0.5))
    assert len(twice.patches[Q]) == 2


def test_a_patch_strength_that_the_host_set_survives_chaining(host):
    up, down = factors(H, H)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down)})
    once, _, _ = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 0.5))
    once.patches[Q][0] = (3.0, *once.patches[Q][0][1:])
    twice, _, _ = host.run(once, ("a.safetensors", 0.25))
    assert len(twice.patches[Q]) == 1
    exact = weight_of(once, Q).double() + (3.0 * 0.5 + 0.25) * delta(up, down)
    assert_rounded_once(twice.lowvram_weight(Q, torch.float32), exact)


def test_a_lora_for_another_model_is_an_error_that_names_both(host):
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    host.save("xl.safetensors", {"lora_unet_blocks_17_mlp_fc9": factors(64, 64)}, metadata)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1": factors(2 * H, H)}
    host.save("by_chance.safetensors", {"lora_unet_blocks_17_mlp_fc9": factors(64, 64), **text})
    host.save("wide.safetensors", {f"{BLOCK}attn1_to_q": factors(64, 64)})
    model, clip = fakes.Patcher(fakes.Model()), fakes.Clip(fakes.TextEncoder())
    with pytest.raises(RuntimeError, match=r"row 1, xl\.safetensors: made for sdxl_base.* the model Model"):
        host.run(model, ("xl.safetensors", 1.0))
    with pytest.raises(RuntimeError, match=r"row 1, by_chance.* model Model: only text encoder modules match"):
        host.run(model, ("by_chance.safetensors", 1.0, 1.0), clip=clip)
    with pytest.raises(RuntimeError, match=r"wide\.safetensors.* model Model.*64"):
        host.run(model, ("wide.safetensors", 1.0))
    assert not model.patches
    # Who asks for the text encoder only gets it.
    _, new_clip, _ = host.run(model, ("by_chance.safetensors", 0.0, 1.0), clip=clip)
    assert list(new_clip.patcher.patches) == [FC1]


def test_a_row_that_cannot_be_read_is_an_error_that_names_it(host):
    host.save("good.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    (host.folder / "bad.safetensors").write_bytes(b"no safetensors")
    host.save("text.safetensors", {"lora_te_text_model_encoder_layers_0_mlp_fc1": factors(2 * H, H)})
    model = fakes.Patcher(fakes.Model())
    with pytest.raises(RuntimeError, match=r"row 2, bad\.safetensors"):
        host.run(model, ("good.safetensors", 1.0), ("bad.safetensors", 1.0))
    with pytest.raises(RuntimeError, match=r"row 1, gone\.safetensors: there is no such file"):
        host.run(model, ("gone.safetensors", 1.0))
    with pytest.raises(RuntimeError, match=r"row 1, text\.safetensors: all its 1 modules are for text encoders"):
        host.run(model, ("text.safetensors", 1.0))


def test_the_report_says_what_is_not_applied(host):
    up, down = factors(H, H, rank=2)
    modules = {f"{BLOCK}attn1_to_q": (up, down, 1.0), f"{BLOCK}attn1_to_qq": factors(H, H)}
    modules |= {f"lora_unet_elsewhere_{n}": factors(3, 3) for n in range(40)}
    host.save("a.safetensors", modules)
    more = {f"{BLOCK}attn2_to_q.bias_indices": rand(2, 2)}
    tensors = {f"{BLOCK}attn1_to_k.lora_up.weight": rand(H, 4), f"{BLOCK}attn1_to_k.lora_down.weight": rand(4, H)}
    save_file({**tensors, **more}, host.folder / "b.safetensors")
    _, _, report = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 0.8), ("b.safetensors", 1.0))
    lines = report.splitlines()
    assert lines[0] == "a.safetensors: 1/42 modules, LoRA, rank 2 to 4, alpha 1, strength 0.8"
    nearest = f"  unmatched: {BLOCK}attn1_to_qq (nearest: {BLOCK}attn1_to_q)"
    assert nearest in lines
    assert any(line.startswith("  unmatched: lora_unet_elsewhere_0") for line in lines)
    assert len(lines) < 30
    assert "b.safetensors: 1/1 modules, LoRA, rank 4, strength 1" in lines
    assert any(line.startswith(f"  unsupported: {BLOCK}attn2_to_q") for line in lines)


def test_rows_that_do_nothing_are_skipped(host):
    model = fakes.Patcher(fakes.Model())
    inputs = {"lora_1": "None", "lora_2": "gone.safetensors", "on_2": False, "lora_3": "gone.safetensors"}
    inputs |= {"strength_model_3": 0.0, "strength_clip_3": 0.0}
    same, clip, report = host.Node().apply(model, None, **inputs)
    assert same is model and clip is None and report == "No LoRA is switched on."
    assert host.Node.IS_CHANGED(**inputs) == "[]"


def test_the_widgets(host):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    inputs = host.Node.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "on_1", "lora_1", "strength_model_1", "strength_clip_1"]
    assert [name for name in inputs["optional"] if name.startswith("lora_")] == [f"lora_{n}" for n in range(2, 6)]
    assert inputs["required"]["lora_1"][0] == ["None", "a.safetensors"]
    kind, options = inputs["optional"]["strength_clip_5"]
    assert kind == "FLOAT" and (options["min"], options["max"], options["default"]) == (-20.0, 20.0, 1.0)
    names = {"LyCoreLoraStack": "LyCore LoRA Stack", "LyCoreTrain": "LyCore Train"}
    assert names == host.package.NODE_DISPLAY_NAME_MAPPINGS and names.keys() == host.package.NODE_CLASS_MAPPINGS.keys()


def test_the_users_stop_button_works_between_rows(host):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    sys.modules["comfy.model_management"].interrupted = True
    with pytest.raises(fakes.Interrupted):
        host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 1.0))


def test_a_weight_that_the_library_does_not_reach_is_merged_in_a_copy(host, monkeypatch):
    adapter = host.part("adapter")
    up, down = factors(H, H, seed=1, dtype=torch.float16)
    conv = rand(H, 2, 1, 1, seed=1), rand(2, 4, 1, 1, seed=2)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down, 2.0), "lora_unet_down_blocks_0_resnets_0_conv1": conv})
    tensors = {
        "lora_up.weight": conv[0],
        "lora_down.weight": conv[1],
        "lora_mid.weight": rand(2, 2, 3, 3, seed=3),
        "alpha": 1.0,
    }
    expected = torch.zeros(H, 4, 3, 3)
    adapter.merge(expected, CONV, [(0.5, tensors, None)])
    monkeypatch.setitem(adapter._unreachable, torch.device("cpu"), "no such device")
    model = fakes.Patcher(fakes.Model(torch.bfloat16))
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down, 2.0)})
    patched, _, report = host.run(model, ("a.safetensors", 0.7))
    assert report.splitlines()[-1] == "Merged on the CPU, not on cpu: no such device"
    exact = weight_of(model, Q).double() + 0.7 * delta(up, down, 2.0)
    assert_rounded_once(patched.lowvram_weight(Q, torch.bfloat16), exact)
    # A Tucker core and a slice of columns, against the library.
    result = torch.zeros(H, 4, 3, 3)
    adapter.merge(result, CONV, [(0.5, tensors, None)])
    assert torch.allclose(result, expected, rtol=1e-6, atol=1e-6)
    columns = torch.zeros(H, 2 * H)
    linear = {"lora_up.weight": up, "lora_down.weight": down, "alpha": 0.0}
    adapter.merge(columns, Q, [(1.0, linear, (1, H, H))])
    assert_rounded_once(columns[:, H:].contiguous(), delta(up, down))
    assert not columns[:, :H].any()


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no fp8")
def test_fp8_weights_are_summed_beside_the_weight(host):
    up, down = factors(H, H, seed=1)
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": (up, down)})
    patched, _, _ = host.run(fakes.Patcher(fakes.Model()), ("a.safetensors", 0.5))
    weight = rand(H, H, seed=4).to(torch.float8_e4m3fn)
    exact = weight.float() + (0.5 * delta(up, down)).float()
    patched.patches[Q][0][1].calculate_weight(weight, Q, 1.0, 1.0, None, lambda a: a)
    # The fp32 sums may differ in the last bit, which at a tie is one step of fp8.
    assert (weight.float() == exact.to(torch.float8_e4m3fn).float()).float().mean() >= 0.98


@pytest.mark.parametrize("groups", [1, 2])
def test_the_bypass_equals_the_merge(host, groups):
    Adapter = host.part("adapter").LyCoreAdapter
    layer = torch.nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=groups).double()
    up, down = rand(6, 2, 1, 1).double(), rand(2, 8 // groups, 3, 3, seed=1).double()
    q = (("lora_up.weight", rand(3, 2, seed=2).double()), ("lora_down.weight", rand(2, 5, seed=3).double()))
    x = rand(1, 8, 7, 7, seed=4).double()
    conv = Adapter(set(), ((0.5, None, (("lora_up.weight", up), ("lora_down.weight", down), ("alpha", 1.0))),))
    conv.is_conv, conv.conv_dim, conv.kernel_size, conv.multiplier = True, 2, (3, 3), 0.5
    conv.kw_dict = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": groups}
    change = 0.25 * delta(up, down, 1.0).reshape(layer.weight.shape)
    merged = torch.nn.functional.conv2d(x, layer.weight + change, layer.bias, 2, 1, 1, groups)
    assert torch.allclose(conv.bypass_forward(layer, x), merged, rtol=1e-12)

    linear = torch.nn.Linear(5, 9).double()
    sliced = Adapter(set(), ((2.0, (0, 3, 3), q),))
    x = rand(4, 5, seed=5).double()
    expected = linear(x)
    expected[:, 3:6] += 2.0 * x @ delta(q[0][1], q[1][1]).t()
    assert torch.allclose(sliced.bypass_forward(linear, x), expected, rtol=1e-12)


def _run_in_new_process(tmp_path, folder, body, **environment):
    """Loads `folder` as a custom node on the fake host in a process of its own, then runs `body`."""
    script = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import fakes
    sys.modules.update(fakes.modules({str(tmp_path)!r}))
    node = fakes.load_node({str(folder)!r}).NODE_CLASS_MAPPINGS["LyCoreLoraStack"]
    """
    command = [sys.executable, "-c", textwrap.dedent(script) + textwrap.dedent(body)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


_RUN = """
try:
    print(node().apply(fakes.Patcher(fakes.Model()), lora_1="a.safetensors")[2])
except RuntimeError as problem:
    print(type(problem).__name__, problem)
"""


def test_the_node_is_listed_without_package_and_library_and_says_what_is_missing(host, tmp_path):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    lonely = tmp_path / "custom_nodes" / "lycore"
    shutil.copytree(fakes.PLUGIN, lonely)
    listed = "print(*node.INPUT_TYPES()['required'])\n"
    out = _run_in_new_process(tmp_path, lonely, f"sys.modules['lycore'] = None\n{listed}{_RUN}")
    assert "strength_clip_1\nNodeError The Python package `lycore` is not there" in out and "Hint: install" in out
    out = _run_in_new_process(tmp_path, fakes.PLUGIN, listed + _RUN, LYCORE_LIBRARY=str(tmp_path / "nowhere"))
    assert "strength_clip_1\nNodeError LyCore LoRA Stack: LYCORE_LIBRARY is" in out and "Hint:" in out


def test_the_folder_works_linked_and_copied_under_the_packages_own_name(host, tmp_path):
    host.save("a.safetensors", {f"{BLOCK}attn1_to_q": factors(H, H)})
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    (nodes / "lycore").symlink_to(fakes.PLUGIN, target_is_directory=True)
    assert "1/1 modules" in _run_in_new_process(tmp_path, nodes / "lycore", _RUN)
    shutil.copytree(fakes.PLUGIN, tmp_path / "other" / "lycore")
    shutil.copytree(fakes.ROOT / "plugin" / "lycore", tmp_path / "other" / "lycore" / "lycore")
    library = host.part("library").find().load().build.path
    out = _run_in_new_process(tmp_path, tmp_path / "other" / "lycore", _RUN, LYCORE_LIBRARY=str(library))
    assert "1/1 modules" in out
