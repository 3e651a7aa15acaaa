"""Files by the oracles' own save paths, and the models that they are for. All values come from a seed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Read when lycoris is imported; without it, lycoris may choose fused kernels.
os.environ["LYCORIS_KERNEL_BACKEND"] = "torch"

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from lycoris import create_lycoris
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

BASE_STD, DELTA_STD = 0.05, 0.02
"""Of weights, and of what an adapter adds at strength 1: neither disappears in the other."""


class Layers(nn.Module):
    """One layer of every kind that an adapter can be on, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        attention = {"to_q": nn.Linear(72, 64), "to_out": nn.ModuleList([nn.Linear(64, 40, bias=False), nn.Identity()])}
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict(attention)})])
        self.time_emb_proj = nn.Linear(24, 96)
        self.line = nn.Conv1d(24, 32, 3, stride=2, padding=1)
        self.line_point = nn.Conv1d(40, 48, 1)
        self.plane = nn.Conv2d(20, 32, 3, stride=2, padding=1)
        self.plane_oblong = nn.Conv2d(16, 24, (3, 1), stride=(1, 2), padding=(1, 0))
        self.plane_point = nn.Conv2d(48, 56, 1)
        self.space = nn.Conv3d(12, 20, 3, stride=(1, 2, 1), padding=1)
        self.space_point = nn.Conv3d(32, 24, 1)

    def inputs(self) -> dict[str, torch.Tensor]:
        """By layer: something that it takes."""
        generator = torch.Generator().manual_seed(11)
        found = {}
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                found[name] = torch.randn(3, 5, layer.in_features, generator=generator)
            elif hasattr(layer, "kernel_size"):
                found[name] = torch.randn(2, layer.in_channels, *[7] * len(layer.kernel_size), generator=generator)
        return found


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with random weights and no gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms keep their 1 and 0, else a deep model's output says nothing.
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * BASE_STD)
    return model.requires_grad_(False).eval()


def randomise(modules: Mapping[str, tuple[list[nn.Parameter], float]], dtype: torch.dtype, seed: int = 2) -> None:
    """Factors (with their scale) such that deltas have DELTA_STD; values are numbers of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    for factors, scale in modules.values():
        rank = factors[0].shape[0]
        terms = rank ** (0.5 if len(factors) == 2 else 1.0)
        std = (DELTA_STD / (scale * terms)) ** (1 / len(factors))
        for factor in factors:
            factor.data = (torch.randn(factor.shape, generator=generator) * std).to(dtype).to(factor.dtype)


def lycoris_file(
    path: Path,
    host: nn.Module,
    *,
    rank: int,
    alpha: float,
    conv_rank: int,
    conv_alpha: float,
    dtype: torch.dtype = torch.float32,
    tucker: bool = False,
    algo: str = "lora",
) -> Path:
    """`LycorisNetwork.save_weights` after `create_lycoris` on a copy of the host."""
    network = create_lycoris(
        copy.deepcopy(host),
        1.0,
        linear_dim=rank,
        linear_alpha=alpha,
        conv_dim=conv_rank,
        conv_alpha=conv_alpha,
        algo=algo,
        use_tucker=tucker,
    )
    network.apply_to()
    modules = {}
    for lora in network.loras:
        down = [lora.lora_down.weight] + ([lora.lora_mid.weight] if lora.tucker else []) + [lora.lora_up.weight]
        modules[lora.lora_name] = (down, float(lora.scale))
    randomise(modules, dtype)
    network.save_weights(str(path), dtype, {"ss_network_module": "lycoris.kohya"})
    return path


def peft_model(host: nn.Module, config: LoraConfig, dtype: torch.dtype = torch.float32) -> PeftModel:
    """`get_peft_model` on a copy of the host, with random factors that are numbers of `dtype`."""
    model = get_peft_model(copy.deepcopy(host), config)
    randomise(dict(peft_factors(model)), dtype)
    return model.eval()


def peft_factors(model: nn.Module) -> Iterator[tuple[str, tuple[list[nn.Parameter], float]]]:
    """By layer: PEFT's factors and scale."""
    for name, layer in model.named_modules():
        if getattr(layer, "lora_A", None):
            factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            yield name, (factors, layer.scaling["default"])


def peft_folder(folder: Path, model: PeftModel, dtype: torch.dtype = torch.float32) -> Path:
    """`PeftModel.save_pretrained`; returns the file, beside which the config lies."""
    stored = copy.deepcopy(model)
    for _, (factors, _) in peft_factors(stored):
        for factor in factors:
            factor.data = factor.data.to(dtype)
    stored.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def peft_config(file: Path) -> dict[str, Any]:
    """The config beside a PEFT file."""
    return json.loads((file.parent / "adapter_config.json").read_text())


def tiny_unet(linear_projection: bool) -> UNet2DConditionModel:
    """SD1.5's U-Net (or SD2's, whose attention projects with Linear layers) with two levels of 32 and 64 channels."""
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        use_linear_projection=linear_projection,
    )
    return filled(model)


def tiny_text_encoder() -> CLIPTextModel:
    """CLIP with two layers of 32 channels."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16}
    special = {"bos_token_id": 97, "eos_token_id": 98}
    return filled(CLIPTextModel(CLIPTextConfig(num_hidden_layers=2, num_attention_heads=4, **sizes, **special)), 3)


def run_unet(unet: nn.Module) -> torch.Tensor:
    """The output for one fixed input."""
    generator = torch.Generator().manual_seed(5)
    latents, context = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 6, 32)))
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 700]), context).sample


def run_text_encoder(model: nn.Module) -> torch.Tensor:
    """The output for one fixed prompt."""
    with torch.no_grad():
        return model(torch.tensor([[97, 5, 17, 60, 98]])).last_hidden_state


def diffusers_folder(
    folder: Path,
    adapters: Mapping[str, tuple[nn.Module, LoraConfig]],
    *,
    metadata: bool,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """`StableDiffusionPipeline.save_lora_weights`, as diffusers' training scripts call it; returns the file.

    `adapters` maps "unet" and "text_encoder" to the model, which gets the adapter added, and its LoraConfig.
    """
    layers = {}
    for component, (model, config) in adapters.items():
        model.add_adapter(config)
        randomise(dict(peft_factors(model)), dtype)
        state = get_peft_model_state_dict(model)
        layers[f"{component}_lora_layers"] = {key: value.to(dtype) for key, value in state.items()}
    told = _collate_lora_metadata({name: model for name, (model, _) in adapters.items()}) if metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **told)
    return folder / "pytorch_lora_weights.safetensors"


BLOCKS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.attentions.0.": "input_blocks.1.1.",
    "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.upsamplers.0.": "output_blocks.1.1.",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.attentions.0.": "output_blocks.2.1.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "up_blocks.1.attentions.1.": "output_blocks.3.1.",
}
RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}


def checkpoint_name(name: str) -> str:
    """A name of `tiny_unet` as a checkpoint spells it. A test checks this with diffusers' own converter."""
    block = next(b for b in BLOCKS if name.startswith(b))
    rest = name.removeprefix(block)
    if ".resnets." in f".{block}":
        part = next(p for p in RESNET if rest.startswith(p))
        rest = RESNET[part] + rest.removeprefix(part)
    return f"model.diffusion_model.{BLOCKS[block]}{rest}"
