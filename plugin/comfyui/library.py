"""Finds the Python package `lycore` when a node runs.

Not at import: ComfyUI then lists the node also where the package or its shared library is missing, and a run says what
to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_HINT = "install the package `lycore` into ComfyUI's Python, or link this folder from LyCore's `plugin` folder"


class NodeError(RuntimeError):
    """What the user sees on the node: one sentence, and what to do."""


def find() -> ModuleType:
    """The package: one that is imported already, the folder `lycore` beside this one, or the installed one."""
    known = sys.modules.get("lycore")
    if known is not None and _is_package(known):
        return known
    for folder in _folders():
        # A copy of this folder may itself be called `lycore`; the binding tells the package from it.
        if (folder / "_binding.py").is_file():
            return _import_from(folder)
    try:
        module = importlib.import_module("lycore")
    except ImportError as problem:
        raise NodeError(f"The Python package `lycore` is not there ({problem}). Hint: {_HINT}.") from problem
    if not _is_package(module):
        raise NodeError(f"`lycore` is {module.__file__}, which is not LyCore's package. Hint: {_HINT}.")
    return module


def _is_package(module: ModuleType) -> bool:
    return hasattr(module, "weight_merge") and hasattr(module, "Stack")


def _folders() -> list[Path]:
    here = Path(__file__).parent
    # A link is followed first: the package lies beside what it points to.
    return [here.resolve().parent / "lycore", here.parent / "lycore", here / "lycore"]


def _import_from(folder: Path) -> ModuleType:
    # Under its own name, so that every pack of this process shares one copy, but without a new entry in sys.path.
    spec = importlib.util.spec_from_file_location("lycore", folder / "__init__.py")
    if spec is None or spec.loader is None:
        raise NodeError(f"{folder} cannot be imported. Hint: {_HINT}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules["lycore"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        del sys.modules["lycore"]
        raise NodeError(f"{folder} cannot be imported: {problem}") from problem
    return module
