"""The fused step on a GPU beside the CPU's, without a wait and as a CUDA graph."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hosts import ONLY_GPU
from torch.nn import functional

import lycore

pytestmark = ONLY_GPU

_FINDING_D = {"learning_rate": 1.0, "optimizer_args": {"d0": 1e-3}}
FUSED = {
    "AdamW": {},
    "AdamW8bit": {},
    "Lion": {},
    "SGDNesterov": {},
    "AdamWScheduleFree": {},
    "RAdamScheduleFree": {},
    "Prodigy": _FINDING_D,
    "DAdaptAdam": _FINDING_D,
    "DAdaptLion": _FINDING_D,
    "Adafactor": {"optimizer_args": {"relative_step": False}},
    "CAME": {},
}
"""Optimizers, with the options that they need here."""
CONFIG = {"network_dim": 8, "learning_rate": 1e-2, "seed": 4, "max_grad_norm": 0.5}


class Problem:
    """A small model on the GPU with tensors that stay where they are, and the batch of any step."""

    def __init__(self, config: dict, device: str = "cuda") -> None:
        torch.manual_seed(0)
        layers = [
            torch.nn.Conv2d(3, 16, 3, padding=1),
            torch.nn.SiLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * 36, 10),
        ]
        self.model = torch.nn.Sequential(*layers).requires_grad_(False).to(device)
        self.x, self.goal = torch.empty(16, 3, 6, 6, device=device), torch.empty(16, 10, device=device)
        self.network = lycore.Network(CONFIG | config)
        self.network.attach(self.model)
        self.network.build()

    def feed(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.goal.copy_(torch.randn(self.goal.shape, generator=generator))

    def micro_step(self) -> torch.Tensor:
        loss = functional.mse_loss(self.model(self.x), self.goal)
        loss.backward()
        self.network.step(wait=False)
        return loss.detach()

    def state(self, folder) -> str:
        self.network.save_state(folder / "state.safetensors")
        return hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """The host's convolutions and products give the same bits each time, and states do not tell when they began."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("name", FUSED)
def test_two_hundred_updates_are_those_of_the_cpu(name):
    """The same gradients on both; the formulas of the CPU are compared with their originals elsewhere."""
    config = {"optimizer_type": name, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 20} | FUSED[name]
    if "ScheduleFree" not in name:
        config["ema_decay"] = 0.9
    if name == "AdamW8bit":
        # Norms differ in their last bit; a clipped gradient would then turn a code here and there.
        config |= {"optimizer_args": {"min_8bit_size": 1000}, "max_grad_norm": 0}
    problems = [Problem(config, device) for device in ("cpu", "cuda")]
    sides = [problem.network for problem in problems]
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(sides[0].parameters.shape, generator=generator)
    # Where there is a parameter there is a gradient; the rest is padding.
    sides[0].parameters.copy_(start)
    problems[0].feed(0)
    functional.mse_loss(problems[0].model(problems[0].x), problems[0].goal).backward()
    used = sides[0].gradients != 0
    for side in sides:
        side.parameters.copy_(start * used)
        side.refresh()
    for _ in range(200):
        gradient = torch.randn(start.shape, generator=generator) * used
        told = []
        for side in sides:
            side.gradients.copy_(gradient)
            told.append(side.step())
        assert told[1] == pytest.approx(told[0], rel=1e-6)
    pairs = [tuple(side.parameters.cpu() for side in sides)]
    if "ScheduleFree" not in name:
        pairs.append(tuple(side.ema.cpu() for side in sides))
    for cpu, gpu in pairs:
        off = ((cpu - gpu).abs() / cpu.abs().max()).sort(descending=True).values
        # 2^-24 for each of 200 updates, which mostly cancel. As beside the originals, a rounding can turn a sign, or a
        # state that is one of 256.
        assert off[8 if name in ("Lion", "AdamW8bit", "DAdaptLion") else 0] < 5e-6
        assert (cpu - start * used).norm() > 0.1


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", FUSED)
def test_replays_are_the_steps_that_they_were_captured_from(name, accumulation, tmp_path):
    """50 updates of both, to the bit, from the middle of a run on; capturing itself leaves no trace."""
    config = {
        "optimizer_type": name,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 30,
        "gradient_accumulation_steps": accumulation,
        "mixed_precision": "bf16",
    } | FUSED[name]
    if name in ("AdamW", "Lion"):
        config |= {"lr_scheduler": "cosine", "max_train_steps": 60, "ema_decay": 0.9}
    if name == "SGDNesterov":
        # The average comes after the bound; random choices go on from where the run is.
        config |= {"scale_weight_norms": 0.02, "ema_decay": 0.9, "network_dropout": 0.3}
    eager, replayed = Problem(config), Problem(config)
    for problem in (eager, replayed):
        for number in range(5 * accumulation):
            problem.feed(number)
            problem.micro_step()
    before = replayed.state(tmp_path)
    numbers = torch.cuda.get_rng_state()
    assert before == eager.state(tmp_path)

    def update() -> torch.Tensor:
        return torch.stack([replayed.micro_step() for _ in range(accumulation)])

    step = replayed.network.capture(update)
    assert replayed.state(tmp_path) == before
    assert torch.equal(torch.cuda.get_rng_state(), numbers)
    for number in range(50):
        eager.feed(number)
        losses = [eager.micro_step() for _ in range(accumulation)]
        replayed.feed(number)
        assert torch.equal(step(), torch.stack(losses)), number
        if number == 20:
            assert replayed.network.results() == eager.network.results()
    assert replayed.network.progress == (55, 0)
    assert replayed.network.results() == eager.network.results()
    assert replayed.state(tmp_path) == eager.state(tmp_path)


@pytest.mark.parametrize("name", FUSED)
def test_a_network_can_be_captured_before_its_first_step(name):
    eager, replayed = (Problem({"optimizer_type": name} | FUSED[name]) for _ in range(2))
    replayed.feed(0)
    step = replayed.network.capture(replayed.micro_step)
    for number in range(5):
        eager.feed(number)
        loss = eager.micro_step()
        replayed.feed(number)
        assert torch.equal(step(), loss)
    assert replayed.network.parameters.isfinite().all()
    assert torch.equal(replayed.network.parameters, eager.network.parameters)


def test_a_replay_goes_on_from_a_state(tmp_path):
    problem = Problem({"lr_scheduler": "cosine", "max_train_steps": 40, "ema_decay": 0.9})
    step = problem.network.capture(problem.micro_step)

    def run(first: int, last: int) -> str:
        for number in range(first, last):
            problem.feed(number)
            step()
        return problem.state(tmp_path)

    run(0, 10)
    problem.network.save_state(tmp_path / "kept.safetensors")
    whole = run(10, 20)
    problem.network.load_state(tmp_path / "kept.safetensors")
    assert problem.network.progress == (10, 0)
    assert run(10, 20) == whole
    # And without a graph.
    other = Problem({"lr_scheduler": "cosine", "max_train_steps": 40, "ema_decay": 0.9})
    other.network.load_state(tmp_path / "kept.safetensors")
    for number in range(10, 20):
        other.feed(number)
        other.micro_step()
    assert other.state(tmp_path) == whole
    assert other.network.results()["learning_rate"] == problem.network.results()["learning_rate"]


@pytest.mark.parametrize("bounded", [False, True])
def test_a_replay_leaves_out_what_is_not_finite(bounded, tmp_path):
    problem = Problem({"ema_decay": 0.9} | ({"scale_weight_norms": 0.02} if bounded else {}))
    step = problem.network.capture(problem.micro_step)
    problem.feed(0)
    step()
    before = problem.state(tmp_path)
    problem.goal[0, 0] = float("nan")
    step()
    step()
    told = problem.network.results()
    assert (told["step"], told["updated"], told["skipped"]) == (1, False, 2)
    assert problem.state(tmp_path) == before
    problem.feed(1)
    step()
    told = problem.network.results()
    assert (told["step"], told["updated"], told["skipped"]) == (2, True, 0)
    # Who waits is told at once, and nothing is lost.
    before = problem.network.parameters.clone()
    problem.network.gradients[3] = float("inf")
    with pytest.raises(lycore.TrainError, match="step 3 is not finite"):
        problem.network.step()
    assert problem.network.gradients[3].isinf()
    problem.network.zero_gradients()
    assert torch.equal(problem.network.parameters, before)


def test_the_rates_of_a_long_run_are_refilled():
    """More replays than learning rates lie on the device."""
    problem = Problem({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 10, "learning_rate": 1e-4})
    problem.feed(0)
    step = problem.network.capture(problem.micro_step, warmup=1)
    for _ in range(5000):
        step()
    told = problem.network.results()
    assert told["step"] == 5000
    assert told["learning_rate"] == pytest.approx(1e-4 / (4999 / 10) ** 0.5, rel=1e-12)


def test_a_step_does_not_wait_for_the_device():
    """Steps are enqueued behind work that takes much longer than enqueuing them."""
    problem = Problem({"ema_decay": 0.9})
    problem.feed(0)
    problem.micro_step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    for _ in range(10):
        problem.micro_step()
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert problem.network.progress == (11, 0)


def test_the_working_copy_is_the_rounded_master():
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        problem = Problem({"mixed_precision": precision})
        for number in range(3):
            problem.feed(number)
            problem.micro_step()
        with torch.no_grad():
            fused = problem.model(problem.x)
            problem.network.refresh()
            assert torch.equal(problem.model(problem.x), fused), dtype


def test_what_cannot_be_captured_is_refused():
    problem = Problem({"optimizer_type": "Prodigy", "optimizer_args": {"betas": [0, 0.99]}})
    problem.feed(0)
    with pytest.raises(lycore.UnsupportedError, match="Prodigy on this device") as told:
        problem.network.capture(problem.micro_step)
    assert "first beta" in told.value.hint
    problem.micro_step()
    assert problem.network.results()["updated"]

    accumulating = Problem({"gradient_accumulation_steps": 2})
    accumulating.feed(0)
    with pytest.raises(lycore.ArgumentError, match="calls step 1 times"):
        accumulating.network.capture(accumulating.micro_step)
    accumulating.micro_step()
    with pytest.raises(lycore.ArgumentError, match="middle of an accumulation"):
        accumulating.network.capture(accumulating.micro_step)

    waiting = Problem({})
    waiting.feed(0)

    def waits() -> None:
        functional.mse_loss(waiting.model(waiting.x), waiting.goal).backward()
        waiting.network.step()

    with pytest.raises(lycore.ArgumentError, match="waits for the device"):
        waiting.network.capture(waits)
