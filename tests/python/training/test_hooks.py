"""The modules in torch's graph: whatever way a layer is called, values and gradients are those of the formula."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lycore

from .nets import RANK, Factors, attached, batch, explicit, fill, key_of, loss_of, net, off

EXACT = 1e-5
"""Relative, for fp32 beside the formula in float64."""


class One:
    """One layer with a module of random values, and what the formula says about it."""

    def __init__(self, layer: nn.Module, folder: Path, **config: object) -> None:
        self.layer, self.scale = layer.requires_grad_(False), 3 / RANK
        self.plain = copy.deepcopy(layer)
        self.network = lycore.Network({"network_dim": RANK, "network_alpha": 3, **config})
        self.network.add("layer", layer)
        self.network.build()
        fill(self.network, 0.3)
        self.factors = Factors(self.network, folder)
        self.down, self.up = (self.factors.values()[key_of("layer", f)] for f in ("down", "up"))

    def expected(self, x: torch.Tensor, grad_y: torch.Tensor, calls: int = 1):
        """Output, gradient of x, of down and of up, in float64."""
        leaves = [t.detach().double().requires_grad_() for t in (x, self.down, self.up)]
        y = leaves[0]
        for _ in range(calls):
            y = explicit(self.plain, y, *leaves[1:], self.scale)
        return y.detach(), *torch.autograd.grad(y, leaves, grad_y.double())

    def gradients(self) -> list[torch.Tensor]:
        found = self.factors.gradients()
        return [found[key_of("layer", f)] for f in ("down", "up")]


def weights(shape: torch.Size) -> torch.Tensor:
    """What the output is multiplied with to become a loss: its gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(21))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(22))


def check(one: One, x: torch.Tensor) -> None:
    """Runs the layer forward and backward on x and compares everything with the formula."""
    y = one.layer(x)
    grad_y = weights(y.shape)
    want_y, want_x, want_down, want_up = one.expected(x, grad_y)
    assert y.shape == want_y.shape and off(y, want_y) <= EXACT
    (y * grad_y).sum().backward()
    down, up = one.gradients()
    assert off(down, want_down) <= EXACT and off(up, want_up) <= EXACT
    if x.requires_grad:
        assert off(x.grad, want_x) <= EXACT


LAYERS_AND_INPUTS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear, no batch": (lambda: nn.Linear(7, 5), (7,)),
    "linear, four axes": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 4, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=3), (2, 4, 17)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 3)),
    "conv2d 1x1, stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 4)),
    "conv2d 3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 5)),
    "conv2d, all unequal": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
        (2, 4, 9, 8),
    ),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), (2, 6, 6, 5)),
    "conv2d, no batch": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 3, 4, 5, 4)),
}


@pytest.mark.parametrize("needs_grad", [False, True], ids=["frozen x", "x with grad"])
@pytest.mark.parametrize("made", LAYERS_AND_INPUTS.values(), ids=LAYERS_AND_INPUTS.keys())
def test_output_and_all_gradients_are_those_of_the_formula(made, needs_grad, tmp_path):
    layer, shape = made
    torch.manual_seed(1)
    one = One(layer(), tmp_path)
    x = noise(*shape).requires_grad_(needs_grad)
    check(one, x)
    assert x.grad is not None or not needs_grad
    assert one.layer.weight.grad is None


def test_a_base_that_is_trained_too_gets_its_own_gradient(tmp_path):
    one = One(nn.Conv2d(4, 6, 3), tmp_path)
    one.layer.requires_grad_(True)
    x = noise(2, 4, 6, 5)
    check(one, x)
    plain = copy.deepcopy(one.plain).requires_grad_(True)
    y = plain(x)
    (y * weights(y.shape)).sum().backward()
    assert off(one.layer.weight.grad, plain.weight.grad) <= EXACT
    assert off(one.layer.bias.grad, plain.bias.grad) <= EXACT


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with holes between them."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] * 2)
    wide[..., ::2] = x
    return wide[..., ::2]


VIEWS = {
    "channels_last": (lambda: nn.Conv2d(4, 6, 3), noise(2, 4, 6, 5).to(memory_format=torch.channels_last)),
    "channels_last 1x1": (lambda: nn.Conv2d(4, 6, 1), noise(2, 4, 6, 5).to(memory_format=torch.channels_last)),
    "strided": (lambda: nn.Conv2d(4, 6, 3), strided(noise(2, 4, 6, 5))),
    "transposed": (lambda: nn.Linear(7, 5), noise(2, 7, 9).transpose(1, 2)),
    "expanded": (lambda: nn.Linear(7, 5), noise(1, 7).expand(4, 7)),
    "part of another": (lambda: nn.Linear(7, 5), noise(3, 20)[:, 6:13]),
}


@pytest.mark.parametrize("made", VIEWS.values(), ids=VIEWS.keys())
def test_inputs_that_do_not_lie_row_major(made, tmp_path):
    layer, x = made
    assert not x.is_contiguous()
    torch.manual_seed(1)
    one = One(layer(), tmp_path)
    before = x.clone()
    check(one, x)
    assert torch.equal(x, before)
    one.network.zero_gradients()
    leaf = x.detach().requires_grad_()
    check(one, leaf)


@pytest.mark.parametrize("made", [LAYERS_AND_INPUTS["linear, four axes"], LAYERS_AND_INPUTS["conv2d 3x3"]])
@pytest.mark.parametrize("how", ["transposed", "expanded", "channels_last"])
def test_gradients_that_do_not_lie_row_major(made, how, tmp_path):
    layer, shape = made
    one = One(layer(), tmp_path)
    x = noise(*shape).requires_grad_()
    y = one.layer(x)
    if how == "transposed":
        grad_y = weights(y.transpose(1, 3).shape).transpose(1, 3)
    elif how == "expanded":
        grad_y = weights(y[:1].shape).expand(y.shape)
    else:
        grad_y = weights(y.shape).to(memory_format=torch.channels_last)
    assert not grad_y.is_contiguous()
    y.backward(grad_y)
    for got, want in zip([x.grad, *one.gradients()], one.expected(x, grad_y)[1:], strict=True):
        assert off(got, want) <= EXACT


def test_a_channels_last_model_trains_like_a_contiguous_one():
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = net().to(memory_format=layout)
        network = attached(model, noise=0.2)
        x, goal = batch(0)
        nn.functional.mse_loss(model(x.to(memory_format=layout)), goal).backward()
        gradients.append(network.gradients.clone())
    assert off(gradients[1], gradients[0]) <= EXACT


def test_autocast_rounds_once_and_its_gradients_are_those_of_the_rounded_values(tmp_path):
    one = One(nn.Linear(16, 8), tmp_path)
    x = noise(5, 16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base, y = one.plain(x), one.layer(x)
    assert y.dtype == base.dtype == torch.bfloat16
    # The delta is computed in fp32 and the sum rounded to bf16, to the nearest: half a unit in the last place.
    exact = base.double() + explicit(one.plain, x, one.down, one.up, one.scale, bias=False)
    half = 2.0 ** (torch.frexp(exact).exponent - 9)
    assert ((y.double() - exact).abs() <= 1.001 * half).all()
    grad_y = weights(y.shape).bfloat16()
    y.backward(grad_y)
    _, _, want_down, want_up = one.expected(x, grad_y)
    down, up = one.gradients()
    assert off(down, want_down) <= EXACT and off(up, want_up) <= EXACT
    delta = one.scale * one.up.double() @ one.down.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = x.detach().clone().requires_grad_()
        one.plain(leaf).backward(grad_y)
    assert off(x.grad - leaf.grad, grad_y.double() @ delta) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_a_whole_model_follows_fp32(dtype):
    gradients = []
    for enabled in (False, True):
        model = net()
        network = attached(model, noise=0.2)
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = loss_of(model, 0)
        loss.backward()
        gradients.append(network.gradients.clone())
    close = nn.functional.cosine_similarity(*gradients, dim=0).item()
    ratio = (gradients[1].norm() / gradients[0].norm()).item()
    assert close > 0.999 and abs(ratio - 1) < 0.02, (close, ratio)


def test_autocast_around_the_backward_changes_nothing(tmp_path):
    one = One(nn.Linear(16, 8), tmp_path)
    x = noise(5, 16)
    one.layer(x).square().sum().backward()
    want = one.network.gradients.clone()
    one.network.zero_gradients()
    y = one.layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.square().sum().backward()
    assert torch.equal(one.network.gradients, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_sixteen_bits_keep_fp32_parameters(dtype, tmp_path):
    one = One(nn.Linear(16, 8).to(dtype), tmp_path)
    assert one.network.parameters.dtype == torch.float32
    x = noise(5, 16).to(dtype)
    y = one.layer(x)
    assert y.dtype == dtype
    grad_y = weights(y.shape).to(dtype)
    y.backward(grad_y)
    _, _, want_down, want_up = one.expected(x, grad_y)
    down, up = one.gradients()
    assert off(down, want_down) <= EXACT and off(up, want_up) <= EXACT


def test_a_layer_that_is_used_twice_adds_both_gradients(tmp_path):
    one = One(nn.Linear(6, 6), tmp_path)
    x = noise(4, 6).requires_grad_()
    y = one.layer(one.layer(x))
    grad_y = weights(y.shape)
    want = one.expected(x, grad_y, calls=2)
    assert off(y, want[0]) <= EXACT
    (y * grad_y).sum().backward()
    for got, wanted in zip([x.grad, *one.gradients()], want[1:], strict=True):
        assert off(got, wanted) <= EXACT


def test_two_backwards_add_and_a_kept_graph_can_be_used_again(tmp_path):
    one = One(nn.Conv2d(4, 6, 3), tmp_path)
    loss = one.layer(noise(2, 4, 6, 5)).square().sum()
    loss.backward(retain_graph=True)
    once = one.network.gradients.clone()
    loss.backward()
    assert torch.equal(one.network.gradients, 2 * once)


DROPOUTS = {"network_dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}


@pytest.mark.parametrize("dropouts", [{}, DROPOUTS, *({key: 0.5} for key in DROPOUTS)], ids=lambda d: "+".join(d))
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(reentrant, dropouts):
    """What is left out is the same when a layer is run again."""
    model = net()
    network = attached(model, dropouts | {"optimizer_args": {"weight_decay": 0}}, noise=0.2)

    def run(checkpointed: bool) -> tuple[torch.Tensor, ...]:
        network.zero_gradients()
        x = batch(0)[0].requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        (y * weights(y.shape)).sum().backward()
        return y.detach(), x.grad, network.gradients.clone()

    for _ in range(3):
        plain = run(False)
        assert plain[2].abs().max() > 0
        for got, want in zip(run(True), plain, strict=True):
            assert torch.equal(got, want)
        network.zero_gradients()
        network.step()
    # Nothing was learned; the next step has other masks.
    assert torch.equal(run(False)[0], plain[0]) == (not dropouts)


def test_evaluation_leaves_nothing_out():
    """Output and gradients are those of a network without dropout, to the bit; and then the masks are back."""
    outcomes = {}
    for name, dropouts in (("without", {}), ("with", DROPOUTS)):
        model = net()
        network = attached(model, dropouts, noise=0.2)
        for evaluating in (False, True, False):
            network.evaluate(evaluating)
            network.zero_gradients()
            loss = loss_of(model, 0)
            loss.backward()
            outcomes.setdefault((name, evaluating), []).append(torch.cat([loss.detach()[None], network.gradients]))
    exact = outcomes["without", False][0]
    assert all(torch.equal(outcome, exact) for outcome in outcomes["without", True] + outcomes["with", True])
    first, again = outcomes["with", False]
    assert torch.equal(first, again) and off(first, exact) > 0.01


def test_checkpointing_works_on_inputs_without_grad():
    model = net()
    network = attached(model, noise=0.2)
    loss_of(model, 0).backward()
    want = network.gradients.clone()
    network.zero_gradients()
    x, goal = batch(0)
    nn.functional.mse_loss(checkpoint(model, x, use_reentrant=False), goal).backward()
    assert torch.equal(network.gradients, want)


def test_without_grad_mode_the_values_are_the_same():
    model = net()
    attached(model, noise=0.2)
    x, _ = batch(0)
    trained = model(x)
    assert trained.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = model(x)
        assert not y.requires_grad and torch.equal(y, trained)


@pytest.mark.parametrize("how", ["detach", "close"])
def test_detached_layers_compute_the_base_bit_for_bit(how):
    model = net()
    hooks = {name: len(layer._forward_hooks) for name, layer in model.named_modules()}
    weights_before = {name: p.clone() for name, p in model.named_parameters()}
    x, _ = batch(0)
    base = model(x)
    network = attached(model, noise=0.2)
    assert off(model(x), base) > 0.01
    loss_of(model, 0).backward()
    network.step()
    getattr(network, how)()
    assert torch.equal(model(x), base)
    assert hooks == {name: len(layer._forward_hooks) for name, layer in model.named_modules()}
    assert all(torch.equal(p, weights_before[name]) for name, p in model.named_parameters())


class Curved(nn.Linear):
    """Its backward keeps its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).exp()


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_an_output_that_a_backward_keeps_is_not_written_into(how, tmp_path):
    one = One(Curved(7, 5) if how == "subclass" else nn.Linear(7, 5), tmp_path)
    if how == "instance":
        plain = one.layer.forward
        one.layer.forward = lambda x: plain(x).exp()
    x, grad_y = noise(3, 7).requires_grad_(), weights(torch.Size((3, 5)))
    y = one.layer(x)
    leaf = x.detach().double().requires_grad_()
    base = functional.linear(leaf, one.plain.weight.double(), one.plain.bias.double()).exp()
    want = base + explicit(one.plain, leaf, one.down, one.up, one.scale, bias=False)
    assert off(y, want.detach()) <= EXACT
    (y * grad_y).sum().backward()
    (want * grad_y).sum().backward()
    assert off(x.grad, leaf.grad) <= EXACT


@pytest.mark.parametrize("fresh", [False, True])
def test_an_output_of_a_hosts_class_is_written_into_where_the_host_allows_it(fresh):
    made = []

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            made.append(y.data_ptr())
            return y

    layer = Own(7, 5)
    network = lycore.Network({"network_dim": 2})
    network.add("layer", layer, fresh=fresh)
    network.build()
    assert (layer(noise(3, 7)).data_ptr() == made[0]) == fresh


def test_two_networks_on_one_layer_add_up(tmp_path):
    layer = nn.Linear(7, 5)
    first = One(layer, tmp_path)
    x = noise(3, 7)
    base, alone = first.plain(x), layer(x).detach()
    second = lycore.Network({"network_dim": 2})
    second.add("layer", layer)
    second.build()
    fill(second, 0.3)
    both = layer(x)
    first.network.detach()
    other = layer(x).detach()
    assert off(both.detach() - base, (alone - base) + (other - base)) <= EXACT


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_no_graph_stays_behind_over_200_steps():
    """The collector is off, so that cycles would show; one kept activation per step would be 200 MiB."""
    layer = nn.Linear(512, 512).requires_grad_(False)
    network = lycore.Network({"network_dim": 2})
    network.add("layer", layer)
    network.build()
    values = noise(512, 512)
    assert values.numel() * values.element_size() == 1 << 20

    def step() -> list[weakref.ref]:
        x = values.clone().requires_grad_()
        y = layer(x)
        y.square().mean().backward()
        network.step()
        return [weakref.ref(x), weakref.ref(y), weakref.ref(x.grad)]

    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            step()
        counts, memory = ((len(gc.get_objects()), sum(map(torch.is_tensor, gc.get_objects()))), resident())
        alive = sum(seen() is not None for _ in range(200) for seen in step())
        after = (len(gc.get_objects()), sum(map(torch.is_tensor, gc.get_objects())))
        grown = resident() - memory
    finally:
        gc.enable()
    assert alive == 0
    assert after[1] == counts[1] and abs(after[0] - counts[0]) < 50, (counts, after)
    assert grown < 16 << 20, f"{grown >> 20} MiB more"


def test_a_closed_network_is_freed_once_no_view_is_left():
    model = net()
    network = attached(model, noise=0.2)
    loss_of(model, 0).backward()
    seen, view = weakref.ref(network._owner), network.parameters
    values = view.clone()
    network.close()
    assert seen() is not None and torch.equal(view, values)
    del view
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_written_parameters_take_effect(precision):
    """`parameters` is a view: what is written there is, after `refresh`, what the next forward uses."""
    layer = nn.Linear(8, 8).requires_grad_(False)
    network = lycore.Network({"network_dim": 2, "network_alpha": 2, "mixed_precision": precision})
    network.add("layer", layer)
    network.build()
    x = noise(3, 8)
    base = layer(x).clone()
    network.parameters.fill_(0.5)
    network.refresh()
    # up @ down is 2 * 0.5 * 0.5 everywhere.
    assert off(layer(x) - base, 0.5 * x.sum(1, keepdim=True).expand(3, 8)) <= 0.02


class Gated(nn.Module):
    """The MLP of a transformer block; `kept` says what became of the product in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 6)
        self.kept: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = self.up(x).chunk(2, dim=-1)
        product = hidden * functional.gelu(gate)
        self.kept = weakref.ref(product)
        return self.down(product)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_product_computed_again_gives_the_same_bits(checkpointed):
    torch.manual_seed(3)
    mlp = Gated().requires_grad_(False)
    network = attached(mlp, noise=0.3)
    x = noise(5, 6).requires_grad_()

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        x.grad = None
        network.zero_gradients()
        run(x).square().sum().backward()
        return [x.grad.clone(), network.gradients.clone()]

    # Under such hooks it is kept.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        want = gradients(mlp)
    got = gradients(lambda x: checkpoint(mlp, x, use_reentrant=False) if checkpointed else mlp(x))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_product_is_not_kept_for_a_module():
    mlp = Gated().requires_grad_(False)
    attached(mlp)
    y = mlp(noise(5, 6).requires_grad_())
    assert mlp.kept() is None
    y.sum().backward()


def test_a_network_and_its_model_go_with_the_last_name():
    """Without the garbage collector: on a GPU they are gigabytes."""
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(4, 4))
        network = attached(model)
        seen = [weakref.ref(network), weakref.ref(model[0])]
        del network, model
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
