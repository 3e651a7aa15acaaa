"""A real ComfyUI, for the tests that need one: COMFYUI_DIR names the tree, whose requirements must be importable;
COMFYUI_DEVICE=cuda lets it use the GPU. The models have real architectures with few channels and random weights, made
in the process; the text encoder is CLIP-L with two narrow layers.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import fakes
import pytest
import torch

COMFYUI = os.environ.get("COMFYUI_DIR")
skipped = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR does not name a ComfyUI tree")

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
}
CLIP = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def comfy():
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = os.environ.get("COMFYUI_DEVICE", "cpu") == "cpu"
    import comfy.lora
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.utils

    yield comfy
    sys.path.remove(COMFYUI)


@pytest.fixture(scope="module")
def world(comfy, tmp_path_factory):
    """The tree with the node in it, a folder of LoRAs, and makers of models."""
    import folder_paths

    loras = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(loras), is_default=True)
    nodes = fakes.load_node().NODE_CLASS_MAPPINGS

    def model(dtype=torch.float32, seed=0):
        config = comfy.supported_models.SD15(dict(UNET))
        config.set_inference_dtype(dtype, None)
        made = config.get_model({}, device="cpu")
        fill(made, seed)
        return comfy.model_patcher.ModelPatcher(made, torch.device("cpu"), torch.device("cpu"))

    def clip(seed=1):
        target = SimpleNamespace(clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer, params={})
        options = {"clip_l_model_config": CLIP, "dtype": torch.float32}
        made = comfy.sd.CLIP(target, model_options=options)
        fill(made.cond_stage_model, seed)
        return made

    node, train = nodes["LyCoreLoraStack"], nodes["LyCoreTrain"]
    return SimpleNamespace(comfy=comfy, loras=loras, node=node, train=train, model=model, clip=clip)


def fill(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        values = torch.randn(weight.shape, generator=generator) / max(1, weight[0].numel() if weight.ndim else 1) ** 0.5
        weight.data.copy_(values)
