"""What training meets in the small host of `fakes`: a guider that calls a sampler, conditionings, models that denoise.

Written from what the contract promises: `model_sampling` noises, scales and reads a model's output; a conditioning has
parts that can be joined; a guider loads the model and hands it to a sampler in the mode of its caller.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

CHANNELS = 4
WIDTH = 8
TEXT = 6


class Eps:
    """Predicts the noise."""

    sigma_data = 1.0
    sigmas = torch.linspace(0.05, 8.0, 40)

    def calculate_input(self, sigma, noisy):
        return noisy / (sigma**2 + 1).sqrt()

    def calculate_denoised(self, sigma, output, noisy):
        return noisy - output * sigma

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return latent + sigma * noise


class V(Eps):
    def calculate_denoised(self, sigma, output, noisy):
        return noisy / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()


class Edm(Eps):
    def calculate_denoised(self, sigma, output, noisy):
        return noisy / (sigma**2 + 1) + output * sigma / (sigma**2 + 1).sqrt()


class Flow(Eps):
    sigmas = torch.linspace(0.02, 1.0, 50)

    def calculate_input(self, sigma, noisy):
        return noisy

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return (1 - sigma) * latent + sigma * noise


KINDS = {"eps": Eps, "v": V, "edm": Edm, "flow": Flow}


class Linear(nn.Linear):
    """A layer of the host's own class, as all its layers are: it can cast its weights at each call."""

    casts = False

    def forward(self, x):
        if not self.casts:
            return super().forward(x)
        return nn.functional.linear(x, self.weight.to(x), None if self.bias is None else self.bias.to(x))


class CastLinear(Linear):
    casts = True


class PackedLinear(nn.Module):
    """A quantised layer: no nn.Linear, and unpacked at each call."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randint(-9, 9, (outputs, inputs)).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, 0.02 * self.weight.to(x.dtype))


class Block(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.attn1 = nn.Module()
        self.attn1.to_q = linear(WIDTH, WIDTH)
        self.attn1.to_k = linear(TEXT, WIDTH)
        self.ff = nn.Sequential(Linear(WIDTH, 2 * WIDTH), nn.GELU(), Linear(2 * WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, h, context, transformer_options):
        transformer_options["block"] = transformer_options.get("block", 0) + 1
        x = self.norm(h)
        keys = self.attn1.to_k(context)
        weights = (self.attn1.to_q(x) @ keys.transpose(1, 2)).softmax(-1)
        return h + self.ff(x + weights @ keys)


class Denoiser(nn.Module):
    def __init__(self, linear=Linear):
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.time = Linear(1, WIDTH)
        self.blocks = nn.ModuleList([Block(linear), Block(linear)])
        self.conv_out = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)
        self.register_buffer("bias", torch.full((WIDTH,), 0.1))
        self.calls, self.seen = 0, []
        self.before = lambda: None

    def forward(self, x, t, context):
        self.calls += 1
        self.before()
        self.seen.append((tuple(x.shape), tuple(context.shape)))
        h = self.conv_in(x)
        size = h.shape
        h = h.flatten(2).transpose(1, 2) + self.time(t[:, None, None]) + self.bias
        options = {}
        for block in self.blocks:
            h = block(h, context, transformer_options=options)
        return self.conv_out(h.transpose(1, 2).reshape(size))


class TrainModel(nn.Module):
    def __init__(self, kind="eps", linear=Linear, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.diffusion_model = Denoiser(linear)
        self.model_sampling = KINDS[kind]()
        self.latent_format = SimpleNamespace(latent_channels=CHANNELS)
        self.model_config = SimpleNamespace()
        self.patched_with = None

    def process_latent_in(self, latent):
        return 0.5 * latent

    def apply_model(self, x, sigma, c_crossattn):
        wide = sigma.reshape(-1, 1, 1, 1)
        scaled = self.model_sampling.calculate_input(wide, x)
        output = self.diffusion_model(scaled, sigma, context=c_crossattn)
        return self.model_sampling.calculate_denoised(wide, output, x)


class Condition:
    """A part of a conditioning."""

    def __init__(self, cond):
        self.cond = cond

    def _copy_with(self, cond):
        return type(self)(cond)

    def process_cond(self, batch_size, **_):
        rows = self.cond.shape[0]
        return self._copy_with(self.cond if rows == batch_size else self.cond[:1].repeat(batch_size, 1, 1))

    def can_concat(self, other):
        return self.cond.shape == other.cond.shape

    def concat(self, others):
        return torch.cat([self.cond, *(other.cond for other in others)])


class Sampler:
    pass


class CFGGuider:
    loader = None

    def __init__(self, patcher):
        self.model_patcher = patcher
        self.ready = []

    def inner_set_conds(self, conds):
        self.original_conds = {name: convert_cond(entries) for name, entries in conds.items()}

    def sample(self, noise, latent_image, sampler, sigmas, seed=None):
        CFGGuider.loader([self.model_patcher])
        self.inner_model = self.model_patcher.model
        process_conds(self.inner_model, noise, dict(self.original_conds), noise.device, latent_image, seed=seed)
        options = {"model_options": {}, "seed": seed}
        return sampler.sample(self, sigmas, options, None, noise, latent_image, None, False)


def convert_cond(entries):
    return [{**more, "cross_attn": tensor, "model_conds": {}} for tensor, more in entries]


def process_conds(model, noise, conds, device, latent_image=None, denoise_mask=None, seed=None):
    assert latent_image.shape == noise.shape
    return {
        name: [{**entry, "model_conds": {"c_crossattn": Condition(entry["cross_attn"])}} for entry in entries]
        for name, entries in conds.items()
    }


def calc_cond_batch(model, conds, x, sigma, options):
    (entry,) = conds[0]
    parts = entry["model_conds"].items()
    given = {name: part.process_cond(batch_size=len(x), device=x.device, area=None).cond for name, part in parts}
    return [model.apply_model(x, sigma, **given)]


class ProgressBar:
    values: list[int] = []  # noqa: RUF012 - one run at a time

    def __init__(self, total):
        ProgressBar.values = []

    def update_absolute(self, value):
        ProgressBar.values.append(value)


class OutOfMemory(RuntimeError):
    """torch.cuda.OutOfMemoryError."""


def modules(folder, management, paths):
    """The host's modules that only training needs; completes the other two."""
    samplers, helpers, sample, utils, ops = (
        ModuleType(f"comfy.{name}") for name in ("samplers", "sampler_helpers", "sample", "utils", "ops")
    )
    ops.disable_weight_init, ops.manual_cast = SimpleNamespace(Linear=Linear), SimpleNamespace(Linear=CastLinear)
    samplers.Sampler, samplers.CFGGuider = Sampler, CFGGuider
    samplers.process_conds, samplers.calc_cond_batch = process_conds, calc_cond_batch
    helpers.convert_cond = convert_cond
    sample.fix_empty_latent_channels = lambda model, latent: latent
    utils.ProgressBar = ProgressBar
    utils.load_torch_file = lambda path, safe_load=False: load_file(path)

    def load_models_gpu(models, memory_required=0, force_full_load=False):
        for patcher in models:
            patcher.load()

    CFGGuider.loader = staticmethod(load_models_gpu)
    management.load_models_gpu = load_models_gpu
    management.OOM_EXCEPTION = OutOfMemory
    management.in_training = False
    management.soft_empty_cache = lambda: None
    management.should_use_bf16 = lambda device: True

    def get_save_image_path(prefix, root):
        where = (Path(root) / prefix).resolve()
        if not where.is_relative_to(root):
            raise Exception("outside of the folder")
        where.parent.mkdir(parents=True, exist_ok=True)
        taken = [int(path.stem.split("_")[-2]) for path in where.parent.glob(f"{where.name}_*_.safetensors")]
        subfolder = str(where.parent.relative_to(root))
        return str(where.parent), where.name, max(taken, default=0) + 1, subfolder if subfolder != "." else "", prefix

    paths.get_folder_paths = lambda kind: [str(folder)]
    paths.get_save_image_path = get_save_image_path
    return [samplers, helpers, sample, utils, ops]
