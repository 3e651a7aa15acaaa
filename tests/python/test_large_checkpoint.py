"""A checkpoint of SD1.5's layout and size, merged file to file: bounded memory, untouched tensors the same bytes,
touched ones the formula.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open

from conftest import PLUGIN, ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

from shapes import attention_set

LIMIT_MB = 600
"""Peak resident memory of the merging process, everything included."""

RANK, STRENGTH = 32, 0.8


def resnet(name: str, channels: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.in_layers.0.weight", (channels,)
    yield f"{name}.in_layers.2.weight", (out, channels, 3, 3)
    yield f"{name}.emb_layers.1.weight", (out, 1280)
    yield f"{name}.out_layers.0.weight", (out,)
    yield f"{name}.out_layers.3.weight", (out, out, 3, 3)
    if channels != out:
        yield f"{name}.skip_connection.weight", (out, channels, 1, 1)


def ldm(name: str) -> str:
    """`down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`"""
    kind, *rest = name.split(".")
    if kind == "mid_block":
        return ".".join(["middle_block.1", *rest[2:]])
    block, number = int(rest[0]), int(rest[2])
    at = f"input_blocks.{3 * block + number + 1}" if kind == "down_blocks" else f"output_blocks.{3 * block + number}"
    return ".".join([at, "1", *rest[3:]])


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the single-file checkpoint."""
    unet = {f"{ldm(name)}.weight": shape for name, shape in attention_set("sd15")}
    widths = [(1, 320, 320), (2, 320, 320), (4, 320, 640), (5, 640, 640), (7, 640, 1280)]
    widths += [(n, 1280, 1280) for n in (8, 10, 11)]
    for n, channels, out in widths:
        unet |= dict(resnet(f"input_blocks.{n}.0", channels, out))
    skips = [2560, 2560, 2560, 2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640]
    for n, channels in enumerate(skips):
        unet |= dict(resnet(f"output_blocks.{n}.0", channels, (1280, 1280, 640, 320)[n // 3]))
    for n in (0, 2):
        unet |= dict(resnet(f"middle_block.{n}", 1280, 1280))
    for n, width in ((3, 320), (6, 640), (9, 1280)):
        unet[f"input_blocks.{n}.0.op.weight"] = (width, width, 3, 3)
    for n, at, width in ((2, 1, 1280), (5, 2, 1280), (8, 2, 640)):
        unet[f"output_blocks.{n}.{at}.conv.weight"] = (width, width, 3, 3)
    tensors = {f"model.diffusion_model.{name}": shape for name, shape in unet.items()}
    clip = "cond_stage_model.transformer.text_model"
    tensors[f"{clip}.embeddings.token_embedding.weight"] = (49408, 768)
    tensors[f"{clip}.embeddings.position_ids"] = (1, 77)
    for i in range(12):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors[f"{clip}.encoder.layers.{i}.self_attn.{part}.weight"] = (768, 768)
        tensors[f"{clip}.encoder.layers.{i}.mlp.fc1.weight"] = (3072, 768)
        tensors[f"{clip}.encoder.layers.{i}.mlp.fc2.weight"] = (768, 3072)
    for i in range(40):
        tensors[f"first_stage_model.decoder.conv{i}.weight"] = (480, 480, 3, 3)
    return tensors


def dtype_of(name: str) -> str:
    return "I64" if name.endswith("position_ids") else "F16"


def write(path: Path, tensors: dict[str, tuple[int, ...]], noise: numpy.ndarray) -> int:
    """A safetensors file, written in a stream: every tensor is a piece of one block of noise."""
    header, at = {"__metadata__": {"made_by": "test"}}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * (8 if dtype_of(name) == "I64" else 2)
        header[name] = {"dtype": dtype_of(name), "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = noise.tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            left = math.prod(shape) * (8 if dtype_of(name) == "I64" else 2)
            while left:
                left -= file.write(block[: min(left, len(block))])
    return path.stat().st_size


@pytest.fixture
def files(tmp_path):
    rng = numpy.random.default_rng(1)
    noise = (rng.standard_normal(1 << 22) * 0.02).astype(numpy.float16)
    base = tmp_path / "base.safetensors"
    size = write(base, layout(), noise)
    assert size > 2e9
    factors = {}
    for name, shape in attention_set("sd15"):
        kernel = (1,) * (len(shape) - 2)
        key = "lora_unet_" + name.replace(".", "_")
        factors[f"{key}.lora_up.weight"] = (shape[0], RANK, *kernel)
        factors[f"{key}.lora_down.weight"] = (RANK, shape[1], *kernel)
    for i in range(12):
        key = f"lora_te_text_model_encoder_layers_{i}_mlp_fc1"
        factors |= {f"{key}.lora_up.weight": (3072, RANK), f"{key}.lora_down.weight": (RANK, 768)}
    lora = tmp_path / "lora.safetensors"
    write(lora, factors, noise * 4)
    yield base, lora, tmp_path / "merged.safetensors"
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


def test_memory_bytes_and_numbers(files):
    base, lora, merged = files
    # The child reports its own peak; ru_maxrss would count this process, from which it was forked.
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['lycore', 'merge', {str(base)!r}, {f'{lora}:{STRENGTH}'!r}, '-o', {str(merged)!r}, '--json']\n"
        "try:\n    runpy.run_module('lycore', run_name='__main__')\nfinally:\n"
        "    status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "    print('peak', status['VmHWM'].split()[0], file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr
    peak = int(run.stderr.split("peak")[-1]) / 1024
    print(f"peak {peak:.0f} MB for {base.stat().st_size / 1e9:.2f} GB")
    assert peak < LIMIT_MB
    report = json.loads(run.stdout)
    assert report["tensors"]["changed"] == 192 + 12
    assert report["adapters"][0]["summary"]["unmatched"] == 0

    touched = {
        f"model.diffusion_model.{ldm(name)}.weight": "lora_unet_" + name.replace(".", "_")
        for name, _ in attention_set("sd15")
    }
    for i in range(12):
        module = f"text_model_encoder_layers_{i}_mlp_fc1"
        touched[f"cond_stage_model.transformer.text_model.encoder.layers.{i}.mlp.fc1.weight"] = f"lora_te_{module}"
    different = total = 0
    with safe_open(base, "np") as before, safe_open(merged, "np") as after, safe_open(lora, "np") as factors:
        assert before.keys() == after.keys()
        assert after.metadata()["made_by"] == "test" and "lycore.merged" in after.metadata()
        for i, name in enumerate(before.keys()):
            old, new = before.get_tensor(name), after.get_tensor(name)
            if name not in touched:
                assert old.tobytes() == new.tobytes(), name
            elif i % 8 == 0:
                up = factors.get_tensor(f"{touched[name]}.lora_up.weight").astype(numpy.float64)
                down = factors.get_tensor(f"{touched[name]}.lora_down.weight").astype(numpy.float64)
                # No alpha in the file: the scale is 1.
                delta = STRENGTH * (up.reshape(-1, RANK) @ down.reshape(RANK, -1)).reshape(old.shape)
                want = (old.astype(numpy.float64) + delta).astype(numpy.float16)
                steps = numpy.abs(ordered(want) - ordered(new))
                different, total = different + int((steps > 0).sum()), total + steps.size
                # One step at the larger of base and result; below that, cancellation leaves fp32 sums no bits.
                scale = numpy.maximum(numpy.abs(old), numpy.abs(want))
                assert (
                    numpy.abs(want.astype(numpy.float64) - new) <= numpy.spacing(scale).astype(numpy.float64)
                ).all(), name
    assert total > 1e7 and different <= total * 1e-3, (
        f"{different} of {total} elements are not the correctly rounded result"
    )


def ordered(values: numpy.ndarray) -> numpy.ndarray:
    """fp16 as integers whose distance counts representable values."""
    bits = values.view(numpy.int16).astype(numpy.int32)
    return numpy.where(bits < 0, -32768 - bits, bits)
