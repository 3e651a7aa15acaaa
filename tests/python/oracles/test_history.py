"""A thousand random steps with three producers' adapters: only the strengths count, and the base comes back to the bit.

The U-Net's weights lie in memory as hosts have them: row-major, channels_last, transposed, and as pieces of larger
tensors, whose other elements must stay as they are.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import producers
import pytest
import torch
from peft import LoraConfig
from threads import one_thread as one_thread
from torch import nn

import lycore

pytestmark = pytest.mark.usefixtures("library")

STEPS, COMPARED = 1000, 25


class Part(nn.Module):
    """Some of the U-Net's layers under their own names: enough of every kind, small enough for a thousand merges."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([unet.down_blocks[0]])
        self.mid_block = unet.mid_block.resnets[0].conv1
        self.conv_in = unet.conv_in


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """lycoris-lora with Tucker cores in bf16, PEFT in fp32, diffusers in fp16; all on overlapping layers."""
    folder = tmp_path_factory.mktemp("history")
    unet = producers.tiny_unet(False)
    host = Part(unet)
    ranks = {"rank": 4, "alpha": 3, "conv_rank": 5, "conv_alpha": 2}
    lycoris = producers.lycoris_file(folder / "a.safetensors", host, tucker=True, dtype=torch.bfloat16, **ranks)
    config = LoraConfig(r=7, lora_alpha=3, target_modules=["to_q", "to_k", "conv1", "conv_in", "0.proj", "mid_block"])
    peft = producers.peft_folder(folder / "b", producers.peft_model(host, config))
    tuned = LoraConfig(r=3, lora_alpha=9, target_modules=["to_q", "to_out.0", "conv1", "conv2", "conv_in", "proj_in"])
    models = {"unet": (copy.deepcopy(unet), tuned)}
    diffusers = producers.diffusers_folder(folder / "c", models, metadata=True, dtype=torch.float16)
    return [lycoris, peft, diffusers]


def laid_out(dtype: torch.dtype) -> tuple[nn.Module, list[torch.Tensor]]:
    """The host in unusual memory, and the larger tensors that some of its weights are pieces of."""
    host = Part(producers.tiny_unet(False)).to(dtype)
    host.down_blocks[0].resnets.to(memory_format=torch.channels_last)
    attention = host.down_blocks[0].attentions[0].transformer_blocks[0].attn1

    def put(layer: nn.Module, place: torch.Tensor) -> None:
        place.copy_(layer.weight)
        layer.weight = nn.Parameter(place, requires_grad=False)

    larger = []

    def piece(*size: int) -> torch.Tensor:
        larger.append(torch.randn(size, generator=torch.Generator().manual_seed(len(larger))).to(dtype))
        return larger[-1]

    put(attention.to_q, torch.empty(32, 32, dtype=dtype).t())
    put(attention.to_k, piece(32, 64)[:, ::2])
    put(attention.to_out[0], piece(96, 40)[32:64, 4:36])
    put(host.conv_in, piece(32, 6, 3, 4)[:, 1:5, :, 1:])
    put(host.mid_block, piece(3, 3, 64, 64).permute(3, 2, 0, 1))
    return host, larger


def weights_of(host: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in host.named_parameters() if p.ndim > 1}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """-0 and 0 differ here."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backup", ["device", "host"])
def test_a_thousand_random_steps(files, dtype, backup):
    rng = random.Random(f"{dtype} {backup}")
    host, larger = laid_out(dtype)
    live = weights_of(host)
    layouts = {tuple(w.stride()) == tuple(torch.empty(w.shape).stride()) for w in live.values()}
    assert layouts == {True, False}
    base = {name: weight.clone() for name, weight in live.items()}
    around = [tensor.clone() for tensor in larger]

    def is_base() -> bool:
        return all(same_bits(live[n], base[n]) for n in live) and all(map(same_bits, larger, around))

    compared = touched = 0
    with lycore.Stack(host, backup=backup) as stack:
        handles = [(path, stack.add(path, 0.0)) for path in files]
        for step in range(1, STEPS + 1):
            action, which = rng.random(), rng.randrange(3)
            path, handle = handles[which]
            if action < 0.45:
                handle.strength = rng.choice([0.0, 1.0, 0.7, -0.3, rng.uniform(-2, 2)])
            elif action < 0.55:
                handle.remove()
                handles.append((path, stack.add(path, handles.pop(which)[1].strength)))
            elif action < 0.95:
                touched += stack.apply().changed
            else:
                stack.restore()
                assert is_base(), step
            if step % COMPARED == 0:
                stack.apply()
                fresh = {name: weight.clone() for name, weight in base.items()}
                again = lycore.Stack(fresh)
                for path, handle in handles:
                    again.add(path, handle.strength)
                again.apply()
                assert all(same_bits(live[name], fresh[name]) for name in live), step
                compared += not is_base()
    assert is_base()
    # The steps did something: weights written often, and almost never back at the base when compared.
    assert touched > 2000 and compared >= 30
