"""Converted files in the programs that they are for: PEFT and diffusers make of them what LyCore makes of the
source.
"""

from __future__ import annotations

import json

import numpy
import pytest
from safetensors.numpy import load_file, save_file

import lycore
from conftest import run_cli

torch = pytest.importorskip("torch")

FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def factors(rng, out, columns, rank, *, kernel=(), alpha=None, magnitude=False):
    """A LoRA's tensors for a weight of this shape."""
    ones = [1] * len(kernel)
    found = {
        "lora_up.weight": rng.standard_normal([out, rank, *ones]).astype("float32"),
        "lora_down.weight": rng.standard_normal([rank, columns, *kernel]).astype("float32"),
    }
    if alpha is not None:
        found["alpha"] = numpy.array(alpha, "float32")
    if magnitude:
        found["dora_scale"] = rng.uniform(0.5, 2, [out, 1, *ones]).astype("float32")
    return found


def write(path, modules):
    save_file({f"{name}.{slot}": value for name, tensors in modules.items() for slot, value in tensors.items()}, path)
    return path


def merged_by_lycore(model, adapter, prefix="", tmp_path=None):
    """The model's weights after LyCore merged the file into them, by diffusers' names."""
    base, out = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    state = {f"{prefix}{key}": value.detach().numpy() for key, value in model.state_dict().items()}
    save_file(state, base)
    report = lycore.merge(base, [adapter], out)
    assert report["tensors"]["changed"] > 0
    return {key.removeprefix(prefix): value for key, value in load_file(out).items()}


def merged_by_peft(model):
    """The weights of a model with PEFT's layers inside, after PEFT merged them, by the model's own names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    state = model.state_dict()
    inner = ("lora_", "hada_", "lokr_", "ia3_")
    kept = {k: v for k, v in state.items() if not any(f".{word}" in k for word in inner)}
    return {k.replace(".base_layer", ""): v.detach().numpy() for k, v in kept.items()}


def same(got, expected):
    """All weights agree to what fp32 products of this size keep."""
    assert set(got) == set(expected)
    for key, value in expected.items():
        size = max(1.0, float(numpy.abs(value).max()))
        numpy.testing.assert_allclose(got[key], value, rtol=0, atol=2e-5 * size, err_msg=key)


def flux(rng):
    """A tiny Flux, and a kohya file for it: fused projections, ranks and alphas of all kinds."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    model = FluxTransformer2DModel(**FLUX)
    modules = {
        "lora_unet_double_blocks_0_img_attn_qkv": factors(rng, 48, 16, 4, alpha=2.0),
        "lora_unet_double_blocks_0_txt_attn_qkv": factors(rng, 48, 16, 2),
        "lora_unet_double_blocks_0_img_attn_proj": factors(rng, 16, 16, 3, alpha=1.0),
        "lora_unet_single_blocks_0_linear1": factors(rng, 112, 16, 4, alpha=0.3),
        "lora_unet_single_blocks_0_linear2": factors(rng, 16, 80, 4, alpha=4.0),
        "lora_unet_final_layer_linear": factors(rng, 4, 16, 1, alpha=0.5),
    }
    return model, modules


def test_diffusers_loads_a_split_flux_with_exact_scales(tmp_path, rng):
    model, modules = flux(rng)
    source = write(tmp_path / "kohya.safetensors", modules)
    expected = merged_by_lycore(model, source, "transformer.", tmp_path)
    out = tmp_path / "diffusers.safetensors"
    report = lycore.convert(source, out, to="diffusers", family="Flux.1")
    assert report["summary"] | {"tensors": 0} == {
        "modules": 6, "written": 13, "tensors": 0, "split": 3, "fused": 0, "left_out": 0,
    }  # fmt: skip
    model.load_lora_adapter(str(out), prefix="transformer", use_safetensors=True)
    same(merged_by_peft(model), expected)


def test_diffusers_reads_the_metadata_through_the_pipeline(tmp_path, rng):
    from diffusers import FluxPipeline

    model, modules = flux(rng)
    source = write(tmp_path / "kohya.safetensors", modules)
    expected = merged_by_lycore(model, source, "transformer.", tmp_path)
    lycore.convert(source, tmp_path / "out.safetensors", to="diffusers", family="Flux.1")
    absent = ["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    pipe = FluxPipeline(transformer=model, **dict.fromkeys(absent))
    pipe.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    same(merged_by_peft(model), expected)


@pytest.mark.parametrize("magnitude", [False, True])
def test_unet_with_convolutions_and_dora(tmp_path, rng, magnitude):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    model = UNet2DConditionModel(**UNET)
    root = "lora_unet_down_blocks_0_"
    modules = {
        f"{root}attentions_0_transformer_blocks_0_attn1_to_q": factors(rng, 32, 32, 4, alpha=2.0, magnitude=magnitude),
        f"{root}attentions_0_transformer_blocks_0_attn2_to_k": factors(rng, 32, 32, 2, alpha=3.0, magnitude=magnitude),
        f"{root}resnets_0_conv1": factors(rng, 32, 32, 4, kernel=(3, 3), alpha=1.0, magnitude=magnitude),
        f"{root}attentions_0_proj_in": factors(rng, 32, 32, 4, kernel=(1, 1), magnitude=magnitude),
    }
    source = write(tmp_path / "kohya.safetensors", modules)
    expected = merged_by_lycore(model, source, "unet.", tmp_path)
    out = tmp_path / "diffusers.safetensors"
    lycore.convert(source, out, to="diffusers", family="SD 1.x")
    model.load_lora_adapter(str(out), prefix="unet", use_safetensors=True)
    same(merged_by_peft(model), expected)


def test_text_encoders_take_their_own_alphas(tmp_path, rng):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    root = "lora_te_text_model_encoder_layers_"
    modules = {
        f"{root}0_self_attn_q_proj": factors(rng, 16, 16, 4, alpha=2.0),
        f"{root}1_self_attn_q_proj": factors(rng, 16, 16, 2, alpha=3.0),
        f"{root}0_mlp_fc1": factors(rng, 32, 16, 4),
    }
    source = write(tmp_path / "kohya.safetensors", modules)
    expected = merged_by_lycore(encoder, source, "text_encoder.", tmp_path)
    out = tmp_path / "out.safetensors"
    lycore.convert(source, out, to="diffusers", family="SD 1.x")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(out), return_lora_metadata=True)
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, network_alphas=alphas, text_encoder=encoder, prefix="text_encoder", metadata=metadata
    )
    same(merged_by_peft(encoder), expected)


def values(rng, alpha=None, **shapes):
    """Random tensors, and an alpha."""
    found = {slot: rng.standard_normal(shape).astype("float32") for slot, shape in shapes.items()}
    return found if alpha is None else found | {"alpha": numpy.array(alpha, "float32")}


HADAMARD = {"hada_w1_a": (48, 3), "hada_w1_b": (3, 16), "hada_w2_a": (48, 3), "hada_w2_b": (3, 16)}
KINDS = {
    "LoRA": lambda rng: factors(rng, 48, 16, 4, alpha=2.0),
    "DoRA": lambda rng: factors(rng, 48, 16, 4, alpha=2.0, magnitude=True),
    "LoHa": lambda rng: values(rng, 1.5, **HADAMARD),
    "LoKr": lambda rng: values(rng, lokr_w1=(4, 4), lokr_w2=(12, 4)),
    "LoKr of factors": lambda rng: values(rng, 0.5, lokr_w1=(4, 4), lokr_w2_a=(12, 1), lokr_w2_b=(1, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_every_kind(tmp_path, rng, kind):
    from peft import PeftModel

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"a": torch.nn.Linear(16, 48)}) for _ in range(3)])
            self.proj_out = torch.nn.Linear(16, 48)

    torch.manual_seed(4)
    model = Blocks()
    modules = {f"diffusion_model.{name}": KINDS[kind](rng) for name in ("blocks.0.a", "blocks.2.a", "proj_out")}
    for name, tensors in modules.items():
        if "alpha" in tensors and name.endswith("proj_out"):
            tensors["alpha"] = numpy.array(3.25, "float32")
    source = write(tmp_path / "source.safetensors", {k.removeprefix("diffusion_model."): v for k, v in modules.items()})
    expected = merged_by_lycore(model, source, "", tmp_path)
    folder = tmp_path / "peft"
    folder.mkdir()
    report = lycore.convert(source, folder, to="peft")
    assert report["output"] == str(folder / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(model, folder)
    got = {key.removeprefix("base_model.model."): value for key, value in merged_by_peft(loaded).items()}
    same(got, expected)
    back = tmp_path / "back.safetensors"
    lycore.convert(folder / "adapter_model.safetensors", back, to="kohya")
    words = load_file(back)
    for name, tensors in modules.items():
        flat = "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
        for slot, value in tensors.items():
            numpy.testing.assert_array_equal(words[f"{flat}.{slot}"], value, err_msg=f"{name} {slot}")


def test_ia3_scales_as_in_peft(tmp_path):
    from peft import PeftModel

    torch.manual_seed(5)
    model = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"to_x": torch.nn.Linear(8, 6)})})
    w = numpy.array([0.5, -0.25, 2, 0, 1, 0, 0, -1], "float32")
    module = {"weight": w, "on_input": numpy.array(1.0, "float32")}
    source = write(tmp_path / "source.safetensors", {"lora_unet_attn_to_x": module})
    expected = merged_by_lycore(model, source, "", tmp_path)
    with pytest.raises(lycore.UnsupportedError, match="family"):
        lycore.convert(source, tmp_path / "x", to="peft")
    # As PEFT would have written it, to be written again.
    given, folder = tmp_path / "given", tmp_path / "peft"
    given.mkdir()
    folder.mkdir()
    save_file({"base_model.model.attn.to_x.ia3_l": w[None] + 1}, given / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["attn.to_x"], "feedforward_modules": ["attn.to_x"]}
    (given / "adapter_config.json").write_text(json.dumps(config))
    lycore.convert(given / "adapter_model.safetensors", folder, to="peft")
    loaded = PeftModel.from_pretrained(model, folder)
    got = {key.removeprefix("base_model.model."): value for key, value in merged_by_peft(loaded).items()}
    same(got, expected)
    back = tmp_path / "back.safetensors"
    lycore.convert(folder / "adapter_model.safetensors", back, to="kohya")
    numpy.testing.assert_array_equal(load_file(back)["lora_unet_attn_to_x.weight"], w)


def test_ranks_of_convolutions_in_lokr(tmp_path, rng):
    from peft import PeftModel

    torch.manual_seed(6)
    layers = {"conv": torch.nn.Conv2d(16, 32, 3), "line": torch.nn.Linear(16, 48)}
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict(layers)})
    modules = {
        "a.conv": values(rng, lokr_w1=(4, 4), lokr_w2_a=(8, 1), lokr_w2_b=(1, 4 * 9)),
        "a.line": values(rng, lokr_w1=(4, 4), lokr_w2=(12, 4)),
    }
    source = write(tmp_path / "source.safetensors", modules)
    expected = merged_by_lycore(model, source, "", tmp_path)
    folder = tmp_path / "peft"
    folder.mkdir()
    lycore.convert(source, folder, to="peft")
    loaded = PeftModel.from_pretrained(model, folder)
    got = {key.removeprefix("base_model.model."): value for key, value in merged_by_peft(loaded).items()}
    same(got, expected)


def test_command(tmp_path, rng):
    _, modules = flux(rng)
    source, out = write(tmp_path / "a.safetensors", modules), tmp_path / "b.safetensors"
    done = run_cli("convert", source, "--to", "comfyui", "-o", out, "--family", "Flux.1")
    assert done.returncode == 0, done.stderr
    assert "6 modules in the spelling of comfyui" in done.stdout
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight" in load_file(out)
    done = run_cli("convert", source, "--to", "diffusers", "-o", out, "--family", "Flux.1", "--json")
    report = json.loads(done.stdout)
    becomes = {m["module"]: m["becomes"] for m in report["modules"]}
    root = "transformer.transformer_blocks.0.attn"
    assert becomes["lora_unet_double_blocks_0_img_attn_qkv"] == [f"{root}.to_q", f"{root}.to_k", f"{root}.to_v"]
    done = run_cli("convert", source, "--to", "comfyui", "-o", out, "--family", "Flux 1")
    assert done.returncode == 1
    assert "no family" in done.stderr and "Flux.1" in done.stderr
    with pytest.raises(lycore.ArgumentError, match="it must be one of kohya, peft, diffusers, comfyui"):
        lycore.convert(source, out, to="onnx")
