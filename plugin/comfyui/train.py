"""The node "LyCore Train": trains an adapter on the loaded model, whatever its architecture."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, ClassVar, NoReturn

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import torch

from . import curve, files, library, train_setup
from .library import NodeError
from .train_loop import TIMESTEPS, NotFinite, Plan, TrainSampler
from .train_setup import ALGORITHMS, LAYERS, OPTIMIZERS

_BASES = {"SD15": "sd_v1", "SD20": "sd_v2", "SDXL": "sdxl_base_v1-0", "SD3": "sd3m", "Flux": "flux1"}
"""ComfyUI's name of an architecture -> sd-scripts' `ss_base_model_version`."""
_log = logging.getLogger("lycore")


def _tip(text: str, **more: Any) -> dict[str, Any]:
    return {**more, "tooltip": text}


class LyCoreTrain:
    """ComfyUI hands every input over as a list, since latents and conditioning may come as several."""

    CATEGORY = "training/LyCore"
    FUNCTION = "train"
    INPUT_IS_LIST = True
    OUTPUT_NODE = True
    RETURN_TYPES = ("LORA_MODEL", "IMAGE", "INT", "STRING")
    RETURN_NAMES = ("lora", "loss_curve", "steps", "file")
    OUTPUT_TOOLTIPS = (
        "The trained adapter, for ComfyUI's nodes that load or save one.",
        "The loss of every step, and smoothed.",
        "How many steps are in the adapter.",
        "The file, by the name that LoRA loaders list.",
    )
    DESCRIPTION = (
        "Trains an adapter on the model that is connected and saves it among the LoRAs. The model is left as it was. "
        "Interrupt to stop early: what was trained until then is saved."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = ["train lora", "lora training", "lycoris", "fine-tune"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        loras = ["None", *folder_paths.get_filename_list("loras")]
        required = {
            "model": ("MODEL", _tip("The model to train on. LoRAs on it stay on while it trains.")),
            "latents": ("LATENT", _tip("Encoded pictures: a batch, or a list with any sizes.")),
            "positive": (
                "CONDITIONING",
                _tip("Encoded captions: one for all, or one for each latent. For Flux set its guidance to 1."),
            ),
            "name": ("STRING", _tip("Name of the file, to which a number is added.", default="lycore/trained")),
            "steps": ("INT", _tip("Updates of the adapter.", default=500, min=1, max=1_000_000)),
            "batch_size": ("INT", _tip("Latents that go through the model together.", default=1, min=1, max=1024)),
            "gradient_accumulation_steps": (
                "INT",
                _tip("Batches per update; as a larger batch, in less memory.", default=1, min=1, max=1024),
            ),
            "learning_rate": (
                "FLOAT",
                _tip(
                    "0 takes a usual one for the optimizer: 1e-4, Lion 3e-5, those that find it themselves 1.",
                    **{"default": 0.0, "min": 0.0, "max": 10.0, "step": 1e-6, "round": 1e-9},
                ),
            ),
            "rank": ("INT", _tip("Size of the adapter.", default=16, min=1, max=1024)),
            "algorithm": (list(ALGORITHMS), _tip("Kind of the adapter.")),
            "layers": (list(LAYERS), _tip("Attention and MLP, attention alone, or all that can have an adapter.")),
            "optimizer": (list(OPTIMIZERS), _tip("Prodigy and DAdapt find the learning rate themselves.")),
            "mixed_precision": (
                ["auto", "bf16", "no"],
                _tip("What the model computes in: auto is bf16 on a GPU that has it, else fp32 (no)."),
            ),
            "gradient_checkpointing": (
                "BOOLEAN",
                _tip("Much less memory; a step takes a third longer.", default=True),
            ),
            # A run costs too much to begin anew because a seed was drawn.
            "seed": (
                "INT",
                _tip(
                    "The same seed gives the same run.", default=0, min=0, max=2**64 - 1, control_after_generate=False
                ),
            ),
        }
        optional = {
            "timestep_sampling": (
                list(TIMESTEPS),
                _tip("Noise levels: evenly, or more in the middle (for flow models)."),
            ),
            "min_snr_gamma": (
                "FLOAT",
                _tip("Min-SNR weighting, usually 5; 0 is off.", default=0.0, min=0.0, max=100.0),
            ),
            "save_precision": (["fp16", "bf16", "fp32"], _tip("Precision of the file.")),
            "continue_from": (loras, _tip("An adapter of the same layers and rank to go on from.")),
            "layer_patterns": (
                "STRING",
                _tip(
                    "Instead of `layers`: patterns of names such as *attn2*, one per line.", default="", multiline=True
                ),
            ),
            "options": (
                "STRING",
                _tip(
                    "More options as JSON, with sd-scripts' names, for example "
                    '{"network_alpha": 8, "lr_scheduler": "cosine", "lr_warmup_steps": 50}.',
                    default="{}",
                    multiline=True,
                ),
            ),
        }
        return {"required": required, "optional": optional}

    @classmethod
    def IS_CHANGED(cls, continue_from: Any = ("None",), **_: Any) -> str:
        name = _single(continue_from)
        try:
            return files.digest(_path(name)) if name not in (None, "None") else ""
        except (OSError, NodeError) as problem:
            # The run itself reports it.
            return str(problem)

    def train(
        self, model: list[Any], latents: list[Any], positive: list[Any], **given: list[Any]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, int, str]:
        """Trains and saves. An interruption is raised again when the adapter is saved."""
        asked = {name: _single(value) for name, value in given.items()}
        # A workflow sent through the API may leave the optional ones out.
        optional = self.INPUT_TYPES()["optional"].items()
        asked = {
            name: (kind[0] if isinstance(kind, list) else about["default"]) for name, (kind, about) in optional
        } | asked
        try:
            return _run(model[0], latents, positive, asked)
        except NodeError as problem:
            raise NodeError(f"LyCore Train: {problem}") from problem
        finally:
            comfy.model_management.soft_empty_cache()


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _path(name: str) -> str:
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise NodeError(f"`{name}` is not in the folders for LoRAs. Hint: refresh the page, or choose another")
    return path


def _run(
    model: Any, latents: list[Any], positive: list[Any], asked: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, int, str]:
    lycore = library.find()
    _place(asked["name"])
    begin = None if asked["continue_from"] in (None, "", "None") else _path(asked["continue_from"])
    samples = train_setup.samples(model, latents)
    conditions = train_setup.conditions(positive, len(samples))
    dtype = train_setup.compute_dtype(asked["mixed_precision"], model.load_device)
    with contextlib.closing(train_setup.network(lycore, asked, dtype)) as network:
        patcher = train_setup.patcher(model, dtype)
        layers = train_setup.attach(lycore, network, patcher, asked)
        # All of the GPU, as ComfyUI's own trainer takes it: a graph keeps far more than sampling does.
        comfy.model_management.load_models_gpu([patcher], memory_required=1e20, force_full_load=True)
        try:
            with torch.inference_mode(False):
                network.build(patcher.load_device)
                if begin is not None:
                    network.load_weights(begin)
        except lycore.LycoreError as problem:
            raise NodeError(str(problem)) from problem
        plan = Plan(
            asked["steps"],
            asked["batch_size"],
            asked["gradient_accumulation_steps"],
            asked["seed"],
            asked["timestep_sampling"],
            asked["min_snr_gamma"],
            asked["gradient_checkpointing"],
            restorable="ScheduleFree" not in asked["optimizer"],
        )
        _log.info(
            "training %d layers, %d parameters, on %d latents, in %s",
            len(layers),
            network.parameter_count,
            len(samples),
            str(dtype).removeprefix("torch."),
        )
        sampler = TrainSampler(network, layers, plan, samples, conditions)
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds({"positive": conditions[:1]})
        guider.sample(torch.zeros_like(samples[0]), samples[0], sampler, torch.ones(1), seed=plan.seed)
        file = _save(lycore, network, patcher, asked, sampler, len(samples)) if sampler.steps else None
    if sampler.stopped is not None:
        _stop(lycore, sampler, plan, file)
    lora = comfy.utils.load_torch_file(_path(file), safe_load=True)
    return lora, curve.picture(sampler.losses, f"{file}: {sampler.steps} steps"), sampler.steps, file


def _place(name: str) -> tuple[str, str, str]:
    """Folder, file name and name for loaders of a file that is not there yet, numbered as ComfyUI numbers pictures."""
    root = os.path.abspath(folder_paths.get_folder_paths("loras")[0])
    if not os.path.basename(name.strip()):
        raise NodeError(f"`{name}` is no name for a file")
    try:
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(name.strip(), root)
    except Exception as problem:
        raise NodeError(f"`{name}` is no place in {root}: {problem}") from problem
    if not os.access(folder, os.W_OK):
        raise NodeError(f"{folder} cannot be written to")
    file = f"{stem}_{counter:05}_.safetensors"
    return folder, file, os.path.join(subfolder, file)


def _save(lycore: Any, network: Any, patcher: Any, asked: dict[str, Any], sampler: TrainSampler, count: int) -> str:
    folder, file, name = _place(asked["name"])
    base = type(patcher.model.model_config).__name__
    metadata = {
        "ss_base_model_version": _BASES.get(base, base),
        "ss_num_train_images": str(count),
        "ss_total_batch_size": str(asked["batch_size"] * asked["gradient_accumulation_steps"]),
        "ss_min_snr_gamma": str(asked["min_snr_gamma"] or None),
        "ss_timestep_sampling": asked["timestep_sampling"],
        "ss_steps": str(sampler.steps),
    }
    path = os.path.join(folder, file)
    try:
        network.save(path, asked["save_precision"], metadata)
    except lycore.TrainError as problem:
        # Better a larger file than none.
        _log.warning("%s Saving in fp32.", problem)
        network.save(path, "fp32", metadata)
    _log.info("saved %s", path)
    return name


def _stop(lycore: Any, sampler: TrainSampler, plan: Plan, file: str | None) -> NoReturn:
    """Raises what ended the run early, as ComfyUI expects it."""
    problem = sampler.stopped
    kept = (
        f"The adapter after {sampler.steps} of {plan.steps} steps is saved as {file}." if file else "Nothing was saved."
    )
    out_of_memory = comfy.model_management.OOM_EXCEPTION
    if isinstance(problem, comfy.model_management.InterruptProcessingException):
        _log.info("Interrupted. %s", kept)
        raise problem
    if isinstance(problem, out_of_memory):
        # The same class, so that ComfyUI frees its models; without the old one, whose frames hold the graph.
        hint = "a smaller batch, smaller latents, or gradient checkpointing"
        raise out_of_memory(f"LyCore Train: the GPU's memory is full. {kept} Hint: {hint}.")
    if isinstance(problem, (NotFinite, lycore.TrainError)):
        raise NodeError(f"{problem}. {kept} Hint: try half the learning rate.") from problem
    if isinstance(problem, Exception):
        raise NodeError(f"{problem}. {kept}") from problem
    raise problem


NODE_CLASS_MAPPINGS = {"LyCoreTrain": LyCoreTrain}
NODE_DISPLAY_NAME_MAPPINGS = {"LyCoreTrain": "LyCore Train"}
