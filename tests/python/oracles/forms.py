"""The formulas in float64 of what is more than a product of factors: DoRA, rotations, GLoRA, T-LoRA, PEFT's methods.

`added` is what a module adds to a weight at a strength, `W' - W`, from the tensors of its file by canonical name and
the weight; `added_to_bias` the same for a bias. `size=True` gives the same sums with absolute values: what rounding
errors are relative to. Nothing here comes from the library: LyCORIS' formulas are written from the algebra of its
modules, PEFT's from its `merge`, and tests compare both with these programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy
from lora_formula import product

Array = numpy.ndarray
Factors = Mapping[str, Array]


def added(
    factors: Factors, scale: float, weight: Array, strength: float, config: Mapping[str, Any], size: bool = False
) -> Array:
    """What the module adds to the weight."""
    take = abs if size else (lambda values: values)
    form = next((form for mark, form in FORMS.items() if mark in factors), None)
    if form is not None:
        return take(form(factors, scale, weight, strength, config, take)).reshape(weight.shape)
    if {"diff", "up", "hada_w1_a"}.isdisjoint(factors) and not any(name.startswith("lokr") for name in factors):
        return numpy.zeros_like(weight)
    own = {name: values for name, values in factors.items() if name not in BESIDE}
    scale = float(take(numpy.float64(scale * factors.get("scalar", 1.0))))
    delta = scale * product({name: take(values) for name, values in own.items()}).reshape(weight.shape)
    magnitude = next((factors[name] for name in MAGNITUDES if name in factors), None)
    if magnitude is None:
        return take(numpy.float64(strength)) * delta
    if not size:
        return strength * (decomposed(weight + delta, weight + delta, magnitude, factors) - weight)
    signed = added(own | {k: factors[k] for k in ("scalar",) if k in factors}, scale, weight, 1.0, config)
    moved = decomposed(abs(weight) + delta, weight + signed, abs(magnitude), factors)
    return abs(strength) * (abs(moved) + abs(weight))


def added_to_bias(factors: Factors, scale: float, bias: Array, strength: float, size: bool = False) -> Array | None:
    """What the module adds to its layer's bias; None when it changes none."""
    take = abs if size else (lambda values: values)
    terms = []
    if "up_bias" in factors:
        terms.append(scale * factors["up_bias"])
    terms += [factors[name] for name in ("diff_b", "b_norm") if name in factors]
    # PEFT's (IA)^3 multiplies the layer's output, bias and all.
    if "ia3_l" in factors and factors["axis"] == 0:
        terms.append(bias * (factors["ia3_l"].reshape(-1) - 1))
    return sum(abs(strength * t) if size else take(strength * t) for t in terms) if terms else None


def changes_weight(factors: Factors) -> bool:
    """Whether the module changes the weight at all."""
    return not set(factors) <= {"diff_b", "b_norm", "alpha"}


MAGNITUDES = ("dora_scale", "magnitude_vector")
BESIDE = {*MAGNITUDES, "scalar", "diff_b", "up_bias", "reshape_weight"}


def decomposed(values: Array, normed: Array, magnitude: Array, factors: Factors) -> Array:
    """`values` with the norms of `normed` exchanged for the magnitude, per output or per input channel.

    A 1-D magnitude and PEFT's vector, however shaped, are per output channel.
    """
    per_input = "dora_scale" in factors and magnitude.ndim > 1 and magnitude.shape[1] > 1
    axis = 1 if per_input else 0
    others = tuple(i for i in range(normed.ndim) if i != axis)
    norm = numpy.sqrt((normed**2).sum(others, keepdims=True))
    return values * magnitude.reshape([-1 if i == axis else 1 for i in range(normed.ndim)]) / norm


def _glora(f: Factors, scale: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    a, b = ("a1", "a2"), ("b1", "b2")
    if f["a1"].shape[0] != w.shape[1] or f["a2"].shape[1] != w.shape[1] or f["b1"].shape[0] != w.shape[0]:
        # Before May 2024 the names were the other way round.
        a, b = a[::-1], b[::-1]
    flat = [take(f[name]).reshape(len(f[name]), -1) for name in (*a, *b)]
    across = numpy.einsum("oi...,ij,jk->ok...", take(w), flat[0], flat[1], optimize=True)
    return s * scale * (across + (flat[2] @ flat[3]).reshape(w.shape))


def _tlora(f: Factors, scale: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    rank = f["lambda_layer"].size
    p, q = f["p_layer"].reshape(-1, rank), f["q_layer"].reshape(rank, -1)
    u, sigma, v = numpy.linalg.svd(w.reshape(len(w), -1), full_matrices=False)
    now = (take(p) * take(f["lambda_layer"]).reshape(-1)) @ take(q)
    then = (take(u[:, :rank]) * sigma[:rank]) @ take(v[:rank])
    return s * scale * _less(now, then, take)


def _less(a: Array, b: Array, take: Callable) -> Array:
    return a + b if take is abs else a - b


def cayley(skew: Array) -> Array:
    """(I + Q)(I - Q)^-1 of every block."""
    one = numpy.eye(skew.shape[-1])
    return (one + skew) @ numpy.linalg.inv(one - skew)


def lycoris_rotations(blocks: Array, constraint: float, rows: int) -> Array:
    """R of B: Q = B - B^T, shrunk as a whole to the norm constraint * rows."""
    skew = blocks - blocks.swapaxes(-1, -2)
    norm = numpy.linalg.norm(skew)
    if 0 < constraint * rows < norm:
        skew = skew * (constraint * rows / norm)
    return cayley(skew)


def _oft(f: Factors, _s: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    parts = [f["oft_diag"]] if "oft_diag" in f else [f["oft_blocks"]] if "oft_blocks" in f else None
    parts = parts or [f[name] for name in sorted(f) if name.startswith("oft_blocks.")]
    limit, rescale = float(f.get("alpha", 0.0)), f.get("rescale", numpy.ones(len(w))).reshape(-1, 1)
    flat = w.reshape(len(w), -1)
    if parts[0].ndim == 4:
        return _boft(f, parts[0], limit, rescale, flat, s, take)
    turned, at = [], 0
    for blocks in parts:
        n, b, _ = blocks.shape
        r = blocks if "oft_diag" in f else lycoris_rotations(blocks, limit, n * b)
        rows = flat[at : at + n * b].reshape(n, b, -1)
        turned.append(numpy.einsum("nij,nic->njc", take(r), take(rows)).reshape(n * b, -1))
        at += n * b
    return s * _less(take(rescale) * numpy.concatenate(turned), take(flat), take)


def _boft(f: Factors, stages: Array, limit: float, rescale: Array, w: Array, s: float, take: Callable) -> Array:
    b = stages.shape[-1]
    x = take(w)
    rotations = stages if "oft_diag" in f else lycoris_rotations(stages, limit, len(w))
    for i, r in enumerate(rotations):
        step = 2**i * b // 2
        # Channels that are `step` apart are partners, side by side in a group of b.
        x = x.reshape(-1, 2, step, w.shape[1]).swapaxes(1, 2).reshape(-1, b, w.shape[1])
        x = take(s * r + (1 - s) * numpy.eye(b)) @ x
        x = x.reshape(-1, step, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    return _less(take(1 + s * (rescale - 1)) * x, take(w), take)


def _peft_oft(f: Factors, _s: float, w: Array, s: float, config: Mapping[str, Any], take: Callable) -> Array:
    flat, upper = w.reshape(len(w), -1), f["oft_R"]
    b = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    skew = numpy.zeros((len(upper), b, b))
    skew[(slice(None), *numpy.triu_indices(b, 1))] = upper
    skew -= skew.swapaxes(1, 2)
    if config["coft"]:
        norm = numpy.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew *= numpy.minimum(1, config["eps"] / len(upper) ** 0.5 / numpy.maximum(norm, 1e-300))
    r = cayley(-skew)
    if config["use_cayley_neumann"]:
        r = neumann(skew, config["num_cayley_neumann_terms"])
    if config["block_share"]:
        r = numpy.repeat(r, flat.shape[1] // b, 0)
    columns = take(flat).reshape(len(w), -1, b)
    return s * _less(numpy.einsum("onj,nij->oni", columns, take(r)).reshape(flat.shape), take(flat), take)


def neumann(skew: Array, terms: int) -> Array:
    """PEFT's series in place of the inverse. The last of its powers, from the third on, counts once, the others twice;
    three terms give the same as four.
    """
    powers = [numpy.broadcast_to(numpy.eye(skew.shape[-1]), skew.shape)]
    for _ in range(max(terms - 1, 3)):
        powers.append(powers[-1] @ skew)
    weights = {1: [1], 2: [1, 2], 3: [1, 2, 2, 1]}.get(terms) or [1, *[2] * (terms - 2), 1]
    return sum(weight * power for weight, power in zip(weights, powers, strict=False))


def _peft_boft(f: Factors, _s: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    stages, flat = f["boft_R"], w.reshape(len(w), -1)
    m, n, b, _ = stages.shape
    x, columns = take(flat).T, flat.shape[1]
    for i, r in enumerate(cayley((stages.swapaxes(-1, -2) - stages) / 2)):
        order = numpy.arange(columns)
        if m > 1:
            # In each of n / 2^i stretches: its half blocks, the even ones before the odd ones.
            order = order.reshape(n >> i, -1, 2, b // 2).swapaxes(1, 2).reshape(-1)
        inverse = numpy.argsort(order)
        turned = take(s * r + (1 - s) * numpy.eye(b)) @ x[inverse].reshape(n, b, -1)
        x = turned.reshape(columns, -1)[order]
    scale = f.get("boft_s", numpy.ones(len(w))).reshape(-1, 1)
    return _less(take(1 + s * (scale - 1)) * x.T, take(flat), take)


def _peft_ia3(f: Factors, _s: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    values = f["ia3_l"].reshape([-1 if i == f["axis"] else 1 for i in range(w.ndim)])
    return s * take(w) * take(values - 1)


def _vera(f: Factors, _s: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    a, b = f["vera_A"][:, : w.shape[1]], f["vera_B"][: len(w)]
    return s * (take(f["vera_lambda_b"])[:, None] * take(b)) @ (take(f["vera_lambda_d"])[:, None] * take(a))


def _embedding(f: Factors, scale: float, _w: Array, s: float, _: Any, take: Callable) -> Array:
    return s * scale * (take(f["embedding_B"]) @ take(f["embedding_A"])).T


def _set(f: Factors, _s: float, w: Array, s: float, _: Any, take: Callable) -> Array:
    return s * _less(take(f["set_weight"].reshape(w.shape)), take(w), take)


def _norm(f: Factors, _s: float, _w: Array, s: float, _: Any, take: Callable) -> Array:
    return s * take(f["w_norm"])


def _ia3(f: Factors, _s: float, w: Array, s: float, _: Any, _take: Callable) -> Array:
    return s * product(f, w)


FORMS: dict[str, Callable[..., Array]] = {
    "a1": _glora,
    "lambda_layer": _tlora,
    "oft_blocks": _oft,
    "oft_blocks.0": _oft,
    "oft_diag": _oft,
    "oft_R": _peft_oft,
    "boft_R": _peft_boft,
    "ia3_l": _peft_ia3,
    "vera_lambda_b": _vera,
    "embedding_A": _embedding,
    "set_weight": _set,
    "w_norm": _norm,
    "on_input": _ia3,
}
"""By the tensor that gives a module away."""
