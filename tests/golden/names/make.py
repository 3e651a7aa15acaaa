"""Makes the lists of weights that the tests of src/names read.

    python make.py --comfyui PATH [family ...]

For each family: the checkpoint's weights as ComfyUI's class has them (Flux.2: as diffusers' converter reads them), the
weights of diffusers' class, and from which rows of which weight of the checkpoint diffusers' converter takes each.
Every number in the checkpoint names its weight and its row, so the rows are read off the converter's result. Widths
are those of the published models; blocks are few.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights

HERE = Path(__file__).parent
ROW = 1 << 24  # more than any weight has rows


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(build, **config):
    with init_empty_weights():
        return shapes(build(**config))


def numbered(checkpoint, prefix=""):
    """Tensors of one column whose entries tell weight and row."""
    tensors = {}
    for number, (name, shape) in enumerate(checkpoint.items()):
        tensor = number * ROW + torch.arange(shape[0] if shape else 1, dtype=torch.float64)
        tensors[prefix + name] = tensor.reshape([-1] + [1] * (len(shape) - 1))
    return tensors


def runs(numbers):
    """[[first, count]...] of consecutive numbers."""
    found = []
    for n in numbers:
        if found and n == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([n, 1])
    return found


def table(checkpoint, diffusers, converted):
    """Diffusers' weights with their source; what the converter makes has to be what the class has."""
    missing = set(diffusers) ^ set(converted)
    assert not missing, sorted(missing)[:8]
    names = list(checkpoint)
    lines = []
    for name, shape in diffusers.items():
        entries = converted[name].flatten().to(torch.int64)
        (source,) = (entries // ROW).unique().tolist()
        rows = runs((entries % ROW).tolist())
        assert sum(count for _, count in rows) == (shape[0] if shape else 1), name
        whole = rows == [[0, (checkpoint[names[source]] or [1])[0]]]
        lines.append([name, shape, source, None if whole else rows])
    return lines


def few(checkpoint, lines):
    """Without biases, except those of fused weights, and without what diffusers does not have."""
    keep = [line for line in lines if not line[0].endswith(".bias") or line[3]]
    used = sorted({line[2] for line in keep})
    place = {source: at for at, source in enumerate(used)}
    names = list(checkpoint)
    return [[names[i], checkpoint[names[i]]] for i in used], [[n, s, place[i], r] for n, s, i, r in keep]


def flux1(comfy):
    import diffusers
    from comfy.ldm.flux.model import Flux
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as convert

    checkpoint = on_meta(
        Flux, **comfy, in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072,
        mlp_ratio=4.0, num_heads=24, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
        guidance_embed=True, patch_size=2,
    )  # fmt: skip
    model = on_meta(diffusers.FluxTransformer2DModel, num_layers=2, num_single_layers=2, guidance_embeds=True)
    return checkpoint, model, convert(numbered(checkpoint))


def chroma(comfy):
    import diffusers
    from comfy.ldm.chroma.model import Chroma
    from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers as convert

    checkpoint = on_meta(
        Chroma, **comfy, in_channels=64, out_channels=64, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
        num_heads=24, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
        patch_size=2, in_dim=64, out_dim=3072, hidden_dim=5120, n_layers=5,
    )  # fmt: skip
    model = on_meta(diffusers.ChromaTransformer2DModel, num_layers=2, num_single_layers=2)
    return checkpoint, model, convert(numbered(checkpoint))


def flux2(width, heads, text):
    """Black Forest Labs' names; that they are complete and right is what the converter's result shows."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as convert

    guided = width == 6144
    checkpoint = {
        "img_in.weight": [width, 128],
        "txt_in.weight": [width, text],
        "time_in.in_layer.weight": [width, 256],
        "time_in.out_layer.weight": [width, width],
        "double_stream_modulation_img.lin.weight": [6 * width, width],
        "double_stream_modulation_txt.lin.weight": [6 * width, width],
        "single_stream_modulation.lin.weight": [3 * width, width],
        "final_layer.adaLN_modulation.1.weight": [2 * width, width],
        "final_layer.linear.weight": [128, width],
    }
    if guided:
        checkpoint["guidance_in.in_layer.weight"] = [width, 256]
        checkpoint["guidance_in.out_layer.weight"] = [width, width]
    for n in range(2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{n}.{stream}"
            checkpoint[f"{block}_attn.qkv.weight"] = [3 * width, width]
            checkpoint[f"{block}_attn.proj.weight"] = [width, width]
            checkpoint[f"{block}_attn.norm.query_norm.scale"] = [128]
            checkpoint[f"{block}_attn.norm.key_norm.scale"] = [128]
            checkpoint[f"{block}_mlp.0.weight"] = [6 * width, width]
            checkpoint[f"{block}_mlp.2.weight"] = [width, 3 * width]
        block = f"single_blocks.{n}"
        checkpoint[f"{block}.linear1.weight"] = [9 * width, width]
        checkpoint[f"{block}.linear2.weight"] = [width, 4 * width]
        checkpoint[f"{block}.norm.query_norm.scale"] = [128]
        checkpoint[f"{block}.norm.key_norm.scale"] = [128]
    model = on_meta(
        diffusers.Flux2Transformer2DModel, num_layers=2, num_single_layers=2, num_attention_heads=heads,
        joint_attention_dim=text, guidance_embeds=guided,
    )  # fmt: skip
    return checkpoint, model, convert(numbered(checkpoint))


def sd3(comfy, depth, dual):
    import diffusers
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    width, blocks = 64 * depth, 3
    checkpoint = on_meta(
        MMDiT, **comfy, input_size=None, patch_size=2, in_channels=16, depth=depth, num_blocks=blocks, qk_norm="rms",
        pos_embed_max_size=192, num_patches=36864, adm_in_channels=2048, context_size=4096,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}},
        x_block_self_attn_layers=dual,
    )  # fmt: skip
    # ComfyUI counts the last block by `depth`; the published file has no more of it than its norm and its q, k and v.
    last = f"joint_blocks.{blocks - 1}.context_block."
    keep = ("adaLN_modulation", "attn.qkv", "attn.ln_")
    checkpoint = {
        name: shape for name, shape in checkpoint.items()
        if not name.startswith(last) or name.removeprefix(last).startswith(keep)
    }  # fmt: skip
    for tail in ("weight", "bias"):
        checkpoint[f"{last}adaLN_modulation.1.{tail}"][0] = 2 * width
    model = on_meta(
        diffusers.SD3Transformer2DModel, num_layers=blocks, num_attention_heads=depth, caption_projection_dim=width,
        pos_embed_max_size=192, qk_norm="rms_norm", dual_attention_layers=tuple(dual),
    )  # fmt: skip
    return checkpoint, model, convert(numbered(checkpoint))


def unet(comfy, text, depths, linear, extra):
    import diffusers
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint as convert

    levels = len(depths)
    down = [depth for depth in depths for _ in range(2)]
    channels = [320, 640, 1280, 1280][:levels]
    checkpoint = on_meta(
        UNetModel, **comfy, image_size=32, in_channels=4, out_channels=4, model_channels=320,
        num_res_blocks=[2] * levels, channel_mult=[c // 320 for c in channels], transformer_depth=down,
        transformer_depth_output=[depth for depth in depths for _ in range(3)], transformer_depth_middle=max(depths),
        context_dim=text, num_head_channels=64, use_spatial_transformer=True, use_linear_in_transformer=linear,
        num_classes="sequential" if extra else None, adm_in_channels=extra,
    )  # fmt: skip
    config = {
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "cross_attention_dim": text,
        "use_linear_projection": linear,
        "layers_per_block": 2,
        "attention_head_dim": 8,
    }
    if extra:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": extra,
        }
    model = on_meta(diffusers.UNet2DConditionModel, **config)
    converted = convert(numbered(checkpoint, "model.diffusion_model."), {**config, "class_embed_type": None})
    keep = {name: shape for name, shape in model.items() if len(shape) > 1}
    return checkpoint, keep, {name: tensor for name, tensor in converted.items() if name in keep}


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--comfyui", required=True, help="a checkout of ComfyUI")
    args.add_argument("families", nargs="*")
    args = args.parse_args()
    sys.path.insert(0, args.comfyui)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ops

    host = {"operations": comfy.ops.disable_weight_init, "device": "meta", "dtype": torch.float32}
    families = {
        "flux1": lambda: flux1(host),
        "chroma": lambda: chroma(host),
        "flux2": lambda: flux2(6144, 48, 15360),
        "flux2_klein": lambda: flux2(3072, 24, 7680),
        "sd3": lambda: sd3(host, 24, []),
        "sd35_large": lambda: sd3(host, 38, []),
        "sd35_medium": lambda: sd3(host, 24, [0, 1]),
        # Two of the levels.
        "sd1": lambda: unet(host, 768, [1, 0], False, None),
        "sd2": lambda: unet(host, 1024, [1, 0], True, None),
        "sdxl": lambda: unet(host, 2048, [0, 2], True, 2816),
    }
    for name in args.families or families:
        checkpoint, model, converted = families[name]()
        weights, lines = few(checkpoint, table(checkpoint, model, converted))
        dump = lambda rows: ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)  # noqa: E731
        text = f'{{"checkpoint":[\n{dump(weights)}\n],"diffusers":[\n{dump(lines)}\n]}}\n'
        (HERE / f"{name}.json").write_text(text)
        print(f"{name}: {len(weights)} of the checkpoint, {len(lines)} of diffusers, {len(text)} bytes")


if __name__ == "__main__":
    main()
