"""The formulas of the algorithms, in the precision of the factors that they are given; the tests' one home for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy


def product(factors: Mapping[str, numpy.ndarray], weight: numpy.ndarray | None = None) -> numpy.ndarray:
    """dW at strength 1 without scale, as a matrix of out by in * kernel or with more axes in the same order.

    LoRA        "up", "down", "mid"           up @ down
    LoHa        "hada_w1_a", .. "hada_t2"     (w1_a @ w1_b) o (w2_a @ w2_b)
    LoKr        "lokr_w1", .. "lokr_t2"       kron(w1, w2): [u * c + p, v * d + q] = w1[u, v] w2[p, q]
    full        "diff"                        diff
    (IA)^3      "weight", "on_input"          weight o vector, by row, or by input channel; needs `weight`

    Tucker cores: delta[o, i, k] = sum_pq up[o, p] core[p, q, k] down[q, i]; LoHa and LoKr store `up` transposed.
    """
    if "up" in factors:
        up, down, core = factors["up"], factors["down"], factors.get("mid")
        return _low_rank(up.reshape(len(up), -1), down.reshape(len(down), -1), core)
    if "hada_w1_a" in factors:
        return _half(factors, "hada", 1) * _half(factors, "hada", 2)
    if "lokr_w2" in factors or "lokr_w2_a" in factors:
        w1, w2 = _half(factors, "lokr", 1), _half(factors, "lokr", 2)
        return numpy.einsum("uv,pq->upvq", w1, w2).reshape(len(w1) * len(w2), -1)
    if "diff" in factors:
        return factors["diff"]
    vector = factors["weight"].reshape([-1] + [1] * (weight.ndim - 1))
    return weight * (vector.swapaxes(0, 1) if factors["on_input"] else vector)


def rank(factors: Mapping[str, numpy.ndarray]) -> int | None:
    """What a stored alpha is divided by; None where alpha has no meaning."""
    inner = next((n for n in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if n in factors), None)
    return len(factors[inner]) if inner else None


def _low_rank(up: numpy.ndarray, down: numpy.ndarray, core: numpy.ndarray | None = None) -> numpy.ndarray:
    if core is None:
        return up @ down
    return numpy.einsum("op,pqk,qi->oik", up, core.reshape(*core.shape[:2], -1), down, optimize=True)


def _half(factors: Mapping[str, numpy.ndarray], kind: str, number: int) -> numpy.ndarray:
    """w1 or w2 of LoHa or LoKr as a matrix."""
    name = f"{kind}_w{number}"
    if name in factors:
        return factors[name].reshape(len(factors[name]), -1)
    up, down, core = factors[f"{name}_a"], factors[f"{name}_b"], factors.get(f"{kind}_t{number}")
    if core is None:
        return up @ down
    return _low_rank(up.T, down, core).reshape(up.shape[1], -1)
