"""What works on this machine, and why not: the facts behind `lycore doctor`.

Every build is tried in a process of its own: one that links libtorch needs torch imported, and a build that does not
fit may bring its process down. The calling process loads nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import __version__, _builds
from ._library import torch_version
from .errors import LibraryError

_PROBE = "import sys; from lycore.doctor import probe; probe(sys.argv[1])"


def probe(kind: str) -> None:
    """In the other process: loads the "torch" or the "small" build and prints what it says, as JSON."""
    from ._library import load

    try:
        library = load(torch=kind == "torch")
        answer = {"path": str(library.build.path), **library.capabilities()}
    except LibraryError as problem:
        answer = {"error": problem.message, "hint": problem.hint}
    print(json.dumps(answer))


def _try(kind: str) -> dict[str, Any]:
    parent = str(_builds.PACKAGE.parent)
    paths = os.pathsep.join([parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", _PROBE, kind]
    environment = {**os.environ, "PYTHONPATH": paths}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return {"error": f"trying it failed: {problem}", "hint": ""}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"loading it ended the process (status {done.returncode}): {last}", "hint": ""}


def examine() -> dict[str, Any]:
    """{"package", "python", "torch", "builds": [..], "used": {..}, "devices", "works": {what: True or the reason why
    not}}.
    """
    torch = torch_version()
    try:
        builds, problem = _builds.find(), None if _builds.find() else _builds.not_found()
    except LibraryError as missing:
        builds, problem = [], missing
    small, fits = _builds.small(builds), _builds.fitting(builds, torch) if torch else None
    tried = {kind: _try(kind) for kind, build in (("small", small), ("torch", fits)) if build}
    answers = {str(build.path): tried[kind] for kind, build in (("small", small), ("torch", fits)) if build}
    listed = []
    for build in builds:
        entry: dict[str, Any] = {"path": str(build.path), "kind": build.describe(), "origin": build.origin}
        listed.append(entry | answers.get(str(build.path), {"error": _why_not_tried(build, torch), "hint": ""}))
    with_torch = tried.get("torch") or _refusal(builds, torch, problem)
    without = tried.get("small") or _refusal(builds, torch, problem)
    return {
        "package": __version__,
        "python": sys.version.split()[0],
        "torch": torch,
        "builds": listed,
        "used": {
            "without torch in the process": _name(without) or _name(with_torch),
            "with torch in the process": _name(with_torch) or _name(without),
        },
        "devices": {"cpu threads": _field(without, with_torch, "threads"), "cuda": _field(with_torch, without, "cuda")},
        "works": _works(without, with_torch),
    }


def _works(without: dict[str, Any], with_torch: dict[str, Any]) -> dict[str, bool | str]:
    merging: bool | str = True if "error" not in without or "error" not in with_torch else _reason(without)
    # Either build merges on a GPU.
    loaded = [answer["cuda"] for answer in (with_torch, without) if "error" not in answer]
    gpu: bool | str = any(cuda["devices"] for cuda in loaded)
    if not gpu:
        gpu = str(loaded[0].get("why", "no CUDA device")) if loaded else _reason(with_torch)
    if "error" in with_torch:
        training: bool | str = _reason(with_torch)
    else:
        training = True if with_torch["training"] else "this build has no training"
    return {"merge on the CPU": merging, "merge on a GPU": gpu, "training": training}


def _refusal(builds: list[_builds.Build], torch: str | None, problem: LibraryError | None) -> dict[str, Any]:
    problem = problem or _builds.no_torch_build(builds, torch)
    return {"error": problem.message, "hint": problem.hint}


def _why_not_tried(build: _builds.Build, torch: str | None) -> str:
    if not build.links_torch:
        return "another build comes first"
    if torch is None:
        return "torch is not installed"
    return "another build comes first" if build.torch in (None, _builds.minor(torch)) else f"torch here is {torch}"


def _reason(answer: dict[str, Any]) -> str:
    return "; ".join(filter(None, [answer["error"].rstrip("."), answer["hint"]]))


def _name(answer: dict[str, Any]) -> str | None:
    return answer.get("path")


def _field(first: dict[str, Any], second: dict[str, Any], field: str) -> Any:
    return first.get(field, second.get(field))


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"lycore {found['package']}, Python {found['python']}, torch {found['torch'] or 'not installed'}",
        "",
        "builds",
    ]
    for build in found["builds"]:
        state = build["error"] if "error" in build else f"version {build['version']}, works"
        lines.append(f"  {Path(build['path']).name} ({build['kind']}, {build['origin']}): {state}")
        lines.append(f"    {build['path']}")
    if not found["builds"]:
        lines.append("  none")
    lines += ["", "used"]
    lines += [f"  {when}: {path or 'none'}" for when, path in found["used"].items()]
    cuda = found["devices"]["cuda"] or {}
    devices = f"{cuda['devices']} CUDA" if cuda.get("devices") else f"no CUDA: {cuda.get('why', 'not asked')}"
    lines += ["", "devices", f"  {found['devices']['cpu threads'] or 0} CPU threads; {devices}", "", "works"]
    for what, state in found["works"].items():
        lines.append(f"  {what}: {'yes' if state is True else f'no. {state}'}")
    return "\n".join(lines)
