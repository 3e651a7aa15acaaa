"""Weights on the device that is tested, however they lie in memory, and what becomes of them by the formula.

LYCORE_TEST_DEVICE=cpu runs on the CPU what needs no GPU: to see anywhere that the tests themselves are right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import formula
import handmade
import pytest
import torch

import lycore

DEVICE = os.environ.get("LYCORE_TEST_DEVICE", "cuda")
GPU = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="skipped: no GPU")
ONLY_GPU = pytest.mark.skipif(not torch.cuda.is_available() or DEVICE != "cuda", reason="skipped: no GPU")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
BACKUPS = ["device", "host", "compact"]
SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (64, 72),
    "square": (64, 64),
    "narrow": (96, 24),
    "odd": (80, 37),
    "prime": (37, 53),
    "row": (1, 48),
    "column": (48, 1),
    "wide": (160, 144),
    "tall": (257, 129),
    "line": (32, 24, 3),
    "point": (56, 48, 1, 1),
    "plane": (32, 20, 3, 3),
    "oblong": (24, 16, 3, 1),
    "space": (20, 12, 3, 3, 3),
}
"""No multiples of what kernels like: rows of 16, columns of 8 and 32; a single row, a single column, several tiles."""


EACH_FORM = (
    *("lora-r7", "lora-r16", "lora-core", "loha", "lokr", "lokr-low-2", "full", "ia3-out", "ia3-in", "glora-r7"),
    *("dora-lora-out", "dora-lora-in", "dora-lokr-in", "oft-4-rescaled", "boft-4-4", "peft-oft", "peft-boft", "set"),
)
"""One file for every primitive of the executors and each of their axes."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights(
    dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, biases: bool = False, seed: int = 3
) -> dict[str, torch.Tensor]:
    """By name, in host memory."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = (torch.randn(shape, generator=generator) * handmade.BASE_STD).to(dtype)
        if biases:
            found[f"{name}.bias"] = (torch.randn(shape[0], generator=generator) * handmade.BASE_STD).to(dtype)
    return found


def shapes_of(base: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in base.items() if name.endswith(".weight")}


# How a weight lies in memory. Each gives the memory, and the view of it that is the weight.

Laid = tuple[torch.Tensor, torch.Tensor]


def contiguous(weight: torch.Tensor) -> Laid:
    memory = weight.clone(memory_format=torch.contiguous_format)
    return memory, memory


def channels_last(weight: torch.Tensor) -> Laid:
    order = (0, *range(2, weight.ndim), 1)
    memory = weight.permute(order).contiguous()
    return memory, memory.permute(0, -1, *range(1, weight.ndim - 1))


def transposed(weight: torch.Tensor) -> Laid:
    """[O, I] with the strides (1, O)."""
    memory = weight.permute(*reversed(range(weight.ndim))).contiguous()
    return memory, memory.permute(*reversed(range(weight.ndim)))


def rows_apart(weight: torch.Tensor) -> Laid:
    """A piece of a larger one, in rows and in channels."""
    memory = noise(weight, (weight.shape[0] + 3, weight.shape[1] + 5, *weight.shape[2:]))
    return memory, into(memory[2:-1, 1:-4], weight)


def columns_apart(weight: torch.Tensor) -> Laid:
    memory = noise(weight, (weight.shape[0], 2 * weight.shape[1], *weight.shape[2:]))
    return memory, into(memory[:, 1::2], weight)


def at_odd_address(weight: torch.Tensor) -> Laid:
    """One element past where memory begins: a multiple of the element's size and of nothing else."""
    memory = noise(weight, (weight.numel() + 8,))
    return memory, into(memory[1:-7].view(weight.shape), weight)


def noise(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator(like.device).manual_seed(17)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def into(place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return place.copy_(weight)


LAYOUTS: dict[str, Callable[[torch.Tensor], Laid]] = {
    "contiguous": contiguous,
    "channels_last": channels_last,
    "transposed": transposed,
    "rows_apart": rows_apart,
    "columns_apart": columns_apart,
    "at_odd_address": at_odd_address,
}


class Host:
    """Weights of a model on the device, and what they were."""

    def __init__(self, base: Mapping[str, torch.Tensor], layout: str = "contiguous"):
        self.base = dict(base)
        self.memory, self.live = {}, {}
        for name, weight in base.items():
            self.memory[name], self.live[name] = LAYOUTS[layout](weight.to(DEVICE, copy=True))
        self._before = {name: memory.clone() for name, memory in self.memory.items()}

    def intact(self) -> bool:
        """Bit for bit, and so is the memory around the weights."""
        return all(same_bits(self.memory[name], before) for name, before in self._before.items())

    def around_intact(self) -> bool:
        """What lies between the elements of the weights."""
        for name, before in self._before.items():
            weight, memory = self.live[name], self.memory[name]
            outside = torch.ones(memory.numel(), dtype=torch.bool, device=memory.device)
            outside.as_strided(weight.shape, weight.stride(), weight.storage_offset()).fill_(False)
            if not torch.equal(integers(memory).reshape(-1)[outside], integers(before).reshape(-1)[outside]):
                return False
        return True

    def bits(self) -> dict[str, torch.Tensor]:
        """A copy of the weights as they are now."""
        return {name: weight.contiguous().cpu().clone() for name, weight in self.live.items()}

    def is_like(self, bits: Mapping[str, torch.Tensor]) -> bool:
        return all(same_bits(self.live[name].cpu(), wanted) for name, wanted in bits.items())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """-0 and 0 differ here, and a NaN equals itself."""
    return torch.equal(integers(a), integers(b))


def integers(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.element_size()])


class Adapter:
    """A file, and by the formula what it does to the weights of a host."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float16,
        seed: int = 1,
        make: handmade.Make | None = None,
    ):
        # In a folder of its own, where PEFT's configuration is beside it.
        self.path = folder / f"{kind}-{seed}" / "adapter_model.safetensors"
        self.path.parent.mkdir(exist_ok=True)
        made = handmade.Kind(make) if make else handmade.KINDS[kind]
        self.kind, self.modules = kind, made.write(self.path, shapes, dtype, seed)
        changes = formula.read(self.path, made.config)
        assert changes.keys() == self.modules.keys()
        self.changes = {self.modules[module]: change for module, change in changes.items()}

    def parts(self, base: Mapping[str, torch.Tensor]) -> list[tuple[str, formula.Change | formula.OfBias]]:
        """Every weight and bias that it changes, and how."""
        return [part for name, change in self.changes.items() for part in formula.parts_of(change, name, base)]


def tally(result: formula.Tally, host: Host, terms: Sequence[tuple[float, Adapter]], what: str = "") -> None:
    """Every weight of the host against the formula."""
    changes: dict[str, list[tuple[float, formula.Change | formula.OfBias]]] = {}
    for strength, adapter in terms:
        for name, part in adapter.parts(host.base):
            changes.setdefault(name, []).append((strength, part))
    for name, weight in host.live.items():
        if name in changes:
            result.add(f"{name} {what}", weight.cpu(), host.base[name], changes[name])
        else:
            assert same_bits(weight.cpu(), host.base[name]), f"{name} {what}: nothing is on it"


@contextmanager
def stack_on(host: Host, **options: object) -> Iterator[lycore.Stack]:
    """A stack; at its end the weights are the base, and so is all memory around them."""
    with lycore.Stack(host.live, **options) as stack:
        yield stack
    assert host.intact(), "the base again, bit for bit"
