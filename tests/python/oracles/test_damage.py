"""Modules of every algorithm that are wrong, in files of LyCORIS and PEFT: one sentence says so, the rest is merged."""

from __future__ import annotations

import json
from collections.abc import Callable

import formula
import peft_methods
import producers
import pytest
import torch
from algorithms import CASES
from safetensors.torch import load_file, save_file
from test_algorithms import module_of
from test_algorithms import path as path
from test_files import lycoris_target, parameters_of, parts_of, peft_target
from threads import one_thread as one_thread

import lycore

pytestmark = pytest.mark.usefixtures("library")


def without(slot: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(slot)


def put(slot: str, value: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Callable:
    return lambda tensors: tensors.__setitem__(slot, value(tensors))


def ones(*shape: int) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda _: torch.ones(shape)


def rename(slot: str, to: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(to, tensors.pop(slot))


def with_nan(slot: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[slot] = tensors[slot].clone()
        tensors[slot].view(-1)[3] = float("nan")

    return change


def only(slot: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(other) for other in list(tensors) if other != slot]


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
    "lokr-no-w2": ("lokr-r16-f8", LINEAR, without("lokr_w2"), "malformed", "lokr_w2"),
    "lokr-no-w1_b": ("lokr-r1-both", LINEAR, without("lokr_w1_b"), "malformed", "lokr_w1_b"),
    "lokr-ranks-differ": ("lokr-r7-f4", LINEAR, put("lokr_w2_b", ones(6, 36)), "malformed", ""),
    "lokr-core-of-other-rank": ("lokr-r7-f4-tucker", "lycoris_wide_plane", put("lokr_t2", ones(7, 6, 3, 3)),
                                "malformed", ""),
    "lokr-rows": ("lokr-r16-f8", LINEAR, put("lokr_w1", ones(7, 8)), "malformed", "140"),
    "lokr-columns": ("lokr-r16-f8", LINEAR, put("lokr_w1", ones(8, 7)), "malformed", "126"),
    # Beside a difference of the bias that fits, that one would be applied all the same.
    "full-other-weight": ("full", LINEAR, lambda t: [only("diff")(t), put("diff", ones(144, 160))(t)], "malformed",
                          "144"),
    "dora-no-up": ("dora-lora-out", LINEAR, without("lora_up.weight"), "malformed", "lora_up"),
    "dora-no-factors": ("dora-lora-out", LINEAR, only("dora_scale"), "malformed", "no factors"),
    "dora-other-axis": ("dora-lora-out", LINEAR, put("dora_scale", ones(144, 1)), "malformed", "144"),
    "dora-other-axis-in": ("dora-lora-in", CONV, put("dora_scale", ones(1, 32, 1, 1)), "malformed", "32"),
    "dora-too-short": ("dora-lora-out", LINEAR, put("dora_scale", ones(159)), "malformed", "159"),
    "dora-a-matrix": ("dora-lokr-out", LINEAR, put("dora_scale", ones(160, 144)), "malformed", "dora_scale"),
    "dora-both": ("dora-loha-out", LINEAR, put("lora_magnitude_vector", ones(160)), "malformed",
                  "lora_magnitude_vector"),
    "dora-on-glora": ("glora-r7", LINEAR, put("dora_scale", ones(160, 1)), "malformed", "GLoRA"),
    "dora-on-oft": ("oft-4", LINEAR, put("dora_scale", ones(160, 1)), "malformed", "OFT"),
    "glora-no-a2": ("glora-r7", LINEAR, without("a2.weight"), "malformed", "a2.weight"),
    "glora-ranks-differ": ("glora-r7", LINEAR, put("b2.weight", ones(6, 144)), "malformed", "b2"),
    "glora-other-weight": ("glora-r7", LINEAR, put("b1.weight", ones(150, 7)), "malformed", "150"),
    "glora-other-kernel": ("glora-r7", CONV, put("b2.weight", ones(16, 20, 3, 2)), "malformed", "2"),
    "glora-flat": ("glora-r7", LINEAR, put("a1.weight", ones(144)), "malformed", "144"),
    "oft-not-square": ("oft-4", LINEAR, put("oft_blocks", ones(40, 4, 5)), "malformed", "5"),
    "oft-a-matrix": ("oft-4", LINEAR, put("oft_blocks", ones(160, 4)), "malformed", "oft_blocks"),
    "oft-too-few-rows": ("oft-4", LINEAR, put("oft_blocks", ones(39, 4, 4)), "malformed", "156"),
    "oft-nan": ("oft-4", LINEAR, with_nan("oft_blocks"), "malformed", "finite"),
    "oft-nan-bound": ("oft-8-bound", LINEAR, with_nan("oft_blocks"), "malformed", "finite"),
    "oft-infinite-bound": ("oft-8-bound", LINEAR, put("alpha", lambda _: torch.tensor(float("inf"))), "malformed",
                           "alpha"),
    "oft-rescale-too-short": ("oft-4-rescaled", LINEAR, put("rescale", ones(150, 1)), "malformed", "rescale"),
    "oft-twice": ("oft-4", LINEAR, put("oft_diag", ones(40, 4, 4)), "malformed", "oft_diag"),
    "oft-no-blocks": ("oft-4-rescaled", LINEAR, only("rescale"), "malformed", "oft_blocks"),
    "oft-no-first-part": ("oft-4", LINEAR, rename("oft_blocks", "oft_blocks.1"), "malformed", "oft_blocks.0"),
    "oft-scalar": ("oft-4", LINEAR, put("scalar", lambda _: torch.tensor(0.5)), "malformed", "scalar"),
    "oft-empty": ("oft-4", LINEAR, put("oft_blocks", lambda _: torch.zeros(0, 4, 4)), "malformed", "empty"),
    "boft-not-square": ("boft-10", LINEAR, put("oft_blocks", ones(5, 16, 10, 9)), "malformed", "butterfly"),
    "boft-odd": ("boft-10", LINEAR, put("oft_blocks", ones(2, 32, 5, 5)), "malformed", "butterfly"),
    "boft-too-many-stages": ("boft-10", LINEAR, put("oft_blocks", ones(6, 16, 10, 10)), "malformed", "butterfly"),
    "boft-stages-that-overflow": ("boft-10", LINEAR, put("oft_blocks", ones(70, 2, 2, 2)), "malformed", "butterfly"),
    "boft-other-weight": ("boft-10", LINEAR, put("oft_blocks", ones(2, 14, 10, 10)), "malformed", "140"),
    "boft-nan": ("boft-10", LINEAR, with_nan("oft_blocks"), "malformed", "finite"),
    "boft-rescale-too-long": ("boft-10-rescaled", LINEAR, put("rescale", ones(161, 1)), "malformed", "rescale"),
    "tlora-no-lambda": ("tlora-r3", LINEAR, without("lambda_layer"), "malformed", "lambda_layer"),
    "tlora-ranks-differ": ("tlora-r3", LINEAR, put("lambda_layer", ones(1, 4)), "malformed", "lambda"),
    "tlora-other-weight": ("tlora-r3", LINEAR, put("q_layer.weight", ones(3, 143)), "malformed", "143"),
    "norm-too-long": ("lora-and-norms", "lycoris_layer_norm", lambda t: [put(n, ones(49))(t) for n in list(t)],
                      "malformed", "49"),
    "norm-beside-factors": ("lora-and-norms", LINEAR, put("w_norm", ones(160)), "malformed", "w_norm"),
    "set-beside-factors": ("lora-and-norms", LINEAR, put("set_weight", ones(160, 144)), "malformed", "set_weight"),
    "set-other-weight": ("full", LINEAR, lambda t: [t.clear(), put("set_weight", ones(144, 160))(t)], "malformed",
                         "144"),
    "scalar-of-two": ("lora-scalar", LINEAR, put("scalar", ones(2)), "malformed", "scalar"),
    "scalar-nan": ("lora-scalar", LINEAR, put("scalar", lambda _: torch.tensor(float("nan"))), "malformed", "scalar"),
    "grown-by-a-half": ("lora-scalar", LINEAR, put("reshape_weight", lambda _: torch.tensor([160.5, 144])), "malformed",
                        "reshape_weight"),
    "grown-to-six-axes": ("lora-scalar", LINEAR, put("reshape_weight", ones(6)), "malformed", "reshape_weight"),
    "grown-in-a-stack": ("lora-scalar", LINEAR, lambda t: [put("lora_down.weight", ones(7, 200))(t),
                         put("reshape_weight", lambda _: torch.tensor([160, 200]))(t)], "malformed", "grow"),
    "sparse-bias": ("lora-scalar", LINEAR, put("bias_values", ones(3)), "unsupported", "bias_values"),
    "ia3-too-short": ("ia3", LINEAR, put("weight", ones(159)), "malformed", "159"),
    "ia3-other-axis": ("ia3", LINEAR, put("on_input", lambda _: torch.tensor(1)), "malformed", ""),
    "ia3-a-matrix": ("ia3", LINEAR, put("weight", ones(2, 80)), "malformed", ""),
    "ia3-no-on_input": ("ia3", LINEAR, without("on_input"), "malformed", "on_input"),
    "ia3-no-vector": ("ia3", LINEAR, without("weight"), "malformed", "weight"),
    "ia3-on_input-of-two": ("ia3", LINEAR, put("on_input", ones(2)), "malformed", "on_input"),
}  # fmt: skip


TO_Q, PLANE = "base_model.model.blocks.0.attn.to_q", "base_model.model.plane"
"""[64, 72] and [32, 20, 3, 3]."""
PEFT_DAMAGES = {
    "dora-vector-too-short": ("dora-r7", TO_Q, put("lora_magnitude_vector", ones(72)), "malformed", "72"),
    "dora-vector-of-inputs": ("dora-r7", PLANE, put("lora_magnitude_vector", ones(1, 20, 1, 1)), "malformed", "20"),
    "vera-no-lambda_d": ("vera", TO_Q, without("vera_lambda_d"), "malformed", "vera_lambda_d"),
    "vera-other-rank": ("vera", TO_Q, put("vera_lambda_d", ones(8)), "malformed", "8"),
    "vera-too-many-rows": ("vera", TO_Q, put("vera_lambda_b", ones(97)), "malformed", "97"),
    "vera-other-rows": ("vera", TO_Q, put("vera_lambda_b", ones(63)), "malformed", "63"),
    "oft-no-triangle": ("oft-exact", TO_Q, put("oft_R.weight", ones(18, 5)), "malformed", "triangle"),
    "oft-too-few-columns": ("oft-exact", TO_Q, put("oft_R.weight", ones(17, 6)), "malformed", "68"),
    "oft-a-vector": ("oft-exact", TO_Q, put("oft_R.weight", ones(18)), "malformed", "oft_R"),
    "oft-nan": ("oft-exact", TO_Q, with_nan("oft_R.weight"), "malformed", "finite"),
    "oft-nan-series": ("oft-series-5", TO_Q, with_nan("oft_R.weight"), "malformed", "finite"),
    "boft-not-square": ("boft-b4-2", TO_Q, put("boft_R", ones(2, 18, 4, 3)), "malformed", "butterfly"),
    "boft-stages": ("boft-b4-2", TO_Q, put("boft_R", ones(3, 18, 4, 4)), "malformed", "butterfly"),
    "boft-other-weight": ("boft-b4-2", TO_Q, put("boft_R", ones(2, 16, 4, 4)), "malformed", "64"),
    "boft-scale-too-short": ("boft-b4-2", TO_Q, put("boft_s", ones(63, 1)), "malformed", "boft_s"),
    "boft-nan": ("boft-b4", TO_Q, with_nan("boft_R"), "malformed", "finite"),
    "ia3-too-short": ("ia3", TO_Q, put("ia3_l", ones(1, 71)), "malformed", "71"),
    "ia3-a-matrix": ("ia3", TO_Q, put("ia3_l", ones(2, 36)), "malformed", "ia3_l"),
    "embedding-ranks-differ": ("embedding", "base_model.model.words", put("lora_embedding_B", ones(24, 4)),
                               "malformed", "4"),
    "embedding-no-A": ("embedding", "base_model.model.words", without("lora_embedding_A"), "malformed",
                       "lora_embedding_A"),
    "embedding-other-words": ("embedding", "base_model.model.words", put("lora_embedding_A", ones(5, 91)),
                              "malformed", "91"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_module_that_is_wrong_stops_no_other(path, name):
    of, module, change, status, word = DAMAGES[name]
    case = CASES[of]
    host = case.host()
    case.write(path, host, None)
    only_this_is_wrong(path, host, module, change, status, word, None, lycoris_target(host))


@pytest.mark.parametrize("name", PEFT_DAMAGES)
def test_a_module_of_peft_that_is_wrong_stops_no_other(tmp_path, name):
    of, module, change, status, word = PEFT_DAMAGES[name]
    case = peft_methods.CASES[of]
    host, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    only_this_is_wrong(path, host, module, change, status, word, producers.peft_config(path), peft_target)


def only_this_is_wrong(path, host, module, change, status, word, config, target) -> None:
    """Each key of the module is in the report with the reason, and the rest of the file is merged as if it were not
    there.
    """
    tensors = load_file(path)
    wrong = {key.removeprefix(f"{module}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{module}.")}
    assert wrong
    save_file(tensors, path)
    changes = formula.read(path, config)
    change(wrong)
    save_file(tensors | {f"{module}.{slot}": value for slot, value in wrong.items()}, path)
    base = parameters_of(host)
    live, tally = {name: values.clone() for name, values in base.items()}, formula.Tally(torch.float32)
    parts = [(other, *part) for other, c in changes.items() for part in parts_of(c, target(other), base)]
    with lycore.Stack(live) as stack:
        report = stack.add(path, 0.7).report()
        states = {key["key"]: key for key in report["keys"]}
        assert len(states) == len(tensors) + len(wrong)
        for slot in wrong:
            state = states.pop(f"{module}.{slot}")
            assert state["status"] == status, state
            assert word in state["reason"], state
            assert len(state["reason"]) < 400, state
            print(state["reason"])
        assert {s["status"] for key, s in states.items() if not key.startswith("base_model.vera_")} == {"matched"}
        assert stack.apply().changed == len(parts)
        for other, name, expected in parts:
            tally.add(other, live[name], base[name], [(0.7, expected)])
        touched = {name for _, name, _ in parts}
        assert all(torch.equal(live[name], base[name]) for name in live if name not in touched)
    assert tally.elements and not tally.problems, tally.problems


def test_vera_without_its_projections(tmp_path):
    """`save_projection=False` leaves them out: nothing of the file can be applied."""
    case = peft_methods.CASES["vera"]
    _, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    save_file({key: v for key, v in load_file(path).items() if "vera_A" not in key}, path)
    with pytest.raises(lycore.UnsupportedError, match="vera_A"):
        lycore.open(path)


def test_what_to_do_is_said_with_what_is_missing(tmp_path):
    """Both are in the user's hands: the projections, and the configuration that lies beside a file."""
    case = peft_methods.CASES["vera"]
    _, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    save_file({key: v for key, v in load_file(path).items() if "vera_A" not in key}, path)
    with pytest.raises(lycore.UnsupportedError, match="save_projection"):
        lycore.open(path)
    case = peft_methods.CASES["ia3"]
    _, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    (tmp_path / "adapter_config.json").unlink()
    with lycore.open(path) as adapter:
        reasons = [json.dumps(key) for key in adapter.report()["keys"] if key["status"] == "unsupported"]
    assert reasons
    assert all("adapter_config.json" in reason for reason in reasons), reasons


def test_shared_projections_are_matched_with_their_modules(tmp_path):
    """Nothing in the report of a file that is applied as a whole is left open."""
    case = peft_methods.CASES["vera"]
    host, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    report = lycore.Stack(parameters_of(host)).add(path).report()
    assert {key["key"]: key["status"] for key in report["keys"]} == dict.fromkeys(load_file(path), "matched")


def test_ia3_of_a_convolution_without_its_configuration(tmp_path):
    """The shape does not say whether outputs or inputs are scaled, and nothing is guessed."""
    case = peft_methods.CASES["ia3"]
    host, model = case.model(torch.float32)
    path = case.write(tmp_path, model, torch.float32)
    (tmp_path / "adapter_config.json").unlink()
    report = lycore.Stack(parameters_of(host)).add(path).report()
    for key in report["keys"]:
        told = key["key"].split(".")[-2] in ("to_q", "0", "time_emb_proj")
        assert key["status"] == ("matched" if told else "unsupported"), key
        assert told or "does not say which channels" in key["reason"], key


def test_a_bias_that_the_host_does_not_have(path):
    """The weights are changed all the same; of each bias it is said that nothing has its name."""
    host = CASES["full"].host()
    CASES["full"].write(path, host, torch.float32)
    weights = {name: values for name, values in parameters_of(host).items() if name.endswith("weight")}
    live = {name: values.clone() for name, values in weights.items()}
    with lycore.Stack(live) as stack:
        report = stack.add(path).report()
        assert {key["key"].split(".")[-1]: key["status"] for key in report["keys"]} == {
            "diff": "matched",
            "diff_b": "unmatched",
        }
        assert stack.apply().changed == len(weights)
        assert not any(torch.equal(live[name], weights[name]) for name in live)


def test_a_bias_that_does_not_fit(path):
    """Its own key says so; the weight beside it is changed."""
    host = CASES["full"].host()
    CASES["full"].write(path, host, torch.float32)
    save_file(load_file(path) | {f"{module_of('wide')}.diff_b": torch.ones(150)}, path)
    base = parameters_of(host)
    live = {name: values.clone() for name, values in base.items()}
    with lycore.Stack(live) as stack:
        states = {key["key"]: key for key in stack.add(path).report()["keys"]}
        stack.apply()
        assert torch.equal(live["wide.bias"], base["wide.bias"])
        assert not torch.equal(live["wide.weight"], base["wide.weight"])
    assert states.pop("lycoris_wide.diff_b")["status"] == "malformed"
    assert {state["status"] for state in states.values()} == {"matched"}
