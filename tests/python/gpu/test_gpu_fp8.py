"""Weights of 8 bits: rounded to the nearest number or by chance, with a scale or without; then the base again."""

from __future__ import annotations

from collections.abc import Mapping

import formula
import handmade
import numpy
import pytest
import torch
from hosts import EACH_FORM, FP8, GPU, LAYOUTS, SHAPES, Adapter, Host, name_of, same_bits, shapes_of, stack_on, weights

pytestmark = GPU

DTYPE = pytest.mark.parametrize("dtype", FP8, ids=name_of)
SCALED = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
LAST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The largest number: what is beyond is rounded to it, to no infinity and no NaN."""
FEW = {name: SHAPES[name] for name in ("linear", "odd", "row", "column", "tall", "plane")}


def host_of(dtype: torch.dtype, scaled: bool, layout: str = "contiguous") -> tuple[Host, dict[str, float]]:
    """Weights as cast without a scale, some of them subnormal; or with one by which the largest is half of the last."""
    base = weights(torch.float32, FEW)
    scales = {name: 2 * float(weight.abs().max()) / LAST[dtype] if scaled else 1.0 for name, weight in base.items()}
    host = Host({name: (weight / scales[name]).to(dtype) for name, weight in base.items()}, layout)
    return host, scales


def options_of(scaled: bool, scales: Mapping[str, float], **more: object) -> dict[str, object]:
    """Keywords of the stack: no scales where there are none."""
    return ({"scales": scales} if scaled else {}) | more


def exact(host: Host, scales: Mapping[str, float], terms) -> dict[str, numpy.ndarray]:
    """What would be stored if that had no rounding, within the range."""
    found = {}
    for name, stored in host.base.items():
        real = stored.double() * scales[name]
        total = real.numpy() + sum(a.changes[name].added(real, s) for s, a in terms if name in a.changes)
        last = LAST[stored.dtype]
        found[name] = numpy.clip(total / scales[name], -last, last)
    return found


def stored(host: Host) -> dict[str, numpy.ndarray]:
    return {name: weight.cpu().contiguous().double().numpy() for name, weight in host.live.items()}


@DTYPE
@SCALED
@pytest.mark.parametrize("kind", EACH_FORM)
def test_nearest(tmp_path, kind, scaled, dtype):
    host, scales = host_of(dtype, scaled)
    adapter, equal, total = Adapter(kind, tmp_path, shapes_of(host.base)), 0, 0
    with stack_on(host, **options_of(scaled, scales)) as stack:
        handle = stack.add(adapter.path, 1.0)
        # The last of them saturates a part of what is large.
        for strength in (1.0, -0.61803, 0.0, 0.81765 * (LAST[dtype] / 0.02 if not scaled else 100.0)):
            handle.strength = strength
            stack.apply()
            want, got = exact(host, scales, [(strength, adapter)]), stored(host)
            for name in adapter.changes:
                right = formula.rounded(want[name], dtype)
                # A step at the larger of base and sum, below which cancellation leaves no bits.
                larger = numpy.maximum(abs(want[name]), abs(host.base[name].double().numpy()))
                assert (abs(got[name] - right) <= formula.quantum(larger, dtype)).all(), f"{name} at {strength}"
                equal, total = equal + int((got[name] == right).sum()), total + right.size
            assert strength or host.intact()
    print(f"{equal / total:.4%} of {total} correctly rounded")
    # The middle between two of 8 bits is met rarely by an error of fp32.
    assert equal / total >= 0.9995


@DTYPE
@SCALED
@pytest.mark.parametrize("kind", ["lora-r16", "loha", "lokr", "full", "ia3-in", "glora-r7", "oft-4", "dora-lora-out"])
def test_stochastic(tmp_path, kind, scaled, dtype):
    """One of the two numbers around the exact sum; on average the sum itself."""
    host, scales = host_of(dtype, scaled)
    adapter, seeds = Adapter(kind, tmp_path, shapes_of(host.base)), 64
    want = exact(host, scales, [(0.70711, adapter)])
    sums, bits = dict.fromkeys(adapter.changes, 0.0), []
    for seed in range(seeds):
        with stack_on(host, **options_of(scaled, scales, rounding="stochastic", seed=seed)) as stack:
            stack.add(adapter.path, 0.70711)
            stack.apply()
            got = stored(host)
            bits.append(host.bits())
        for name in sums:
            step = formula.quantum(want[name], dtype)
            low, high = numpy.floor(want[name] / step) * step, numpy.ceil(want[name] / step) * step
            # An fp32 sum may lie just beyond a number that the exact one lies just before.
            slack = 1e-5 * (abs(want[name]) + step)
            neighbour = (got[name] == low) | (got[name] == high)
            near = (abs(got[name] - want[name]) <= 1.001 * step) & (
                (abs(want[name] - low) <= slack) | (abs(high - want[name]) <= slack)
            )
            assert (neighbour | near).all(), f"{name}, seed {seed}"
            sums[name] = sums[name] + (got[name] - want[name]) / step
    errors = numpy.concatenate([total.reshape(-1) / seeds for total in sums.values()])
    # The variance of one draw is p (1 - p) of a step's square, 1/6 on average and at most 1/4.
    print(f"mean {errors.mean():.2e}, of one element {errors.std():.3f} steps")
    assert abs(errors.mean()) <= 5 * (0.25 / seeds / errors.size) ** 0.5
    assert errors.std() <= 0.5 / seeds**0.5
    assert abs(errors).max() <= 6 * 0.5 / seeds**0.5, "no element is rounded to one side only"
    assert not all(same_bits(bits[0][name], bits[1][name]) for name in sums), "another seed, other numbers"


@DTYPE
def test_a_seed_gives_the_same_bits(tmp_path, dtype):
    """Whatever was applied before, on whichever stack; and other weights draw other numbers."""
    host, _ = host_of(dtype, False)
    twin = dict.fromkeys(("one", "two"), host.base["linear.weight"])
    adapter = Adapter("lora-r7", tmp_path, shapes_of(host.base))
    twins = Adapter("full", tmp_path, {"one.weight": (64, 72)})
    bits = []
    for _ in range(2):
        with stack_on(host, rounding="stochastic", seed=7) as stack:
            handle = stack.add(adapter.path, 0.9)
            for strength in (0.54321, -0.3, 0.0, 0.54321):
                handle.strength = strength
                stack.apply()
                if strength == 0.54321:
                    bits.append(host.bits())
                assert strength or host.intact()
            stack.restore()
            stack.apply()
            bits.append(host.bits())
    assert all(same_bits(other[name], bits[0][name]) for other in bits for name in host.base)
    both = Host({f"{name}.weight": weight for name, weight in twin.items()})
    aliases = {"lycoris_one": "one.weight"}
    with stack_on(both, rounding="stochastic", seed=7, aliases=aliases) as stack:
        stack.add(twins.path, 0.54321)
        stack.apply()
        one = both.bits()["one.weight"]
    with stack_on(both, rounding="stochastic", seed=7, aliases={"lycoris_one": "two.weight"}) as stack:
        stack.add(twins.path, 0.54321)
        stack.apply()
        two = both.bits()["two.weight"]
    assert not same_bits(one, two), "the same sums, under two names"


@DTYPE
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_parts(tmp_path, layout, rounding, dtype):
    """What nothing is added to keeps its bits: by chance or not, what is a number of the format stays it."""
    host, _ = host_of(dtype, False, layout)
    adapter = Adapter("lora-r7", tmp_path, {"part.weight": (19, 72), "odd.weight": SHAPES["odd"]})
    aliases = {"lycoris_part": ("linear.weight", 0, 21, 19)}
    with stack_on(host, rounding=rounding, seed=3, aliases=aliases) as stack:
        stack.add(adapter.path, 0.70711)
        stack.apply()
        assert host.around_intact()
        got, base = host.live["linear.weight"].cpu().contiguous(), host.base["linear.weight"]
        for rows in (slice(0, 21), slice(40, 64)):
            assert same_bits(got[rows], base[rows])
        added = adapter.changes["part.weight"].added(base[21:40].double(), 0.70711)
        for name, want, seen in (
            ("linear", base[21:40].double().numpy() + added, got[21:40]),
            ("odd", exact(host, dict.fromkeys(host.base, 1.0), [(0.70711, adapter)])["odd.weight"], None),
        ):
            seen = host.live["odd.weight"].cpu().contiguous() if seen is None else seen
            distance = abs(seen.double().numpy() - want) / formula.quantum(want, dtype)
            # From the sum: half a step to the nearest number, a whole one to either of two.
            assert distance.max() <= (0.5001 if rounding == "nearest" else 1.0001), name


@DTYPE
def test_nan_stays(tmp_path, dtype):
    host, _ = host_of(dtype, False)
    base = dict(host.base)
    base["linear.weight"] = base["linear.weight"].clone()
    base["linear.weight"].view(torch.uint8)[5, 7] = 0x7F
    host, clean = Host(base), host
    adapter = Adapter("lora-r7", tmp_path, shapes_of(base))
    results = []
    for one in (clean, host):
        with stack_on(one) as stack:
            stack.add(adapter.path, 0.70711)
            stack.apply()
            results.append(one.bits()["linear.weight"].float())
    want, got = results
    assert got[5, 7].isnan()
    want[5, 7] = got[5, 7] = 0
    assert torch.equal(got, want)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["lora-r7", "lora-r16", "lokr", "full"])
def test_infinity_stays(tmp_path, kind, rounding):
    """Where the format has it: what was infinite is, what was finite saturates, however large the sum."""
    clean, _ = host_of(torch.float8_e5m2, False)
    base, where = dict(clean.base), {(5, 7): 0x7C, (40, 64): 0xFC}
    base["linear.weight"] = base["linear.weight"].clone()
    for at, code in where.items():
        base["linear.weight"].view(torch.uint8)[at] = code
    adapter, dirty = Adapter(kind, tmp_path, shapes_of(base)), Host(base)
    for strength in (0.70711, 3e6):
        results = []
        for host in (clean, dirty):
            with stack_on(host, rounding=rounding, seed=2) as stack:
                stack.add(adapter.path, strength)
                stack.apply()
                results.append(host.bits()["linear.weight"].view(torch.uint8))
        want, got = results
        assert not (want & 0x7F).ge(0x7C).any()
        for at, code in where.items():
            assert got[at] == code, strength
            want[at] = code
        assert torch.equal(got, want)


def test_what_is_made_by_hand_covers_each_format():
    """Of the tests above: subnormal numbers and more than one binade are there."""
    for dtype in FP8:
        host, _ = host_of(dtype, False)
        sizes = torch.cat([w.double().abs().reshape(-1) for w in host.base.values()])
        least = 2.0 ** (formula.FORMATS[dtype][1] + formula.FORMATS[dtype][0] - 1)
        assert ((sizes < least).any() and (sizes >= 4 * least).any()) or dtype == torch.float8_e4m3fn
        assert sizes.max() > handmade.BASE_STD
