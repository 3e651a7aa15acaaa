"""What ComfyUI keeps per weight: every LoRA of that weight in one object, merged by one call.

ComfyUI calls `calculate_weight` wherever it needs a patched weight: when it loads a model, inside the forward of an
offloaded layer, for hooks and when it saves. Some of these paths rebuild the object as
`type(a)(a.loaded_keys, a.weights)` with the tensors inside `weights` moved, so the constructor takes exactly these two,
and `weights` is all there is: nested tuples of tensors and plain values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from comfy.weight_adapter import WeightAdapterBase

from . import library

Slice = tuple[int, int, int]
"""(axis, start, length)"""
Term = tuple[float, Slice | None, tuple[tuple[str, Any], ...]]
"""(strength, slice of the weight or None, tensors by canonical name, with "alpha" as a number)"""
Patch = tuple[float, dict[str, Any], Slice | None]
"""The same as `lycore.weight_merge` takes it."""
Function = Callable[[torch.Tensor], torch.Tensor]

_PLAIN = frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "scalar", "diff", "diff_b"})
"""Tensors whose modules change a weight without looking at it."""
_NATIVE = (torch.float32, torch.float16, torch.bfloat16)
_unreachable: dict[torch.device, str] = {}


class LyCoreAdapter(WeightAdapterBase):
    """All LoRAs of one weight. `weights` is a tuple of terms."""

    name = "lycore"

    def __init__(self, loaded_keys: set[str], weights: tuple[Term, ...]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def joined(cls, parts: Iterable[tuple[float, LyCoreAdapter]]) -> LyCoreAdapter:
        """One object that does what the given ones do at these strengths."""
        keys: set[str] = set()
        terms: list[Term] = []
        for strength, part in parts:
            keys |= part.loaded_keys
            terms += [(strength * own, piece, tensors) for own, piece, tensors in part.weights]
        return cls(keys, tuple(terms))

    def calculate_shape(self, key: str) -> None:
        """No LoRA here changes a weight's shape."""
        return None

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Slice | None,
        function: Function | None,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """Merges into `weight` in place and returns it.

        The caller has narrowed `weight` to `offset` and multiplied it by `strength_model` already. Sums are fp32
        whatever `intermediate_dtype` says, so that a layer gets the same weight resident and offloaded.
        """
        patches = [(strength * own, dict(tensors), piece) for own, piece, tensors in self.weights if strength * own]
        if not patches:
            return weight
        if _is_identity(function):
            merge(weight, key, patches)
        else:
            # The host's function takes a delta. A sum begins at zero unless it depends on the weight.
            base = weight.float()
            plain = all(tensors.keys() <= _PLAIN for _, tensors, _ in patches)
            start = torch.zeros_like(base) if plain else base
            delta = start.clone()
            merge(delta, key, patches)
            weight.copy_(base + function(delta - start))
        return weight

    def h(self, x: torch.Tensor, base_out: torch.Tensor) -> torch.Tensor:
        """The bypass: what to add to the layer's output. The host has set `multiplier` and a convolution's geometry."""
        out = torch.zeros_like(base_out)
        spatial = getattr(self, "conv_dim", 0) if getattr(self, "is_conv", False) else 0
        channels = 1 if spatial else -1
        for strength, piece, tensors in self.weights:
            up, down, scale = _factors(dict(tensors), x.device, x.dtype)
            source, target = x, out
            if piece is not None and piece[0] == 0:
                target = out.narrow(channels, *piece[1:])
            elif piece is not None:
                source = x.narrow(channels, *piece[1:])
            delta = self._forward(source, up, down, spatial)
            target.add_(delta, alpha=getattr(self, "multiplier", 1.0) * strength * scale)
        return out

    def _forward(self, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, spatial: int) -> torch.Tensor:
        """up(down(x))"""
        if spatial == 0:
            return F.linear(F.linear(x, down.flatten(1)), up)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        geometry = getattr(self, "kw_dict", None) or {}
        if down.ndim == 2:
            down = down.unflatten(1, (-1, *(getattr(self, "kernel_size", None) or (1,) * spatial)))
        if geometry.get("groups", 1) != 1:
            # Groups apply the same factors to other inputs; only their product can be split among them.
            return convolve(x, torch.einsum("or,r...->o...", up, down), **geometry)
        return convolve(convolve(x, down, **geometry), up.reshape(*up.shape, *(1,) * spatial))

    def g(self, y: torch.Tensor) -> torch.Tensor:
        """The bypass: what becomes of the sum; LoRA leaves it."""
        return y

    def bypass_forward(self, org_forward: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with its LoRAs, its weight untouched."""
        base_out = org_forward(x, *args, **kwargs)
        return self.g(base_out + self.h(x, base_out))


def merge(weight: torch.Tensor, key: str, patches: list[Patch]) -> None:
    """weight += sum of strength * delta, in place, summed in fp32 and rounded once.

    In place where LyCore reaches the weight; else (fp8, a device that its build does not know) in a copy beside it.
    """
    reached = unreachable(weight.device) is None
    if reached and weight.dtype in _NATIVE and type(weight) in (torch.Tensor, torch.nn.Parameter):
        _merge_native(weight, key, patches)
        return
    total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device if reached else "cpu")
    total.copy_(weight)
    _merge_native(total, key, patches)
    weight.copy_(total)


def unreachable(device: torch.device) -> str | None:
    """Why LyCore's library cannot work on this device's memory; None when it can. Tried once per device."""
    if device not in _unreachable:
        lycore = library.find()
        one = torch.ones(1, 1, device=device)
        reason = ""
        try:
            factors = {"lora_up.weight": one.clone(), "lora_down.weight": one.clone()}
            lycore.weight_merge("probe", one, [(1.0, factors, None)])
        except (lycore.DeviceError, lycore.LibraryError, lycore.UnsupportedError) as problem:
            reason = problem.message
            logging.getLogger("lycore").warning("LoRAs on %s are merged on the CPU: %s", device, problem)
        _unreachable[device] = reason
    return _unreachable[device] or None


def _merge_native(weight: torch.Tensor, key: str, patches: list[Patch]) -> None:
    moved = []
    for strength, tensors, piece in patches:
        there = {name: t.to(weight.device) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
        moved.append((strength, there, piece))
    library.find().weight_merge(key, weight.detach(), moved)


def _factors(
    tensors: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """up [out, r], down [r, in, kernel..] and alpha / rank of a LoRA. A Tucker core is folded into down."""
    if not tensors.keys() <= _PLAIN or "lora_up.weight" not in tensors or "scalar" in tensors:
        raise NotImplementedError(f"A bypass of {sorted(tensors)} is not supported; load the LoRA without bypass.")
    up, down = (tensors[name].to(device, dtype) for name in ("lora_up.weight", "lora_down.weight"))
    rank = down.shape[0]
    if "lora_mid.weight" in tensors:
        mid = tensors["lora_mid.weight"].to(device, dtype)
        down = torch.einsum("pq...,qi->pi...", mid, down.flatten(1))
    return up.flatten(1), down, (tensors.get("alpha") or rank) / rank


def _same(a: torch.Tensor) -> torch.Tensor:
    return a


def _is_identity(function: Function | None) -> bool:
    """Whether a function only returns its argument, as the one that ComfyUI passes when a patch has none.

    One that is not recognised is called, which is right for every function and only takes memory.
    """
    code = getattr(function, "__code__", None)
    return function is None or (code is not None and code.co_code == _same.__code__.co_code and code.co_argcount == 1)
