"""200 updates beside peft, torch's AdamW and clipping, and transformers' schedules: the same losses at every step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file

from .nets import LAYERS, attached, key_of, loss_of, net, off

peft = pytest.importorskip("peft", reason="needs peft, the reference")
optimization = pytest.importorskip("transformers.optimization", reason="needs transformers, the reference")

STEPS = 200
RATE = 3e-3
RANK = 8
LOSS_TOLERANCE = 1e-5
"""Relative, at every micro-step."""
NORM_TOLERANCE = 1e-4
"""Relative, at every update: terms of a gradient cancel, so rounding weighs more than in the loss."""
PARAMETER_TOLERANCE = 1e-4
"""Of a factor's largest value, after the last step: AdamW divides by the gradient's own size, so the rounding of a
gradient near 0 becomes a whole fraction of a learning rate."""


@dataclass
class Case:
    """A run in lycore's words; the reference is made from the same numbers."""

    scheduler: str = "constant"
    warmup: int = 0
    alpha: float = RANK
    accumulate: int = 1
    clip: float = 0.0
    adamw: dict = field(default_factory=dict)
    from_peft: bool = False

    def config(self) -> dict:
        return {
            "network_dim": RANK,
            "network_alpha": self.alpha,
            "learning_rate": RATE,
            "lr_scheduler": self.scheduler,
            "lr_warmup_steps": self.warmup,
            "max_train_steps": STEPS,
            "max_grad_norm": self.clip,
            "gradient_accumulation_steps": self.accumulate,
            "optimizer_args": self.adamw,
        }

    def schedule(self, optimizer):
        return {
            "constant": lambda: optimization.get_constant_schedule(optimizer),
            "constant_with_warmup": lambda: optimization.get_constant_schedule_with_warmup(optimizer, self.warmup),
            "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, self.warmup, STEPS),
        }[self.scheduler]()


CASES = {
    "constant": Case(),
    "warm-up": Case("constant_with_warmup", warmup=15),
    "cosine with warm-up": Case("cosine", warmup=20),
    "alpha below the rank": Case(alpha=2.5),
    "alpha above the rank": Case(alpha=12, from_peft=True),
    "accumulation of 3": Case(accumulate=3),
    "clipping, mostly": Case(clip=0.02),
    "clipping, always": Case(clip=0.002),
    "everything": Case(
        "cosine",
        warmup=10,
        alpha=5,
        accumulate=2,
        clip=0.02,
        adamw={"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        from_peft=True,
    ),
}


def factors_of(model) -> dict[str, torch.nn.Parameter]:
    """peft's parameters under the keys of a kohya file."""
    inner, found = model.base_model.model, {}
    for layer in LAYERS:
        module = inner.get_submodule(layer)
        found[key_of(layer, "down")] = module.lora_A["default"].weight
        found[key_of(layer, "up")] = module.lora_B["default"].weight
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_and_parameters_follow_peft(case, tmp_path):
    model = net()
    torch.manual_seed(11)
    targets = peft.LoraConfig(r=RANK, lora_alpha=case.alpha, target_modules=LAYERS)
    reference = peft.get_peft_model(copy.deepcopy(model), targets)
    theirs = factors_of(reference)
    trained = [p for p in reference.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in theirs.values()}

    network = attached(model, case.config())
    start = tmp_path / "start.safetensors"
    if case.from_peft:
        alphas = {key_of(layer, "down").split(".")[0] + ".alpha": torch.tensor(float(case.alpha)) for layer in LAYERS}
        save_file({key: p.detach().contiguous() for key, p in theirs.items()} | alphas, start)
        assert network.load_weights(start) == len(LAYERS)
    else:
        network.save(start)
        saved = load_file(start)
        with torch.no_grad():
            for key, parameter in theirs.items():
                parameter.copy_(saved[key].reshape(parameter.shape))

    adamw = {"weight_decay": 0.01} | case.adamw
    optimizer = torch.optim.AdamW(trained, lr=RATE, **adamw)
    schedule = case.schedule(optimizer)
    losses, clipped, worst, worst_norm = [], 0, 0.0, 0.0
    for step in range(STEPS):
        for micro in range(case.accumulate):
            number = step * case.accumulate + micro
            want = loss_of(reference, number)
            (want / case.accumulate).backward()
            got = loss_of(model, number)
            got.backward()
            done = network.step()
            relative = abs(got.item() / want.item() - 1)
            assert relative <= LOSS_TOLERANCE, f"micro-step {number}: {got.item()} instead of {want.item()}"
            losses.append(got.item())
            worst = max(worst, relative)
        # An infinite bound only measures.
        norm = torch.nn.utils.clip_grad_norm_(trained, case.clip or float("inf")).item()
        assert (done["updated"], done["step"]) == (True, step + 1)
        assert done["learning_rate"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-18)
        assert done["gradient_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)
        worst_norm = max(worst_norm, abs(done["gradient_norm"] / norm - 1))
        clipped += norm > case.clip > 0
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    ends = [sum(part) for part in (losses[:10], losses[-10:])]
    assert ends[1] < 0.8 * ends[0], f"nothing was learned: {ends}"
    assert clipped >= (0.5 * STEPS if case.clip else 0), f"only {clipped} steps were clipped"
    network.save(tmp_path / "end.safetensors")
    saved = load_file(tmp_path / "end.safetensors")
    apart = {key: off(saved[key].reshape(p.shape), p.detach()) for key, p in theirs.items()}
    drift = max(apart.values())
    print(f"worst: loss {worst:.1e}, norm {worst_norm:.1e}, parameters {drift:.1e}; {clipped} updates clipped")
    assert drift <= PARAMETER_TOLERANCE, apart


def test_the_comparison_notices_a_wrong_rate():
    """A rate that is 0.1 % off does not pass: the bound is not so wide that a fault fits in."""
    runs = []
    for rate in (RATE, RATE * 1.001):
        model, losses = net(), []
        network = attached(model, Case().config() | {"learning_rate": rate})
        for step in range(40):
            loss = loss_of(model, step)
            loss.backward()
            network.step()
            losses.append(loss.item())
        runs.append(losses)
    assert max(abs(b / a - 1) for a, b in zip(*runs, strict=True)) > 2 * LOSS_TOLERANCE
