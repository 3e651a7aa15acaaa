"""Which build is chosen, and what is said when none fits. Builds are empty files or marked ones; loading is faked."""

from __future__ import annotations

import sys
import types

import pytest

import lycore
from conftest import run_cli
from lycore import _binding, _builds, _library

LINKS_TORCH = b"\x7fELF...\0libtorch_cpu.so\0libc10.so\0"


class FakeFunction:
    def __init__(self, answer):
        self.answer = answer

    def __call__(self, *_):
        return self.answer


class FakeLibrary:
    """As much of a ctypes.CDLL as loading looks at."""

    def __init__(self, number=1000, lacks=None):
        self.lacks = lacks
        self.lycore_version_number = FakeFunction(number)
        self.lycore_version = FakeFunction(b"0.1.0")

    def __getattr__(self, name):
        if name == self.lacks or not name.startswith("lycore_"):
            raise AttributeError(f"undefined symbol: {name}")
        return self.__dict__.setdefault(name, FakeFunction(0))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(files, torch=, importable=)` fakes an installation and returns the list of what is opened.

    `torch` is the version in the process, `importable` one that can be imported; `fails` names a file that does not
    load.
    """
    monkeypatch.setattr(_library, "_LOADED", {})
    monkeypatch.setattr(_library, "_default", None)
    monkeypatch.delenv(_builds.ENVIRONMENT, raising=False)
    monkeypatch.setattr(_builds, "places", lambda: [tmp_path / "lib", tmp_path / "release", tmp_path / "small"])
    opened = []

    def install(files, *, torch=None, importable=None, fails=None, fake=None):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=torch))
        if torch is None:
            monkeypatch.delitem(sys.modules, "torch")

        def import_module(name):
            if torch is None and importable is None:
                raise ImportError(f"No module named {name!r}")
            sys.modules["torch"] = types.SimpleNamespace(__version__=torch or importable)
            return sys.modules["torch"]

        def dlopen(path):
            if fails and fails in path.name:
                raise OSError(f"{path}: undefined symbol: _ZN2at4fakeEv")
            opened.append(str(path.relative_to(tmp_path)))
            return fake or FakeLibrary()

        monkeypatch.setattr(_library, "import_module", import_module)
        monkeypatch.setattr(_library, "torch_version", lambda: torch or importable)
        monkeypatch.setattr(_library, "_dlopen", dlopen)
        return opened

    yield install


SMALL = {"lib/liblycore.so": b"\x7fELF"}
BOTH = SMALL | {"lib/liblycore-torch2.11.so": LINKS_TORCH, "lib/liblycore-torch2.10.so": LINKS_TORCH}


def test_without_torch_the_small_build_is_taken_and_torch_not_imported(installed):
    opened = installed(BOTH, importable="2.11.0")
    assert not lycore.load().build.links_torch
    assert opened == ["lib/liblycore.so"] and "torch" not in sys.modules


@pytest.mark.parametrize("version", ["2.10.1", "2.11.0+cu130"])
def test_with_torch_the_build_for_it_is_taken(installed, version):
    opened = installed(BOTH, torch=version)
    assert lycore.load().build.torch == version[:4]
    assert opened == [f"lib/liblycore-torch{version[:4]}.so"]


def test_training_imports_torch_first_and_both_builds_may_be_loaded(installed):
    opened = installed(BOTH, importable="2.11.0")
    small = lycore.load()
    assert lycore.load(torch=True).build.torch == "2.11"
    assert "torch" in sys.modules
    assert lycore.load() is small
    assert opened == ["lib/liblycore.so", "lib/liblycore-torch2.11.so"]


def test_a_mismatch_names_both_versions_and_merging_works(installed, caplog):
    opened = installed(BOTH, torch="2.9.1+cu128")
    with pytest.raises(lycore.LibraryError) as caught:
        lycore.load(torch=True)
    assert caught.value.message == "LyCore is built for torch 2.10 and 2.11, but this process has torch 2.9.1+cu128."
    assert caught.value.hint == ("install torch 2.11, or a LyCore release for torch 2.9; merging works without it")
    assert not lycore.load().build.links_torch
    assert opened == ["lib/liblycore.so"]
    assert "2.9.1+cu128" in caplog.text and "without libtorch" in caplog.text


def test_no_torch_is_said(installed):
    installed(BOTH)
    with pytest.raises(lycore.LibraryError, match=r"2\.10 and 2\.11, but torch is not installed"):
        lycore.load(torch=True)


def test_only_the_small_build_is_said(installed):
    installed(SMALL, torch="2.11.0")
    with pytest.raises(lycore.LibraryError, match="only the build without it is installed") as caught:
        lycore.load(torch=True)
    assert "torch 2.11" in caught.value.hint
    assert not lycore.load().build.links_torch


def test_nothing_installed_is_said(installed, tmp_path):
    installed({})
    with pytest.raises(lycore.LibraryError, match="nowhere in") as caught:
        lycore.load()
    assert str(tmp_path / "lib") in caught.value.message and "LYCORE_LIBRARY" in caught.value.hint


def test_a_checkout_is_told_apart_by_what_the_library_needs(installed, monkeypatch):
    opened = installed({"release/liblycore.so": LINKS_TORCH, "small/liblycore.so": b"\x7fELF"}, importable="2.11.0")
    assert [b.links_torch for b in _builds.find()] == [True, False]
    assert lycore.load().build.origin == "checkout"
    assert opened == ["small/liblycore.so"]
    monkeypatch.setattr(_library.Library, "torch", "2.10.0")
    with pytest.raises(lycore.LibraryError, match=r"built for torch 2\.10\.0, but this process has torch 2\.11\.0"):
        lycore.load(torch=True)
    monkeypatch.setattr(_library.Library, "torch", "2.11.3")
    assert lycore.load(torch=True).build.links_torch


def test_a_lone_torch_build_brings_torch_with_it(installed):
    opened = installed({"lib/liblycore-torch2.11.so": LINKS_TORCH}, importable="2.11.0")
    assert lycore.load().build.torch == "2.11"
    assert opened and "torch" in sys.modules


def test_a_build_that_does_not_load_is_said_and_applying_works(installed):
    opened = installed(BOTH, torch="2.11.0", fails="torch2.11")
    with pytest.raises(
        lycore.LibraryError, match=r"cannot be loaded beside torch 2\.11\.0.*undefined symbol"
    ) as caught:
        lycore.load(torch=True)
    assert "2.11.0" in caught.value.hint
    assert not lycore.load().build.links_torch
    assert opened == ["lib/liblycore.so"]


def test_another_version_is_refused(installed):
    installed(SMALL, fake=FakeLibrary(number=2_003_004))
    with pytest.raises(lycore.LibraryError, match=r"is LyCore 2\.3\.4, but the Python package is 0\.1\.0"):
        lycore.load()


def test_a_library_that_lacks_a_function_is_refused(installed):
    installed(SMALL, fake=FakeLibrary(lacks="lycore_stack_apply"))
    with pytest.raises(lycore.LibraryError, match="lycore_stack_apply"):
        lycore.load()


def test_the_environment_names_a_file_or_a_folder(installed, monkeypatch, tmp_path):
    opened = installed(BOTH | {"own/liblycore.so": b"\x7fELF"})
    monkeypatch.setenv("LYCORE_LIBRARY", str(tmp_path / "own"))
    assert lycore.load().build.origin == "LYCORE_LIBRARY"
    monkeypatch.setenv("LYCORE_LIBRARY", str(tmp_path / "own" / "liblycore.so"))
    assert [b.path for b in _builds.find()] == [tmp_path / "own" / "liblycore.so"]
    monkeypatch.setenv("LYCORE_LIBRARY", str(tmp_path / "none"))
    with pytest.raises(lycore.LibraryError, match="no LyCore library") as caught:
        _builds.find()
    assert "unset" in caught.value.hint
    assert opened == ["own/liblycore.so"]


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, lycore; lycore.Cancel, lycore.Stack, lycore.Network, lycore.merge, lycore.open\n"
        "from lycore import _library\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)), _library.loaded(), lycore.__version__)"
    )
    done = run_cli(code=code, environment={"LYCORE_LIBRARY": "/nowhere"})
    assert (done.stdout, done.stderr) == ("[] [] 0.1.0\n", "")


def test_public_names_are_all_there():
    for name in lycore.__all__:
        assert getattr(lycore, name) is not None
    assert set(lycore.__all__) <= set(dir(lycore))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lycore.nothing
    assert lycore.__version__ == ".".join(
        str(n) for n in (_binding.LYCORE_VERSION_MAJOR, _binding.LYCORE_VERSION_MINOR, _binding.LYCORE_VERSION_PATCH)
    )
