"""Merging files that the oracles wrote: LyCore against the formula in float64, the formula against the oracles."""

from __future__ import annotations

import copy
from pathlib import Path

import formula
import producers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from formula import parts_of
from lycoris import create_lycoris_from_weights
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from threads import one_thread as one_thread

import lycore

pytestmark = pytest.mark.usefixtures("library")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
STRENGTHS = (1.0, 0.7, -0.3)
FORWARD = 2e-6
"""The oracle's output of one layer against the merged layer in float64, relative to the largest element of the output:
fp32 sums of at most 300 products. Wrong scales or shapes are off by percents."""
FORWARD_OF_MODEL = 1e-5
"""The same through a whole model, whose layers and norms pass the rounding on."""
RANKS = {1: 0.3, 7: 3.5, 16: 24.0}
"""Rank: alpha. 0.3 is no number of fp16 or bf16, so that the file's own alpha counts, not the one asked for."""


def weights_of(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": p.detach() for name, p in model.named_parameters() if p.ndim > 1}


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Also biases and the weights of norms."""
    return {name: p.detach() for name, p in model.named_parameters()}


def merged_like_the_formula(weights, dtype, path, changes, target_of, strengths=STRENGTHS) -> None:
    """Applies a file to weights in `dtype` at one strength after another, on one stack.

    `changes` are the formula's by module, `target_of` tells each module's weight.
    """
    base = {name: weight.to(dtype) for name, weight in weights.items()}
    live = {name: weight.clone() for name, weight in base.items()}
    tally = formula.Tally(dtype)
    parts = [(module, *part) for module, c in changes.items() for part in parts_of(c, target_of(module), base)]
    with lycore.Stack(live) as stack:
        handle = stack.add(path)
        everything_matched(handle, changes)
        for strength in strengths:
            handle.strength = strength
            assert stack.apply().changed == len(parts)
            for module, name, change in parts:
                tally.add(f"{module} at {strength}", live[name], base[name], [(strength, change)])
                assert strength or torch.equal(live[name], base[name]), f"{name}: strength 0 is the base"
        touched = {name for _, name, _ in parts}
        assert all(torch.equal(live[name], base[name]) for name in live if name not in touched)
    tally.check()
    assert all(torch.equal(live[name], base[name]) for name in live)


def everything_matched(handle: lycore.Handle, changes) -> None:
    report = handle.report()
    assert report["summary"].pop("modules") == len(changes)
    # VeRA's projections are no module's own; a test of damaged files is about how they are reported.
    shared = sum(key["key"].startswith("base_model.vera_") and key["status"] == "readable" for key in report["keys"])
    report["summary"]["readable"] = report["summary"].get("readable", 0) - shared
    assert report["summary"].pop("matched") + shared == len(report["keys"]), report["keys"]
    assert not any(v for k, v in report["summary"].items() if k != "keys"), report["summary"]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want).abs().max() / want.abs().max())


def oracle_agrees_by_layer(
    oracle: torch.nn.Module, host, changes, target_of, strength: float, bound: float = FORWARD
) -> None:
    """Every layer of the oracle's model against the layer merged by the formula, in float64."""
    exact = copy.deepcopy(host).double()
    parameters, worst = dict(exact.named_parameters()), {}
    for module, change in changes.items():
        for name, part in parts_of(change, target_of(module), parameters):
            parameters[name].data += torch.from_numpy(part.added(parameters[name], strength))
    inputs = host.inputs()
    assert len(changes) == len(inputs)
    for name, x in inputs.items():
        want = exact.get_submodule(name)(x.double())
        assert relative(host.get_submodule(name)(x), want) > 1e-2, "the adapter must show"
        worst[name] = relative(oracle.get_submodule(name)(x), want)
    print(f"oracle's forward at {strength}: worst {max(worst.values()):.2e}")
    assert max(worst.values()) <= bound, worst


# lycoris-lora: `create_lycoris(..).save_weights(..)`.


@pytest.fixture(scope="module")
def layers():
    return producers.filled(producers.Layers())


@pytest.fixture(params=[(r, tucker) for r in RANKS for tucker in (False, True)], ids=lambda p: f"r{p[0]}-{p[1]:d}")
def lycoris_case(request, layers, tmp_path):
    """`make(dtype)` writes the file; convolutions have another rank and alpha than Linear layers."""
    rank, tucker = request.param
    conv_rank = {1: 7, 7: 16, 16: 1}[rank]

    def make(dtype) -> Path:
        ranks = {"rank": rank, "alpha": RANKS[rank], "conv_rank": conv_rank, "conv_alpha": RANKS[conv_rank]}
        algo = "locon" if tucker else "lora"
        path = tmp_path / "lycoris.safetensors"
        return producers.lycoris_file(path, layers, dtype=dtype, tucker=tucker, algo=algo, **ranks)

    return make


def lycoris_target(host):
    flat = {f"lycoris_{name.replace('.', '_')}": f"{name}.weight" for name in host.inputs()}
    return flat.__getitem__


@pytest.mark.parametrize("base", DTYPES, ids=["on-fp32", "on-fp16", "on-bf16"])
@DTYPE
def test_lycoris_files(lycoris_case, layers, dtype, base):
    path = lycoris_case(dtype)
    merged_like_the_formula(weights_of(layers), base, path, formula.read(path), lycoris_target(layers))


@DTYPE
def test_lycoris_reads_its_files_as_the_formula_does(lycoris_case, layers, dtype):
    """LyCORIS' module forward in eval, which rebuilds the weight: the path of it that is right in fp32."""
    path = lycoris_case(dtype)
    changes = formula.read(path)
    for strength in STRENGTHS:
        oracle = copy.deepcopy(layers)
        network, _ = create_lycoris_from_weights(strength, str(path), oracle)
        network.apply_to()
        network.eval()
        oracle_agrees_by_layer(oracle, layers, changes, lycoris_target(layers), strength)


def test_tucker_files_have_a_core(layers, tmp_path):
    """What the parameter above is for: cores on the kernels that have any, and only there."""
    path = tmp_path / "tucker.safetensors"
    producers.lycoris_file(path, layers, rank=4, alpha=2, conv_rank=4, conv_alpha=2, tucker=True)
    cored = {name for name, change in formula.read(path).items() if "mid" in change.factors}
    assert cored == {f"lycoris_{name}" for name in ("line", "plane", "plane_oblong", "space")}


# PEFT: `get_peft_model(..).save_pretrained(..)`.


PEFT_CONFIGS = {
    "r1": {"r": 1, "lora_alpha": 3},
    "r7-patterns": {
        "r": 7,
        "lora_alpha": 3.5,
        "rank_pattern": {"attn.to_q": 5, "plane": 2},
        "alpha_pattern": {"to_q": 9, "space_point": 0.3, "line|plane_point": 21},
    },
    "r16-rslora": {"r": 16, "lora_alpha": 24, "use_rslora": True, "alpha_pattern": {"line": 2}},
}


@pytest.fixture(params=PEFT_CONFIGS, ids=str)
def peft_case(request, layers, tmp_path):
    """`make(dtype)` gives the file, and PEFT's model with the very factors of the file in fp32."""

    def make(dtype) -> tuple[Path, PeftModel]:
        config = LoraConfig(target_modules=list(layers.inputs()), **PEFT_CONFIGS[request.param])
        model = producers.peft_model(layers, config, dtype)
        return producers.peft_folder(tmp_path / "peft", model, dtype), model

    return make


def peft_target(module: str) -> str:
    return f"{module.removeprefix('base_model.model.')}.weight"


@pytest.mark.parametrize("base", DTYPES, ids=["on-fp32", "on-fp16", "on-bf16"])
@DTYPE
def test_peft_folders(peft_case, layers, dtype, base):
    path, _ = peft_case(dtype)
    changes = formula.read(path, producers.peft_config(path))
    merged_like_the_formula(weights_of(layers), base, path, changes, peft_target)


@DTYPE
def test_peft_reads_its_folders_as_the_formula_does(peft_case, layers, dtype):
    path, made = peft_case(dtype)
    changes = formula.read(path, producers.peft_config(path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(layers), path.parent).eval()
    for model in (made, loaded):
        oracle_agrees_by_layer(model.base_model.model, layers, changes, peft_target, 1.0)
    # PEFT's own merge, which raises for 1x1x1 Conv3d: it squeezes two of the three axes.
    tally = formula.Tally(torch.float32)
    for module, change in changes.items():
        if not module.endswith("space_point"):
            layer = made.get_submodule(module)
            layer.merge()
            base = layers.get_submodule(module.removeprefix("base_model.model.")).weight
            tally.add(module, layer.get_base_layer().weight, base, [(1.0, change)])
    tally.check()


# diffusers: `StableDiffusionPipeline.save_lora_weights(..)`.


UNET_TARGETS = "to_q to_k to_v to_out.0 proj_in proj_out conv1 conv2 conv_shortcut time_emb_proj ff.net.0.proj ff.net.2"
UNET_TARGETS = [*UNET_TARGETS.split(), "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv", "linear_1"]
ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
DIFFUSERS_CONFIGS = {
    1: ({"r": 1, "lora_alpha": 0.5}, {"r": 1, "lora_alpha": 2}),
    7: (
        {"r": 7, "lora_alpha": 3.5, "alpha_pattern": {"to_q": 5.0}, "rank_pattern": {"conv1": 3, "attn2.to_k": 9}},
        {"r": 4, "lora_alpha": 6},
    ),
    16: ({"r": 16, "lora_alpha": 24, "use_rslora": True}, {"r": 16, "lora_alpha": 8}),
}
LDM_ENCODER = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def models():
    """Text encoder, and the U-Net that projects with 1x1 convolutions (False) and with Linear layers (True)."""
    return producers.tiny_text_encoder(), {linear: producers.tiny_unet(linear) for linear in (False, True)}


@pytest.fixture(params=[(1, False), (7, True), (16, False)], ids=["r1-conv", "r7-linear", "r16-conv"])
def diffusers_case(request, models, tmp_path):
    """(U-Net, text encoder, make); `make(dtype, metadata)` gives the file and both models with the adapters active."""
    rank, linear = request.param
    encoder, unet = models[0], models[1][linear]

    def make(dtype=torch.float32, metadata=True):
        configs = zip(DIFFUSERS_CONFIGS[rank], (UNET_TARGETS, ENCODER_TARGETS), strict=True)
        for_unet, for_encoder = (LoraConfig(target_modules=targets, **numbers) for numbers, targets in configs)
        tuned = {"unet": (copy.deepcopy(unet), for_unet), "text_encoder": (copy.deepcopy(encoder), for_encoder)}
        path = producers.diffusers_folder(tmp_path / "diffusers", tuned, metadata=metadata, dtype=dtype)
        return path, *(model.eval() for model, _ in tuned.values())

    return unet, encoder, make


def diffusers_weights(unet, encoder):
    return weights_of(unet, "unet.") | weights_of(encoder, "text_encoder.")


def checkpoint_spelling(name: str) -> str:
    """A name of `diffusers_weights` as a checkpoint of Stable Diffusion 1 has it."""
    if name.startswith("unet."):
        return producers.checkpoint_name(name.removeprefix("unet."))
    return LDM_ENCODER + name.removeprefix("text_encoder.")


@pytest.mark.parametrize("base", DTYPES, ids=["on-fp32", "on-fp16", "on-bf16"])
@DTYPE
def test_diffusers_files(diffusers_case, dtype, base):
    unet, encoder, make = diffusers_case
    path, *_ = make(dtype)
    changes = formula.read(path, formula.metadata_config(path))
    assert len({change.scale for change in changes.values()}) >= 2
    assert all(change.scale != 1 for change in changes.values())
    weights = diffusers_weights(unet, encoder)
    merged_like_the_formula(weights, base, path, changes, "{}.weight".format)
    # Under the checkpoint's names, the same bits.
    live = {name: weight.to(base) for name, weight in weights.items()}
    renamed = {checkpoint_spelling(name): weight.to(base) for name, weight in weights.items()}
    assert len(renamed) == len(live)
    for host in (live, renamed):
        stack = lycore.Stack(host)
        everything_matched(stack.add(path, unet=0.7, text_encoder=-0.3), changes)
        stack.apply()
    assert all(torch.equal(renamed[checkpoint_spelling(name)], weight) for name, weight in live.items())


def test_diffusers_files_on_real_modules(diffusers_case):
    """The two models as a host has them, with a strength each, against diffusers' and PEFT's forward."""
    unet, encoder, make = diffusers_case
    path, tuned_unet, tuned_encoder = make()
    base = producers.run_unet(unet), producers.run_text_encoder(encoder)
    strengths = {"unet": 0.7, "text_encoder": -0.3}
    hosts = torch.nn.ModuleDict({"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(encoder)})
    for model, strength in ((tuned_unet, 0.7), (tuned_encoder, -0.3)):
        for layer in model.modules():
            if getattr(layer, "lora_A", None):
                layer.scale_layer(strength)
    with lycore.Stack(hosts) as stack:
        handle = stack.add(path, **strengths)
        assert handle.report()["summary"]["unmatched"] == 0
        stack.apply()
        got = producers.run_unet(hosts["unet"]), producers.run_text_encoder(hosts["text_encoder"])
    want = producers.run_unet(tuned_unet).double(), producers.run_text_encoder(tuned_encoder).double()
    for ours, theirs, plain in zip(got, want, base, strict=True):
        assert relative(plain, theirs) > 1e-2, "the adapter must show"
        print(f"merged model against the oracle's: {relative(ours, theirs):.2e}")
        assert relative(ours, theirs) <= FORWARD_OF_MODEL
    assert torch.equal(producers.run_unet(hosts["unet"]), base[0])


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_diffusers_files_on_one_model_alone(diffusers_case, component):
    """Its names then have no component in front, as `Stack(pipeline.text_encoder)` gives them."""
    unet, encoder, make = diffusers_case
    path, tuned_unet, tuned_encoder = make()
    run, base, tuned = {
        "unet": (producers.run_unet, unet, tuned_unet),
        "text_encoder": (producers.run_text_encoder, encoder, tuned_encoder),
    }[component]
    host, want = copy.deepcopy(base), run(tuned).double()
    assert relative(run(base), want) > 1e-2, "the adapter must show"
    with lycore.Stack(host) as stack:
        handle = stack.add(path)
        assert 0 < handle.report()["summary"]["matched"] < len(handle.report()["keys"])
        stack.apply()
        assert relative(run(host), want) <= FORWARD_OF_MODEL


@DTYPE
def test_diffusers_files_without_metadata(diffusers_case, dtype):
    """Then the file says nothing of alpha, and scale 1 is the only possible reading: diffusers' own too."""
    unet, encoder, make = diffusers_case
    path, *_ = make(dtype, metadata=False)
    assert formula.metadata_config(path) == {}
    changes = formula.read(path)
    assert {change.scale for change in changes.values()} == {1.0}
    weights = diffusers_weights(unet, encoder)
    merged_like_the_formula(weights, torch.float32, path, changes, "{}.weight".format)


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "bare"])
def test_diffusers_reads_its_files_as_we_do(diffusers_case, metadata):
    """Both models through diffusers' own loader, against the weights merged by LyCore."""
    unet, encoder, make = diffusers_case
    path, *_ = make(metadata=metadata)
    state, alphas, told = StableDiffusionPipeline.lora_state_dict(path.parent, return_lora_metadata=True)
    loaded_unet, loaded_encoder = copy.deepcopy(unet), copy.deepcopy(encoder)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, loaded_unet, metadata=told)
    StableDiffusionPipeline.load_lora_into_text_encoder(state, alphas, loaded_encoder, metadata=told)
    want = producers.run_unet(loaded_unet).double(), producers.run_text_encoder(loaded_encoder).double()
    hosts = torch.nn.ModuleDict({"unet": copy.deepcopy(unet), "text_encoder": copy.deepcopy(encoder)})
    with lycore.Stack(hosts) as stack:
        stack.add(path)
        stack.apply()
        got = producers.run_unet(hosts["unet"]), producers.run_text_encoder(hosts["text_encoder"])
    for ours, theirs in zip(got, want, strict=True):
        assert relative(ours, theirs) <= FORWARD_OF_MODEL
    assert relative(producers.run_unet(unet), want[0]) > 1e-2
    assert relative(producers.run_text_encoder(encoder), want[1]) > 1e-2


def test_checkpoint_names_are_those_of_diffusers_converter():
    """The mapping that the tests above rename with is right."""
    unet = producers.tiny_unet(True)
    state = unet.state_dict()
    renamed = {producers.checkpoint_name(name): value for name, value in state.items()}
    back = convert_ldm_unet_checkpoint(dict(renamed), dict(unet.config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@DTYPE
def test_checkpoint_files(diffusers_case, tmp_path, dtype):
    """File to file: the same bits as the stack gives, everything else untouched."""
    unet, encoder, make = diffusers_case
    path, *_ = make()
    state = {f"unet.{name}": value for name, value in unet.state_dict().items()}
    state |= {f"text_encoder.{name}": value for name, value in encoder.state_dict().items()}
    base = {checkpoint_spelling(name): value.to(dtype) for name, value in state.items()}
    save_file(base, tmp_path / "base.safetensors")
    report = lycore.merge(tmp_path / "base.safetensors", [(path, 0.7)], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    changes = formula.read(path, formula.metadata_config(path))
    assert report["tensors"] == {"changed": len(changes), "copied": len(base) - len(changes)}
    live = {name: value.clone() for name, value in base.items() if value.ndim > 1}
    stack = lycore.Stack(live)
    stack.add(path, 0.7)
    stack.apply()
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], live.get(name, base[name])) for name in base)
    tally = formula.Tally(dtype)
    for module, change in changes.items():
        name = checkpoint_spelling(f"{module}.weight")
        tally.add(module, merged[name], base[name], [(0.7, change)])
    tally.check()
