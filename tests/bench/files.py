"""Adapter files with a module on every weight of a set, written fast: some have gigabytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import formula
import torch
from handmade import Make
from safetensors.torch import save_file


@dataclass(frozen=True)
class File:
    """An adapter file, and what it does to the sampled weights by the fp64 formula."""

    path: Path
    changes: Mapping[str, formula.Change]
    """By weight."""

    @property
    def megabytes(self) -> float:
        return self.path.stat().st_size / 1e6


def write(
    path: Path,
    make: Make,
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
        f"{key}.{part}": noise for key, name in keys.items() for part, noise in make(tuple(weights[name].shape)).items()
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
