"""Folders of PEFT's methods by its own `save_pretrained`, and which of PEFT's paths are right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft.tuners.boft.layer as boft_layer
import producers
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class Layers(producers.Layers):
    """With an embedding, and with a convolution that takes no part of its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(90, 24)
        self.tiles = nn.Conv2d(16, 32, 3, stride=3)

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(13)
        return super().inputs() | {"words": torch.randint(90, (3, 5), generator=generator)}


LINEAR = ("blocks.0.attn.to_q", "blocks.0.attn.to_out.0", "time_emb_proj")
LINES, SPACES = ("line", "line_point"), ("space", "space_point")
PLANES = ("plane", "plane_oblong", "plane_point", "tiles")
SQUARE = ("plane", "plane_point", "tiles")
"""PEFT's OFT and BOFT take the first of a kernel's sizes for both."""


@dataclass(frozen=True)
class Case:
    """One folder."""

    config: type[PeftConfig]
    layers: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    not_forward: tuple[str, ...] = ()
    """Layers whose forward in PEFT is not that of its merged weight."""
    not_merge: tuple[str, ...] = ()
    """Layers that PEFT cannot merge."""
    linear: bool = False
    """PEFT scales the method by a strength as we do; elsewhere it does not, or does it in another place."""
    butterfly: bool = False

    def model(self, dtype: torch.dtype, seed: int = 2) -> tuple[nn.Module, PeftModel]:
        """The host and PEFT's model on a copy of it, with random parameters that are numbers of `dtype`."""
        host, options = self.host(), dict(self.options)
        if self.config is VeraConfig:
            options |= {"save_projection": True}
        with torch_butterfly(self.butterfly):
            config = self.config(target_modules=list(self.layers), **options)
            model = get_peft_model(copy.deepcopy(host), config)
        generator = torch.Generator().manual_seed(seed)
        for name, values in own_tensors(model):
            noise = torch.randn(values.shape, generator=generator)
            values.copy_(start(name, values, noise, model).to(dtype))
        return host, model.eval()

    def host(self) -> Layers:
        generator = torch.Generator().manual_seed(1)
        model = Layers()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        return producers.filled(model)

    def write(self, folder: Path, model: PeftModel, dtype: torch.dtype) -> Path:
        """`save_pretrained`; the file."""
        stored = copy.deepcopy(model)
        for name, module in stored.named_modules():
            for key, values in [*module._parameters.items(), *module._buffers.items()]:
                if values is not None and is_own(f"{name}.{key}"):
                    values.data = values.data.to(dtype)
        stored.save_pretrained(folder, save_embedding_layers=False)
        return folder / "adapter_model.safetensors"


WORDS = ("lora_", "hada_", "lokr_", "oft_R", "boft_R", "boft_s", "ia3_l", "vera_")


def is_own(name: str) -> bool:
    """Of the adapter, and in its file."""
    return any(word in name for word in WORDS) and not name.endswith((".rows", ".cols"))


def own_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the adapter once; VeRA's layers share two."""
    seen = set()
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if is_own(name) and values.data_ptr() not in seen:
            seen.add(values.data_ptr())
            yield name, values.data


def start(name: str, values: torch.Tensor, noise: torch.Tensor, model: PeftModel) -> torch.Tensor:
    """Random values such that deltas are about DELTA_STD, and rotations turn by as much."""
    if "magnitude" in name or "boft_s" in name:
        return values * (1 + 0.2 * noise)
    if "ia3_l" in name:
        return 1 + 0.3 * noise
    if "boft_R" in name:
        return noise * 0.5 / values.shape[-1] ** 0.5
    if "oft_R" in name:
        return noise * 0.25 / (2 * values.shape[-1]) ** 0.25
    if "vera_lambda" in name:
        return noise * 0.3
    if "vera_" in name:
        return values
    if name.endswith("bias"):
        return noise * 0.3
    word = next(w for w in WORDS if w in name)
    layer = model.get_submodule(name[: name.index(f".{word}")])
    # lora_A, lora_A.weight; hada_t1; lokr_w2_b ..
    factors = [n for n in layer.adapter_layer_names if word in n and "default" in getattr(layer, n)]
    factors = [n for n in factors if "magnitude" not in n]
    sums = sum(n.endswith(("_b", "_t1", "_t2", "_A")) for n in factors)
    size = producers.DELTA_STD / (layer.scaling["default"] * layer.r["default"] ** (sums / 2))
    return noise * size ** (1 / len(factors))


@contextmanager
def torch_butterfly(wanted: bool) -> Iterator[None]:
    """PEFT makes butterflies of several stages only where its CUDA extension is, which puts blocks on a diagonal. Here
    torch does that; permutations, rotations and their order remain PEFT's.
    """

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in blocks])

    before = boft_layer.get_fbd_cuda, boft_layer.FastBlockDiag
    if wanted:
        boft_layer.get_fbd_cuda, boft_layer.FastBlockDiag = (lambda: True), BlockDiagonal
    try:
        yield
    finally:
        boft_layer.get_fbd_cuda, boft_layer.FastBlockDiag = before


def tuned_layers(model: PeftModel) -> Iterator[tuple[str, BaseTunerLayer]]:
    """PEFT's layers by the names in the host."""
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name, layer


def _cases() -> dict[str, Case]:
    # The bias of a layer without one is an output's that no weight can hold.
    biased = tuple(n for n in LINEAR + LINES + PLANES + SPACES if n != "blocks.0.attn.to_out.0")
    every = LINEAR + LINES + PLANES + SPACES
    without_space = LINEAR + LINES + PLANES
    # It squeezes two of the three axes of a 1x1x1 kernel.
    point = ("space_point",)
    patterns = {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"plane": 9, "line": 1}}
    cases = {
        "dora-r7": Case(LoraConfig, every, {"use_dora": True, "r": 7, "lora_alpha": 3.5}, not_merge=point),
        "dora-r16-rslora": Case(
            LoraConfig, every, {"use_dora": True, "r": 16, "lora_alpha": 24, "use_rslora": True}, not_merge=point
        ),
        "lora-bias": Case(
            LoraConfig, biased, {"lora_bias": True, "r": 3, "lora_alpha": 7}, not_merge=point, linear=True
        ),
        # `scale_layer` leaves embeddings out.
        "embedding": Case(LoraConfig, ("words", *LINEAR), {"r": 5, "lora_alpha": 3}),
        "vera": Case(VeraConfig, LINEAR, {"r": 9}),
        "ia3": Case(IA3Config, LINEAR + PLANES + SPACES, {"feedforward_modules": [LINEAR[0], "plane", "space"]}),
    }
    for cored in (False, True):
        core = {"use_effective_conv2d": cored}
        name = "-core" if cored else ""
        options = {"r": 7, "alpha": 3, **patterns, **core}
        cases[f"loha{name}"] = Case(LoHaConfig, without_space, options, linear=True)
        for factor, both in ((-1, False), (4, True), (8, True)):
            options = {"r": 3, "alpha": 2, "decompose_factor": factor, "decompose_both": both, **patterns, **core}
            # Of a Conv1d with a whole w2 it takes w1 for one kernel long and multiplies it along the wrong axes.
            lines = LINES if factor == 8 else ()
            skipped = {"not_forward": lines, "not_merge": lines}
            kind = f"lokr-f{factor}{'-both' * both}{name}"
            cases[kind] = Case(LoKrConfig, without_space, options, **skipped, linear=True)
    whole, skipped = {"r": 64, "alpha": 16, "decompose_factor": 8}, {"not_forward": LINES, "not_merge": LINES}
    cases["lokr-whole"] = Case(LoKrConfig, without_space, whole, **skipped, linear=True)
    # The forward of a convolution sums overlapping patches, and leaves padding and edges out.
    for terms in (2, 3, 4, 5, 7):
        options = {"r": 4, "oft_block_size": 0, "use_cayley_neumann": True, "num_cayley_neumann_terms": terms}
        cases[f"oft-series-{terms}"] = Case(OFTConfig, LINEAR + SQUARE, options, not_forward=SQUARE)
    for name, options in {
        "exact": {},
        "exact-coft": {"coft": True, "eps": 0.5},
        "series-coft": {"coft": True, "eps": 0.3, "use_cayley_neumann": True},
        "exact-shared": {"block_share": True},
        "series-shared-coft": {"block_share": True, "coft": True, "eps": 0.3, "use_cayley_neumann": True},
    }.items():
        options = {"oft_block_size": 4, "use_cayley_neumann": False} | options
        cases[f"oft-{name}"] = Case(OFTConfig, LINEAR + SQUARE, options, not_forward=SQUARE)
    for name, options, layers in (
        ("b4", {"boft_block_size": 4}, LINEAR + SQUARE),
        ("b4-2", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, (*LINEAR, "plane_point", "tiles")),
        ("b4-3", {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, (LINEAR[1], "plane_point", "tiles")),
        ("n4-2", {"boft_block_num": 4, "boft_block_size": 0, "boft_n_butterfly_factor": 2}, (*LINEAR, "tiles")),
    ):
        cases[f"boft-{name}"] = Case(BOFTConfig, layers, options, butterfly="n_butterfly" in str(options))
    return cases


CASES = _cases()
