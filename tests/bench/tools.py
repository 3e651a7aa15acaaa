"""Resizing and combining LoRAs of SDXL's attention weights, 511 MB each in fp16: time, memory, and the usual way.

The usual way (sd-scripts' resize_lora, svd_merge_lora) multiplies up and down and takes torch's SVD of the whole
weight. It is timed on one weight of each shape and multiplied by their number, as all of them take too long.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2] / "plugin")]

import numpy
from safetensors.numpy import save_file
from shapes import attention_set

import lycore

RANK, NEW_RANK = 96, 32


def write(path: Path, seed: int) -> None:
    """Factors whose singular values fall, as trained ones do."""
    rng = numpy.random.default_rng(seed)
    fall = (0.97 ** numpy.arange(RANK)).astype(numpy.float32)
    tensors = {}
    for name, (out, columns, *_) in attention_set("sdxl"):
        module = "lora_unet_" + name.replace(".", "_")
        up = rng.standard_normal((out, RANK), dtype=numpy.float32) * 0.02 * fall
        down = rng.standard_normal((RANK, columns), dtype=numpy.float32) * 0.02
        tensors |= {f"{module}.lora_up.weight": up.astype("f2"), f"{module}.lora_down.weight": down.astype("f2")}
        tensors[f"{module}.alpha"] = numpy.array(RANK / 2, "f2")
    save_file(tensors, path)


def job(name: str, folder: Path) -> None:
    """One tool, in this process."""
    one, two, out = folder / "one.safetensors", folder / "two.safetensors", folder / "out.safetensors"
    jobs = {
        f"resize {RANK} -> {NEW_RANK}": lambda: lycore.resize(one, out, rank=NEW_RANK),
        "resize, sv_fro 0.9": lambda: lycore.resize(one, out, rank=RANK - 1, method="sv_fro", param=0.9),
        "combine two, exact": lambda: lycore.combine([(one, 0.8), (two, -0.5)], out),
        f"combine two, svd to {NEW_RANK}": lambda: lycore.combine([one, two], out, method="svd", rank=NEW_RANK),
    }
    if name == "list":
        print(json.dumps(list(jobs)))
        return
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    jobs[name]()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": used, "bytes": 1024 * after.ru_maxrss - resident}))


def usual() -> float:
    """Seconds of torch's full SVD of up @ down over all weights."""
    import torch

    total = 0.0
    for (out, columns, *_), count in Counter(tuple(shape) for _, shape in attention_set("sdxl")).items():
        weight = torch.randn(out, RANK) @ torch.randn(RANK, columns)
        start = time.perf_counter()
        torch.linalg.svd(weight)
        total += count * (time.perf_counter() - start)
    return total


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed, name in enumerate(("one", "two")):
            write(folder / f"{name}.safetensors", seed)
        size = (folder / "one.safetensors").stat().st_size

        def run(what: str) -> object:
            command = [sys.executable, __file__, what, str(folder)]
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        print(f"\nLoRA of rank {RANK}, {size / 1e6:.0f} MB, {os.cpu_count()} cores\n")
        print("| what | s | CPU s | memory, x input |\n|---|---|---|---|", flush=True)
        for what in run("list"):
            runs = [run(what) for _ in range(3)]
            median = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            memory = median["bytes"] / size
            print(f"| LyCore: {what} | {median['seconds']:.1f} | {median['cpu']:.1f} | {memory:.2f} |", flush=True)
        print(f"| torch: full SVD of every up @ down (sampled) | {usual():.0f} | | |")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        job(sys.argv[1], Path(sys.argv[2]))
        sys.exit()
    sys.exit(main())
