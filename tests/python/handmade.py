"""Modules of every algorithm by hand: the tensors of a file by name and shape, and how large their numbers are.

For machines without the programs that write such files, and for weights that these programs do not take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BASE_STD = DELTA_STD = 0.02
"""Of weights, and of what an adapter adds at strength 1: neither disappears in the other."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Noise:
    """A tensor of normally distributed numbers; with std 0, of one number."""

    shape: Shape
    std: float
    mean: float = 0.0


Module = dict[str, Noise]
"""By the names that the tensors have in a file, after the module's own."""
Make = Callable[[Shape], Module | None]
"""The module for a weight of a shape; None where the algorithm has none for it."""


def number(value: float) -> Noise:
    return Noise((), 0.0, value)


def factors(shapes: Mapping[str, Shape], terms: int, alpha: float | None = None, scale: float = 1.0) -> Module:
    """Factors whose product, a sum of so many terms, has DELTA_STD with the scale."""
    std = (DELTA_STD / (scale * math.sqrt(terms))) ** (1 / len(shapes))
    told = {} if alpha is None else {"alpha": number(alpha)}
    return told | {name: Noise(shape, std) for name, shape in shapes.items()}


def ones(shape: Shape) -> Shape:
    """The axes of a kernel, each of 1."""
    return (1,) * (len(shape) - 2)


def lora(rank: int, core: bool = False) -> Make:
    def module(shape: Shape) -> Module:
        out, channels, *kernel = shape
        shapes = {"lora_down.weight": (rank, channels, *kernel), "lora_up.weight": (out, rank, *ones(shape))}
        if core and kernel:
            shapes["lora_down.weight"] = (rank, channels, *ones(shape))
            shapes["lora_mid.weight"] = (rank, rank, *kernel)
        return factors(shapes, rank ** (len(shapes) - 1), rank / 2, 0.5)

    return module


def loha(rank: int, core: bool = False) -> Make:
    def module(shape: Shape) -> Module:
        out, channels, *kernel = shape
        shapes = {}
        for i in (1, 2):
            if core and kernel:
                shapes[f"hada_t{i}"] = (rank, rank, *kernel)
                shapes |= {f"hada_w{i}_a": (rank, out), f"hada_w{i}_b": (rank, channels)}
            else:
                shapes |= {f"hada_w{i}_a": (out, rank), f"hada_w{i}_b": (rank, channels * math.prod(kernel))}
        return factors(shapes, rank ** (len(shapes) - 2), rank / 2, 0.5)

    return module


def lokr(factor: int, rank: int = 0, low: str = "", core: bool = False) -> Make:
    """`low` names the halves that are products of rank `rank`: "", "1", "2", "12"."""

    def module(shape: Shape) -> Module:
        out, channels, *kernel = shape
        a, b = divisor(out, factor), divisor(channels, factor)
        c, d = out // a, channels // b
        shapes, terms = {}, 1
        if "1" in low:
            shapes |= {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, b)}
            terms *= rank
        else:
            shapes["lokr_w1"] = (a, b)
        if "2" in low and core and kernel:
            shapes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, c), "lokr_w2_b": (rank, d)}
            terms *= rank**2
        elif "2" in low:
            shapes |= {"lokr_w2_a": (c, rank), "lokr_w2_b": (rank, d * math.prod(kernel))}
            terms *= rank
        else:
            shapes["lokr_w2"] = (c, d, *kernel)
        return factors(shapes, terms, rank / 2, 0.5) if low else factors(shapes, 1)

    return module


def divisor(size: int, limit: int) -> int:
    """The largest up to the limit."""
    return next(n for n in range(limit, 0, -1) if size % n == 0)


def full(shape: Shape) -> Module:
    return {"diff": Noise(shape, DELTA_STD)}


def full_and_bias(shape: Shape) -> Module:
    return full(shape) | {"diff_b": Noise(shape[:1], DELTA_STD)}


def ia3(on_input: bool) -> Make:
    def module(shape: Shape) -> Module:
        vector = (1, shape[1], *ones(shape)) if on_input else (shape[0], 1, *ones(shape))
        return {"on_input": number(float(on_input)), "weight": Noise(vector, 0.3)}

    return module


def glora(rank: int) -> Make:
    def module(shape: Shape) -> Module:
        out, channels, *kernel = shape
        a = {"a1.weight": (channels, rank, *ones(shape)), "a2.weight": (rank, channels, *ones(shape))}
        b = {"b1.weight": (out, rank, *ones(shape)), "b2.weight": (rank, channels, *kernel)}
        # A sum over the input channels of W too.
        across = factors(a, rank, scale=0.5 * math.sqrt(channels) * BASE_STD)
        return factors(b, rank, rank / 2, 0.5) | across

    return module


def tlora(rank: int) -> Make:
    """Of matrices only: what LyCORIS adds to a larger kernel means nothing."""

    def module(shape: Shape) -> Module | None:
        if math.prod(shape[2:]) > 1 or min(shape[:2]) < 2 * rank:
            return None
        shapes = {"p_layer.weight": (shape[0], rank, *ones(shape)), "q_layer.weight": (rank, shape[1], *ones(shape))}
        return factors(shapes | {"lambda_layer": (1, rank)}, rank, float(rank))

    return module


def oft(block: int, constraint: float = 0.0, rescaled: bool = False, direct: bool = False) -> Make:
    """Turns by some tenths. `direct`: the rotations themselves, near to I, stand in the file."""

    def module(shape: Shape) -> Module | None:
        if shape[0] % block:
            return None
        return rotations((shape[0] // block, block, block), shape, constraint, rescaled, direct)

    return module


def boft(block: int, stages: int, constraint: float = 0.0, rescaled: bool = False) -> Make:
    """As many of the stages as the rows have room for."""

    def module(shape: Shape) -> Module | None:
        room = [m for m in range(1, stages + 1) if shape[0] % (block << (m - 1)) == 0]
        if not room:
            return None
        return rotations((room[-1], shape[0] // block, block, block), shape, constraint, rescaled)

    return module


def rotations(blocks: Shape, shape: Shape, constraint: float, rescaled: bool, direct: bool = False) -> Module:
    std = 0.25 / math.sqrt(blocks[-1])
    if direct:
        return {"oft_diag": Noise(blocks, std)}
    scales = {"rescale": Noise((shape[0], 1, *ones(shape)), 0.2, 1.0)} if rescaled else {}
    return {"alpha": number(constraint), "oft_blocks": Noise(blocks, std)} | scales


def dora(inner: Make, per_output: bool) -> Make:
    """With magnitudes within some tenths of the norms of W."""

    def module(shape: Shape) -> Module | None:
        # One input channel: nothing would tell its magnitude from a single output's.
        if not per_output and shape[1] == 1:
            return None
        axis = 0 if per_output else 1
        size = tuple(n if i == axis else 1 for i, n in enumerate(shape))
        norm = BASE_STD * math.sqrt(math.prod(shape) / shape[axis])
        return (inner(shape) or {}) | {"dora_scale": Noise(size, 0.1 * norm, norm)}

    return module


def scaled(inner: Make) -> Make:
    """With LyCORIS' scalar, by which it may start from 0."""
    return lambda shape: inner(shape) | {"scalar": Noise((), 0.2, 1.1)}


def set_weight(shape: Shape) -> Module:
    return {"set_weight": Noise(shape, DELTA_STD)}


def peft_lora(rank: int, bias: bool = False, magnitude: bool = False) -> Make:
    def module(shape: Shape) -> Module:
        out, channels, *kernel = shape
        shapes = {"lora_A.weight": (rank, channels, *kernel), "lora_B.weight": (out, rank, *ones(shape))}
        norm = BASE_STD * math.sqrt(math.prod(shape) / out)
        return (
            factors(shapes, rank, scale=0.5)
            | ({"lora_B.bias": Noise(shape[:1], DELTA_STD)} if bias else {})
            | ({"lora_magnitude_vector": Noise(shape[:1], 0.1 * norm, norm)} if magnitude else {})
        )

    return module


def peft_oft(block: int) -> Make:
    """Of the columns."""

    def module(shape: Shape) -> Module | None:
        columns = math.prod(shape[1:])
        if columns % block:
            return None
        upper = block * (block - 1) // 2
        return {"oft_R.weight": Noise((columns // block, upper), 0.25 / math.sqrt(block))}

    return module


def peft_boft(block: int, stages: int) -> Make:
    def module(shape: Shape) -> Module | None:
        columns = math.prod(shape[1:])
        if columns % (block << (stages - 1)):
            return None
        blocks = Noise((stages, columns // block, block, block), 0.5 / math.sqrt(block))
        return {"boft_R": blocks, "boft_s": Noise((shape[0], 1), 0.2, 1.0)}

    return module


def peft_ia3(shape: Shape) -> Module | None:
    # [1, 1] would say that it is on the input.
    if shape[0] == 1:
        return None
    return {"ia3_l": Noise((shape[0], 1) if len(shape) == 2 else (1, shape[0], *ones(shape)), 0.3, 1.0)}


def embedding(rank: int) -> Make:
    def module(shape: Shape) -> Module | None:
        if len(shape) != 2:
            return None
        shapes = {"lora_embedding_A": (rank, shape[0]), "lora_embedding_B": (shape[1], rank)}
        return factors(shapes, rank, scale=0.5)

    return module


def vera(rank: int) -> Make:
    """The projections are in `SHARED`."""

    def module(shape: Shape) -> Module | None:
        lambdas = {"vera_lambda_b": Noise(shape[:1], 0.3), "vera_lambda_d": Noise((rank,), 0.3)}
        return lambdas if len(shape) == 2 else None

    return module


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    make: Make
    config: Mapping[str, Any] | None = None
    """PEFT's configuration, beside files in its spelling."""
    shared: Mapping[str, Noise] | None = None
    """What stands in the file once for all modules."""

    def write(
        self, path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype | tuple[torch.dtype, ...], seed: int = 1
    ) -> dict[str, str]:
        """Writes a file with a module on each of these weights that the kind has one for; the weights by module.

        With several dtypes, the tensors take turns.
        """
        generator = torch.Generator().manual_seed(seed)
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        tensors, found = {}, {}
        for name, shape in shapes.items():
            layer = name.removesuffix(".weight")
            key = "lycoris_" + layer.replace(".", "_") if self.config is None else f"base_model.model.{layer}"
            for part, noise in (self.make(shape) or {}).items():
                tensors[f"{key}.{part}"] = noise
                found[key] = name
        tensors |= self.shared or {}
        values = {
            key: drawn(noise, key, generator).to(dtypes[i % len(dtypes)])
            for i, (key, noise) in enumerate(tensors.items())
        }
        save_file(values, path)
        if self.config is not None:
            path.with_name("adapter_config.json").write_text(json.dumps(self.config))
        return found


def drawn(noise: Noise, key: str, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(noise.shape, generator=generator) * noise.std + noise.mean
    # What turns nothing is I, not 0.
    return values + torch.eye(noise.shape[-1]) if key.endswith("oft_diag") else values


def _lora_config(rank: int, **more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank / 2, "rank_pattern": {}, "alpha_pattern": {}, **more}


def _oft_config(**more: Any) -> dict[str, Any]:
    plain = {"coft": False, "eps": 0.3, "block_share": False, "use_cayley_neumann": False}
    return {"peft_type": "OFT", "oft_block_size": 4, "num_cayley_neumann_terms": 5, **plain, **more}


def _kinds() -> dict[str, Kind]:
    made: dict[str, Make] = {f"lora-r{rank}": lora(rank) for rank in (1, 7, 16)}
    made |= {"lora-core": lora(5, core=True), "lora-scalar": scaled(lora(4))}
    made |= {"loha": loha(7), "loha-core": loha(3, core=True), "loha-scalar": scaled(loha(4))}
    made |= {"lokr": lokr(8), "lokr-f4": lokr(4), "lokr-low-1": lokr(8, 2, "1"), "lokr-low-2": lokr(8, 3, "2")}
    made |= {"lokr-low-12": lokr(4, 3, "12"), "lokr-core": lokr(4, 2, "2", core=True)}
    made |= {"lokr-low-core": lokr(4, 2, "12", core=True), "lokr-scalar": scaled(lokr(4, 3, "2"))}
    made |= {"full": full, "full-and-bias": full_and_bias, "ia3-out": ia3(False), "ia3-in": ia3(True)}
    made |= {"glora-r1": glora(1), "glora-r7": glora(7), "tlora": tlora(3), "set": set_weight}
    for side in ("out", "in"):
        inners = {"lora": lora(7), "core": lora(3, core=True), "loha": loha(5)}
        inners["lokr"] = lokr(4, 3, "2")
        made |= {f"dora-{name}-{side}": dora(inner, side == "out") for name, inner in inners.items()}
    made |= {"oft-4": oft(4), "oft-8": oft(8), "oft-2-bound": oft(2, 0.01), "oft-4-rescaled": oft(4, rescaled=True)}
    made |= {"oft-direct": oft(4, direct=True), "oft-8-bound-rescaled": oft(8, 0.01, rescaled=True)}
    made |= {"boft-4-1": boft(4, 1), "boft-4-4": boft(4, 4), "boft-8-3": boft(8, 3), "boft-2-bound": boft(2, 3, 0.01)}
    made |= {"boft-4-rescaled": boft(4, 3, 0.01, rescaled=True)}
    kinds = {name: Kind(make) for name, make in made.items()}
    kinds["peft-lora-bias"] = Kind(peft_lora(6, bias=True), _lora_config(6))
    kinds["peft-dora"] = Kind(peft_lora(6, magnitude=True), _lora_config(6, use_dora=True))
    kinds["peft-oft"] = Kind(peft_oft(4), _oft_config())
    kinds["peft-oft-bound"] = Kind(peft_oft(4), _oft_config(coft=True))
    kinds["peft-oft-series"] = Kind(peft_oft(8), _oft_config(use_cayley_neumann=True, oft_block_size=8))
    kinds["peft-boft"] = Kind(peft_boft(4, 2), {"peft_type": "BOFT", "boft_block_size": 4})
    kinds["peft-ia3"] = Kind(peft_ia3, {"peft_type": "IA3", "feedforward_modules": []})
    kinds["peft-embedding"] = Kind(embedding(5), _lora_config(5))
    kinds["peft-vera"] = Kind(
        vera(9),
        {"peft_type": "VERA", "r": 9},
        {"base_model.vera_A": Noise((9, 1100), 0.3), "base_model.vera_B": Noise((1100, 9), 0.3)},
    )
    return kinds


KINDS = _kinds()
