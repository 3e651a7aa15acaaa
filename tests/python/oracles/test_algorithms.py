"""Every algorithm of LyCORIS: files that it wrote, merged by LyCore, against the formula and LyCORIS' forward."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import formula
import producers
import pytest
import torch
from algorithms import CASES, Case, on_input
from safetensors.torch import load_file, save_file
from test_agreement import KEYS, TOLERANCE
from test_files import (
    DTYPE,
    DTYPES,
    FORWARD,
    everything_matched,
    lycoris_target,
    merged_like_the_formula,
    oracle_agrees_by_layer,
    parameters_of,
    parts_of,
    relative,
    weights_of,
)
from threads import one_thread as one_thread
from torch.func import functional_call

import lycore

pytestmark = pytest.mark.usefixtures("library")

STRENGTHS = (1.0, 0.7, -0.6, 2.0, 0.0)
NAMES = {
    "lora": {"LoRA", "LoCon"},
    "locon": {"LoRA", "LoCon"},
    "dylora": {"LoRA", "LoCon"},
    "loha": {"LoHa"},
    "lokr": {"LoKr"},
    "full": {"full"},
    "ia3": {"(IA)^3"},
    "glora": {"GLoRA"},
    "tlora": {"T-LoRA"},
    "diag-oft": {"OFT"},
    "boft": {"BOFT"},
}
"""As reports call them."""
FORWARD_BY_SVD = 5e-5
"""The oracle's singular vectors are those of float32: off by its rounding over the gap between singular values."""
DORA = {"LoRA": "DoRA", "LoCon": "DoRA (LoCon)", "LoHa": "DoRA (LoHa)", "LoKr": "DoRA (LoKr)"}
STACKED = (
    *("loha-r7-tucker", "lokr-r7-f4-tucker", "lokr-r7-f8-unbalanced-both", "full", "ia3", "dora-locon-tucker-out"),
    *("dora-lokr-in", "oft-8-bound-rescaled", "boft-30-bound-rescaled"),
)
AT = (1.0, 0.7, -0.3, 0.5, -1.2, 0.8, 0.6, 0.9, -0.4, 0.3, 0.2)
"""A strength for each of them, (IA)^3 again and LoRA."""


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("base", DTYPES, ids=["on-fp32", "on-fp16", "on-bf16"])
@DTYPE
def test_files(case, path, dtype, base):
    host = case.host()
    case.write(path, host, dtype)
    changes = formula.read(path)
    assert len(changes) == len(host.inputs())
    merged_like_the_formula(parameters_of(host), base, path, changes, lycoris_target(host), STRENGTHS)


@DTYPE
def test_lycoris_reads_its_files_as_the_formula_does(case, path, dtype):
    """LyCORIS' module forward in eval, which rebuilds the weight in fp32. Its `get_diff_weight` and `merge_to` apply
    alpha / rank twice for LoHa and LoKr.
    """
    host = case.host()
    case.write(path, host, dtype)
    changes = formula.read(path)
    bound = FORWARD_BY_SVD if case.algo == "tlora" else FORWARD
    for strength in STRENGTHS[:1] if case.only_at_1 else STRENGTHS[:4]:
        for oracle in case.read(path, host, strength, dtype).values():
            oracle_agrees_by_layer(oracle, host, changes, lycoris_target(host), strength, bound)


def test_the_cases_have_every_form(tmp_path):
    """Of the factors: what the options above are for. LyCORIS chooses by the sizes of the layers."""
    forms = {"loha": set(), "lokr": set(), "full": set(), "ia3": set(), "diag-oft": set(), "boft": set()}
    for case in CASES.values():
        if case.algo not in forms or {"dora_wd", "use_scalar"} & set(case.options):
            continue
        for change in formula.read(case.write(tmp_path / "a.safetensors", case.host(), torch.float32)).values():
            factors = change.factors
            if case.algo == "boft":
                forms["boft"].add(len(factors["oft_blocks"]))
            elif case.algo == "ia3":
                forms["ia3"].add((int(factors["on_input"]), factors["weight"].ndim))
            else:
                short = {name.removeprefix("hada_").removeprefix("lokr_") for name in factors}
                forms[case.algo].add(" ".join(sorted(short)))
    assert forms["loha"] == {"w1_a w1_b w2_a w2_b", "t1 t2 w1_a w1_b w2_a w2_b"}
    halves = {"w1": "w1", "low": "w1_a w1_b"}, {"w2": "w2", "low": "w2_a w2_b", "core": "t2 w2_a w2_b"}
    expected = {" ".join(sorted(f"{w1} {w2}".split())) for w1 in halves[0].values() for w2 in halves[1].values()}
    assert forms["lokr"] == expected
    assert forms["full"] == {"diff", "diff diff_b"}
    assert forms["diag-oft"] == {"alpha oft_blocks", "alpha oft_blocks rescale"}
    assert forms["boft"] == {1, 2, 3, 4, 5}, "stages"
    assert forms["ia3"] == {(axis, ndim) for axis in (0, 1) for ndim in (1, 3, 4, 5)}


SCALES = {
    "loha": ({"hada_w1_a": (12, 3), "hada_w1_b": (3, 20), "hada_w2_a": (12, 3), "hada_w2_b": (3, 20)}, 3),
    "loha-core": ({"hada_w1_a": (2, 12), "hada_w1_b": (2, 5), "hada_w2_a": (2, 12), "hada_w2_b": (2, 5),
                   "hada_t1": (2, 2, 4), "hada_t2": (2, 2, 4)}, 2),
    "lokr-whole": ({"lokr_w1": (3, 4), "lokr_w2": (4, 5)}, None),
    "lokr-w1": ({"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 4), "lokr_w2": (4, 5)}, 2),
    "lokr-w2": ({"lokr_w1": (3, 4), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 5)}, 3),
    "lokr-both": ({"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 5)}, 3),
    "lokr-core": ({"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 5), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 1),
                   "lokr_t2": (2, 2, 4)}, 2),
}  # fmt: skip
"""Factors of a weight of 12 rows and 20 columns, and the rank that divides alpha: w2's, else w1's, else none."""


@pytest.mark.parametrize("alpha", [None, 0.0, 1.5, 100_000.0], ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_scales(path, name, alpha):
    """alpha / rank; 1 where a file has no alpha, or 0, which LyCORIS takes for the rank too."""
    shapes, inner = SCALES[name]
    generator = torch.Generator().manual_seed(6)
    tensors = {f"lycoris_x.{slot}": torch.randn(shape, generator=generator) for slot, shape in shapes.items()}
    save_file(tensors | ({} if alpha is None else {"lycoris_x.alpha": torch.tensor(alpha)}), path)
    kernel = shapes.get("hada_t1", shapes.get("lokr_t2", ()))[2:]
    base = torch.randn(12, 5 if kernel else 20, *kernel, generator=generator)
    change = formula.Change(formula.read(path)["lycoris_x"].factors, alpha / inner if alpha and inner else 1.0)
    live = {"x.weight": base.clone()}
    with lycore.Stack(live) as stack:
        stack.add(path, -0.3)
        stack.apply()
        want = base.double() - torch.from_numpy(0.3 * change.delta(base))
        assert relative(live["x.weight"], want) <= 1e-6


# Several adapters on one weight.


@pytest.fixture
def stacked(tmp_path) -> tuple[torch.nn.Module, dict[str, Path]]:
    """A host, and one file of every kind that has a module for each of its layers; (IA)^3 twice."""
    host = CASES["full"].host()
    for layer in host.modules():
        # Their differences are tested by themselves; a part of a weight has no bias of its own.
        if hasattr(layer, "bias"):
            layer.bias = None
    files = {name: CASES[name].write(tmp_path / f"{name}.safetensors", host, torch.float16) for name in STACKED}
    files["ia3-again"] = CASES["ia3"].write(tmp_path / "again.safetensors", host, torch.float16, seed=5)
    ranks = {"rank": 7, "alpha": 3.5, "conv_rank": 16, "conv_alpha": 24.0}
    lora = tmp_path / "lora.safetensors"
    files["lora"] = producers.lycoris_file(lora, host, dtype=torch.float16, tucker=True, algo="locon", **ranks)
    return host, files


@DTYPE
def test_every_kind_on_one_weight(stacked, dtype):
    """Every delta is that of the pristine weight, in any order, at any strengths, after any others; then the base."""
    host, files = stacked
    base = {name: weight.to(dtype) for name, weight in weights_of(host).items()}
    changes, target = {name: formula.read(path) for name, path in files.items()}, lycoris_target(host)
    rng, tally = random.Random(3), formula.Tally(dtype)
    for names in (list(files), list(files)[::-1]):
        live = {name: weight.clone() for name, weight in base.items()}
        with lycore.Stack(live) as stack:
            handles = {name: stack.add(files[name]) for name in names}
            first = {}
            for turn in range(3):
                strengths = {name: rng.choice([1.0, 0.7, -0.3, 0.5, -1.2, 0.0]) for name in names}
                first = first or strengths
                for name, handle in handles.items():
                    handle.strength = strengths[name]
                stack.apply()
                for module in changes["lora"]:
                    terms = [(strengths[name], changes[name][module]) for name in names]
                    weight = target(module)
                    tally.add(f"{module}, turn {turn}", live[weight], base[weight], terms)
                if turn == 0:
                    bits = {name: weight.clone() for name, weight in live.items()}
            for name, handle in handles.items():
                handle.strength = first[name]
            stack.apply()
            assert all(torch.equal(live[name], bits[name]) for name in live), "what was applied before does not count"
            handles["ia3"].remove()
            stack.apply()
            for module in changes["lora"]:
                terms = [(first[name], changes[name][module]) for name in names if name != "ia3"]
                tally.add(f"{module} without ia3", live[target(module)], base[target(module)], terms)
            stack.restore()
            assert all(torch.equal(live[name], base[name]) for name in live)
            assert stack.apply().changed == len(base)
        assert all(torch.equal(live[name], base[name]) for name in live)
    tally.check()


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "inputs"])
@DTYPE
def test_every_kind_on_a_slice(stacked, dtype, axis):
    """Modules whose weight is a part of the host's, as in a fused projection. The bypass, for ungrouped rows only."""
    host, files = stacked
    generator = torch.Generator().manual_seed(8)
    base, aliases, parts = {}, {}, {}
    for name, weight in weights_of(host).items():
        before, after = (torch.randn(weight.shape, generator=generator) * producers.BASE_STD for _ in range(2))
        base[name] = torch.cat([before, weight, after], axis).to(dtype)
        parts[name] = (axis, weight.shape[axis], weight.shape[axis])
        aliases[module_of(name.removesuffix(".weight"))] = (name, *parts[name])
    live = {name: weight.clone() for name, weight in base.items()}
    changes, tally = {name: formula.read(path) for name, path in files.items()}, formula.Tally(dtype)
    strengths = dict(zip(files, AT, strict=True))
    with lycore.Stack(live, aliases=aliases) as stack:
        for name, path in files.items():
            everything_matched(stack.add(path, strengths[name]), changes[name])
        stack.apply()
        for module, (name, *part) in aliases.items():
            terms = [(strengths[f], changes[f][module]) for f in files]
            want = base[name].double()
            merged = tally.add(module, live[name].narrow(*part), base[name].narrow(*part), terms)
            want.narrow(*part).copy_(torch.from_numpy(merged))
            live[name].narrow(*part).copy_(base[name].narrow(*part))
            assert torch.equal(live[name], base[name]), "the rest of the weight is left alone"
            layer = name.removesuffix(".weight")
            if dtype == torch.float32 and axis == 0 and layer != "grouped":
                forward, exact = host.get_submodule(layer), copy.deepcopy(host.get_submodule(layer)).double()
                x = host.inputs()[layer]
                y = functional_call(forward, {"weight": base[name]}, (x,)).contiguous()
                got = bypass(stack, layer, forward, x, y)
                assert relative(got, functional_call(exact, {"weight": want}, (x.double(),))) <= TOLERANCE, module
    tally.check()


@DTYPE
def test_checkpoint_files_and_other_spellings(stacked, tmp_path, dtype):
    """File to file, and under kohya's prefix: the very bits of the stack."""
    host, files = stacked
    base = {name: weight.to(dtype).contiguous() for name, weight in weights_of(host).items()}
    save_file(base, tmp_path / "base.safetensors")
    renamed = []
    for name, path in files.items():
        tensors = {key.replace("lycoris_", "lora_unet_", 1): value for key, value in load_file(path).items()}
        renamed.append(tmp_path / f"kohya-{name}.safetensors")
        save_file(tensors, renamed[-1])
    live = {name: weight.clone() for name, weight in base.items()}
    stack = lycore.Stack(live)
    for path in files.values():
        stack.add(path, 0.7)
    stack.apply()
    for spelled in (list(files.values()), renamed):
        adapters = [(path, 0.7) for path in spelled]
        report = lycore.merge(tmp_path / "base.safetensors", adapters, tmp_path / "merged.safetensors")
        assert report["tensors"] == {"changed": len(base), "copied": 0}
        merged = load_file(tmp_path / "merged.safetensors")
        assert merged.keys() == live.keys()
        assert all(torch.equal(merged[name], live[name]) for name in live)
    assert all(not torch.equal(live[name], base[name]) for name in live)


@DTYPE
def test_merging_a_weight_by_itself(stacked, dtype):
    """`weight_merge`, of tensors in the host's hands, gives the very bits of the stack."""
    host, files = stacked
    base = {name: weight.to(dtype) for name, weight in weights_of(host).items()}
    live = {name: weight.clone() for name, weight in base.items()}
    stack = lycore.Stack(live)
    for path in files.values():
        stack.add(path, 0.7)
    stack.apply()
    tensors, target = [load_file(path) for path in files.values()], lycoris_target(host)
    for module in formula.read(files["lora"]):
        name, prefix = target(module), f"{module}."
        of_module = [{k.removeprefix(prefix): v for k, v in t.items() if k.startswith(prefix)} for t in tensors]
        weight = base[name].clone()
        lycore.weight_merge(name, weight, [(0.7, t, None) for t in of_module])
        assert torch.equal(weight, live[name]), module


# The bypass.


def bypass(stack: lycore.Stack, name: str, layer: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    sliding = {key: getattr(layer, key) for key in KEYS} if hasattr(layer, "kernel_size") else {}
    return stack.forward(f"{name}.weight", x, y, **sliding)


def merged_by_formula(
    host: torch.nn.Module, terms: Callable[[str], list[tuple[float, formula.Change]]]
) -> torch.nn.Module:
    """The host in float64, `terms` by layer."""
    exact = copy.deepcopy(host).double()
    parameters = dict(exact.named_parameters())
    pristine = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for layer in host.inputs():
        for strength, change in terms(layer):
            for name, part in parts_of(change, f"{layer}.weight", pristine):
                parameters[name].data += torch.from_numpy(part.added(pristine[name], strength))
    return exact


def module_of(name: str) -> str:
    return f"lycoris_{name.replace('.', '_')}"


def test_the_bypass_is_the_merged_forward(case, path):
    """The bypass stands for what is done to the weight. A bias is merged, or added by the host: LyCORIS' (IA)^3 and
    rotations leave it alone.
    """
    host = case.host()
    case.write(path, host, torch.float32)
    changes, inputs, worst = formula.read(path), host.inputs(), {"bypass": 0.0, "merged": 0.0}
    base = copy.deepcopy(host)
    with lycore.Stack(parameters_of(host)) as stack:
        for strength in STRENGTHS:
            exact = merged_by_formula(base, lambda name, s=strength: [(s, changes[module_of(name)])])
            handle = stack.add(path, strength)
            for name, x in inputs.items():
                layer, plain = host.get_submodule(name), base.get_submodule(name)
                if plain.weight.ndim < 2:
                    continue
                want = exact.get_submodule(name)(x.double())
                biased = {} if layer.bias is None else {"bias": exact.get_submodule(name).bias.float()}
                y = functional_call(layer, biased, (x,)).contiguous()
                worst["bypass"] = max(worst["bypass"], relative(bypass(stack, name, layer, x, y), want))
                assert torch.equal(layer.weight, plain.weight), "the bypass leaves the weight alone"
                assert not strength or relative(plain(x), want) > 1e-2, "the adapter must show"
            stack.apply()
            for name, x in inputs.items():
                want = exact.get_submodule(name)(x.double())
                worst["merged"] = max(worst["merged"], relative(host.get_submodule(name)(x), want))
            handle.remove()
            stack.restore()
    print(f"bypass {worst['bypass']:.2e}, merged {worst['merged']:.2e}")
    assert max(worst.values()) <= TOLERANCE, worst


def test_the_bypass_of_every_kind_at_once(stacked):
    """Also while the weights are merged: what the adapters add is a matter of the pristine weight."""
    host, files = stacked
    changes = {name: formula.read(path) for name, path in files.items()}
    strengths = dict(zip(files, AT, strict=True))
    exact = merged_by_formula(host, lambda name: [(strengths[f], changes[f][module_of(name)]) for f in files])
    base = copy.deepcopy(host)
    with lycore.Stack(host) as stack:
        for name, path in files.items():
            stack.add(path, strengths[name])
        for when in ("before", "merged"):
            for name, x in host.inputs().items():
                plain = base.get_submodule(name)
                got = bypass(stack, name, plain, x, plain(x).contiguous())
                assert relative(got, exact.get_submodule(name)(x.double())) <= TOLERANCE, f"{name}, {when}"
            stack.apply()


# Saving.


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=["fp32", "fp16", "bf16", "as-made"])
def test_saving_keeps_every_bit(case, path, tmp_path, dtype):
    """Also of what does not count, such as the alpha of LoKr without low-rank halves, infinite in fp16. Only
    `on_input`, an int64 where LyCORIS does not cast it with everything else, becomes a float.
    """
    case.write(path, case.host(), dtype)
    changes = formula.read(path)
    with lycore.open(path) as adapter:
        names = NAMES[case.algo]
        names = {DORA[name] for name in names} if case.options.get("dora_wd") else names
        names = names | ({"norm"} if case.options.get("train_norm") else set())
        assert {module.algorithm for module in adapter.modules} == names
        ranks = {name: formula.inner_rank(c.factors) or 0 for name, c in changes.items()}
        assert {m.name: m.rank for m in adapter.modules} == ranks
        adapter.save(tmp_path / "saved.safetensors")
    written, saved = load_file(path), load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == written.keys()
    for key, value in written.items():
        if not value.is_floating_point():
            assert key.endswith(".on_input")
            value = value.float()
        assert (saved[key].dtype, saved[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(saved[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


def test_on_input_means_what_the_file_says(path):
    """Not what the layer's name or a square weight would suggest."""
    host = CASES["ia3"].host()
    CASES["ia3"].write(path, host, None)
    told = {name: int(load_file(path)[f"{module_of(name)}.on_input"]) for name in host.inputs()}
    assert told == {name: int(on_input(name)) for name in host.inputs()}
    square, vector = torch.randn(24, 24), torch.randn(24)
    for axis in (0, 1):
        save_file({"lycoris_x.weight": vector, "lycoris_x.on_input": torch.tensor(axis)}, path)
        live = {"x.weight": square.clone()}
        with lycore.Stack(live) as stack:
            stack.add(path, 0.7)
            stack.apply()
            scale = 1 + 0.7 * vector.double()
            want = square.double() * (scale[None, :] if axis else scale[:, None])
            assert relative(live["x.weight"], want) <= 1e-6
