"""Presets choose the layers that LyCORIS chooses, and the right ones in models that LyCORIS does not know."""

from __future__ import annotations

import logging

import pytest
from safetensors.torch import load_file
from torch import nn

import lycore
from lycore.presets import IA3, PRESETS

U_NET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
# Where LyCORIS' own words find nothing in models of diffusers: what they mean there.
MEANT = {
    "attn-only": {"unet_target_module": ["Attention"]},
    "ia3": {
        "unet_target_name": [r".*\.to_k", r".*\.to_v", r".*\.ff\.net\.2"],
        "text_encoder_target_name": [r".*\.k_proj", r".*\.v_proj", r".*\.mlp\.fc2"],
        "name_algo_map": {},
    },
}
# Of LyCORIS' class, by the keys of a preset.
ATTRIBUTES = {
    "enable_conv": "ENABLE_CONV",
    "target_module": "TARGET_REPLACE_MODULE",
    "target_name": "TARGET_REPLACE_NAME",
    "name_algo_map": "NAME_ALGO_MAP",
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    text = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
    )
    return {
        "sd15": diffusers.UNet2DConditionModel(**U_NET),
        "sdxl": diffusers.UNet2DConditionModel(**(U_NET | SDXL)),
        "clip": transformers.CLIPTextModelWithProjection(text),
    }


def lycoris_layers(model: nn.Module, preset: dict, half: str, norms: bool) -> set[str]:
    """What LyCORIS puts modules on, as names in its file. `half` is "unet" or "text_encoder".

    Its `create_lycoris` reads only a part of the built-in presets, so they are given as what `apply_preset` reads; it
    keeps them in attributes of the class.
    """
    network = pytest.importorskip("lycoris.wrapper", reason="needs lycoris").LycorisNetwork
    chosen = {key: preset[f"{half}_{key}"] for key in ("target_module", "target_name")}
    before = {key: getattr(network, attribute) for key, attribute in ATTRIBUTES.items()}
    logging.disable(logging.WARNING)
    try:
        network.apply_preset({"name_algo_map": {}, **preset, **chosen})
        made = network(model, train_norm=norms).loras
    finally:
        logging.disable(logging.NOTSET)
        network.apply_preset(before)
    return {module.lora_name.removeprefix("lycoris_") for module in made}


def our_layers(model: nn.Module, preset: str, **config: object) -> set[str]:
    """What `attach` puts modules on, spelled as LyCORIS does."""
    network = lycore.Network({"network_dim": 4, **config})
    try:
        return {name.replace(".", "_") for name in network.attach(model, preset=preset)}
    except lycore.AdapterKeyError as nothing:
        assert f"layers matches '{preset}'" in nothing.message
        return set()
    finally:
        network.close()


@pytest.mark.parametrize("norms", [False, True], ids=["", "train_norm"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "clip"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_layers_are_those_of_lycoris(models, preset, name, norms):
    config = pytest.importorskip("lycoris.config", reason="needs lycoris")
    assert set(PRESETS) == set(config.PRESET)
    half = "text_encoder" if name == "clip" else "unet"
    words = config.PRESET[preset]
    if f"{half}_target_module" in MEANT.get(preset, {}) or f"{half}_target_name" in MEANT.get(preset, {}):
        assert lycoris_layers(models[name], words, half, norms) == set(), "LyCORIS has mended its preset"
        words = words | MEANT[preset]
    expected = lycoris_layers(models[name], words, half, norms)
    assert our_layers(models[name], preset, train_norm=norms) == expected
    # No two empty sets, but where the preset leaves text encoders out.
    assert bool(expected) == (name != "clip" or not preset.startswith("unet-"))


def test_the_config_says_what_each_layer_of_a_preset_gets(models):
    """By pattern, on top of a preset: another algorithm, or no module at all."""
    every = our_layers(models["sdxl"], "attn-only")
    half = our_layers(models["sdxl"], "attn-only", name_algo_map={"*attn2*": {"algo": "none"}})
    assert half == {name for name in every if "attn2" not in name} and 0 < len(half) < len(every)


def test_ia3_goes_with_a_config_of_its_own(models, tmp_path):
    network = lycore.Network(IA3)
    network.attach(models["sd15"], preset="ia3")
    network.build()
    network.save(tmp_path / "ia3.safetensors")
    saved = load_file(tmp_path / "ia3.safetensors")
    on_input = {key.split(".")[0]: bool(value) for key, value in saved.items() if key.endswith("on_input")}
    network.close()
    assert {name.endswith("ff_net_2") for name, inputs in on_input.items() if inputs} == {True}
    assert {name[-4:] for name, inputs in on_input.items() if not inputs} == {"to_k", "to_v"}


def block(name: str, **layers: nn.Module) -> nn.Module:
    """A module of a class of this name."""
    made = type(name, (nn.Module,), {})()
    for key, layer in layers.items():
        made.add_module(key, layer)
    return made


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3)


def u_net_of_comfyui() -> nn.Module:
    attention = block("CrossAttention", to_q=linear())
    transformer = block("SpatialTransformer", proj_in=linear(), t=block("BasicTransformerBlock", attn1=attention))
    stages = nn.ModuleList(
        [
            nn.ModuleList([conv()]),
            nn.ModuleList([block("ResBlock", in_layers=conv(), emb=linear()), transformer]),
            nn.ModuleList([block("Downsample", op=conv())]),
        ]
    )
    return block(
        "UNetModel", time_embed=nn.Sequential(linear(), nn.SiLU(), linear()), input_blocks=stages, other=linear()
    )


def flux_of_comfyui() -> nn.Module:
    attention = block("SelfAttention", qkv=linear())
    double = block("DoubleStreamBlock", img_attn=attention, img_mod=linear())
    single = block("SingleStreamBlock", linear1=linear())
    return block("Flux", img_in=linear(), double_blocks=nn.ModuleList([double]), single_blocks=nn.ModuleList([single]))


def anima() -> nn.Module:
    inner = block("TransformerBlock", self_attn=block("Attention", q_proj=linear()))
    trunk = block("Block", self_attn=block("Attention", q_proj=linear()), adaln=linear())
    return block("Anima", blocks=nn.ModuleList([trunk]), llm_adapter=block("LLMAdapter", block=inner, out=linear()))


def unknown() -> nn.Module:
    layer = block("Layer", self_attn=block("Mixer", q=linear()), mlp=nn.ModuleList([linear()]), conv=conv())
    embedder = block("TimestepEmbedding", mlp=linear())
    return block("Model", layers=nn.ModuleList([layer]), t_embedder=embedder, head=linear())


RES = ["input_blocks.1.0.in_layers", "input_blocks.1.0.emb"]
SPATIAL = ["input_blocks.1.1.proj_in", "input_blocks.1.1.t.attn1.to_q"]
DOUBLE = ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod"]
TIME = ["time_embed.0", "time_embed.2"]


@pytest.mark.parametrize(
    ("model", "preset", "expected"),
    [
        (u_net_of_comfyui, "full", [*TIME, "input_blocks.0.0", *RES, *SPATIAL, "input_blocks.2.0.op"]),
        (u_net_of_comfyui, "full-lin", [*TIME, RES[1], *SPATIAL]),
        (u_net_of_comfyui, "attn-mlp", SPATIAL),
        (u_net_of_comfyui, "attn-only", SPATIAL[1:]),
        (u_net_of_comfyui, "unet-convblock-only", ["input_blocks.0.0", *RES, "input_blocks.2.0.op"]),
        (flux_of_comfyui, "attn-mlp", [*DOUBLE, "single_blocks.0.linear1"]),
        (flux_of_comfyui, "attn-only", DOUBLE[:1]),
        (anima, "attn-mlp", ["blocks.0.self_attn.q_proj", "blocks.0.adaln"]),
        (anima, "attn-only", ["blocks.0.self_attn.q_proj"]),
        (unknown, "full", ["layers.0.self_attn.q", "layers.0.mlp.0", "layers.0.conv", "t_embedder.mlp", "head"]),
        (unknown, "attn-mlp", ["layers.0.self_attn.q", "layers.0.mlp.0", "t_embedder.mlp"]),
        (unknown, "attn-only", ["layers.0.self_attn.q"]),
        (unknown, "unet-convblock-only", ["layers.0.conv"]),
    ],
)  # fmt: skip
def test_other_models_by_the_classes_of_their_blocks_or_by_words(model, preset, expected):
    assert lycore.Network().attach(model(), preset=preset) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "attn_mlp"}, "`attn_mlp` is no preset.*the nearest is attn-mlp"),
        ({"preset": "everything"}, "there are full, full-lin"),
        ({"preset": "full", "targets": "*"}, "both say which layers"),
    ],
)
def test_what_a_preset_cannot_be_is_told(arguments, message):
    layer = nn.Sequential(linear())
    with pytest.raises(lycore.ArgumentError, match=message):
        lycore.Network().attach(layer, **arguments)
    assert not layer[0]._forward_hooks


def test_a_preset_that_finds_nothing_names_itself():
    with pytest.raises(lycore.AdapterKeyError, match="None of 1 layers matches 'attn-only'"):
        lycore.Network().attach(nn.Sequential(linear()), preset="attn-only")
