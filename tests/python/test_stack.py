"""Stacks against the formula in float64: exact to the last bit that the dtype allows, and restored to the bit."""

from __future__ import annotations

import threading

import numpy
import pytest

import lycore

pytestmark = pytest.mark.usefixtures("library")

SHAPES = {
    "blocks.0.to_q": [96, 64],
    "blocks.0.conv": [40, 24, 3, 3],
    "blocks.1.proj": [64, 48, 1, 1],
    "blocks.1.tucker": [32, 24, 3, 3],
}
TUCKER = "lora_unet_blocks_1_tucker"


def module_of(target: str) -> str:
    return "lora_unet_" + target.replace(".", "_")


MODULES = {module_of(name): shape for name, shape in SHAPES.items()}


@pytest.fixture
def loras(make_lora):
    dtypes = {"a": "float16", "b": "float32", "c": "float16"}
    return [make_lora(n, MODULES, tucker=(TUCKER,), rank=4 + 4 * i, dtype=d) for i, (n, d) in enumerate(dtypes.items())]


@pytest.fixture
def weights(rng):
    """`weights(dtype)`: fresh base weights."""
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return lambda dtype: {f"{name}.weight": value.astype(dtype) for name, value in base.items()}


def expected(base, loras, strengths):
    """W + sum of strength * delta, and the sum of magnitudes, in float64."""
    exact, bound = {}, {}
    for name, weight in base.items():
        module = module_of(name.removesuffix(".weight"))
        wide = weight.astype(numpy.float64)
        exact[name] = wide + sum(s * lora.deltas[module] for lora, s in zip(loras, strengths, strict=True))
        bound[name] = abs(wide) + sum(
            abs(s) * lora.magnitudes[module] for lora, s in zip(loras, strengths, strict=True)
        )
    return exact, bound


@pytest.mark.parametrize("backup", ["device", "host"])
def test_fp32_is_the_formula(weights, loras, backup):
    live, strengths = weights("float32"), (0.8, -0.5, 1.3)
    exact, bound = expected(live, loras, strengths)
    with lycore.Stack(live, backup=backup) as stack:
        for lora, strength in zip(loras, strengths, strict=True):
            stack.add(lora.path, strength)
        assert stack.apply() == lycore.Applied(changed=4, kept=0)
        for name, weight in live.items():
            # Sums of at most 12 products in fp32: a few units of 2^-24, relative to the magnitudes summed.
            assert (abs(weight - exact[name]) <= 1e-6 * bound[name]).all(), name
        assert stack.apply() == lycore.Applied(changed=0, kept=4)


def test_fp16_is_rounded_once(weights, loras):
    live, strengths = weights("float16"), (1.0, 0.7, -1.1)
    exact, _ = expected(live, loras, strengths)
    with lycore.Stack(live) as stack:
        for lora, strength in zip(loras, strengths, strict=True):
            stack.add(lora.path, strength)
        stack.apply()
        equal = total = 0
        for name, weight in live.items():
            right = exact[name].astype(numpy.float16)
            equal, total = equal + (weight == right).sum(), total + weight.size
            distance = abs(weight.view(numpy.int16).astype(int) - right.view(numpy.int16).astype(int))
            assert distance.max() <= 1, name
        # Only a sum within fp32's rounding of the middle between two fp16 numbers may go the other way.
        assert equal / total >= 0.999


def test_a_thousand_random_steps_end_at_the_base(weights, loras, rng):
    live, base = weights("float16"), weights("float16")
    with lycore.Stack(live) as stack:
        handles = [stack.add(lora.path, 0.0) for lora in loras]
        order = list(loras)
        for step in range(1000):
            which, what = int(rng.integers(3)), rng.random()
            if what < 0.45:
                handles[which].strength = float(rng.choice([0.0, 0.5, 1.0, -0.75, rng.normal()]))
            elif what < 0.6:
                handles[which].remove()
                order.append(order.pop(which))
                handles.append(stack.add(order[-1].path, handles.pop(which).strength))
            elif what < 0.95:
                stack.apply()
            else:
                stack.restore()
                assert all(live[name].tobytes() == base[name].tobytes() for name in live), step
            if step % 100 == 99:
                stack.apply()
                fresh = weights("float16")
                again = lycore.Stack(fresh)
                for lora, handle in zip(order, handles, strict=True):
                    again.add(lora.path, handle.strength)
                again.apply()
                assert all(live[name].tobytes() == fresh[name].tobytes() for name in live), step
    assert all(live[name].tobytes() == base[name].tobytes() for name in live)


def test_strength_zero_is_the_base(weights, loras):
    live, base = weights("float16"), weights("float16")
    live["blocks.0.to_q.weight"][0, 0] = base["blocks.0.to_q.weight"][0, 0] = -0.0
    stack = lycore.Stack(live)
    handle = stack.add(loras[0].path, 1.0)
    stack.apply()
    assert live["blocks.0.to_q.weight"].tobytes() != base["blocks.0.to_q.weight"].tobytes()
    handle.strength = 0
    assert stack.apply().changed == 4
    assert all(live[name].tobytes() == base[name].tobytes() for name in live)


@pytest.mark.parametrize("kind", ["rows apart", "transposed", "columns apart"])
def test_strided_weights_change_only_their_own_elements(loras, rng, kind):
    memory = rng.standard_normal((200, 200)).astype(numpy.float32)
    before = memory.copy()
    weight = {
        "rows apart": memory[10:106, 20:84],
        "transposed": memory[10:74, 20:116].T,
        "columns apart": memory[4:196:2, 7:199:3],
    }[kind]
    start = weight.astype(numpy.float64)
    stack = lycore.Stack({"blocks.0.to_q.weight": weight})
    stack.add(loras[0].path, 0.5)
    stack.apply()
    module = module_of("blocks.0.to_q")
    bound = abs(start) + loras[0].magnitudes[module]
    assert (abs(weight - (start + 0.5 * loras[0].deltas[module])) <= 1e-6 * bound).all()
    outside = numpy.ones(memory.shape, bool)
    view = outside[10:106, 20:84] if kind == "rows apart" else None
    view = outside[10:74, 20:116] if kind == "transposed" else view
    view = outside[4:196:2, 7:199:3] if kind == "columns apart" else view
    view[...] = False
    assert numpy.array_equal(memory[outside], before[outside])
    stack.restore()
    assert memory.tobytes() == before.tobytes()


def test_aliases_lead_to_slices(make_lora, rng):
    lora = make_lora("qkv", {"lora_unet_q": [8, 6], "lora_unet_k": [8, 6], "lora_unet_wide": [24, 2]})
    weight = rng.standard_normal((24, 6)).astype(numpy.float32)
    base = weight.astype(numpy.float64)
    aliases = {
        "lora_unet_q": ("fused.weight", 0, 0, 8),
        "lora_unet_k": ("fused.weight", 0, 8, 8),
        "lora_unet_wide": ("fused.weight", 1, 3, 2),
    }
    stack = lycore.Stack({"fused.weight": weight}, aliases=aliases)
    handle = stack.add(lora.path, 2.0)
    stack.apply()
    want = base.copy()
    want[:8] += 2 * lora.deltas["lora_unet_q"]
    want[8:16] += 2 * lora.deltas["lora_unet_k"]
    want[:, 3:5] += 2 * lora.deltas["lora_unet_wide"]
    assert numpy.allclose(weight, want, rtol=1e-6, atol=1e-6)
    assert {m["module"]: m["target"] for m in handle.report()["modules"]} == dict.fromkeys(aliases, "fused.weight")

    with pytest.raises(lycore.ArgumentError, match="outside"):
        lycore.Stack({"fused.weight": weight}, aliases={"x": ("fused.weight", 0, 20, 8)})
    with pytest.raises(lycore.ArgumentError, match="slice is"):
        lycore.Stack({"fused.weight": weight}, aliases={"x": ("fused.weight", 0)})


def test_strengths_of_parts_and_modules(make_lora):
    shapes = {"lora_unet_x": [4, 4], "lora_te_y": [4, 4], "lora_unet_z": [4, 4]}
    lora = make_lora("parts", shapes)
    live = {
        "x.weight": numpy.zeros((4, 4), "f4"),
        "y.weight": numpy.zeros((4, 4), "f4"),
        "z.weight": numpy.zeros((4, 4), "f4"),
    }
    stack = lycore.Stack(live, aliases={"lora_te_y": "y.weight"})
    handle = stack.add(lora.path, 0.5, text_encoder=0.25, modules={"*_z": -1.0})

    def check(x, y, z):
        stack.apply()
        for name, module, strength in (("x", "lora_unet_x", x), ("y", "lora_te_y", y), ("z", "lora_unet_z", z)):
            want = strength * lora.deltas[module]
            assert numpy.allclose(live[f"{name}.weight"], want, rtol=1e-6, atol=1e-9), name

    check(0.5, 0.25, -1.0)
    handle.set(unet=2.0)
    check(2.0, 0.25, -1.0)
    handle.strength = 3.0
    check(3.0, 3.0, -1.0)
    handle.set(1.0, modules={})
    check(1.0, 1.0, 1.0)
    assert handle.strengths == lycore.Strengths(1.0, 1.0, {})


def test_the_report_names_what_did_not_match(make_lora, weights):
    lora = make_lora("some", {**MODULES, "lora_unet_blocks_7_to_q": [96, 64]}, tucker=(TUCKER,))
    handle = lycore.Stack(weights("float32")).add(lora.path)
    report = handle.report()
    unmatched = [key for key in report["keys"] if key["status"] == "unmatched"]
    assert len(unmatched) == report["summary"]["unmatched"] == 3
    assert {key["nearest"] for key in unmatched} == {"lora_unet_blocks_0_to_q"}
    assert report["summary"]["matched"] == len(lora.tensors) - 3


def test_errors_carry_key_and_hint(make_lora, weights):
    other = make_lora("other", {"lora_unet_elsewhere": [4, 4]})
    stack = lycore.Stack(weights("float32"))
    with pytest.raises(lycore.AdapterKeyError) as caught:
        stack.add(other.path)
    assert caught.value.hint and caught.value.file == str(other.path) and caught.value.key == "lora_unet_elsewhere"

    with pytest.raises(lycore.ArgumentError, match="NaN"):
        stack.add(make_lora("nan", MODULES, tucker=(TUCKER,)).path, float("nan"))
    read_only = numpy.zeros((4, 4), "f4")
    read_only.flags.writeable = False
    for weight, error, hint in (
        (read_only, lycore.ArgumentError, "copy"),
        (numpy.zeros((4, 4)), lycore.DtypeError, "float32"),
        (numpy.zeros((4, 4), ">f4"), lycore.DtypeError, "convert"),
        (numpy.zeros((4, 4), "f4")[::-1], lycore.ArgumentError, "copy"),
        ([[1.0]], lycore.ArgumentError, "convert"),
    ):
        with pytest.raises(error) as caught:
            lycore.Stack({"the.weight": weight})
        assert caught.value.key == "the.weight" and hint in caught.value.hint and "the.weight" in caught.value.message


def test_cancel_and_exceptions_leave_the_base(weights, loras):
    live, base = weights("float32"), weights("float32")
    stack = lycore.Stack(live)
    stack.add(loras[0].path)
    seen = []
    with pytest.raises(lycore.Cancelled):
        stack.apply(progress=lambda done, total: seen.append((done, total)) or done < 2)
    assert seen == [(0, 4), (1, 4), (2, 4)]
    assert all(live[name].tobytes() == base[name].tobytes() for name in live)

    class OwnError(Exception):
        pass

    def fail(done: int, total: int) -> None:
        if done == 3:
            raise OwnError("from the callback")

    with pytest.raises(OwnError, match="from the callback"):
        stack.apply(progress=fail)
    assert all(live[name].tobytes() == base[name].tobytes() for name in live)

    cancel = lycore.Cancel()
    cancel.request()
    with pytest.raises(lycore.Cancelled):
        stack.apply(cancel=cancel)
    cancel.reset()
    assert stack.apply(cancel=cancel).changed == 4


def test_a_second_thread_is_told_that_the_stack_is_busy(weights, loras):
    stack = lycore.Stack(weights("float32"))
    handle = stack.add(loras[0].path)
    answers: list[object] = []

    def other() -> None:
        try:
            handle.strength = 2.0
        except lycore.BusyError as problem:
            answers.append(problem.message)

    def callback(done: int, total: int) -> None:
        if done == 0:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    assert stack.apply(progress=callback).changed == 4
    assert len(answers) == 1 and "another call" in answers[0]
    assert handle.strength == 1.0


@pytest.mark.parametrize("target", list(SHAPES))
def test_the_bypass_is_the_merged_layer(weights, loras, rng, target):
    shape, lora = SHAPES[target], loras[1]
    stack = lycore.Stack(weights("float32"))
    stack.add(lora.path, 0.6)
    delta = 0.6 * lora.deltas[module_of(target)]
    if len(shape) == 2:
        x = rng.standard_normal((2, 3, shape[1])).astype("f4")
        y = rng.standard_normal((2, 3, shape[0])).astype("f4")
        want = y + x.astype(numpy.float64) @ delta.T
        out = stack.forward(f"{target}.weight", x, y)
    else:
        torch = pytest.importorskip("torch")
        x = rng.standard_normal((2, shape[1], 7, 6)).astype("f4")
        sliding = {"stride": (2, 1), "padding": 1, "dilation": 1} if shape[2] == 3 else {}
        product = torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(delta), **sliding).numpy()
        y = rng.standard_normal(product.shape).astype("f4")
        want = y + product
        out = stack.forward(f"{target}.weight", x, y, **sliding)
    assert out is y
    assert numpy.allclose(y, want, rtol=1e-5, atol=1e-5)


def test_weight_merge_is_the_formula(rng):
    weight = rng.standard_normal((24, 16)).astype("f4")
    want = weight.astype(numpy.float64)
    up, down = rng.standard_normal((24, 4)).astype("f4"), rng.standard_normal((4, 16)).astype("f4")
    small = {"lora_up.weight": up[:8], "lora_down.weight": down.T.copy().T, "alpha": 8}
    want += 0.5 * (up.astype(numpy.float64) @ down)
    want[4:12] += -1.5 * 2.0 * (up[:8].astype(numpy.float64) @ down)
    whole = {"lora_up.weight": up, "lora_down.weight": down}
    out = lycore.weight_merge("w", weight, [(0.5, whole, None), (-1.5, small, (0, 4, 8))])
    assert out is weight
    assert numpy.allclose(weight, want, rtol=1e-5, atol=1e-5)
    before = weight.copy()
    with pytest.raises(lycore.ShapeError) as caught:
        lycore.weight_merge("w", weight, [(1.0, {"lora_up.weight": up[:8], "lora_down.weight": down}, None)])
    assert caught.value.key == "w" and numpy.array_equal(weight, before)
    with pytest.raises(lycore.UnsupportedError, match="no algorithm has"):
        lycore.weight_merge("w", weight, [(1.0, {"what.weight": up}, None)])


def test_a_torch_module_is_taken_whole(make_lora):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Conv2d(3, 4, 3), torch.nn.LayerNorm(6)).to(
        torch.bfloat16
    )
    lora = make_lora("torch", {"lora_unet_0": [6, 8], "lora_unet_1": [4, 3, 3, 3]})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with lycore.Stack(model) as stack:
        stack.add(lora.path, 0.5)
        assert stack.apply().changed == 2
        for name, module in (("0.weight", "lora_unet_0"), ("1.weight", "lora_unet_1")):
            exact = before[name].double() + 0.5 * torch.from_numpy(lora.deltas[module])
            live = dict(model.named_parameters())[name]
            steps = (live.detach().view(torch.int16).int() - exact.bfloat16().view(torch.int16).int()).abs()
            assert steps.max() <= 1 and (steps == 0).double().mean() > 0.98
        model[0].weight.data = model[0].weight.data.clone()
        with pytest.raises(lycore.ArgumentError, match="other memory"):
            stack.apply()
    assert torch.equal(model[1].weight, before["1.weight"])


def test_info_tells_where_the_copies_are(weights, loras):
    live, base = weights("float32"), weights("float32")
    stack = lycore.Stack(live, self_check=True)
    assert stack.info()["backup"] is None
    handle = stack.add(loras[0].path)
    stack.apply()
    info = stack.info()
    changed = [name for name in live if live[name].tobytes() != base[name].tobytes()]
    assert info["device"] == "cpu" and info["executor"] == "cpu" and info["self_check"] is True
    assert (info["targets"], info["adapters"]) == (len(live), 1)
    assert info["backup"]["mode"] == "host" and "host memory" in info["backup"]["why"]
    assert info["backup"]["weights"] == len(changed)
    assert info["backup"]["bytes"] == sum(base[name].nbytes for name in changed)
    handle.remove()
    stack.apply()
    assert stack.info()["backup"]["weights"] == 0
    assert all(live[name].tobytes() == base[name].tobytes() for name in live)


def test_options_of_8_bit_weights_are_checked(make_lora):
    weight = numpy.zeros((4, 4), "f4")
    for options, error in (
        ({"backup": "somewhere"}, "backup"),
        ({"rounding": "upwards"}, "rounding"),
        ({"scales": {"the.weight": 0.0}}, "scale is 0"),
        ({"scales": {"the.weight": 2.0}}, "8 bits"),
    ):
        with pytest.raises(lycore.ArgumentError, match=error):
            lycore.Stack({"the.weight": weight}, **options)
    with pytest.raises(lycore.AdapterKeyError):
        lycore.Stack({"the.weight": weight}, scales={"another.weight": 2.0})
