"""What else merges LoRAs: torch's own addmm, LyCORIS' fused kernels, ComfyUI. All on the weights of the table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import torch
from files import File
from measure import Row, Table, Weights
from safetensors.torch import load_file

Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""By weight: up, down, scale."""


def addmm(table: Table, weights: Weights, files: Sequence[File]) -> None:
    """In place, so that the weight is rounded after every LoRA and cannot be restored."""
    names = [f"torch: addmm_ per weight, {count} LoRA{'s' * (count > 1)}" for count in (1, len(files))]
    graph_name = "torch: addmm_ per weight in a CUDA graph, 1 LoRA"
    if not table.wants(*names, graph_name):
        return
    loras = [_factors(file, weights) for file in files]

    def merge(count: int) -> None:
        for name, weight in weights.live.items():
            flat = weight.view(len(weight), -1)
            for lora in loras[:count]:
                up, down, scale = lora[name]
                flat.addmm_(up, down, alpha=scale)

    for name, count in zip(names, (1, len(files)), strict=True):
        if table.wants(name):
            ms = table.wall(lambda count=count: merge(count), weights.reset)
            error = weights.error([(1.0, file.changes) for file in files[:count]])
            table.add(Row(name, ms, table.on_gpu(lambda count=count: merge(count), ms), error=error))
    if table.cuda and table.wants(graph_name):
        graph = _graph(lambda: merge(1))
        ms = table.wall(graph.replay, weights.reset)
        error = weights.error([(1.0, files[0].changes)])
        table.add(Row(graph_name, ms, table.on_gpu(graph.replay, ms), error=error))
    weights.reset()


def _graph(work) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def lycoris(table: Table, weights: Weights, files: Sequence[File]) -> None:
    """What `merge_to` does: a new weight by the fused kernel, copied into the old one."""
    names = [f"LyCORIS: fused merge and copy, {count} LoRA{'s' * (count > 1)}" for count in (1, len(files))]
    if not table.wants("LyCORIS", *names):
        return
    try:
        from lycoris.kernels.autograd.locon import locon_diff_weight
    except ImportError as problem:
        return table.skip("LyCORIS", f"not installed ({problem})")
    if not table.cuda:
        return table.skip("LyCORIS", "its fused kernels are for GPUs")
    loras = [_factors(file, weights) for file in files]

    def merge(count: int) -> None:
        for name, weight in weights.live.items():
            flat = weight.view(len(weight), -1)
            for lora in loras[:count]:
                up, down, scale = lora[name]
                flat.copy_(locon_diff_weight(down, up, None, scale, "triton", base=flat))

    for name, count in zip(names, (1, len(files)), strict=True):
        try:
            with torch.no_grad():
                ms = table.wall(lambda count=count: merge(count), weights.reset)
        except Exception as problem:
            table.skip(name, repr(problem)[:300])
            continue
        table.add(Row(name, ms, error=weights.error([(1.0, file.changes) for file in files[:count]])))
    weights.reset()


def comfyui(table: Table, weights: Weights, files: Sequence[File]) -> None:
    """ModelPatcher, with the backup on the weights' device and in host memory, where it puts it by default."""
    if not table.wants("ComfyUI: patch", "ComfyUI: unpatch"):
        return
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        return table.skip("ComfyUI", "COMFYUI_DIR names no tree of it")
    arguments, sys.argv = sys.argv, sys.argv[:1]
    sys.path.insert(0, folder)
    try:
        import comfy.options  # isort: skip - before the others, which read the command line
        import comfy.model_patcher
        import comfy.weight_adapter
    except Exception as problem:
        return table.skip("ComfyUI", f"not importable: {problem!r}"[:300])
    finally:
        sys.argv = arguments
    device = next(iter(weights.live.values())).device
    loras = [_factors(file, weights) for file in files]

    class Layer(torch.nn.Module):
        def __init__(self, weight: torch.Tensor):
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def once(count: int, backup: str) -> tuple[float, float, float]:
        model = torch.nn.Module()
        model.device = device
        layers = {name: Layer(weight) for name, weight in weights.live.items()}
        for i, layer in enumerate(layers.values()):
            setattr(model, f"m{i}", layer)
        patcher = comfy.model_patcher.ModelPatcher(model, device, torch.device(backup))
        for lora in loras[:count]:
            patches = {}
            for i, name in enumerate(layers):
                up, down, scale = lora[name]
                values = (up, down, scale * len(down), None, None, None)
                patches[f"m{i}.weight"] = comfy.weight_adapter.LoRAAdapter(set(), values)
            patcher.add_patches(patches, 1.0)
        table.wait()
        times = [time.perf_counter()]
        for key in list(patcher.patches):
            patcher.patch_weight_to_device(key, device)
        table.wait()
        times.append(time.perf_counter())
        merged = {name: layers[name].weight for name in weights.samples}
        error = weights.error([(1.0, file.changes) for file in files[:count]], merged)
        start = time.perf_counter()
        patcher.unpatch_model(device)
        table.wait()
        return (times[1] - times[0]) * 1e3, (time.perf_counter() - start) * 1e3, error

    on_device = "cuda" if table.cuda else "cpu"
    for count, backup in dict.fromkeys([(1, on_device), (len(files), on_device), (1, "cpu")]):
        what = f"{count} LoRA{'s' * (count > 1)}, backup {'on the device' if backup == 'cuda' else 'in host memory'}"
        try:
            # Three times: up to some seconds each.
            runs = sorted(once(count, backup) for _ in range(3))
        except Exception as problem:
            table.skip(f"ComfyUI: {what}", repr(problem)[:300])
            continue
        table.add(Row(f"ComfyUI: patch, {what}", runs[1][0], error=runs[1][2]))
        table.add(Row(f"ComfyUI: unpatch, {what}", sorted(run[1] for run in runs)[1]))
    weights.reset()


def _factors(file: File, weights: Weights) -> Factors:
    """On the weights' device."""
    tensors, found = load_file(file.path), {}
    for name, weight in weights.live.items():
        key = "lora_unet_" + name.replace(".", "_")
        up, down = (tensors[f"{key}.lora_{side}.weight"].flatten(1).to(weight) for side in ("up", "down"))
        found[name] = (up, down, float(tensors[f"{key}.alpha"]) / len(down))
    return found
