"""Runs that are killed at any moment and taken up again end on the same bits as one that was left alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import lycore

from .nets import attached, loss_of, net
from .runs import CONFIG, progress_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes made by fork")

STEPS = 48
TESTS = Path(__file__).resolve().parents[1]


class Server:
    """A process that forks training runs."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(TESTS.parents[1] / "plugin"), str(TESTS), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # The times in the files; all runs are one.
            env={**os.environ, "PYTHONPATH": path, "SOURCE_DATE_EPOCH": "1700000000"},
        )

    def start(self, folder: Path, **options: object) -> Run:
        """Starts a run, or one that goes on from the state in `folder`."""
        self.process.stdin.write(json.dumps({"folder": str(folder), "steps": STEPS, **options}) + "\n")
        return Run(self, folder)

    def line(self) -> list[str]:
        """What is told next."""
        words = self.process.stdout.readline().split()
        assert words, "the server of runs has died; its stderr says why"
        return words


class Run:
    """One process in training."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.before = state_of(folder)
        self.marks: list[list[str]] = []
        self.times: list[float] = []
        self.code: int | None = None
        # The child may be faster than its parent.
        while self.process() is None:
            self.next()

    def process(self) -> int | None:
        """Its number, once known."""
        return next((int(m[1]) for m in self.marks if m[0] == "process"), None)

    def next(self) -> list[str]:
        """Its next mark; ["exit", code] is the last."""
        words = self.server.line()
        self.marks.append(words)
        self.times.append(time.perf_counter())
        if words[0] == "exit":
            self.code = int(words[1])
        return words

    def until(self, *kinds: str) -> list[str]:
        """The next mark of one of these kinds, or the exit."""
        while self.code is None:
            if self.next()[0] in kinds:
                break
        return self.marks[-1]

    def kill(self) -> None:
        """SIGKILL, then everything that it told before."""
        os.kill(self.process(), signal.SIGKILL)
        self.until("exit")

    def finish(self) -> None:
        """Waits for a run that shall succeed."""
        self.until("exit")
        assert self.code == 0

    def told(self, kind: str) -> list[list[str]]:
        """All marks of a kind."""
        return [m for m in self.marks if m[0] == kind]


class Whole:
    """An uninterrupted run: what every state has to look like, and the end."""

    def __init__(self, server: Server, folder: Path, accumulate: int) -> None:
        folder.mkdir()
        run = server.start(folder, accumulate=accumulate, hashes=True)
        run.finish()
        self.states = {int(m[1]): m[2] for m in run.told("saved")}
        assert sorted(self.states) == list(range(1, STEPS + 1)) and len(set(self.states.values())) == STEPS
        self.end = end_of(folder)
        starts = {tuple(m): at for m, at in zip(run.marks, run.times, strict=True)}
        self.save_time = statistics.median(starts["end", str(t)] - starts["begin", str(t)] for t in range(1, STEPS + 1))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_of(folder: Path) -> str | None:
    """Hash of the state in a folder."""
    state = folder / "state.safetensors"
    return sha256(state) if state.exists() else None


def end_of(folder: Path) -> dict[str, str]:
    """Hashes of both files that a run leaves, and of each tensor of the state."""
    tensors = load_file(folder / "final.safetensors")
    assert {"master"} < set(tensors)
    hashes = {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in tensors.items()}
    return hashes | {name: sha256(folder / name) for name in ("adapter.safetensors", "final.safetensors")}


def check_after_kill(run: Run, folder: Path, whole: Whole) -> str:
    """The state is the last one that was finished, or the one that was being written; says where the kill fell."""
    last = max([int(m[1]) for m in run.told("end") + run.told("start")], default=None)
    found = state_of(folder)
    if last is None:
        assert found == run.before, "a run that was not under way has changed the state"
        return "before"
    saving = [int(m[1]) for m in run.told("begin")][len(run.told("end")) :]
    allowed = {whole.states.get(t) for t in (last, *saving)}
    assert found in allowed, f"after {run.marks[-3:]}: the state is neither old nor new"
    if not saving:
        return "between"
    return "saving, old" if found == whole.states.get(last) else "saving, new"


@pytest.fixture(scope="module")
def server(torch_library):
    server = Server()
    yield server
    server.process.stdin.close()
    assert server.process.wait(30) == 0


@pytest.fixture(scope="module")
def wholes(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {accumulate: Whole(server, folder / str(accumulate), accumulate) for accumulate in (1, 3)}


@pytest.mark.parametrize(("accumulate", "every", "seed"), [(1, 1, 1), (1, 5, 2), (3, 1, 3), (3, 4, 4)])
def test_killed_at_random_it_ends_on_the_same_bits(server, wholes, tmp_path, accumulate, every, seed):
    """At any moment: while it starts, computes, saves, or between."""
    chance, whole = random.Random(seed), wholes[accumulate]
    falls, starts = [], []
    for _ in range(5):
        run = server.start(tmp_path, accumulate=accumulate, every=every)
        for _ in range(chance.randint(0, 9)):
            run.until("start", "begin", "end")
        time.sleep(chance.uniform(0, 0.01))
        if run.code is None:
            run.kill()
        falls.append(check_after_kill(run, tmp_path, whole))
        starts += [int(m[1]) for m in run.told("start")]
    last = server.start(tmp_path, accumulate=accumulate, every=every)
    last.finish()
    starts.append(int(last.told("start")[0][1]))
    print(f"killed: {falls}; started after micro-steps {starts}")
    assert starts == sorted(starts) and starts[-1] > 0, "nothing was ever taken up"
    assert end_of(tmp_path) == whole.end


def test_killed_while_saving_the_state_is_old_or_new_never_half(server, wholes, tmp_path):
    """Kills within the time that a save takes, again and again, until the run has come to its end."""
    chance, whole = random.Random(5), wholes[1]
    falls = []
    while len(falls) < 40:
        run = server.start(tmp_path)
        for _ in range(chance.randint(1, 2)):
            run.until("begin")
        time.sleep(chance.uniform(0, whole.save_time))
        if run.code is None:
            run.kill()
        falls.append(check_after_kill(run, tmp_path, whole))
        if run.code == 0:
            break
        # What a killed save leaves is its unfinished copy, and nothing under a name that anyone reads.
        others = {f.name for f in tmp_path.iterdir() if not f.match(".lycore-*.tmp")}
        assert others <= {"state.safetensors", "adapter.safetensors", "final.safetensors"}
    counts = {fall: falls.count(fall) for fall in sorted(set(falls))}
    print(counts)
    assert sum(n for fall, n in counts.items() if fall.startswith("saving")) >= 5, counts
    server.start(tmp_path).finish()
    assert end_of(tmp_path) == whole.end


def test_killed_in_a_checkpoint_every_file_is_old_or_new_and_none_is_left_over(server, tmp_path):
    """At 50 moments and more of writing adapters, states and the best, and of deleting those out of date."""
    chance, options = random.Random(7), {"checkpoints": True, "steps": 60}
    whole = tmp_path / "whole"
    whole.mkdir()
    first = server.start(whole, hashes=True, **options)
    first.finish()
    versions: dict[str, set[str]] = {}
    for _, _, name, digest in first.told("wrote"):
        versions.setdefault(name, set()).add(digest)
    assert len(versions["x-best.safetensors"]) > 5 and all(len(v) == 1 for k, v in versions.items() if "best" not in k)
    times = {tuple(m[:2]): at for m, at in zip(first.marks, first.times, strict=True)}
    length = statistics.median(times["end", str(t)] - times["begin", str(t)] for t in range(1, 61))

    folder, within, between = tmp_path / "killed", 0, 0
    folder.mkdir()
    while True:
        run = server.start(folder, **options)
        for _ in range(chance.randint(1, 2)):
            run.until("begin")
        time.sleep(chance.uniform(0, length))
        if run.code is not None:
            break
        run.kill()
        last = max((int(m[1]) for m in run.told("end") + run.told("start")), default=0)
        saving = len(run.told("begin")) > len(run.told("end"))
        within, between = within + saving, between + (not saving)
        for file in folder.iterdir():
            assert file.match(".lycore-*.tmp") or sha256(file) in versions[file.name], f"{file} is half"
        # What the last checkpoint has written is there, or what replaces it.
        states = [int(f.stem[6:14]) for f in folder.glob("x-step*-state.safetensors")]
        assert last == 0 or max(states) in ({last, last + 1} if saving else {last})
        assert all((folder / f"x-step{t:08}.safetensors").exists() for t in states)
    assert run.code == 0 and within >= 50, (within, between)
    print(f"{within} kills in a checkpoint, {between} between two")
    left = [{f.name: sha256(f) for f in of.iterdir() if not f.match(".lycore-*.tmp")} for of in (whole, folder)]
    assert left[0] == left[1]
    steps = [f"x-step{t:08}.safetensors" for t in (58, 59, 60)]
    steps += [f"x-step{t:08}-state.safetensors" for t in (59, 60)]
    epochs = [f"x-{t:06}{end}.safetensors" for t in (10, 12) for end in ("", "-state")]
    others = ["adapter.safetensors", "final.safetensors", "x-best.safetensors", "x-best-state.safetensors"]
    assert sorted(left[0]) == sorted(steps + epochs + others)


@pytest.mark.parametrize("cut", [10, 11, 12])
def test_stopped_in_the_middle_of_an_accumulation(server, wholes, tmp_path, cut):
    """With 3 micro-steps per update: after the first, after the second, and between two updates."""
    run = server.start(tmp_path, accumulate=3, pause=cut)
    assert run.until("pause") == ["pause", str(cut)]
    run.kill()
    assert run.code == -signal.SIGKILL
    state = tmp_path / "state.safetensors"
    assert ("gradient" in load_file(state)) == (cut % 3 > 0)
    resumed = server.start(tmp_path, accumulate=3)
    resumed.finish()
    assert resumed.told("start") == [["start", str(cut)]]
    assert end_of(tmp_path) == wholes[3].end


def optimizers() -> list[str]:
    """All of them, from the schema's second table."""
    lines = lycore.Network.schema().split("optimizer_type")[-1].splitlines()[1:]
    return [line.split()[0] for line in lines if line[:1].strip()]


def test_every_optimizer_is_taken_up_in_the_middle_of_an_accumulation(server, tmp_path):
    """Killed after the second of three micro-steps; the state of the optimizer is in the file, whatever it is."""
    assert len(optimizers()) == 11
    for name in optimizers():
        config = {"optimizer_type": name}
        if name == "Adafactor" or name.endswith("ScheduleFree"):
            config |= {"lr_scheduler": None, "lr_warmup_steps": None}
        if name == "Adafactor":
            config |= {"learning_rate": None}
        if name == "AdamW8bit":
            config |= {"optimizer_args": {"min_8bit_size": 300}}
        options = {"accumulate": 3, "every": 10, "config": config}
        whole, cut = tmp_path / f"{name}-whole", tmp_path / f"{name}-cut"
        for folder in (whole, cut):
            folder.mkdir()
        server.start(whole, **options).finish()
        run = server.start(cut, pause=20, **options)
        assert run.until("pause") == ["pause", "20"]
        run.kill()
        resumed = server.start(cut, **options)
        resumed.finish()
        assert resumed.told("start") == [["start", "20"]], name
        assert end_of(cut) == end_of(whole), name
        assert len(load_file(whole / "final.safetensors")) > 1, f"{name} has no state"


def test_what_was_left_out_by_chance_is_left_out_again(server, wholes, tmp_path):
    """Dropout of every kind: the masks are those of the step, whichever process takes it."""
    config = {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2}
    for cut in (20, 21):
        whole, stopped = tmp_path / f"whole-{cut}", tmp_path / f"cut-{cut}"
        for folder in (whole, stopped):
            folder.mkdir()
        server.start(whole, accumulate=3, every=cut, config=config).finish()
        run = server.start(stopped, accumulate=3, every=cut, pause=cut, config=config)
        assert run.until("pause") == ["pause", str(cut)]
        run.kill()
        resumed = server.start(stopped, accumulate=3, every=cut, config=config)
        resumed.finish()
        assert resumed.told("start") == [["start", str(cut)]]
        assert end_of(stopped) == end_of(whole)
    assert not set(end_of(whole).values()) & set(wholes[3].end.values())


def test_what_is_compared_depends_on_every_step(server, wholes, tmp_path):
    """Another number of steps and another accumulation end on other bits, so equality above means something."""
    server.start(tmp_path, steps=STEPS - 1).finish()
    assert not set(end_of(tmp_path).values()) & set(wholes[1].end.values())
    assert not set(wholes[1].end.values()) & set(wholes[3].end.values())


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path):
    """Cut short anywhere, it is an error that names the file; the run that reads it is as before."""
    model = net()
    network = attached(model, CONFIG)
    loss_of(model, 0).backward()
    network.step()
    path = tmp_path / "state.safetensors"
    network.save_state(path)
    content, before = path.read_bytes(), network.parameters.clone()
    chance = random.Random(6)
    for length in [0, 7, 8, 100, len(content) - 1, *(chance.randrange(len(content)) for _ in range(20))]:
        path.write_bytes(content[:length])
        with pytest.raises(lycore.FileError) as caught:
            network.load_state(path)
        assert str(path) in str(caught.value)
        assert (network.parameters == before).all()
    path.write_bytes(content)
    network.load_state(path)
    assert progress_of(network, 1) == 1
