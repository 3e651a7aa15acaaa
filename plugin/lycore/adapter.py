"""Adapter files: open, look at, take apart, save."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from ctypes import POINTER, byref, c_char_p, c_uint8, cast, sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._binding import lycore_module, lycore_tensor
from ._library import Library, Owned, load
from .errors import ArgumentError, HandleError
from .tensor import dtype_name

if TYPE_CHECKING:
    import numpy
    import torch


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of a module, in the file's memory. It keeps that memory valid, also after the adapter was closed."""

    name: str
    """Canonical name, whatever the file's spelling: "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha".
    """
    dtype: str
    """ "fp32", "fp16" or "bf16"."""
    shape: tuple[int, ...]
    _address: int
    _owner: Owned

    @property
    def _bytes(self) -> int:
        count = 4 if self.dtype == "fp32" else 2
        for size in self.shape:
            count *= size
        return count

    def numpy(self) -> numpy.ndarray:
        """A read-only array over the file's memory, row-major; float32, float16, or the bits of bf16 as uint16."""
        import numpy

        kind = {"fp32": numpy.float32, "fp16": numpy.float16, "bf16": numpy.uint16}[self.dtype]
        if self._bytes == 0:
            array = numpy.empty(self.shape, kind)
        else:
            memory = (c_uint8 * self._bytes).from_address(self._address)
            memory._owner = self._owner  # type: ignore[attr-defined] # numpy keeps `memory`
            array = numpy.frombuffer(memory, kind).reshape(self.shape)
        array.flags.writeable = False
        return array

    def torch(self) -> torch.Tensor:
        """A tensor on the CPU in the file's dtype.

        A copy: torch knows no read-only tensors, and the file's memory is.
        """
        import torch

        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.dtype]
        copy = torch.empty(self.shape, dtype=kind)
        ctypes.memmove(copy.data_ptr(), self._address, self._bytes)
        return copy


@dataclass(frozen=True)
class Module:
    """One module of an adapter."""

    name: str
    """As the file spells it."""
    algorithm: str
    """For example "LoRA"."""
    rank: int
    alpha: float
    """As the file gives it; the rank when it gives none."""
    tensors: Mapping[str, AdapterTensor]
    """By canonical name."""


class Adapter:
    """One file's worth of modules, opened with `lycore.open`. Never changed by being applied; any number of threads
    may use it.

    The file stays mapped while the adapter, one of its tensors or a stack that it is on is alive: replace it by
    renaming another file over it, never by writing into it.
    """

    def __init__(
        self, source: str | os.PathLike[str] | bytes | bytearray | memoryview, *, library: Library | None = None
    ):
        library = library or load()
        self.path: str | None = None
        new = ("lycore_adapter_open", "lycore_adapter_free")
        if isinstance(source, (bytes, bytearray, memoryview)):
            content = bytes(source)
            start = cast(c_char_p(content), POINTER(c_uint8))
            self._owner: Owned | None = library.new("lycore_adapter_open_memory", new[1], start, len(content))
        else:
            self.path = os.fspath(source)
            self._owner = library.new(*new, encoded_path(self.path))
        self._modules: list[Module] | None = None

    @classmethod
    def of(cls, owner: Owned) -> Adapter:
        """An adapter that the library made in memory."""
        made = cls.__new__(cls)
        made.path, made._owner, made._modules = None, owner, None
        return made

    @property
    def modules(self) -> list[Module]:
        """The modules that can be used, in the order of the file."""
        if self._modules is None:
            owner = self._handle()
            count = owner.library.functions.lycore_adapter_module_count(owner)
            self._modules = [_module(owner, index) for index in range(count)]
        return self._modules

    def report(self) -> dict[str, Any]:
        """The load report: "file", "metadata", "summary", "modules", and what became of every key under "keys"."""
        owner = self._handle()
        return json.loads(owner.library.text("lycore_adapter_report", owner))

    def prefix(self, rank: int) -> Adapter:
        """A new adapter whose modules are cut to their first `rank` ranks; for files in which every prefix works.

        DyLoRA (alpha stays, so the scale becomes alpha / rank) and T-LoRA (the scale stays, as under its mask).
        UnsupportedError when no module has ranks that can be cut.
        """
        owner = self._handle()
        return Adapter.of(owner.library.new("lycore_adapter_prefix", "lycore_adapter_free", owner, rank))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the modules to a safetensors file in the spelling that they were read in; whole or not at all."""
        owner = self._handle()
        owner.library.call("lycore_adapter_save", owner, encoded_path(os.fspath(path)))

    def close(self) -> None:
        """Gives the handle up. Stacks that the adapter is on keep it, and so do tensors taken from it."""
        self._owner = None
        self._modules = None

    def in_library(self, library: Library) -> Owned:
        """The handle of this adapter in `library`; opens the file once more when it was opened by another build."""
        owner = self._handle()
        if owner.library is library:
            return owner
        if self.path is None:
            what = f"The adapter was opened by the build {owner.library.build.describe()}, this call needs another one."
            raise ArgumentError(what, hint="open it from its file, or after the first call that needs torch")
        return Adapter(self.path, library=library)._handle()

    def _handle(self) -> Owned:
        if self._owner is None:
            raise HandleError("The adapter is closed.", file=self.path or "")
        return self._owner

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._owner is None else f"{len(self.modules)} modules"
        return f"<lycore.Adapter {self.path or 'from memory'}: {state}>"


def open_adapter(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> Adapter:
    """Opens an adapter from a path, or from the bytes of a file, which are copied: safetensors, or what torch.save
    writes (.pt, .ckpt, .bin) as far as it asks for nothing but tensors.

    For a PEFT file, `adapter_config.json` beside it gives the alphas. Raises FileError, AdapterKeyError or
    UnsupportedError for a file in which no module can be used; modules that cannot be used beside others that can are
    in the report.
    """
    return Adapter(source)


def report_text(report: Mapping[str, Any], *, all: bool = False) -> str:
    """A report of an adapter, a stack or a merge as plain text of at most 100 columns.

    Lists end after ten entries unless `all`.
    """
    return load().text("lycore_report_text", json.dumps(report).encode(), int(all))


def encoded_path(path: str | bytes) -> bytes:
    """A path as the library takes it: UTF-8."""
    try:
        text = os.fsdecode(path)
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as problem:
        hint = "rename it to a name of Unicode characters"
        raise ArgumentError(f"The path {path!r} is not UTF-8.", hint=hint) from problem
    if b"\0" in encoded:
        raise ArgumentError(f"The path {path!r} has a NUL character.")
    return encoded


def _module(owner: Owned, index: int) -> Module:
    described = lycore_module(struct_size=sizeof(lycore_module))
    owner.library.call("lycore_adapter_module", owner, index, byref(described))
    tensors = {}
    for number in range(described.tensor_count):
        name, tensor = c_char_p(), lycore_tensor()
        owner.library.call("lycore_adapter_tensor", owner, index, number, byref(name), byref(tensor))
        canonical = (name.value or b"").decode()
        dtype = dtype_name(tensor.dtype.code, tensor.dtype.bits)
        address = (tensor.data or 0) + tensor.byte_offset
        tensors[canonical] = AdapterTensor(canonical, dtype, tuple(tensor.shape[: tensor.ndim]), address, owner)
    name, algorithm = described.name.decode(), described.algorithm.decode()
    return Module(name, algorithm, described.rank, described.alpha, tensors)
