"""Which builds of the shared library there are, found without loading any.

One source gives two kinds: a small build without libtorch, which runs in any process, and one build per torch minor,
which must use the libtorch that the process has. A library that links libtorch is never opened before torch is
imported: the loader finds libtorch by its soname among what is loaded, and nowhere else.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import LibraryError

ENVIRONMENT = "LYCORE_LIBRARY"
PACKAGE = Path(__file__).resolve().parent
_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
SMALL_NAME = f"{_PREFIX}lycore{_SUFFIX}"
_TORCH_NAME = re.compile(rf"{_PREFIX}lycore-torch(\d+\.\d+){re.escape(_SUFFIX)}")


@dataclass(frozen=True)
class Build:
    """A shared library on disk."""

    path: Path
    origin: str
    """Where it was found: the environment variable's name, "package" or "checkout"."""
    links_torch: bool
    torch: str | None = None
    """The torch minor that it was built for; None when it links no libtorch or its name does not say."""

    def describe(self) -> str:
        """For people: what kind of build this is."""
        if not self.links_torch:
            return "without libtorch"
        return f"for torch {self.torch}" if self.torch else "with libtorch"


def minor(version: str) -> str:
    """ "2.11" of "2.11.0+cu130"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def links_torch(path: Path) -> bool:
    """Whether a library needs libtorch, by the file name that its string table then holds."""
    marks = (b"libtorch_cpu.so\0", b"libtorch_cpu.dylib\0", b"torch_cpu.dll\0")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return any(data.find(mark) >= 0 for mark in marks)


def _build(path: Path, origin: str) -> Build:
    named = _TORCH_NAME.fullmatch(path.name)
    if named:
        return Build(path, origin, True, named[1])
    return Build(path, origin, links_torch(path))


def _in_folder(folder: Path, origin: str) -> Iterable[Build]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_file() and (path.name == SMALL_NAME or _TORCH_NAME.fullmatch(path.name)):
                yield _build(path, origin)


def places() -> list[Path]:
    """Where `find` looks, in this order, when the environment does not name a library."""
    target = PACKAGE.parent.parent / "target"
    return [PACKAGE / "lib", target / "release", target / "small" / "release"]


def find() -> list[Build]:
    """Every build there is, the preferred ones first.

    LYCORE_LIBRARY (a library, or a folder of them) stands for all other places; LibraryError when it names nothing.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        path = Path(named)
        found = [_build(path, ENVIRONMENT)] if path.is_file() else list(_in_folder(path, ENVIRONMENT))
        if not found:
            hint = "correct it, or unset it to use the library of the package"
            raise LibraryError(f"{ENVIRONMENT} is {named}, where there is no LyCore library.", hint=hint)
        return found
    package, *checkout = places()
    found = list(_in_folder(package, "package"))
    for folder in checkout:
        found += _in_folder(folder, "checkout")
    return found


def small(builds: Iterable[Build]) -> Build | None:
    """The build that needs no torch."""
    return next((b for b in builds if not b.links_torch), None)


def fitting(builds: Iterable[Build], torch: str) -> Build | None:
    """The build for this torch version: one that says so by its name, else one that does not say."""
    own = minor(torch)
    candidates = [b for b in builds if b.links_torch and b.torch in (own, None)]
    return min(candidates, key=lambda b: b.torch is None, default=None)


def not_found() -> LibraryError:
    """No library at all."""
    looked = ", ".join(str(place) for place in places())
    hint = (
        f"reinstall the package, build the library with `make small` (in the sources), or set {ENVIRONMENT} to its path"
    )
    return LibraryError(f"The LyCore library is nowhere in {looked}.", hint=hint)


def no_torch_build(builds: Iterable[Build], torch: str | None) -> LibraryError:
    """There is no build for this torch: one sentence with both versions, and what to do."""
    minors = sorted({b.torch for b in builds if b.torch}, key=lambda m: [int(n) for n in m.split(".")])
    if not minors:
        what = (
            "Training needs a LyCore build with libtorch, as do layers beside their weights on a GPU; "
            "only the build without it is installed."
        )
        wanted = f" for torch {minor(torch)}" if torch else ""
        return LibraryError(what, hint=f"install a LyCore release{wanted}, or build one with `make lib`")
    listed = " and ".join([", ".join(minors[:-1]), minors[-1]] if len(minors) > 1 else minors)
    have = f"this process has torch {torch}" if torch else "torch is not installed"
    what = f"LyCore is built for torch {listed}, but {have}."
    hint = f"install torch {minors[-1]}" + (f", or a LyCore release for torch {minor(torch)}" if torch else "")
    return LibraryError(what, hint=f"{hint}; merging works without it")
