"""Adapters: what is read is what was written."""

from __future__ import annotations

import gc
import pickle
import threading

import numpy
import pytest
from safetensors.numpy import load_file

import lycore

pytestmark = pytest.mark.usefixtures("library")

SHAPES = {
    "lora_unet_a_to_q": [12, 8],
    "lora_unet_b_conv": [6, 5, 3, 3],
    "lora_unet_c_proj": [6, 5, 1, 1],
    "lora_unet_d_tucker": [6, 5, 3, 3],
}


@pytest.fixture
def lora(make_lora):
    return make_lora("all", SHAPES, tucker=("lora_unet_d_tucker",), metadata={"ss_output_name": "ünï"})


@pytest.mark.parametrize("from_memory", [False, True])
def test_modules_and_tensors_are_those_of_the_file(lora, from_memory):
    with lycore.open(lora.path.read_bytes() if from_memory else lora.path) as adapter:
        assert sorted(m.name for m in adapter.modules) == sorted(SHAPES)
        for module in adapter.modules:
            assert (module.rank, module.alpha) == (4, 2.0)
            assert module.algorithm == ("LoRA" if len(SHAPES[module.name]) == 2 else "LoCon")
            written = {k: v for k, v in lora.tensors.items() if k.startswith(module.name + ".")}
            assert {f"{module.name}.{name}" for name in module.tensors} == set(written)
            for name, tensor in module.tensors.items():
                expected = written[f"{module.name}.{name}"]
                array = tensor.numpy()
                assert (tensor.dtype, tensor.shape) == ("fp16", expected.shape)
                assert array.dtype == expected.dtype and numpy.array_equal(array, expected)


def test_arrays_are_views_that_outlive_the_adapter(lora):
    adapter = lycore.open(lora.path)
    tensor = adapter.modules[0].tensors["lora_up.weight"]
    first, second = tensor.numpy(), tensor.numpy()
    assert first.ctypes.data == second.ctypes.data
    assert not first.flags.writeable
    expected = lora.tensors[f"{adapter.modules[0].name}.lora_up.weight"]
    adapter.close()
    del adapter, tensor, second
    gc.collect()
    assert numpy.array_equal(first, expected)


def test_bf16_is_given_as_bits_and_as_a_torch_tensor(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    path = tmp_path / "bf16.safetensors"
    save_file({"lora_unet_x.lora_up.weight": values, "lora_unet_x.lora_down.weight": values.T.contiguous()}, path)
    tensor = lycore.open(path).modules[0].tensors["lora_up.weight"]
    assert tensor.dtype == "bf16"
    assert numpy.array_equal(tensor.numpy(), values.view(torch.uint16).numpy())
    copy = tensor.torch()
    assert copy.dtype == torch.bfloat16 and torch.equal(copy, values)
    copy.zero_()
    assert torch.equal(tensor.torch(), values)


def test_the_report_counts_every_key(lora):
    report = lycore.open(lora.path).report()
    assert report["file"] == str(lora.path)
    assert report["metadata"] == {"ss_output_name": "ünï"}
    assert report["summary"]["keys"] == len(lora.tensors)
    assert report["summary"]["modules"] == len(SHAPES)
    assert {key["key"] for key in report["keys"]} == set(lora.tensors)
    assert {key["status"] for key in report["keys"]} == {"readable"}


def test_saving_keeps_every_bit(lora, tmp_path):
    path = tmp_path / "säved.safetensors"
    lycore.open(lora.path).save(path)
    saved = load_file(path)
    assert set(saved) == set(lora.tensors)
    for key, value in lora.tensors.items():
        assert saved[key].dtype == value.dtype and saved[key].tobytes() == value.tobytes()


def test_errors_name_the_file_and_what_to_do(tmp_path):
    missing = tmp_path / "none.safetensors"
    with pytest.raises(lycore.FileError) as caught:
        lycore.open(missing)
    assert caught.value.file == str(missing)
    assert caught.value.hint == "check the path and the permissions"
    assert str(missing) in caught.value.message
    assert str(caught.value) == f"{caught.value.message} Hint: {caught.value.hint}"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.status) == (lycore.FileError, str(caught.value), caught.value.status)

    with pytest.raises(lycore.FileError, match="at least 8"):
        lycore.open(b"1234")
    with pytest.raises(lycore.ArgumentError, match="NUL"):
        lycore.open("a\0b")


def test_a_closed_adapter_says_so(lora):
    adapter = lycore.open(lora.path)
    adapter.close()
    adapter.close()
    with pytest.raises(lycore.HandleError, match="closed"):
        adapter.report()
    assert "closed" in repr(adapter)


def test_threads_may_share_an_adapter(lora):
    adapter = lycore.open(lora.path)
    expected = adapter.report()
    seen, threads = [], [threading.Thread(target=lambda: seen.append(adapter.report())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 8
