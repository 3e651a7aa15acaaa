"""Adapter files: identity by content, and what of a file goes where on a model.

A file is hashed and read once per state on disk; what was read is shared by all nodes and lives as long as one of them
uses it. The factors are copied out of the file: a trainer that overwrites it must not change or tear a model in use.
"""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .library import NodeError
from .names import Place, Targets, is_text_encoder

# The tensor's part of a key, in any spelling.
_TENSOR = re.compile(r"[._]lora[._AB].*$|\.[^.]+$")


@dataclass(frozen=True)
class Stamp:
    """A file's state on disk, with the PEFT config beside it, which may hold the alphas."""

    files: tuple[tuple[str, int, int], ...]
    """(path, time of the last change, size)"""

    @classmethod
    def of(cls, path: str) -> Stamp:
        """OSError when there is no such file."""
        found = []
        for each in (Path(path), Path(path).with_name("adapter_config.json")):
            if not found or each.is_file():
                state = os.stat(each)
                found.append((os.path.realpath(each), state.st_mtime_ns, state.st_size))
        return cls(tuple(found))


@dataclass(frozen=True)
class Term:
    """One module of a file on its weight."""

    module: str
    place: Place
    tensors: tuple[tuple[str, Any], ...]
    """By canonical name; "alpha" is a number."""


@dataclass(frozen=True, eq=False)
class Matched:
    """A file read for one model."""

    digest: str
    terms: tuple[Term, ...]
    report: dict[str, Any]
    """LyCore's load report."""
    problems: tuple[str, ...]
    """What is in the file and not applied, for people; without the text encoders when none is connected."""
    left_out: int
    """Modules of text encoders when none is connected."""
    misfit: str | None
    """Why the file is for another model, when no module of its denoiser found a weight though there are some."""


_digests: dict[Stamp, str] = {}
_matched: weakref.WeakValueDictionary[tuple[Stamp, str], Matched] = weakref.WeakValueDictionary()


def digest(path: str) -> str:
    """SHA-256 of the content; computed once per state of the file on disk. OSError when it cannot be read."""
    return _digest(Stamp.of(path))


def _digest(stamp: Stamp) -> str:
    if stamp not in _digests:
        total = hashlib.sha256()
        for path, _, size in stamp.files:
            total.update(f"{size}:".encode())
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    total.update(piece)
        _digests[stamp] = total.hexdigest()
    return _digests[stamp]


class Reader:
    """Reads files for one set of targets. The stack that matches names is made for the first file that is not known."""

    def __init__(self, lycore: ModuleType, targets: Targets):
        self._lycore = lycore
        self._targets = targets
        self._stack: Any = None

    def read(self, path: str) -> Matched:
        """Raises LycoreError for a bad file, NodeError for one of which nothing matches, OSError for a missing one."""
        stamp = Stamp.of(path)
        known = _matched.get((stamp, self._targets.signature))
        if known is not None:
            return known
        checksum = _digest(stamp)
        with self._lycore.open(path) as adapter:
            matched = self._match(adapter, checksum)
        if Stamp.of(path) != stamp:
            raise NodeError("the file changed while it was read. Hint: run again when it is complete")
        _matched[stamp, self._targets.signature] = matched
        return matched

    def _match(self, adapter: Any, checksum: str) -> Matched:
        if self._stack is None:
            self._stack = self._targets.stack(self._lycore)
        with_encoders = bool(self._targets.clip_keys)
        try:
            handle = self._stack.add(adapter)
        except self._lycore.AdapterKeyError as problem:
            if not with_encoders and all(is_text_encoder(module.name) for module in adapter.modules):
                what = f"all its {len(adapter.modules)} modules are for text encoders, and no CLIP is connected"
                raise NodeError(f"{what}. Hint: connect CLIP") from problem
            raise NodeError(self._misfit(adapter.report(), str(problem))) from problem
        report = handle.report()
        handle.remove()
        modules = {module.name: module for module in adapter.modules}
        terms: list[Term] = []
        shared: dict[str, torch.Tensor] = {}
        homeless, scattered, configured = [], [], []
        for entry in report["modules"]:
            if entry["algorithm"] == "OFT (PEFT)" and "note" not in entry:
                configured.append(entry["module"])
                continue
            if isinstance(entry["target"], list) or isinstance(entry.get("bias"), list):
                scattered.append(entry["module"])
                continue
            terms += self._terms(modules[entry["module"]], entry, shared)
            if entry["target"] is None and "bias" not in entry:
                homeless.append(entry["module"])
        left_out = 0 if with_encoders else sum(map(is_text_encoder, homeless))
        problems = _problems(report, with_encoders)
        for names, why in (
            (scattered, "its parts go to several places of this model"),
            (configured, "how it turns stands in adapter_config.json, which does not travel with its tensors"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                problems += (f"unsupported: {names[0]}{more} ({why})",)
        misfit = None
        if any(not is_text_encoder(name) for name in homeless) and all(
            term.place.key in self._targets.clip_keys for term in terms
        ):
            misfit = self._misfit(report, f"only text encoder modules match; {problems[0]}")
        return Matched(checksum, tuple(terms), report, problems, left_out, misfit)

    def _misfit(self, report: dict[str, Any], why: str) -> str:
        metadata = report.get("metadata") or {}
        base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
        made_for = f"made for {base}, " if base else ""
        return f"{made_for}it does not fit the model {self._targets.model_name}: {why}"

    def _terms(self, module: Any, entry: dict[str, Any], shared: dict[str, torch.Tensor]) -> list[Term]:
        """What a module does to its weight and to its bias."""
        # Tensors made under inference mode could not take part in a later training of this model.
        with torch.inference_mode(False):
            tensors = [
                # VeRA's projections stand once in a file for all modules.
                (name, shared.setdefault(name, tensor.torch()) if name in ("vera_A", "vera_B") else tensor.torch())
                for name, tensor in module.tensors.items()
                if name not in ("alpha", "reshape_weight")
            ]
        # The module's number, not the tensor: PEFT keeps it in the config.
        tensors.append(("alpha", float(module.alpha)))
        places = []
        if entry["target"] is not None:
            places.append(self._targets.place(module.name, entry["target"], entry.get("slice")))
        if "bias" in entry:
            part = entry.get("bias_slice")
            places.append(Place(entry["bias"], (part["axis"], part["start"], part["length"]) if part else None))
        return [Term(module.name, place, tuple(tensors)) for place in places]


def _problems(report: dict[str, Any], with_encoders: bool) -> tuple[str, ...]:
    """What became of the keys that are not applied; equal reasons share a line."""
    grouped: dict[tuple[str, str], dict[str, None]] = {}
    for key in report["keys"]:
        status, module = key["status"], _TENSOR.sub("", key["key"])
        left_out = status == "unmatched" and not with_encoders and is_text_encoder(module)
        if left_out or status in ("matched", "readable"):
            continue
        nearest = key.get("nearest")
        detail = f"nearest: {nearest}" if nearest else key.get("reason", "")
        grouped.setdefault((status, detail), {})[module] = None
    lines = []
    for (status, detail), modules in grouped.items():
        first, *others = modules
        lead = f"{status}: {first}" + (f" and {len(others)} more" if others else "")
        lines.append(f"{lead} ({detail})" if detail else lead)
    return tuple(lines)
