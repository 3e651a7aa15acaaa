"""The node "LyCore Train" on a host that keeps ComfyUI's contract (`train_fakes`): what it computes, keeps and says."""

from __future__ import annotations

import json
import sys

import fakes
import pytest
import torch
import train_fakes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lycore

DEFAULTS = {
    "name": "runs/one",
    "steps": 3,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "rank": 4,
    "algorithm": "lora",
    "layers": "attn-mlp",
    "optimizer": "AdamW",
    "mixed_precision": "auto",
    "gradient_checkpointing": False,
    "seed": 7,
}
BEFORE = 2
"""Forwards before the first step, which compare training with sampling."""
FIRST = "lora_unet_blocks_0_attn1_to_q"


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(count=4, size=(6, 6), seed=1):
    return {"samples": rand(count, train_fakes.CHANNELS, *size, seed=seed)}


def text(seed=2, tokens=5):
    return [[rand(1, tokens, train_fakes.TEXT, seed=seed), {}]]


class Trainer:
    """The fake host with the node in it."""

    def __init__(self, folder, loaded):
        self.folder = folder
        self.node = loaded.NODE_CLASS_MAPPINGS["LyCoreTrain"]
        self.part = lambda name: sys.modules[f"{loaded.__name__}.{name}"]
        self.management = sys.modules["comfy.model_management"]

    def train(self, model, data=None, positive=None, **changed):
        """Runs a new node as ComfyUI does: in inference mode, every input a list."""
        inputs = {name: [value] for name, value in (DEFAULTS | changed).items()}
        with torch.inference_mode():
            return self.node().train([fakes.Patcher(model)], data or [latents()], positive or [text()], **inputs)

    def files(self):
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.safetensors"))


@pytest.fixture
def host(tmp_path, monkeypatch, torch_library):
    for name, module in fakes.modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    loaded = fakes.load_node()
    yield Trainer(tmp_path, loaded)
    for name in set(sys.modules) - before:
        if name.startswith(loaded.__name__):
            del sys.modules[name]


def model(kind="eps", **given):
    """A model as a loader node makes it: its weights are inference tensors."""
    with torch.inference_mode():
        return train_fakes.TrainModel(kind, **given)


class Untouched:
    """Fails unless a model is, in the end, exactly as it was."""

    def __init__(self, model):
        self.model = model

    def _state(self):
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        flags = [
            (part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in self.model.modules()
        ]
        return {name: (id(tensor), tensor.requires_grad, tensor.grad) for name, tensor in tensors}, flags

    def __enter__(self):
        self.before, self.values = self._state(), {k: v.clone() for k, v in self.model.state_dict().items()}

    def __exit__(self, *_):
        assert self._state() == self.before
        assert all(torch.equal(value, self.values[key]) for key, value in self.model.state_dict().items())
        assert not any("forward" in vars(part) for part in self.model.modules())
        assert sys.modules["comfy.model_management"].in_training is False


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", train_fakes.KINDS)
def test_the_loss_falls_and_the_model_stays_as_it_was(host, kind, checkpointing):
    # One latent and many steps: what is left to learn is the latent itself.
    base = model(kind)
    with Untouched(base):
        lora, curve, steps, file = host.train(
            base, [latents(1)], steps=150, batch_size=4, gradient_checkpointing=checkpointing, layers="full"
        )
    losses = host.part("curve").smoothed([])
    assert losses == [] and steps == 150 and file == "runs/one_00001_.safetensors"
    assert curve.shape == (1, 540, 960, 3) and 0 <= curve.min() < curve.max() <= 1
    saved = load_file(host.folder / file)
    assert saved.keys() == lora.keys() and all(torch.equal(saved[key], lora[key]) for key in saved)
    assert len(lora) == 3 * 11
    with torch.no_grad():
        before, after = (evaluated(host, base, kind, path) for path in (None, host.folder / file))
    assert after < 0.8 * before, (before, after)


def evaluated(host, base, kind, adapter):
    """Mean error of the model's own output over noise levels, in fp64, with an adapter merged in or without one."""
    clean, kit = 0.5 * latents(1)["samples"], train_fakes.KINDS[kind]
    twin = train_fakes.TrainModel(kind)
    twin.load_state_dict(base.state_dict())
    if adapter is not None:
        with lycore.Stack(twin) as stack:
            stack.add(adapter)
            stack.apply()
            return evaluated(host, twin, kind, None)
    total = 0.0
    for number, sigma in enumerate(kit.sigmas[::3]):
        noise = rand(*clean.shape, seed=100 + number)
        noisy = kit().noise_scaling(sigma, noise, clean)
        output = twin.diffusion_model(kit().calculate_input(sigma, noisy), sigma[None], text()[0][0])
        total += (output - goal(kind, sigma, noise, clean)).square().mean().item()
    return total


def goal(kind, sigma, noise, clean):
    """What a model of a kind shall answer, by its textbook."""
    root = (sigma**2 + 1).sqrt()
    return {
        "eps": noise,
        "v": (noise - sigma * clean) / root,
        "edm": (sigma * clean - noise) / root,
        "flow": noise - clean,
    }[kind]


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("kind", train_fakes.KINDS)
def test_the_loss_is_that_of_the_models_own_output(host, kind, gamma):
    loop, kit = host.part("train_loop"), train_fakes.KINDS[kind]()
    for sigma in kit.sigmas[[0, 10, 39]].double():
        clean, noise, output = (rand(1, 4, 5, 5, seed=n).double() for n in range(3))
        wide = sigma.reshape(1, 1, 1, 1)
        noisy = kit.noise_scaling(wide, noise, clean)
        error = (kit.calculate_denoised(wide, output, noisy) - clean) / loop.output_scale(kit, wide)
        got = error.square().mean() * loop.snr_weight(kit, wide, gamma).squeeze()
        snr = ((1 - sigma) / sigma) ** 2 if kind == "flow" else 1 / sigma**2
        # As sd-scripts has it for eps and v; flow's velocity error is the clean latent's over sigma.
        weight = {"eps": 1 / snr, "v": 1 / (snr + 1), "edm": 1 / (snr + 1), "flow": sigma**2}[kind]
        weight = min(snr, gamma) * weight if gamma else 1.0
        assert torch.allclose(got, weight * (output - goal(kind, sigma, noise, clean)).square().mean(), rtol=1e-9)


def test_a_batch_is_the_mean_over_its_images_with_their_own_texts(host, monkeypatch):
    """Texts that cannot be joined go singly; the sum is the same."""
    data = [latents(2)]
    one, two = text(3)[0], text(4)[0]
    adapters = {}
    for joined in (True, False):
        monkeypatch.setattr(train_fakes.Condition, "can_concat", lambda a, b, joined=joined: joined)
        base = model()
        adapters[joined], *_ = host.train(base, data, [[one, two]], batch_size=2, save_precision="fp32")
        assert [shape[0] for shape, _ in base.diffusion_model.seen[BEFORE:]] == ([2] * 3 if joined else [1] * 6)
        for key, value in adapters[joined].items():
            assert torch.allclose(value, adapters[True][key], atol=2e-5), key
    swapped, *_ = host.train(model(), data, [[two, one]], batch_size=2, save_precision="fp32")
    assert not torch.allclose(swapped[f"{FIRST}.lora_up.weight"], adapters[True][f"{FIRST}.lora_up.weight"], atol=1e-4)


def test_latents_of_several_sizes_take_turns(host):
    base = model()
    data = [latents(3, (6, 6)), latents(1, (4, 8)), latents(2, (6, 6), seed=5)]
    host.train(base, data, steps=60, batch_size=2)
    seen = [shape for shape, _ in base.diffusion_model.seen[BEFORE:]]
    sizes = [shape[2:] for shape in seen]
    assert len(sizes) == 60 and {shape[0] for shape in seen} == {2}
    assert 2 <= sizes.count((4, 8)) <= 22 and sizes.count((6, 6)) + sizes.count((4, 8)) == 60

    draws = host.part("train_loop").Draws([(1,), (2,), (1,), (1,)], 3, seed=0)
    rounds = [index for _ in range(40) for index in draws.batch()]
    assert max(map(rounds.count, (0, 2, 3))) - min(map(rounds.count, (0, 2, 3))) <= 1


def test_accumulation_is_a_larger_batch(host):
    base = model()
    *_, steps, _ = host.train(base, gradient_accumulation_steps=3, steps=4)
    assert steps == 4 and base.diffusion_model.calls == BEFORE + 12
    assert train_fakes.ProgressBar.values == [1, 2, 3, 4]


def test_a_seed_decides_the_file(host):
    states = [torch.get_rng_state()]
    kept = [host.train(model(), seed=seed, timestep_sampling="sigmoid")[0] for seed in (5, 5, 2**64 - 1)]
    states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())
    assert not torch.equal(kept[0][f"{FIRST}.lora_up.weight"], kept[2][f"{FIRST}.lora_up.weight"])
    assert host.files() == [f"runs/one_0000{number}_.safetensors" for number in (1, 2, 3)]


def test_timesteps_are_drawn_from_the_models_table(host):
    draws = host.part("train_loop").Draws([(1,)], 1, seed=0)
    table = torch.linspace(0, 1, 1001)
    even, middle = (draws.sigmas(table, 20_000, how) for how in ("uniform", "sigmoid"))
    assert torch.isin(even, table).all() and even.min() < 0.01 and even.max() > 0.99
    # Standard deviations of the uniform and the logit-normal distribution; 20,000 draws are off by 0.002.
    assert abs(even.mean() - 0.5) < 0.01 and abs(even.std() - 0.2887) < 0.01
    assert abs(middle.mean() - 0.5) < 0.01 and abs(middle.std() - 0.2083) < 0.01


def stop_at(base, call, action):
    """Runs `action` in the middle of the n-th forward of the steps."""

    def before():
        if base.diffusion_model.calls == BEFORE + call:
            action()

    base.diffusion_model.before = before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_interruption_within_a_step_keeps_the_steps_before(host, checkpointing, caplog):
    base, same = model(), {"gradient_checkpointing": checkpointing, "save_precision": "fp32"}
    stop_at(base, 3, lambda: setattr(host.management, "interrupted", True))
    with Untouched(base), caplog.at_level("INFO", "lycore"), pytest.raises(fakes.Interrupted):
        host.train(base, steps=50, **same)
    assert base.diffusion_model.calls == BEFORE + 3
    assert "after 2 of 50 steps is saved as runs/one_00001_.safetensors" in caplog.text
    host.management.interrupted = False
    whole, *_ = host.train(model(), steps=2, **same)
    kept = load_file(host.folder / "runs/one_00001_.safetensors")
    assert all(torch.equal(value, whole[key]) for key, value in kept.items())
    with safe_open(host.folder / "runs/one_00001_.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_steps"], metadata["ss_num_train_images"], metadata["ss_min_snr_gamma"]) == ("2", "4", "None")


def test_an_interruption_of_the_first_step_leaves_no_file(host):
    base = model()
    stop_at(base, 1, lambda: setattr(host.management, "interrupted", True))
    with Untouched(base), pytest.raises(fakes.Interrupted):
        host.train(base)
    assert host.files() == []


def test_full_memory_is_reported_as_such_and_keeps_the_adapter(host):
    def full():
        raise train_fakes.OutOfMemory("CUDA out of memory")

    base = model()
    stop_at(base, 4, full)
    with Untouched(base), pytest.raises(train_fakes.OutOfMemory) as raised:
        host.train(base, steps=9)
    assert "after 3 of 9 steps is saved as runs/one_00001_" in str(raised.value) and "Hint: a smaller batch" in str(
        raised.value
    )
    assert raised.value.__cause__ is None and raised.value.__context__ is None
    assert host.files() == ["runs/one_00001_.safetensors"]


def test_a_loss_that_is_not_finite_gives_back_the_last_good_adapter(host):
    """The update after step 2 blows up, which shows in step 3: the file has step 1, whose loss was finite."""
    base = model()
    schedule = {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:1,1e38"}}
    options = json.dumps({**schedule, "max_grad_norm": 0})
    same = {"optimizer": "SGDNesterov", "save_precision": "fp32", "learning_rate": 0.1}
    with Untouched(base), pytest.raises(RuntimeError) as raised:
        host.train(base, steps=20, options=options, **same)
    message = str(raised.value)
    assert (
        "the loss of step 3 is" in message
        and "after 1 of 20 steps is saved" in message
        and "half the learning rate" in message
    )
    whole, *_ = host.train(model(), steps=1, options=options, **same)
    kept = load_file(host.folder / "runs/one_00001_.safetensors")
    assert all(torch.equal(value, whole[key]) for key, value in kept.items())


def test_factors_beyond_fp16_are_saved_in_fp32(host, caplog):
    lora, _, steps, _ = host.train(
        model(), steps=1, optimizer="SGDNesterov", learning_rate=1e8, options='{"max_grad_norm": 0}'
    )
    up = lora[f"{FIRST}.lora_up.weight"]
    assert (
        steps == 1 and up.dtype == torch.float32 and 65504 < up.abs().max() < 1e30 and "Saving in fp32" in caplog.text
    )


def test_an_adapter_is_taken_up_again(host):
    first = host.train(model(), save_precision="fp32")
    nothing = {"learning_rate": 1e-12, "steps": 1, "save_precision": "fp32"}
    again, *_ = host.train(model(), continue_from=first[3], **nothing)
    assert all(torch.allclose(value, first[0][key], atol=1e-6) for key, value in again.items())
    with pytest.raises(RuntimeError, match=r"LyCore Train: .*\[4, 8\], this network \[8, 8\]"):
        host.train(model(), continue_from=first[3], rank=8)
    with pytest.raises(RuntimeError, match="`gone` is not in the folders"):
        host.train(model(), continue_from="gone")
    changed = host.node.IS_CHANGED
    before = changed(continue_from=[first[3]], steps=[3])
    assert before and before == changed(continue_from=[first[3]])
    save_file(first[0], host.folder / first[3])
    assert changed(continue_from=[first[3]]) != before
    assert changed() == changed(continue_from=["None"]) == ""


def test_the_file_has_names_that_loaders_know(host):
    lora, *_ = host.train(model(), layers="attn-only")
    assert sorted({key.split(".")[0] for key in lora}) == [
        f"lora_unet_blocks_{block}_attn1_to_{part}" for block in (0, 1) for part in ("k", "q")
    ]
    known = fakes.model_lora_keys_unet(model(), {})
    assert {key.split(".")[0] for key in lora} <= known.keys()
    names = host.part("names").Targets(fakes.Patcher(fakes.Model()))
    assert names.file_name("diffusion_model.joint_blocks.0.attn.qkv.weight") == "lora_unet_joint_blocks_0_attn_qkv"
    assert names.file_name("diffusion_model.nothing.weight") == "lora_unet_nothing"


def test_diffusers_names_of_a_u_net_win(host, monkeypatch):
    def with_diffusers(module, found):
        key = "diffusion_model.blocks.0.attn1.to_q.weight"
        return fakes.model_lora_keys_unet(module, found) | {"lora_unet_down_blocks_0_to_q": key}

    monkeypatch.setattr(sys.modules["comfy.lora"], "model_lora_keys_unet", with_diffusers)
    lora, *_ = host.train(model(), layer_patterns="*.0.attn1.to_q\n*1.ff.0")
    assert {key.split(".")[0] for key in lora} == {"lora_unet_down_blocks_0_to_q", "lora_unet_blocks_1_ff_0"}


def test_presets_choose_layers_of_every_architecture(host):
    """Names from models of ComfyUI: what they belong to."""
    names = {
        "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0": "attention",
        "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj": "mlp",
        "input_blocks.4.0.in_layers.2": None,
        "double_blocks.0.txt_attn.proj": "attention",
        "double_blocks.0.img_mlp.2": "mlp",
        "double_blocks.0.img_mod.lin": None,
        "single_blocks.7.linear1": "attention",
        "joint_blocks.0.context_block.attn.qkv": "attention",
        "blocks.3.self_attn.q": "attention",
        "blocks.3.ffn.0": "mlp",
        "blocks.0.adaln_modulation_self_attn.1": None,
        "blocks.0.adaln_modulation_mlp.2": None,
        "layers.0.attention.qkv": "attention",
        "layers.0.feed_forward.w2": "mlp",
        "transformer_blocks.0.attn.add_q_proj": "attention",
        "transformer_blocks.0.txt_mlp.net.0.proj": "mlp",
        "double_stream_blocks.0.block.ff_i.experts.0.w1": "mlp",
        "double_layers.0.mlpC.c_fc1": "mlp",
        "t_embedder.mlp.0": None,
        "final_layer.linear": None,
    }
    setup = host.part("train_setup")
    for preset, kinds in {
        "attn-mlp": ("attention", "mlp"),
        "attn-only": ("attention",),
        "full": (*names.values(),),
    }.items():
        chosen, left_out = setup.LAYERS[preset]
        for name, kind in names.items():
            assert (setup._matches(name, chosen) and not setup._matches(name, left_out)) == (kind in kinds), (
                preset,
                name,
            )


def test_layers_of_the_hosts_own_classes_are_trained(host):
    base = model(linear=train_fakes.PackedLinear)
    with Untouched(base):
        lora, *_ = host.train(base, layers="attn-only", steps=5)
    assert all(lora[key].abs().max() > 0 for key in lora if key.endswith("up.weight")) and len(lora) == 12


class Derived(train_fakes.Linear):
    """Of another node, which may do with its output what it likes."""


@pytest.mark.parametrize(
    ("linear", "in_place"), [(train_fakes.Linear, True), (train_fakes.CastLinear, True), (Derived, False)]
)
def test_outputs_of_the_hosts_own_layers_are_not_copied(host, monkeypatch, linear, in_place):
    made, seen = {}, set()
    forward = train_fakes.Linear.forward

    def recorded(layer, x):
        y = forward(layer, x)
        made[layer] = y.data_ptr()
        return y

    def call(layer, x):
        y = torch.nn.Module.__call__(layer, x)
        if layer._forward_hooks:
            seen.add(y.data_ptr() == made[layer])
        return y

    monkeypatch.setattr(train_fakes.Linear, "forward", recorded)
    monkeypatch.setattr(train_fakes.Linear, "__call__", call)
    host.train(model(linear=linear), layers="attn-only")
    assert seen == {in_place}


def test_everything_that_is_wrong_with_the_options_is_said_at_once(host):
    with pytest.raises(RuntimeError) as raised:
        host.train(model(), options='{"network_alpa": 8, "learning_rate": 1, "lr_scheduler": "cosin"}')
    message = str(raised.value)
    for part in ("LyCore Train: `learning_rate` stands in `options`", "network_alpa", "network_alpha", "cosin"):
        assert part in message
    for bad in ("[1]", "{", "1"):
        with pytest.raises(RuntimeError, match="`options` is not JSON"):
            host.train(model(), options=bad)
    lora, *_ = host.train(model(), options='{"network_alpha": 1}')
    assert lora[f"{FIRST}.alpha"] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": [{"samples": rand(1, 3, 4, 4)}]}, "latents 1 have 3 channels, and this model takes 4. Hint: encode"),
        ({"data": [latents() | {"noise_mask": torch.ones(4, 4)}]}, "latents 1 have a mask"),
        ({"data": [{"samples": [rand(1, 4, 4, 4)]}]}, "latents 1 are a list"),
        ({"data": [latents(0)]}, "there are no latents"),
        ({"positive": [text(), text(), text()]}, "there are 4 latents and 3 conditionings"),
        ({"positive": [[[rand(1, 5, 6), {"area": (1, 1, 0, 0)}]]]}, "conditioning 1 has area"),
        ({"positive": [[[rand(1, 5, 6), {"start_percent": 0.5}]]]}, "conditioning 1 has timestep range"),
        ({"positive": [[[rand(2, 5, 6), {}]]]}, "conditioning 1 holds 2 texts"),
        ({"layer_patterns": "*nowhere*"}, "none of 11 layers matches .nowhere.; names look like `conv_out`"),
        ({"name": "../out"}, "is no place in"),
        ({"name": "runs/"}, "is no name for a file"),
        ({"name": ""}, "is no name for a file"),
    ],
)
def test_what_cannot_be_trained_on_is_said_before_anything_runs(host, changed, message):
    base = model()
    with Untouched(base), pytest.raises(RuntimeError, match=f"LyCore Train: .*{message}"):
        host.train(base, **changed)
    assert base.diffusion_model.calls == 0 and host.files() == []


class InPlace(torch.nn.Module):
    """A block that adds to its own input, as blocks of Flux and SD3 do."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(train_fakes.WIDTH)
        self.attn, self.mlp = (train_fakes.Linear(train_fakes.WIDTH, train_fakes.WIDTH) for _ in range(2))
        self.careful = False

    def forward(self, x, context, transformer_options):
        if self.careful:
            x = x.clone()
            x = x + self.attn(self.norm(x))
            return x + self.mlp(self.norm(x)) * 0.5
        x += self.attn(self.norm(x))
        y = self.mlp(self.norm(x))
        y *= 0.5
        x += y
        return x


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_that_add_to_their_input_get_the_right_gradients(host, checkpointing):
    augmented = {name: getattr(torch.Tensor, name) for name in ("__iadd__", "__isub__", "__imul__", "__itruediv__")}
    adapters = []
    for careful in (False, True):
        base = model()
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(3)
            base.diffusion_model.blocks = torch.nn.ModuleList([InPlace(), InPlace()])
        for block in base.diffusion_model.blocks:
            block.careful = careful
        with Untouched(base):
            # The first layer too, so that the first block's input is in the graph.
            lora, *_ = host.train(
                base, layers="full", gradient_checkpointing=checkpointing and not careful, save_precision="fp32"
            )
        adapters.append(lora)
    assert all(torch.allclose(value, adapters[1][key], atol=1e-6) for key, value in adapters[0].items())
    assert augmented == {name: getattr(torch.Tensor, name) for name in augmented}


def test_blocks_that_write_into_their_input_are_refused_where_they_would_be_computed_twice(host, monkeypatch):
    def forward(self, x, context, transformer_options):
        y = self.attn(self.norm(x))
        x[:, :1] = 0.0
        return self.mlp(y) + x

    monkeypatch.setattr(InPlace, "forward", forward)
    base = model()
    with torch.inference_mode():
        base.diffusion_model.blocks = torch.nn.ModuleList([InPlace()])
    for checkpointing, message in ((True, "changes the input of a block"), (False, "modified by an inplace operation")):
        with Untouched(base), pytest.raises(RuntimeError, match=message):
            host.train(base, layers="full", gradient_checkpointing=checkpointing)


def test_a_model_that_computes_otherwise_in_training_is_told_of(host, caplog, monkeypatch):
    host.train(model())
    assert "otherwise" not in caplog.text
    plain = train_fakes.Block.forward

    def other(self, h, context, transformer_options):
        return plain(self, 2 * h if torch.is_grad_enabled() else h, context, transformer_options)

    monkeypatch.setattr(train_fakes.Block, "forward", other)
    host.train(model())
    assert "this model computes otherwise in training than in sampling" in caplog.text


def test_layers_that_take_no_part_are_an_error(host):
    base = model()
    base.diffusion_model.add_module("attn_unused", train_fakes.Linear(4, 4))
    with Untouched(base), pytest.raises(RuntimeError, match="take no part in the model's forward"):
        host.train(base, layer_patterns="attn_unused")


def test_the_fields_fit_the_library(host, torch_library):
    setup = host.part("train_setup")
    schema = lycore.Network.schema()
    listed = [line.split(" ")[0] for line in schema.split("optimizer_type ")[-1].splitlines()[1:] if line[:1] > " "]
    assert sorted(setup.OPTIMIZERS) == sorted(listed)
    for optimizer in setup.OPTIMIZERS:
        _, _, steps, _ = host.train(model(), optimizer=optimizer, learning_rate=0.0)
        assert steps == 3
    for algorithm in setup.ALGORITHMS:
        assert host.train(model(), algorithm=algorithm)[2] == 3


def test_precision_follows_the_device(host):
    dtype = host.part("train_setup").compute_dtype
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [dtype("auto", device) for device in (cpu, cuda)] == [torch.float32, torch.bfloat16]
    assert [dtype(asked, cuda) for asked in ("bf16", "no")] == [torch.bfloat16, torch.float32]
    lora, *_ = host.train(model())
    assert lora[f"{FIRST}.lora_up.weight"].dtype == torch.float16
    host.management.should_use_bf16 = lambda device: False
    assert dtype("auto", cuda) == torch.float32


def test_dynamic_vram_is_switched_off_for_the_copy(host):
    patcher, asked = fakes.Patcher(model()), []
    patcher.is_dynamic = lambda: True
    patcher.clone = lambda disable_dynamic=False: asked.append(disable_dynamic) or fakes.Patcher(patcher.model)
    host.part("train_setup").patcher(patcher, torch.float32)
    assert asked == [True]
    patcher.clone = lambda: None
    with pytest.raises(RuntimeError, match="--disable-dynamic-vram"):
        host.part("train_setup").patcher(patcher, torch.float32)


def test_the_curve_has_numbers_and_both_lines(host):
    curve = host.part("curve")
    assert curve.ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve.ticks(1, 1200) == [200, 400, 600, 800, 1000, 1200]
    assert curve.smoothed([1.0] * 50) == pytest.approx([1.0] * 50)
    steps = curve.smoothed([1.0] * 100 + [0.0] * 100)
    assert steps[99] == pytest.approx(1.0) and 0.3 < steps[109] < 0.4 and steps[-1] < 0.01
    image = (curve.picture([1.0, 0.5, 0.7, 0.2] * 20, "x")[0] * 255).round().int()
    for colour in (curve._RAW, curve._SMOOTH):
        assert (image == torch.tensor(colour)).all(-1).sum() > 500
    for losses in ([], [0.3], [0.3, 0.3], [0.0] * 5, [1e-9, 2e-9]):
        assert torch.isfinite(curve.picture(losses)).all()


def test_the_widgets_of_training(host):
    inputs = host.node.INPUT_TYPES()
    assert list(inputs["required"]) == ["model", "latents", "positive", *DEFAULTS]
    assert all("tooltip" in about for part in inputs.values() for _, about in part.values())
    assert len(host.node.RETURN_TYPES) == len(host.node.RETURN_NAMES) == len(host.node.OUTPUT_TOOLTIPS)
    assert inputs["required"]["seed"][1]["control_after_generate"] is False
    assert json.loads(inputs["optional"]["options"][1]["default"]) == {}
