"""Training through torch's graph against the same LoRA written in torch. Needs the build with libtorch."""

from __future__ import annotations

import numpy
import pytest
from safetensors.numpy import load_file

import lycore

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = pytest.mark.usefixtures("torch_library")

CONFIG = {"network_dim": 3, "network_alpha": 1.5, "learning_rate": 1e-2, "seed": 5, "max_grad_norm": 0}
SCALE = 0.5


class Model(torch.nn.Module):
    """A convolution with everything unusual, a 1x1 one, and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, dilation=(1, 2), groups=1)
        self.point = torch.nn.Conv2d(6, 8, 1)
        self.first = torch.nn.Linear(8, 10)
        self.last = torch.nn.Linear(10, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.point(self.conv(x)))
        # Not contiguous: what a layer gets is not always row-major.
        x = x.flatten(2).transpose(1, 2)
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Model().requires_grad_(False)


@pytest.fixture
def batch():
    return torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(4))


def factors_of(network, tmp_path):
    """The network's factors as leaves, by layer: (down, up)."""
    network.save(tmp_path / "now.safetensors")
    saved = load_file(tmp_path / "now.safetensors")
    names = ("lora_down.weight", "lora_up.weight")
    return {
        layer: tuple(torch.from_numpy(saved[f"lora_unet_{layer}.{n}"]).double().requires_grad_() for n in names)
        for layer in network.names
    }


def reference(model, factors, x):
    """The same model in float64, with the LoRA written out."""
    wide = Model().double().requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    for name, (down, up) in factors.items():
        layer = getattr(wide, name)
        merged = layer.weight + SCALE * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        del layer.weight
        layer.weight = merged
    return wide(x.double())


def start_from_noise(network):
    """Fresh factors have up = 0, which hides half of the gradients."""
    network.parameters.copy_(torch.randn(network.parameters.shape, generator=torch.Generator().manual_seed(9)) * 0.2)
    network.refresh()


@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_output_and_gradients_are_those_of_torch(model, batch, tmp_path, input_needs_grad):
    base = model(batch)
    network = lycore.Network(CONFIG)
    assert network.attach(model) == ["conv", "point", "first", "last"]
    network.build()
    assert torch.equal(model(batch), base)
    start_from_noise(network)
    # Written where alignment leaves holes, noise must not count.
    factors = factors_of(network, tmp_path)
    assert network.parameter_count == sum(f.numel() for pair in factors.values() for f in pair)

    x = batch.clone().requires_grad_(input_needs_grad)
    wide = batch.double().clone().requires_grad_(input_needs_grad)
    y, want = model(x), reference(model, factors, wide)
    assert not torch.allclose(y, base, atol=1e-2)
    assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    want.square().sum().backward()
    if input_needs_grad:
        assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    norm = sum(f.grad.square().sum() for pair in factors.values() for f in pair).sqrt()
    gradients = network.gradients
    assert torch.allclose(gradients.double().norm(), norm, rtol=1e-5)
    flat = torch.sort(torch.cat([f.grad.flatten() for pair in factors.values() for f in pair]).abs())[0]
    found = torch.sort(gradients.double().abs())[0][-flat.numel() :]
    assert torch.allclose(found, flat, rtol=1e-4, atol=1e-5)

    done = network.step()
    assert (done["step"], done["updated"], done["learning_rate"]) == (1, True, 1e-2)
    assert done["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert network.gradients.abs().max() == 0


def test_training_lowers_the_loss_and_the_file_gives_the_same_output(model, batch, tmp_path):
    network = lycore.Network(CONFIG | {"output_name": "test"})
    network.attach(model, ["conv", "*st"])
    assert network.names == ["conv", "first", "last"]
    network.build("cpu")
    goal = torch.randn(model(batch).shape, generator=torch.Generator().manual_seed(8))
    losses = []
    for _ in range(40):
        loss = (model(batch) - goal).square().mean()
        loss.backward()
        network.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = model(batch).detach()
    path = tmp_path / "trained.safetensors"
    network.save(path, metadata={"own": "text"})
    network.detach()
    plain = model(batch)
    assert not torch.allclose(trained, plain, atol=1e-3)
    report = lycore.open(path).report()
    assert report["metadata"]["own"] == "text" and report["summary"]["modules"] == 3
    with lycore.Stack(model) as stack:
        stack.add(path)
        assert stack.apply().changed == 3
        assert torch.allclose(model(batch), trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(batch), plain)


def test_a_resumed_run_is_the_same_to_the_bit(model, batch, tmp_path):
    def run(network, steps):
        for _ in range(steps):
            model(batch).square().mean().backward()
            network.step()

    whole = lycore.Network(CONFIG)
    whole.attach(model)
    whole.build()
    run(whole, 3)
    whole.save_state(tmp_path / "state.safetensors")
    run(whole, 3)
    whole.detach()
    resumed = lycore.Network(CONFIG)
    resumed.attach(model)
    resumed.build()
    assert not torch.equal(resumed.parameters, whole.parameters)
    resumed.load_state(tmp_path / "state.safetensors")
    run(resumed, 3)
    assert torch.equal(resumed.parameters, whole.parameters)
    whole.save(tmp_path / "weights.safetensors")
    other = lycore.Network(CONFIG)
    resumed.detach()
    other.attach(model)
    other.build()
    assert other.load_weights(tmp_path / "weights.safetensors") == 4
    assert torch.equal(other.parameters, whole.parameters)


def test_autocast_and_half_inputs_give_the_layers_own_dtype(model, batch):
    network = lycore.Network(CONFIG)
    network.attach(model)
    network.build()
    start_from_noise(network)
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(batch)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), exact, rtol=0.05, atol=0.05)
    low.float().square().sum().backward()
    mixed = network.gradients.clone()
    network.zero_gradients()
    assert network.gradients.abs().max() == 0
    exact.square().sum().backward()
    assert torch.nn.functional.cosine_similarity(mixed, network.gradients, dim=0) > 0.999


def test_autocast_does_not_reach_the_librarys_arithmetic():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).to(torch.bfloat16).requires_grad_(False)
    network = lycore.Network(CONFIG)
    network.add("layer", layer)
    network.build()
    start_from_noise(network)
    x = torch.randn(16, 64).to(torch.bfloat16).requires_grad_()

    def outcome():
        network.zero_gradients()
        y = layer(x)
        y.backward(torch.ones_like(y))
        gradient, x.grad = x.grad, None
        return y.detach(), gradient, network.gradients.clone()

    plain = outcome()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outcome()
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


def test_layers_that_are_called_unusually(batch):
    torch.manual_seed(0)
    conv, same = torch.nn.Conv1d(4, 6, 3, padding="same", dilation=2), torch.nn.Conv1d(4, 6, 3, groups=2)
    layers = {"a": conv, "b": same}
    network = lycore.Network(CONFIG)
    for name, layer in layers.items():
        network.add(name, layer.requires_grad_(False))
    network.build()
    start_from_noise(network)
    x = torch.randn(2, 4, 11)
    for layer in layers.values():
        together = layer(x)
        for i in range(2):
            # Without the batch axis, by keyword.
            assert torch.allclose(layer(input=x[i]), together[i], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not conv(x).requires_grad
    kept = []
    conv.register_forward_hook(lambda *a: kept.append(a[2]))
    assert torch.allclose(conv(x), kept[-1])


def test_another_hook_keeps_the_output_that_it_saw(model, batch):
    seen = []
    model.last.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    base = model(batch)
    network = lycore.Network(CONFIG)
    network.attach(model, "last")
    network.build()
    start_from_noise(network)
    assert not torch.allclose(model(batch), base)
    assert torch.equal(seen[1], base)


def test_accumulation_counts_and_checkpointing_agrees(model, batch):
    from torch.utils.checkpoint import checkpoint

    network = lycore.Network(CONFIG | {"gradient_accumulation_steps": 2})
    network.attach(model)
    network.build()
    start_from_noise(network)
    model(batch).square().sum().backward()
    plain = network.gradients.clone()
    first = network.step()
    assert (first["updated"], first["step"]) == (False, 0)
    checkpoint(model, batch, use_reentrant=False).square().sum().backward()
    assert torch.allclose(network.gradients, 2 * plain, rtol=1e-5, atol=1e-6)
    second = network.step()
    assert (second["updated"], second["step"]) == (True, 1)


def test_views_outlive_the_network(model):
    network = lycore.Network(CONFIG)
    network.attach(model)
    network.build()
    values = network.parameters
    expected = values.clone()
    network.close()
    del network
    assert numpy.array_equal(values.numpy(), expected.numpy())


def test_errors_say_what_to_do(model, batch):
    with pytest.raises(lycore.ArgumentError, match=r"network_dimm.*network_dim") as caught:
        lycore.Network({"network_dimm": 4, "learning_rate": -1})
    assert "learning_rate" in caught.value.message
    assert "network_dim" in lycore.Network.schema()
    network = lycore.Network(CONFIG)
    with pytest.raises(lycore.AdapterKeyError) as keys:
        network.attach(model, ["nothing*"])
    assert "`conv`" in keys.value.hint
    with pytest.raises(lycore.UnsupportedError, match="ConvTranspose2d"):
        network.add("t", torch.nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(lycore.UnsupportedError, match="reflect"):
        network.add("t", torch.nn.Conv2d(2, 2, 3, padding_mode="reflect"))
    network.attach(model)
    with pytest.raises(lycore.TrainError) as train:
        model(batch)
    assert "build" in train.value.hint
    network.close()
    with pytest.raises(lycore.HandleError):
        network.build()
    model(batch)
