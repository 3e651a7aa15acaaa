"""The bypass on a GPU: what the adapters add to the output of a layer, whose weight stays as it is."""

from __future__ import annotations

import pytest
import torch
from hosts import DEVICE, EACH_FORM, GPU, ONLY_GPU, SHAPES, Adapter, Host, name_of, shapes_of, stack_on, weights
from torch.nn.functional import conv1d, conv2d, conv3d, linear

import lycore

pytestmark = GPU

FEW = {name: SHAPES[name] for name in ("linear", "odd", "row", "column", "line", "plane", "space")}
LAYERS = {2: linear, 3: conv1d, 4: conv2d, 5: conv3d}
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)


def inputs(shape: tuple[int, ...], seed: int = 5) -> tuple[torch.Tensor, dict[str, int]]:
    """Something for the layer with a weight of this shape, and how its kernel slides."""
    axes, generator = len(shape) - 2, torch.Generator().manual_seed(seed)
    size = (3, shape[1], *[7] * axes) if axes else (3, 5, shape[1])
    return torch.randn(size, generator=generator), ({"stride": 2, "padding": 1} if axes else {})


@DTYPE
@pytest.mark.parametrize("kind", EACH_FORM)
def test_every_form(tmp_path, kind, dtype):
    """Against the fp64 formula, before the weights are merged and after: the pristine weight counts."""
    host = Host(weights(dtype, FEW))
    adapter = Adapter(kind, tmp_path, shapes_of(host.base), torch.float32)
    other = Adapter("lora-r16", tmp_path, shapes_of(host.base), torch.float32, seed=8)
    # fp32: sums of some hundred products, of which rotations and norms have more. 16 bits: y is rounded once, from y
    # and a sum of x, which is a number of the dtype: 2^-9 and 2^-12 of each element at most.
    bound = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    with stack_on(host) as stack:
        stack.add(adapter.path, 0.70711)
        stack.add(other.path, -0.54321)
        for when in ("before", "merged"):
            for name, base in host.base.items():
                x, sliding = inputs(base.shape)
                x = x.to(dtype)
                layer = LAYERS[base.ndim]
                y = layer(x.double(), base.double(), **sliding).to(dtype)
                terms = [(0.70711, adapter), (-0.54321, other)]
                delta = sum(a.changes[name].added(base, s) for s, a in terms if name in a.changes)
                want = y.double() + layer(x.double(), torch.from_numpy(delta), **sliding)
                got = stack.forward(name, x.to(DEVICE), y.to(DEVICE).contiguous(), **sliding).cpu().double()
                assert ((got - want).norm() / want.norm()).item() < bound, f"{name}, {when}"
            stack.apply()


@ONLY_GPU
def test_a_bypass_of_a_large_convolution_is_exact(make_lora):
    """Large enough for cuDNN's TF32 kernels, which libtorch uses for convolutions unless it is told not to."""
    lora = make_lora("c", {"lora_unet_big": (320, 320, 3, 3)}, rank=32, alpha=32.0, dtype="float32")
    weight = torch.zeros(320, 320, 3, 3, device="cuda")
    stack = lycore.Stack({"big.weight": weight})
    stack.add(lora.path, 1.0)
    x = torch.randn(2, 320, 48, 48, device="cuda")
    y = torch.zeros(2, 320, 48, 48, device="cuda")
    before = torch.backends.cudnn.conv.fp32_precision
    stack.forward("big.weight", x, y, padding=1)
    assert torch.backends.cudnn.conv.fp32_precision == before
    delta = torch.from_numpy(lora.deltas["lora_unet_big"]).cuda()
    want = conv2d(x.double(), delta, padding=1)
    # fp32 sums of 2880 and 32 products: TF32 would be off by 3e-4.
    assert ((y.double() - want).norm() / want.norm()).item() < 1e-6
