"""The node "LyCore LoRA Stack": several LoRAs on a model and its text encoders, in one pass per weight.

Compared with a chain of ComfyUI's own loaders: the LoRAs of a weight are summed in fp32 and rounded once; a workflow
that comes back to the same LoRAs does not load the model again; what does not fit is said on the node, and a LoRA for
another model is an error.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import comfy.model_management
import folder_paths

from . import files, library
from .adapter import LyCoreAdapter, unreachable
from .library import NodeError
from .names import Targets

_ROWS = 5
_LINES = 12
"""Problems that are listed per file; the others are counted."""


@dataclass(frozen=True)
class Row:
    """One LoRA as the user set it."""

    number: int
    name: str
    model: float
    clip: float


Read = list[tuple[Row, files.Matched]]


class LyCoreLoraStack:
    """ComfyUI makes one object per node of a workflow and keeps it between runs."""

    CATEGORY = "loaders/LyCore"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("MODEL", "CLIP", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRAs.",
        "The text encoders with the LoRAs.",
        "What of each file is applied, and what is not.",
    )
    DESCRIPTION = (
        "Applies several LoRAs at once. Their order does not matter. "
        "For more rows put another one behind it; the weights are still merged in one pass."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["lora", "lora stack", "lycoris", "load lora"]

    def __init__(self) -> None:
        self._files: list[files.Matched] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        choices = ["None", *folder_paths.get_filename_list("loras")]
        clip = {"tooltip": "Text encoders. Without them only the model's part of a LoRA is applied."}
        required: dict[str, Any] = {"model": ("MODEL", {"tooltip": "The diffusion model."}), **_widgets(1, choices)}
        optional: dict[str, Any] = {"clip": ("CLIP", clip)}
        for number in range(2, _ROWS + 1):
            optional |= _widgets(number, choices)
        return {"required": required, "optional": optional}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        # A LoRA that was trained anew under its old name must be read again.
        return json.dumps([_identity(row) for row in _rows(inputs)])

    def apply(self, model: Any, clip: Any = None, **inputs: Any) -> tuple[Any, Any, str]:
        """Returns copies of model and clip with the LoRAs; the inputs are not changed."""
        rows = list(_rows(inputs))
        if not rows:
            self._files = []
            return model, clip, "No LoRA is switched on."
        targets = Targets(model, clip)
        read = _read(rows, targets)
        # Only these stay in memory for the next run.
        self._files = [matched for _, matched in read]

        new_model = _patched(model, model, _terms(read, targets, on_clip=False))
        new_clip = clip
        if clip is not None:
            new_clip = _patched(clip, clip.patcher, _terms(read, targets, on_clip=True))
        report = "\n".join(_report(read, targets, model.load_device))
        logging.getLogger("lycore").info("%s", report)
        return new_model, new_clip, report


def _widgets(number: int, choices: list[str]) -> dict[str, Any]:
    strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05, "round": 0.001}
    on_model = {**strength, "tooltip": "Strength on the diffusion model; may be negative."}
    on_clip = {**strength, "tooltip": "Strength on the text encoders; may be negative."}
    return {
        f"on_{number}": ("BOOLEAN", {"default": True, "tooltip": f"Apply row {number}."}),
        f"lora_{number}": (choices, {"tooltip": "A file of the folder `loras`."}),
        f"strength_model_{number}": ("FLOAT", on_model),
        f"strength_clip_{number}": ("FLOAT", on_clip),
    }


def _rows(inputs: dict[str, Any]) -> Iterator[Row]:
    """The rows that do something. A workflow sent through the API may leave widgets out."""
    for number in range(1, _ROWS + 1):
        name = inputs.get(f"lora_{number}", "None")
        strengths = [float(inputs.get(f"strength_{part}_{number}", 1.0)) for part in ("model", "clip")]
        if inputs.get(f"on_{number}", True) and name not in (None, "", "None") and any(strengths):
            yield Row(number, name, *strengths)


def _path(name: str) -> str:
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise NodeError("there is no such file in the folders for LoRAs. Hint: refresh the page, or choose another")
    return path


def _identity(row: Row) -> list[Any]:
    try:
        return [row.number, files.digest(_path(row.name))]
    except (OSError, NodeError) as problem:
        # The run itself reports it.
        return [row.number, str(problem)]


def _read(rows: Iterable[Row], targets: Targets) -> Read:
    """Every row's file, matched with the model.

    A row that cannot be applied stops the node: a picture that silently lacks a LoRA is worse than none.
    """
    lycore = library.find()
    try:
        lycore.load()
    except lycore.LibraryError as problem:
        raise NodeError(f"LyCore LoRA Stack: {problem}") from problem
    reader = files.Reader(lycore, targets)
    read = []
    for row in rows:
        comfy.model_management.throw_exception_if_processing_interrupted()
        try:
            matched = reader.read(_path(row.name))
            if matched.misfit and row.model != 0:
                # The text encoder of another model may fit by chance.
                raise NodeError(matched.misfit)
        except (lycore.LycoreError, OSError, NodeError) as problem:
            raise NodeError(f"LyCore LoRA Stack, row {row.number}, {row.name}: {problem}") from problem
        read.append((row, matched))
    return read


def _terms(read: Read, targets: Targets, *, on_clip: bool) -> list[tuple[str, float, list[files.Term]]]:
    """(digest of the file, strength, terms) of one side, the files that do nothing there left out."""
    found = []
    for row, matched in read:
        strength = row.clip if on_clip else row.model
        terms = [term for term in matched.terms if (term.place.key in targets.clip_keys) == on_clip]
        if strength != 0 and terms:
            found.append((matched.digest, strength, terms))
    return found


def _patched(owner: Any, patcher: Any, wanted: list[tuple[str, float, list[files.Term]]]) -> Any:
    """A copy of `owner` (a ModelPatcher, or a CLIP around one) with these terms; `owner` itself when there are none."""
    gathered: dict[Any, list[LyCoreAdapter]] = {}
    for _, strength, terms in wanted:
        for term in terms:
            place = term.place
            # A function is ComfyUI's to apply, to a whole patch; everything else of a weight shares one.
            key = place.key if place.function is None else (place.key, place.slice, place.function)
            piece = place.slice if place.function is None else None
            one = LyCoreAdapter({term.module}, ((strength, piece, term.tensors),))
            gathered.setdefault(key, []).append(one)
    if not gathered:
        return owner
    before = patcher.patches_uuid
    copy = owner.clone()
    copy.add_patches({key: LyCoreAdapter.joined((1.0, a) for a in parts) for key, parts in gathered.items()}, 1.0)
    inner = copy if owner is patcher else copy.patcher
    for key in {key if isinstance(key, str) else key[0] for key in gathered}:
        if key in inner.patches:
            inner.patches[key] = _joined(inner.patches[key])
    inner.patches_uuid = _uuid(before, [(digest, strength) for digest, strength, _ in wanted])
    return copy


def _joined(entries: Iterable[Any]) -> list[Any]:
    """A weight's patches with neighbours that are ours made one, so that chained nodes round once too.

    An entry is ComfyUI's (strength, adapter, strength of the weight itself, offset, function).
    """
    joined: list[Any] = []
    for entry in entries:
        last = joined[-1] if joined else None
        ours = [e for e in (last, entry) if e is not None and type(e[1]) is LyCoreAdapter and e[2] == 1.0]
        if len(ours) == 2 and last[3:] == entry[3:]:
            joined[-1] = (1.0, LyCoreAdapter.joined((e[0], e[1]) for e in ours), *entry[2:])
        else:
            joined.append(entry)
    return joined


def _uuid(before: Any, content: list[tuple[str, float]]) -> uuid.UUID:
    """What ComfyUI compares to decide whether a loaded model has these patches already.

    Equal for equal patches on an equal model, where ComfyUI's own is drawn anew each time.
    """
    namespace = before if isinstance(before, uuid.UUID) else uuid.uuid5(uuid.NAMESPACE_OID, str(before))
    return uuid.uuid5(namespace, json.dumps(["lycore", 1, content]))


def _report(read: Read, targets: Targets, device: Any) -> Iterator[str]:
    for row, matched in read:
        yield from _row_report(row, matched, targets)
    why = unreachable(device)
    if why:
        yield f"Merged on the CPU, not on {device}: {why}"


def _row_report(row: Row, matched: files.Matched, targets: Targets) -> Iterator[str]:
    on_clip = sum(term.place.key in targets.clip_keys for term in matched.terms)
    on_model = len(matched.terms) - on_clip
    modules = matched.report["modules"]
    sides = f" ({on_model} model, {on_clip} text encoder)" if on_clip else ""
    parts = [f"{len(matched.terms)}/{len(modules)} modules{sides}", "+".join(sorted({m["algorithm"] for m in modules}))]
    for name in ("rank", "alpha"):
        numbers = sorted({m[name] for m in modules if m[name] is not None})
        if numbers:
            parts.append(f"{name} {numbers[0]:g}" + (f" to {numbers[-1]:g}" if len(numbers) > 1 else ""))
    parts.append(f"strength {row.model:g} / {row.clip:g}" if on_clip else f"strength {row.model:g}")
    yield f"{row.name}: {', '.join(parts)}"
    if matched.left_out:
        yield f"  {matched.left_out} modules of text encoders left out: no CLIP is connected"
    if matched.problems:
        logging.getLogger("lycore").warning("%s is not applied in full; the node's report says why", row.name)
    yield from (f"  {problem}" for problem in matched.problems[:_LINES])
    if len(matched.problems) > _LINES:
        yield f"  and {len(matched.problems) - _LINES} more"


NODE_CLASS_MAPPINGS = {"LyCoreLoraStack": LyCoreLoraStack}
NODE_DISPLAY_NAME_MAPPINGS = {"LyCoreLoraStack": "LyCore LoRA Stack"}
