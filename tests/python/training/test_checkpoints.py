"""The files that a run writes by itself: which, what is in them, which go."""

from __future__ import annotations

import hashlib
import io
import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

import lycore

from .nets import attached, loss_of, net

CONFIG = {"learning_rate": 1e-2, "conv_dim": 6, "output_name": "x"}
EVERY_TWO = {"save_every_n_steps": 2, "save_last_n_steps": 4, "save_state": True}


def run(folder: Path, config: dict) -> tuple[nn.Module, lycore.Network]:
    """A model and its network, which saves to `folder`."""
    model = net()
    return model, attached(model, CONFIG | {"output_dir": str(folder)} | config)


def train(model: nn.Module, network: lycore.Network, steps: range, length: int = 1000) -> list[dict]:
    """Trains with a checkpoint after every step, in epochs of `length`; gives the reports."""
    reports = []
    for number in steps:
        loss_of(model, number).backward()
        network.step()
        reports.append(network.checkpoint())
        if (number + 1) % length == 0:
            reports.append(network.end_epoch())
    return reports


def names(folder: Path) -> list[str]:
    return sorted(f.name.removesuffix(".safetensors") for f in folder.iterdir())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_leaves_the_files_that_its_config_names(tmp_path):
    folder = tmp_path / "made" / "for it"
    config = EVERY_TWO | {"save_every_n_epochs": 1, "save_last_n_epochs": 1, "save_precision": "bf16"}
    model, network = run(folder, config)
    reports = train(model, network, range(7), length=3)
    assert not reports[0]["written"] and [r["step"] for r in reports] == [1, 2, 3, 3, 4, 5, 6, 6, 7]
    assert reports[1]["written"] == [str(folder / f"x-step00000002{end}.safetensors") for end in ("", "-state")]
    assert reports[-2]["written"] == [str(folder / f"x-000002{end}.safetensors") for end in ("", "-state")]
    assert reports[-2]["deleted"] == [str(folder / f"x-000001{end}.safetensors") for end in ("", "-state")]
    steps = [f"x-step0000000{n}{end}" for n in (2, 4, 6) for end in ("", "-state")]
    assert names(folder) == ["x-000002", "x-000002-state", *steps]
    train(model, network, range(7, 8))
    assert names(folder) == ["x-000002", "x-000002-state", *steps[2:], "x-step00000008", "x-step00000008-state"]
    # They are what `save` and `save_state` write, in the precision that was asked for.
    network.save(tmp_path / "now")
    network.save_state(tmp_path / "state")
    assert (folder / "x-step00000008.safetensors").read_bytes() == (tmp_path / "now").read_bytes()
    states = [folder / "x-step00000008-state.safetensors", tmp_path / "state"]
    facts = [metadata_of(path) for path in states]
    # The list of files was made before the older ones went.
    listed = [{entry["file"] for entry in json.loads(of.pop("run"))["files"]} for of in facts]
    assert listed[0] - listed[1] == {f"x-step00000002{end}.safetensors" for end in ("", "-state")}
    assert listed[1] == {f"{name}.safetensors" for name in names(folder)} and facts[0] == facts[1]
    tensors = [load_file(path) for path in states]
    assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())
    assert {t.dtype for k, t in load_file(tmp_path / "now").items() if "weight" in k} == {torch.bfloat16}
    done = network.finish()
    assert done["written"] == [str(folder / f"x{end}.safetensors") for end in ("", "-state")] and not done["deleted"]
    facts = metadata_of(folder / "x.safetensors")
    assert (facts["ss_steps"], facts["ss_epoch"]) == ("8", "2")


def test_the_best_is_kept_and_survives_a_resume(tmp_path):
    model, network = run(tmp_path, {"save_best": True})
    best = tmp_path / "x-best.safetensors"
    saved = []
    for number, value in enumerate([3.0, None, 2.0, float("nan"), 2.5, torch.tensor(1.5)]):
        loss_of(model, number).backward()
        network.step()
        report = network.checkpoint(value)
        saved.append(bool(report["written"]))
        if saved[-1]:
            assert report["written"] == [str(best)] and metadata_of(best)["ss_steps"] == str(number + 1)
    assert saved == [True, False, True, False, False, True] and report["best"] == 1.5
    network.save_state(tmp_path / "state")
    _, again = run(tmp_path, {"save_best": True})
    again.load_state(tmp_path / "state")
    assert again.end_epoch(1.75)["written"] == [] and again.checkpoint(1.25)["written"] == [str(best)]


def test_a_resumed_run_goes_on_with_its_own_files(tmp_path):
    folder = tmp_path / "out"
    config = EVERY_TWO | {"save_every_n_epochs": 1, "save_last_n_epochs": 1}
    model, network = run(folder, config)
    train(model, network, range(6), length=3)
    for place, wanted in ((folder, True), (tmp_path / "elsewhere", False)):
        model, network = run(place, config)
        network.load_state(folder / "x-step00000006-state.safetensors")
        reports = train(model, network, range(6, 9), length=3)
        deleted = {Path(path).name for report in reports for path in report["deleted"]}
        gone = {f"x-step00000002{end}.safetensors" for end in ("", "-state")}
        assert deleted == (gone if wanted else set())
        # The state of step 6 is older than the end of epoch 2, which comes once more; the file of epoch 1 is gone.
        assert reports[-1]["epoch"] == 2
    kept = ["x-000002", "x-step00000004", "x-step00000006", "x-step00000008"]
    assert names(folder) == [f"{name}{end}" for name in kept for end in ("", "-state")]
    files = [folder / "x-000002", folder / "x-step00000008", tmp_path / "elsewhere" / "x-step00000008"]
    assert len({metadata_of(file.with_suffix(".safetensors"))["ss_session_id"] for file in files}) == 1


def test_dylora_is_saved_at_several_ranks(tmp_path):
    folder = tmp_path / "out"
    config = {"algo": "dylora", "network_dim": 12, "network_alpha": 3, "conv_dim": 6, "block_size": 2, "ema_decay": 0.5}
    config |= {"save_ranks": [4, 8], "save_every_n_steps": 2, "save_last_n_steps": 2, "save_best": True}
    model, network = run(folder, config | {"save_precision": "bf16"})
    reports = train(model, network, range(5))
    ends = ("", "-r4", "-r8")
    network.checkpoint(1.0)
    network.finish()
    assert reports[3]["written"] == [str(folder / f"x-step00000004{end}.safetensors") for end in ends]
    train(model, network, range(5, 6))
    kept = ["x", "x-best", "x-step00000004", "x-step00000006"]
    assert names(folder) == sorted(f"{name}{end}" for name in kept for end in ends)
    for name in kept:
        with lycore.open(folder / f"{name}.safetensors") as whole:
            for rank in (4, 8):
                path = folder / f"{name}-r{rank}.safetensors"
                with whole.prefix(rank) as cut:
                    cut.save(tmp_path / "cut.safetensors")
                want, got = load_file(tmp_path / "cut.safetensors"), load_file(path)
                assert want.keys() == got.keys() and all(torch.equal(got[key], want[key]) for key in want)
                ranks = {len(tensor) for key, tensor in got.items() if key.endswith("lora_down.weight")}
                assert ranks == {rank, min(rank, 6)}
                facts, all_of_them = metadata_of(path), metadata_of(folder / f"{name}.safetensors")
                differ = {key for key in facts if facts[key] != all_of_them[key]}
                assert differ - {"ss_network_args"} == {"ss_network_dim", "sshs_model_hash"}
                assert facts["ss_network_dim"] == str(rank) and facts["ss_network_alpha"] == "3"
                assert json.loads(facts["ss_network_args"])["conv_dim"] == str(min(rank, 6))


def test_files_of_others_are_never_deleted(tmp_path):
    foreign = {}
    for name in ("x-step00000001", "x-step00000003", "x-step00000000", "x-000001", "y-step00000002"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
        foreign[name] = name.encode()
    model, network = run(tmp_path, {"save_every_n_steps": 2, "save_last_n_steps": 2})
    train(model, network, range(4))
    # Somebody puts another adapter, and something else, where this run has written.
    monkey = lycore.Network({"network_dim": 2, "seed": 9})
    monkey.add("layer", nn.Linear(4, 4))
    monkey.build()
    monkey.save(tmp_path / "x-step00000002.safetensors")
    (tmp_path / "x-step00000004.safetensors").write_bytes(b"notes")
    kept = (tmp_path / "x-step00000002.safetensors").read_bytes()
    reports = train(model, network, range(4, 10))
    left = [(Path(entry["file"]).name, entry["reason"]) for report in reports for entry in report["left"]]
    reason = "is not the file that this run wrote there"
    assert left == [(f"x-step0000000{n}.safetensors", reason) for n in (2, 4)], "told once"
    assert (tmp_path / "x-step00000002.safetensors").read_bytes() == kept
    assert (tmp_path / "x-step00000004.safetensors").read_bytes() == b"notes"
    for name, content in foreign.items():
        assert (tmp_path / f"{name}.safetensors").read_bytes() == content
    assert not (tmp_path / "x-step00000006.safetensors").exists()
    # One that the user has deleted is no matter.
    (tmp_path / "x-step00000008.safetensors").unlink()
    assert all(not report["left"] for report in train(model, network, range(10, 14)))


@contextmanager
def full_disk(free: int):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["adapter", "state"])
def test_a_full_disk_keeps_all_older_files_and_the_run(tmp_path, what):
    config = {"save_every_n_steps": 2, "save_last_n_steps": 2, "save_state": True, "save_best": True}
    model, network = run(tmp_path, config)
    train(model, network, range(4))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    sizes = [(tmp_path / f"x-step00000004{end}.safetensors").stat().st_size for end in ("", "-state")]
    assert sizes[1] > sizes[0] + 1000
    free = {"adapter": sizes[0] // 2, "state": (sizes[0] + sizes[1]) // 2}[what]
    for number in (4, 5):
        loss_of(model, number).backward()
        network.step()
    with full_disk(free), pytest.raises(lycore.FileError) as caught:
        network.checkpoint(0.5)
    assert "x-best" in caught.value.file and "too large" in caught.value.message
    after = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == (set() if what == "adapter" else {"x-best.safetensors"})
    # The best is still to be had unless it was written; the run goes on to the next file, and the older ones go then.
    loss_of(model, 6).backward()
    network.step()
    report = network.checkpoint(0.75)
    assert (report["best"], len(report["written"])) == ((0.75, 2) if what == "adapter" else (0.5, 0))
    train(model, network, range(7, 8))
    assert "x-step00000008" in names(tmp_path) and "x-step00000002" not in names(tmp_path)
    other, whole = run(tmp_path / "whole", config)
    train(other, whole, range(8))
    assert torch.equal(whole.parameters, network.parameters)


def test_without_a_folder_nothing_is_written_but_the_end_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    network = attached(model, CONFIG)
    (report,) = train(model, network, range(1))
    assert report == {"step": 1, "epoch": 0, "best": None, "written": [], "deleted": [], "left": []}
    with pytest.raises(lycore.TrainError, match="where the adapter goes") as caught:
        network.finish()
    assert "output_dir" in caught.value.hint
    assert not list(tmp_path.iterdir())


def additional_networks_hashes(path: Path) -> tuple[str, str]:
    """As A1111's Additional Networks extension and sd-scripts compute them, with the safetensors library."""
    training = {key: value for key, value in metadata_of(path).items() if key.startswith("ss_")}
    file = io.BytesIO(save(load_file(path), training))
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    model = hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    return model, hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize(
    ("rank", "dtype", "where"),
    [(4, "fp32", "before"), (940, "fp32", "in"), (1900, "fp16", "in"), (1500, "fp32", "behind")],
)
def test_both_hashes_are_those_of_the_additional_networks_extension(tmp_path, rank, dtype, where):
    """For files that end before, in and behind the piece that the short one is of."""
    network = attached(net(), {"network_dim": rank, "conv_dim": rank, "metadata": {"ss_tag_frequency": "ä" * 999}})
    path = tmp_path / "adapter.safetensors"
    network.save(path, dtype, {"own": "of no account"})
    facts = metadata_of(path)
    assert (facts["sshs_model_hash"], facts["sshs_legacy_hash"]) == additional_networks_hashes(path)
    size = path.stat().st_size
    assert where == ("before" if size < 0x100000 else "in" if size < 0x110000 else "behind"), size


def test_two_files_of_one_state_differ_in_nothing_but_the_times(tmp_path, monkeypatch):
    model = net()
    network = attached(model, CONFIG)
    loss_of(model, 0).backward()
    network.step()
    files = []
    for clock in ("1700000000", "1800000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", clock)
        network.save(tmp_path / clock)
        files.append(tmp_path / clock)
    first, second = map(metadata_of, files)
    assert {key for key in first if first[key] != second[key]} == {"ss_training_finished_at", "modelspec.date"}
    assert first.keys() == second.keys()
    assert first["ss_training_started_at"] == first["ss_training_finished_at"] == "1700000000"
    assert (first["modelspec.date"], second["modelspec.date"]) == ("2023-11-14", "2027-01-15")
    assert load_file(files[0]).keys() == load_file(files[1]).keys()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    network.save(tmp_path / "now")
    assert int(metadata_of(tmp_path / "now")["ss_training_finished_at"]) > 1_700_000_000


def test_the_report_of_a_trained_file_knows_its_facts(tmp_path):
    model, network = run(tmp_path, {"metadata": {"modelspec.author": "me"}, "save_best": True})
    train(model, network, range(2))
    network.finish()
    with lycore.open(tmp_path / "x.safetensors") as adapter:
        facts = adapter.report()["facts"]
    assert facts["tool"]["name"] == "LyCore" and facts["tool"]["version"] == lycore.__version__
    assert (facts["author"], facts["title"], facts["date"]) == ("me", "x", "2023-11-14")
    assert (facts["training"]["steps"], facts["training"]["epoch"]) == (2, 0)
    assert facts["hashes"].keys() == {"model", "legacy"}
