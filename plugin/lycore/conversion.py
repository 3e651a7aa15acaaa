"""Adapter files in the spelling of another program."""

from __future__ import annotations

import json
import os
from ctypes import byref, c_void_p
from typing import Any

from .adapter import Adapter, encoded_path
from .progress import Cancel, ProgressCallback, watched

SPELLINGS = ("kohya", "comfyui", "diffusers", "peft")


def convert(
    adapter: Adapter | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    to: str,
    family: str | None = None,
    component: str | None = None,
    skip: bool = False,
    progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Writes an adapter in another spelling; returns the report.

    `to` is "kohya" (sd-scripts, A1111, Forge), "comfyui", "diffusers" (`pipe.load_lora_weights`) or "peft"
    (`PeftModel.from_pretrained`; `output` is a file or a folder, adapter_config.json is written beside). Values stay
    the same to the bit, metadata is kept. `family` names the model's family where the file does not tell it,
    `component` ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3") the one model to write,
    which "peft" needs when the file has several. Progress counts modules.

    What the spelling cannot say is an UnsupportedError that lists all of it; with `skip` it is left out and listed in
    the report. Report: {"input", "output", "config", "to", "family": {"name", "reason"} or None, "summary": {"modules",
    "written", "tensors", "split", "fused", "left_out"}, "modules": [{"module", "becomes"}], "left_out": [{"module",
    "reason"}]}.
    """
    opened = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    owner = opened._handle()
    options = json.dumps({"to": to, "family": family, "component": component, "skip": skip}).encode()
    report = c_void_p()
    with watched(owner.library, progress, cancel) as watcher:
        arguments = (owner, encoded_path(os.fspath(output)), options, watcher, byref(report))
        owner.library.call("lycore_adapter_convert", *arguments)
    return json.loads(owner.library.take_text(report))
