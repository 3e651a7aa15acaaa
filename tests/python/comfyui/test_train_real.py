"""The node "LyCore Train" in a real ComfyUI (`real`): it trains what is sampled there, and loaders take its file."""

from __future__ import annotations

import asyncio
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from real import fill, skipped
from safetensors.torch import load_file
from test_train import BEFORE, DEFAULTS

pytest_plugins = ("real",)
pytestmark = skipped

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "ffn_dim": 96,
    "freq_dim": 32,
    "text_dim": 32,
    "num_heads": 2,
    "num_layers": 2,
}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(world, kind, dtype=torch.float32):
    """(model, latent, conditioning); the weights are inference tensors, as those of ComfyUI's loader nodes."""
    comfy = world.comfy
    with torch.inference_mode():
        if kind in ("eps", "v"):
            patcher = world.model(dtype)
            if kind == "v":
                sampling = comfy.model_base.ModelType.V_PREDICTION
                patcher.model.model_sampling = comfy.model_base.model_sampling(patcher.model.model_config, sampling)
            return patcher, rand(1, 4, 8, 8, seed=1), [[rand(1, 77, 64, seed=2), {}]]
        config = {"flux": comfy.supported_models.Flux, "wan": comfy.supported_models.WAN21_T2V}[kind]
        config = config(dict(FLUX if kind == "flux" else WAN))
        config.set_inference_dtype(dtype, None)
        base = config.get_model({}, device="cpu")
        fill(base, 3)
        patcher = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
        pooled = {"pooled_output": rand(1, 24, seed=4), "guidance": 1.0}
        latent = rand(1, 16, 8, 8, seed=1) if kind == "flux" else rand(1, 16, 2, 8, 8, seed=1)
        return patcher, latent, [[rand(1, 12, 32, seed=2), pooled if kind == "flux" else {}]]


def train(world, patcher, latent, condition, **changed):
    inputs = {name: [value] for name, value in (DEFAULTS | changed).items()}
    with torch.inference_mode():
        return world.train().train([patcher], [{"samples": latent}], [condition], **inputs)


@contextmanager
def untouched(world, patcher):
    """Fails unless a model is, in the end and after ComfyUI loaded it again, exactly what it was, bit for bit."""
    parts = list(patcher.model.modules())
    names = [*patcher.model.named_parameters(), *patcher.model.named_buffers()]
    tensors = {name: (tensor, tensor.clone(), tensor.requires_grad) for name, tensor in names}
    yield
    with torch.inference_mode():
        world.comfy.model_management.load_models_gpu([patcher])
    now = dict([*patcher.model.named_parameters(), *patcher.model.named_buffers()])
    assert now.keys() == tensors.keys() and list(patcher.model.modules()) == parts
    for name, (before, value, flag) in tensors.items():
        # ComfyUI makes new parameters of those that it patches.
        assert now[name] is before or f"{name}" in patcher.patches
        assert name in patcher.patches or (torch.equal(now[name], value) and now[name].requires_grad == flag)
        assert now[name].grad is None
    assert not any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    assert patcher.model.manual_cast_dtype is None
    assert not any(getattr(part, "comfy_cast_weights", False) for part in parts)


def picture(world, patcher, latent, condition):
    """Two steps of ComfyUI's sampler."""
    import comfy.sample

    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, 11)
        given = (2, 1.0, "euler", "simple", condition, condition, torch.zeros_like(latent))
        return comfy.sample.sample(patcher, noise, *given, seed=11).float()


def denoised_error(world, patcher, latent, condition):
    """Mean square error of the model's own output, with its patches, over noise levels: what training lowers."""
    comfy, errors = world.comfy, []

    class Sampler(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_, **__):
            sampling = wrap.inner_model.model_sampling
            for number, sigma in enumerate(sampling.sigmas[:: len(sampling.sigmas) // 8]):
                sigma = sigma.reshape(1).float()
                wide = sigma.reshape(1, *[1] * (noise.ndim - 1))
                x = sampling.noise_scaling(wide, rand(*noise.shape, seed=number), latent_image)
                options = extra_args["model_options"]
                found = comfy.samplers.calc_cond_batch(wrap.inner_model, [wrap.conds["positive"]], x, sigma, options)[0]
                one, zero = torch.ones_like(wide), torch.zeros_like(wide)
                scale = sampling.calculate_denoised(wide, one, zero) - sampling.calculate_denoised(wide, zero, zero)
                errors.append(((found - latent_image) / scale).square().mean().item())
            return torch.zeros_like(noise)

    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds({"positive": condition})
    with torch.inference_mode():
        guider.sample(torch.zeros_like(latent), latent, Sampler(), torch.ones(1), seed=0)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["eps", "v", "flux", "wan"])
def test_the_loss_falls_and_both_loaders_make_the_same_picture(world, caplog, kind, checkpointing):
    import comfy_extras.nodes_train
    import nodes

    patcher, latent, condition = made(world, kind)
    same = (latent, condition)
    before, plain = denoised_error(world, patcher, *same), picture(world, patcher, *same)
    with untouched(world, patcher):
        lora, curve, steps, file = train(
            world, patcher, *same, steps=25, batch_size=2, gradient_checkpointing=checkpointing, layers="full"
        )
    assert "otherwise" not in caplog.text
    assert steps == 25 and curve.shape[-1] == 3
    core = nodes.LoraLoader().load_lora(patcher, None, file, 1.0, 1.0)[0]
    ours, _, report = world.node().apply(patcher, None, lora_1=file, strength_model_1=1.0)
    modules = len(lora) // 3
    assert f"{modules}/{modules} modules" in report and len(core.patches) == len(ours.patches) == modules > 15
    memory = comfy_extras.nodes_train.LoraModelLoader().load_lora_model(patcher, lora, 1.0)[0]
    pictures = [picture(world, changed, *same) for changed in (core, ours, memory)]
    scale = (pictures[0] - plain).abs().max()
    assert scale > 1e-2
    for other in pictures[1:]:
        assert (other - pictures[0]).abs().max() <= 1e-3 * scale
    after = denoised_error(world, core, *same)
    print(f"{kind}: {modules} modules, error {before:.4f} -> {after:.4f}, picture moved {scale:.3f}")
    assert after < 0.9 * before
    assert torch.equal(picture(world, patcher, *same), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_weights_of_sixteen_bits_are_cast_and_not_changed(world, dtype, precision):
    patcher, *same = made(world, "eps", dtype)
    before = denoised_error(world, patcher, *same)
    with untouched(world, patcher):
        _, _, steps, file = train(world, patcher, *same, steps=12, mixed_precision=precision)
    core = world.comfy.sd.load_lora_for_models(patcher, None, load_file(world.loras / file), 1.0, 0.0)[0]
    assert steps == 12 and denoised_error(world, core, *same) < before


@pytest.mark.parametrize("kind", ["eps", "flux", "wan"])
def test_comfyuis_own_layers_are_known(world, kind):
    known = sys.modules[world.train.__module__.replace(".train", ".train_setup")]._FRESH
    layers = [part for part in made(world, kind)[0].model.modules() if getattr(part, "weight", None) is not None]
    kinds = {type(part) for part in layers if part.weight.ndim >= 2 and "Embedding" not in type(part).__name__}
    assert kinds and kinds <= known and None not in known


def test_a_model_with_loras_is_trained_with_them(world):
    patcher, *same = made(world, "eps")
    *_, file = train(world, patcher, *same, steps=12)
    first = world.comfy.sd.load_lora_for_models(patcher, None, load_file(world.loras / file), 1.0, 0.0)[0]
    before = denoised_error(world, first, *same)
    with untouched(world, first):
        *_, file = train(world, first, *same, steps=12, seed=8)
    second = world.comfy.sd.load_lora_for_models(first, None, load_file(world.loras / file), 1.0, 0.0)[0]
    assert denoised_error(world, second, *same) < before


def test_training_can_go_on_from_the_file(world):
    patcher, *same = made(world, "eps")
    first, *_, file = train(world, patcher, *same, save_precision="fp32")
    again, *_ = train(world, patcher, *same, continue_from=file, steps=1, learning_rate=1e-12, save_precision="fp32")
    assert all(torch.allclose(value, first[key], atol=1e-6) for key, value in again.items())


class Loader:
    """A node that gives what a test has, in place of ComfyUI's loaders."""

    RETURN_TYPES = ("MODEL", "LATENT", "CONDITIONING")
    FUNCTION = "give"
    given = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def give(self):
        patcher, latent, condition = Loader.given
        return patcher, {"samples": latent}, condition


def queued(world, monkeypatch, **changed):
    """Runs a workflow of loader and trainer in ComfyUI's executor; returns its messages."""
    import execution
    import nodes

    for name, node in (("TestLoader", Loader), ("LyCoreTrain", world.train)):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    links = {name: ["1", number] for number, name in enumerate(("model", "latents", "positive"))}
    prompt = {
        "1": {"class_type": "TestLoader", "inputs": {}},
        "2": {"class_type": "LyCoreTrain", "inputs": DEFAULTS | links | changed},
    }
    assert asyncio.run(execution.validate_prompt("p", prompt, None))[0]
    server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(server, cache_type=execution.CacheType.CLASSIC)
    executor.execute(prompt, "p", {}, ["2"])
    return executor, dict(executor.status_messages)


def test_comfyuis_executor_runs_the_workflow(world, monkeypatch):
    Loader.given = made(world, "eps")
    with untouched(world, Loader.given[0]):
        executor, messages = queued(world, monkeypatch, name="queued")
    assert executor.success and "execution_success" in messages
    assert (world.loras / "queued_00001_.safetensors").is_file()


def test_an_interruption_is_reported_and_keeps_the_adapter(world, monkeypatch):
    """The stop button within the fourth forward."""
    management = world.comfy.model_management
    Loader.given = made(world, "eps")
    patcher, calls = Loader.given[0], []
    deep = patcher.model.diffusion_model.middle_block[0]

    def press(*_):
        calls.append(1)
        if len(calls) == BEFORE + 4:
            management.interrupt_current_processing()

    with untouched(world, patcher):
        handle = deep.register_forward_pre_hook(press)
        executor, messages = queued(world, monkeypatch, name="stopped", steps=50)
        handle.remove()
    assert not executor.success and messages["execution_interrupted"]["node_id"] == "2"
    assert len(calls) == BEFORE + 4 and not management.processing_interrupted()
    kept = load_file(world.loras / "stopped_00001_.safetensors")
    whole, *_ = train(world, *Loader.given, steps=3)
    assert kept.keys() == whole.keys() and all(torch.equal(value, whole[key]) for key, value in kept.items())


def test_an_error_reaches_the_node(world, monkeypatch):
    Loader.given = made(world, "eps")
    with untouched(world, Loader.given[0]):
        executor, messages = queued(world, monkeypatch, options='{"network_alpa": 1}')
    assert not executor.success
    assert "LyCore Train: " in messages["execution_error"]["exception_message"]
    assert "network_alpha" in messages["execution_error"]["exception_message"]
