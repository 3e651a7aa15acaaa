"""The formula of LoRA and LoCon, in the precision of the factors that it is given; the tests' one home for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy


def product(factors: Mapping[str, numpy.ndarray]) -> numpy.ndarray:
    """dW without scale, the inner axes flattened, from "up", "down" and, with a Tucker core, "mid".

    delta[o, i, k] = sum_p  up[o, p] down[p, i, k]
    delta[o, i, k] = sum_pq up[o, p] mid[p, q, k] down[q, i]
    """
    up, down = factors["up"], factors["down"]
    rank = down.shape[0]
    if "mid" in factors:
        mid = factors["mid"].reshape(rank, rank, -1)
        return numpy.einsum("op,pqk,qi->oik", up.reshape(-1, rank), mid, down.reshape(rank, -1), optimize=True)
    return up.reshape(-1, rank) @ down.reshape(rank, -1)
