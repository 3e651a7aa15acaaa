"""LyCore: loads, merges, scales and trains LoRA / LyCORIS adapters.

    import lycore

    with lycore.Stack(model) as stack:                  # a torch module, or a mapping of names to tensors
        style = stack.add("style.safetensors", 0.8)
        stack.apply()                                   # W' = W + 0.8 * delta(W)
        style.strength = 0.5
        stack.apply()                                   # again from the pristine W
    # here the weights are the base again, bit for bit

    lycore.merge("base.safetensors", [("style.safetensors", 0.8)], "out.safetensors")

Importing this package loads nothing and needs neither torch nor a GPU; each name below is imported when it is first
used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._library import Library as Library
    from ._library import load as load
    from .adapter import Adapter as Adapter
    from .adapter import AdapterTensor as AdapterTensor
    from .adapter import Module as Module
    from .adapter import open_adapter
    from .adapter import report_text as report_text
    from .checkpoint import merge as merge
    from .conversion import convert as convert
    from .errors import AdapterKeyError as AdapterKeyError
    from .errors import ArgumentError as ArgumentError
    from .errors import BackendError as BackendError
    from .errors import BusyError as BusyError
    from .errors import Cancelled as Cancelled
    from .errors import DeviceError as DeviceError
    from .errors import DtypeError as DtypeError
    from .errors import FileError as FileError
    from .errors import HandleError as HandleError
    from .errors import InternalError as InternalError
    from .errors import LibraryError as LibraryError
    from .errors import LycoreError as LycoreError
    from .errors import ShapeError as ShapeError
    from .errors import TrainError as TrainError
    from .errors import UnsupportedError as UnsupportedError
    from .network import Network as Network
    from .progress import Cancel as Cancel
    from .stack import Applied as Applied
    from .stack import Handle as Handle
    from .stack import Stack as Stack
    from .stack import weight_merge as weight_merge
    from .strengths import Strengths as Strengths
    from .tools import combine as combine
    from .tools import extract as extract
    from .tools import resize as resize

    open = open_adapter

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterKeyError": "errors",
    "AdapterTensor": "adapter",
    "Applied": "stack",
    "ArgumentError": "errors",
    "BackendError": "errors",
    "BusyError": "errors",
    "Cancel": "progress",
    "Cancelled": "errors",
    "combine": "tools",
    "convert": "conversion",
    "DeviceError": "errors",
    "DtypeError": "errors",
    "extract": "tools",
    "FileError": "errors",
    "Handle": "stack",
    "HandleError": "errors",
    "InternalError": "errors",
    "Library": "_library",
    "LibraryError": "errors",
    "load": "_library",
    "LycoreError": "errors",
    "merge": "checkpoint",
    "Module": "adapter",
    "Network": "network",
    "open": "adapter",
    "report_text": "adapter",
    "resize": "tools",
    "ShapeError": "errors",
    "Stack": "stack",
    "Strengths": "strengths",
    "TrainError": "errors",
    "UnsupportedError": "errors",
    "weight_merge": "stack",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f".{_HOMES[name]}", __name__)
    found = getattr(home, "open_adapter" if name == "open" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
