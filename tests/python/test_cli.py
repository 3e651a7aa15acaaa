"""The command `lycore`, as a user runs it."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import signal
import subprocess
import sys

import numpy
import pytest
from safetensors.numpy import load_file, save_file

import lycore
from conftest import PLUGIN, run_cli
from lycore import _builds, cli, doctor

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def job(make_lora, tmp_path, rng):
    """A base checkpoint and two adapters."""
    base = {
        "x.to_q.weight": rng.standard_normal((32, 16)).astype("f2"),
        "x.conv.weight": rng.standard_normal((8, 6, 3, 3)).astype("f4"),
        "x.norm.weight": rng.standard_normal(16).astype("f2"),
        "ids": numpy.arange(7),
    }
    path = tmp_path / "base.safetensors"
    save_file(base, path, metadata={"kept": "yes"})
    modules = {"lora_unet_x_to_q": [32, 16], "lora_unet_x_conv": [8, 6, 3, 3]}
    return path, base, [make_lora("one", modules), make_lora("two", {**modules, "lora_unet_y_to_q": [32, 16]})]


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a:-1", "a", -1.0),
        ("a:1e-1", "a", 0.1),
        ("a:.5", "a", 0.5),
        ("C:\\x.safetensors", "C:\\x.safetensors", 1.0),
        ("C:\\x.safetensors:2", "C:\\x.safetensors", 2.0),
        ("dir:a/b", "dir:a/b", 1.0),
        ("a:b:0.25", "a:b", 0.25),
        ("a:", "a:", 1.0),
        (":2", ":2", 1.0),
        ("a:nan", "a:nan", 1.0),
        ("a:inf", "a:inf", 1.0),
        ("a:1_0", "a:1_0", 1.0),
        ("a:1e999", "a:1e999", 1.0),
    ],
)
def test_strengths_follow_the_last_colon(text, path, strength):
    assert cli.split_strength(text) == (path, strength)


def test_info_prints_the_report(job):
    lora = job[2][0]
    done = run_cli("info", lora.path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == lycore.open(lora.path).report()
    done = run_cli("info", lora.path)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["file"] == str(lora.path)
    assert (lines["content"], lines["rank"], lines["alpha"]) == ("2 modules, 6 keys", "4", "2")
    assert lines["algorithm"] == "LoCon (1), LoRA (1)"


def test_merge_writes_the_formula_and_reports(job, tmp_path):
    path, base, (one, two) = job
    out = tmp_path / "out.safetensors"
    done = run_cli("merge", path, f"{one.path}:0.5", two.path, "-o", out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["tensors"] == {"changed": 2, "copied": 2}
    assert [a["summary"]["matched"] for a in report["adapters"]] == [6, 6]
    assert report["adapters"][1]["summary"]["unmatched"] == 3
    merged = load_file(out)
    for name, module in (("x.to_q.weight", "lora_unet_x_to_q"), ("x.conv.weight", "lora_unet_x_conv")):
        want = base[name].astype("f8") + 0.5 * one.deltas[module] + two.deltas[module]
        step = numpy.spacing(abs(want).astype(base[name].dtype)).astype("f8")
        assert merged[name].dtype == base[name].dtype and (abs(merged[name] - want) <= 0.51 * step + 1e-6).all(), name
    for name in ("x.norm.weight", "ids"):
        assert merged[name].tobytes() == base[name].tobytes()


def test_merge_for_people(job, tmp_path):
    path, _, (_, two) = job
    out = tmp_path / "out.safetensors"
    done = run_cli("merge", path, f"{two.path}:1", "-o", out, "--dtype", "fp32")
    assert done.returncode == 0
    first, second, *rest = done.stdout.splitlines()
    assert first.startswith(f"{out}: 2 tensors changed, 2 copied, ")
    assert second == f"  {two.path}: 6 matched, 3 unmatched of 9 keys"
    assert rest == ["    unmatched: 3 keys", "      lora_unet_y_to_q (nearest: lora_unet_x_to_q)"]
    assert load_file(out)["x.to_q.weight"].dtype == numpy.float32


def test_errors_are_one_line_and_a_hint(tmp_path, job):
    done = run_cli("info", tmp_path / "none.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("lycore: error: ") and "none.safetensors" in error
    assert hint == "hint: check the path and the permissions"
    out = tmp_path / "out.safetensors"
    done = run_cli("merge", job[0], tmp_path / "none", "-o", out)
    assert done.returncode == 1 and not out.exists()


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["merge", "a", "-o", "b"], ["merge", "a", "b"], ["info"]])
def test_wrong_usage_is_status_2(arguments):
    done = run_cli(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: lycore")


def test_info_and_merge_import_neither_torch_nor_numpy(job, tmp_path):
    if _builds.small(_builds.find()) is None:
        pytest.skip("needs the build without libtorch: the only one here brings torch with it")
    path, _, (one, _) = job
    code = (
        "import sys; from lycore.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = sorted({'torch', 'numpy'} & {name.split('.')[0] for name in sys.modules})\n"
        "print(status, heavy, file=sys.stderr)"
    )
    for arguments in (["info", one.path], ["merge", path, one.path, "-o", tmp_path / "out.safetensors"]):
        done = run_cli(*arguments, code=code)
        assert done.stderr == "0 []\n", arguments


def test_help_is_quick_and_loads_nothing():
    def seconds() -> float:
        """Processor time, which others on the machine do not lengthen."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_cli("--help", environment={"LYCORE_LIBRARY": "/nowhere"})
        assert done.returncode == 0 and "merge" in done.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.2


def test_doctor_tells_what_works_and_why_not(tmp_path):
    done = run_cli("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["package"] == lycore.__version__ and found["works"]["merge on the CPU"] is True
    assert any(build.get("version") == lycore.__version__ for build in found["builds"])
    for state in found["works"].values():
        assert state is True or len(state) > 10

    broken = tmp_path / "liblycore.so"
    broken.write_bytes(b"not a library")
    done = run_cli("doctor", environment={"LYCORE_LIBRARY": str(broken)})
    assert done.returncode == 1
    assert "merge on the CPU: no. " in done.stdout and "cannot be loaded" in done.stdout


def test_doctor_counts_a_gpu_of_either_build():
    """The build without libtorch merges on a GPU beside any torch, or none."""
    refused = {"error": "LyCore is built for torch 2.11, but this process has torch 2.9.", "hint": "install torch 2.11"}
    small, none = ({"cuda": {"devices": n} | ({} if n else {"why": "no driver"}), "training": False} for n in (1, 0))
    why = "LyCore is built for torch 2.11, but this process has torch 2.9; install torch 2.11"
    assert doctor._works(small, refused) == {"merge on the CPU": True, "merge on a GPU": True, "training": why}
    assert doctor._works(none, refused)["merge on a GPU"] == "no driver"
    assert doctor._works(refused, refused) == dict.fromkeys(["merge on the CPU", "merge on a GPU", "training"], why)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_cancel_and_leave_no_partial_file(tmp_path, make_lora, number):
    base = tmp_path / "base.safetensors"
    save_file({f"x.{i}.to_q.weight": numpy.zeros((1024, 1024), "f4") for i in range(64)}, base)
    lora = make_lora("many", {f"lora_unet_x_{i}_to_q": [1024, 1024] for i in range(64)}, rank=64)
    folder = tmp_path / "out"
    folder.mkdir()
    # One signal, from the first progress report after the start, so that the merge is surely under way.
    code = (
        "import os, sys; from lycore import cli\n"
        "sent = []\n"
        "def show(self, done, total):\n"
        "    if done and not sent:\n"
        "        sent.append(done)\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "cli.Bar.show = show\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = run_cli("merge", base, lora.path, "-o", folder / "out.safetensors", code=code)
    assert done.returncode == 128 + number, done.stderr
    assert done.stdout == ""
    assert list(folder.iterdir()) == []


def test_progress_is_drawn_on_a_terminal_only(job, tmp_path):
    path, _, (one, _) = job
    arguments = ["merge", str(path), str(one.path), "-o", str(tmp_path / "out.safetensors")]
    primary, secondary = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(PLUGIN)}
    command = [sys.executable, "-m", "lycore", *arguments]
    done = subprocess.run(command, env=env, stderr=secondary, stdout=subprocess.PIPE, timeout=60, check=False)
    os.close(secondary)
    drawn = os.read(primary, 65536).decode()
    os.close(primary)
    assert done.returncode == 0
    assert "100%" in drawn and "/s" in drawn and "left" in drawn

    silent = io.StringIO()
    with cli.Bar(silent) as bar:
        bar.show(1, 2)
    assert silent.getvalue() == ""


def test_a_reader_that_leaves_is_no_error(job):
    env = {**os.environ, "PYTHONPATH": str(PLUGIN)}
    command = [sys.executable, "-m", "lycore", "info", "--json", str(job[2][0].path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
