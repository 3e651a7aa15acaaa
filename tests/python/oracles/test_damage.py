"""Modules of LoHa, LoKr, full and (IA)^3 that are wrong, or more than this version knows, in files of LyCORIS."""

from __future__ import annotations

from collections.abc import Callable

import formula
import pytest
import torch
from algorithms import CASES
from safetensors.torch import load_file, save_file
from test_algorithms import module_of
from test_algorithms import path as path
from test_files import lycoris_target, weights_of
from threads import one_thread as one_thread

import lycore

pytestmark = pytest.mark.usefixtures("library")


def without(slot: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(slot)


def put(slot: str, value: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Callable:
    return lambda tensors: tensors.__setitem__(slot, value(tensors))


def ones(*shape: int) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda _: torch.ones(shape)


LINEAR, CONV = "lycoris_wide", "lycoris_plane"
"""[160, 144] and [32, 20, 3, 3]."""
DAMAGES = {
    "loha-no-w2_b": ("loha-r7", LINEAR, without("hada_w2_b"), "malformed", "hada_w2_b"),
    "loha-no-w1_a": ("loha-r7", LINEAR, without("hada_w1_a"), "malformed", "hada_w1_a"),
    "loha-ranks-differ": ("loha-r7", LINEAR, put("hada_w1_b", ones(6, 144)), "malformed", ""),
    "loha-halves-differ": ("loha-r7", LINEAR, put("hada_w2_a", ones(150, 7)), "malformed", ""),
    "loha-other-weight": ("loha-r7", LINEAR, lambda t: [put(f"hada_w{n}_b", ones(7, 143))(t) for n in (1, 2)],
                          "malformed", "143"),
    "loha-one-core": ("loha-r7-tucker", CONV, without("hada_t2"), "malformed", "hada_t2"),
    "loha-dora": ("loha-r7", LINEAR, put("dora_scale", ones(160, 1)), "unsupported", "DoRA"),
    "lokr-no-w2": ("lokr-r16-f8", LINEAR, without("lokr_w2"), "malformed", "lokr_w2"),
    "lokr-no-w1_b": ("lokr-r1-both", LINEAR, without("lokr_w1_b"), "malformed", "lokr_w1_b"),
    "lokr-ranks-differ": ("lokr-r7-f4", LINEAR, put("lokr_w2_b", ones(6, 36)), "malformed", ""),
    "lokr-core-of-other-rank": ("lokr-r7-f4-tucker", "lycoris_wide_plane", put("lokr_t2", ones(7, 6, 3, 3)),
                                "malformed", ""),
    "lokr-rows": ("lokr-r16-f8", LINEAR, put("lokr_w1", ones(7, 8)), "malformed", "140"),
    "lokr-columns": ("lokr-r16-f8", LINEAR, put("lokr_w1", ones(8, 7)), "malformed", "126"),
    "lokr-dora": ("lokr-r7-f4", LINEAR, put("dora_scale", ones(160, 1)), "unsupported", "DoRA"),
    "full-other-weight": ("full", LINEAR, put("diff", ones(144, 160)), "malformed", "144"),
    "full-bias": ("full", LINEAR, put("diff_b", ones(160)), "unsupported", "diff_b"),
    "ia3-too-short": ("ia3", LINEAR, put("weight", ones(159)), "malformed", "159"),
    "ia3-other-axis": ("ia3", LINEAR, put("on_input", lambda _: torch.tensor(1)), "malformed", ""),
    "ia3-a-matrix": ("ia3", LINEAR, put("weight", ones(2, 80)), "malformed", ""),
    "ia3-no-on_input": ("ia3", LINEAR, without("on_input"), "malformed", "on_input"),
    "ia3-no-vector": ("ia3", LINEAR, without("weight"), "malformed", "weight"),
    "ia3-on_input-of-two": ("ia3", LINEAR, put("on_input", ones(2)), "malformed", "on_input"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_module_that_is_wrong_stops_no_other(path, name):
    """Each of its keys is in the report with the reason, and the rest of the file is merged as if it were not there."""
    of, module, change, status, word = DAMAGES[name]
    case = CASES[of]
    host = case.host()
    case.write(path, host, None)
    tensors = load_file(path)
    wrong = {key.removeprefix(f"{module}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{module}.")}
    assert wrong
    rest = path.with_name("rest.safetensors")
    save_file(tensors, rest)
    change(wrong)
    save_file(tensors | {f"{module}.{slot}": value for slot, value in wrong.items()}, path)
    base, target = weights_of(host), lycoris_target(host)
    live, tally = {name: weight.clone() for name, weight in base.items()}, formula.Tally(torch.float32)
    with lycore.Stack(live) as stack:
        report = stack.add(path, 0.7).report()
        states = {key["key"]: key for key in report["keys"]}
        assert len(states) == len(tensors) + len(wrong)
        for slot in wrong:
            state = states.pop(f"{module}.{slot}")
            assert state["status"] == status, state
            assert word in state["reason"], state
            print(state["reason"])
        assert {state["status"] for state in states.values()} == {"matched"}
        changes = formula.read(rest)
        assert stack.apply().changed == len(changes)
        for other, expected in changes.items():
            tally.add(other, live[target(other)], base[target(other)], [(0.7, expected)])
        assert torch.equal(live[target(module)], base[target(module)])
    tally.check()


def test_a_bias_makes_a_full_module_unsupported(path):
    """LyCORIS writes `diff_b` for every layer that has one: said, rather than merged without it."""
    host = CASES["loha-r1"].host()
    CASES["full"].write(path, host, torch.float32)
    biased = {module_of(name) for name in host.inputs() if host.get_submodule(name).bias is not None}
    with lycore.open(path) as adapter:
        report = adapter.report()
        assert {module.name for module in adapter.modules} == {module_of(n) for n in host.inputs()} - biased
    for key in report["keys"]:
        unusable = key["key"].split(".")[0] in biased
        assert key["status"] == ("unsupported" if unusable else "readable"), key
        assert not unusable or "diff_b" in key["reason"]
