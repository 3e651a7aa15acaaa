"""Tools that make an adapter file: fewer ranks, several in one, the difference of two checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from ctypes import byref, c_char_p, c_double, c_void_p
from typing import Any

from ._library import Library, load
from .adapter import encoded_path
from .progress import Cancel, ProgressCallback, watched

Path = str | os.PathLike[str]


def resize(
    source: Path,
    output: Path,
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    method: str = "fixed",
    param: float | None = None,
    dtype: str = "keep",
    convert: bool = False,
    progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Writes an adapter with fewer ranks: every LoRA and LoCon becomes the nearest one of a lower rank; its scale
    stays. Returns the report. Progress counts modules.

    `method` picks a module's rank, up to `rank` (`conv_rank` for convolutions): "fixed" takes `rank` itself;
    "sv_ratio", "sv_cumulative" and "sv_fro" are sd-scripts' dynamic methods, with their number in `param`. `dtype` is
    that of the new factors: "keep", "fp32", "fp16" or "bf16". `convert` turns LoHa and LoKr into LoRA: exact where
    the rank allows, else the nearest.

    What would not become smaller, and other algorithms, are copied bit for bit: the output is never larger than
    `source` (but for `convert`). It appears whole or not at all and may be `source` itself. Report: {"source",
    "output", "method", "bytes": {"source", "output"}, "summary": {"modules", "resized", "copied"}, "modules":
    [{"module", "algorithm", "status", "reason", "old_rank", "new_rank", "new_alpha", "sum_retained", "fro_retained",
    "error", "note"}]}; "error" is the relative Frobenius distance between the old and the new delta.
    """
    options = _given(rank=rank, conv_rank=conv_rank, method=method, param=param, dtype=dtype, convert=convert or None)
    return _run("lycore_resize", (_encoded(source), _encoded(output), options), progress, cancel)


def combine(
    adapters: Iterable[Path | tuple[Path, float]],
    output: Path,
    *,
    method: str = "concat",
    rank: int | None = None,
    conv_rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    dtype: str = "keep",
    progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Writes the weighted sum of adapter files as one file; returns the report. Progress counts modules.

    `adapters` are files, each alone (weight 1) or with its weight; negative ones subtract. `method`:

    - "concat": exact, for any algorithms; the ranks add up
    - "svd": the exact sum, cut to `rank` (`conv_rank` for convolutions)
    - "linear": PEFT's; factors of equal ranks are added, which adds cross terms to the sum
    - "ties", "dare", "magnitude_prune": on whole matrices, of which they keep the share `density`, then cut to `rank`;
      without `rank` whole differences are written. `seed` is dare's

    One file of weight 1 is copied byte for byte. Modules that depend on the weight that they change (DoRA, OFT,
    (IA)^3) are copied where they are alone at weight 1, else UnsupportedError names them. Report: {"output", "method",
    "bytes", "summary": {"modules", "shared"}, "sources": [{"file", "weight", "bytes", "modules", "left_out"}],
    "modules": [{"module", "from", "form", "rank", "error"}]}.
    """
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    files = (c_char_p * len(pairs))(*(_encoded(path) for path, _ in pairs))
    weights = (c_double * len(pairs))(*(float(weight) for _, weight in pairs))
    options = _given(method=method, rank=rank, conv_rank=conv_rank, density=density, seed=seed, dtype=dtype)
    return _run("lycore_combine", (files, weights, len(pairs), _encoded(output), options), progress, cancel)


def extract(
    tuned: Path,
    base: Path,
    output: Path,
    *,
    rank: int,
    conv_rank: int | None = None,
    energy: float | None = None,
    min_diff: float = 0.0,
    dtype: str = "keep",
    norms: bool = False,
    spelling: str = "kohya",
    progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Writes what the checkpoint `tuned` has beyond `base` as a LoRA; returns the report. Progress counts weights.

    Takes every Linear and convolution weight of the diffusion model and of text encoders that both files have, and
    cuts the difference to `rank` (`conv_rank` for convolutions with a kernel above 1), or with `energy` to the
    smallest rank that keeps this share of its squared norm. Weights of which no value differs by more than `min_diff`
    are left out. `norms` takes norms and biases too, as they are. `dtype` is "keep" (that of the tuned weight),
    "fp32", "fp16" or "bf16"; `spelling` names the modules the "kohya" way or as the "checkpoint" does. Report:
    {"tuned", "base", "output", "bytes", "summary": {"weights", "modules", "unchanged", "skipped"}, "modules":
    [{"module", "weight", "rank", "error"}], "skipped": [{"weight", "reason"}]}.
    """
    options = _given(
        rank=rank,
        conv_rank=conv_rank,
        energy=energy,
        min_diff=min_diff or None,
        dtype=dtype,
        norms=norms or None,
        spelling=spelling,
    )
    return _run("lycore_extract", (_encoded(tuned), _encoded(base), _encoded(output), options), progress, cancel)


def _encoded(path: Path) -> bytes:
    return encoded_path(os.fspath(path))


def _given(**options: Any) -> bytes:
    return json.dumps({name: value for name, value in options.items() if value is not None}).encode()


def _run(
    function: str, arguments: tuple[Any, ...], progress: ProgressCallback | None, cancel: Cancel | None
) -> dict[str, Any]:
    library: Library = load()
    report = c_void_p()
    with watched(library, progress, cancel) as watcher:
        library.call(function, *arguments, watcher, byref(report))
    return json.loads(library.take_text(report))
