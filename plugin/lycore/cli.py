"""The command `lycore`. `info` and `merge` on the CPU import neither torch nor numpy."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from . import __version__, cli_convert, cli_tools

if TYPE_CHECKING:
    from .progress import Cancel

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def split_strength(text: str) -> tuple[str, float]:
    """`FILE[:STRENGTH]`: the strength is what follows the last colon and is a number, so `C:\\x.safetensors` is a
    file.
    """
    path, colon, number = text.rpartition(":")
    if colon and path and _NUMBER.fullmatch(number) and math.isfinite(float(number)):
        return path, float(number)
    return text, 1.0


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(prog="lycore", description="Looks at and merges LoRA / LyCORIS adapters.")
    top.add_argument("--version", action="version", version=f"lycore {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON on stdout")
    lists = argparse.ArgumentParser(add_help=False)
    lists.add_argument("--all", action="store_true", help="do not cut long lists")

    info = commands.add_parser("info", parents=[as_json, lists], help="what an adapter file holds")
    info.add_argument("file", metavar="FILE", help="an adapter: safetensors, .pt or .ckpt")
    info.set_defaults(run=run_info)

    doctor = commands.add_parser("doctor", parents=[as_json], help="what works on this machine, and why not")
    doctor.set_defaults(run=run_doctor)

    merge = commands.add_parser(
        "merge",
        parents=[as_json, lists],
        help="merge adapters into a checkpoint",
        description="Merges adapters into a safetensors checkpoint. The output appears whole or not at all.",
    )
    merge.add_argument("base", metavar="BASE", help="the checkpoint")
    merge.add_argument(
        "adapters", metavar="ADAPTER[:STRENGTH]", nargs="+", help="an adapter and its strength (1 if none is given)"
    )
    merge.add_argument("-o", "--output", metavar="OUT", required=True, help="the file to write; may be BASE itself")
    merge.add_argument("--device", default="cpu", metavar="cpu|cuda|cuda:N", help="where to compute (default: cpu)")
    merge.add_argument(
        "--dtype",
        default="keep",
        choices=["keep", "fp32", "fp16", "bf16"],
        help="of the floating-point tensors in the output (default: keep)",
    )
    merge.add_argument(
        "--other-families", action="store_true", help="also apply what fits of an adapter made for another model family"
    )
    merge.set_defaults(run=run_merge)
    cli_tools.add_parsers(commands, as_json)
    cli_convert.add_parser(commands)
    return top


def run_info(arguments: argparse.Namespace) -> int:
    """`lycore info`."""
    from .adapter import Adapter

    with Adapter(arguments.file) as adapter:
        report = adapter.report()
    print_report(report, arguments)
    return 0


def print_report(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """A report as JSON or for people, as the arguments say."""
    from .adapter import report_text

    text = json.dumps(report, ensure_ascii=False, indent=2)
    print(text if arguments.json else report_text(report, all=arguments.all).rstrip("\n"))


def run_doctor(arguments: argparse.Namespace) -> int:
    """`lycore doctor`; exit status 1 when nothing can be loaded."""
    from . import doctor

    found = doctor.examine()
    print(json.dumps(found, indent=2) if arguments.json else doctor.text(found))
    return 0 if found["works"]["merge on the CPU"] is True else 1


def run_merge(arguments: argparse.Namespace) -> int:
    """`lycore merge`."""
    from .checkpoint import merge
    from .progress import Cancel

    cancel = Cancel()
    adapters = [split_strength(text) for text in arguments.adapters]
    with Bar(sys.stderr) as bar, cancelled_by_signals(cancel):
        report = merge(
            arguments.base,
            adapters,
            arguments.output,
            device=arguments.device,
            dtype=arguments.dtype,
            other_families=arguments.other_families,
            # Also without a terminal: signals are looked at when Python code runs.
            progress=bar.show,
            cancel=cancel,
        )
    print_report(report, arguments)
    return 0


def size_text(count: float) -> str:
    """ "1.5 GiB" """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


class Bar:
    """Share done, rate and time left, on a terminal; silent elsewhere."""

    def __init__(self, file: TextIO, unit: str = "bytes"):
        self.file = file
        self.unit = unit
        self.active = file.isatty()
        self.start = self.last = time.monotonic()
        self.width = 0

    def show(self, done: int, total: int) -> None:
        """A progress callback."""
        now = time.monotonic()
        if not self.active or (now - self.last < 0.1 and done < total):
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        left = (total - done) / rate if rate > 0 else 0.0
        share = done / total if total else 1.0
        bar = "#" * int(24 * share)
        speed = f"{size_text(rate)}/s" if self.unit == "bytes" else f"{done} of {total} {self.unit}"
        line = f"[{bar:<24}] {share:4.0%}  {speed}  {int(left) // 60}:{int(left) % 60:02d} left"
        self.file.write("\r" + line.ljust(self.width))
        self.file.flush()
        self.width = len(line)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.width:
            self.file.write("\r" + " " * self.width + "\r")
            self.file.flush()


@contextmanager
def cancelled_by_signals(cancel: Cancel) -> Iterator[None]:
    """Ctrl-C and termination stop the call at its next step, so that no partial file stays; a second Ctrl-C does not
    wait.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        cancel.request()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    from .errors import LycoreError

    try:
        arguments = parser().parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except LycoreError as problem:
        print(f"lycore: error: {problem.message}", file=sys.stderr)
        if problem.hint:
            print(f"hint: {problem.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
