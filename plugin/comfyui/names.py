"""Which weights a ComfyUI model has, and what ComfyUI calls them.

LyCore resolves module names itself; ComfyUI's key maps are passed to it as aliases, so that a file finds at least what
ComfyUI's own loader finds, slices of fused q/k/v included.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import comfy.lora
import torch

_TEXT_ENCODER = (
    "lora_te",
    "lora_prior_te",
    "text_encoder",
    "text_model.",
    "conditioner.",
    "cond_stage_model.",
    "clip_l.",
    "clip_g.",
    "clip_h.",
    "t5xxl.",
)


@dataclass(frozen=True)
class Place:
    """Where a module goes."""

    key: str
    """The weight, by ComfyUI's name."""
    slice: tuple[int, int, int] | None = None
    """(axis, start, length)"""
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What becomes of the difference before it is added; SD3's last layer swaps its halves."""


class Targets:
    """The weights of a model and, when one is connected, of its text encoders."""

    def __init__(self, model: Any, clip: Any = None):
        self.model_name = type(model.model).__name__
        self.shapes = _shapes(model.model)
        self.clip_keys: frozenset[str] = frozenset()
        places = _key_map(comfy.lora.model_lora_keys_unet, model.model)
        if clip is not None:
            encoders = _shapes(clip.patcher.model)
            self.clip_keys = frozenset(encoders)
            self.shapes |= encoders
            places |= _key_map(comfy.lora.model_lora_keys_clip, clip.cond_stage_model)
        self._places = {spelling: place for spelling, place in places.items() if self._has(place)}
        self._flat = {spelling.replace(".", "_"): place for spelling, place in self._places.items()}
        self._kohya = {
            place.key: name
            for name, place in self._places.items()
            if place == Place(place.key) and name.startswith("lora_unet_") and name != _plain(place.key)
        }
        aliases = sorted((s, p.key, str(p.slice), bool(p.function)) for s, p in self._places.items())
        self.signature = hashlib.sha1(repr((sorted(self.shapes.items()), aliases)).encode()).hexdigest()
        """Equal for models on which a file goes to the same places."""

    def _has(self, place: Place) -> bool:
        # The host's maps are made from a model's config, and name also what a variant of the model lacks.
        shape = self.shapes.get(place.key)
        if shape is None or place.slice is None:
            return shape is not None
        axis, start, length = place.slice
        return axis in (0, 1) and length > 0 and start + length <= shape[axis]

    def stack(self, lycore: ModuleType) -> Any:
        """A LyCore stack that matches names with these weights.

        ComfyUI may hold a weight quantised, offloaded or not yet at all. Matching needs only shapes, so the stack gets
        tensors that have them and no memory; nothing is ever applied through it.
        """
        cell = torch.empty(1, dtype=torch.bfloat16)
        weights = {key: cell.expand(shape) for key, shape in self.shapes.items()}
        aliases = {s: (p.key, *p.slice) if p.slice else p.key for s, p in self._places.items()}
        return lycore.Stack(weights, aliases=aliases)

    def file_name(self, key: str) -> str:
        """What a weight of the diffusion model is called in a file: kohya's name, after diffusers' for a U-Net.

        ComfyUI takes `lora_unet_` and its own name for a weight of every architecture; for a U-Net it also has the
        names that other programs know.
        """
        return self._kohya.get(key, _plain(key))

    def place(self, module: str, target: str, part: Mapping[str, int] | None) -> Place:
        """Where on `target`, the weight that LyCore found for it, a module goes. `part` is its report's slice."""
        for table, name in ((self._places, module), (self._flat, module.replace(".", "_"))):
            place = table.get(name)
            if place is not None and place.key == target:
                return place
        return Place(target, (part["axis"], part["start"], part["length"]) if part else None)


def is_text_encoder(module: str) -> bool:
    """Whether a module's name says that it belongs to a text encoder."""
    return module.startswith(_TEXT_ENCODER)


def _plain(key: str) -> str:
    return "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight.shape) for key, weight in module.state_dict().items() if weight.ndim >= 1}


def _key_map(function: Callable[..., Mapping[str, Any]], module: Any) -> dict[str, Place]:
    try:
        # The host's default for its second argument is one dict that all calls share.
        found = function(module, {})
    except (AttributeError, KeyError) as problem:
        # A model that ComfyUI has no names for; LyCore's rules are left.
        logging.getLogger("lycore").debug("no key map for %s: %s", type(module).__name__, problem)
        return {}
    places = {spelling: _place(value) for spelling, value in found.items()}
    for spelling, place in list(places.items()):
        for other in _canonical(spelling):
            places.setdefault(other, place)
    return places


def _place(value: str | tuple[Any, ...]) -> Place:
    if isinstance(value, str):
        return Place(value)
    key, piece, *function = value
    return Place(key, tuple(piece) if piece is not None else None, function[0] if function else None)


def _canonical(spelling: str) -> Iterator[str]:
    """What LyCore makes of a file's spelling: no wrapper of PEFT's, no attention processors."""
    name = spelling.replace("base_model.model.", "", 1)
    if ".processor.to_" in name:
        name = name.replace(".processor.to_", ".to_")
        name = f"{name}.0" if name.endswith(".to_out") else name
    if name != spelling:
        yield name
