"""What an adapter file does to a weight and a bias, in float64, from the file's own tensors.

    W' = W + sum over adapters of what each adds to the same W: `forms.added`, for most strength * scale * delta
    delta: `lora_formula.product`
    scale = alpha / rank;  alpha / sqrt(rank) for PEFT's use_rslora;  1 when nothing tells alpha or there is no rank

Files are read with the `safetensors` package, alpha from the stored tensor or from PEFT's config. Nothing here uses
lycore, so that a fault in it cannot hide in the expectation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forms
import numpy
import torch
from lora_formula import rank
from safetensors import safe_open

VERA = ("A", "B", "lambda_b", "lambda_d")
SPELLINGS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_up.bias": "up_bias",
    ".alpha": "alpha",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.bias": "up_bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude_vector",
    ".oft_R.weight": "oft_R",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2", "p_layer", "q_layer")},
    **{f".oft_blocks.{part}": f"oft_blocks.{part}" for part in range(4)},
    **{f".{name}": name for name in ("dora_scale", "scalar", "diff", "diff_b", "w_norm", "b_norm", "set_weight")},
    **{
        f".{name}": name for name in ("reshape_weight", "on_input", "lambda_layer", "oft_blocks", "oft_diag", "rescale")
    },
    **{f".{name}": name for name in ("boft_R", "boft_s", "ia3_l", *(f"vera_{n}" for n in VERA))},
    # Last: the ends of others end like it.
    ".weight": "weight",
}
FORMATS = {
    torch.float32: (24, -149),
    torch.float16: (11, -24),
    torch.bfloat16: (8, -133),
    torch.float8_e4m3fn: (4, -9),
    torch.float8_e5m2: (3, -16),
}
"""By dtype: bits of the significand, and the exponent of the smallest number above 0."""


@dataclass(frozen=True)
class Change:
    """One module of a file."""

    factors: Mapping[str, numpy.ndarray]
    scale: float
    config: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's, for the methods whose tensors do not tell all."""

    def added(self, weight: torch.Tensor, strength: float) -> numpy.ndarray:
        """What a weight gets at a strength. Strength 0 gives nothing; most forms are linear in it, BOFT is not."""
        return forms.added(self.factors, self.scale, wide(weight), strength, self.config)

    def size(self, weight: torch.Tensor, strength: float) -> numpy.ndarray:
        """The same with absolute values: what rounding errors of the sums are relative to."""
        return forms.added(self.factors, self.scale, wide(weight), strength, self.config, size=True)

    def added_to_bias(self, bias: torch.Tensor, strength: float) -> numpy.ndarray | None:
        """What a bias gets; None when the module changes none."""
        return forms.added_to_bias(self.factors, self.scale, wide(bias), strength)

    def size_in_bias(self, bias: torch.Tensor, strength: float) -> numpy.ndarray | None:
        """The same with absolute values."""
        return forms.added_to_bias(self.factors, self.scale, wide(bias), strength, size=True)

    def delta(self, weight: torch.Tensor) -> numpy.ndarray:
        """At strength 1, in the shape of the weight."""
        return self.added(weight, 1.0)

    @property
    def on_weight(self) -> bool:
        """Whether it changes the weight at all."""
        return forms.changes_weight(self.factors)


def wide(values: torch.Tensor) -> numpy.ndarray:
    """In float64."""
    return values.detach().double().numpy()


@dataclass(frozen=True)
class OfBias:
    """A module's change of its layer's bias, with the interface of what it does to the weight."""

    change: Change

    def added(self, bias: torch.Tensor, strength: float) -> numpy.ndarray:
        return self.change.added_to_bias(bias, strength)

    def size(self, bias: torch.Tensor, strength: float) -> numpy.ndarray:
        return self.change.size_in_bias(bias, strength)


def parts_of(change: Change, weight: str, weights: Mapping[str, Any]) -> list[tuple[str, Change | OfBias]]:
    """The weight and the bias that a module changes, with what it does to each."""
    bias = weight.removesuffix("weight") + "bias"
    changed = bias in weights and change.added_to_bias(weights[bias], 1.0) is not None
    return [(weight, change)] * change.on_weight + [(bias, OfBias(change))] * changed


def read(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Change]:
    """The modules of a file by their names in it.

    `config` is PEFT's configuration as JSON, for what modules do not store; with the keys of a file's
    `lora_adapter_metadata` when the names of its components stand before them.
    """
    groups: dict[str, dict[str, numpy.ndarray]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            suffix = next(s for s in SPELLINGS if key.endswith(s))
            value = file.get_tensor(key).double().numpy()
            groups.setdefault(key.removesuffix(suffix), {})[SPELLINGS[suffix]] = value
    # VeRA's projections stand once in a file.
    shared = groups.pop("base_model", {})
    changes = {}
    for name, factors in groups.items():
        inner = inner_rank(factors)
        # Rotations keep in `alpha` what limits them, and no rank's alpha.
        alpha = None if any(n.startswith("oft_") for n in factors) else factors.pop("alpha", None)
        if "ia3_l" in factors:
            factors["axis"] = ia3_axis(factors["ia3_l"], config or {}, name)
        if inner is None:
            scale = scale_in(config or {}, name, None) if "lokr_w2" in factors else 1.0
        else:
            scale = scale_of(alpha, config or {}, name, inner)
        changes[name] = Change(factors | shared, scale, config or {})
    return changes


def inner_rank(factors: Mapping[str, numpy.ndarray]) -> int | None:
    """What a stored alpha is divided by; None where there is no such number."""
    if "lambda_layer" in factors:
        return factors["lambda_layer"].size
    if "embedding_A" in factors:
        return len(factors["embedding_A"])
    if "a1" in factors:
        # a1 [I, r] beside b1 [O, r], or in older files a1 [r, I] beside b1 [r, I].
        a1, a2, b1, b2 = (factors[name].shape for name in ("a1", "a2", "b1", "b2"))
        return a1[1] if a1[1] == a2[0] == b1[1] == b2[0] else a1[0]
    return rank(factors)


def ia3_axis(values: numpy.ndarray, config: Mapping[str, Any], module: str) -> int:
    """0 output, 1 input: PEFT's Linear says it by its shape, a convolution by the configuration."""
    if values.ndim == 2:
        return int(values.shape[0] == 1)
    return int(any(module.endswith(name) for name in config["feedforward_modules"]))


def scale_of(alpha: numpy.ndarray | None, config: Mapping[str, Any], module: str, rank: int) -> float:
    """The stored alpha's, else the config's."""
    return scale_in(config, module, rank) if alpha is None else float(alpha) / rank


def scale_in(config: Mapping[str, Any], module: str, rank: int | None) -> float:
    """The scale that a PEFT config gives a module; 1 when it gives no alpha. Without a rank the config's own."""
    component = module.split(".")[0] + "."
    if any(key.startswith(component) for key in config):
        config = {key.removeprefix(component): value for key, value in config.items() if key.startswith(component)}
    alpha = config.get("lora_alpha", config.get("alpha"))
    if alpha is None:
        return 1.0

    def picked(patterns: Mapping[str, float], default: float) -> float:
        # PEFT: a pattern is a regular expression that names the end of the module's path; the first that fits.
        fitting = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
        return default if fitting is None else patterns[fitting]

    rank = rank or picked(config["rank_pattern"], config["r"])
    return picked(config["alpha_pattern"], alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def metadata_config(path: Path) -> dict[str, Any]:
    """What diffusers wrote into a file about its LoraConfigs; empty when it wrote nothing."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))


def quantum(values: numpy.ndarray, dtype: torch.dtype) -> numpy.ndarray:
    """The distance from one number of this dtype to the next, at `values`."""
    bits, least = FORMATS[dtype]
    return numpy.ldexp(1.0, numpy.maximum(numpy.frexp(values)[1] - bits, least))


def rounded(values: numpy.ndarray, dtype: torch.dtype) -> numpy.ndarray:
    """float64 to the nearest number of `dtype`, ties to even, in one step; as float64.

    torch goes by way of float32 and so rounds twice.
    """
    step = quantum(values, dtype)
    return numpy.rint(values / step) * step


@dataclass
class Tally:
    """Compares merged weights with the formula and counts over a group of cases."""

    dtype: torch.dtype
    elements: int = 0
    equal: int = 0
    """Elements with the very bits of the correctly rounded sum."""
    worst: float = 0.0
    """fp32: error over the magnitudes summed. 16 bits: distance in units in the last place."""
    worst_of_tensor: float = 0.0
    """fp32: largest error of a tensor over its largest element."""
    problems: list[str] = field(default_factory=list)

    def add(
        self, name: str, got: torch.Tensor, base: torch.Tensor, changes: Sequence[tuple[float, Change | OfBias]]
    ) -> numpy.ndarray:
        """One weight or bias under (strength, change) pairs; returns the exact sum."""
        weight, got, base = base, got.detach().double().numpy(), base.detach().double().numpy()
        want, magnitude = base.copy(), abs(base)
        for strength, change in changes:
            want = want + change.added(weight, strength)
            magnitude = magnitude + change.size(weight, strength)
        right = rounded(want, self.dtype)
        self.elements += got.size
        self.equal += int((got == right).sum())
        if self.dtype == torch.float32:
            error = abs(got - want)
            # 0 by 0: a bias of 0 that stays so.
            worst, limit = float((error / numpy.maximum(magnitude, 1e-30)).max()), TOLERANCE
            # Where much larger terms cancel (DoRA scales a row up that nearly vanishes), a sum is as fine as they are.
            largest = max(abs(want).max(), abs(base).max(), magnitude.max() / CANCELLED)
            of_tensor = float(error.max() / largest)
            self.worst_of_tensor = max(self.worst_of_tensor, of_tensor)
            if of_tensor > TOLERANCE:
                self.problems.append(f"{name}: {of_tensor:.2e} of the largest element")
        else:
            # Where W and the delta cancel, the sum in fp32 is only as fine as they are: the ulp of the larger.
            step = quantum(numpy.maximum(abs(base), abs(want)), self.dtype)
            worst, limit = float((abs(got - right) / step).max()), 1.0
        self.worst = max(self.worst, worst)
        if not worst <= limit:
            self.problems.append(f"{name}: {worst:.3g}, at most {limit}")
        return want

    @property
    def share(self) -> float:
        """Correctly rounded elements of all."""
        return self.equal / self.elements

    def check(self, share: float | None = None) -> None:
        """Fails with the list of what is off. `share`, if not `SHARE`, of the elements must be correctly rounded."""
        print(self)
        assert self.elements >= 10_000, "too few elements to speak of a share"
        assert not self.problems, f"{self}: {'; '.join(self.problems[:10])}"
        assert self.dtype == torch.float32 or self.share >= (SHARE if share is None else share), str(self)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        text = f"{kind}: {self.elements} elements, {self.share:.4%} correctly rounded, worst {self.worst:.3g}"
        return text + (f", of tensor {self.worst_of_tensor:.2e}" if self.worst_of_tensor else "")


TOLERANCE = 1e-6
"""fp32, relative to |W| + sum of |strength * scale| * |up| @ |down|, and of a tensor to its largest element: a sum of
16 products and W rounds at most 18 times by 2^-24 each, 1.07e-6 if all went the same way; they never do."""
CANCELLED = 8.0
"""How much larger than a result the magnitudes of its terms usually are: the root of 64 ranks."""
SHARE = 0.999
"""fp16 and bf16: a sum in fp32 is off by some 2^-24 of itself and meets the middle between two fp16 numbers, where that
decides the rounding, about once in 2^12 elements (bf16: 2^15)."""
