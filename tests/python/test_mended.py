"""Faults that were found by reading and are mended: each with the smallest file that shows it."""

from __future__ import annotations

import json
import time
import tracemalloc

import numpy
import pytest
from safetensors.numpy import load_file, save_file

import lycore


def f32(*shape, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)


def delta(path, shape, name="a.weight", **options):
    weight = {name: numpy.zeros(shape, numpy.float32)}
    with lycore.Stack(weight, **options) as stack:
        stack.add(path)
        stack.apply()
        return weight[name].copy()


def test_numbers_of_odd_types_are_not_read_past_their_end(tmp_path):
    path = tmp_path / "a.safetensors"
    many = numpy.zeros(1 << 16, numpy.uint8)
    save_file({"lora_unet_a.lokr_w1": f32(2, 2), "lora_unet_a.lokr_w2": f32(2, 2), "lora_unet_a.alpha": many}, path)
    assert "alpha" not in lycore.open(path).modules[0].tensors
    alpha = numpy.array(100000, numpy.int64)
    save_file({"lora_unet_a.lokr_w1": f32(2, 2), "lora_unet_a.lokr_w2": f32(2, 2), "lora_unet_a.alpha": alpha}, path)
    assert lycore.open(path).modules[0].tensors["alpha"].numpy() == 100000
    save_file({"lora_unet_a.oft_blocks": f32(2, 2, 2), "lora_unet_a.oft_blocks.0": many}, path)
    with pytest.raises(lycore.AdapterKeyError, match=r"both `oft_blocks` and `oft_blocks\.0`"):
        lycore.open(path)


def test_thin_factors_of_a_small_file_take_no_room_before_a_weight_bounds_them(tmp_path):
    path = tmp_path / "a.safetensors"
    thin = {"lokr_w1_a": f32(60000, 1), "lokr_w1_b": f32(1, 60000), "lokr_w2": f32(1, 1)}
    save_file({f"lora_unet_a.{name}": value for name, value in thin.items()}, path)
    start = time.perf_counter()
    with lycore.open(path) as adapter:
        assert adapter.report()["modules"][0]["shape"] == [60000, 60000]
    assert time.perf_counter() - start < 1.0


def test_a_weight_grows_only_to_its_modules_own_shape(tmp_path):
    grown = numpy.array([4, 2_000_000], numpy.float32)
    path = tmp_path / "a.safetensors"
    save_file({"lora_unet_a.oft_blocks": f32(2, 2, 2), "lora_unet_a.reshape_weight": grown}, path)
    with pytest.raises(lycore.AdapterKeyError, match="own shape"):
        lycore.open(path)


def test_one_adapter_grows_a_weight_and_another_does_not(tmp_path):
    base = {"img_in.weight": f32(8, 4, seed=1)}
    save_file(base, tmp_path / "base.safetensors")
    wide = {"lora_up.weight": f32(8, 2, seed=2), "lora_down.weight": f32(2, 8, seed=3)}
    plain = {"lora_up.weight": f32(8, 2, seed=4), "lora_down.weight": f32(2, 4, seed=5)}
    grown = wide | {"reshape_weight": numpy.array([8, 8], numpy.float32)}
    for name, tensors in (("wide", grown), ("plain", plain)):
        save_file({f"lora_unet_img_in.{k}": v for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    for strength, width in ((1.0, 8), (0.0, 4)):
        adapters = [(tmp_path / "wide.safetensors", strength), (tmp_path / "plain.safetensors", 0.5)]
        lycore.merge(tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors")
        out = load_file(tmp_path / "out.safetensors")["img_in.weight"]
        own = base["img_in.weight"] + 0.5 * plain["lora_up.weight"].astype("f8") @ plain["lora_down.weight"]
        want = numpy.pad(own, ((0, 0), (0, width - 4)))
        if strength:
            want = want + wide["lora_up.weight"].astype("f8") @ wide["lora_down.weight"]
        assert out.shape == (8, width) and numpy.allclose(out, want, rtol=1e-6, atol=1e-6)


def test_a_control_lora_for_a_wider_model_is_not_made_to_fit(tmp_path):
    base = {"double_blocks.0.img_attn.proj.weight": (4, 4), "double_blocks.0.img_attn.norm.query_norm.scale": (2,)}
    file = {
        "double_blocks.0.img_attn.proj.lora_A.weight": f32(2, 8),
        "double_blocks.0.img_attn.proj.lora_B.weight": f32(8, 2),
        "double_blocks.0.img_attn.norm.query_norm.scale": f32(2),
    }
    save_file({name: f32(*shape) for name, shape in base.items()}, tmp_path / "base.safetensors")
    save_file(file, tmp_path / "a.safetensors")
    report = lycore.merge(
        tmp_path / "base.safetensors", [tmp_path / "a.safetensors"], tmp_path / "out.safetensors", other_families=True
    )
    assert report["adapters"][0]["summary"]["malformed"] == 2
    assert load_file(tmp_path / "out.safetensors")["double_blocks.0.img_attn.proj.weight"].shape == (4, 4)


@pytest.mark.parametrize("slot", ["ia3_l", "weight", "oft_R.weight", "boft_R"])
def test_an_alpha_that_means_nothing_is_no_fault_in_a_patch(slot):
    tensors = {
        "ia3_l": {"ia3_l": f32(4, 1)},
        "weight": {"weight": f32(4), "on_input": 0},
        "oft_R.weight": {"oft_R.weight": f32(2, 1)},
        "boft_R": {"boft_R": f32(1, 2, 2, 2)},
    }[slot]
    weight = f32(4, 4, seed=9)
    before = weight.copy()
    lycore.weight_merge("x", weight, [(1.0, tensors | {"alpha": 0.0}, None)])
    assert not numpy.array_equal(weight, before)


def test_a_configuration_of_peft_survives_saving(tmp_path):
    root = "base_model.model.a"
    cases = {
        "oft": ({f"{root}.oft_R.weight": f32(2, 3)}, {"peft_type": "OFT", "use_cayley_neumann": False}),
        "lokr": (
            {f"{root}.lokr_w1": f32(2, 2), f"{root}.lokr_w2": f32(3, 3)},
            {"peft_type": "LOKR", "r": 8, "alpha": 2},
        ),
    }
    for name, (tensors, config) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with lycore.open(folder / "adapter_model.safetensors") as adapter:
            adapter.save(tmp_path / f"{name}.safetensors")
        weights = []
        for path in (folder / "adapter_model.safetensors", tmp_path / f"{name}.safetensors"):
            weight = {"a.weight": f32(6, 6, seed=5)}
            with lycore.Stack(weight) as stack:
                stack.add(path)
                stack.apply()
                weights.append(weight["a.weight"].copy())
        assert numpy.array_equal(*weights), name
        if name == "lokr":
            want = 2 / 8 * numpy.kron(tensors[f"{root}.lokr_w1"], tensors[f"{root}.lokr_w2"])
            assert numpy.allclose(weights[0] - f32(6, 6, seed=5), want, rtol=1e-5, atol=1e-6)


def test_metadata_of_many_networks_is_refused_at_once(tmp_path):
    many = {f"{i}.lora_alpha": 1 for i in range(20000)}
    tensors = {"unet.a.lora_A.weight": f32(2, 4), "unet.a.lora_B.weight": f32(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(many)})
    start = time.perf_counter()
    with pytest.raises(lycore.FileError, match="64 networks"):
        lycore.open(tmp_path / "a.safetensors")
    assert time.perf_counter() - start < 1.0


def test_tensors_of_the_whole_file_are_only_those_that_there_are(tmp_path):
    tensors = {
        "base_model.lora_A.weight": f32(2, 4),
        "base_model.model.l.lora_A.weight": f32(2, 4),
        "base_model.model.l.lora_B.weight": f32(4, 2),
        "base_model.vera_A": f32(2, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    keys = {k["key"]: k for k in lycore.open(tmp_path / "a.safetensors").report()["keys"]}
    assert keys["base_model.lora_A.weight"]["status"] == "malformed"
    assert keys["base_model.vera_A"]["status"] == "unsupported"
    assert keys["base_model.model.l.lora_A.weight"]["status"] == "readable"


def test_a_prefix_without_alpha_has_the_alpha_that_its_absence_means(tmp_path):
    pair = {"lora_unet_a.lora_up.weight": f32(5, 4, seed=1), "lora_unet_a.lora_down.weight": f32(4, 6, seed=2)}
    results = []
    for name, extra in (("none", {}), ("four", {"lora_unet_a.alpha": numpy.array(4, numpy.float32)})):
        path = tmp_path / f"{name}.safetensors"
        save_file(pair | extra, path)
        weight = {"a.weight": numpy.zeros((5, 6), numpy.float32)}
        with lycore.Stack(weight) as stack:
            stack.add(lycore.open(path).prefix(2))
            stack.apply()
            results.append(weight["a.weight"].copy())
    assert numpy.array_equal(*results)


def test_the_sign_of_a_zero_stays_where_nothing_is_added():
    weight = numpy.full((4, 4), -0.0, numpy.float32)
    ones = {"diff": numpy.ones((1, 4), numpy.float32)}, {"diff": numpy.ones((4, 1), numpy.float32)}
    lycore.weight_merge("x", weight, [(1.0, ones[0], (0, 0, 1)), (1.0, ones[1], (1, 0, 1))])
    assert numpy.signbit(weight[1:, 1:]).all() and weight[0, 0] == 2


def test_weights_of_files_of_peft_are_told_by_their_factors(tmp_path):
    """No program that reads PEFT's files looks for an alpha among the tensors."""
    root = "base_model.model.a."
    tensors = {f"{root}lora_A.weight": f32(2, 4), f"{root}lora_B.weight": f32(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    for weight in (0.5, -1.0):
        lycore.combine([(tmp_path / "a.safetensors", weight)], tmp_path / "out.safetensors")
        out = load_file(tmp_path / "out.safetensors")
        product = out[f"{root}lora_B.weight"].astype("f8") @ out[f"{root}lora_A.weight"]
        want = weight * tensors[f"{root}lora_B.weight"].astype("f8") @ tensors[f"{root}lora_A.weight"]
        assert numpy.allclose(product, want, rtol=1e-6, atol=1e-7), weight


def test_one_module_in_two_layouts_is_one_module(tmp_path):
    shape = {"up": (8, 2), "down": (2, 8)}
    names = {
        "one": ["unet.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"],
        "two": ["lora_unet_output_blocks_4_1_transformer_blocks_0_attn1_to_q"],
    }
    names["two"].append("lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q")
    for seed, (file, modules) in enumerate(names.items()):
        tensors = {}
        for module in modules:
            for part, size in shape.items():
                tensors[f"{module}.lora_{part}.weight"] = f32(*size, seed=10 * seed + len(tensors))
        save_file(tensors, tmp_path / f"{file}.safetensors")
    report = lycore.combine([tmp_path / "one.safetensors", tmp_path / "two.safetensors"], tmp_path / "out.safetensors")
    assert report["summary"]["shared"] == 1
    name = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q.weight"
    other = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    sums = {}
    for file in ("one", "two", "out"):
        weights = {n: numpy.zeros((8, 8), numpy.float32) for n in (name, other)}
        with lycore.Stack(weights) as stack:
            stack.add(tmp_path / f"{file}.safetensors")
            stack.apply()
            sums[file] = {n: w.copy() for n, w in weights.items()}
    for n in (name, other):
        assert numpy.allclose(sums["out"][n], sums["one"][n] + sums["two"][n], rtol=1e-5, atol=1e-6), n


def test_a_pickle_that_names_one_text_often_takes_no_room_for_it(tmp_path):
    torch = pytest.importorskip("torch")
    text = "x" * 20000
    torch.save({f"k{i}": text for i in range(5000)} | {"a.lora_up.weight": torch.zeros(1, 1)}, tmp_path / "a.pt")
    tracemalloc.start()
    with pytest.raises(lycore.LycoreError):
        lycore.open(tmp_path / "a.pt")
    tracemalloc.stop()
