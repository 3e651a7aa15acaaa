"""A small host that keeps ComfyUI's contract: what a node for LoRAs meets, with ComfyUI's names and behaviour.

Written from what the contract promises, not from ComfyUI's source: patches are lists of (strength, adapter, strength of
the weight, offset, function) per key; a loaded model remembers the uuid of its patches, and is unpatched and patched
again when a patcher with another one comes; adapters may be rebuilt from (loaded_keys, weights).
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import uuid
from pathlib import Path
from types import ModuleType

import torch
import train_fakes
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "plugin" / "comfyui"
HIDDEN = 8


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class WeightAdapterBase:
    multiplier = 1.0


def swap_halves(weight):
    """What ComfyUI does to SD3's last layer."""
    first, second = weight.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


class Unet(nn.Module):
    """Two attention layers in SD 1.5's layout, a convolution, and a fused q/k/v."""

    def __init__(self):
        super().__init__()
        block = "input_blocks.1.1.transformer_blocks.0"
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q"):
            self._add(f"{block}.{name}", nn.Linear(HIDDEN, 16 if name == "attn1.to_v" else HIDDEN, bias=False))
        self._add("input_blocks.1.0.in_layers.2", nn.Conv2d(4, HIDDEN, 3, padding=1))
        self._add("joint_blocks.0.attn.qkv", nn.Linear(HIDDEN, 3 * HIDDEN))
        self._add("final_layer.adaLN", nn.Linear(HIDDEN, 2 * HIDDEN))

    def _add(self, path, layer):
        at = self
        *parents, last = path.split(".")
        for name in parents:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at._modules[name]
        at.add_module(last, layer)


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.diffusion_model = Unet()
        self.to(dtype)
        self.patched_with = None


class TextEncoder(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.fc1 = nn.Linear(HIDDEN, 2 * HIDDEN)
        at = layer
        for name in ("0", "layers", "encoder", "text_model", "transformer", "clip_l"):
            outer = nn.Module()
            outer.add_module(name, at)
            at = outer
        self.clip_l = at.clip_l
        self.to(dtype)
        self.patched_with = None


def model_lora_keys_unet(model, key_map):
    for key in model.state_dict():
        name = key.removeprefix("diffusion_model.")
        if key.endswith(".weight"):
            key_map["lora_unet_" + name.removesuffix(".weight").replace(".", "_")] = key
            key_map[key.removesuffix(".weight")] = key
        else:
            key_map[key] = key
    fused = "diffusion_model.joint_blocks.0.attn.qkv.weight"
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        key_map[f"transformer.transformer_blocks.0.attn.{part}"] = (fused, (0, number * HIDDEN, HIDDEN))
    swapped = "diffusion_model.final_layer.adaLN.weight"
    key_map["transformer.norm_out.linear"] = (swapped, None, swap_halves)
    # ComfyUI's maps name weights that a model may lack, and slices that it does not have.
    key_map["transformer.too_far"] = (fused, (0, 3 * HIDDEN, HIDDEN))
    key_map["transformer.nothing"] = (fused, (0, 0, 0))
    key_map["lora_unet_nowhere"] = "diffusion_model.nowhere.weight"
    return key_map


def model_lora_keys_clip(model, key_map):
    path = "text_model.encoder.layers.0.mlp.fc1"
    key_map[f"lora_te_{path.replace('.', '_')}"] = f"clip_l.transformer.{path}.weight"
    return key_map


def calculate_weight(entries, weight, key, intermediate_dtype=torch.float32):
    """What the host does with a weight's patches, in place."""
    for strength, adapter, strength_model, offset, function in entries:
        part = weight if offset is None else weight.narrow(*offset)
        if strength_model != 1.0:
            part *= strength_model
        apply = function if function is not None else (lambda a: a)
        adapter.calculate_weight(part, key, strength, strength_model, offset, apply, intermediate_dtype, None)
    return weight


def prefetched(value):
    """An adapter as the host rebuilds it around tensors that were moved into one buffer."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, prefetched(value.weights))
    if isinstance(value, (tuple, list)):
        return type(value)(prefetched(item) for item in value)
    return value


class Patcher:
    """ModelPatcher."""

    def __init__(self, model, device="cpu"):
        self.model = model
        self.patches = {}
        self.backup = {}
        self.patches_uuid = uuid.uuid4()
        self.load_device = torch.device(device)
        self.reloads = [0]

    def clone(self):
        twin = copy.copy(self)
        twin.patches = {key: entries[:] for key, entries in self.patches.items()}
        return twin

    def get_model_object(self, name):
        return getattr(self.model, name)

    def set_model_compute_dtype(self, dtype):
        self.compute_dtype = dtype
        self.patches_uuid = uuid.uuid4()

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = self.model.state_dict()
        added = []
        for name, adapter in patches.items():
            key, offset, function = ([*name, None][:3]) if isinstance(name, tuple) else (name, None, None)
            if key in known:
                self.patches.setdefault(key, []).append((strength_patch, adapter, strength_model, offset, function))
                added.append(name)
        self.patches_uuid = uuid.uuid4()
        return added

    def load(self):
        """Patches the model, unless it is patched with the same already."""
        if self.model.patched_with == self.patches_uuid:
            return
        if self.model.patched_with is not None:
            self.reloads[0] += 1
            self.unload()
        for key, entries in self.patches.items():
            weight = self.model.get_parameter(key)
            self.backup[key] = weight.data
            patched = calculate_weight(entries, weight.data.to(torch.float32, copy=True), key)
            weight.data = patched.to(weight.dtype)
        self.model.patched_with = self.patches_uuid

    def unload(self):
        for key, weight in self.backup.items():
            self.model.get_parameter(key).data = weight
        self.backup.clear()
        self.model.patched_with = None

    def lowvram_weight(self, key, dtype, rebuild=prefetched):
        """A weight as the forward of an offloaded layer sees it: patched at each call, in the layer's compute dtype."""
        entries = [(e[0], rebuild(e[1]), *e[2:]) for e in self.patches[key]]
        weight = self.model.get_parameter(key).data.to(dtype, copy=True)
        return calculate_weight(entries, weight, key, intermediate_dtype=dtype)


class Clip:
    """comfy.sd.CLIP"""

    def __init__(self, model):
        self.cond_stage_model = model
        self.patcher = Patcher(model)

    def clone(self):
        twin = copy.copy(self)
        twin.patcher = self.patcher.clone()
        return twin

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return self.patcher.add_patches(patches, strength_patch, strength_model)


def modules(folder):
    """The host's modules, `folder` being its folder of LoRAs."""

    def throw_exception_if_processing_interrupted():
        if management.interrupted:
            raise Interrupted

    def get_full_path(kind, name):
        path = Path(folder) / name
        return str(path) if kind == "loras" and path.is_file() else None

    comfy, lora, management, adapters, paths = (
        ModuleType(name)
        for name in ("comfy", "comfy.lora", "comfy.model_management", "comfy.weight_adapter", "folder_paths")
    )
    comfy.__path__ = []
    comfy.lora, comfy.model_management, comfy.weight_adapter = lora, management, adapters
    lora.model_lora_keys_unet, lora.model_lora_keys_clip = model_lora_keys_unet, model_lora_keys_clip
    management.interrupted = False
    management.InterruptProcessingException = Interrupted
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    adapters.WeightAdapterBase = WeightAdapterBase
    paths.get_filename_list = lambda kind: sorted(p.name for p in Path(folder).glob("*.safetensors"))
    paths.get_full_path = get_full_path
    more = train_fakes.modules(folder, management, paths)
    for module in more:
        setattr(comfy, module.__name__.split(".")[1], module)
    return {m.__name__: m for m in (comfy, lora, management, adapters, paths, *more)}


def load_node(folder=PLUGIN):
    """Imports a folder of custom nodes the way the host does: from its path, under a name made of it."""
    name = str(folder).replace(".", "_x_")
    for part in [known for known in sys.modules if known.startswith(f"{name}.")]:
        # Of another host.
        del sys.modules[part]
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
