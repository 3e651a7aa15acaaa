"""Checkpoints, file to file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from ctypes import byref, c_void_p
from typing import Any

from ._binding import lycore_strengths
from ._library import Library, load
from .adapter import Adapter, encoded_path
from .progress import Cancel, ProgressCallback, watched
from .strengths import Strengths

AdapterLike = Adapter | str | os.PathLike[str]


def merge(
    base: str | os.PathLike[str],
    adapters: Iterable[AdapterLike | tuple[AdapterLike, float | Strengths]],
    output: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "keep",
    other_families: bool = False,
    progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Merges adapters into a safetensors file and writes another; returns the report.

    `adapters` are files or Adapter objects, each alone (strength 1) or with its strength. `device` is where to
    compute: "cpu", "cuda" or "cuda:N"; `dtype` that of every floating-point tensor in the output: "keep", "fp32",
    "fp16" or "bf16". `other_families` takes adapters made for another family of models as far as they fit, rather than
    refusing them. Progress counts bytes.

    Streams: memory is bounded by the largest touched tensor. Untouched tensors are the same bytes, metadata is kept
    and extended. `output` appears whole or not at all, also after an error, an exception of `progress` or a cancel,
    and may be `base` itself. At the end the copied tensors are read back and
    compared. Report: {"base", "output", "device", "bytes", "tensors": {"changed", "copied"}, "proven_equal": number of
    tensors, "adapters": [as `Handle.report`]}.
    """
    library = load() if device == "cpu" else _with_device()
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in adapters]
    opened = [a if isinstance(a, Adapter) else Adapter(a, library=library) for a, _ in pairs]
    owners = [adapter.in_library(library) for adapter in opened]
    handles = (c_void_p * len(owners))(*(owner._as_parameter_.value for owner in owners))
    strengths = (lycore_strengths * len(pairs))()
    for struct, (_, strength) in zip(strengths, pairs, strict=True):
        Strengths.of(strength).fill(struct)
    options = json.dumps({"device": device, "dtype": dtype, "other_families": other_families}).encode()
    report = c_void_p()
    with watched(library, progress, cancel) as watcher:
        library.call(
            "lycore_checkpoint_merge",
            encoded_path(os.fspath(base)),
            handles,
            strengths,
            len(pairs),
            encoded_path(os.fspath(output)),
            options,
            watcher,
            byref(report),
        )
    return json.loads(library.take_text(report))


def _with_device() -> Library:
    from .stack import library_for

    return library_for(0)
