"""The weights that people put LoRAs on: the attention blocks of the U-Nets, name and shape, as diffusers names them."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]


def _transformer(prefix: str, width: int, depth: int, context: int, linear: bool) -> Iterator[tuple[str, Shape]]:
    projection: Shape = (width, width) if linear else (width, width, 1, 1)
    yield f"{prefix}.proj_in", projection
    for i in range(depth):
        block = f"{prefix}.transformer_blocks.{i}"
        for attention, keys in (("attn1", width), ("attn2", context)):
            yield f"{block}.{attention}.to_q", (width, width)
            yield f"{block}.{attention}.to_k", (width, keys)
            yield f"{block}.{attention}.to_v", (width, keys)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{prefix}.proj_out", projection


def attention_set(model: str) -> list[tuple[str, Shape]]:
    """`sdxl`: 722 weights, 2.2 G parameters. `sd15`: 192 weights, 0.33 G. `tiny`: to see that a program runs."""
    if model == "tiny":
        return list(_transformer("mid_block.attentions.0", 64, 1, 128, True))
    if model == "sdxl":
        context, linear, mid = 2048, True, (1280, 10)
        down, up = [(0, 0), (640, 2), (1280, 10)], [(1280, 10), (640, 2), (0, 0)]
    else:
        context, linear, mid = 768, False, (1280, 1)
        down, up = [(320, 1), (640, 1), (1280, 1), (0, 0)], [(0, 0), (1280, 1), (640, 1), (320, 1)]
    weights: list[tuple[str, Shape]] = []
    for kind, blocks, count in (("down_blocks", down, 2), ("up_blocks", up, 3)):
        for i, (width, depth) in enumerate(blocks):
            for j in range(count if depth else 0):
                weights += _transformer(f"{kind}.{i}.attentions.{j}", width, depth, context, linear)
    return weights + list(_transformer("mid_block.attentions.0", mid[0], mid[1], context, linear))
