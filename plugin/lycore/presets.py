"""LyCORIS' presets: which layers of a model get a module, told by the classes of the blocks in which they lie.

    network.attach(unet, preset="attn-mlp")

| preset                | layers                                                                               |
|-----------------------|--------------------------------------------------------------------------------------|
| full                  | of transformer and residual blocks, down- and upsamplers, text encoders; the first   |
|                       | and last convolution, the time embedding                                             |
| full-lin              | of these the Linear ones and 1x1 convolutions; no samplers                           |
| attn-mlp              | full-lin without residual blocks                                                     |
| attn-only             | of attention alone                                                                   |
| unet-only             | full without text encoders                                                           |
| unet-transformer-only | attn-mlp without text encoders                                                       |
| unet-convblock-only   | of residual blocks and samplers; the first and last convolution                      |
| ia3                   | keys, values and the end of the MLP; goes with `IA3` in the network's config         |

The facts are those of LyCORIS 4.1.3, which also takes along what is called PatchEmbed, FinalLayer and
TimestepEmbedding. Three things are wider here. Blocks of diffusers, transformers and ComfyUI that LyCORIS has no name
for are known. attn-only takes every class that ends in "Attention", and ia3 finds its names anywhere in a path: there
LyCORIS chooses nothing in models of diffusers. And in a model without any block that a preset knows, layers are chosen
by words of their paths, such as "attn" and "mlp"; by full all of them.

On top of it the config's `name_algo_map` says what each layer gets: {"*attn2*": {"algo": "none"}} leaves layers out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .errors import ArgumentError

if TYPE_CHECKING:
    import torch

# Names of classes; `*` stands for any text.
_TRANSFORMERS = (
    "Transformer2DModel",
    "*TransformerBlock",
    "*DiTBlock",
    "*DiTLayer",
    "*DoubleStreamBlock",
    "*SingleStreamBlock",
    "*WanAttentionBlock",
    "SpatialTransformer",
    "SpatialVideoTransformer",
    "JointBlock",
    "AceStepEncoderLayer",
    "TextFusionBlock",
    "Block",
)
# They stand beside blocks of any kind, and so do not tell that a model has those that are meant.
_ENDS = ("FinalLayer", "PatchEmbed", "TimestepEmbedding")
_RESIDUAL = ("ResnetBlock2D", "ResBlock", "VideoResBlock")
_SAMPLERS = ("Downsample2D", "Upsample2D", "Downsample", "Upsample")
_TEXT = (
    "CLIP*Attention",
    "CLIPMLP",
    "*T5Block",
    "BertLayer",
    "Gemma2*Attention*",
    "Gemma2MLP",
    "Qwen3*Attention*",
    "Qwen3MLP",
)
_ATTENTION = ("*Attention", "*Attention2")
# LyCORIS trains Anima's adapter of its text encoder only when it is asked to.
_NEVER = ("LLMAdapter*",)

# Paths of layers, in diffusers' models and in checkpoints.
_OUTER = ("conv_in", "conv_out", "input_blocks.0.0", "out.2")
_TIME = ("time_embedding.linear_[12]", "time_embed.[02]", "label_emb.0.[02]")
_KEYS_VALUES_MLP = ("*.to_k", "*.to_v", "*.ff.net.2", "*.k_proj", "*.v_proj", "*.mlp.fc2")

# Words of paths.
_ATTENTION_WORDS = frozenset({"attn", "attention"})
_TRANSFORMER_WORDS = _ATTENTION_WORDS | {"mlp", "ff", "ffn", "feed", "feedforward"}
_CONVOLUTION_WORDS = frozenset({"conv", "resnet", "resnets", "downsample", "upsample"})
_NO_WORDS = frozenset({"embed", "embedder", "embedding", "embeddings", "modulation"})
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

IA3 = {
    "algo": "ia3",
    "name_algo_map": {"*.ff.net.2": {"train_on_input": True}, "*.mlp.fc2": {"train_on_input": True}},
}
"""What belongs into the network's config beside the preset ia3: the MLP's end is scaled at its inputs."""


@dataclass(frozen=True)
class Preset:
    """Layers inside of `blocks` and `ends`, and those of `paths`."""

    blocks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    words: frozenset[str] | None = frozenset()
    """Where a model has none of `blocks`: layers with one of these words in their path. None: all layers."""
    text: bool = True
    """False: nothing by words in a text encoder."""
    kernels: bool = False
    """Convolutions with a kernel above 1 too."""


_UNET = _TRANSFORMERS + _RESIDUAL + _SAMPLERS
PRESETS = {
    "full": Preset(_UNET + _TEXT, _ENDS, _OUTER + _TIME, None, kernels=True),
    "full-lin": Preset(_TRANSFORMERS + _RESIDUAL + _TEXT, _ENDS, _TIME, None),
    "attn-mlp": Preset(_TRANSFORMERS + _TEXT, _ENDS, (), _TRANSFORMER_WORDS),
    "attn-only": Preset(_ATTENTION, (), (), _ATTENTION_WORDS),
    "unet-only": Preset(_UNET, _ENDS, _OUTER + _TIME, None, text=False, kernels=True),
    "unet-transformer-only": Preset(_TRANSFORMERS, _ENDS, (), _TRANSFORMER_WORDS, text=False),
    "unet-convblock-only": Preset(_RESIDUAL + _SAMPLERS, (), _OUTER, _CONVOLUTION_WORDS, text=False, kernels=True),
    "ia3": Preset(paths=_KEYS_VALUES_MLP),
}
"""The table: by name, what is chosen."""


def chooser(model: torch.nn.Module, name: str) -> Callable[[str, torch.nn.Module], bool]:
    """Whether the preset chooses a layer of `model`, by the layer's path. ArgumentError for a name without a preset."""
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, 1)
        hint = f"the nearest is {nearest[0]}" if nearest else f"there are {', '.join(PRESETS)}"
        raise ArgumentError(f"`{name}` is no preset.", hint=hint, key=name)
    preset = PRESETS[name]
    modules = list(model.named_modules())
    found, words = _inside(modules, preset.blocks), preset.words
    if found or (not preset.text and _inside(modules, _TEXT)):
        words = frozenset()
    found |= _inside(modules, preset.ends)
    never = _inside(modules, _NEVER)

    def chosen(path: str, layer: torch.nn.Module) -> bool:
        if path in never or not (preset.kernels or all(size == 1 for size in getattr(layer, "kernel_size", ()))):
            return False
        return path in found or _matches(path, preset.paths) or _says(path, words)

    return chosen


def _inside(modules: list[tuple[str, torch.nn.Module]], classes: tuple[str, ...]) -> set[str]:
    """The paths of what is inside of blocks of these classes, themselves included."""
    blocks = [(path, block) for path, block in modules if _matches(type(block).__name__, classes)]
    return {f"{path}.{inner}".strip(".") for path, block in blocks for inner, _ in block.named_modules()}


def _matches(text: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def _says(path: str, words: frozenset[str] | None) -> bool:
    if words is None:
        return True
    said = {word.lower() for word in _WORD.findall(path)}
    return not words.isdisjoint(said) and _NO_WORDS.isdisjoint(said)
