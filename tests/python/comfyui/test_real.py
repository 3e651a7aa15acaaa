"""The node "LyCore LoRA Stack" in a real ComfyUI (`real`): against the loader that ComfyUI has."""

from __future__ import annotations

import asyncio
from pathlib import Path

import fakes
import pytest
import torch
from real import UNET, skipped
from safetensors.torch import load_file, save_file

pytest_plugins = ("real",)
pytestmark = skipped


def kohya(world, name, rank, seed, alpha):
    """A file as sd-scripts writes it, for the text encoder and every layer of the U-Net that has a diffusers name."""
    comfy, generator = world.comfy, torch.Generator().manual_seed(seed)
    shapes = {key: weight.shape for key, weight in world.model().model.state_dict().items()}
    places = {}
    for theirs, ours in comfy.utils.unet_to_diffusers(UNET).items():
        # The map names a shortcut for every block, also where there is none.
        if theirs.endswith(".weight") and f"diffusion_model.{ours}" in shapes:
            places["lora_unet_" + theirs.removesuffix(".weight").replace(".", "_")] = shapes[f"diffusion_model.{ours}"]
    prefix = "clip_l.transformer."
    for key, weight in world.clip().cond_stage_model.state_dict().items():
        if ".layers." in key and key.endswith(".weight"):
            path = key.removeprefix(prefix).removesuffix(".weight")
            places["lora_te_" + path.replace(".", "_")] = weight.shape
    tensors = {}
    for module, shape in places.items():
        if len(shape) >= 2:
            kernel = shape[2:]
            up = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=generator) * 0.1
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.1
            tensors |= {f"{module}.lora_up.weight": up.half(), f"{module}.lora_down.weight": down.half()}
            tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, world.loras / name)
    return len(tensors) // 3


@pytest.fixture(scope="module")
def files(world):
    """name -> number of modules"""
    ranks = {"a.safetensors": 4, "b.safetensors": 8}
    return {name: kohya(world, name, rank, seed=rank, alpha=2) for name, rank in ranks.items()}


def ours(world, model, clip, *rows):
    inputs = {}
    for number, (name, on_model, on_clip) in enumerate(rows, 1):
        inputs |= {f"lora_{number}": name, f"strength_model_{number}": on_model, f"strength_clip_{number}": on_clip}
    with torch.inference_mode():
        return world.node().apply(model, clip, **inputs)


def core(world, model, clip, *rows):
    for name, on_model, on_clip in rows:
        state = load_file(world.loras / name)
        model, clip = world.comfy.sd.load_lora_for_models(model, clip, state, on_model, on_clip)
    return model, clip


def weights(patcher):
    """All weights with the patches, copied; the model is restored afterwards."""
    with torch.inference_mode():
        # ComfyUI loads a text encoder when it makes one, and would take it for patched.
        patcher.unpatch_model(torch.device("cpu"))
        patcher.patch_model(device_to=torch.device("cpu"))
        state = {key: weight.clone() for key, weight in patcher.model.state_dict().items()}
        patcher.unpatch_model(torch.device("cpu"))
    return state


ROWS = ("a.safetensors", 0.8, 0.6), ("b.safetensors", -0.5, 0.25)


def test_the_weights_are_those_of_comfyuis_loader(world, files):
    model, clip = world.model(), world.clip()
    base = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    new_model, new_clip, report = ours(world, model, clip, *ROWS)
    for name, modules in files.items():
        assert f"{name}: {modules}/{modules} modules" in report
    core_model, core_clip = core(world, model, clip, *ROWS)
    assert set(new_model.patches) == set(core_model.patches) and len(new_model.patches) > 60
    assert set(new_clip.patcher.patches) == set(core_clip.patcher.patches) and len(new_clip.patcher.patches) == 12
    for own, theirs in ((new_model, core_model), (new_clip.patcher, core_clip.patcher)):
        result, expected = weights(own), weights(theirs)
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(result[key], value, rtol=1e-6, atol=1e-6), key
    after, changed = model.model.state_dict(), weights(new_model)
    assert all(not torch.equal(changed[key], base[key]) for key in new_model.patches)
    assert all(torch.equal(after[key], value) for key, value in base.items())


def test_half_precision_weights_are_rounded_once(world, files):
    model = world.model(torch.bfloat16)
    base = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    result = weights(ours(world, model, None, *ROWS)[0])
    # ComfyUI's own patches of the same files, summed in fp64.
    equal = total = 0
    for key, patches in core(world, model, None, *ROWS)[0].patches.items():
        exact = base[key].double()
        for strength, adapter, *_ in patches:
            up, down, alpha = adapter.weights[:3]
            change = (up.double().flatten(1) @ down.double().flatten(1)).reshape(exact.shape)
            exact += strength * alpha / down.shape[0] * change
        equal += (result[key] == exact.to(torch.bfloat16)).sum().item()
        total += exact.numel()
    assert equal / total >= 0.999


def test_comfyui_restores_the_model_and_does_not_load_it_again_for_the_same_loras(world, files, monkeypatch):
    comfy = world.comfy
    model = world.model()
    base = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    full = []
    unpatch = comfy.model_patcher.ModelPatcher.unpatch_model

    def counted(self, device_to=None, unpatch_weights=True):
        if unpatch_weights and self.backup:
            full.append(self)
        return unpatch(self, device_to, unpatch_weights)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "unpatch_model", counted)

    def reloads(make):
        comfy.model_management.unload_all_models()
        comfy.model_management.load_models_gpu([make()])
        full.clear()
        second = make()
        comfy.model_management.load_models_gpu([second])
        return len(full), second

    with torch.inference_mode():
        again, loaded = reloads(lambda: ours(world, model, None, *ROWS)[0])
        assert again == 0
        assert model.model.current_weight_patches_uuid == loaded.patches_uuid
        assert reloads(lambda: core(world, model, None, *ROWS)[0])[0] == 1
        strengths = iter((0.5, 0.25))
        assert reloads(lambda: ours(world, model, None, ("a.safetensors", next(strengths), 1.0))[0])[0] == 1
        # On a GPU ComfyUI unloads a model with its patches; they come off when it is needed without them.
        comfy.model_management.load_models_gpu([model])
        comfy.model_management.unload_all_models()
    assert all(torch.equal(weight, base[key]) for key, weight in model.model.state_dict().items())


def test_offloaded_layers_compute_with_the_same_weights(world, files):
    model = ours(world, world.model(), None, *ROWS)[0]
    layer = model.model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        plain = layer(x)
        model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
        assert layer.weight_function
        offloaded = layer(x)
        model.unpatch_model(torch.device("cpu"))
        model.patch_model(device_to=torch.device("cpu"))
        resident = layer(x)
        model.unpatch_model(torch.device("cpu"))
        assert torch.equal(layer(x), plain)
    assert torch.equal(offloaded, resident)
    assert not torch.allclose(offloaded, plain, atol=1e-3)


def test_chained_nodes_and_comfyuis_loader_behind_ours(world, files):
    model = world.model()
    together = ours(world, model, None, *ROWS)[0]
    chained = ours(world, ours(world, model, None, ROWS[0])[0], None, ROWS[1])[0]
    assert all(len(entries) == 1 for entries in chained.patches.values())
    mixed, _ = core(world, ours(world, model, None, ROWS[0])[0], None, ROWS[1])
    expected = weights(together)
    for patcher in (chained, mixed):
        for key, value in weights(patcher).items():
            assert torch.allclose(value, expected[key], rtol=1e-6, atol=1e-6), key


def test_weight_hooks_use_the_same_objects(world, files):
    """ComfyUI's per-prompt hooks scale a patch's strength; the object must follow."""
    calculate = world.comfy.lora.calculate_weight
    model = ours(world, world.model(), None, ROWS[0])[0]
    key = next(key for key in model.patches if "attn1.to_q" in key)
    base = model.model.state_dict()[key]
    strength, *rest = model.patches[key][0]
    half = calculate([(0.5 * strength, *rest)], base.clone(), key)
    whole = calculate([(strength, *rest)], base.clone(), key)
    assert torch.allclose(half - base, 0.5 * (whole - base), atol=1e-6)


def test_a_lora_for_another_architecture_is_refused(world, files):
    tensors = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(96, 4),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(4, 32),
    }
    save_file(tensors, world.loras / "flux.safetensors")
    with pytest.raises(RuntimeError, match=r"row 1, flux\.safetensors: it does not fit the model BaseModel"):
        ours(world, world.model(), None, ("flux.safetensors", 1.0, 1.0))


def test_comfyui_lists_the_folder_as_custom_node(world, tmp_path):
    """Linked into custom_nodes, loaded by ComfyUI's own loader of custom nodes."""
    import nodes

    link = tmp_path / "custom_nodes" / "lycore"
    link.parent.mkdir()
    link.symlink_to(Path(fakes.PLUGIN), target_is_directory=True)
    assert asyncio.run(nodes.load_custom_node(str(link)))
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.pop("LyCoreTrain") == "LyCore Train"
    assert nodes.NODE_CLASS_MAPPINGS.pop("LyCoreTrain").INPUT_IS_LIST
    node = nodes.NODE_CLASS_MAPPINGS.pop("LyCoreLoraStack")
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.pop("LyCoreLoraStack") == "LyCore LoRA Stack"
    assert set(node.INPUT_TYPES()) == {"required", "optional"}
    assert node.RETURN_TYPES == ("MODEL", "CLIP", "STRING")
