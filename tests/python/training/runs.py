"""Training runs that can be killed, for test_resume.py: imports torch once, then forks a process per line of JSON.

A run tells what it does while it does it, since after SIGKILL it tells nothing more: "start t" once it has taken up
after micro-step t, "begin t" and "end t" around each save of the state, "saved t sha256" when asked to hash. With
checkpoints the network saves by itself, after every step, and the hashes are "wrote t name sha256".
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import lycore

from .nets import attached, fill, loss_of, net

CONFIG = {
    "network_dim": 48,
    "network_alpha": 20,
    "learning_rate": 5e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 5,
    "max_train_steps": 60,
    "max_grad_norm": 0.05,
}
CHECKPOINTS = {
    "output_name": "x",
    "save_every_n_steps": 1,
    "save_last_n_steps": 2,
    "save_last_n_steps_state": 1,
    "save_every_n_epochs": 2,
    "save_last_n_epochs": 2,
    "save_state": True,
    "save_best": True,
}
EPOCH = 5
"""Micro-steps."""


def tell(*words: object) -> None:
    """One line to whoever listens, in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def progress_of(network: lycore.Network, accumulate: int) -> int:
    """How many micro-steps a network has behind it."""
    steps, micro_steps = network.progress
    return steps * accumulate + micro_steps


def newest_state(folder: Path) -> Path | None:
    """The state of the last step in a folder that checkpoints were written to."""
    return max(folder.glob("x-step*-state.safetensors"), default=None)


def checkpoint(network: lycore.Network, t: int, hashes: bool) -> None:
    """What a host does after micro-step `t` to have its files written."""
    reports = [network.checkpoint((t * 5 % 17) - t / 10)]
    if network.epochs < t // EPOCH:
        reports.append(network.end_epoch())
    for path in [Path(path) for report in reports for path in report["written"]] if hashes else []:
        # One that was written is deleted only after newer ones.
        tell("wrote", t, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def train(
    folder: str,
    steps: int,
    accumulate: int = 1,
    every: int = 1,
    pause: int = 0,
    hashes: bool = False,
    config: dict | None = None,
    checkpoints: bool = False,
) -> None:
    """Goes on from the state in `folder`, if any, up to `steps` micro-steps.

    `pause`: waits there to be killed. `config` replaces options; None is their default.
    """
    torch.set_num_threads(1)
    model, state = net(), Path(folder, "state.safetensors")
    config = {"gradient_accumulation_steps": accumulate} | (config or {})
    if checkpoints:
        # The state has the folder in it; that of every run is the same.
        os.chdir(folder)
        config |= CHECKPOINTS | {"output_dir": "."}
        state = newest_state(Path(folder)) or state
    network = attached(model, CONFIG | config)
    done = 0
    if state.exists():
        # Whatever the state does not bring would show at the end.
        fill(network, 1.0)
        network.load_state(state)
        done = progress_of(network, accumulate)
        if checkpoints and network.epochs < done // EPOCH:
            network.end_epoch()
    tell("start", done)
    for t in range(done, steps):
        loss_of(model, t).backward()
        network.step()
        if (t + 1) % every == 0:
            tell("begin", t + 1)
            if checkpoints:
                checkpoint(network, t + 1, hashes)
            else:
                network.save_state(state)
            tell("end", t + 1)
            if hashes and not checkpoints:
                tell("saved", t + 1, hashlib.sha256(state.read_bytes()).hexdigest())
        if t + 1 == pause:
            tell("pause", pause)
            signal.pause()
    network.save(Path(folder, "adapter.safetensors"))
    network.save_state(Path(folder, "final.safetensors"))


def main() -> None:
    """Serves until its input ends."""
    lycore.load(torch=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                # Nobody waits longer than that for a run that hangs.
                signal.alarm(120)
                train(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        tell("process", child)
        tell("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
