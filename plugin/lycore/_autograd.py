"""The layer-side half of training: a module's forward and backward in torch's graph. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p, pointer, sizeof
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import errors
from ._binding import (
    LYCORE_LAYER_GROUP_NORM,
    LYCORE_LAYER_LAYER_NORM,
    LYCORE_LAYER_RMS_NORM,
    lycore_layer,
)
from .errors import UnsupportedError
from .stack import geometry_of
from .tensor import Descriptor

if TYPE_CHECKING:
    from ._library import Library
    from .network import Network

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Their outputs are fresh memory that no other node of the graph keeps, so the delta may be added in place. These alone:
# what a subclass does with its output only its host knows.
_FRESH = {nn.Linear, *_CONVOLUTIONS, *_NORMS}
# The `out_proj` of torch's MultiheadAttention, which reads its weight and never calls it: a hook would not run.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


def hook(
    network: Network, index: int, layer: nn.Module, needs_weight: bool, fresh: bool
) -> Callable[..., torch.Tensor]:
    """A forward hook (with_kwargs) that adds module `index` to the layer's output."""
    anchor = torch.zeros((), requires_grad=True)
    fresh = fresh or type(layer) in _FRESH
    axes = len(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else 0
    owner = network._handle()
    address = c_void_p.from_param(owner).value
    operator = _operator(owner.library)

    # Holds the layer only through its argument: both go as soon as nobody uses them.
    def add(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0] if inputs else named["input"]
        # Read at every call: hosts move weights, and replace them.
        weight = layer.weight.detach().to(x.device) if needs_weight else None
        try:
            # Another hook, or a forward that was put over the class's, may have kept the output.
            alone = fresh and len(layer._forward_hooks) == 1 and "forward" not in vars(layer)
            return operator(anchor, x, output, weight, address, index, axes, alone)
        except RuntimeError as failure:
            raise errors.of_text(failure) from None

    # As long as the layer has its module.
    add.network = network  # type: ignore[attr-defined]
    return add


def _operator(library: Library) -> Callable[..., torch.Tensor]:
    """The library's operator for modules: forward and backward in torch's graph, without Python."""
    space, name = library.text("lycore_network_operator").split("::")
    return getattr(getattr(torch.ops, space), name).default


def supported(layer: nn.Module) -> bool:
    """Whether a module can be put on this layer."""
    if isinstance(layer, _NORMS):
        return layer.weight is not None
    return (_linear(layer) or isinstance(layer, _CONVOLUTIONS)) and not isinstance(layer, _NEVER_CALLED)


def _linear(layer: nn.Module) -> bool:
    """nn.Linear, or a layer that says the same of itself: hosts have quantised ones of their own class. With three axes
    a weight is a bank of experts, which are not called as layers.
    """
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    weight = layer._parameters.get("weight")
    return isinstance(layer, nn.Linear) or (
        weight is not None and weight.ndim <= 2 and all(isinstance(n, int) for n in sizes)
    )


def describe(name: str, layer: nn.Module) -> tuple[lycore_layer, tuple[Any, ...]]:
    """What the library must know about a layer, and what must outlive it."""
    if isinstance(layer, _NEVER_CALLED):
        what = f"`{name}` is read by torch's MultiheadAttention without being called; a module on it would not train."
        raise UnsupportedError(what, hint="leave this layer out", key=name)
    described = lycore_layer(struct_size=sizeof(lycore_layer), has_bias=getattr(layer, "bias", None) is not None)
    geometry = None
    if _linear(layer):
        # Not the weight's own shape: quantised layers pack it.
        shape: tuple[int, ...] = (layer.out_features, layer.in_features)
    elif isinstance(layer, _CONVOLUTIONS):
        if layer.padding_mode != "zeros":
            what = f"`{name}` pads with {layer.padding_mode!r}; only zeros are supported."
            raise UnsupportedError(what, hint="leave this layer out", key=name)
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        padding = _padding(name, layer)
        geometry = geometry_of(len(shape) - 2, layer.stride, padding, layer.dilation, layer.groups)
        described.geometry = pointer(geometry)
    elif isinstance(layer, _NORMS) and layer.weight is not None:
        shape = tuple(layer.weight.shape)
        described.form, described.eps = _form_of(layer)
        described.groups = getattr(layer, "num_groups", 0)
    else:
        what = f"`{name}` is a {type(layer).__name__}; modules go on Linear, convolutions and norms with a weight."
        raise UnsupportedError(what, key=name)
    sizes = (c_int64 * len(shape))(*shape)
    described.shape, described.ndim = sizes, len(shape)
    weight = weight_of(layer, shape)
    if weight is not None:
        described.weight = pointer(weight.c)
    return described, (sizes, geometry, weight)


def _form_of(norm: Any) -> tuple[int, float]:
    if isinstance(norm, nn.LayerNorm):
        return LYCORE_LAYER_LAYER_NORM, norm.eps
    if isinstance(norm, nn.GroupNorm):
        return LYCORE_LAYER_GROUP_NORM, norm.eps
    # torch's own default.
    return LYCORE_LAYER_RMS_NORM, torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps


def weight_of(layer: nn.Module, shape: tuple[int, ...]) -> Descriptor | None:
    """The layer's weight, where it is plain numbers of the layer's own shape."""
    weight = getattr(layer, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not plain or tuple(weight.shape) != shape or weight.device.type not in ("cpu", "cuda"):
        return None
    return Descriptor(weight.detach(), "weight")


def _padding(name: str, layer: Any) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding != "same":
        return tuple(layer.padding)
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        what = f"`{name}` pads its two sides differently ('same' with an even kernel)."
        raise UnsupportedError(what, hint="leave this layer out", key=name)
    return tuple(t // 2 for t in total)


def view_of(address: int, count: int, cuda_index: int | None, owner: Any) -> torch.Tensor:
    """A tensor over `count` fp32 numbers of the library, which keeps `owner` alive."""
    if cuda_index is None:
        import ctypes

        memory = (ctypes.c_float * count).from_address(address)
        memory._owner = owner  # type: ignore[attr-defined] # torch keeps `memory`
        return torch.frombuffer(memory, dtype=torch.float32)
    return torch.as_tensor(_CudaMemory(address, count, owner), device=f"cuda:{cuda_index}")


class _CudaMemory:
    """What torch reads device memory of others from."""

    def __init__(self, address: int, count: int, owner: Any):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<f4",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }
