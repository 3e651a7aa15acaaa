"""A host's weights and the adapters on them: apply, change, restore, bypass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_char_p, c_int64, c_uint64, pointer, sizeof
from dataclasses import dataclass
from typing import Any, TypeVar

from ._binding import (
    LYCORE_BACKUP_AUTO,
    LYCORE_BACKUP_COMPACT,
    LYCORE_BACKUP_DEVICE,
    LYCORE_BACKUP_HOST,
    LYCORE_ROUNDING_NEAREST,
    LYCORE_ROUNDING_STOCHASTIC,
    lycore_applied,
    lycore_geometry,
    lycore_patch,
    lycore_tensor,
)
from ._library import Closable, Library, Owned, load
from .adapter import Adapter
from .errors import ArgumentError, LibraryError
from .progress import Cancel, ProgressCallback, watched
from .strengths import Strengths
from .tensor import Descriptor, is_torch, row_major, slice_of, stream_of

Tensor = TypeVar("Tensor")
Slice = tuple[int, int, int]
"""(axis, first index, number of indices): a range of rows (axis 0) or of input channels (axis 1) of a weight."""

_ROUNDINGS = {"nearest": LYCORE_ROUNDING_NEAREST, "stochastic": LYCORE_ROUNDING_STOCHASTIC}
_BACKUPS = {
    "auto": LYCORE_BACKUP_AUTO,
    "device": LYCORE_BACKUP_DEVICE,
    "host": LYCORE_BACKUP_HOST,
    "compact": LYCORE_BACKUP_COMPACT,
}


@dataclass(frozen=True)
class Applied:
    """What `Stack.apply` did."""

    changed: int
    """Weights written."""
    kept: int
    """Weights under adapters that already were as wanted."""


class Handle:
    """One adapter on a stack. Changes take effect with the stack's next `apply`."""

    def __init__(self, stack: Stack, number: int, strengths: Strengths):
        self._stack = stack
        self._number = number
        self._strengths = strengths

    @property
    def strengths(self) -> Strengths:
        """All numbers."""
        return self._strengths

    @property
    def strength(self) -> float:
        """The strength on the U-Net; setting it sets that of text encoders too."""
        return self._strengths.unet

    @strength.setter
    def strength(self, value: float) -> None:
        self.set(value)

    def set(
        self,
        strength: float | Strengths | None = None,
        *,
        unet: float | None = None,
        text_encoder: float | None = None,
        modules: Mapping[str, float] | None = None,
    ) -> None:
        """Sets the numbers that are given and leaves the others. `strength` stands for `unet` and `text_encoder`."""
        if isinstance(strength, Strengths):
            base = strength
        elif strength is None:
            base = self._strengths
        else:
            base = Strengths(float(strength), float(strength), self._strengths.modules)
        wanted = Strengths.of(base, unet, text_encoder, modules)
        self._stack._call("lycore_stack_set_strengths", self._number, byref(wanted.c()))
        self._strengths = wanted

    def remove(self) -> None:
        """Takes the adapter off the stack."""
        self._stack._call("lycore_stack_remove_adapter", self._number)

    def report(self) -> dict[str, Any]:
        """The load report with the targets found: "matched" and "unmatched" in the summary, "nearest" beside
        unmatched keys.
        """
        owner = self._stack._handle()
        return json.loads(owner.library.text("lycore_stack_report", owner, self._number))


class Stack(Closable):
    """Weights, adapters on them, strengths. `apply` computes every weight from its pristine copy, so that only the
    strengths count and never what was applied before.

    `weights` are [out, in] or [out, in / groups, kernel..], under the host's own names: a mapping of names to torch
    tensors (CPU or CUDA; float32, float16, bfloat16, float8_e4m3fn, float8_e5m2) or writable numpy arrays, or a
    torch.nn.Module, of which every floating-point parameter of 16 or 32 bits is taken, biases and norms too. Their
    memory is used in place and kept alive; do not move a model while a stack is on it.

    `backup` says where the pristine copies are kept: on the weights' "device", on the "host", or nowhere: "compact"
    merges 16-bit weights of a GPU in place and keeps what rounding lost of them, a quarter of their size; `apply` waits
    for the GPU then. "auto" takes the first of device, compact and host that there is room for; `info` says which and
    why. With `self_check` every weight that is restored is compared with a
    checksum of what it was. Results in float8 weights are rounded to "nearest" or, with `rounding="stochastic"`, up or
    down with the probability of the distance, the same for the same `seed`; `scales` says for which of them the real
    weight is a number times the stored one. `aliases` maps spellings of adapter files to a weight's name, or to (name,
    axis, start, length) for a part of it, and wins over the built-in rules. An adapter made for another family of
    models is refused by `add`, unless all of it fits or `other_families` is true.

    As a context manager it gives the weights their base back at the end. One call at a time; a second thread gets
    BusyError.
    """

    def __init__(
        self,
        weights: Mapping[str, Any] | Any,
        *,
        backup: str = "auto",
        self_check: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        scales: Mapping[str, float] | None = None,
        aliases: Mapping[str, str | tuple[str, int, int, int]] | None = None,
        other_families: bool = False,
    ):
        if backup not in _BACKUPS:
            raise ArgumentError(f"backup is {backup!r}, it must be 'auto', 'device', 'host' or 'compact'.")
        if rounding not in _ROUNDINGS:
            raise ArgumentError(f"rounding is {rounding!r}, it must be 'nearest' or 'stochastic'.")
        self._weights: dict[str, tuple[Descriptor, Any]] = {}
        for name, weight in _named(weights):
            # The alias without a graph keeps the memory if the host gives its parameter another.
            held = weight.detach() if is_torch(weight) else weight
            self._weights[name] = (Descriptor(held, name, writable=True), weight)
        # Asked before every merge of what may be a thousand weights: only what is needed for the question.
        tensors = [(d, w) for d, w in self._weights.values() if is_torch(w)]
        self._addresses = [d.c.data or 0 for d, _ in tensors]
        self._where_now = [w.data_ptr for _, w in tensors]
        cuda = [d.cuda_index for d, _ in self._weights.values() if d.cuda_index is not None]
        self._cuda_index: int | None = cuda[0] if cuda else None
        library = library_for(self._cuda_index)
        self._owner: Owned | None = library.new("lycore_stack_new", "lycore_stack_free", _BACKUPS[backup])
        if self_check:
            self._call("lycore_stack_self_check", 1)
        if other_families:
            self._call("lycore_stack_allow_other_families", 1)
        for name, (descriptor, _) in self._weights.items():
            self._call("lycore_stack_add_target", name.encode(), byref(descriptor.c))
        self._call("lycore_stack_set_rounding", _ROUNDINGS[rounding], seed & 0xFFFFFFFF)
        for name, scale in (scales or {}).items():
            self._call("lycore_stack_set_scale", name.encode(), float(scale))
        for spelling, target in (aliases or {}).items():
            name, part = (target, None) if isinstance(target, str) else (target[0], slice_of(target[1:], spelling))
            self._call("lycore_stack_add_alias", spelling.encode(), name.encode(), byref(part) if part else None)

    def add(
        self,
        adapter: Adapter | str | os.PathLike[str],
        strength: float | Strengths = 1.0,
        *,
        unet: float | None = None,
        text_encoder: float | None = None,
        modules: Mapping[str, float] | None = None,
    ) -> Handle:
        """Puts an adapter (or its file) on the stack; takes effect with the next `apply`.

        Raises AdapterKeyError when none of its modules finds its weight, or when it is made for another family of
        models; single modules that find none are in the handle's report.
        """
        owner = self._handle()
        strengths = Strengths.of(strength, unet, text_encoder, modules)
        if not isinstance(adapter, Adapter):
            adapter = Adapter(adapter, library=owner.library)
        number = c_uint64()
        arguments = (adapter.in_library(owner.library), byref(strengths.c()), byref(number))
        self._call("lycore_stack_add_adapter", *arguments)
        return Handle(self, number.value, strengths)

    def apply(self, progress: ProgressCallback | None = None, cancel: Cancel | None = None) -> Applied:
        """Writes every weight whose adapters or strengths changed. Progress counts weights.

        On a GPU the work is enqueued on torch's current stream and not waited for. After an error or a cancel all
        weights are the base.
        """
        self._check_memory()
        applied = lycore_applied(struct_size=sizeof(lycore_applied))
        with watched(self._handle().library, progress, cancel) as watcher:
            self._call("lycore_stack_apply", self._stream(), watcher, byref(applied))
        return Applied(applied.changed, applied.kept)

    def restore(self) -> None:
        """Gives every weight its base back, bit for bit, and frees the copies.

        Adapters and strengths stay on the stack.
        """
        self._call("lycore_stack_restore", self._stream())

    def info(self) -> dict[str, Any]:
        """How the stack works: "device", "executor" ("kernels", "libtorch" or "cpu"), "backup" with its "mode", "why",
        "weights" and "bytes" (None before the first apply).
        """
        owner = self._handle()
        return json.loads(owner.library.text("lycore_stack_info", owner))

    def forward(
        self,
        name: str,
        x: Any,
        y: Tensor,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """The bypass: adds to `y` what the adapters add to the output of the layer with weight `name`, and returns it.

        The strengths count as they are set; the weight is not touched. Linear: x [.., in], y [.., out]; convolution:
        x [batch, in, spatial..], y [batch, out, spatial..]. Both row-major, on one device.
        """
        known = self._weights.get(name)
        axes = known[0].c.ndim - 2 if known else 0
        geometry = geometry_of(axes, stride, padding, dilation, groups)
        source, target = Descriptor(x, "x"), Descriptor(y, "y", writable=True)
        stream = stream_of(self._handle().library.build.links_torch, target.cuda_index)
        shape = byref(geometry) if geometry else None
        self._call("lycore_stack_forward", name.encode(), shape, byref(source.c), byref(target.c), stream)
        return y

    def close(self) -> None:
        """Restores the weights and frees the stack."""
        if self._owner is not None:
            self.restore()
            self._owner = None
            self._weights, self._addresses, self._where_now = {}, [], []

    def _stream(self) -> int | None:
        return stream_of(self._handle().library.build.links_torch, self._cuda_index)

    def _check_memory(self) -> None:
        if [address() for address in self._where_now] == self._addresses:
            return
        for name, (descriptor, weight) in self._weights.items():
            if is_torch(weight) and weight.data_ptr() != (descriptor.c.data or 0):
                what = f"`{name}` has other memory than when the stack was made."
                raise ArgumentError(what, hint="make a new stack after moving or replacing a weight", key=name)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owner is not None:
            self.restore()


def weight_merge(
    name: str,
    weight: Tensor,
    patches: Sequence[tuple[float, Mapping[str, Any], Slice | None]],
) -> Tensor:
    """Merges modules into one weight, in place, in one pass, and returns it: for hosts that do their own bookkeeping
    of weights.

    Each patch is (strength, tensors, slice): tensors by canonical name ("lora_up.weight", "hada_w1_a", ..), in host
    memory or on the weight's device, "alpha" and "on_input" as numbers; on all of the weight or on a slice of it.
    `name` is used in errors.
    """
    target = Descriptor(weight, name, writable=True)
    library = library_for(target.cuda_index)
    array = (lycore_patch * len(patches))()
    kept: list[list[Descriptor]] = []
    for patch, (strength, tensors, part) in zip(array, patches, strict=True):
        described = [_patch_tensor(key, value, name) for key, value in tensors.items()]
        patch.struct_size, patch.count, patch.strength = sizeof(lycore_patch), len(described), float(strength)
        patch.names = (c_char_p * len(described))(*(key.encode() for key in tensors))
        patch.tensors = (lycore_tensor * len(described))(*(d.c for d in described))
        if part is not None:
            patch.slice = pointer(slice_of(part, name))
        kept.append(described)
    stream = stream_of(library.build.links_torch, target.cuda_index)
    library.call("lycore_weight_merge", name.encode(), byref(target.c), array, len(patches), stream)
    return weight


def library_for(cuda_index: int | None) -> Library:
    """The library for weights on this device (None: host memory)."""
    if cuda_index is None:
        return load()
    try:
        return load(torch=True)
    except LibraryError:
        library = load()
        if library.build.links_torch or not library.capabilities()["cuda"]["devices"]:
            raise
        return library


def geometry_of(
    axes: int,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> lycore_geometry | None:
    """How a convolution with this many spatial axes slides; None for a Linear layer."""
    if axes == 0:
        return None

    def values(given: int | Sequence[int], what: str) -> Any:
        numbers = [given] * axes if isinstance(given, int) else [int(n) for n in given]
        if len(numbers) != axes:
            raise ArgumentError(f"{what} has {len(numbers)} values for {axes} spatial axes.")
        return (c_int64 * axes)(*numbers)

    geometry = lycore_geometry(struct_size=sizeof(lycore_geometry), axes=axes, groups=groups)
    geometry.stride = values(stride, "stride")
    geometry.padding = values(padding, "padding")
    geometry.dilation = values(dilation, "dilation")
    return geometry


def _named(weights: Mapping[str, Any] | Any) -> Iterator[tuple[str, Any]]:
    if isinstance(weights, Mapping):
        yield from weights.items()
    elif hasattr(weights, "named_parameters"):
        for name, parameter in weights.named_parameters():
            # Quantised weights and their scales cannot be merged into; a module for one is reported as unmatched.
            if parameter.ndim >= 1 and str(parameter.dtype) in ("torch.float32", "torch.float16", "torch.bfloat16"):
                yield name, parameter
    else:
        raise ArgumentError(
            f"weights is a {type(weights).__name__}, not a mapping of names to tensors or a torch module."
        )


def _patch_tensor(key: str, value: Any, name: str) -> Descriptor:
    if key in ("alpha", "on_input", "scalar"):
        return Descriptor.number(float(value))
    return Descriptor(row_major(value), f"{name}: {key}")
