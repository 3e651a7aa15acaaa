"""Writes and proves the weight lists of the newer model families.

    make_more.py --comfyui DIR [--check] [family ...]

For each family the diffusers class and ComfyUI's class (the release's layout) are made with two layers of each kind:
once with their real widths on the meta device, whose names and shapes are written to <family>.json, and once small
with random values. On the small one the table in src/names/<family>.rs is proved: it turns the diffusers weights into
exactly the names and shapes of ComfyUI's class, diffusers' own converter turns the result back into the same values,
and so does the table. What the table's marks say of shapes is compared with the real widths. `--check` compares the
files instead of writing them. Needs torch, torchvision, diffusers and a ComfyUI that has these families.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
TABLES = HERE.parents[2] / "src" / "names"
Weights = dict[str, Tensor]


# The tables, read from the Rust files.


@dataclass
class Row:
    diffusers: str
    checkpoint: str
    first: int = 0
    count: int = 1
    of: int = 1
    swapped: bool = False


@dataclass
class Table:
    rows: list[Row]
    also: list[tuple[str, str]]
    columns: list[tuple[str, list[int]]]
    ratios: list[tuple[str, int, int]]


ROW = re.compile(r'\b(row|rows|swapped)\(\s*"([^"]+)",\s*"([^"]+)"(?:,\s*(\d+),\s*(\d+),\s*(\d+))?,?\s*\)')
COLUMNS = re.compile(r'Mark::Columns\(\s*"([^"]+)",\s*&\[([^\]]*)\]')
RATIO = re.compile(r'Mark::Ratio\(\s*"([^"]+)",\s*(\d+),\s*(\d+)')
PAIR = re.compile(r'\(\s*"([^"]+)",\s*"([^"]+)",?\s*\)')


def read_table(family: str) -> Table:
    text = (TABLES / f"{family}.rs").read_text()
    text, marks = re.sub(r"^\s*//.*$", "", text, flags=re.M).split("\n};")[0].split("parts: &[")
    rows = []
    for kind, diffusers, checkpoint, first, count, of in ROW.findall(text):
        row = Row(diffusers, checkpoint, swapped=kind == "swapped")
        if kind == "rows":
            row.first, row.count, row.of = int(first), int(count), int(of)
        rows.append(row)
    also = PAIR.findall(text.split("also: &[", 1)[1])
    columns = [(pattern, [int(n) for n in numbers.split(",")]) for pattern, numbers in COLUMNS.findall(marks)]
    ratios = [(pattern, int(a), int(b)) for pattern, a, b in RATIO.findall(marks)]
    return Table(rows, also, columns, ratios)


def fit(pattern: str, to: str, name: str) -> str | None:
    """`name` with `pattern`'s words replaced by those of `to`, its numbers kept; None where it is another name."""
    expression = re.escape(pattern).replace(r"\{\}", r"(\d+)")
    found = re.fullmatch(expression, name)
    return found and to.format(*found.groups())


# Parameters that are not a layer's `weight`.
BARE = re.compile(r"(\.scale|modulation|scale_shift_table(_a2v_ca_\w+)?|emb_pos|pos_embed|pad_token)$")


def taken_apart(key: str) -> tuple[str, str]:
    base, dot, last = key.rpartition(".")
    return (base, dot + last) if last in ("weight", "bias") else (key, ".weight")


def key_of(base: str, suffix: str) -> str:
    return base if BARE.search(base) else base + suffix


def swap_halves(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(2)[::-1])


def to_checkpoint(table: Table, weights: Weights) -> Weights:
    out: Weights = {}
    pieces: dict[str, list[tuple[Row, Tensor]]] = {}
    for key, weight in weights.items():
        base, suffix = taken_apart(key)
        hits = [(row, name) for row in table.rows if (name := fit(row.diffusers, row.checkpoint, base))]
        assert len(hits) <= 1, f"{key} has {len(hits)} rows"
        if not hits:
            assert key not in out and key not in pieces, f"two weights want {key}"
            out[key] = weight
            continue
        ((row, name),) = hits
        pieces.setdefault(key_of(name, suffix), []).append((row, weight))
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0].first)
        at, unit = 0, sum(len(weight) for _, weight in parts) // parts[0][0].of
        for row, weight in parts:
            assert row.first == at and row.of == parts[0][0].of, (
                f"{key}: {row} does not start where the one before ends"
            )
            assert len(weight) == row.count * unit, f"{key}: {row} does not fit {tuple(weight.shape)}"
            at += row.count
        assert at == parts[0][0].of, f"{key}: {at} of {parts[0][0].of} parts"
        assert key not in out, f"two weights want {key}"
        whole = torch.cat([weight for _, weight in parts])
        out[key] = swap_halves(whole) if parts[0][0].swapped else whole
    return out


def to_diffusers(table: Table, weights: Weights) -> Weights:
    out: Weights = {}
    for key, weight in weights.items():
        base, suffix = taken_apart(key)
        hits = [(row, name) for row in table.rows if (name := fit(row.checkpoint, row.diffusers, base))]
        covered = [0] * (hits[0][0].of if hits else 1)
        for row, name in hits or [(Row(base, base), base)]:
            unit = len(weight) // row.of
            piece = weight[row.first * unit : (row.first + row.count) * unit] if row.of > 1 else weight
            name = key if not hits else key_of(name, suffix)
            assert name not in out, f"two weights want {name}"
            out[name] = swap_halves(piece) if row.swapped else piece
            for i in range(row.first, row.first + row.count):
                covered[i] += 1
        assert all(times == 1 for times in covered), f"{key}: its parts are covered {covered} times"
    return out


def in_release_spelling(table: Table, weights: Weights) -> Weights:
    """The same weights under the first other spelling that is of this layout, the attention's joined by `_`."""
    roots = {row.diffusers.split(".")[0] for row in table.rows}
    spellings = [(other, own) for other, own in table.also if other.split(".")[0] not in roots]
    out = {}
    for key, weight in weights.items():
        base, suffix = taken_apart(key)
        names = (name for other, own in spellings if (name := fit(own, other, base)))
        name = re.sub(r"_attn\.(qkv|proj)$", r"_attn_\1", next(names, base))
        out[key_of(name, suffix)] = weight
    return out


def in_table_spelling(table: Table, weights: Weights) -> Weights:
    """The same weights as the table's rows name them: ComfyUI's versions differ in some."""
    out = {}
    for key, weight in weights.items():
        base, suffix = taken_apart(key)
        names = (name for other, own in table.also if (name := fit(other, own, base)))
        out[key_of(next(names, base), suffix)] = weight
    return out


# The models.


@dataclass
class Family:
    diffusers: Callable[[bool], nn.Module]
    """The diffusers model; small when asked."""
    checkpoint: Callable[[bool], nn.Module]
    """The same in the release's layout."""
    converter: Callable[[Weights], Weights] | None
    """diffusers' own, from the release's layout."""
    only_checkpoint: set[str] = field(default_factory=set)
    """What the release has and nothing uses."""
    unconverted: tuple[str, ...] = ()
    """Beginnings of what the converter leaves under the release's names."""
    loader: str | None = None
    """The class of ComfyUI's supported_models that renames a release's weights when it loads them."""


def diffusers_class(name: str, **config) -> nn.Module:
    return getattr(importlib.import_module("diffusers"), name)(**config)


def comfyui_class(module: str, name: str, **config) -> nn.Module:
    import comfy.ops

    module_ = importlib.import_module(f"comfy.ldm.{module}")
    device = torch.get_default_device()
    return getattr(module_, name)(
        **config, device=device, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )


def converter(name: str, **numbers: int) -> Callable[[Weights], Weights]:
    """diffusers' converter, with the widths that its source has as numbers replaced for a small model."""
    source = inspect.getsource(getattr(single_file_utils, name))
    for word, number in numbers.items():
        source, times = re.subn(rf"(\b{word} = )\d+", rf"\g<1>{number}", source)
        assert times, f"{name} has no {word}"
    space = dict(vars(single_file_utils))
    exec(source, space)
    return space[name]


def wan(small: bool) -> dict[str, int]:
    return (
        {"heads": 2, "width": 256, "ffn": 320, "text": 96, "image": 64}
        if small
        else {"heads": 40, "width": 5120, "ffn": 13824, "text": 4096, "image": 1280}
    )


def wan_diffusers(small: bool) -> nn.Module:
    of = wan(small)
    return diffusers_class(
        "WanVACETransformer3DModel",
        num_attention_heads=of["heads"],
        attention_head_dim=of["width"] // of["heads"],
        in_channels=36,
        text_dim=of["text"],
        ffn_dim=of["ffn"],
        num_layers=2,
        image_dim=of["image"],
        added_kv_proj_dim=of["width"],
        vace_layers=[0, 1],
        pos_embed_seq_len=514,
    )


def wan_checkpoint(small: bool) -> nn.Module:
    of = wan(small)
    common = {"dim": of["width"], "ffn_dim": of["ffn"], "num_heads": of["heads"], "text_dim": of["text"]}
    model = comfyui_class(
        "wan.model", "VaceWanModel", model_type="vace", in_dim=36, num_layers=2, vace_layers=2, vace_in_dim=96, **common
    )
    # No release has both; one list of names serves all of them.
    i2v = comfyui_class(
        "wan.model", "WanModel", model_type="i2v", in_dim=36, num_layers=2, flf_pos_embed_token_number=514, **common
    )
    if i2v.img_emb.proj[1].in_features != of["image"]:
        i2v.img_emb = importlib.import_module("comfy.ldm.wan.model").MLPProj(
            of["image"],
            of["width"],
            flf_pos_embed_token_number=514,
            operation_settings={"operations": nn, "device": None, "dtype": torch.float32},
        )
    model.img_emb = i2v.img_emb
    model.blocks = i2v.blocks
    for vace, block in zip(model.vace_blocks, i2v.blocks, strict=True):
        vace.cross_attn = block.cross_attn
    return model


def hunyuan_class(**config) -> nn.Module:
    parameters = importlib.import_module("comfy.ldm.hunyuan_video.model").HunyuanVideoParams
    # What only the later models have, and only a later ComfyUI asks for.
    absent = {
        "byt5": False,
        "meanflow": False,
        "meanflow_sum": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
    }
    config |= {
        key: value
        for key, value in absent.items()
        if key in inspect.signature(parameters).parameters and key not in config
    }
    return comfyui_class(
        "hunyuan_video.model", "HunyuanVideo", mlp_ratio=4.0, depth=2, theta=256, qkv_bias=True, **config
    )


def hunyuan_diffusers(small: bool) -> nn.Module:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "text_embed_dim": 40,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }
    return diffusers_class(
        "HunyuanVideoTransformer3DModel",
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        **(size if small else {}),
    )


def hunyuan_checkpoint(small: bool) -> nn.Module:
    of = (
        {"hidden_size": 32, "num_heads": 2, "context_in_dim": 40, "vec_in_dim": 24, "axes_dim": [4, 6, 6]}
        if small
        else {"hidden_size": 3072, "num_heads": 24, "context_in_dim": 4096, "vec_in_dim": 768, "axes_dim": [16, 56, 56]}
    )
    return hunyuan_class(
        in_channels=16, out_channels=16, depth_single_blocks=2, patch_size=[1, 2, 2], guidance_embed=True, **of
    )


def hunyuan_later(name: str, width: int, heads: int, in_channels: int, single: int) -> Family:
    """HunyuanVideo 1.5 and HunyuanImage 2.1, with all that some of their releases have."""
    image = single > 0
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 40}
    small |= {"rope_axes_dim": (8, 8) if image else (4, 6, 6)}

    def diffusers(is_small: bool) -> nn.Module:
        config = small if is_small else {}
        config = config | ({"num_single_layers": 2, "guidance_embeds": True} if image else {"image_embed_dim": 1152})
        return diffusers_class(name, num_layers=2, use_meanflow=True, text_embed_2_dim=1472, **config)

    def checkpoint(is_small: bool) -> nn.Module:
        return hunyuan_class(
            hidden_size=32 if is_small else width,
            num_heads=2 if is_small else heads,
            axes_dim=[16 // 2] * 2
            if image and is_small
            else [64, 64]
            if image
            else [4, 6, 6]
            if is_small
            else [16, 56, 56],
            context_in_dim=40 if is_small else 3584,
            vec_in_dim=None,
            in_channels=in_channels,
            out_channels=64 if image else 32,
            patch_size=[1, 1] if image else [1, 1, 1],
            depth_single_blocks=single,
            guidance_embed=image,
            byt5=True,
            meanflow=True,
            use_cond_type_embedding=not image,
            vision_in_dim=None if image else 1152,
        )

    return Family(diffusers, checkpoint, None, loader="HunyuanVideo")


def ltx_diffusers(small: bool) -> nn.Module:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 48,
        "in_channels": 8,
        "out_channels": 8,
    }
    return diffusers_class("LTXVideoTransformer3DModel", num_layers=2, **(size if small else {}))


def ltx_checkpoint(small: bool) -> nn.Module:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 48,
        "in_channels": 8,
    }
    return comfyui_class("lightricks.model", "LTXVModel", num_layers=2, **(size if small else {}))


def ltx2_diffusers(small: bool) -> nn.Module:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "caption_channels": 48,
    }
    # What 2.3 added.
    later = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
    return diffusers_class("LTX2VideoTransformer3DModel", num_layers=2, **later, **(size if small else {}))


def ltx2_checkpoint(small: bool) -> nn.Module:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "caption_channels": 48,
    }
    model = comfyui_class(
        "lightricks.av_model",
        "LTXAVModel",
        num_layers=2,
        apply_gated_attention=True,
        cross_attention_adaln=True,
        **(size if small else {}),
    )
    del model.video_embeddings_connector, model.audio_embeddings_connector
    return model


def lumina_diffusers(small: bool) -> nn.Module:
    size = (
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "cap_feat_dim": 40,
        }
        if small
        else {"cap_feat_dim": 2304}
    )
    return diffusers_class("Lumina2Transformer2DModel", num_layers=2, num_refiner_layers=2, axes_lens=(8, 8, 8), **size)


def lumina_checkpoint(small: bool) -> nn.Module:
    size = (
        {"dim": 96, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 16, "axes_dims": [4, 6, 6], "cap_feat_dim": 40}
        if small
        else {"dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "cap_feat_dim": 2304}
    )
    return comfyui_class(
        "lumina.model",
        "NextDiT",
        patch_size=2,
        in_channels=16,
        n_layers=2,
        n_refiner_layers=2,
        qk_norm=True,
        axes_lens=[8, 8, 8],
        **size,
    )


def z_image_diffusers(small: bool) -> nn.Module:
    # The time embedding's width hangs on the model's in ComfyUI and not in diffusers, but for models as wide as this.
    size = {"dim": 1152, "n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48], "cap_feat_dim": 40} if small else {}
    return diffusers_class(
        "ZImageTransformer2DModel", n_layers=2, n_refiner_layers=2, axes_lens=[8, 8, 8], siglip_feat_dim=1152, **size
    )


def z_image_checkpoint(small: bool) -> nn.Module:
    size = (
        {"dim": 1152, "n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48], "cap_feat_dim": 40}
        if small
        else {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560}
    )
    return comfyui_class(
        "lumina.model",
        "NextDiT",
        patch_size=2,
        in_channels=16,
        n_layers=2,
        n_refiner_layers=2,
        qk_norm=True,
        axes_lens=[8, 8, 8],
        ffn_dim_multiplier=8 / 3,
        z_image_modulation=True,
        pad_tokens_multiple=32,
        siglip_feat_dim=1152,
        **size,
    )


def qwen_diffusers(small: bool) -> nn.Module:
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 40, "axes_dims_rope": (4, 6, 6)}
    return diffusers_class("QwenImageTransformer2DModel", num_layers=2, **(size if small else {}))


def qwen_checkpoint(small: bool) -> nn.Module:
    size = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 40, "axes_dims_rope": (4, 6, 6)}
    return comfyui_class("qwen_image.model", "QwenImageTransformer2DModel", num_layers=2, **(size if small else {}))


def anima_size(small: bool) -> dict[str, int]:
    return (
        {"heads": 2, "width": 64, "text": 40, "lora": 24}
        if small
        else {"heads": 16, "width": 2048, "text": 1024, "lora": 256}
    )


class WithConditioner(nn.Module):
    """diffusers' two models of the pipeline that one release file holds."""

    def __init__(self, transformer: nn.Module, conditioner: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text_conditioner = transformer, conditioner

    def state_dict(self) -> Weights:
        conditioner = {f"text_conditioner.{key}": weight for key, weight in self.text_conditioner.state_dict().items()}
        return self.transformer.state_dict() | conditioner


def anima_diffusers(small: bool) -> nn.Module:
    of = anima_size(small)
    transformer = diffusers_class(
        "CosmosTransformer3DModel",
        num_attention_heads=of["heads"],
        attention_head_dim=of["width"] // of["heads"],
        num_layers=2,
        text_embed_dim=of["text"],
        adaln_lora_dim=of["lora"],
        extra_pos_embed_type=None,
        concat_padding_mask=True,
    )
    text = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_attention_heads": 2} if small else {}
    return WithConditioner(transformer, diffusers_class("AnimaTextConditioner", num_layers=2, **text))


def anima_checkpoint(small: bool) -> nn.Module:
    of = anima_size(small)
    config = {
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": of["width"],
        "num_blocks": 2,
        "num_heads": of["heads"],
        "crossattn_emb_channels": of["text"],
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "use_adaln_lora": True,
        "adaln_lora_dim": of["lora"],
    }
    model = comfyui_class("anima.model", "Anima", **config)
    text = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_heads": 2} if small else {}
    model.llm_adapter = type(model.llm_adapter)(num_layers=2, **text, operations=nn)
    return model


FAMILIES = {
    "wan": Family(
        wan_diffusers,
        wan_checkpoint,
        converter("convert_wan_transformer_to_diffusers"),
        unconverted=("img_emb.emb_pos",),
    ),
    "hunyuan_video": Family(
        hunyuan_diffusers,
        hunyuan_checkpoint,
        converter("convert_hunyuan_video_transformer_to_diffusers", hidden_size=32),
        loader="HunyuanVideo",
    ),
    "hunyuan_video_15": hunyuan_later("HunyuanVideo15Transformer3DModel", 2048, 16, 65, 0),
    "hunyuan_image": hunyuan_later("HunyuanImageTransformer2DModel", 3584, 28, 64, 2),
    "ltx_video": Family(ltx_diffusers, ltx_checkpoint, converter("convert_ltx_transformer_checkpoint_to_diffusers")),
    "ltx2": Family(
        ltx2_diffusers,
        ltx2_checkpoint,
        converter("convert_ltx2_transformer_to_diffusers"),
        # Of 2.3; diffusers has them in its converter of LoRAs.
        unconverted=("prompt_adaln_single.", "audio_prompt_adaln_single."),
    ),
    "lumina2": Family(
        lumina_diffusers,
        lumina_checkpoint,
        # k and v: the source writes `k_dim = v_dim = 768`.
        converter("convert_lumina2_to_diffusers", q_dim=96, v_dim=32),
        only_checkpoint={"norm_final.weight"},
    ),
    "z_image": Family(
        z_image_diffusers, z_image_checkpoint, converter("convert_z_image_transformer_checkpoint_to_diffusers")
    ),
    "qwen_image": Family(qwen_diffusers, qwen_checkpoint, None),
    "anima": Family(anima_diffusers, anima_checkpoint, converter("convert_cosmos_transformer_checkpoint_to_diffusers")),
}


def on_meta(make: Callable[[bool], nn.Module]) -> Weights:
    with torch.device("meta"):
        return make(False).state_dict()


def randomised(make: Callable[[bool], nn.Module]) -> Weights:
    weights = make(True).state_dict()
    return {key: torch.rand_like(weight, dtype=torch.float32) for key, weight in weights.items()}


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in weights.items()}


def assert_same(what: str, got: Weights, wanted: Weights) -> None:
    assert got.keys() == wanted.keys(), f"{what}: {sorted(got.keys() ^ wanted.keys())}"
    for key, weight in wanted.items():
        assert torch.equal(got[key], weight), f"{what}: {key} differs"


def check_marks(table: Table, weights: Weights) -> None:
    """What the table says of shapes is true of the published model."""
    for pattern in {pattern for pattern, *_ in table.columns + table.ratios}:
        found = [weights[key] for key in weights if fit(pattern, "", key.removesuffix(".weight")) is not None]
        assert found, f"mark on {pattern}, which no weight has"
        for weight in found:
            rows, columns = weight.shape
            assert all(columns in numbers for other, numbers in table.columns if other == pattern), (
                f"{pattern} has {columns} columns"
            )
            assert all(rows * b == columns * a for other, a, b in table.ratios if other == pattern), (
                f"{pattern}: {rows} x {columns}"
            )


def prove(name: str, family: Family) -> dict[str, list]:
    table = read_table(name)
    small = randomised(family.diffusers)
    checkpoint = to_checkpoint(table, small)

    theirs = shapes(in_table_spelling(table, family.checkpoint(True).state_dict()))
    theirs = {key: shape for key, shape in theirs.items() if key not in family.only_checkpoint}
    ours = shapes(checkpoint)
    assert ours.keys() == theirs.keys(), f"ComfyUI's class: {sorted(ours.keys() ^ theirs.keys())}"
    wrong = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    assert not wrong, f"ComfyUI's class has other shapes: {wrong}"

    assert_same("the table, there and back", to_diffusers(table, checkpoint), small)
    release = checkpoint
    if family.loader:
        import comfy.supported_models

        release = in_release_spelling(table, checkpoint)
        load = getattr(comfy.supported_models, family.loader)
        renamed = load.process_unet_state_dict(None, dict(release))
        assert_same("ComfyUI's renaming", in_table_spelling(table, renamed), checkpoint)
    if family.converter:
        release = {key: weight for key, weight in release.items() if not key.startswith("llm_adapter.")}
        expected = {key: weight for key, weight in small.items() if not key.startswith("text_conditioner.")}
        converted = family.converter(dict(release))
        left = {key: converted.pop(key) for key in release if key.startswith(family.unconverted)}
        assert_same("diffusers' converter", converted | to_diffusers(table, left), expected)

    real = on_meta(family.diffusers)
    kept = in_table_spelling(table, on_meta(family.checkpoint))
    kept = {key: weight for key, weight in kept.items() if key not in family.only_checkpoint}
    real_checkpoint = shapes(to_checkpoint(table, real))
    assert real_checkpoint == shapes(kept), "real widths"
    check_marks(table, kept)
    used = {
        row.diffusers
        for row in table.rows
        if any(fit(row.diffusers, "", taken_apart(key)[0]) is not None for key in real)
    }
    print(
        f"{name}: {len(real)} weights of diffusers, {len(kept)} of the release; rows that no weight has:",
        [row.diffusers for row in table.rows if row.diffusers not in used] or "none",
    )
    unlisted = [
        key for key in real if not any(fit(r.diffusers, "", taken_apart(key)[0]) is not None for r in table.rows)
    ]
    assert not unlisted, f"not in the table: {unlisted}"
    return {
        side: [[key, list(shape)] for key, shape in shapes(w).items()]
        for side, w in (("diffusers", real), ("checkpoint", kept))
    }


def written(lists: dict[str, list]) -> str:
    sides = (
        f'"{side}": [\n' + ",\n".join(json.dumps(entry) for entry in entries) + "\n]" for side, entries in lists.items()
    )
    return "{\n" + ",\n".join(sides) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--check", action="store_true", help="compare the files instead of writing them")
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; all without one")
    args = parser.parse_args()

    sys.path.insert(0, str(args.comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    torch.manual_seed(0)
    for name in args.families or FAMILIES:
        text = written(prove(name, FAMILIES[name]))
        path = HERE / f"{name}.json"
        if args.check:
            assert path.read_text() == text, f"{path} is stale"
        else:
            path.write_text(text)


if __name__ == "__main__":
    main()
