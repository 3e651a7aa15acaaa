"""Every method of PEFT that is read: folders that PEFT wrote, merged by LyCore, against the formula and PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import formula
import producers
import pytest
import torch
from peft import PeftModel
from peft_methods import CASES, Case, torch_butterfly, tuned_layers
from test_agreement import TOLERANCE
from test_algorithms import STRENGTHS, bypass
from test_files import (
    DTYPE,
    DTYPES,
    FORWARD,
    merged_like_the_formula,
    parameters_of,
    parts_of,
    peft_target,
    relative,
)
from threads import one_thread as one_thread
from torch.func import functional_call

import lycore

pytestmark = [pytest.mark.usefixtures("library"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]


def changes_of(path: Path) -> dict[str, formula.Change]:
    return formula.read(path, producers.peft_config(path))


def merged(host: torch.nn.Module, changes: dict[str, formula.Change], strength: float) -> torch.nn.Module:
    """By the formula, in float64."""
    exact = copy.deepcopy(host).double()
    parameters = dict(exact.named_parameters())
    pristine = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for module, change in changes.items():
        for name, part in parts_of(change, peft_target(module), pristine):
            parameters[name].data += torch.from_numpy(part.added(pristine[name], strength))
    return exact


@pytest.mark.parametrize("base", DTYPES, ids=["on-fp32", "on-fp16", "on-bf16"])
@DTYPE
def test_folders(case, tmp_path, dtype, base):
    host, model = case.model(dtype)
    path = case.write(tmp_path, model, dtype)
    changes = changes_of(path)
    assert {peft_target(module) for module in changes} == {f"{name}.weight" for name in case.layers}
    merged_like_the_formula(parameters_of(host), base, path, changes, peft_target, STRENGTHS)


@DTYPE
def test_peft_reads_its_folders_as_the_formula_does(case, tmp_path, dtype):
    """Its forward and its merge, of the model as made and as loaded, where they say the same."""
    host, made = case.model(dtype)
    path = case.write(tmp_path, made, dtype)
    changes, inputs = changes_of(path), host.inputs()
    with torch_butterfly(case.butterfly):
        loaded = PeftModel.from_pretrained(copy.deepcopy(host), tmp_path).eval()
    worst = {"forward": 0.0, "merge": 0.0}
    for model in (made, loaded):
        for strength in (1.0, 0.7) if case.linear else (1.0,):
            exact = merged(host, changes, strength)
            for name, layer in tuned_layers(model):
                if case.linear:
                    layer.scale_layer(strength)
                with torch_butterfly(case.butterfly), torch.no_grad():
                    if name not in case.not_forward:
                        got, want = layer(inputs[name]), exact.get_submodule(name)(widened(inputs[name]))
                        worst["forward"] = max(worst["forward"], relative(got, want))
                    plain = host.get_submodule(name)
                    assert relative(plain.weight, exact.get_submodule(name).weight) > 1e-2, "the adapter must show"
                    if name not in case.not_merge and strength == 1:
                        layer.merge()
                        for key, parameter in layer.get_base_layer().named_parameters():
                            want = getattr(exact.get_submodule(name), key)
                            worst["merge"] = max(worst["merge"], relative(parameter, want))
                        # Not `unmerge`, which rounds.
                        layer.merged_adapters.clear()
                        for key, parameter in layer.get_base_layer().named_parameters():
                            parameter.data.copy_(getattr(plain, key))
                if case.linear:
                    layer.unscale_layer()
    print(f"forward {worst['forward']:.2e}, merge {worst['merge']:.2e}")
    assert max(worst.values()) <= FORWARD, worst


def widened(x: torch.Tensor) -> torch.Tensor:
    """Indices of words stay as they are."""
    return x.double() if x.is_floating_point() else x


def test_the_bypass_is_the_merged_forward(case, tmp_path):
    """Of layers that multiply; with the bias that the module makes."""
    host, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    changes, worst = changes_of(path), {"bypass": 0.0, "merged": 0.0}
    base, inputs = copy.deepcopy(host), host.inputs()
    for strength in STRENGTHS:
        exact = merged(base, changes, strength)
        with lycore.Stack(parameters_of(host)) as stack:
            stack.add(path, strength)
            for name in case.layers:
                layer, x = host.get_submodule(name), inputs[name]
                want = exact.get_submodule(name)(widened(x))
                if x.is_floating_point():
                    bias = exact.get_submodule(name).bias
                    y = functional_call(layer, {} if bias is None else {"bias": bias.float()}, (x,)).contiguous()
                    worst["bypass"] = max(worst["bypass"], relative(bypass(stack, name, layer, x, y), want))
                    assert torch.equal(layer.weight, base.get_submodule(name).weight)
            stack.apply()
            for name in case.layers:
                want = exact.get_submodule(name)(widened(inputs[name]))
                worst["merged"] = max(worst["merged"], relative(host.get_submodule(name)(inputs[name]), want))
    assert all(torch.equal(p, q) for p, q in zip(host.parameters(), base.parameters(), strict=True))
    print(f"bypass {worst['bypass']:.2e}, merged {worst['merged']:.2e}")
    assert max(worst.values()) <= TOLERANCE, worst
