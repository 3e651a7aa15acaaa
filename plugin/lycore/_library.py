"""Loads a build of the shared library and calls it: statuses become exceptions, texts become `str`, handles are freed.

`import lycore` loads nothing. The first call that needs the library decides for the process: the build for its torch
when torch is imported already, else the small one. Training asks for the build with libtorch by itself and gets it
beside the small one; handles belong to the library that made them, so every object keeps its own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import sys
import threading
from ctypes import byref, c_void_p
from importlib import import_module
from pathlib import Path
from typing import Any

from . import _binding, _builds
from ._builds import Build
from .errors import HandleError, LibraryError, class_of

_LOCK = threading.RLock()
_LOADED: dict[Path, Library] = {}
_default: Library | None = None


class Library:
    """One loaded build. Calls release the GIL while they run."""

    def __init__(self, build: Build, functions: ctypes.CDLL):
        self.build = build
        self.functions = functions
        self.version: str = functions.lycore_version().decode()

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function that takes `lycore_error **` last; raises the LycoreError of its status."""
        error = c_void_p()
        status = getattr(self.functions, name)(*arguments, byref(error))
        if status != _binding.lycore_status.LYCORE_OK:
            raise self._exception(status, error)

    def text(self, name: str, *arguments: Any) -> str:
        """Calls a function that returns a text through `char **`, just before `error`."""
        text = c_void_p()
        self.call(name, *arguments, byref(text))
        return self.take_text(text)

    def take_text(self, text: c_void_p) -> str:
        """Copies a text that the library gave, and frees it."""
        try:
            return ctypes.string_at(text.value or 0).decode() if text.value else ""
        finally:
            self.functions.lycore_text_free(text)

    def new(self, name: str, free: str, *arguments: Any) -> Owned:
        """Calls a function that makes an object, whose handle comes just before `error`."""
        handle = c_void_p()
        self.call(name, *arguments, byref(handle))
        return Owned(self, handle.value or 0, free)

    @property
    def torch(self) -> str | None:
        """The libtorch that this build was made for; None for the build without."""
        return self.functions.lycore_torch_version().decode() or None

    def capabilities(self) -> dict[str, Any]:
        """What this build can do on this machine. May start CUDA in the process."""
        return json.loads(self.text("lycore_capabilities"))

    def _exception(self, status: int, error: c_void_p) -> Exception:
        f = self.functions
        try:
            message = f.lycore_error_message(error).decode(errors="replace")
            details = {
                name: getattr(f, f"lycore_error_{name}")(error).decode(errors="replace")
                for name in ("hint", "key", "file")
            }
        finally:
            f.lycore_error_free(error)
        return class_of(status)(message or f.lycore_status_text(status).decode(), status=status, **details)


class Owned:
    """A handle, freed when nobody holds this object any more. Can be passed to ctypes as it is."""

    __slots__ = ("__weakref__", "_as_parameter_", "_free", "library")

    def __init__(self, library: Library, handle: int, free: str):
        self.library = library
        self._free = getattr(library.functions, free)
        self._as_parameter_ = c_void_p(handle)

    def __del__(self) -> None:
        # Missing when __init__ was stopped half way.
        if free := getattr(self, "_free", None):
            free(self._as_parameter_)


class Closable:
    """An object around one handle, until it is closed."""

    _owner: Owned | None

    def _handle(self) -> Owned:
        if self._owner is None:
            raise HandleError(f"The {type(self).__name__.lower()} is closed.")
        return self._owner

    def _call(self, function: str, *arguments: Any) -> None:
        owner = self._handle()
        owner.library.call(function, owner, *arguments)


def load(torch: bool | None = None) -> Library:
    """The library of this process; loads it on the first call.

    `torch=True` asks for the build with libtorch (imports torch), `torch=False` for the small one, None for whichever
    was loaded first. Raises LibraryError, with what to do as its hint, when there is no such build or it does not
    fit.
    """
    global _default
    with _LOCK:
        if torch is None and _default is not None:
            return _default
        choose = {None: _whichever, True: _with_torch, False: _without_torch}
        library = choose[torch]()
        _default = _default or library
        return library


def loaded() -> list[Library]:
    """The builds in this process, the default one first."""
    with _LOCK:
        return sorted(_LOADED.values(), key=lambda library: library is not _default)


def _whichever() -> Library:
    builds = _builds.find()
    has_small = _builds.small(builds) is not None
    if "torch" not in sys.modules:
        return _without_torch() if has_small else _with_torch()
    try:
        return _with_torch()
    except LibraryError as problem:
        if not has_small:
            raise
        if any(b.links_torch for b in builds):
            logging.getLogger("lycore").warning("%s Using the build without libtorch.", problem)
        return _without_torch()


def _without_torch() -> Library:
    builds = _builds.find()
    build = _builds.small(builds)
    if build is None:
        if not builds:
            raise _builds.not_found()
        what = f"{builds[0].path} needs libtorch, and there is no LyCore build without it."
        raise LibraryError(what, hint="install the whole package, or build with `make small`")
    return _open(build)


def _with_torch() -> Library:
    builds = _builds.find()
    if not builds:
        raise _builds.not_found()
    if not any(b.links_torch for b in builds):
        raise _builds.no_torch_build(builds, torch_version())
    try:
        # First, so that libtorch is in the process when the library looks for it.
        version = str(import_module("torch").__version__)
    except (ImportError, OSError) as problem:
        if torch_version() is None:
            raise _builds.no_torch_build(builds, None) from problem
        raise LibraryError(f"torch cannot be imported: {problem}", hint="repair the installation of torch") from problem
    build = _builds.fitting(builds, version)
    if build is None:
        raise _builds.no_torch_build(builds, version)
    library = _open(build, version)
    if build.torch is None:
        made_for = library.torch
        if made_for is None or _builds.minor(made_for) != _builds.minor(version):
            what = f"{build.path} is built for torch {made_for}, but this process has torch {version}."
            raise LibraryError(what, hint=f"build LyCore against torch {version}, or install torch {made_for}")
    return library


def _open(build: Build, torch: str | None = None) -> Library:
    if build.path in _LOADED:
        return _LOADED[build.path]
    try:
        functions = _dlopen(build.path)
    except OSError as problem:
        beside = f" beside torch {torch}" if torch else ""
        what = f"{build.path} ({build.describe()}) cannot be loaded{beside}: {problem}."
        hint = f"build LyCore against torch {torch}, or install the torch it was built for" if torch else ""
        raise LibraryError(what, hint=hint or "is it built for this system?") from problem
    library = _checked(build, functions)
    _LOADED[build.path] = library
    return library


def _dlopen(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def _checked(build: Build, functions: ctypes.CDLL) -> Library:
    """Refuses a library of another version than the header that this package was made from."""
    own = f"{_binding.LYCORE_VERSION_MAJOR}.{_binding.LYCORE_VERSION_MINOR}.{_binding.LYCORE_VERSION_PATCH}"
    hint = "package and library must come from the same release"
    try:
        _binding.declare(functions)
        number = functions.lycore_version_number()
    except AttributeError as problem:
        raise LibraryError(f"{build.path} is not the library of lycore {own}: {problem}.", hint=hint) from problem
    major, rest = divmod(number, 1_000_000)
    if (major, rest // 1000) != (_binding.LYCORE_VERSION_MAJOR, _binding.LYCORE_VERSION_MINOR):
        theirs = f"{major}.{rest // 1000}.{rest % 1000}"
        raise LibraryError(f"{build.path} is LyCore {theirs}, but the Python package is {own}.", hint=hint)
    return Library(build, functions)


def torch_version() -> str | None:
    """Version of the torch in this process, else of the installed one, which is not imported."""
    if "torch" in sys.modules:
        return str(getattr(sys.modules["torch"], "__version__", "")) or None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return None
