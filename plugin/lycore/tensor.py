"""torch tensors and numpy arrays as the library's tensor descriptors. Imports neither."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import addressof, c_float, c_int64
from typing import Any

from ._binding import (
    LYCORE_DEVICE_CPU,
    LYCORE_DEVICE_CUDA,
    LYCORE_DTYPE_BFLOAT,
    LYCORE_DTYPE_FLOAT,
    LYCORE_DTYPE_FLOAT8_E4M3FN,
    LYCORE_DTYPE_FLOAT8_E5M2,
    LYCORE_MAX_DIMS,
    lycore_slice,
    lycore_tensor,
)
from .errors import ArgumentError, DeviceError, DtypeError

_CODES = {
    "float32": (LYCORE_DTYPE_FLOAT, 32),
    "float16": (LYCORE_DTYPE_FLOAT, 16),
    "bfloat16": (LYCORE_DTYPE_BFLOAT, 16),
    "float8_e4m3fn": (LYCORE_DTYPE_FLOAT8_E4M3FN, 8),
    "float8_e5m2": (LYCORE_DTYPE_FLOAT8_E5M2, 8),
}
_NAMES = {
    (LYCORE_DTYPE_FLOAT, 32): "fp32",
    (LYCORE_DTYPE_FLOAT, 16): "fp16",
    (LYCORE_DTYPE_BFLOAT, 16): "bf16",
    (LYCORE_DTYPE_FLOAT8_E4M3FN, 8): "fp8 e4m3fn",
    (LYCORE_DTYPE_FLOAT8_E5M2, 8): "fp8 e5m2",
}


def is_torch(value: Any) -> bool:
    """Whether a value is a torch tensor; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_numpy(value: Any) -> bool:
    """Whether a value is a numpy array; numpy is not imported for the question."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def dtype_name(code: int, bits: int) -> str:
    """ "fp32", "fp16", "bf16", "fp8 e4m3fn" or "fp8 e5m2"."""
    return _NAMES.get((code, bits), f"code {code}, {bits} bits")


class Descriptor:
    """A `lycore_tensor` over the memory of a tensor, which it keeps alive.

    Takes torch tensors on the CPU or a CUDA device (float32, float16, bfloat16; any strides) and numpy arrays
    (float32, float16, and ml_dtypes' bfloat16; no negative strides). With `writable`, a read-only array is an
    ArgumentError. `name` is used in errors.
    """

    __slots__ = ("_shape", "_strides", "c", "cuda_index", "owner")

    def __init__(self, value: Any, name: str, *, writable: bool = False):
        if is_torch(value):
            self._of_torch(value, name)
        elif is_numpy(value):
            self._of_numpy(value, name, writable)
        else:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            what = f"`{name}` is a {kind}, not a torch tensor or a numpy array."
            raise ArgumentError(what, hint="convert it first", key=name)
        self.owner = value

    @classmethod
    def number(cls, value: float) -> Descriptor:
        """One fp32 number in host memory, as a tensor without axes."""
        self = cls.__new__(cls)
        self.cuda_index, self.owner = None, c_float(value)
        self._fill(addressof(self.owner), "float32", (), (), "number")
        return self

    def _of_torch(self, value: Any, name: str) -> None:
        layout = str(value.layout)
        if layout != "torch.strided":
            raise ArgumentError(f"`{name}` has the layout {layout}.", hint="call .to_dense() first", key=name)
        device = value.device
        if device.type == "cuda":
            self.cuda_index: int | None = device.index or 0
        elif device.type == "cpu":
            self.cuda_index = None
        else:
            what = f"`{name}` is on {device}; LyCore works on the CPU and on CUDA devices."
            raise DeviceError(what, hint="move the model there first", key=name)
        dtype = str(value.dtype).removeprefix("torch.")
        self._fill(value.data_ptr(), dtype, value.shape, value.stride(), name)

    def _of_numpy(self, value: Any, name: str, writable: bool) -> None:
        if writable and not value.flags.writeable:
            raise ArgumentError(f"`{name}` is a read-only array.", hint="pass a copy: array.copy()", key=name)
        if not value.dtype.isnative:
            raise DtypeError(f"`{name}` is not in this machine's byte order.", hint="convert it first", key=name)
        size = value.itemsize
        if any(step < 0 or step % size for step in value.strides):
            what = f"`{name}` has the strides {value.strides} in bytes, with {size} bytes per element."
            raise ArgumentError(what, hint="pass a copy: array.copy()", key=name)
        self.cuda_index = None
        strides = [step // size for step in value.strides]
        self._fill(value.ctypes.data, value.dtype.name, value.shape, strides, name)

    def _fill(self, data: int, dtype: str, shape: Sequence[int], strides: Sequence[int], name: str) -> None:
        if dtype not in _CODES:
            hint = "convert it to float32, float16 or bfloat16 first"
            raise DtypeError(f"`{name}` has the dtype {dtype}.", hint=hint, key=name)
        if len(shape) > LYCORE_MAX_DIMS:
            raise ArgumentError(f"`{name}` has {len(shape)} axes; the limit is {LYCORE_MAX_DIMS}.", key=name)
        if data == 0 and 0 not in shape:
            hint = "pass the tensor that holds the weight, not a wrapper around it"
            raise ArgumentError(f"`{name}` has no memory.", hint=hint, key=name)
        axes = c_int64 * len(shape)
        self._shape, self._strides = axes(*shape), axes(*strides)
        self.c = c = lycore_tensor()
        c.data, c.ndim, c.shape, c.strides = data, len(shape), self._shape, self._strides
        c.dtype.code, c.dtype.bits = _CODES[dtype]
        c.dtype.lanes = 1
        if self.cuda_index is None:
            c.device.device_type = LYCORE_DEVICE_CPU
        else:
            c.device.device_type, c.device.device_id = LYCORE_DEVICE_CUDA, self.cuda_index


def row_major(value: Any) -> Any:
    """The tensor itself when it lies row-major, else a copy that does."""
    if is_torch(value):
        return value.detach().contiguous()
    if is_numpy(value):
        return value if value.flags.c_contiguous else value.copy(order="C")
    return value


def slice_of(given: tuple[int, int, int] | None, name: str) -> lycore_slice | None:
    """(axis, start, length) as a C struct."""
    if given is None:
        return None
    try:
        axis, start, length = (int(number) for number in given)
    except (TypeError, ValueError) as problem:
        what = f"`{name}`: a slice is (axis, start, length), not {given!r}."
        raise ArgumentError(what, key=name) from problem
    if min(axis, start, length) < 0:
        raise ArgumentError(f"`{name}`: a slice has no negative numbers, got {given!r}.", key=name)
    return lycore_slice(axis=axis, start=start, length=length)


def stream_of(links_torch: bool, cuda_index: int | None) -> int | None:
    """What a call's `stream` must be for tensors on this device.

    NULL is libtorch's current stream of this thread where the library links libtorch. Any other build is told the
    stream; 0 is torch's name for the legacy default stream, which CUDA calls 1.
    """
    if links_torch or cuda_index is None:
        return None
    return sys.modules["torch"].cuda.current_stream(cuda_index).cuda_stream or 1
