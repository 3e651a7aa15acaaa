"""What an adapter file does to a weight, in float64, from the file's own tensors.

    W' = W + sum over adapters of strength * scale * delta, every delta of the same W
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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from lora_formula import product, rank
from safetensors import safe_open

SPELLINGS = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": "diff",
    ".on_input": "on_input",
    # Last: the ends of others end like it.
    ".weight": "weight",
}
FORMATS = {torch.float32: (24, -149), torch.float16: (11, -24), torch.bfloat16: (8, -133)}
"""By dtype: bits of the significand, and the exponent of the smallest number above 0."""


@dataclass(frozen=True)
class Change:
    """One module of a file."""

    factors: Mapping[str, numpy.ndarray]
    scale: float

    def delta(self, weight: torch.Tensor) -> numpy.ndarray:
        """At strength 1, in the shape of the weight; only (IA)^3 looks at its values."""
        if "weight" in self.factors:
            return product(self.factors, weight.detach().double().numpy())
        return self._delta.reshape(weight.shape)

    def magnitude(self, weight: torch.Tensor) -> numpy.ndarray:
        """The same with absolute values: what rounding errors of the sums are relative to."""
        if "weight" in self.factors:
            return abs(self.delta(weight))
        return self._magnitude.reshape(weight.shape)

    @cached_property
    def _delta(self) -> numpy.ndarray:
        return self.scale * product(self.factors)

    @cached_property
    def _magnitude(self) -> numpy.ndarray:
        return abs(self.scale) * product({name: abs(value) for name, value in self.factors.items()})


def read(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Change]:
    """The modules of a file by their names in it.

    `config` is PEFT's LoraConfig as JSON, for the modules without a stored alpha; with the keys of a file's
    `lora_adapter_metadata` when the names of its components stand before them.
    """
    groups: dict[str, dict[str, numpy.ndarray]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            suffix = next(s for s in SPELLINGS if key.endswith(s))
            value = file.get_tensor(key).double().numpy()
            groups.setdefault(key.removesuffix(suffix), {})[SPELLINGS[suffix]] = value
    changes = {}
    for name, factors in groups.items():
        inner, alpha = rank(factors), factors.pop("alpha", None)
        changes[name] = Change(factors, 1.0 if inner is None else scale_of(alpha, config or {}, name, inner))
    return changes


def scale_of(alpha: numpy.ndarray | None, config: Mapping[str, Any], module: str, rank: int) -> float:
    """The stored alpha's, else the config's."""
    return scale_in(config, module, rank) if alpha is None else float(alpha) / rank


def scale_in(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale that a PEFT config gives a module; 1 when it gives no alpha."""
    component = module.split(".")[0] + "."
    if any(key.startswith(component) for key in config):
        config = {key.removeprefix(component): value for key, value in config.items() if key.startswith(component)}
    if "lora_alpha" not in config:
        return 1.0
    patterns = config["alpha_pattern"]
    # PEFT: a pattern is a regular expression that names the end of the module's path; the first that fits.
    fitting = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    alpha = config["lora_alpha"] if fitting is None else patterns[fitting]
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


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
        self, name: str, got: torch.Tensor, base: torch.Tensor, changes: Sequence[tuple[float, Change]]
    ) -> numpy.ndarray:
        """One weight under (strength, change) pairs; returns the exact sum."""
        weight, got, base = base, got.detach().double().numpy(), base.detach().double().numpy()
        want, magnitude = base.copy(), abs(base)
        for strength, change in changes:
            want = want + strength * change.delta(weight)
            magnitude = magnitude + abs(strength) * change.magnitude(weight)
        right = rounded(want, self.dtype)
        self.elements += got.size
        self.equal += int((got == right).sum())
        if self.dtype == torch.float32:
            error = abs(got - want)
            worst, limit = float((error / magnitude).max()), TOLERANCE
            of_tensor = float(error.max() / max(abs(want).max(), abs(base).max()))
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

    def check(self) -> None:
        """Fails with the list of what is off."""
        print(self)
        assert self.elements >= 10_000, "too few elements to speak of a share"
        assert not self.problems, f"{self}: {'; '.join(self.problems[:10])}"
        assert self.dtype == torch.float32 or self.share >= SHARE, str(self)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        text = f"{kind}: {self.elements} elements, {self.share:.4%} correctly rounded, worst {self.worst:.3g}"
        return text + (f", of tensor {self.worst_of_tensor:.2e}" if self.worst_of_tensor else "")


TOLERANCE = 1e-6
"""fp32, relative to |W| + sum of |strength * scale| * |up| @ |down|, and of a tensor to its largest element: a sum of
16 products and W rounds at most 18 times by 2^-24 each, 1.07e-6 if all went the same way; they never do."""
SHARE = 0.999
"""fp16 and bf16: a sum in fp32 is off by some 2^-24 of itself and meets the middle between two fp16 numbers, where that
decides the rounding, about once in 2^12 elements (bf16: 2^15)."""
