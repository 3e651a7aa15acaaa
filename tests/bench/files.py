"""Adapter files of every algorithm: a module on every weight of a set, random factors as large as trained ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import formula
import torch
from safetensors.torch import save_file

STD = 0.02
"""Of the weights' elements."""


@dataclass(frozen=True)
class Noise:
    """A tensor of normally distributed numbers; with std 0, of one number."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


Module = Callable[[tuple[int, ...]], dict[str, Noise]]
"""The tensors of a module by their keys, for a weight of this shape."""


@dataclass(frozen=True)
class File:
    """An adapter file, and what it does to the sampled weights by the fp64 formula."""

    path: Path
    changes: Mapping[str, formula.Change]
    """By weight."""

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


def lora(rank: int) -> Module:
    """Adds numbers of about 0.03, whatever the rank."""
    std = 0.1 * (32 / rank) ** 0.25

    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        rows, columns, *kernel = shape
        ones = (1,) * len(kernel)
        return {
            "alpha": number(rank / 2),
            "lora_down.weight": Noise((rank, columns, *kernel), std),
            "lora_up.weight": Noise((rows, rank, *ones), std),
        }

    return module


def dora(rank: int, per_output: bool = True) -> Module:
    """LoRA with a magnitude within some tenths of the norms of W."""

    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        rows, columns = shape
        norm = STD * math.sqrt(columns if per_output else rows)
        scale = Noise((rows, 1) if per_output else (1, columns), 0.1 * norm, norm)
        return lora(rank)(shape) | {"dora_scale": scale}

    return module


def loha(rank: int) -> Module:
    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        rows, columns = shape
        std = 0.2 * (32 / rank) ** 0.25
        halves = {f"hada_w{i}_a": Noise((rows, rank), std) for i in (1, 2)}
        return {"alpha": number(rank / 2)} | halves | {f"hada_w{i}_b": Noise((rank, columns), std) for i in (1, 2)}

    return module


def lokr(factor: int) -> Module:
    """Both halves whole."""

    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        rows, columns = shape
        return {
            "lokr_w1": Noise((factor, factor), 0.17),
            "lokr_w2": Noise((rows // factor, columns // factor), 0.17),
        }

    return module


def full(shape: tuple[int, ...]) -> dict[str, Noise]:
    return {"diff": Noise(shape, STD)}


def ia3(shape: tuple[int, ...]) -> dict[str, Noise]:
    return {"on_input": number(0.0), "weight": Noise((shape[0], 1), 0.3)}


def glora(rank: int) -> Module:
    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        rows, columns = shape
        shapes = {"a1": (columns, rank), "a2": (rank, columns), "b1": (rows, rank), "b2": (rank, columns)}
        return {"alpha": number(rank / 2)} | {f"{n}.weight": Noise(size, 0.1) for n, size in shapes.items()}

    return module


def oft(block: int) -> Module:
    """Turns by some tenths; alpha is the constraint, 0 for none."""

    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        blocks = Noise((shape[0] // block, block, block), 0.25 / math.sqrt(block))
        return {"alpha": number(0.0), "oft_blocks": blocks}

    return module


def boft(block: int, stages: int) -> Module:
    def module(shape: tuple[int, ...]) -> dict[str, Noise]:
        blocks = Noise((stages, shape[0] // block, block, block), 0.25 / math.sqrt(block))
        return {"alpha": number(0.0), "oft_blocks": blocks}

    return module


def number(value: float) -> Noise:
    return Noise((), 0.0, value)


def write(
    path: Path,
    module: Module,
    weights: Mapping[str, torch.Tensor],
    samples: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    seed: int,
) -> File:
    """Writes the file, as `safetensors` would: all tensors of one dtype in the order of their names.

    So numbers between the factors leave many of them at addresses that are no multiple of 4, as in kohya's files.
    """
    device = next(iter(weights.values())).device
    keys = {f"lora_unet_{name.replace('.', '_')}": name for name in weights}
    tensors = {
        f"{key}.{part}": noise for key, name in keys.items() for part, noise in module(weights[name].shape).items()
    }
    tensors = dict(sorted(tensors.items()))
    sizes = [math.prod(noise.shape) for noise in tensors.values()]
    # One piece for all, which is drawn and copied at once.
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    flat.normal_(generator=torch.Generator(device).manual_seed(seed))
    for part, noise in zip(flat.split(sizes), tensors.values(), strict=True):
        part.mul_(noise.std).add_(noise.mean)
    flat = flat.cpu()
    parts = dict(zip(tensors, flat.split(sizes), strict=True))
    kind, header, at = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype], {}, 0
    for name, noise in tensors.items():
        end = at + parts[name].nbytes
        header[name] = {"dtype": kind, "shape": noise.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        flat.view(torch.uint8).numpy().tofile(file)

    sampled = tuple(f"{key}." for key, name in keys.items() if name in samples)
    chosen = {n: parts[n].reshape(noise.shape) for n, noise in tensors.items() if n.startswith(sampled)}
    # Read back by the tests' own reader, which knows what alpha stands for.
    beside = path.with_suffix(".sampled")
    save_file(chosen, beside)
    changes = {keys[key]: change for key, change in formula.read(beside).items()}
    beside.unlink()
    return File(path, changes)
