"""What a run of training needs before it begins, from the node's inputs: everything that can be wrong is said here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sample
import torch

from .library import NodeError
from .names import Targets

ALGORITHMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora_wd": True},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "diag-oft": {"algo": "diag-oft"},
    "full": {"algo": "full"},
}
"""Choice -> what it sets of the config of `lycore.Network`."""

_ATTENTION = ("*attn*", "*attention*", "*single_blocks.*.linear*")
_MLP = ("*.ff*", "*mlp*", "*feed_forward*")
_NEITHER = ("*embed*", "*modulation*")
LAYERS = {"attn-mlp": (_ATTENTION + _MLP, _NEITHER), "attn-only": (_ATTENTION, _NEITHER), "full": (("*",), ())}
"""LyCORIS' presets -> patterns of layer names, as the models of ComfyUI have them; and of those that are left out."""

OPTIMIZERS = {
    "AdamW": 1e-4,
    "AdamW8bit": 1e-4,
    "Lion": 3e-5,
    "CAME": 1e-4,
    "Adafactor": None,
    "Prodigy": 1.0,
    "DAdaptAdam": 1.0,
    "DAdaptLion": 1.0,
    "AdamWScheduleFree": 1e-4,
    "RAdamScheduleFree": 1e-4,
    "SGDNesterov": 1e-2,
}
"""Choice -> a rate to begin with; None: it has a schedule of its own."""

_FRESH = {
    getattr(getattr(comfy.ops, family, None), kind, None)
    for family in ("disable_weight_init", "manual_cast")
    for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d")
}
"""ComfyUI's own layers, whose forward gives the result of torch's function for them, and keeps nothing. These classes
alone: those that other nodes derive from them, and those for other kernels, may do otherwise."""

_PARTIAL = ("area", "mask", "control", "gligen", "hooks")


def samples(model: Any, latents: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Every latent by itself, [1, ..]."""
    wanted = model.get_model_object("latent_format").latent_channels
    found: list[torch.Tensor] = []
    for number, latent in enumerate(latents, 1):
        batch = latent["samples"]
        if type(batch) is not torch.Tensor:
            raise NodeError(f"latents {number} are a {type(batch).__name__}, which cannot be trained on")
        if latent.get("noise_mask") is not None:
            raise NodeError(f"latents {number} have a mask, and training does not know masks. Hint: take it off")
        batch = comfy.sample.fix_empty_latent_channels(model, batch)
        if batch.shape[1] != wanted:
            what = f"latents {number} have {batch.shape[1]} channels, and this model takes {wanted}"
            raise NodeError(f"{what}. Hint: encode the pictures with this model's VAE")
        found += [batch[row : row + 1] for row in range(len(batch))]
    if not found:
        raise NodeError("there are no latents")
    return found


def conditions(positive: list[list[Any]], count: int) -> list[Any]:
    """One conditioning per latent, as ComfyUI's [tensor, dict]."""
    found = [entry for each in positive for entry in each]
    for number, (tensor, more) in enumerate(found, 1):
        odd = [key for key in _PARTIAL if more.get(key) is not None]
        odd += ["timestep range"] * (more.get("start_percent", 0.0) > 0.0 or more.get("end_percent", 1.0) < 1.0)
        if odd:
            raise NodeError(f"conditioning {number} has {', '.join(odd)}. Hint: connect the encoded text itself")
        if tensor is not None and tensor.shape[0] != 1:
            raise NodeError(f"conditioning {number} holds {tensor.shape[0]} texts. Hint: encode them one by one")
    if len(found) not in (1, count):
        raise NodeError(f"there are {count} latents and {len(found)} conditionings. Hint: connect one, or {count}")
    return found * count if len(found) == 1 else found


def compute_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """What the model computes in."""
    if mixed_precision == "auto":
        bf16 = device.type == "cuda" and comfy.model_management.should_use_bf16(device)
        return torch.bfloat16 if bf16 else torch.float32
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def network(lycore: Any, asked: dict[str, Any], dtype: torch.dtype) -> Any:
    """The network of the fields and of `options`; NodeError with all that is wrong with them."""
    fields = {
        "network_dim": asked["rank"],
        "learning_rate": asked["learning_rate"] or OPTIMIZERS[asked["optimizer"]],
        "optimizer_type": asked["optimizer"],
        "gradient_accumulation_steps": asked["gradient_accumulation_steps"],
        "max_train_steps": asked["steps"],
        "seed": asked["seed"],
        "mixed_precision": "bf16" if dtype == torch.bfloat16 else "no",
        "output_name": os.path.basename(asked["name"]),
        **ALGORITHMS[asked["algorithm"]],
    }
    problems = []
    try:
        more = json.loads(asked["options"].strip() or "{}")
        if not isinstance(more, dict):
            raise ValueError("an object in braces is wanted")
    except ValueError as problem:
        problems.append(f"`options` is not JSON: {problem}")
        more = {}
    problems += [f"`{key}` stands in `options`, and has a field of its own" for key in more if key in fields]
    try:
        made = lycore.Network({k: v for k, v in (more | fields).items() if v is not None})
    except lycore.LycoreError as problem:
        problems.append(str(problem))
    if problems:
        raise NodeError("; ".join(problems))
    return made


def patcher(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a ModelPatcher that computes in `dtype` and keeps its weights in place from forward to backward."""
    try:
        dynamic = getattr(model, "is_dynamic", bool)()
        # Dynamic VRAM may take a weight away between forward and backward.
        copy = model.clone(disable_dynamic=True) if dynamic else model.clone()
    except Exception as problem:
        hint = "start ComfyUI with --disable-dynamic-vram"
        raise NodeError(f"this model has no form without dynamic VRAM: {problem}. Hint: {hint}") from problem
    copy.set_model_compute_dtype(dtype)
    return copy


def attach(lycore: Any, network: Any, patcher: Any, asked: dict[str, Any]) -> list[Any]:
    """Puts modules on the chosen layers of the diffusion model, under names that loaders know; returns those layers."""
    own = asked["layer_patterns"].split()
    chosen, left_out = (own, ()) if own else LAYERS[asked["layers"]]
    targets = Targets(patcher)
    able = [
        (path, layer)
        for path, layer in patcher.model.diffusion_model.named_modules()
        if getattr(getattr(layer, "weight", None), "ndim", 0) >= 2
    ]
    layers, without = [], []
    for path, layer in able:
        if _matches(path, chosen) and not _matches(path, left_out):
            try:
                name = targets.file_name(f"diffusion_model.{path}.weight")
                network.add(name, layer, fresh=type(layer) in _FRESH)
                layers.append(layer)
            except lycore.UnsupportedError:
                without.append(path)
    if without:
        logging.getLogger("lycore").info("%d layers cannot have an adapter: %s", len(without), ", ".join(without))
    if not layers:
        example = f"; names look like `{able[-1][0]}`" if able else ""
        raise NodeError(f"none of {len(able)} layers matches {' '.join(chosen)}{example}")
    return layers


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
