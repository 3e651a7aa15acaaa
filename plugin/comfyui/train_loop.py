"""The training loop, which is a sampler to ComfyUI: its guider loads the model and calls `sample`.

Everything that is proper to a kind of model (eps, v, EDM, flow, ...) is asked of the model's own `model_sampling`,
so a model that ComfyUI can sample can be trained.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch

from . import borrowed
from .library import NodeError

TIMESTEPS = ("uniform", "sigmoid")
"""Over the model's own table of noise levels, its shift included: evenly, or more in the middle (logit-normal)."""
_LOG_SECONDS = 10.0


class NotFinite(Exception):
    """A loss is infinite or not a number."""


@dataclass(frozen=True)
class Plan:
    """How long and on what a run trains."""

    steps: int
    batch_size: int
    accumulation: int
    seed: int
    timesteps: str
    min_snr_gamma: float
    checkpointing: bool
    restorable: bool
    """Whether writing the parameters back is all that it takes to undo a step's effect on the file."""


@dataclass(frozen=True)
class Example:
    """One latent with its conditioning, as the model takes it."""

    latent: torch.Tensor
    condition: dict[str, Any]


class TrainSampler(comfy.samplers.Sampler):
    """One run. Afterwards `losses`, `steps` (that are in the parameters) and `stopped` (what ended it early)."""

    def __init__(self, network: Any, layers: list[Any], plan: Plan, latents: list[torch.Tensor], positive: list[Any]):
        self._network = network
        self._layers = layers
        self._plan = plan
        self._latents = latents
        self._positive = positive
        self._draws = Draws([tuple(latent.shape) for latent in latents], plan.batch_size, plan.seed)
        self.losses: list[float] = []
        self.steps = 0
        self.stopped: BaseException | None = None

    def sample(
        self, model_wrap: Any, sigmas: Any, extra_args: Any, callback: Any, noise: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Trains. What goes wrong is kept in `stopped`, so that the guider puts its own things away."""
        model = model_wrap.inner_model
        checks = []
        try:
            # In the inference mode of whoever calls, as for any other sampler.
            examples = self._examples(model, noise.device)
            checks = [layer.register_forward_pre_hook(_check) for layer in self._layers]
            with borrowed.training(model, checkpointing=self._plan.checkpointing):
                self._train(model, [_own(example) for example in examples], extra_args["model_options"])
        except BaseException as problem:
            self.stopped = problem
            _release(problem)
        finally:
            for check in checks:
                check.remove()
        return torch.zeros_like(noise)

    def _examples(self, model: Any, device: torch.device) -> list[Example]:
        found = []
        for latent, condition in zip(self._latents, comfy.sampler_helpers.convert_cond(self._positive), strict=True):
            _check()
            latent = model.process_latent_in(latent.to(device, torch.float32))
            conditions = {"positive": [condition]}
            empty = torch.zeros_like(latent)
            condition = comfy.samplers.process_conds(
                model, empty, conditions, device, latent_image=latent, seed=self._plan.seed
            )["positive"][0]
            each = condition["model_conds"].items()
            shaped = {name: part.process_cond(batch_size=1, device=device, area=None) for name, part in each}
            found.append(Example(latent, {**condition, "model_conds": shaped}))
        return found

    def _train(self, model: Any, examples: list[Example], options: dict[str, Any]) -> None:
        plan, parameters = self._plan, self._network.parameters
        good = torch.empty_like(parameters) if plan.restorable else None
        bar = comfy.utils.ProgressBar(plan.steps)
        self._compare(model, examples[0], options)
        clock = Clock(plan.steps)
        while self.steps < plan.steps:
            loss = 0.0
            for micro in range(plan.accumulation):
                try:
                    loss += self._backward(model, examples, options) / plan.accumulation
                except NotFinite:
                    if good is not None and self.steps:
                        parameters.copy_(good)
                        self._network.refresh()
                        self.steps -= 1
                    raise
                if good is not None and micro == plan.accumulation - 1:
                    # These have just given a finite loss; what comes next may not.
                    good.copy_(parameters)
                done = self._network.step()
            if not self.steps and done["gradient_norm"] == 0.0:
                raise NodeError("no gradient reaches the chosen layers. Hint: choose others")
            self.steps += 1
            self.losses.append(loss)
            clock.tick(self.steps, loss)
            bar.update_absolute(self.steps)

    def _compare(self, model: Any, example: Example, options: dict[str, Any]) -> None:
        """Warns when a model computes otherwise while graphs are built than when it samples."""
        table = model.model_sampling.sigmas
        sigma = table[len(table) // 2].float().reshape(1).to(example.latent.device)
        noise = torch.randn(example.latent.shape, generator=torch.Generator().manual_seed(0)).to(sigma.device)
        given = (model, example.latent, example.condition, sigma, noise, options)
        with torch.no_grad():
            sampled = _denoised(*given)
        off = (_denoised(*given).detach() - sampled).norm() / (sampled - example.latent).norm()
        if not off <= 0.05:
            text = "this model computes otherwise in training than in sampling, by %.1f %% of its error"
            logging.getLogger("lycore").warning(text, 100 * off.item())

    def _backward(self, model: Any, examples: list[Example], options: dict[str, Any]) -> float:
        """Adds one batch's gradients; the mean loss. Images that cannot go through the model together go singly."""
        picks = [examples[index] for index in self._draws.batch()]
        sampling = model.model_sampling
        sigmas = self._draws.sigmas(sampling.sigmas, len(picks), self._plan.timesteps)
        noise = self._draws.noise([len(picks), *picks[0].latent.shape[1:]])
        total = 0.0
        for rows in _groups(picks):
            _check()
            latent = torch.cat([picks[row].latent for row in rows])
            condition = _merged([picks[row].condition for row in rows])
            sigma, added = sigmas[rows].to(latent.device), noise[rows].to(latent.device)
            loss = self._loss(model, latent, condition, sigma, added, options) * (len(rows) / len(picks))
            value = loss.item()
            if not math.isfinite(value):
                raise NotFinite(f"the loss of step {self.steps + 1} is {value}")
            if not loss.requires_grad:
                raise NodeError("the chosen layers take no part in the model's forward. Hint: choose others")
            loss.backward()
            total += value
        return total

    def _loss(
        self,
        model: Any,
        latent: torch.Tensor,
        condition: dict[str, Any],
        sigma: torch.Tensor,
        noise: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:
        denoised = _denoised(model, latent, condition, sigma, noise, options)
        sampling, wide = model.model_sampling, _wide(sigma, latent)
        error = ((denoised - latent) / output_scale(sampling, wide)).square().flatten(1).mean(1)
        return (error * snr_weight(sampling, wide, self._plan.min_snr_gamma).flatten()).mean()


class Draws:
    """Which latents, how noisy, with which noise: one generator on the CPU, so that a seed tells a run's course.

    A batch has latents of one shape. Shapes come as often as their number of latents says; those of a shape take
    turns, in a new order each round.
    """

    def __init__(self, shapes: list[tuple[int, ...]], batch_size: int, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._batch_size = batch_size
        buckets: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            buckets.setdefault(shape, []).append(index)
        self._buckets = list(buckets.values())
        self._queues: list[list[int]] = [[] for _ in self._buckets]

    def batch(self) -> list[int]:
        """The numbers of the next latents; one comes again where there are fewer than the batch has room for."""
        sizes = torch.tensor([float(len(bucket)) for bucket in self._buckets])
        chosen = int(torch.multinomial(sizes, 1, generator=self._generator))
        bucket, queue = self._buckets[chosen], self._queues[chosen]
        while len(queue) < self._batch_size:
            queue += [bucket[i] for i in torch.randperm(len(bucket), generator=self._generator).tolist()]
        picked, self._queues[chosen] = queue[: self._batch_size], queue[self._batch_size :]
        return picked

    def sigmas(self, table: torch.Tensor, count: int, how: str) -> torch.Tensor:
        """`count` entries of a model's table of noise levels."""
        if how == "sigmoid":
            share = torch.randn(count, generator=self._generator).sigmoid()
        else:
            share = torch.rand(count, generator=self._generator)
        index = (share * len(table)).long().clamp(max=len(table) - 1)
        return table[index.to(table.device)].float().cpu()

    def noise(self, shape: list[int]) -> torch.Tensor:
        """Normal noise."""
        return torch.randn(shape, generator=self._generator)


class Clock:
    """Tells in the log how far a run is, how fast, and how long it still takes."""

    def __init__(self, steps: int):
        self._steps = steps
        self._begin = self._told = time.monotonic()

    def tick(self, step: int, loss: float) -> None:
        """After each step; writes a line for the first, the last, and now and then between."""
        now = time.monotonic()
        if 1 < step < self._steps and now - self._told < _LOG_SECONDS:
            return
        self._told = now
        pace = (now - self._begin) / step
        speed = f"{1 / pace:.2f} steps/s" if pace < 1 else f"{pace:.2f} s/step"
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self._steps - step)))
        text = "step %d of %d, loss %.4f, %s, %s left"
        logging.getLogger("lycore").info(text, step, self._steps, loss, speed, left)


def _denoised(
    model: Any,
    latent: torch.Tensor,
    condition: dict[str, Any],
    sigma: torch.Tensor,
    noise: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """The model's estimate of the clean latent, from the noised one."""
    noisy = model.model_sampling.noise_scaling(_wide(sigma, latent), noise, latent)
    return comfy.samplers.calc_cond_batch(model, [[condition]], noisy, sigma, options)[0]


def _wide(sigma: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    return sigma.reshape(-1, *(1,) * (latent.ndim - 1))


def output_scale(sampling: Any, sigma: torch.Tensor) -> torch.Tensor:
    """What the model's output is multiplied with in its estimate of the clean latent, which is linear in it.

    The error of that estimate, divided by this, is the output's own: of the noise for eps, of v for v, of the
    velocity for flow.
    """
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    return sampling.calculate_denoised(sigma, one, zero) - sampling.calculate_denoised(sigma, zero, zero)


def snr_weight(sampling: Any, sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR: min(SNR, gamma) on the error of the clean latent, here for the error of the output. 0 is off."""
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    if not gamma:
        return one
    signal, noise = (sampling.noise_scaling(sigma, *parts) for parts in ((zero, one), (one, zero)))
    return (signal / noise).square().clamp(max=gamma) * output_scale(sampling, sigma).square()


def _groups(picks: list[Example]) -> list[list[int]]:
    """Rows that can be one batch to the model: their conditionings can be joined."""
    groups: list[list[int]] = []
    for row, example in enumerate(picks):
        parts = example.condition["model_conds"]
        for group in groups:
            first = picks[group[0]].condition["model_conds"]
            if first.keys() == parts.keys() and all(first[name].can_concat(parts[name]) for name in parts):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _merged(conditions: list[dict[str, Any]]) -> dict[str, Any]:
    """One conditioning with a row for each."""
    first, *rest = conditions
    if not rest:
        return first
    parts = {
        name: part._copy_with(part.concat([other["model_conds"][name] for other in rest]))
        for name, part in first["model_conds"].items()
    }
    return {**first, "model_conds": parts}


def _own(example: Example) -> Example:
    """The same in tensors that a graph may keep."""
    parts = {n: part._copy_with(_clone(part.cond)) for n, part in example.condition["model_conds"].items()}
    return Example(example.latent.clone(), {**example.condition, "model_conds": parts})


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [_clone(item) for item in value] if isinstance(value, list) else value


def _release(problem: BaseException | None) -> None:
    """Lets go of what the frames of an exception hold: the graph, and torch's hooks of a checkpoint that it broke off,
    which would otherwise save tensors of whatever comes next.
    """
    while problem is not None:
        traceback.clear_frames(problem.__traceback__)
        problem = problem.__cause__ or problem.__context__


def _check(*_: Any) -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()
