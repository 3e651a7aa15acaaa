"""A run's losses as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

_SIZE = (960, 540)
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 44, 24, 52
_RAW, _SMOOTH, _INK, _GRID = (166, 196, 232), (24, 86, 168), (40, 40, 40), (226, 226, 226)


def picture(losses: Sequence[float], title: str = "") -> torch.Tensor:
    """An IMAGE of ComfyUI's [1, height, width, 3]: every step's loss, pale, under the smoothed one."""
    image = Image.new("RGB", _SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    smooth = smoothed(losses)
    low, high = _range([*losses, *smooth])
    span = max(len(losses), 2)
    inner = (_SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM)

    def place(step: float, loss: float) -> tuple[float, float]:
        across, up = (step - 1) / (span - 1), (loss - low) / (high - low)
        return _LEFT + across * inner[0], _TOP + (1 - up) * inner[1]

    for loss in ticks(low, high):
        y = place(1, loss)[1]
        pen.line([(_LEFT, y), (_SIZE[0] - _RIGHT, y)], fill=_GRID)
        pen.text((_LEFT - 8, y), f"{loss:.4g}", fill=_INK, font=font, anchor="rm")
    for step in ticks(1, span):
        if step == int(step):
            x = place(step, low)[0]
            pen.line([(x, _TOP), (x, _TOP + inner[1])], fill=_GRID)
            pen.text((x, _TOP + inner[1] + 8), f"{step:g}", fill=_INK, font=font, anchor="ma")
    pen.rectangle([_LEFT, _TOP, _SIZE[0] - _RIGHT, _TOP + inner[1]], outline=_INK)
    for values, colour, width in ((losses, _RAW, 1), (smooth, _SMOOTH, 3)):
        points = [place(step, loss) for step, loss in enumerate(values, 1)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=width, joint="curve")
        for x, y in points[:1]:
            pen.ellipse([x - width, y - width, x + width, y + width], fill=colour)
    pen.text((_LEFT, 14), title, fill=_INK, font=font)
    pen.text((_SIZE[0] - _RIGHT, 14), "loss (pale: each step)", fill=_SMOOTH, font=font, anchor="ra")
    pen.text((_LEFT + inner[0] / 2, _SIZE[1] - 8), "step", fill=_INK, font=font, anchor="ms")
    return torch.from_numpy(numpy.asarray(image).astype(numpy.float32) / 255.0)[None]


def smoothed(losses: Sequence[float]) -> list[float]:
    """A running mean that forgets over a twentieth of the run, each beginning included at its full weight."""
    keep = 1.0 - 1.0 / max(1.0, len(losses) / 20)
    mean, weight, means = 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def ticks(low: float, high: float) -> list[float]:
    """About six round numbers between two numbers."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    # A flat line needs some room too.
    room = 0.05 * (high - low) or abs(high) / 2 or 0.5
    return low - room, high + room
