"""The first merge of a process: what loading the library, the file and the first apply take. One JSON line.

Run by merge.py, as `startup.py DEVICE MODEL FILE`; torch and the weights are there before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from shapes import attention_set


def main() -> int:
    device, model, file = sys.argv[1:]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    weights = {name: torch.randn(shape, device=device).bfloat16() for name, shape in attention_set(model)}
    wait()
    times, parts = [time.perf_counter()], ("library and stack", "file", "apply")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugin"))
    import lycore

    stack = lycore.Stack(weights)
    times.append(time.perf_counter())
    stack.add(file, 1.0)
    times.append(time.perf_counter())
    stack.apply()
    wait()
    times.append(time.perf_counter())
    spans = [(b - a) * 1e3 for a, b in pairwise(times)]
    print(json.dumps({"ms": sum(spans), "parts": dict(zip(parts, spans, strict=True))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
