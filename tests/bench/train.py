"""Training steps on U-Nets of diffusers with random weights: LyCore, peft, sd-scripts and torch alone, in one run.

GPU: SDXL at 1024 px and SD1.5 at 512 px, in bf16. CPU: a tiny model in fp32, to see that the program runs. Every row
has a process of its own, so that neither memory nor a fault of one reaches the next.

sd-scripts' row needs a checkout (SD_SCRIPTS) and a program that times its steps (--sd-scripts-bench, with the options
--arch --batch --rank --ckpt --steps --phases --profile and one line of JSON as its result).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugin"))
# What is imported here is shared by the rows' processes, as long as nothing asks CUDA itself whether it is there.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch
import trainers
from trainers import Setting, Step, Trainer

RANKS = (1, 4, 7, 8, 12, 16, 32, 64)
WARM_UP = 3
SECONDS = 300
"""That a row may take."""
PEFT, SD_SCRIPTS, EAGER, GRAPH = "diffusers + peft, autocast", "sd-scripts", "LyCore", "LyCore in a CUDA graph"
IN_TITLE = {"sdxl": "SDXL, 1024 px", "sd15": "SD1.5, 512 px", "tiny": "tiny"}


@dataclass
class Row:
    table: str
    what: str
    ms: float
    least_ms: float
    gpu_ms: float | None = None
    """All kernels and copies of a step, without the gaps between them."""
    kernels: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    """Milliseconds of forward, backward and update, each waited for: their sum is a little more than `ms`."""
    peak: float | None = None
    """GiB of torch's allocator."""
    parameters: int = 0

    HEADS = ("step ms", "least", "forward / backward / update", "GPU ms", "kernels", "peak GiB", "parameters, M")

    def cells(self) -> list[str]:
        parts = " / ".join(f"{ms:.1f}" for ms in self.parts.values())
        numbers = [_digits(self.ms), _digits(self.least_ms), parts, _digits(self.gpu_ms), str(self.kernels or "")]
        return [self.what, *numbers, _digits(self.peak), _digits(self.parameters / 1e6)]


@dataclass
class Goal:
    what: str
    value: float
    at_most: float

    @property
    def missed(self) -> bool:
        return self.value > self.at_most


class Missing(Exception):
    """What is not there to be measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(trainers.MODELS), help="instead of all of the device's")
    parser.add_argument("--only", action="append", metavar="WORD", help="rows whose name or table has it; repeatable")
    parser.add_argument("--steps", type=int, help="timed steps per row (default: 15 on a GPU, 2 on the CPU)")
    parser.add_argument("--sd-scripts-bench", default=os.environ.get("SD_SCRIPTS_BENCH"), metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON line per row")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not apart(torch.cuda.is_available):
        print("skipped: no GPU")
        return 0
    bench = Bench(arguments.steps or (15 if cuda else 2), arguments.only or [""], arguments.sd_scripts_bench)
    models = [arguments.model] if arguments.model else ["sdxl", "sd15"] if cuda else ["tiny"]
    try:
        for model in models:
            bench.model(Setting(model, arguments.device))
    finally:
        print(bench.json() if arguments.json else f"\n{title(cuda)}\n{bench}")
    return 0


def title(cuda: bool) -> str:
    # Only now that no process will be forked: CUDA must not be in use before that.
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"LoRA training steps, {'bf16' if cuda else 'fp32'}, on {machine}, torch {torch.__version__}"


def apart(work: Callable[[], Any]) -> Any:
    """The result of `work` in a process of its own, which has all that was imported here; Missing is what failed."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def child() -> None:
        try:
            sending.send((True, work()))
        except Exception as problem:
            kind = "" if isinstance(problem, Missing) else f"{type(problem).__name__}: "
            sending.send((False, kind + " ".join(str(problem).split())[:300]))

    process = context.Process(target=child, daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(SECONDS):
            raise Missing(f"took more than {SECONDS} s")
        fine, result = receiving.recv()
    except EOFError:
        process.join()
        raise Missing(f"its process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if not fine:
        raise Missing(result)
    return result


class Bench:
    """The rows so far, the goals that they meet or miss, and what could not be measured."""

    def __init__(self, steps: int, only: list[str], sd_scripts_bench: str | None):
        self.steps, self.only, self.sd_scripts_bench = steps, only, sd_scripts_bench
        self.rows: list[Row] = []
        self.goals: list[Goal] = []
        self.absent: list[str] = []

    def model(self, setting: Setting) -> None:
        name = IN_TITLE[setting.model]
        table = f"{name}, batch 1, rank {setting.rank}"
        self.row(table, "without any LoRA", trainers.without_lora, setting)
        self.row(table, "without any LoRA in a CUDA graph", trainers.without_lora, setting, captured=True)
        self.row(table, "torch alone, no autocast", trainers.with_plain, setting)
        self.row(table, "torch alone, no autocast in a CUDA graph", trainers.with_plain, setting, captured=True)
        self.row(table, PEFT, trainers.with_peft, setting)
        self.sd_scripts(table, setting)
        self.row(table, EAGER, trainers.with_lycore, setting)
        self.row(table, GRAPH, trainers.with_lycore, setting, captured=True)
        for algorithm, title in (("loha", "LoHa"), ("lokr", "LoKr"), ("dora", "DoRA")):
            self.compared(f"{name}, batch 1, {title}, rank {setting.rank}", replace(setting, algorithm=algorithm))
        many = replace(setting, batch=4, checkpointing=True)
        table = f"{name}, batch 4 with checkpointing, rank {setting.rank}"
        self.compared(table, many)
        self.sd_scripts(table, many)
        if setting.model == "sd15":
            return
        for rank in RANKS:
            self.compared(f"{name}, batch 1, ranks", replace(setting, rank=rank), f", rank {rank}")
        if setting.model == "sdxl":
            self.judge(name, setting)

    def compared(self, table: str, setting: Setting, suffix: str = "") -> None:
        self.row(table, PEFT + suffix, trainers.with_peft, setting)
        self.row(table, EAGER + suffix, trainers.with_lycore, setting)
        self.row(table, GRAPH + suffix, trainers.with_lycore, setting, captured=True)

    def row(self, table: str, what: str, trainer: Trainer, setting: Setting, captured: bool = False) -> None:
        asked = any(word.lower() in f"{table}: {what}".lower() for word in self.only)
        if not asked or (captured and setting.device != "cuda"):
            return
        try:
            self.add(Row(table, what, **apart(lambda: training(trainer, setting, captured, self.steps))))
        except Missing as problem:
            self.skip(table, what, problem)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.table}: {' | '.join(row.cells())}", file=sys.stderr, flush=True)

    def skip(self, table: str, what: str, reason: object) -> None:
        self.absent.append(f"{table}: {what}: {reason}")
        print(self.absent[-1], file=sys.stderr, flush=True)

    def sd_scripts(self, table: str, setting: Setting) -> None:
        """Its own loop in its own process."""
        if setting.model == "tiny" or not any(word.lower() in f"{table}: {SD_SCRIPTS}".lower() for word in self.only):
            return
        if not (self.sd_scripts_bench and os.environ.get("SD_SCRIPTS")):
            return self.skip(table, SD_SCRIPTS, "not given")
        command = [sys.executable, self.sd_scripts_bench, "--arch", setting.model, "--batch", setting.batch]
        command += ["--rank", setting.rank, "--ckpt", "on" if setting.checkpointing else "off", "--steps", self.steps]
        command += ["--device", setting.device, "--phases", "--profile"]
        command = [str(word) for word in command]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as problem:
            return self.skip(table, SD_SCRIPTS, f"{problem} {getattr(problem, 'stderr', '') or ''}"[-500:])
        profile = found["profile"] or {}
        self.add(
            Row(
                table,
                SD_SCRIPTS,
                ms=found["sec_per_step_median"] * 1e3,
                least_ms=found["sec_per_step_min"] * 1e3,
                gpu_ms=profile.get("gpu_busy_ms"),
                kernels=profile.get("gpu_events"),
                parts={part: seconds * 1e3 for part, seconds in found["phases"].items()},
                peak=found["peak_alloc_MiB"] / 1024,
                parameters=found["trainable_params"],
            )
        )

    def judge(self, name: str, setting: Setting) -> None:
        """What the rows shall be, on an H100."""
        rows = {(row.table, row.what): row for row in self.rows}
        table = f"{name}, batch 1, rank {setting.rank}"
        eager, graph, peft = (rows.get((table, what)) for what in (EAGER, GRAPH, PEFT))
        if eager and peft:
            self.goals.append(Goal(f"{EAGER} / {PEFT}, step", eager.ms / peft.ms, 0.6))
        if graph:
            self.goals.append(Goal(f"{GRAPH}, ms", graph.ms, 95))
        self.goals += [Goal(f"{row.what}, peak GiB", row.peak, 12) for row in (eager, graph) if row and row.peak]
        for what in (EAGER, GRAPH):
            seven, eight = (rows.get((f"{name}, batch 1, ranks", f"{what}, rank {rank}")) for rank in (7, 8))
            if seven and eight:
                self.goals.append(Goal(f"{what}, rank 7 / rank 8", seven.ms / eight.ms, 1.03))

    def lines(self) -> Iterator[str]:
        """In the form of Markdown."""
        for table in dict.fromkeys(row.table for row in self.rows):
            yield f"\n| {' | '.join([table, *Row.HEADS])} |\n{'|---' * (1 + len(Row.HEADS))}|"
            yield from (f"| {' | '.join(row.cells())} |" for row in self.rows if row.table == table)
        if self.goals:
            yield "\n| goal | | at most |\n|---|---|---|"
        yield from (f"| {g.what} | {g.value:.3f} | {g.at_most:g}{' **missed**' * g.missed} |" for g in self.goals)
        yield from ("", *(f"not measured: {line}" for line in self.absent))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def json(self) -> str:
        """One line per row."""
        goals = [asdict(goal) | {"missed": goal.missed} for goal in self.goals]
        absent = [{"not measured": line} for line in self.absent]
        return "\n".join(json.dumps(line) for line in [*map(asdict, self.rows), *goals, *absent])


def training(trainer: Trainer, setting: Setting, captured: bool, steps: int) -> dict[str, Any]:
    """Runs in the row's own process."""
    step = trainer(trainers.Host(setting), setting)
    if captured and step.captured is None:
        raise Missing("the library has no Network.capture")
    for _ in range(WARM_UP):
        step()
    cuda = setting.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    work = step.captured(step) if captured else step
    found = times(work, steps, cuda)
    found["peak"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    found["parameters"] = step.parameters
    if not captured:
        found["parts"] = parts(step, max(2, steps // 3), cuda)
    if cuda:
        found |= on_gpu(work)
    return found


def times(work: Callable[[], object], steps: int, cuda: bool) -> dict[str, Any]:
    """Of the host, from the call until the device is done. The first does not count."""
    ms = []
    for _ in range(steps + 1):
        wait(cuda)
        start = time.perf_counter()
        work()
        wait(cuda)
        ms.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(ms[1:]), "least_ms": min(ms[1:])}


def parts(step: Step, steps: int, cuda: bool) -> dict[str, float]:
    found: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    for _ in range(steps):
        marks = [time.perf_counter()]

        def mark(marks: list[float] = marks) -> None:
            wait(cuda)
            marks.append(time.perf_counter())

        loss = step.forward()
        mark()
        loss.backward()
        mark()
        step.update()
        mark()
        for part, start, end in zip(found.values(), marks, marks[1:], strict=False):
            part.append((end - start) * 1e3)
    return {name: statistics.median(part) for name, part in found.items()}


def on_gpu(work: Callable[[], object]) -> dict[str, Any]:
    """Time of all kernels and copies, and their number. The first profile pays for the profiler's start."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        wait(True)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            work()
            wait(True)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    # The span of an optimizer's step is an event of the device too.
    spans = [event.time_range.elapsed_us() for event in events if not event.is_user_annotation]
    return {"gpu_ms": sum(spans) / 1e3, "kernels": len(spans)}


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
