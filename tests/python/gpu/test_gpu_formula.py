"""Every kind of file on every weight and layout, against the formulas in float64."""

from __future__ import annotations

import formula
import handmade
import pytest
import torch
from hosts import (
    DEVICE,
    DTYPES,
    EACH_FORM,
    GPU,
    LAYOUTS,
    SHAPES,
    Adapter,
    Host,
    name_of,
    shapes_of,
    stack_on,
    tally,
    weights,
)
from safetensors.torch import load_file

import lycore

pytestmark = GPU

STRENGTHS = (1.0, -0.61803, 0.0)
"""No fractions of small numbers such as 0.6: of five factors one would then end at the middle between two 16-bit
numbers, where the strength's own rounding to fp32 decides.
"""
PAIRS = [(kind, dtype, base) for kind in EACH_FORM for dtype in DTYPES for base in DTYPES]
PAIRS += [
    (kind, DTYPES[i], DTYPES[(i + shift) % 3])
    for shift, kind in enumerate(sorted(handmade.KINDS.keys() - set(EACH_FORM)))
    for i in range(3)
]
"""Kind, dtype of the file, dtype of the weights: all pairs for each form, every dtype once for the other kinds."""
SHARE_OF_GLORA = 0.998
"""Of fp16: W @ a1 @ a2 are sums over all columns, then over the rank, whose fp32 roundings together meet the middle
between two numbers more often than a sum over a rank does.
"""
RANKS = (1, 4, 7, 8, 12, 16, 24, 33, 64, 128)

BASE = pytest.mark.parametrize("base", DTYPES, ids=lambda d: f"on-{name_of(d)}")


@pytest.mark.parametrize(("kind", "dtype", "base"), PAIRS, ids=lambda v: v if isinstance(v, str) else name_of(v))
def test_every_kind_of_file(tmp_path, kind, dtype, base):
    host = Host(weights(base, biases=True))
    adapter = Adapter(kind, tmp_path, shapes_of(host.base), dtype)
    result = formula.Tally(base)
    with stack_on(host) as stack:
        handle = stack.add(adapter.path)
        assert not handle.report()["summary"]["unmatched"]
        for strength in STRENGTHS:
            handle.strength = strength
            assert stack.apply().changed == len(adapter.parts(host.base))
            tally(result, host, [(strength, adapter)], f"at {strength}")
            assert strength or host.intact(), "strength 0 is the base"
    result.check()


@BASE
@pytest.mark.parametrize("kind", EACH_FORM)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_every_layout(tmp_path, layout, kind, base):
    host = Host(weights(base), layout)
    adapter = Adapter(kind, tmp_path, shapes_of(host.base))
    result = formula.Tally(base)
    with stack_on(host) as stack:
        handle = stack.add(adapter.path, 1.0)
        stack.apply()
        handle.strength = -0.70711
        stack.apply()
        tally(result, host, [(-0.70711, adapter)])
        assert host.around_intact()
    result.check()


LARGE = {"large": (771, 1030), "flat": (19, 4099), "high": (4099, 19), "kernel": (130, 65, 3, 3)}


@BASE
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora-out", "dora-in", "glora", "oft", "boft"])
def test_weights_of_many_tiles(tmp_path, kind, base):
    """Norms and ranks go over more elements than one tile of any kernel has; edges are cut off on both sides."""
    shapes = LARGE if kind not in ("oft", "boft") else {"large": (776, 1030), "high": (4096, 19)}
    makes = {
        "lora": handmade.lora(40),
        "loha": handmade.loha(20),
        "lokr": handmade.lokr(257),
        "dora-out": handmade.dora(handmade.lora(9), True),
        "dora-in": handmade.dora(handmade.lora(9), False),
        "glora": handmade.glora(12),
        "oft": handmade.oft(8),
        "boft": handmade.boft(8, 4),
    }
    host = Host(weights(base, shapes))
    adapter = Adapter(kind, tmp_path, shapes_of(host.base), base, make=makes[kind])
    result = formula.Tally(base)
    with stack_on(host) as stack:
        stack.add(adapter.path, 0.81765)
        stack.apply()
        tally(result, host, [(0.81765, adapter)])
    result.check(SHARE_OF_GLORA if kind == "glora" else None)


@BASE
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rank", RANKS)
def test_ranks(tmp_path, rank, dtype, base):
    of_rank(tmp_path, "lora", handmade.lora(rank), dtype, base)


@BASE
@pytest.mark.parametrize("rank", RANKS[2::2])
@pytest.mark.parametrize("kind", ["loha", "lokr", "glora", "dora"])
def test_ranks_of_other_algorithms(tmp_path, kind, rank, base):
    makes = {
        "loha": handmade.loha(rank),
        "lokr": handmade.lokr(4, rank, "2"),
        "glora": handmade.glora(rank),
        "dora": handmade.dora(handmade.lora(rank), True),
    }
    of_rank(tmp_path, f"{kind}-r{rank}", makes[kind], torch.float16, base)


def of_rank(folder, kind: str, make: handmade.Make, dtype: torch.dtype, base: torch.dtype) -> None:
    names = ("linear", "odd", "row", "column", "tall", "plane")
    host = Host(weights(base, {name: SHAPES[name] for name in names}))
    adapter = Adapter(kind, folder, shapes_of(host.base), dtype, make=make)
    result = formula.Tally(base)
    with stack_on(host) as stack:
        stack.add(adapter.path, 0.70711)
        stack.apply()
        tally(result, host, [(0.70711, adapter)])
    result.check(SHARE_OF_GLORA if "glora" in kind else None)


@BASE
@pytest.mark.parametrize("kind", [kind for kind in EACH_FORM if kind != "full"])
def test_factors_of_mixed_dtypes(tmp_path, kind, base):
    """Within a module, and from one module to the next."""
    host, result = Host(weights(base)), formula.Tally(base)
    shapes = shapes_of(host.base)
    adapters = [Adapter(kind, tmp_path, shapes, tuple(DTYPES[i:] + DTYPES[:i]), seed=i + 1) for i in range(2)]
    with stack_on(host) as stack:
        for adapter, strength in zip(adapters, (0.81765, -0.54321), strict=True):
            stack.add(adapter.path, strength)
        stack.apply()
        tally(result, host, list(zip((0.81765, -0.54321), adapters, strict=True)))
    result.check()


def test_weights_of_several_dtypes_on_one_stack(tmp_path):
    """And of several layouts: what one launch for all of them meets in a real model."""
    hosts, live = {}, {}
    for i, (layout, dtype) in enumerate((layout, dtype) for layout in LAYOUTS for dtype in DTYPES):
        base = {f"m{i}.{name}": weight for name, weight in weights(dtype, seed=i).items()}
        hosts[dtype, layout] = Host(base, layout)
        live |= hosts[dtype, layout].live
    shapes = {name: tuple(weight.shape) for name, weight in live.items()}
    adapters = [Adapter(kind, tmp_path, shapes) for kind in ("lora-r7", "dora-lokr-in", "full")]
    results = {dtype: formula.Tally(dtype) for dtype in DTYPES}
    with lycore.Stack(live) as stack:
        for adapter in adapters:
            stack.add(adapter.path, 0.65432)
        assert stack.apply().changed == len(live)
        for (dtype, layout), host in hosts.items():
            assert host.around_intact()
            for name, weight in host.live.items():
                terms = [(0.65432, adapter.changes[name]) for adapter in adapters if name in adapter.changes]
                results[dtype].add(f"{name} {layout}", weight.cpu(), host.base[name], terms)
    for result in results.values():
        result.check()
    assert all(host.intact() for host in hosts.values())


@BASE
@pytest.mark.parametrize("strength", [1e-3, 1e-6, -1e-6, 30.0, -2.5], ids=str)
@pytest.mark.parametrize("kind", ["lora-r16", "loha", "lokr", "full", "ia3-in", "glora-r7", "oft-4", "dora-lora-out"])
def test_strengths(tmp_path, kind, strength, base):
    """Tiny ones are added before the one rounding, not lost in an earlier one."""
    host, result = Host(weights(base)), formula.Tally(base)
    adapter = Adapter(kind, tmp_path, shapes_of(host.base))
    with stack_on(host) as stack:
        stack.add(adapter.path, strength)
        stack.apply()
        tally(result, host, [(strength, adapter)])
    result.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", [kind for kind in EACH_FORM if handmade.KINDS[kind].config is None])
def test_a_weight_by_itself_gets_the_bits_of_the_stack(tmp_path, kind, dtype):
    """As a host does that does its own bookkeeping: factors in host memory, and on the device."""
    host = Host(weights(dtype))
    adapter = Adapter(kind, tmp_path, shapes_of(host.base))
    with stack_on(host) as stack:
        stack.add(adapter.path, 0.70711)
        stack.apply()
        tensors = load_file(adapter.path)
        for module, name in adapter.modules.items():
            own = {key.removeprefix(f"{module}."): v for key, v in tensors.items() if key.startswith(f"{module}.")}
            for there in ("cpu", DEVICE):
                weight = host.base[name].to(DEVICE, copy=True)
                moved = {key: value if value.ndim == 0 else value.to(there) for key, value in own.items()}
                lycore.weight_merge(name, weight, [(0.70711, moved, None)])
                assert torch.equal(weight, host.live[name]), f"{name}, factors on {there}"
