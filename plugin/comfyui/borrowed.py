"""What training changes of a model of ComfyUI's while it runs, and how the model comes back exactly as it was."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.model_management
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_AUGMENTED = {
    "__iadd__": operator.add,
    "__isub__": operator.sub,
    "__imul__": operator.mul,
    "__itruediv__": operator.truediv,
}


@contextmanager
def training(model: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Inside, torch builds graphs through `model`, whose weights take no gradients."""
    # Nodes run in inference mode, where there are no graphs. Newer versions of ComfyUI choose kernels by the flag.
    flag = _flag(comfy.model_management, "in_training")
    blocks = _checkpointed(model) if checkpointing else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), flag, _aliases(model), _not_in_place(), blocks:
        yield


@contextmanager
def _flag(owner: Any, name: str) -> Iterator[None]:
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, True)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _aliases(model: nn.Module) -> Iterator[None]:
    """Puts other tensors over the same memory in the place of the model's own.

    Weights that a node loaded are inference tensors, which no graph may keep. The others do not change that, and
    leave the gradients and flags of the model's own alone. Wrappers around packed weights stay: they are
    unpacked into new tensors at every call.
    """
    kept = []
    for part in model.modules():
        for table in (part._parameters, part._buffers, vars(part)):
            for name, tensor in table.items():
                if type(tensor) in (torch.Tensor, nn.Parameter):
                    kept.append((table, name, tensor))
    try:
        for table, name, tensor in kept:
            table[name] = _alias(tensor)
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    # Views and `detach` of an inference tensor would be inference tensors themselves.
    alias = empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


@contextmanager
def _not_in_place() -> Iterator[None]:
    """`x += y` and its like make a new tensor where one of the two is in a graph.

    Models are written for sampling, where a block may add to its input. A graph has saved that input: without
    checkpointing torch would refuse, with it the gradients would be wrong and nothing would say so.
    """
    before = {name: vars(torch.Tensor).get(name) for name in _AUGMENTED}
    for name, operation in _AUGMENTED.items():
        setattr(torch.Tensor, name, _augmented(getattr(torch.Tensor, name), operation))
    try:
        yield
    finally:
        for name, own in before.items():
            if own is None:
                # Inherited.
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, own)


def _augmented(in_place: Callable[..., Any], operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, y: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or getattr(y, "requires_grad", False)):
            return operation(x, y).to(x.dtype)
        return in_place(x, y)

    return run


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """The model's blocks keep only their inputs for backward, and compute the rest a second time there."""
    kept = []
    try:
        for block in _blocks(model.diffusion_model):
            kept.append((vars(block), vars(block).get("forward")))
            block.forward = _twice(block.forward)
        yield
    finally:
        for attributes, forward in kept:
            del attributes["forward"]
            if forward is not None:
                attributes["forward"] = forward


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _blocks(child)
        elif any(True for _ in child.children()):
            yield child


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        # Models count blocks in `transformer_options` as they go; the second time must begin at the same numbers.
        inputs = tuple(_copy(value) for value in inputs)
        named = {name: _copy(value) for name, value in named.items()}
        tensors = [value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]

        def compute() -> Any:
            if [tensor._version for tensor in tensors] != versions:
                raise RuntimeError("this model changes the input of a block, so blocks cannot be computed twice")
            return forward(*map(_copy, inputs), **{name: _copy(value) for name, value in named.items()})

        return checkpoint(compute, use_reentrant=False)

    return run


def _copy(value: Any) -> Any:
    return dict(value) if type(value) is dict else value
