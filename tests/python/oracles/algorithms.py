"""Files of every algorithm of LyCORIS by its own save, and LyCORIS' networks that read them back."""

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


class Normed(Wide):
    """With norms, which start at 1 and 0: both are moved, or an error relative to them would hide."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(48)
        self.group_norm = nn.GroupNorm(4, 24)

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(12)
        norms = {"layer_norm": (3, 5, 48), "group_norm": (2, 24, 7, 7)}
        return super().inputs() | {name: torch.randn(shape, generator=generator) for name, shape in norms.items()}


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
    only_at_1: bool = False
    """Its rule of the strength is another one than ours, and only at strength 1 the same."""
    without: Collection[str] = ()
    """Layers that LyCORIS cannot put this algorithm on, or not rightly."""

    def host(self, seed: int = 1) -> Wide:
        """The model that the file is for."""
        model = Normed() if self.options.get("train_norm") else Wide()
        for name in self.without:
            delattr(model, name)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm.w" in name)
        return producers.filled(model, seed)

    def network(self, host: nn.Module, strength: float, dtype: torch.dtype, folder: Path) -> LycorisNetwork:
        """LyCORIS' network on the host, not yet applied."""
        # As the file will have them: LyCORIS computes the scale when it makes a module, and never again.
        alphas = torch.tensor([RANKS.get(rank, 1.0) for rank in (self.rank, self.conv_rank)])
        alpha, conv_alpha = alphas.to(dtype).tolist()
        options = dict(self.options)
        if "constraint" in options:
            options["constraint"] = float(torch.tensor(options["constraint"]).to(dtype))
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
                # T-LoRA's start is no part of the file: it is computed from the host's weights again.
                missing = [key for key in left.pop("missing keys", []) if ".base_" not in key]
                assert not missing, missing
                assert not left, left
            network.eval()
        return models


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Factors of a LyCORIS module such that deltas have DELTA_STD, as for LoRA in `producers`; rotations turn by about
    as much.
    """
    factors = {name: p for name, p in module.named_parameters() if not name.startswith("org_")}
    weight, kind = module.org_module[0].weight, getattr(module, "name", "dylora")
    with torch.no_grad():
        for name, factor in factors.items():
            noise = torch.randn(factor.shape, generator=generator)
            if name in ("dora_scale", "rescale", "scalar"):
                # The norms of W, or 1, or 0.
                factor.copy_((factor + (name == "scalar")) * (1 + 0.2 * noise))
            elif kind in ("tlora", "norm"):
                factor.add_(noise * 0.4 * (0.5 if kind == "norm" else factor.std(unbiased=False)))
            elif name == "oft_blocks":
                factor.copy_(noise * 0.25 / factor.shape[-1] ** 0.5)
            else:
                product = [n for n in factors if n not in ("dora_scale", "scalar")]
                factor.copy_(noise * std_of(module, kind, name, product, weight))


def std_of(module: nn.Module, kind: str, name: str, factors: list[str], weight: torch.Tensor) -> float:
    """Of one of the `factors` that are multiplied with each other."""
    if kind == "ia3":
        return producers.DELTA_STD / producers.BASE_STD
    if kind == "full":
        return producers.DELTA_STD
    scale = getattr(module, "scale", 1.0)
    if kind == "dylora":
        # In blocks of ranks, with the scale of alpha / rank only in the file.
        return (producers.DELTA_STD / (float(module.alpha) / module.lora_dim**0.5)) ** 0.5
    if kind == "glora":
        over = weight.shape[1] ** 0.5 * producers.BASE_STD if name.startswith("a") else 1
        return (producers.DELTA_STD / (scale * module.lora_dim**0.5 * over)) ** 0.5
    # Every inner axis is a sum over the rank; a Tucker core has one on either side.
    sums = sum(n.endswith(("_b", "_t1", "_t2", "lora_down.weight", "lora_mid.weight")) for n in factors)
    return (producers.DELTA_STD / (scale * module.lora_dim ** (sums / 2))) ** (1 / len(factors))


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
    return cases | _dora() | _others()


def _dora() -> dict[str, Case]:
    """LyCORIS moves `W + dW` by the strength, `dW` itself stays: with us strength 0 is the base."""
    cases = {}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "lora": ("lora", {}),
        "locon-tucker": ("locon", {"use_tucker": True}),
        "loha": ("loha", {}),
        "loha-tucker": ("loha", {"use_tucker": True}),
        "lokr": ("lokr", {"factor": 4}),
        "lokr-both": ("lokr", {"factor": 8, "decompose_both": True}),
    }
    for kind, (algo, options) in kinds.items():
        for side in (True, False):
            told = options | {"dora_wd": True, "wd_on_output": side}
            # LyCORIS' loader does not see on which side; and of LoKr not the factors.
            reads = (MADE, LOADED) if side and algo != "lokr" else (MADE,)
            cases[f"dora-{kind}-{'out' if side else 'in'}"] = Case(algo, 7, 3, told, reads, only_at_1=True)
    return cases


KERNELS = ("line", "plane", "plane_oblong", "space", "wide_line", "wide_plane", "wide_space", "grouped")


def _others() -> dict[str, Case]:
    cases = {f"{algo}-scalar": Case(algo, 7, 3, {"use_scalar": True}) for algo in ("lora", "loha")}
    cases["lokr-scalar"] = Case("lokr", 3, 3, {"use_scalar": True, "factor": 4}, (MADE,))
    cases["lora-and-norms"] = Case("lora", 3, 7, {"train_norm": True})
    # LyCORIS draws the rank of every forward and every merge at random.
    cases["dylora"] = Case("dylora", 16, 16, {"block_size": 4}, ())
    # It gives a factor of all input channels to a layer with groups.
    for rank, conv_rank in ((1, 7), (7, 16), (16, 1)):
        cases[f"glora-r{rank}"] = Case("glora", rank, conv_rank, without=("grouped",))
    cases["glora-scalar"] = Case("glora", 7, 3, {"use_scalar": True}, without=("grouped",))
    # Of LyCORIS' T-LoRA on kernels the delta is 1x1.
    cases["tlora-r3"] = Case("tlora", 3, 3, without=KERNELS)
    cases["tlora-r16"] = Case("tlora", 16, 7, without=KERNELS)
    for size in (4, 8):
        cases[f"oft-{size}"] = Case("diag-oft", size, size)
        cases[f"oft-{size}-bound"] = Case("diag-oft", size, size, {"constraint": 0.01})
    cases["oft-4-unbound"] = Case("diag-oft", 4, 4, {"constraint": 3.0})
    # LyCORIS multiplies by `rescale` at any strength; with us strength 0 is the base.
    cases["oft-4-rescaled"] = Case("diag-oft", 4, 4, {"rescaled": True}, only_at_1=True)
    both = {"rescaled": True, "constraint": 0.01}
    cases["oft-8-bound-rescaled"] = Case("diag-oft", 8, 8, both, only_at_1=True)
    # No power of two divides their rows into blocks of an even size up to 10.
    odd = ("wide_line", "grouped", "plane_point")
    cases["boft-30"] = Case("boft", 30, 30)
    cases["boft-10"] = Case("boft", 10, 10, without=odd)
    cases["boft-10-bound"] = Case("boft", 10, 10, {"constraint": 0.01}, without=odd)
    cases["boft-10-rescaled"] = Case("boft", 10, 10, {"rescaled": True}, only_at_1=True, without=odd)
    cases["boft-30-bound-rescaled"] = Case("boft", 30, 30, both, only_at_1=True)
    return cases


CASES = _cases()
