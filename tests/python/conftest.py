"""Where the package is, adapters to test with, and a visible reason where a test cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugin"
sys.path.insert(0, str(PLUGIN))

import lycore  # noqa: E402 - after the path


@dataclass
class Lora:
    """An adapter file, and what it adds in float64."""

    path: Path
    tensors: dict[str, numpy.ndarray]
    deltas: dict[str, numpy.ndarray] = field(default_factory=dict)
    """By module: alpha / rank * up @ down, in the shape of the weight."""
    magnitudes: dict[str, numpy.ndarray] = field(default_factory=dict)
    """By module: the same with absolute values, for bounds on rounding."""


@pytest.fixture
def rng() -> numpy.random.Generator:
    return numpy.random.default_rng(7)


@pytest.fixture
def make_lora(tmp_path, rng):
    """`make_lora(name, {module: shape of the weight})` writes a kohya file with random factors.

    Linear, 1x1 and larger convolutions; the modules in `tucker` get a core.
    """

    def make(name, modules, *, rank=4, alpha=2.0, dtype="float16", tucker=(), metadata=None) -> Lora:
        lora = Lora(tmp_path / f"{name}.safetensors", {})
        for module, shape in modules.items():
            out, channels, *kernel = shape
            ones = [1] * len(kernel)
            shapes = {"lora_up.weight": [out, rank, *ones], "lora_down.weight": [rank, channels, *kernel]}
            if module in tucker:
                shapes |= {"lora_down.weight": [rank, channels, *ones], "lora_mid.weight": [rank, rank, *kernel]}
            factors = {key: (rng.standard_normal(size) * 0.1).astype(dtype) for key, size in shapes.items()}
            lora.tensors |= {f"{module}.{key}": value for key, value in factors.items()}
            lora.tensors[f"{module}.alpha"] = numpy.array(alpha, dtype)
            for result, change in ((lora.deltas, numpy.asarray), (lora.magnitudes, numpy.abs)):
                wide = {key: change(value.astype(numpy.float64)) for key, value in factors.items()}
                result[module] = formula(wide, shape, alpha / rank)
        save_file(lora.tensors, lora.path, metadata=metadata)
        return lora

    return make


def formula(factors: dict[str, numpy.ndarray], shape: list[int], scale: float) -> numpy.ndarray:
    """dW[o, i, k] = scale * sum_pq up[o, p] mid[p, q, k] down[q, i, k], in the factors' precision."""
    up, down = factors["lora_up.weight"], factors["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in factors:
        mid = factors["lora_mid.weight"].reshape(rank, rank, -1)
        delta = numpy.einsum("op,pqk,qi->oik", up.reshape(-1, rank), mid, down.reshape(rank, -1))
    else:
        delta = up.reshape(-1, rank) @ down.reshape(rank, -1)
    return scale * delta.reshape(shape)


def run_cli(*arguments: object, environment: dict[str, str] | None = None, code: str | None = None):
    """`python -m lycore ...`, or a piece of code, in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "lycore"]), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(PLUGIN), **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.fixture(scope="session")
def library():
    """The library of this process; without any, there is nothing to test."""
    return lycore.load()


@pytest.fixture(scope="session")
def torch_library():
    """The build with libtorch; skips, and says why, where it is absent."""
    try:
        return lycore.load(torch=True)
    except lycore.LibraryError as problem:
        pytest.skip(f"needs the build with libtorch: {problem}")
