"""The commands `lycore resize`, `combine` and `extract`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

_DTYPES = ["keep", "fp32", "fp16", "bf16"]


def add_parsers(commands: argparse._SubParsersAction, as_json: argparse.ArgumentParser) -> None:
    """Adds the three commands. `as_json` is the parent with `--json`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-o", "--output", metavar="OUT", required=True, help="the file to write")
    common.add_argument("--conv-rank", type=int, metavar="N", help="of convolutions (default: --rank)")
    common.add_argument("--dtype", default="keep", choices=_DTYPES, help="of new tensors (default: keep)")
    parents = [as_json, common]

    resize = commands.add_parser(
        "resize",
        parents=parents,
        help="give an adapter fewer ranks",
        description="Writes an adapter with fewer ranks, never larger than it was (but with --convert).",
    )
    resize.add_argument("file", metavar="FILE", help="a safetensors adapter")
    resize.add_argument("--rank", type=int, metavar="N", help="the most ranks of a module")
    resize.add_argument(
        "--method",
        default="fixed",
        choices=["fixed", "sv_ratio", "sv_cumulative", "sv_fro"],
        help="how a module's rank is picked: as given, or by sd-scripts' dynamic methods (default: fixed)",
    )
    resize.add_argument("--param", type=float, metavar="X", help="the number of a dynamic method")
    resize.add_argument("--convert", action="store_true", help="turn LoHa and LoKr into LoRA")
    resize.set_defaults(run=run_resize)

    combine = commands.add_parser(
        "combine",
        parents=parents,
        help="add several adapters up into one",
        description="Writes the weighted sum of adapters as one file.",
    )
    combine.add_argument(
        "adapters", metavar="ADAPTER[:WEIGHT]", nargs="+", help="an adapter and its weight (1 if none is given)"
    )
    combine.add_argument("--rank", type=int, metavar="N", help="to cut the result to; not with concat and linear")
    combine.add_argument(
        "--method",
        default="concat",
        choices=["concat", "svd", "linear", "ties", "dare", "magnitude_prune"],
        help="concat is exact, its ranks add up (default: concat)",
    )
    combine.add_argument("--density", type=float, metavar="X", help="what ties, dare and magnitude_prune keep, 0 to 1")
    combine.add_argument("--seed", type=int, metavar="N", help="of dare (default: 0)")
    combine.set_defaults(run=run_combine)

    extract = commands.add_parser(
        "extract",
        parents=parents,
        help="make a LoRA of the difference of two checkpoints",
        description="Writes what a tuned checkpoint has beyond its base as a LoRA.",
    )
    extract.add_argument("tuned", metavar="TUNED", help="the tuned checkpoint")
    extract.add_argument("base", metavar="BASE", help="the checkpoint that it was made from")
    extract.add_argument("--rank", type=int, metavar="N", default=32, help="the most ranks of a module (default: 32)")
    extract.add_argument(
        "--energy", type=float, metavar="X", help="the share of each difference that is enough, 0 to 1"
    )
    extract.add_argument("--min-diff", type=float, metavar="X", default=0.0, help="leave out what differs by no more")
    extract.add_argument("--norms", action="store_true", help="norms and biases too")
    extract.add_argument(
        "--spelling", default="kohya", choices=["kohya", "checkpoint"], help="of module names (default: kohya)"
    )
    extract.set_defaults(run=run_extract)


def run_resize(arguments: argparse.Namespace) -> int:
    """`lycore resize`."""
    from .tools import resize

    options = _options(arguments, "rank", "conv_rank", "method", "param", "dtype", "convert")
    return _run(arguments, lambda **watch: resize(arguments.file, arguments.output, **options, **watch), resize_text)


def run_combine(arguments: argparse.Namespace) -> int:
    """`lycore combine`."""
    from .cli import split_strength
    from .tools import combine

    options = _options(arguments, "rank", "conv_rank", "method", "density", "seed", "dtype")
    pairs = [split_strength(text) for text in arguments.adapters]
    return _run(arguments, lambda **watch: combine(pairs, arguments.output, **options, **watch), combine_text)


def run_extract(arguments: argparse.Namespace) -> int:
    """`lycore extract`."""
    from .tools import extract

    names = ("rank", "conv_rank", "energy", "min_diff", "dtype", "norms", "spelling")
    options = _options(arguments, *names)
    files = (arguments.tuned, arguments.base, arguments.output)
    return _run(arguments, lambda **watch: extract(*files, **options, **watch), extract_text)


def _options(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _run(
    arguments: argparse.Namespace, tool: Callable[..., dict[str, Any]], text: Callable[[dict[str, Any]], str]
) -> int:
    from .cli import Bar, cancelled_by_signals
    from .progress import Cancel

    cancel = Cancel()
    with Bar(sys.stderr, unit="modules") as bar, cancelled_by_signals(cancel):
        report = tool(progress=bar.show, cancel=cancel)
    print(json.dumps(report, ensure_ascii=False, indent=2) if arguments.json else text(report))
    return 0


def resize_text(report: dict[str, Any]) -> str:
    """For people: sizes, ranks, the largest error, and why modules were copied."""
    from .cli import size_text

    summary, size = report["summary"], report["bytes"]
    lines = [
        f"{report['output']}: {summary['resized']} modules resized, {summary['copied']} copied, "
        f"{size_text(size['source'])} -> {size_text(size['output'])}"
    ]
    changed = [m for m in report["modules"] if m["status"] != "copied"]
    if changed:
        ranks = sorted(m["new_rank"] for m in changed)
        worst = max(changed, key=lambda m: m["error"])
        lines.append(f"  ranks {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}")
        lines.append(f"  largest error {worst['error']:.2%}: {worst['module']}")
    reasons: dict[str, int] = {}
    for module in report["modules"]:
        if module["status"] == "copied":
            reasons[module["reason"]] = reasons.get(module["reason"], 0) + 1
    lines += [f"  {count} copied: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)


def combine_text(report: dict[str, Any]) -> str:
    """For people: size, the files, and what was left out."""
    from .cli import size_text

    summary = report["summary"]
    lines = [
        f"{report['output']}: {summary['modules']} modules, {summary['shared']} of them from several files, "
        f"{report['method']}, {size_text(report['bytes'])}"
    ]
    for source in report["sources"]:
        lines.append(f"  {source['weight']:g} x {source['file']}: {source['modules']} modules")
        lines += [f"    left out: {key}" for key in source["left_out"]]
    cut = [m for m in report["modules"] if m.get("error") is not None]
    if cut:
        worst = max(cut, key=lambda m: m["error"])
        lines.append(f"  largest error of the cut {worst['error']:.2%}: {worst['module']}")
    return "\n".join(lines)


def extract_text(report: dict[str, Any]) -> str:
    """For people: size, counts, the largest error, and what was skipped."""
    from .cli import size_text

    summary = report["summary"]
    lines = [
        f"{report['output']}: {summary['modules']} modules of {summary['weights']} weights, "
        f"{summary['unchanged']} unchanged, {size_text(report['bytes'])}"
    ]
    worst = max(report["modules"], key=lambda m: m["error"])
    lines.append(f"  largest error {worst['error']:.2%}: {worst['module']}")
    lines += [f"  skipped: {skipped['weight']}: {skipped['reason']}" for skipped in report["skipped"]]
    return "\n".join(lines)
