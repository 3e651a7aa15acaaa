"""One training step of a LoRA on a U-Net of diffusers with random weights, as LyCore does it and as others do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
# SD1.5's shape is the default of diffusers, but for the text encoder's width.
SD15 = {"cross_attention_dim": 768}
TINY = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {"sdxl": (1024, SDXL), "sd15": (512, SD15), "tiny": (64, TINY)}
"""By name: pixels of a side, and the U-Net's configuration."""
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    model: str
    device: str
    rank: int = 32
    algorithm: str = "lora"
    batch: int = 1
    checkpointing: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Host:
    """The frozen U-Net, one batch, and the loss of it; for all trainers the same."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        pixels, config = MODELS[setting.model]
        self.device, self.dtype = setting.device, setting.dtype
        torch.set_default_dtype(self.dtype)
        with torch.device(self.device):
            self.unet = UNet2DConditionModel(**config).requires_grad_(False)
            self.latents = torch.randn(setting.batch, 4, pixels // 8, pixels // 8)
            self.text = torch.randn(setting.batch, 77, config["cross_attention_dim"])
            self.added = {}
            if "addition_embed_type" in config:
                sizes = {"text_embeds": 1280, "time_ids": 6}
                self.added = {name: torch.randn(setting.batch, size) for name, size in sizes.items()}
        torch.set_default_dtype(torch.float32)
        # Checkpointing is for a model in training; there is no dropout that it would turn on.
        self.unet.train()
        if setting.checkpointing:
            self.unet.enable_gradient_checkpointing()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=self.device).square()
        self.kept = (1 - betas).cumprod(0)

    def layers(self) -> dict[str, nn.Module]:
        """Those that get an adapter."""
        return {name: layer for name, layer in self.unet.named_modules() if adapted(name, layer)}

    def loss(self, autocast: bool = False) -> torch.Tensor:
        noise = torch.randn_like(self.latents)
        times = torch.randint(0, 1000, (len(noise),), device=self.device)
        kept = self.kept[times].view(-1, 1, 1, 1)
        noisy = (kept.sqrt() * self.latents + (1 - kept).sqrt() * noise).to(self.dtype)
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast and self.device == "cuda"):
            guess = self.unet(noisy, times, self.text, added_cond_kwargs=self.added, return_dict=False)[0]
        return functional.mse_loss(guess.float(), noise.float())


def adapted(name: str, layer: nn.Module) -> bool:
    return "attentions" in name and isinstance(layer, (nn.Linear, nn.Conv2d))


@dataclass
class Step:
    """A training step in the parts in which it can be timed."""

    forward: Callable[[], torch.Tensor]
    update: Callable[[], object]
    parameters: int
    captured: Callable[[Callable[[], object]], Callable[[], object]] | None = None
    """Makes a callable that replays the step it is given as a CUDA graph; None where nobody has made that possible."""

    def __call__(self) -> torch.Tensor:
        loss = self.forward()
        loss.backward()
        self.update()
        return loss


Trainer = Callable[[Host, Setting], Step]


def with_lycore(host: Host, setting: Setting) -> Step:
    """No autocast: what the modules compute in is the model's own dtype."""
    import lycore

    algorithms = {"lora": {}, "dora": {"dora_wd": True}, "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"}}
    config = {
        "network_dim": setting.rank,
        "learning_rate": LEARNING_RATE,
        "mixed_precision": "bf16" if setting.device == "cuda" else "no",
    }
    network = lycore.Network(config | algorithms[setting.algorithm])
    network.attach(host.unet, adapted)
    network.build()

    def update() -> object:
        # What a step did is told by waiting for it, which a graph cannot.
        return network.step(wait=not (host.device == "cuda" and torch.cuda.is_current_stream_capturing()))

    return Step(host.loss, update, network.parameter_count, network.capture)


def with_peft(host: Host, setting: Setting) -> Step:
    """As diffusers' scripts train: adapters in fp32, autocast."""
    targets, rank = list(host.layers()), setting.rank
    config = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=True),
        "loha": lambda: peft.LoHaConfig(r=rank, alpha=rank, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=rank, alpha=rank, target_modules=targets),
    }
    peft.inject_adapter_in_model(config[setting.algorithm](), host.unet)
    host.unet.to(host.device)
    trained = [parameter for parameter in host.unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=host.device == "cuda")

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(lambda: host.loss(autocast=True), update, sum(p.numel() for p in trained))


class _Plain(nn.Module):
    """The least that a LoRA needs, in the model's own dtype."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base = base
        weight = base.weight
        self.down = nn.Parameter(weight.new_empty(rank, weight[0].numel()).normal_(0, 0.01))
        self.up = nn.Parameter(weight.new_empty(len(weight), rank).normal_(0, 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base, nn.Conv2d):
            inner = functional.conv2d(x, self.down[:, :, None, None])
            return self.base(x) + functional.conv2d(inner, self.up[:, :, None, None])
        inner, base = functional.linear(x.flatten(0, -2), self.down), self.base(x)
        return torch.addmm(base.flatten(0, -2), inner, self.up.t()).view_as(base)


def with_plain(host: Host, setting: Setting) -> Step:
    """torch alone, all in bf16: no autocast, no clipping, parameters rounded to bf16 after every step."""
    trained: list[nn.Parameter] = []
    for name, layer in host.layers().items():
        module = _Plain(layer, setting.rank)
        host.unet.set_submodule(name, module)
        trained += [module.down, module.up]
    return _with_adamw(host, trained)


def without_lora(host: Host, _: Setting) -> Step:
    """Without any adapter, and yet backward through all of it: the input is what is trained."""
    shift = nn.Parameter(host.latents.new_zeros(1))
    host.unet.register_forward_pre_hook(lambda _, inputs: (inputs[0] + shift, *inputs[1:]))
    return _with_adamw(host, [shift])


def _with_adamw(host: Host, trained: list[nn.Parameter]) -> Step:
    cuda = host.device == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=cuda, capturable=cuda)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(host.loss, update, sum(p.numel() for p in trained), _graph)


def _graph(step: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
