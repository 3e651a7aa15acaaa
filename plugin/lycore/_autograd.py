"""The layer-side half of training: a module's forward and backward in torch's graph. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref, c_int64, pointer, sizeof
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

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
    from .network import Network

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Their outputs are fresh memory that no other node of the graph keeps, so the delta may be added in place.
_FRESH = {nn.Linear, *_CONVOLUTIONS, *_NORMS}
# The `out_proj` of torch's MultiheadAttention, which reads its weight and never calls it: a hook would not run.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


class _Delta(torch.autograd.Function):
    """`y = base + module(x)`. The anchor needs a gradient, so that backward runs also when neither x nor base does."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        x: torch.Tensor,
        base: torch.Tensor,
        network: Network,
        index: int,
        fresh: bool,
        batched: bool,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x.contiguous()
        in_place = fresh and base.is_contiguous() and not base._is_view() and not (base.is_leaf and base.requires_grad)
        y = base if in_place else base.clone(memory_format=torch.contiguous_format)
        ctx.network, ctx.index, ctx.batched, ctx.weight = network, index, batched, weight
        ctx.save_for_backward(x)
        if in_place:
            ctx.mark_dirty(base)
        _call(network, "lycore_network_forward", index, batched, weight, x, None, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        grad_y = grad_y if grad_y.is_contiguous() else grad_y.contiguous()
        _call(ctx.network, "lycore_network_backward", ctx.index, ctx.batched, ctx.weight, x, None, grad_y, grad_x)
        return None, grad_x, grad_y if ctx.needs_input_grad[2] else None, None, None, None, None, None


def _call(
    network: Network,
    function: str,
    index: int,
    batched: bool,
    weight: torch.Tensor | None,
    *tensors: torch.Tensor | None,
) -> None:
    """Calls forward or backward; the layer's weight goes where `tensors` has its second, None."""
    owner = network._handle()
    described = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.detach()
            described.append(Descriptor(tensor if batched else tensor.unsqueeze(0), network.names[index]))
        else:
            described.append(None)
    if weight is not None:
        described[1] = Descriptor(weight, network.names[index])
    arguments = [None if d is None else byref(d.c) for d in described]
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    # The library chooses its own compute dtype; the host's autocast on this thread must not change it.
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            owner.library.call(function, owner, index, *arguments, None)
    else:
        owner.library.call(function, owner, index, *arguments, None)


def hook(network: Network, index: int, layer: nn.Module, needs_weight: bool) -> Callable[..., torch.Tensor]:
    """A forward hook (with_kwargs) that adds module `index` to the layer's output."""
    anchor = torch.zeros((), requires_grad=True)
    fresh = type(layer) in _FRESH
    axes = len(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else 0

    def add(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0] if inputs else named["input"]
        batched = axes == 0 or x.ndim == axes + 2
        # Another hook may have kept the output.
        alone = fresh and len(layer._forward_hooks) == 1
        # Read at every call: hosts move weights, and replace them.
        weight = layer.weight.detach().to(x.device) if needs_weight else None
        return _Delta.apply(anchor, x, output, network, index, alone, batched, weight)

    return add


def supported(layer: nn.Module) -> bool:
    """Whether a module can be put on this layer."""
    if isinstance(layer, _NORMS):
        return layer.weight is not None
    return isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) and not isinstance(layer, _NEVER_CALLED)


def describe(name: str, layer: nn.Module) -> tuple[lycore_layer, tuple[Any, ...]]:
    """What the library must know about a layer, and what must outlive it."""
    if isinstance(layer, _NEVER_CALLED):
        what = f"`{name}` is read by torch's MultiheadAttention without being called; a module on it would not train."
        raise UnsupportedError(what, hint="leave this layer out", key=name)
    described = lycore_layer(struct_size=sizeof(lycore_layer), has_bias=getattr(layer, "bias", None) is not None)
    geometry = None
    if isinstance(layer, nn.Linear):
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
