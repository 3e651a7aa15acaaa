"""LoHa, LoKr, full and (IA)^3 files by LyCORIS' own save, and LyCORIS' networks that read them back."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import producers
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from torch import nn

RANKS = {1: 0.3, 3: 2.0, 7: 3.5, 16: 24.0, 100_000: 1.0}
"""Rank: alpha. 0.3 is no number of fp16 or bf16, so that the file's own alpha counts, not the one asked for."""


class Wide(producers.Layers):
    """With layers that are wide enough for low-rank halves of rank 7 and 16 in LoKr, and one that has no divisors."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(144, 160)
        self.tall = nn.Linear(64, 160)
        self.prime = nn.Linear(37, 80)
        self.wide_line = nn.Conv1d(64, 60, 3, padding=1)
        self.wide_plane = nn.Conv2d(20, 64, 3, stride=(2, 1), padding=(0, 1), dilation=(1, 2))
        self.wide_space = nn.Conv3d(8, 64, (3, 1, 2))
        self.grouped = nn.Conv2d(24, 36, 3, padding=1, groups=2)


MADE = "made"
"""`create_lycoris` with the options of the file, then `load_weights`. Not for full: it rounds W to the file's dtype."""
LOADED = "loaded"
"""`create_lycoris_from_weights`. It raises where the factors do not tell LyCORIS its own options: LoKr with both halves
decomposed, unbalanced or with a core; and for (IA)^3."""


def on_input(name: str) -> bool:
    """Which layers (IA)^3 scales the inputs of. A grouped one cannot be: LyCORIS' vector is then too long."""
    return name in {"blocks.0.attn.to_out.0", "prime", "line", "plane_point", "wide_plane", "space", "space_point"}


@dataclass(frozen=True)
class Case:
    """One file: what `create_lycoris` is asked for."""

    algo: str
    rank: int = 1
    conv_rank: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: Collection[str] = (MADE, LOADED)
    """The ways in which LyCORIS reads the file and is right."""

    def host(self, seed: int = 1) -> Wide:
        """The model that the file is for. A full file of layers with a bias has `diff_b` for it, so here none has."""
        model = Wide()
        if self.algo == "full":
            for layer in model.modules():
                if hasattr(layer, "bias"):
                    layer.bias = None
        return producers.filled(model, seed)

    def network(self, host: nn.Module, strength: float, dtype: torch.dtype, folder: Path) -> LycorisNetwork:
        """LyCORIS' network on the host, not yet applied."""
        # As the file will have them: LyCORIS computes the scale when it makes a module, and never again.
        alpha, conv_alpha = (float(torch.tensor(RANKS[rank]).to(dtype)) for rank in (self.rank, self.conv_rank))
        options = dict(self.options)
        if self.algo == "ia3":
            preset = folder / "ia3.toml"
            chosen = [f'[name_algo_map."{name}$"]\ntrain_on_input = true\n' for name in host.inputs() if on_input(name)]
            preset.write_text("enable_conv = true\n" + "".join(chosen))
            options["preset"] = str(preset)
        ranks = {"linear_dim": self.rank, "linear_alpha": alpha, "conv_dim": self.conv_rank, "conv_alpha": conv_alpha}
        try:
            return create_lycoris(host, strength, algo=self.algo, **ranks, **options)
        finally:
            # Presets are kept in the class.
            LycorisNetwork.apply_preset({"name_algo_map": {}})

    def write(self, path: Path, host: nn.Module, dtype: torch.dtype | None, seed: int = 2) -> Path:
        """`save_weights` of random factors; with dtype None in the dtypes that they have."""
        network = self.network(copy.deepcopy(host), 1.0, dtype or torch.float32, path.parent)
        generator = torch.Generator().manual_seed(seed)
        for module in network.loras:
            randomise(module, generator)
        network.apply_to()
        network.save_weights(str(path), dtype, {"ss_network_module": "lycoris.kohya"})
        return path

    def read(self, path: Path, host: nn.Module, strength: float, dtype: torch.dtype) -> dict[str, nn.Module]:
        """Copies of the host on which LyCORIS forwards with the file's values, by the way in which it read them."""
        models = {}
        for way in self.reads:
            models[way] = copy.deepcopy(host)
            if way == LOADED:
                network, _ = create_lycoris_from_weights(strength, str(path), models[way])
                network.apply_to()
            else:
                network = self.network(models[way], strength, dtype, path.parent)
                network.apply_to()
                left = network.load_weights(str(path))
                assert not left, left
            network.eval()
        return models


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Factors of a LyCORIS module such that deltas have DELTA_STD, as for LoRA in `producers`."""
    factors = dict(module.named_parameters(recurse=False))
    if module.name == "ia3":
        std = producers.DELTA_STD / producers.BASE_STD
    elif module.name == "full":
        std = producers.DELTA_STD
    else:
        # Every inner axis is a sum over the rank; a Tucker core has one on either side.
        sums = sum(name.endswith(("_b", "_t1", "_t2")) for name in factors)
        std = (producers.DELTA_STD / (module.scale * module.lora_dim ** (sums / 2))) ** (1 / len(factors))
    with torch.no_grad():
        for factor in factors.values():
            factor.copy_(torch.randn(factor.shape, generator=generator) * std)


def _cases() -> dict[str, Case]:
    cases = {}
    for rank, conv_rank in ((1, 7), (7, 16), (16, 1)):
        cases[f"loha-r{rank}"] = Case("loha", rank, conv_rank)
        cases[f"loha-r{rank}-tucker"] = Case("loha", rank, conv_rank, {"use_tucker": True})

    def lokr(name: str, rank: int, conv_rank: int, reads: Collection[str] = (MADE,), **options: Any) -> None:
        cases[f"lokr-{name}"] = Case("lokr", rank, conv_rank, options, reads)

    both, unbalanced = {"decompose_both": True}, {"unbalanced_factorization": True}
    lokr("r1", 1, 7, (MADE, LOADED), factor=-1)
    lokr("r1-both", 1, 1, factor=-1, **both)
    lokr("r7-f4", 7, 7, (MADE, LOADED), factor=4)
    lokr("r7-f4-tucker", 7, 7, factor=4, use_tucker=True)
    lokr("r3-f8-tucker-both", 3, 3, factor=8, use_tucker=True, **both)
    # LyCORIS saves a core of rank 1 and then fails in its own forward: it views a tensor that is not contiguous.
    lokr("r1-f8-tucker-both", 1, 1, (), factor=8, use_tucker=True, **both)
    lokr("r7-f8-unbalanced-both", 7, 7, factor=8, **unbalanced, **both)
    lokr("r16-f4-unbalanced-both", 16, 7, factor=4, **unbalanced, **both)
    lokr("r16-f8", 16, 16, (MADE, LOADED), factor=8)
    # LyCORIS' way to ask for no decomposition at all; the file then says alpha 100000, which is infinite in fp16.
    lokr("whole", 100_000, 100_000, (MADE, LOADED), factor=8, full_matrix=True)
    cases["full"] = Case("full", reads=(LOADED,))
    cases["ia3"] = Case("ia3", reads=(MADE,))
    return cases


CASES = _cases()
