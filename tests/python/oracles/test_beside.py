"""What stands beside factors or in other programs' files: no oracle writes it, so the formula alone stands behind it.

Where such a file says the same as one of LyCORIS in other words, both must give the same bits.
"""

from __future__ import annotations

import forms
import formula
import pytest
import torch
from algorithms import CASES
from safetensors.torch import load_file, save_file
from test_algorithms import STRENGTHS, module_of
from test_algorithms import path as path
from test_files import DTYPE, lycoris_target, merged_like_the_formula, parameters_of, parts_of
from threads import one_thread as one_thread

import lycore

pytestmark = pytest.mark.usefixtures("library")


def merged_bits(path, base, strengths=(0.7,)) -> dict[str, torch.Tensor]:
    """Every parameter under the file at its first strength."""
    live = {name: values.clone() for name, values in base.items()}
    stack = lycore.Stack(live)
    stack.add(path, strengths[0])
    stack.apply()
    return live


def said_otherwise(case, path, dtype, change) -> None:
    """The file after `change(module, tensors)` on each of its modules gives the bits that it gave before."""
    host = case.host()
    case.write(path, host, torch.float32)
    base = {name: values.to(dtype) for name, values in parameters_of(host).items()}
    before, tensors = merged_bits(path, base), load_file(path)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, values in tensors.items():
        module, slot = key.split(".", 1)
        grouped.setdefault(module, {})[slot] = values
    written = {}
    for module, own in grouped.items():
        written |= {f"{module}.{slot}": values.contiguous() for slot, values in change(module, own).items()}
    assert written.keys() != tensors.keys() or any(not torch.equal(written[k], tensors[k]) for k in tensors)
    save_file(written, path)
    after = merged_bits(path, base)
    assert all(torch.equal(after[name], before[name]) for name in base)
    assert any(not torch.equal(after[name], base[name]) for name in base)


# A scalar.


@pytest.mark.parametrize("name", ["lora-scalar", "loha-r7-tucker", "lokr-r7-f4", "dora-lora-in", "dora-lokr-both-out"])
@DTYPE
def test_a_scalar_multiplies_the_difference(path, name, dtype):
    """LyCORIS folds it into a factor when it saves. Under DoRA it acts inside the norm."""
    case = CASES[name]
    host = case.host()
    case.write(path, host, torch.float32)
    modules = formula.read(path)
    save_file(load_file(path) | {f"{module}.scalar": torch.tensor(0.6) for module in modules}, path)
    changes = formula.read(path)
    assert all("scalar" in change.factors for change in changes.values())
    merged_like_the_formula(parameters_of(host), dtype, path, changes, lycoris_target(host), STRENGTHS)


# Magnitudes.


@pytest.mark.parametrize("name", ["dora-lora-out", "dora-loha-out", "dora-lokr-out"])
@DTYPE
def test_a_magnitude_of_one_axis_is_per_output(path, name, dtype):
    """Also on a square weight, where broadcasting would take it for the other axis."""
    flat = lambda _, own: own | {"dora_scale": own["dora_scale"].reshape(-1)}  # noqa: E731
    said_otherwise(CASES[name], path, dtype, flat)
    generator = torch.Generator().manual_seed(3)
    up, down, size = (torch.randn(shape, generator=generator) for shape in ((24, 3), (3, 24), (24,)))
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": size.abs() + 1}
    save_file({f"lycoris_x.{slot}": values for slot, values in tensors.items()}, path)
    base = {"x.weight": torch.randn(24, 24, generator=generator)}
    tally = formula.Tally(torch.float32)
    for strength in STRENGTHS:
        got = merged_bits(path, base, (strength,))["x.weight"]
        tally.add(f"square at {strength}", got, base["x.weight"], [(strength, formula.read(path)["lycoris_x"])])
    assert not tally.problems, tally.problems


def test_a_row_of_zeros_stays_one(path):
    """Its norm is 0, and it has no direction that a magnitude could give length to."""
    generator = torch.Generator().manual_seed(3)
    base, up = torch.randn(24, 20, generator=generator), torch.randn(24, 3, generator=generator)
    base[5], up[5] = 0, 0
    tensors = {"lora_up.weight": up, "lora_down.weight": torch.randn(3, 20, generator=generator)}
    save_file({f"lycoris_x.{k}": v for k, v in tensors.items()} | {"lycoris_x.dora_scale": torch.ones(24, 1)}, path)
    for strength in STRENGTHS:
        got = merged_bits(path, {"x.weight": base}, (strength,))["x.weight"]
        assert bool(got.isfinite().all())
        assert not got[5].any()


# GLoRA's older names, and rotations that were stored as such.


@pytest.mark.parametrize("name", ["glora-r1", "glora-r7", "glora-r16"])
@DTYPE
def test_the_older_layout_of_glora(path, name, dtype):
    """Until May 2024 the factors' names were the other way round."""
    names = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    said_otherwise(CASES[name], path, dtype, lambda _, own: {names.get(slot, slot): v for slot, v in own.items()})


@pytest.mark.parametrize("name", ["oft-4", "oft-8-bound-rescaled", "boft-10", "boft-30-bound-rescaled"])
@DTYPE
def test_rotations_stored_as_such(path, name, dtype):
    """`oft_diag` is R itself, rounded to the file's dtype: against the formula, and near what the blocks gave."""
    case = CASES[name]
    host = case.host()
    case.write(path, host, torch.float32)
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".oft_blocks")]:
        module, blocks = key.removesuffix(".oft_blocks"), tensors.pop(key)
        limit, rows = float(tensors.pop(f"{module}.alpha")), blocks.shape[-3] * blocks.shape[-1]
        r = forms.lycoris_rotations(blocks.double().numpy(), limit, rows)
        tensors[f"{module}.oft_diag"] = torch.from_numpy(r).float()
    save_file(tensors, path)
    merged_like_the_formula(parameters_of(host), dtype, path, formula.read(path), lycoris_target(host), STRENGTHS)


@pytest.mark.parametrize("limit", [0.0, 0.01], ids=["unbound", "bound"])
@DTYPE
def test_rotations_in_parts(path, dtype, limit):
    """sd-scripts' OFT of a fused weight: blocks of another size, and a limit of its own, for every part."""
    generator = torch.Generator().manual_seed(9)
    sizes = ((6, 8), (12, 4), (3, 16), (2, 5))
    shapes = {"x": (154, 60), "conv": (154, 20, 3, 3)}
    base = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    tensors = {}
    for name in shapes:
        for part, (n, b) in enumerate(sizes):
            blocks = torch.randn(n, b, b, generator=generator) * 0.25 / b**0.5
            tensors[f"lora_unet_{name}.oft_blocks.{part}"] = blocks
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(limit)
    save_file(tensors, path)
    target = lambda module: f"{module.removeprefix('lora_unet_')}.weight"  # noqa: E731
    merged_like_the_formula(base, dtype, path, formula.read(path), target, STRENGTHS)


# Whole weights.


@DTYPE
def test_a_weight_that_is_set(path, dtype):
    """Between the two by the strength, on weights of layers and norms."""
    host = CASES["lora-and-norms"].host()
    weights = {name: values for name, values in parameters_of(host).items() if name.endswith("weight")}
    generator = torch.Generator().manual_seed(4)
    tensors = {
        f"{module_of(name.removesuffix('.weight'))}.set_weight": torch.randn(w.shape, generator=generator) * 0.05
        for name, w in weights.items()
    }
    save_file(tensors, path)
    merged_like_the_formula(weights, dtype, path, formula.read(path), lycoris_target(host), STRENGTHS)


@DTYPE
def test_a_weight_that_is_set_is_the_given_one_at_strength_1(path, dtype):
    """Itself, and not what is left of it beside a weight that is much larger."""
    generator = torch.Generator().manual_seed(4)
    wanted = torch.randn(24, 20, generator=generator) * 1e-5
    save_file({"lycoris_x.set_weight": wanted}, path)
    got = merged_bits(path, {"x.weight": (torch.randn(24, 20, generator=generator) * 100).to(dtype)}, (1.0,))
    assert torch.equal(got["x.weight"].double(), torch.from_numpy(formula.rounded(wanted.double().numpy(), dtype)))


@DTYPE
def test_a_weight_that_grows(path, tmp_path, dtype):
    """By zeros at the end of its axes, in a checkpoint. A host's weight cannot, and is left alone with a reason."""
    generator = torch.Generator().manual_seed(5)
    base = {"x.weight": torch.randn(120, 64, generator=generator), "y.weight": torch.randn(96, 64, generator=generator)}
    base = {name: (values * 0.05).to(dtype) for name, values in base.items()}
    tensors = {}
    for name, rows, columns in (("x", 120, 128), ("y", 96, 64)):
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.2
    tensors["lora_unet_x.reshape_weight"] = torch.tensor([120, 128])
    save_file(tensors, path)
    save_file(base, tmp_path / "base.safetensors")
    changes, tally = formula.read(path), formula.Tally(dtype)
    for strength in STRENGTHS:
        lycore.merge(tmp_path / "base.safetensors", [(path, strength)], tmp_path / "merged.safetensors")
        merged = load_file(tmp_path / "merged.safetensors")
        if strength:
            grown = torch.nn.functional.pad(base["x.weight"], (0, 64))
            tally.add(f"x at {strength}", merged["x.weight"], grown, [(strength, changes["lora_unet_x"])])
        tally.add(f"y at {strength}", merged["y.weight"], base["y.weight"], [(strength, changes["lora_unet_y"])])
    tally.check()
    live = {name: values.clone() for name, values in base.items()}
    with lycore.Stack(live) as stack:
        states = {key["key"]: key for key in stack.add(path).report()["keys"]}
        stack.apply()
        assert torch.equal(live["x.weight"], base["x.weight"])
        assert not torch.equal(live["y.weight"], base["y.weight"])
    for slot in ("lora_up.weight", "lora_down.weight", "reshape_weight"):
        assert states[f"lora_unet_x.{slot}"]["status"] == "malformed"
        assert "grow" in states[f"lora_unet_x.{slot}"]["reason"]


# Biases.


@DTYPE
def test_biases_under_several_files(path, tmp_path, dtype):
    """Of layers and norms: differences alone, beside factors, and PEFT's scaled ones; all of the pristine bias."""
    host = CASES["lora-and-norms"].host()
    biased = [name for name in host.inputs() if host.get_submodule(name).bias is not None]
    generator = torch.Generator().manual_seed(7)
    alone, beside, scaled = {}, {}, {}
    for name in biased:
        layer, norm = host.get_submodule(name), "norm" in name
        bias = torch.randn(layer.bias.shape, generator=generator) * 0.1
        alone[f"{module_of(name)}.{'b_norm' if norm else 'diff_b'}"] = bias
        if norm:
            continue
        shapes = ((len(bias), 2), (2, layer.weight[0].numel()))
        up, down = (torch.randn(shape, generator=generator) for shape in shapes)
        factors = {"lora_up.weight": up * 0.05, "lora_down.weight": down * 0.05, "alpha": torch.tensor(3.0)}
        beside |= {f"{module_of(name)}.{slot}": values for slot, values in factors.items()}
        beside[f"{module_of(name)}.diff_b"] = bias.flip(0).contiguous()
        scaled |= {f"{module_of(name)}.{slot}": values for slot, values in factors.items()}
        scaled[f"{module_of(name)}.lora_up.bias"] = bias * 0.5
    files = {}
    for kind, tensors in {"alone": alone, "beside": beside, "scaled": scaled}.items():
        files[kind] = tmp_path / f"{kind}.safetensors"
        save_file(tensors, files[kind])
    base = {name: values.to(dtype) for name, values in parameters_of(host).items()}
    changes, target = {kind: formula.read(file) for kind, file in files.items()}, lycoris_target(host)
    strengths = {"alone": -0.6, "beside": 0.7, "scaled": 2.0}
    terms: dict[str, list] = {}
    for kind, modules in changes.items():
        for module, change in modules.items():
            for name, part in parts_of(change, target(module), base):
                terms.setdefault(name, []).append((strengths[kind], part))
    assert sum(len(of) == 3 for name, of in terms.items() if name.endswith("bias")) == len(biased) - 2
    live, tally = {name: values.clone() for name, values in base.items()}, formula.Tally(dtype)
    with lycore.Stack(live) as stack:
        for kind, file in files.items():
            stack.add(file, strengths[kind])
        assert stack.apply().changed == len(terms)
        for name, of in terms.items():
            tally.add(name, live[name], base[name], of)
    assert all(torch.equal(live[name], base[name]) for name in base)
    assert tally.elements and not tally.problems, tally.problems
    print(tally)


# Every way in.


@pytest.mark.parametrize("name", CASES)
@DTYPE
def test_checkpoints_and_single_weights_give_the_bits_of_a_stack(path, tmp_path, name, dtype):
    """File to file, and `weight_merge` of tensors in the host's hands, biases and norms too."""
    case = CASES[name]
    host = case.host()
    case.write(path, host, torch.float32)
    base = {name: values.to(dtype).contiguous() for name, values in parameters_of(host).items()}
    live, changes, target = merged_bits(path, base), formula.read(path), lycoris_target(host)
    save_file(base, tmp_path / "base.safetensors")
    report = lycore.merge(tmp_path / "base.safetensors", [(path, 0.7)], tmp_path / "merged.safetensors")
    merged, tensors = load_file(tmp_path / "merged.safetensors"), load_file(path)
    assert merged.keys() == live.keys()
    assert all(torch.equal(merged[name], live[name]) for name in live)
    count = 0
    for module, change in changes.items():
        own = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.")}
        for parameter, _ in parts_of(change, target(module), base):
            single = lycore.weight_merge(parameter, base[parameter].clone(), [(0.7, own, None)])
            assert torch.equal(single, live[parameter]), parameter
            assert not torch.equal(single, base[parameter]), parameter
            count += 1
    assert report["tensors"] == {"changed": count, "copied": len(base) - count}
