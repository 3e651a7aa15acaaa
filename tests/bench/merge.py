"""Merging adapters into the attention weights of a U-Net: LyCore, its peers, and the copy that bounds all; one run.

GPU: SDXL, bf16, every algorithm. CPU: SD1.5, fp32, LoRA. Medians; every time stands beside its error against fp64, and
beside what it may be at most where that is fixed. `--tiny` runs the GPU's rows on small weights, on any device.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "python"
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "plugin"), str(TESTS), str(TESTS / "oracles")]

import files
import handmade
import peers
import torch
from measure import Ratio, Row, Table, Weights
from shapes import attention_set

import lycore
from lycore.stack import library_for

RANK = 32
RANKS = (1, 4, 7, 8, 12, 16, 24, 32, 64, 128, 256)
# By algorithm: its module, and what a change of strength may take, in copies.
ALGORITHMS: dict[str, tuple[handmade.Make, float]] = {
    "LoRA, rank 32": (handmade.lora(32), 1.25),
    "LoRA, rank 128": (handmade.lora(128), 1.6),
    "LoHa, rank 32": (handmade.loha(32), 1.5),
    "LoKr, factor 8": (handmade.lokr(8), 1.5),
    "full": (handmade.full, 1.5),
    "(IA)^3": (handmade.ia3(False), 1.5),
    "GLoRA, rank 32": (handmade.glora(32), 2.2),
    "DoRA, rank 32, per output": (handmade.dora(handmade.lora(32), True), 2.2),
    "DoRA, rank 32, per input": (handmade.dora(handmade.lora(32), False), 2.2),
    "OFT, blocks of 8": (handmade.oft(8), 3.0),
    "BOFT, 4 stages of blocks of 8": (handmade.boft(8, 4), 3.0),
}
BACKUPS = {"device": 1.6, "host": None, "compact": 1.8}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="the rows of a GPU on small weights: to see that all runs")
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has it, in any case")
    parser.add_argument("--repeat", type=int, help="timed runs per row (default: 7 on a GPU, 3 on the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON line per row")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("skipped: no GPU")
        return 0
    table = Table(cuda, arguments.repeat or (7 if cuda else 3), arguments.only)
    sdxl = cuda or arguments.tiny
    model = "tiny" if arguments.tiny else "sdxl" if cuda else "sd15"
    weights = made(model, arguments.device, torch.bfloat16 if sdxl else torch.float32)
    with tempfile.TemporaryDirectory(dir=folder_in_memory()) as temporary:
        bench = Bench(table, weights, model, arguments.device, Path(temporary))
        try:
            (bench.all_algorithms if sdxl else bench.lora_alone)()
        finally:
            print(table.json() if arguments.json else f"\n{title(model, weights)}\n{table}")
    return 0


def made(model: str, device: str, dtype: torch.dtype) -> Weights:
    generator = torch.Generator(device).manual_seed(0)
    live = {}
    for name, shape in attention_set(model):
        live[name] = (torch.randn(shape, device=device, generator=generator) * handmade.BASE_STD).to(dtype)
    return Weights(live)


def folder_in_memory() -> str | None:
    """Where 8 GB of files are at home in memory; None for the usual place."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 12e9 else None


def title(model: str, weights: Weights) -> str:
    first = next(iter(weights.live.values()))
    count = sum(w.numel() for w in weights.live.values())
    gpu = first.device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return (
        f"{model} attention set: {len(weights.live)} weights, {count / 1e9:.3f} G parameters, "
        f"{str(first.dtype).removeprefix('torch.')}, on {machine}, torch {torch.__version__}, "
        f"LyCore {stack_build(first)}"
    )


def stack_build(weight: torch.Tensor) -> str:
    """Which of the builds merges."""
    return library_for(weight.device.index if weight.is_cuda else None).build.describe()


class Bench:
    """The rows, on the weights of one model."""

    def __init__(self, table: Table, weights: Weights, model: str, device: str, folder: Path):
        self.table, self.weights, self.model, self.device, self.folder = table, weights, model, device, folder
        self.written = 0
        self.loras: list[files.File] = []

    def all_algorithms(self) -> None:
        self.table.add_copy("copy", "copy of every weight (the limit)", self.weights.copying())
        self.loras = [self.file(handmade.lora(RANK)) for _ in range(5)]
        peers.addmm(self.table, self.weights, self.loras)
        for name, (make, limit) in ALGORITHMS.items():
            self.algorithm(name, make, limit)
        self.stack("5 LoRAs, rank 32", self.loras, 1.5)
        for backup, limit in BACKUPS.items():
            self.stack(f"LoRA, rank 32, backup in mode {backup}", self.loras[:1], limit, backup=backup)
        self.fp8()
        self.from_disk()
        self.ranks()
        peers.lycoris(self.table, self.weights, self.loras)
        peers.comfyui(self.table, self.weights, self.loras)

    def lora_alone(self) -> None:
        self.table.add_copy("copy", "copy of every weight (the limit)", self.weights.copying())
        self.loras = [self.file(handmade.lora(RANK)) for _ in range(5)]
        peers.addmm(self.table, self.weights, self.loras)
        for count in (1, 5):
            self.stack(f"{count} LoRA{'s' * (count > 1)}", self.loras[:count])
        self.ratios()

    def file(self, make: handmade.Make, weights: Weights | None = None) -> files.File:
        """A new file, with the numbers of its own seed."""
        self.written += 1
        host, path = weights or self.weights, self.folder / f"{self.written}.safetensors"
        dtype = next(iter(self.weights.live.values())).dtype
        return files.write(path, make, host.live, host.samples, dtype, self.written)

    def algorithm(self, name: str, make: handmade.Make, limit: float) -> None:
        if self.table.wants(*(f"LyCore: {row}, {name}" for row in Steps.ROWS)):
            file = self.file(make)
            self.stack(name, [file], limit)
            file.path.unlink()

    def stack(
        self, name: str, adapters: Sequence[files.File], limit: float | None = None, backup: str = "device"
    ) -> None:
        Steps(self.table, self.weights, adapters, {"backup": backup}).rows(name, limit)

    def fp8(self) -> None:
        """8-bit weights as checkpoints have them that were cast without a scale."""
        name = "fp8 weights, stochastic rounding, LoRA, rank 32"
        if not self.table.wants("fp8 copy", *(f"LyCore: {row}, {name}" for row in Steps.ROWS)):
            return
        weights = Weights({n: w.to(torch.float8_e4m3fn) for n, w in self.weights.live.items()})
        self.table.add_copy("fp8 copy", "fp8 copy of every weight (the limit of fp8 rows)", weights.copying())
        options = {"rounding": "stochastic", "seed": 1}
        Steps(self.table, weights, self.loras[:1], options).rows(name, 2.0, copy="fp8 copy")

    def from_disk(self) -> None:
        """Loading, of the library and of files."""
        file = self.loras[0]
        what = f"LyCore: first merge after loading the library, {file.megabytes:.0f} MB"
        if self.table.wants(what):
            runs = []
            for _ in range(3):
                command = [sys.executable, HERE / "startup.py", self.device, self.model, file.path]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    self.table.skip(what, done.stderr[-300:])
                    break
                runs.append(json.loads(done.stdout))
            else:
                run = sorted(runs, key=lambda run: run["ms"])[1]
                parts = ", ".join(f"{part} {ms:.1f}" for part, ms in run["parts"].items())
                self.table.add(Row(f"{what} ({parts})", run["ms"], at_most=300, limited="ms"), copy=None)
        what = f"LyCore: file to merged weights, {file.megabytes:.0f} MB"
        if not self.table.wants(what):
            return
        stacks, copies = [], []

        def fresh() -> None:
            # A file that the library has never seen, just written and so in memory; and a stack without copies.
            while stacks:
                stacks.pop().close()
            copies.append(shutil.copy(file.path, self.folder / f"copy{len(copies)}.safetensors"))
            stacks.append(lycore.Stack(self.weights.live))

        def merge() -> None:
            stacks[0].add(copies[-1], 1.0)
            stacks[0].apply()

        try:
            ms = self.table.wall(merge, fresh)
            error = self.weights.error([(1.0, file.changes)])
            self.table.add(Row(what, ms, at_most=100, limited="ms", error=error), copy=None)
        except Exception as problem:
            self.table.skip(what, problem)
        for stack in stacks:
            stack.close()
        self.weights.reset()

    def ranks(self) -> None:
        """No cliff at ranks that are no multiple of 8."""
        table, times = "LyCore: change of strength of one LoRA by rank", {}
        for rank in RANKS:
            what = f"rank {rank}"
            if not self.table.wants(table, what):
                continue
            file = self.file(handmade.lora(rank))
            try:
                row = Steps(self.table, self.weights, [file], {}).change(what)
            except Exception as problem:
                self.table.skip(what, problem)
                return
            row.table, times[rank] = table, row.gpu_ms or row.ms
            file.path.unlink()
        if 7 in times and 8 in times:
            self.table.ratios.append(Ratio("rank 7 / rank 8", times[7] / times[8], 1.05))

    def ratios(self) -> None:
        """What the CPU's rows must be to each other."""
        ms = {row.what: row.ms for row in self.table.rows}
        for step in ("first apply", "change of strength"):
            one, five = (ms.get(f"LyCore: {step}, {loras}") for loras in ("1 LoRA", "5 LoRAs"))
            addmm = ms.get("torch: addmm_ per weight, 1 LoRA")
            if one and five:
                self.table.ratios.append(Ratio(f"5 LoRAs / 1 LoRA, {step}", five / one, 1.5))
            if one and addmm:
                self.table.ratios.append(Ratio(f"LyCore / addmm_, 1 LoRA, {step}", one / addmm, 0.5))


class Steps:
    """What a host does with a stack of these adapters: applies it, moves the strengths, takes it away."""

    ROWS = ("first apply", "change of strength", "restore")

    def __init__(self, table: Table, weights: Weights, adapters: Sequence[files.File], options: Mapping[str, Any]):
        self.table, self.weights, self.adapters, self.options = table, weights, adapters, options
        self.strength = 1.0

    def rows(self, name: str, limit: float | None, copy: str = "copy") -> None:
        names = [f"LyCore: {row}, {name}" for row in self.ROWS]
        if not self.table.wants(*names):
            return
        try:
            with lycore.Stack(self.weights.live, **self.options) as stack:
                self.put_on(stack)
                first = self.table.wall(stack.apply, stack.restore)
                self.table.add(Row(names[0], first, error=self.error()), copy)
                row = self._change(stack, names[1], copy)
                row.at_most = limit
                restoring = self.table.wall(stack.restore, stack.apply)
                exact = "exact" if self.weights.restored() else "**not the base**"
                self.table.add(Row(names[2], restoring, error=exact), copy)
        except Exception as problem:
            self.table.skip(f"LyCore: {name}", problem)
        # Whatever a fault left behind, the next row starts from the base.
        self.weights.reset()

    def change(self, what: str) -> Row:
        """Only the change of strength."""
        with lycore.Stack(self.weights.live, **self.options) as stack:
            self.put_on(stack)
            stack.apply()
            return self._change(stack, what, "copy")

    def put_on(self, stack: lycore.Stack) -> None:
        self.handles = [stack.add(adapter.path, self.strength) for adapter in self.adapters]

    def _change(self, stack: lycore.Stack, what: str, copy: str) -> Row:
        def change() -> None:
            # Another strength every time, or nothing would be written.
            self.strength = 1.5 - self.strength
            for handle in self.handles:
                handle.strength = self.strength
            assert stack.apply().changed == len(self.weights.live)

        ms = self.table.wall(change)
        return self.table.add(Row(what, ms, self.table.on_gpu(change, ms), error=self.error()), copy)

    def error(self) -> float:
        return self.weights.error([(self.strength, adapter.changes) for adapter in self.adapters])


if __name__ == "__main__":
    raise SystemExit(main())
