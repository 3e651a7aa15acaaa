"""Model families: whole key lists, fused and split layouts, and files for another family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from numpy.lib.stride_tricks import as_strided
from safetensors.numpy import save_file

import lycore

LISTS = Path(__file__).resolve().parents[1] / "golden" / "names"
FAMILIES = sorted(path.stem for path in LISTS.glob("*.json"))
NAMES = {
    "sd1": "SD 1.x",
    "sd2": "SD 2.x",
    "sdxl": "SDXL",
    "sd3": "SD 3",
    "sd35_large": "SD 3",
    "sd35_medium": "SD 3",
    "flux1": "Flux.1",
    "flux2": "Flux.2",
    "flux2_klein": "Flux.2",
    "chroma": "Chroma",
    "wan": "Wan",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
    "lumina2": "Lumina 2",
    "hunyuan_video": "HunyuanVideo",
    "hunyuan_video_15": "HunyuanVideo 1.5",
    "hunyuan_image": "HunyuanImage 2.1",
    "ltx_video": "LTX-Video",
    "ltx2": "LTX-2",
    "anima": "Anima",
}


def shapes(family: str, layout: str) -> dict[str, tuple[int, ...]]:
    """Weights with two axes or more of a model of the family, with few layers."""
    rows = json.loads((LISTS / f"{family}.json").read_text())[layout]
    return {name: tuple(shape) for name, shape, *_ in rows if len(shape) >= 2 and name.endswith(".weight")}


def host(weights: dict[str, tuple[int, ...]], **options) -> lycore.Stack:
    """A stack that only matches names: its weights have shapes and one element."""
    cell = numpy.zeros(1, numpy.float32)
    spread = {name: as_strided(cell, shape, [0] * len(shape)) for name, shape in weights.items()}
    return lycore.Stack(spread, **options)


@pytest.fixture
def write(tmp_path):
    """`write({module: shape of the weight})`: a file of LoRAs of rank 1 that do nothing."""

    def write(modules: dict[str, tuple[int, ...]]) -> Path:
        tensors = {}
        for module, (out, channels, *kernel) in modules.items():
            tensors[f"{module}.lora_up.weight"] = numpy.zeros((out, 1, *[1] * len(kernel)), numpy.float16)
            tensors[f"{module}.lora_down.weight"] = numpy.zeros((1, channels, *kernel), numpy.float16)
        path = tmp_path / "adapter.safetensors"
        save_file(tensors, path)
        return path

    return write


def spelled(name: str, spelling: str) -> str:
    module = name.removesuffix(".weight")
    return {
        "kohya": "lora_unet_" + module.replace(".", "_"),
        "lycoris": "lycoris_" + module.replace(".", "_"),
        "comfyui": "diffusion_model." + module,
        "diffusers": "transformer." + module,
        "bare": module,
    }[spelling]


@pytest.mark.parametrize("spelling", ["kohya", "lycoris", "comfyui", "diffusers", "bare"])
@pytest.mark.parametrize("layout", ["checkpoint", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_family_is_reached_in_both_layouts(write, family, layout, spelling):
    weights = shapes(family, layout)
    path = write({spelled(name, spelling): shape for name, shape in weights.items()})
    for other in ("checkpoint", "diffusers"):
        report = host(shapes(family, other)).add(path).report()
        unmatched = {key["key"] for key in report["keys"] if key["status"] != "matched"}
        assert not unmatched, (other, sorted(unmatched)[:5])
        if other == layout:
            targets = {m["module"]: m["target"] for m in report["modules"]}
            assert targets == {spelled(name, spelling): name for name in weights}
    assert report["model"]["name"] == NAMES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_told_from_names_and_shapes(write, family):
    for layout, spelling in (("checkpoint", "kohya"), ("diffusers", "diffusers")):
        weights = shapes(family, layout)
        path = write({spelled(name, spelling): shape for name, shape in weights.items()})
        with lycore.open(path) as adapter:
            found = adapter.report()["family"]
        assert found["name"] == NAMES[family] and len(found["reason"]) > 10


PAIRS = [("flux1", "sdxl"), ("sd1", "sdxl"), ("sdxl", "sd1"), ("sd1", "sd2"), ("wan", "flux1"), ("sd3", "flux1")]


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_an_adapter_for_another_family_is_refused_with_both_names(write, own, other):
    weights = shapes(own, "checkpoint")
    # The encoder's module fits every model that has one: something is left to apply.
    encoder = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (8, 4)}
    modules = {spelled(name, "kohya"): shape for name, shape in weights.items()}
    path = write(modules | encoder)
    target = shapes(other, "checkpoint") | {"text_encoder.text_model.encoder.layers.0.mlp.fc1.weight": (8, 4)}
    with pytest.raises(lycore.AdapterKeyError) as caught:
        host(target).add(path)
    message = caught.value.message
    assert f"made for {NAMES[own]} (" in message and f"the model is {NAMES[other]} (" in message
    report = host(target, other_families=True).add(path).report()
    assert report["summary"]["matched"] >= 2 and report["summary"]["unmatched"] + report["summary"]["malformed"] > 0


def test_relatives_and_what_fits_as_a_whole_are_taken(write):
    attention = {n: s for n, s in shapes("flux1", "checkpoint").items() if "_attn." in n}
    path = write({spelled(name, "kohya"): shape for name, shape in attention.items()})
    assert host(shapes("chroma", "checkpoint")).add(path).report()["summary"]["unmatched"] == 0


def test_split_modules_on_a_fused_weight_and_the_reverse(make_lora, rng):
    h = 8
    fused = {
        "double_blocks.0.img_attn.qkv.weight": (3 * h, h),
        "single_blocks.0.linear1.weight": (7 * h, h),
        "single_blocks.0.modulation.lin.weight": (3 * h, h),
        "final_layer.adaLN_modulation.1.weight": (2 * h, h),
    }
    single, double = "single_transformer_blocks.0.", "transformer_blocks.0.attn."
    pieces = {
        "double_blocks.0.img_attn.qkv.weight": [(double + n, h) for n in ("to_q", "to_k", "to_v")],
        "single_blocks.0.linear1.weight": [(f"{single}attn.{n}", h) for n in ("to_q", "to_k", "to_v")]
        + [(single + "proj_mlp", 4 * h)],
        "single_blocks.0.modulation.lin.weight": [(single + "norm.linear", 3 * h)],
        # The halves stand in the other order: shift and scale.
        "final_layer.adaLN_modulation.1.weight": [("norm_out.linear", 2 * h)],
    }
    split = {f"{name}.weight": (rows, h) for parts in pieces.values() for name, rows in parts}

    def delta_of(lora, names: dict[str, tuple[int, int]]) -> dict[str, numpy.ndarray]:
        weights = {name: numpy.zeros(shape, numpy.float32) for name, shape in names.items()}
        stack = lycore.Stack(weights)
        stack.add(lora.path)
        stack.apply()
        return weights

    def as_fused(weights: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
        whole = {}
        for name, parts in pieces.items():
            rows = numpy.concatenate([weights[f"{part}.weight"] for part, _ in parts])
            whole[name] = numpy.concatenate([rows[h:], rows[:h]]) if name.startswith("final") else rows
        return whole

    loras = [
        make_lora("fused", {f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}": s for n, s in fused.items()}),
        make_lora("split", {f"transformer.{n.removesuffix('.weight')}": s for n, s in split.items()}),
    ]
    for lora in loras:
        on_fused, on_split = delta_of(lora, fused), as_fused(delta_of(lora, split))
        for name in fused:
            assert numpy.abs(on_fused[name]).max() > 1e-4
            assert numpy.allclose(on_fused[name], on_split[name], rtol=1e-6, atol=1e-7), (lora.path.stem, name)
    want = numpy.concatenate(
        [loras[1].deltas[f"transformer.{part}"] for part, _ in pieces["double_blocks.0.img_attn.qkv.weight"]]
    )
    got = delta_of(loras[1], fused)["double_blocks.0.img_attn.qkv.weight"]
    assert numpy.allclose(got, want, rtol=1e-5, atol=1e-6)


CLASSES = [
    ("FluxTransformer2DModel", {}),
    ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    ("ChromaTransformer2DModel", {}),
    ("SD3Transformer2DModel", {}),
    ("QwenImageTransformer2DModel", {"num_layers": 4}),
    ("ZImageTransformer2DModel", {}),
    ("Lumina2Transformer2DModel", {}),
    ("WanTransformer3DModel", {"num_layers": 4}),
    ("HunyuanVideoTransformer3DModel", {}),
    ("LTXVideoTransformer3DModel", {"num_layers": 4}),
    ("UNet2DConditionModel", {}),
]


@pytest.mark.parametrize(("name", "options"), CLASSES)
def test_the_models_of_diffusers_as_they_are(write, name, options):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    weights = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim >= 2 and n.endswith(".weight")}
    for prefix in ("transformer.", "base_model.model."):
        path = write({prefix + n.removesuffix(".weight"): s for n, s in weights.items()})
        report = host(weights).add(path).report()
        assert report["summary"]["unmatched"] == 0 and report["summary"]["matched"] == 2 * len(weights)


def test_xlabs_keys_reach_flux(tmp_path, rng):
    h = 4
    names = {"double_blocks.0.processor.qkv_lora1": (3 * h, h), "double_blocks.0.processor.proj_lora2": (h, h)}
    tensors = {}
    for name, (out, columns) in names.items():
        tensors[f"{name}.up.weight"] = rng.standard_normal((out, 2)).astype(numpy.float32)
        tensors[f"{name}.down.weight"] = rng.standard_normal((2, columns)).astype(numpy.float32)
    save_file(tensors, tmp_path / "xlabs.safetensors")
    host_names = ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.proj.weight")
    weights = {name: numpy.zeros(shape, numpy.float32) for name, shape in zip(host_names, names.values(), strict=True)}
    stack = lycore.Stack(weights)
    stack.add(tmp_path / "xlabs.safetensors")
    stack.apply()
    for source, target in zip(names, host_names, strict=True):
        want = tensors[f"{source}.up.weight"].astype("f8") @ tensors[f"{source}.down.weight"]
        assert numpy.allclose(weights[target], want, rtol=1e-6, atol=1e-6), target
