"""Steps that are not waited for, the average of the parameters, and what cannot be captured."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lycore

from .nets import attached, key_of, loss_of, net

CONFIG = {"learning_rate": 1e-2, "lr_scheduler": "cosine", "max_train_steps": 20, "gradient_accumulation_steps": 2}


def test_a_step_that_is_not_waited_for_is_the_same_step():
    model, other = net(), net()
    waited, ahead = attached(model, CONFIG), attached(other, CONFIG)
    for number in range(10):
        loss_of(model, number).backward()
        told = waited.step()
        loss_of(other, number).backward()
        assert ahead.step(wait=False) is None
    assert torch.equal(ahead.parameters, waited.parameters)
    assert ahead.results() == told
    assert (told["step"], told["updated"], told["skipped"]) == (5, True, 0)


def test_a_gradient_that_is_not_finite_is_left_out_and_told():
    network = attached(net(), CONFIG | {"gradient_accumulation_steps": 1}, noise=0.1)
    before = network.parameters.clone()
    for bad in (float("nan"), float("inf")):
        network.gradients[5] = bad
        network.step(wait=False)
        assert network.gradients.abs().max() == 0
    assert torch.equal(network.parameters, before)
    told = network.results()
    assert (told["step"], told["updated"], told["skipped"]) == (0, False, 2)
    assert network.results()["skipped"] == 0


def test_the_average_and_its_file(tmp_path):
    model = net()
    network = attached(model, CONFIG | {"ema_decay": 0.75, "scale_weight_norms": 0.05}, noise=0.1)
    network.refresh()
    want = network.parameters.double()
    for number in range(12):
        loss_of(model, number).backward()
        if network.step()["updated"]:
            want = 0.75 * want + 0.25 * network.parameters.double()
    # Six roundings to fp32 of values below 1.
    assert (network.ema.double() - want).abs().max() < 1e-6
    assert (network.ema - network.parameters).abs().max() > 1e-3
    network.save(tmp_path / "ema.safetensors", ema=True)
    network.save(tmp_path / "plain.safetensors")
    ema, plain = (load_file(tmp_path / f"{name}.safetensors") for name in ("ema", "plain"))
    assert ema.keys() == plain.keys() and not torch.equal(*(f[key_of("stem", "up")] for f in (ema, plain)))
    network.load_weights(tmp_path / "ema.safetensors")
    values = torch.cat([ema[key_of(layer, "down")].flatten() for layer in ("stem", "mlp.0")])
    assert torch.isin(values, network.parameters).all()


def test_without_an_average_there_is_none(tmp_path):
    network = attached(net())
    with pytest.raises(lycore.TrainError) as told:
        network.save(tmp_path / "ema.safetensors", ema=True)
    assert "ema_decay" in told.value.hint and not (tmp_path / "ema.safetensors").exists()
    with pytest.raises(lycore.TrainError):
        _ = network.ema


def test_what_cannot_be_captured_says_what_can():
    model = net()
    network = attached(model)
    loss_of(model, 0).backward()
    before = network.gradients.clone()
    with pytest.raises(lycore.UnsupportedError, match="AdamW on the CPU") as told:
        network.capture(lambda: network.step(wait=False))
    assert "all optimizers can but Prodigy" in told.value.hint
    assert torch.equal(network.gradients, before)
