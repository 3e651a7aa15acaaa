"""What training refuses, in which words, and that nothing is changed then."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lycore

from .nets import LAYERS, attached, loss_of, net


def test_all_problems_of_a_config_come_in_one_message():
    config = {
        "network_dim": 0,
        "lerning_rate": 1e-3,
        "lr_sheduler": "cosine",
        "lr_scheduler": "liner",
        "max_train_steps": -5,
        "seed": "one",
        "mixed_precision": "fp8",
        "optimizer_args": {"beta": [0.9, 0.99], "eps": -1},
    }
    with pytest.raises(lycore.ArgumentError) as caught:
        lycore.Network(config)
    error = caught.value
    told = re.sub(r"\s+", " ", error.message)
    for part in [
        "9 problems",
        "`network_dim` is 0, expected a whole number, 1 to 65536",
        "`lerning_rate` is not an option; the nearest is `learning_rate`",
        "`lr_sheduler` is not an option; the nearest is `lr_scheduler`",
        '`lr_scheduler` is "liner", expected constant, constant_with_warmup, linear, cosine',
        "adafactor; the nearest is linear",
        "`max_train_steps` is -5",
        '`seed` is "one"',
        '`mixed_precision` is "fp8", expected no, bf16, fp16',
        "`optimizer_args.beta` is not an option; the nearest is `optimizer_args.betas`",
        "`optimizer_args.eps` is -1",
    ]:
        assert part in told, f"{part!r} is missing in: {told}"
    assert "schema" in error.hint and isinstance(error, ValueError)
    schema = lycore.Network.schema()
    for key in ("network_dim", "lr_scheduler", "optimizer_args", "gradient_accumulation_steps"):
        assert any(line.startswith(key) for line in schema.splitlines())


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"lr_scheduler": "cosine"}, "cosine needs max_train_steps"),
        ({"lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1}, "max_train_steps, which is missing"),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 9, "max_train_steps": 8}, "more than max_train_steps"),
        ({"optimizer_type": "Prodigal"}, "expected AdamW"),
        ({"optimizer_type": "Lyon", "optimizer_args": {"eps": "what"}}, "the nearest is Lion"),
        ({"optimizer_type": "lion", "optimizer_args": {"beta": 1}}, "the nearest is `optimizer_args.betas`"),
        ({"lr_scheduler": "linear"}, "linear needs max_train_steps"),
        ({"optimizer_type": "Adafactor", "learning_rate": 1e-3}, "set optimizer_args.relative_step to false"),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "constant"}, "relative_step go together"),
        ({"lr_scheduler": "adafactor"}, "relative_step go together"),
        (
            {"optimizer_type": "Adafactor", "optimizer_args": {"relative_step": False, "warmup_init": True}},
            "`optimizer_args.warmup_init` needs relative_step",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "linear", "max_train_steps": 9},
            "AdamWScheduleFree averages instead; use constant or constant_with_warmup",
        ),
        ({"optimizer_type": "RAdamScheduleFree", "optimizer_args": {"betas": [0, 0.9]}}, "the first above 0"),
        ({"lr_scheduler_power": 2}, "says nothing to lr_scheduler constant"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0"),
        ({"network_alpha": -1}, "`network_alpha` is -1"),
    ],
)
def test_options_that_contradict_each_other(config, part):
    with pytest.raises(lycore.ArgumentError, match=re.escape(part)):
        lycore.Network(config)


def test_a_config_is_a_mapping_a_text_or_a_file(tmp_path):
    mapping = {"network_dim": 3, "learning_rate": 0.125, "optimizer_args": {"betas": [0.5, 0.75]}}
    toml = "network_dim = 3\nlearning_rate = 0.125\n[optimizer_args]\nbetas = [0.5, 0.75]\n"
    (tmp_path / "run.toml").write_text("\ufeff" + toml)
    (tmp_path / "run.json").write_text(json.dumps(mapping, indent=2))
    states = set()
    for config in (mapping, json.dumps(mapping), toml, tmp_path / "run.toml", tmp_path / "run.json"):
        network = lycore.Network(config)
        network.add("layer", nn.Linear(4, 4))
        network.build()
        network.save_state(tmp_path / "state.safetensors")
        with safe_open(tmp_path / "state.safetensors", "pt") as file:
            states.add(file.metadata()["config"])
    assert len(states) == 1
    assert json.loads(states.pop())["optimizer_args"]["betas"] == [0.5, 0.75]


def test_defects_of_a_config_are_told_with_file_and_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\nseed = 2\nnetwork_dim 3\n")
    with pytest.raises(lycore.ArgumentError) as caught:
        lycore.Network(path)
    for part in [f"{path}: training configuration, 2 problems: ", "line 2, `seed = 2`", "line 3, `network_dim 3`"]:
        assert part in caught.value.message
    assert caught.value.file == str(path)
    path.write_text("netwrk_dim = 3\nlearning_rate = nan\n")
    with pytest.raises(lycore.ArgumentError, match=r"nearest is `network_dim`; `learning_rate` is \"nan\""):
        lycore.Network(path)
    with pytest.raises(lycore.ArgumentError, match="not JSON: expected `:` at line 2"):
        lycore.Network('{"seed": 1,\n"network_dim" 3}')
    with pytest.raises(lycore.ArgumentError, match=r"`seed` stands twice; `optimizer_args\.eps` stands twice"):
        lycore.Network('{"seed": 1, "seed": 1, "optimizer_args": {"eps": 1, "eps": 2}}')
    with pytest.raises(lycore.FileError, match="missing"):
        lycore.Network(tmp_path / "missing.toml")
    with pytest.raises(lycore.ArgumentError, match="NUL"):
        lycore.Network("seed = 1\n\0network_dim = 3")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(value, tmp_path):
    model = net()
    network = attached(model, {"learning_rate": 1e-2})
    for number in range(3):
        loss_of(model, number).backward()
        network.step()
    before = network.parameters.clone()
    network.save_state(tmp_path / "before.safetensors")
    (loss_of(model, 3) * value).backward()
    for _ in range(2):
        with pytest.raises(lycore.TrainError) as caught:
            network.step()
        assert "the gradient of step 4 is not finite" in caught.value.message
        assert "nothing was changed" in caught.value.message
        assert "zero_gradients" in caught.value.hint
        assert torch.equal(network.parameters, before)
    network.zero_gradients()
    network.save_state(tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    loss_of(model, 3).backward()
    done = network.step()
    assert done["step"] == 4 and done["updated"] and not torch.equal(network.parameters, before)


def test_an_input_of_another_shape_or_dtype_names_the_layer():
    layer = nn.Linear(7, 5).double()
    network = lycore.Network({"network_dim": 2})
    network.add("some.layer", layer)
    network.build()
    with pytest.raises(lycore.DtypeError, match=r"some\.layer"):
        layer(torch.zeros(3, 7, dtype=torch.float64))


def test_an_attach_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), nn.Linear(4, 4))
    network = lycore.Network({"network_dim": 2})
    with pytest.raises(lycore.UnsupportedError, match="circular"):
        network.attach(model)
    assert not any(layer._forward_hooks for layer in model) and network.names == []
    # And the network can still be put on the others.
    assert network.attach(model, ["0", "2"]) == ["0", "2"]
    with pytest.raises(lycore.ArgumentError, match="registered already"):
        network.attach(model, ["2"])
    assert [len(layer._forward_hooks) for layer in model] == [1, 0, 1]


def test_a_layer_that_torch_never_calls_is_refused():
    """MultiheadAttention reads the weight of its `out_proj`; a module on it would never learn."""
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert lycore.Network().attach(model) == ["linear1", "linear2"]
    with pytest.raises(lycore.UnsupportedError, match="self_attn"):
        lycore.Network().add("self_attn.out_proj", model.self_attn.out_proj)


def test_a_bank_of_experts_is_no_linear_layer():
    """ComfyUI's has the sizes of one expert and a weight of all; its model asks it for experts and never calls it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    model[1].in_features = model[1].out_features = 4
    model[1].weight = nn.Parameter(torch.zeros(2, 4, 4))
    assert lycore.Network().attach(model) == ["0"]
    with pytest.raises(lycore.UnsupportedError, match="is a Module"):
        lycore.Network().add("1", model[1])
    model[1].weight = nn.Parameter(torch.zeros(4, 4))
    assert lycore.Network().attach(model) == ["0", "1"]


def test_attach_chooses_layers_by_pattern_by_function_or_takes_all():
    for targets, expected in [
        (None, LAYERS),
        ("mlp.*", ["mlp.0", "mlp.2"]),
        (["stem", "*.point"], ["stem", "body.point"]),
        (lambda name, layer: isinstance(layer, nn.Linear) and layer.bias is None, ["mlp.2"]),
    ]:
        network = lycore.Network()
        assert network.attach(net(), targets) == expected
