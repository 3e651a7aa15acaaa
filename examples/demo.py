"""A picture becomes another one, by a LoRA.

The base is a small network that maps a point of the plane to a colour and has learnt to draw a photograph. LyCore
trains a LoRA on it that draws a second photograph, saves the file, opens it again, merges it at five strengths and
takes it back. CPU only, a few minutes.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

import lycore

SIZE = (96, 144)  # rows, columns
WIDTH = 256
BATCH = 4096
BASE_STEPS = 900
LORA_STEPS = 900
RANK = 32
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
OUT = Path(__file__).resolve().parent.parent / "out"


class CoordinateNet(torch.nn.Module):
    """[n, 2] points in [-1, 1] to [n, 3] colours in [0, 1].

    Fourier features (Tancik et al. 2020, arXiv:2006.10739) before four layers.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(2, WIDTH // 2, generator=generator) * 10)
        sizes = [WIDTH, WIDTH, WIDTH, WIDTH, 3]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        phase = points @ self.frequencies
        x = torch.cat([phase.sin(), phase.cos()], dim=-1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return torch.sigmoid(self.layers[-1](x))


def photographs() -> list[torch.Tensor]:
    """The two photographs that scikit-learn ships, as [rows * columns, 3] colours."""
    pictures = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels).resize((SIZE[1], SIZE[0]), Image.Resampling.LANCZOS)
        pictures.append(torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).reshape(-1, 3))
    return pictures


def grid() -> torch.Tensor:
    rows, columns = (torch.linspace(-1, 1, n) for n in SIZE)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)


def progress(what: str, step: int, steps: int, loss: float, start: float) -> None:
    if step % 20 and step != steps:
        return
    rate = step / max(time.perf_counter() - start, 1e-9)
    bar = ("#" * (24 * step // steps)).ljust(24, ".")
    end = "\n" if step == steps else "\r" if sys.stdout.isatty() else "\n"
    if end == "\n" and step != steps and step % 300:
        return
    left = (steps - step) / rate
    print(
        f"{what} [{bar}] {step}/{steps}  loss {loss:.5f}  {rate:.0f} steps/s  {left:.0f} s left ", end=end, flush=True
    )


def train_base(net: CoordinateNet, points: torch.Tensor, colours: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BASE_STEPS)
    start = time.perf_counter()
    for step in range(1, BASE_STEPS + 1):
        pick = torch.randint(len(points), (BATCH,))
        loss = torch.nn.functional.mse_loss(net(points[pick]), colours[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress("base", step, BASE_STEPS, loss.item(), start)


def train_lora(net: CoordinateNet, points: torch.Tensor, colours: torch.Tensor, path: Path) -> list[float]:
    net.requires_grad_(False)
    network = lycore.Network(
        {
            "network_dim": RANK,
            "network_alpha": RANK,
            "learning_rate": 4e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 20,
            "max_train_steps": LORA_STEPS,
            "seed": 1,
            "optimizer_args": {"weight_decay": 0.0},
        }
    )
    network.attach(net)
    network.build("cpu")
    print(f"LoRA of rank {RANK}: {network.parameter_count} parameters on {len(net.layers)} layers")
    losses, start = [], time.perf_counter()
    for step in range(1, LORA_STEPS + 1):
        pick = torch.randint(len(points), (BATCH,))
        loss = torch.nn.functional.mse_loss(net(points[pick]), colours[pick])
        loss.backward()
        network.step()
        losses.append(loss.item())
        progress("LoRA", step, LORA_STEPS, losses[-1], start)
    network.save(path)
    network.detach()
    return losses


def render(net: CoordinateNet, points: torch.Tensor) -> Image.Image:
    with torch.no_grad():
        return picture(net(points))


def picture(colours: torch.Tensor) -> Image.Image:
    return Image.fromarray((colours.reshape(*SIZE, 3) * 255).round().to(torch.uint8).numpy())


def strip(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    scale, gap, head = 2, 8, 18
    width, height = SIZE[1] * scale, SIZE[0] * scale
    sheet = Image.new("RGB", (len(pictures) * (width + gap) + gap, height + head + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, image) in enumerate(pictures):
        left = gap + i * (width + gap)
        draw.text((left, 3), title, fill="black")
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, head))
    return sheet


def curve(losses: list[float]) -> Image.Image:
    """The loss over the steps, on a logarithmic axis."""
    width, height, left, bottom = 720, 360, 70, 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    top, low = math.ceil(math.log10(max(losses))), math.floor(math.log10(min(losses)))

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 15) * step / max(len(losses) - 1, 1)
        return x, 15 + (height - bottom - 15) * (top - math.log10(loss)) / (top - low)

    for decade in range(low, top + 1):
        y = at(0, 10**decade)[1]
        draw.line([(left, y), (width - 15, y)], fill="#dddddd")
        draw.text((10, y - 6), f"1e{decade}", fill="black")
    for i in range(0, 5):
        step = (len(losses) - 1) * i / 4
        draw.text((at(step, 1)[0] - 8, height - bottom + 6), f"{step:.0f}", fill="black")
    draw.text((width // 2 - 20, height - 18), "step", fill="black")
    draw.line([at(i, loss) for i, loss in enumerate(losses)], fill="#1f6feb", width=2)
    return image


def main() -> int:
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    points, (first, second) = grid(), photographs()
    net = CoordinateNet()
    train_base(net, points, first)

    adapter = OUT / "demo_lora.safetensors"
    losses = train_lora(net, points, second, adapter)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}

    pictures = [("photograph 1", picture(first))]
    with lycore.Stack(net) as stack:
        handle = stack.add(adapter, strength=0.0)
        for strength in STRENGTHS:
            handle.strength = strength
            stack.apply()
            pictures.append((f"strength {strength:g}", render(net, points)))
        merged_loss = torch.nn.functional.mse_loss(
            torch.from_numpy(np.asarray(pictures[-1][1], dtype=np.float32) / 255).reshape(-1, 3), second
        )
        stack.restore()
    pictures += [("photograph 2", picture(second)), ("restored", render(net, points))]

    same = all(
        torch.equal(before[name].view(torch.int32), weight.view(torch.int32))
        for name, weight in net.state_dict().items()
    )
    strip(pictures).save(OUT / "demo_strip.png")
    curve(losses).save(OUT / "demo_loss.png")
    print(f"loss {losses[0]:.5f} -> {losses[-1]:.5f}")
    print(f"the merged file draws photograph 2 with a mean squared error of {merged_loss:.5f}")
    print("restored weights are bit-identical to the base" if same else "restored weights DIFFER from the base")
    for name in ("demo_strip.png", "demo_loss.png", "demo_lora.safetensors"):
        print(OUT / name)
    return 0 if same and losses[-1] < losses[0] / 5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
