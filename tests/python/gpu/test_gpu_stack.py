"""What a host does with a stack: several adapters, parts of weights, steps without end, and back to the base."""

from __future__ import annotations

import os
import random
import threading
import time

import formula
import handmade
import hosts
import numpy
import pytest
import torch
from hosts import (
    BACKUPS,
    DEVICE,
    DTYPES,
    EACH_FORM,
    GPU,
    ONLY_GPU,
    SHAPES,
    Adapter,
    Host,
    name_of,
    same_bits,
    shapes_of,
    stack_on,
    tally,
    weights,
)

import lycore

pytestmark = GPU

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
BACKUP = pytest.mark.parametrize("backup", BACKUPS)
STACKED = [kind for kind in EACH_FORM if handmade.KINDS[kind].config is None]
FEW = {name: SHAPES[name] for name in ("linear", "odd", "row", "column", "tall", "plane")}


def adapters_of(kinds, folder, host: Host, dtype=torch.float16) -> dict[str, Adapter]:
    return {kind: Adapter(kind, folder, shapes_of(host.base), dtype) for kind in kinds}


@DTYPE
def test_every_kind_on_one_weight(tmp_path, dtype):
    """Every delta is that of the pristine weight, in any order, at any strengths, after any others."""
    host, rng, result = Host(weights(dtype)), random.Random(3), formula.Tally(dtype)
    adapters = adapters_of(STACKED, tmp_path, host)
    for kinds in (STACKED, STACKED[::-1]):
        with stack_on(host) as stack:
            handles = {kind: stack.add(adapters[kind].path) for kind in kinds}
            first, bits = {}, {}
            for turn in range(3):
                strengths = {kind: rng.choice([1.0, rng.uniform(-1.2, 1.2), 0.0]) for kind in kinds}
                for kind, handle in handles.items():
                    handle.strength = strengths[kind]
                stack.apply()
                tally(result, host, [(strengths[kind], adapters[kind]) for kind in kinds], f"turn {turn}")
                first, bits = first or strengths, bits or host.bits()
            for kind, handle in handles.items():
                handle.strength = first[kind]
            stack.apply()
            assert host.is_like(bits), "what was applied before does not count"
            handles["full"].remove()
            stack.apply()
            tally(result, host, [(first[kind], adapters[kind]) for kind in kinds if kind != "full"], "without full")
    result.check()


@BACKUP
@DTYPE
def test_the_bits_are_the_same_from_run_to_run(tmp_path, dtype, backup):
    """Of all kinds at once, and of each alone: sums are made in one order, whichever thread comes first."""
    bits, adapters = {}, adapters_of(EACH_FORM, tmp_path, Host(weights(dtype)))
    for turn in range(2):
        host = Host(weights(dtype))
        with stack_on(host, backup=backup) as stack:
            for kind, adapter in adapters.items():
                handle = stack.add(adapter.path, 0.65432)
                for _ in range(2):
                    stack.apply()
                    bits.setdefault(kind, host.bits())
                    assert host.is_like(bits[kind]), f"{kind}, stack {turn}"
                    stack.restore()
                    assert host.intact(), kind
                handle.remove()
            for kind in STACKED:
                stack.add(adapters[kind].path, 0.54321)
            for _ in range(2):
                stack.apply()
                bits.setdefault("all", host.bits())
                assert host.is_like(bits["all"]), f"all, stack {turn}"
                stack.restore()


EVERYWHERE = ("lora-r7", "loha", "lokr", "full")
"""Kinds that only add."""
SOMEWHERE = {
    "dora-lora-out": ("linear", "odd"),
    "oft-4-rescaled": ("narrow", "plane"),
    "boft-4-4": ("linear", "wide"),
    "ia3-in": ("narrow", "tall"),
    "glora-r7": ("wide", "plane"),
    "set": ("row", "odd"),
}
"""Kinds that need the pristine weight, by the weights that they are on: "square" and "column" are never among them."""


@pytest.mark.parametrize(
    ("backup", "layout"),
    [
        *[(backup, layout) for backup in ("device", "host") for layout in ("contiguous", "rows_apart")],
        ("compact", "contiguous"),  # takes no other
        ("auto", "rows_apart"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_thousand_random_steps(tmp_path, dtype, layout, backup):
    """Only the strengths count, whatever was before, and the base comes back: after 500 steps without a pause too."""
    shapes = FEW | {name: SHAPES[name] for name in ("square", "narrow", "wide")}
    host, rng = Host(weights(dtype, shapes), layout), random.Random(f"{dtype} {layout} {backup}")
    adapters = list(adapters_of(EVERYWHERE, tmp_path, host).values())
    for kind, names in SOMEWHERE.items():
        adapters.append(Adapter(kind, tmp_path, {f"{name}.weight": shapes[name] for name in names}))
        assert adapters[-1].changes, kind
    compared = touched = 0
    with stack_on(host, backup=backup) as stack:
        handles = [(adapter, stack.add(adapter.path, 0.0)) for adapter in adapters]
        for step in range(1, 1001):
            action, which = rng.random(), rng.randrange(len(handles))
            adapter, handle = handles[which]
            if action < 0.45:
                handle.strength = rng.choice([0.0, 1.0, rng.uniform(-2, 2)])
            elif action < 0.55:
                handle.remove()
                handles.append((adapter, stack.add(adapter.path, handles.pop(which)[1].strength)))
            elif action < 0.95 or step < 500:
                touched += stack.apply().changed
            else:
                stack.restore()
                assert host.intact(), step
            if step == 500:
                stack.restore()
                assert host.intact(), step
            if step % 100 == 0:
                stack.apply()
                fresh = Host(host.base, layout)
                again = lycore.Stack(fresh.live, backup=backup)
                for adapter, handle in handles:
                    again.add(adapter.path, handle.strength)
                again.apply()
                assert host.is_like(fresh.bits()), step
                compared += not host.intact()
    assert touched > 1000 and compared >= 8


@pytest.mark.parametrize("backup", ["device", "host"])
@pytest.mark.parametrize("layout", ["contiguous", "rows_apart"])
@DTYPE
def test_every_element_is_written(tmp_path, dtype, layout, backup):
    """The weights are NaN when the strength changes: one that is not written stays so, one that is read spreads it."""
    host = Host(weights(dtype), layout)
    with stack_on(host, backup=backup) as stack:
        for kind, adapter in adapters_of(EACH_FORM, tmp_path, host).items():
            fresh = Host(host.base, layout)
            with stack_on(fresh, backup=backup) as other:
                other.add(adapter.path, 0.70711)
                other.apply()
                wanted = fresh.bits()
            handle = stack.add(adapter.path, 0.3)
            stack.apply()
            for name in adapter.changes:
                host.live[name].fill_(torch.nan)
            handle.strength = 0.70711
            stack.apply()
            assert host.is_like(wanted), kind
            for name in adapter.changes:
                host.live[name].fill_(torch.nan)
            stack.restore()
            assert host.intact(), kind
            handle.remove()


# Parts of weights.


class OfPart:
    """What an adapter on the whole weight adds to a part of it."""

    def __init__(self, change: formula.Change, whole: torch.Tensor, part: tuple[int, int, int]):
        self._change, self._whole, self._part = change, whole, part

    def _cut(self, values: numpy.ndarray) -> numpy.ndarray:
        return torch.from_numpy(values).narrow(*self._part).numpy()

    def added(self, _: torch.Tensor, strength: float) -> numpy.ndarray:
        return self._cut(self._change.added(self._whole, strength))

    def size(self, _: torch.Tensor, strength: float) -> numpy.ndarray:
        return self._cut(self._change.size(self._whole, strength))


PARTS = ((5, 20), (25, 44), (73, 36))
"""(start, length) in 115 rows or channels: as q, k and v in one projection, but at no multiple of any tile."""


@DTYPE
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "inputs"])
def test_parts_of_a_weight(tmp_path, axis, dtype):
    """Every kind on each of three parts, and a LoRA on the whole; the rest gets the LoRA alone."""
    whole = {"fused": (115, 40), "kernel": (115, 12, 3, 3)}
    if axis == 1:
        whole = {name: (shape[1], shape[0], *shape[2:]) for name, shape in whole.items()}
    host = Host(weights(dtype, whole))
    parts, shapes = {}, {}
    for name, shape in whole.items():
        for i, (start, length) in enumerate(PARTS):
            parts[f"{name}_{i}.weight"] = (f"{name}.weight", axis, start, length)
            shapes[f"{name}_{i}.weight"] = tuple(length if n == axis else size for n, size in enumerate(shape))
    aliases = {f"lycoris_{part.removesuffix('.weight')}": target for part, target in parts.items()}
    result, over = formula.Tally(dtype), Adapter("lora-r7", tmp_path, shapes_of(host.base), seed=9)
    for kind in STACKED:
        adapter = Adapter(kind, tmp_path, shapes)
        with stack_on(host, aliases=aliases) as stack:
            stack.add(adapter.path, 0.70711)
            stack.apply()
            for name in list(host.live):
                rest = [index for _, _, start, length in parts.values() for index in range(start, start + length)]
                rest = torch.tensor(sorted(set(range(115)) - set(rest)))
                got = host.live[name].cpu().index_select(axis, rest)
                assert same_bits(got, host.base[name].index_select(axis, rest)), "nothing is on these"
            stack.add(over.path, -0.54321)
            stack.apply()
            for part, (name, *where) in parts.items():
                terms = [(-0.54321, OfPart(over.changes[name], host.base[name], where))]
                if part in adapter.changes:
                    terms.append((0.70711, adapter.changes[part]))
                got, base = (w.narrow(*where).contiguous() for w in (host.live[name].cpu(), host.base[name]))
                result.add(f"{kind} on {part}", got, base, terms)
    result.check()


# Numbers that are not like others.


@DTYPE
def test_negative_zero_stays(tmp_path, dtype):
    """Where nothing is added: beside a part, at strength 0, and in the base that is given back."""
    base = weights(dtype, {"linear": SHAPES["linear"]})
    base["linear.weight"][torch.rand(64, 72, generator=torch.Generator().manual_seed(4)) < 0.3] = -0.0
    host = Host(base)
    adapter = Adapter("lora-r7", tmp_path, {"part.weight": (19, 72)})
    with stack_on(host, aliases={"lycoris_part": ("linear.weight", 0, 21, 19)}) as stack:
        handle = stack.add(adapter.path, 1.0)
        stack.apply()
        got, outside = host.live["linear.weight"].cpu(), [*range(21), *range(40, 64)]
        assert same_bits(got[outside], base["linear.weight"][outside])
        assert not (got[21:40] == 0).any()
        handle.strength = 0.0
        stack.apply()
        assert host.intact()


@DTYPE
@pytest.mark.parametrize("kind", EACH_FORM)
def test_infinity_and_nan_stay_where_they_are(tmp_path, kind, dtype):
    """What multiplies or norms W may carry them along a row or a column; sums carry them nowhere."""
    shapes = {name: SHAPES[name] for name in ("linear", "tall")}
    clean, base = Host(weights(dtype, shapes)), weights(dtype, shapes)
    spread = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes_of(base).items()}
    for name, weight in base.items():
        for row, column, value in ((3, 5, torch.inf), (17, 64, -torch.inf), (50, 33, torch.nan)):
            weight[row, column] = value
            if kind.startswith(("lora", "lo", "full", "ia3")):
                spread[name][row, column] = True
            else:
                spread[name][row], spread[name][:, column] = True, True
    dirty = Host(base)
    adapter = Adapter(kind, tmp_path, shapes_of(base))
    results = []
    for host in (clean, dirty):
        with stack_on(host) as stack:
            stack.add(adapter.path, 0.81765)
            stack.apply()
            results.append(host.bits())
    for name in adapter.changes:
        want, got = (bits[name] for bits in results)
        assert same_bits(got[~spread[name]], want[~spread[name]]), name
        assert not got[[3, 17, 50], [5, 64, 33]].isfinite().any() or kind == "set", name


# The host.


@DTYPE
def test_the_hosts_precision_does_not_matter(tmp_path, dtype):
    """Neither that it allows TF32 nor that it is inside autocast."""
    host, result = Host(weights(dtype)), formula.Tally(dtype)
    adapters = adapters_of(["lora-r16", "loha", "glora-r7"], tmp_path, host, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast(DEVICE, torch.bfloat16), stack_on(host) as stack:
            for adapter in adapters.values():
                stack.add(adapter.path, 0.70711)
            stack.apply()
            tally(result, host, [(0.70711, adapter) for adapter in adapters.values()])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    result.check()


@ONLY_GPU
@BACKUP
def test_work_goes_to_the_hosts_stream(tmp_path, backup):
    """A weight that a slow kernel on the host's stream still writes is merged after it, without a synchronisation."""
    late, host, result = (
        Host(weights(torch.float32)),
        Host(weights(torch.float32, seed=4)),
        formula.Tally(torch.float32),
    )
    adapters = adapters_of(["lora-r7", "dora-lora-out"], tmp_path, host)
    with stack_on(host, backup=backup):
        pass
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, weight in host.live.items():
            weight.copy_(late.live[name])
        stack = lycore.Stack(host.live, backup=backup)
        handles = [stack.add(adapter.path, 1.0) for adapter in adapters.values()]
        stack.apply()
        torch.cuda._sleep(50_000_000)
        for handle in handles:
            handle.strength = 0.70711
        stack.apply()
    stream.synchronize()
    host.base = late.base
    tally(result, host, [(0.70711, adapter) for adapter in adapters.values()])
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        stack.restore()
    stream.synchronize()
    assert all(same_bits(weight, late.live[name]) for name, weight in host.live.items())
    result.check()


@ONLY_GPU
def test_two_stacks_on_two_streams(tmp_path):
    """Enqueued at the same time from one thread: neither takes the other's scratch memory."""
    hosts = [Host(weights(torch.bfloat16, seed=seed)) for seed in (5, 6)]
    adapters = adapters_of(STACKED, tmp_path, hosts[0])
    results, streams = [formula.Tally(torch.bfloat16) for _ in hosts], [torch.cuda.Stream() for _ in hosts]
    stacks = [lycore.Stack(host.live) for host in hosts]
    handles = [[stack.add(adapter.path, 0.1) for adapter in adapters.values()] for stack in stacks]
    torch.cuda.synchronize()
    for strength in (0.9, -0.3, 0.54321):
        for stack, stream, own in zip(stacks, streams, handles, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                for handle in own:
                    handle.strength = strength
                stack.apply()
    for host, result, stream in zip(hosts, results, streams, strict=True):
        stream.synchronize()
        tally(result, host, [(0.54321, adapter) for adapter in adapters.values()])
        result.check()
    for stack, stream in zip(stacks, streams, strict=True):
        with torch.cuda.stream(stream):
            stack.restore()
    torch.cuda.synchronize()
    assert all(host.intact() for host in hosts)


@ONLY_GPU
@BACKUP
def test_no_memory_is_left_behind(tmp_path, backup):
    """200 times applied and restored, with an adapter that comes and goes: one copy of the weights is 64 MB."""
    host = Host(weights(torch.bfloat16, {f"w{i}": (2048, 4096) for i in range(4)}))
    kinds = {"lora": handmade.lora(32), "dora": handmade.dora(handmade.lora(8), True), "oft": handmade.oft(8)}
    adapters = [Adapter(kind, tmp_path, shapes_of(host.base), make=make) for kind, make in kinds.items()]
    with stack_on(host, backup=backup) as stack:
        stack.add(adapters[0].path, 0.5)

        def cycle(count: int) -> tuple[int, int]:
            for i in range(count):
                handle = stack.add(adapters[1 + i % 2].path, 0.7)
                stack.apply()
                handle.remove()
                stack.apply()
                stack.restore()
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

        before, after = cycle(20), cycle(200)
        assert after[0] <= before[0]
        if "PYTEST_XDIST_WORKER" in os.environ:
            return  # the others allocate too
        # The driver hands out pieces of 2 MB; a leak of one adapter's factors a cycle would be 100 MB.
        assert after[1] >= before[1] - (16 << 20)


@pytest.mark.parametrize("strength", [1e-4, 0.3, 4.0, 1e3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_compact_whatever_is_lost(tmp_path, dtype, strength):
    """Weights that drown in what is added to them, and numbers of every kind among them, come back."""
    base = weights(dtype, SHAPES | {"large": (320, 1280)})
    for i, weight in enumerate(base.values()):
        generator = torch.Generator().manual_seed(i)
        chosen = torch.rand(weight.shape, generator=generator) < 0.02
        anything = torch.randint(-(2**15), 2**15, weight.shape, generator=generator, dtype=torch.int16)
        hosts.integers(weight)[chosen] = anything[chosen]
    host = Host(base)
    kinds = ("lora-r7", "loha", "lokr", "full")
    adapters = adapters_of(kinds, tmp_path, host)
    plain = Host(base)
    with stack_on(host, backup="compact", self_check=True) as stack, stack_on(plain, backup="device") as other:
        handles = [(stack.add(adapters[kind].path, 0.0), other.add(adapters[kind].path, 0.0)) for kind in kinds]
        for turn in range(12):
            for i, pair in enumerate(handles):
                for handle in pair:
                    handle.strength = strength * (1.0 + 0.1 * (turn // 2)) * (turn // 2 % (i + 1) == 0)
            stack.apply()
            other.apply()
            for name, weight in host.live.items():
                got, want = weight.double(), plain.live[name].double()
                near = torch.isclose(got, want, rtol=2.0**-6, atol=2.0**-6 * strength, equal_nan=True)
                assert near.all(), f"{name} turn {turn}"
            if turn == 7:
                stack.restore()
                assert host.intact()
        mode = stack.info()["backup"]
        if DEVICE == "cuda":
            assert mode["mode"] == "compact", mode
            if strength < 1:
                assert mode["bytes"] < 0.5 * sum(w.numel() * w.element_size() for w in host.live.values())


@ONLY_GPU
def test_compact_takes_a_quarter(tmp_path):
    host = Host(weights(torch.bfloat16, {f"w{i}": (1280, 1280) for i in range(4)}))
    with stack_on(host, backup="compact") as stack:
        handle = stack.add(Adapter("lora-r16", tmp_path, shapes_of(host.base)).path, 0.5)
        stack.apply()
        handle.strength = 0.7
        stack.apply()
        kept = stack.info()["backup"]
        assert kept["mode"] == "compact" and kept["weights"] == 4
        # And a little more where the adapter changes a few weights beyond recognition.
        assert kept["bytes"] <= 0.255 * sum(w.numel() * w.element_size() for w in host.live.values())


@ONLY_GPU
@pytest.mark.parametrize("backup", ["device", "host"])
def test_nobody_waits_for_large_copies_to_go_back(tmp_path, backup):
    """Restore returns while the GPU is still busy; who applies at once may get the memory of the last copies; and soon
    after the last restore the device has it back.
    """
    host = Host(weights(torch.bfloat16, {f"w{i}": (8192, 8192) for i in range(3)}))
    adapter = Adapter("lora", tmp_path, shapes_of(host.base), make=handmade.lora(8))
    with stack_on(host, backup=backup) as stack:
        stack.add(adapter.path, 0.5)
        stack.apply()
        merged, held = host.bits(), torch.cuda.mem_get_info()[0]
        for _ in range(3):
            torch.cuda._sleep(1_000_000_000)
            stack.restore()
            assert not torch.cuda.current_stream().query(), "it did not wait"
            stack.apply()
        assert host.is_like(merged)
        stack.restore()
        assert host.intact()
        if backup == "device" and "PYTEST_XDIST_WORKER" not in os.environ:
            deadline = time.monotonic() + 5
            while torch.cuda.mem_get_info()[0] < held + (300 << 20):
                assert time.monotonic() < deadline, "384 MB of copies are still held"
                time.sleep(0.001)


@pytest.mark.parametrize("kind", ["lora-r7", "oft-4-rescaled", "boft-4-4", "dora-lora-out"])
def test_a_strength_beyond_fp32_is_refused(tmp_path, kind):
    host = Host(weights(torch.float32, FEW))
    with stack_on(host) as stack:
        stack.add(Adapter(kind, tmp_path, shapes_of(host.base)).path, 1e39)
        with pytest.raises(lycore.ArgumentError, match="beyond fp32"):
            stack.apply()
        assert host.intact()


@ONLY_GPU
def test_the_librarys_own_kernels_merge():
    """libtorch gives the same numbers, later: a library without kernels shall not pass for one that has them."""
    with lycore.Stack(Host(weights(torch.bfloat16, FEW)).live) as stack:
        assert stack.info()["executor"] == "kernels"


@ONLY_GPU
def test_calls_on_two_threads_leave_the_hosts_precision_as_it_was(tmp_path):
    """One call opens while another one is inside: the second must not take the first one's setting for the host's."""
    stacks = []
    for seed in (1, 2):
        host = Host(weights(torch.float32, FEW))
        stacks.append(lycore.Stack(host.live))
        stacks[-1].add(Adapter("lora-r7", tmp_path, shapes_of(host.base), seed=seed).path, 1.0)
    before = torch.backends.cudnn.conv.fp32_precision
    inside, opened = threading.Event(), threading.Event()

    def wait(done: int, total: int) -> bool:
        inside.set()
        # The other call ends last, so that it is the one that could leave its own idea of the setting behind.
        assert opened.wait(10)
        return True

    def wait_for_the_first(done: int, total: int) -> bool:
        opened.set()
        if done == total:
            first.join(10)
        return True

    first = threading.Thread(target=lambda: stacks[0].apply(progress=wait))
    first.start()
    assert inside.wait(10)
    stacks[1].apply(progress=wait_for_the_first)
    first.join()
    assert torch.backends.cudnn.conv.fp32_precision == before
