"""Training runs that can be killed, for test_resume.py: imports torch once, then forks a process per line of JSON.

A run tells what it does while it does it, since after SIGKILL it tells nothing more: "start t" once it has taken up
after micro-step t, "begin t" and "end t" around each save of the state, "saved t sha256" when asked to hash.
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


def tell(*words: object) -> None:
    """One line to whoever listens, in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def progress_of(network: lycore.Network, accumulate: int) -> int:
    """How many micro-steps a network has behind it."""
    steps, micro_steps = network.progress
    return steps * accumulate + micro_steps


def train(
    folder: str,
    steps: int,
    accumulate: int = 1,
    every: int = 1,
    pause: int = 0,
    hashes: bool = False,
    config: dict | None = None,
) -> None:
    """Goes on from the state in `folder`, if any, up to `steps` micro-steps.

    `pause`: waits there to be killed. `config` replaces options; None is their default.
    """
    torch.set_num_threads(1)
    model, state = net(), Path(folder, "state.safetensors")
    network = attached(model, CONFIG | {"gradient_accumulation_steps": accumulate} | (config or {}))
    done = 0
    if state.exists():
        # Whatever the state does not bring would show at the end.
        fill(network, 1.0)
        network.load_state(state)
        done = progress_of(network, accumulate)
    tell("start", done)
    for t in range(done, steps):
        loss_of(model, t).backward()
        network.step()
        if (t + 1) % every == 0:
            tell("begin", t + 1)
            network.save_state(state)
            tell("end", t + 1)
            if hashes:
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
