"""Merging a LoRA into the attention weights of a U-Net: LyCore, torch, and the copy that bounds both; one run, medians.

GPU: SDXL, bf16, rank 32. CPU: SD1.5, fp32, rank 32. Every time stands beside its error against fp64.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2] / "plugin")]

import torch
from safetensors.torch import save_file
from shapes import attention_set

import lycore

RANK = 32
ALPHA = 16.0
SAMPLES = 6  # weights that are compared with fp64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeat", type=int, help="timed runs per row (default: 7 on a GPU, 3 on the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON line per row")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        print("skipped: no GPU")
        return 0
    bench = Bench(arguments.device, arguments.repeat or (7 if cuda else 3))
    rows = bench.run()
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
        return 0
    print(f"\n{bench.title}\n")
    print("| what | ms | x copy | error, x perfect rounding |\n|---|---|---|---|")
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.2f}"
        print(f"| {row['what']} | {row['ms']:.2f} | {row['ms'] / rows[0]['ms']:.2f} | {error} |")
    return 0


class Bench:
    def __init__(self, device: str, repeat: int):
        self.device, self.repeat = device, repeat
        self.model, self.dtype = ("sdxl", torch.bfloat16) if device == "cuda" else ("sd15", torch.float32)
        machine = (
            torch.cuda.get_device_name()
            if device == "cuda"
            else f"{platform.machine()}, {torch.get_num_threads()} threads"
        )
        generator = torch.Generator(device).manual_seed(0)

        def random(shape, scale):
            return (torch.randn(shape, device=device, generator=generator) * scale).to(self.dtype)

        self.weights = {name: random(shape, 0.02) for name, shape in attention_set(self.model)}
        count = sum(w.numel() for w in self.weights.values())
        self.title = (
            f"{self.model} attention set: {len(self.weights)} weights, {count / 1e9:.3f} G parameters, "
            f"{str(self.dtype).removeprefix('torch.')}, rank {RANK}, on {machine}, torch {torch.__version__}"
        )
        self.loras = [
            {n: (random((w.shape[0], RANK), 0.1), random((RANK, w[0].numel()), 0.1)) for n, w in self.weights.items()}
            for _ in range(5)
        ]
        self.base = {name: w.clone() for name, w in list(self.weights.items())[:: len(self.weights) // SAMPLES]}

    def run(self) -> list[dict]:
        rows = [self.row("copy of every weight (the limit)", self.copy_limit())]
        for count in (1, 5):
            rows.append(
                self.row(f"torch: addmm_ per weight, {count} LoRA", lambda count=count: self.addmm(count), count)
            )
            self.reset()
        with tempfile.TemporaryDirectory() as folder:
            paths = [self.save(i, Path(folder)) for i in range(5)]
            for count in (1, 5):
                rows += self.lycore(paths[:count])
        return rows

    def copy_limit(self):
        flat = torch.cat([w.reshape(-1) for w in self.weights.values()])
        target = torch.empty_like(flat)
        return lambda: target.copy_(flat)

    def addmm(self, count: int) -> None:
        for name, weight in self.weights.items():
            flat = weight.view(weight.shape[0], -1)
            for lora in self.loras[:count]:
                flat.addmm_(*lora[name], alpha=ALPHA / RANK)

    def lycore(self, paths: list[Path]) -> list[dict]:
        """First apply (takes the copies), a change of strength (from the copies), restore."""
        stack = lycore.Stack(self.weights)
        count, handles = len(paths), [stack.add(path, 1.0) for path in paths]

        def first():
            stack.apply()

        def change():
            for handle in handles:
                handle.strength = 1.0 if handle.strength != 1.0 else 0.5
            stack.apply()

        rows = [self.row(f"LyCore: first apply, {count} LoRA", first, count, before=stack.restore)]
        rows.append(self.row(f"LyCore: change of strength, {count} LoRA", change))

        def restore():
            stack.restore()

        rows.append(self.row(f"LyCore: restore, {count} LoRA", restore, before=stack.apply))
        same = all(torch.equal(base, self.weights[name]) for name, base in self.base.items())
        rows[-1]["error"] = 0.0 if same else float("inf")
        stack.close()
        return rows

    def save(self, index: int, folder: Path) -> Path:
        """A kohya file of LoRA `index`."""
        tensors = {}
        for name, (up, down) in self.loras[index].items():
            key, kernel = "lora_unet_" + name.replace(".", "_"), [1] * (self.weights[name].ndim - 2)
            tensors[f"{key}.lora_up.weight"] = up.reshape(*up.shape, *kernel).cpu()
            tensors[f"{key}.lora_down.weight"] = down.reshape(*down.shape, *kernel).cpu()
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        path = folder / f"lora{index}.safetensors"
        save_file(tensors, path)
        return path

    def row(self, what: str, work, merged: int | None = None, before=None) -> dict:
        """Median of the timed runs; with `merged` LoRAs at strength 1 on the base, also the error of the last one."""
        times = []
        for i in range(self.repeat + 1):
            if before:
                before()
            elif merged:
                self.reset()
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append((time.perf_counter() - start) * 1e3)
            print(f"\r{what}: {i}/{self.repeat} ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return {"what": what, "ms": statistics.median(times[1:]), "error": self.error(merged) if merged else None}

    def error(self, merged: int) -> float:
        """Norm of the distance from the fp64 formula, over that of its correct rounding: 1 is perfect."""
        got, perfect = 0.0, 0.0
        for name, base in self.base.items():
            want = base.double()
            for lora in self.loras[:merged]:
                up, down = lora[name]
                want += (ALPHA / RANK * (up.double() @ down.double())).view_as(want)
            got += (self.weights[name].double() - want).square().sum().item()
            perfect += (want.to(self.dtype).double() - want).square().sum().item()
        return (got / perfect) ** 0.5

    def reset(self) -> None:
        for name, base in self.base.items():
            self.weights[name].copy_(base)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
