"""Where the package is, adapters to test with, and a visible reason where a test cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pytest
from lora_formula import product
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugin"
sys.path.insert(0, str(PLUGIN))
# The formulas of the oracles' tests are those of the tests on a GPU too.
sys.path.append(str(ROOT / "tests" / "python" / "oracles"))

import lycore  # noqa: E402 - after the path

# A plugin of tests that are in a folder below, which also import it.
pytest.register_assert_rewrite("real")


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
                wide = {key.split("_")[1].split(".")[0]: change(v.astype(numpy.float64)) for key, v in factors.items()}
                result[module] = alpha / rank * product(wide).reshape(shape)
        save_file(lora.tensors, lora.path, metadata=metadata)
        return lora

    return make


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
