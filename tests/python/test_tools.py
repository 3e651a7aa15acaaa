"""resize, combine and extract against numpy in float64: full decompositions, sd-scripts' rules, PEFT's methods."""

from __future__ import annotations

import json

import numpy
import pytest
from lora_formula import product, rank
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lycore
from conftest import run_cli

pytestmark = pytest.mark.usefixtures("library")

SHAPES = {
    "lora_unet_wide": (48, 160),
    "lora_unet_tall": (130, 40),
    "lora_unet_thin": (6, 90),
    "lora_unet_conv": (32, 20, 3, 3),
    "lora_unet_point": (40, 24, 1, 1),
}


def deltas(path) -> dict[str, numpy.ndarray]:
    """dW of every module of a file as a matrix, in float64."""
    tensors, modules = load_file(path), {}
    for key, value in tensors.items():
        module, slot = key.split(".", 1)
        short = {"lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid"}.get(slot, slot)
        modules.setdefault(module, {})[short] = value.astype(numpy.float64)
    made = {}
    for module, factors in modules.items():
        alpha, r = factors.pop("alpha", None), rank(factors)
        scale = 1.0 if r is None or alpha is None else float(alpha) / r
        delta = scale * product(factors)
        made[module] = delta.reshape(len(delta), -1)
    return made


def falling(rng, shape, r, dtype, alpha, base=0.8):
    """Factors whose product has falling singular values, by suffix."""
    out, channels, *kernel = shape
    ones = [1] * len(kernel)
    up = rng.standard_normal((out, r)) * base ** numpy.arange(r)
    down = rng.standard_normal((r, channels * int(numpy.prod(kernel)))) * 0.1
    return {
        "lora_up.weight": up.reshape(out, r, *ones).astype(dtype),
        "lora_down.weight": down.reshape(r, channels, *kernel).astype(dtype),
        "alpha": numpy.array(alpha, dtype),
    }


@pytest.fixture
def make(tmp_path, rng):
    """`make(name, rank)` writes a LoRA with a module of every shape."""

    def write(name, r, dtype="float32", alpha=3.0, shapes=SHAPES):
        factors = {module: falling(rng, shape, r, dtype, alpha) for module, shape in shapes.items()}
        tensors = {f"{module}.{slot}": value for module, own in factors.items() for slot, value in own.items()}
        save_file(tensors, tmp_path / name, metadata={"ss_network_dim": str(r), "ss_output_name": "x"})
        return tmp_path / name

    return write


def factor_product(path, module):
    """up @ down without scale: what sd-scripts decomposes."""
    tensors = load_file(path)
    up, down = (tensors[f"{module}.lora_{half}.weight"].astype(numpy.float64) for half in ("up", "down"))
    return up.reshape(len(up), -1) @ down.reshape(len(down), -1)


def kohya_rank(s, limit, method, param):
    """sd-scripts' rank_resize."""
    if method == "fixed":
        new = limit
    else:
        if method == "sv_ratio":
            index = int((s > s[0] / param).sum())
        elif method == "sv_cumulative":
            index = int(numpy.searchsorted(numpy.cumsum(s) / s.sum(), param)) + 1
        else:
            index = int(numpy.searchsorted(numpy.cumsum(s**2) / (s**2).sum(), param**2)) + 1
        new = max(1, min(index, len(s) - 1)) + 1
    if s[0] <= 1e-6:
        new = 1
    return min(new, limit)


@pytest.mark.parametrize(
    ("method", "param"),
    [("fixed", None), ("sv_ratio", 3.0), ("sv_ratio", 12.0)]
    + [("sv_cumulative", p) for p in (0.3, 0.6, 0.9)]
    + [("sv_fro", p) for p in (0.5, 0.9, 0.99)],
)
def test_resize_is_the_nearest_at_the_rank_that_sd_scripts_picks(make, tmp_path, method, param):
    source, out = make("in.safetensors", 16), tmp_path / "out.safetensors"
    limits = {"rank": 9, "conv_rank": 7} if method == "fixed" else {"rank": 12, "conv_rank": 11}
    report = lycore.resize(source, out, **limits, method=method, param=param)
    before, after, tensors = deltas(source), deltas(out), load_file(out)
    assert {m["module"] for m in report["modules"]} == set(SHAPES)
    for entry in report["modules"]:
        module = entry["module"]
        s = numpy.linalg.svd(factor_product(source, module), compute_uv=False)
        limit = limits["conv_rank"] if len(SHAPES[module]) == 4 else limits["rank"]
        wanted = kohya_rank(s, limit, method, param)
        assert entry["new_rank"] == min(wanted, 16), module
        assert tensors[f"{module}.alpha"] == pytest.approx(3.0 / 16 * wanted, rel=1e-6), "the scale stays"
        left = numpy.sqrt((s[wanted:] ** 2).sum()) * 3.0 / 16
        lost = numpy.linalg.norm(after[module] - before[module])
        # fp32 factors: the optimum, and the rounding of the factors beside it.
        assert lost <= left * (1 + 1e-6) + 1e-6 * numpy.linalg.norm(before[module]), module
        assert lost >= left * (1 - 1e-6) - 1e-6 * numpy.linalg.norm(before[module]), module
        assert entry["error"] == pytest.approx(left / numpy.linalg.norm(before[module]), rel=1e-5, abs=1e-6)
        assert entry["sum_retained"] == pytest.approx(s[:wanted].sum() / s.sum(), rel=1e-6)
        fro = numpy.linalg.norm(s[:wanted]) / numpy.linalg.norm(s)
        assert entry["fro_retained"] == pytest.approx(fro, rel=1e-6)
    assert out.stat().st_size < source.stat().st_size


def test_resize_writes_sd_scripts_factors(make, tmp_path):
    source, out = make("in.safetensors", 12), tmp_path / "out.safetensors"
    lycore.resize(source, out, rank=5)
    tensors = load_file(out)
    for module in SHAPES:
        u, s, vh = numpy.linalg.svd(factor_product(source, module), full_matrices=False)
        up, down = (tensors[f"{module}.lora_{half}.weight"] for half in ("up", "down"))
        up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
        # Each pair of vectors has one sign that is free.
        sign = numpy.sign((down * vh[:5]).sum(axis=1))
        assert abs(down * sign[:, None] - vh[:5]).max() < 1e-5, module
        assert abs(up * sign - u[:, :5] * s[:5]).max() < 1e-5 * s[0], module


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_stack_moves_by_the_stated_error(make, tmp_path, dtype):
    source, out = make("in.safetensors", 16, dtype), tmp_path / "out.safetensors"
    report = lycore.resize(source, out, rank=6)
    stated = {m["module"]: m["error"] for m in report["modules"]}
    results = []
    for path in (source, out):
        weights = {name.removeprefix("lora_unet_"): numpy.zeros(shape, "f4") for name, shape in SHAPES.items()}
        stack = lycore.Stack(weights)
        stack.add(path)
        stack.apply()
        results.append(weights)
    for name, before in results[0].items():
        moved = numpy.linalg.norm(results[1][name] - before) / numpy.linalg.norm(before)
        # The roundings of the two factors are told apart; what they do together is a matter of chance.
        assert moved == pytest.approx(stated[f"lora_unet_{name}"], rel=2e-3, abs=2e-5), name


def test_small_singular_values_survive_fp16(tmp_path, rng):
    # Values near 1e-5 in one factor would be lost among fp16's smallest numbers.
    tensors = {f"lora_unet_x.{k}": v for k, v in falling(rng, (400, 300), 8, "float32", 8.0).items()}
    tensors["lora_unet_x.lora_up.weight"] *= 1e-4
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    lycore.resize(source, out, rank=7, dtype="fp16")
    u, s, vh = numpy.linalg.svd(deltas(source)["lora_unet_x"], full_matrices=False)
    best = (u[:, :7] * s[:7]) @ vh[:7]
    assert numpy.linalg.norm(deltas(out)["lora_unet_x"] - best) < 1e-3 * numpy.linalg.norm(best)


def test_a_resized_file_is_never_larger(make, tmp_path):
    out = tmp_path / "out.safetensors"
    for r in (1, 2, 3, 5):
        source = make("in.safetensors", r, "float16", shapes={"lora_unet_a": (3, 4), "lora_unet_b": (5, 2)})
        for new in (1, 2, 4, 8):
            lycore.resize(source, out, rank=new, dtype="fp32")
            assert out.stat().st_size <= source.stat().st_size, (r, new)
    source = make("in.safetensors", 4)
    lycore.resize(source, out, rank=4)
    assert out.read_bytes() == source.read_bytes()
    lycore.resize(source, source, rank=2)
    assert source.stat().st_size < out.stat().st_size, "a file over itself"


def test_combine_is_the_sum(make, tmp_path):
    a, b = make("a.safetensors", 4), make("b.safetensors", 7, alpha=5.0)
    out = tmp_path / "out.safetensors"
    for wa, wb in ((1.0, 1.0), (0.8, -0.5), (-2.0, 0.1)):
        lycore.combine([(a, wa), (b, wb)], out)
        da, db, dc = deltas(a), deltas(b), deltas(out)
        for module in SHAPES:
            exact = wa * da[module] + wb * db[module]
            assert numpy.linalg.norm(dc[module] - exact) < 1e-6 * numpy.linalg.norm(exact), module
    # Equal scales: every factor keeps its bits in fp16 too.
    a, b = make("a.safetensors", 4, "float16", 2.0), make("b.safetensors", 8, "float16", 4.0)
    lycore.combine([a, (b, -1.0)], out)
    for module, delta in deltas(out).items():
        exact = deltas(a)[module] - deltas(b)[module]
        # The thin layer's factors would be larger than its difference, which is written in fp32.
        assert numpy.linalg.norm(delta - exact) < (1e-7 if "thin" in module else 1e-12) * numpy.linalg.norm(exact)


def test_combine_alone_copies_and_negates(make, tmp_path):
    source, out = make("in.safetensors", 4, "float16"), tmp_path / "out.safetensors"
    report = lycore.combine([source], out)
    assert out.read_bytes() == source.read_bytes() and report["modules"][0]["form"] == "copied"
    lycore.combine([(source, -1.0)], out)
    before, after = deltas(source), deltas(out)
    assert all(numpy.array_equal(-before[module], after[module]) for module in SHAPES)
    with safe_open(out, "numpy") as file:
        assert file.metadata()["ss_output_name"] == "x"


def test_svd_cuts_the_exact_sum(make, tmp_path):
    a, b, out = make("a.safetensors", 6), make("b.safetensors", 6), tmp_path / "out.safetensors"
    report = lycore.combine([(a, 1.2), (b, -0.7)], out, method="svd", rank=5, conv_rank=3)
    da, db, made = deltas(a), deltas(b), deltas(out)
    for entry in report["modules"]:
        module = entry["module"]
        exact = 1.2 * da[module] - 0.7 * db[module]
        s = numpy.linalg.svd(exact, compute_uv=False)
        r = 3 if len(SHAPES[module]) == 4 else 5
        best = numpy.sqrt((s[r:] ** 2).sum())
        assert entry["rank"] == r
        lost = numpy.linalg.norm(made[module] - exact)
        assert abs(lost - best) <= 1e-6 * best + 1e-6 * numpy.linalg.norm(exact), module


def peft_prune(delta, density):
    """PEFT's magnitude_based_pruning."""
    keep = int(density * delta.size)
    mask = numpy.zeros(delta.size)
    mask[numpy.argsort(-abs(delta).ravel(), kind="stable")[:keep]] = 1
    return delta * mask.reshape(delta.shape)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_sparse_methods_are_pefts(make, tmp_path, method):
    a, b, c = (make(f"{name}.safetensors", 5) for name in "abc")
    out, weights, density = tmp_path / "out.safetensors", (1.0, 0.6, 0.3), 0.35
    lycore.combine(list(zip((a, b, c), weights, strict=True)), out, method=method, density=density)
    every, made = [deltas(path) for path in (a, b, c)], deltas(out)
    for module in SHAPES:
        pruned = numpy.stack([peft_prune(d[module], density) for d in every])
        weighted = pruned * numpy.array(weights)[:, None, None]
        if method == "ties":
            # calculate_majority_sign_mask("total") of the weighted task vectors, then disjoint_merge.
            elected = numpy.where(pruned.sum(0) >= 0, 1, -1)
            mask = numpy.sign(pruned) == elected
            exact = (weighted * mask).sum(0) / numpy.maximum(mask.sum(0), 1)
        else:
            exact = weighted.sum(0)
        # A handful of elements lie so near to the border of the pruning that fp32 decides otherwise.
        wrong = abs(made[module] - exact) > 1e-5 * abs(exact).max()
        assert wrong.mean() < 1e-3, module
    lycore.combine([(a, 1.0), (b, 0.6)], out, method=method, density=density, rank=4)
    assert {load_file(out)[f"{m}.lora_down.weight"].shape[0] for m in SHAPES} == {4}


def test_dare_is_unbiased_and_seeded(make, tmp_path):
    a, out = make("a.safetensors", 5), tmp_path / "out.safetensors"
    lycore.combine([(a, 2.0)], out, method="dare", density=0.25, seed=3)
    first, exact = deltas(out), deltas(a)
    kept = [(first[m] != 0).mean() for m in SHAPES]
    # 0.25 of the elements of each module, within five standard deviations.
    assert all(abs(k - 0.25) < 5 * (0.1875 / first[m].size) ** 0.5 for k, m in zip(kept, SHAPES, strict=True))
    for module in SHAPES:
        where = first[module] != 0
        assert numpy.allclose(first[module][where], exact[module][where] * 8, rtol=1e-5, atol=1e-6), (
            "rescaled, then weighted"
        )
    lycore.combine([(a, 2.0)], out, method="dare", density=0.25, seed=3)
    assert all(numpy.array_equal(first[m], deltas(out)[m]) for m in SHAPES)
    lycore.combine([(a, 2.0)], out, method="dare", density=0.25, seed=4)
    assert not any(numpy.array_equal(first[m], deltas(out)[m]) for m in SHAPES)


def lycoris_file(path, rng, kind):
    """A LoHa or LoKr of one module [48, 60]."""
    if kind == "loha":
        shapes = {"hada_w1_a": (48, 3), "hada_w1_b": (3, 60), "hada_w2_a": (48, 3), "hada_w2_b": (3, 60)}
    else:
        shapes = {"lokr_w1": (4, 3), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 20)}
    tensors = {f"lora_unet_x.{name}": rng.standard_normal(size).astype("f4") for name, size in shapes.items()}
    save_file(tensors | {"lora_unet_x.alpha": numpy.array(1.5, "f4")}, path)
    return path


@pytest.mark.parametrize(("kind", "exact"), [("loha", 9), ("lokr", 6)])
def test_conversion_is_exact_at_its_rank_and_the_nearest_below(tmp_path, rng, kind, exact):
    source, out = lycoris_file(tmp_path / "in.safetensors", rng, kind), tmp_path / "out.safetensors"
    before = deltas(source)["lora_unet_x"]
    s = numpy.linalg.svd(before, compute_uv=False)
    for r in (exact, exact + 5, 4, 1):
        (entry,) = lycore.resize(source, out, rank=r, convert=True)["modules"]
        assert (entry["status"], entry["new_rank"]) == ("converted", min(r, exact))
        lost = numpy.linalg.norm(deltas(out)["lora_unet_x"] - before)
        best = numpy.linalg.norm(s[r:])
        assert abs(lost - best) < 1e-5 * numpy.linalg.norm(before)
        assert entry["error"] == pytest.approx(best / numpy.linalg.norm(before), abs=1e-5)


def test_algorithms_mix(make, tmp_path, rng):
    loha = lycoris_file(tmp_path / "loha.safetensors", rng, "loha")
    lokr = lycoris_file(tmp_path / "lokr.safetensors", rng, "lokr")
    lora = make("lora.safetensors", 4, shapes={"lora_unet_x": (48, 60)})
    out = tmp_path / "out.safetensors"
    (entry,) = lycore.combine([(lora, 0.5), (loha, -1.0), (lokr, 2.0)], out)["modules"]
    assert (entry["form"], entry["rank"]) == ("concatenated", 4 + 9 + 6)
    exact = sum(w * deltas(p)["lora_unet_x"] for p, w in ((lora, 0.5), (loha, -1.0), (lokr, 2.0)))
    assert numpy.linalg.norm(deltas(out)["lora_unet_x"] - exact) < 1e-6 * numpy.linalg.norm(exact)


@pytest.fixture
def checkpoints(tmp_path, rng):
    """A base, and the same with falling differences on some weights."""
    root = "model.diffusion_model."
    shapes = {
        f"{root}double_blocks.0.img_attn.qkv.weight": (384, 320),
        f"{root}double_blocks.0.conv.weight": (64, 32, 3, 3),
        f"{root}double_blocks.0.norm.weight": (320,),
        f"{root}double_blocks.0.img_attn.qkv.bias": (384,),
        f"{root}double_blocks.1.still.weight": (64, 64),
        "first_stage_model.conv.weight": (8, 8, 3, 3),
    }
    base = {name: rng.standard_normal(size).astype("f4") for name, size in shapes.items()}
    tuned, diffs = dict(base), {}
    for name, size in shapes.items():
        if "still" in name:
            continue
        if len(size) == 1:
            diff = rng.standard_normal(size)
        else:
            cols = int(numpy.prod(size[1:]))
            u = numpy.linalg.qr(rng.standard_normal((size[0], min(size[0], cols))))[0]
            v = numpy.linalg.qr(rng.standard_normal((cols, min(size[0], cols))))[0]
            diff = ((u * 0.8 ** numpy.arange(u.shape[1])) @ v.T).reshape(size)
        tuned[name] = (base[name] + diff).astype("f4")
        diffs[name.removeprefix(root)] = (tuned[name].astype("f8") - base[name]).reshape(size[0], -1)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", diffs


def test_extract_is_the_nearest_difference(checkpoints, tmp_path):
    tuned, base, diffs = checkpoints
    out = tmp_path / "out.safetensors"
    report = lycore.extract(tuned, base, out, rank=12, conv_rank=6)
    assert report["summary"] == {"weights": 3, "modules": 2, "unchanged": 1, "skipped": 0}
    made = deltas(out)
    names = {"lora_unet_double_blocks_0_img_attn_qkv": 12, "lora_unet_double_blocks_0_conv": 6}
    assert set(made) == set(names)
    for entry in report["modules"]:
        diff = diffs[entry["weight"].removeprefix("model.diffusion_model.")]
        s, r = numpy.linalg.svd(diff, compute_uv=False), names[entry["module"]]
        best = numpy.linalg.norm(s[r:])
        lost = numpy.linalg.norm(made[entry["module"]] - diff)
        assert best * (1 - 1e-6) <= lost <= best * (1 + 1e-5), entry
        assert entry["rank"] == r
        assert entry["error"] == pytest.approx(lost / numpy.linalg.norm(diff), rel=1e-4)
    again = tmp_path / "again.safetensors"
    lycore.extract(tuned, base, again, rank=12, conv_rank=6)
    assert again.read_bytes() == out.read_bytes(), "the sketch is the same every time"


def test_extract_by_energy_with_norms_gives_the_tuned_model(checkpoints, tmp_path):
    tuned, base, diffs = checkpoints
    out, merged = tmp_path / "out.safetensors", tmp_path / "merged.safetensors"
    report = lycore.extract(tuned, base, out, rank=60, energy=0.99, norms=True)
    for entry in report["modules"]:
        if "rank" in entry:
            s = numpy.linalg.svd(diffs[entry["weight"].removeprefix("model.diffusion_model.")], compute_uv=False)
            wanted = int(numpy.searchsorted(numpy.cumsum(s**2) / (s**2).sum(), 0.99)) + 1
            assert entry["rank"] == wanted, entry
    lycore.extract(tuned, base, out, rank=60, norms=True)
    lycore.merge(base, [out], merged)
    have, want = load_file(merged), load_file(tuned)
    for name in want:
        if not name.startswith("first_stage"):
            assert abs(have[name] - want[name]).max() < 2e-5, name


def test_extract_says_what_it_skips(checkpoints, tmp_path):
    tuned, base, _ = checkpoints
    other = load_file(base)
    key = "model.diffusion_model.double_blocks.0.conv.weight"
    other[key] = other[key][:, :16].copy()
    del other["model.diffusion_model.double_blocks.1.still.weight"]
    save_file(other, tmp_path / "other.safetensors")
    report = lycore.extract(tuned, tmp_path / "other.safetensors", tmp_path / "out.safetensors", rank=2)
    reasons = {s["weight"]: s["reason"] for s in report["skipped"]}
    assert "base's [64, 16, 3, 3]" in reasons[key] and len(reasons) == 2
    with pytest.raises(lycore.ArgumentError, match="do not differ"):
        lycore.extract(base, base, tmp_path / "none.safetensors", rank=2)
    assert not (tmp_path / "none.safetensors").exists()


def test_progress_cancel_and_errors(make, tmp_path):
    source, out = make("in.safetensors", 6), tmp_path / "out.safetensors"
    seen = []
    lycore.resize(source, out, rank=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(SHAPES)) for i in range(len(SHAPES) + 1)]
    out.unlink()
    for run in (
        lambda **k: lycore.resize(source, out, rank=2, **k),
        lambda **k: lycore.combine([(source, 0.5)], out, **k),
    ):
        with pytest.raises(lycore.Cancelled):
            run(progress=lambda done, _: done < 2)
        assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"], "neither output nor sibling"
    with pytest.raises(lycore.ArgumentError, match="`rank` is missing"):
        lycore.resize(source, out)
    with pytest.raises(lycore.ArgumentError, match="no meaning with method concat"):
        lycore.combine([source], out, rank=4)
    with pytest.raises(lycore.FileError):
        lycore.combine([tmp_path / "absent"], out)
    with pytest.raises(lycore.ArgumentError, match="nothing to combine"):
        lycore.combine([], out)


def test_dora_is_refused_by_name(make, tmp_path):
    source, out = make("in.safetensors", 4, shapes={"lora_unet_a": (8, 6)}), tmp_path / "out.safetensors"
    tensors = load_file(source) | {"lora_unet_a.dora_scale": numpy.ones((8, 1), "f4")}
    save_file(tensors, tmp_path / "dora.safetensors")
    with pytest.raises(lycore.UnsupportedError, match=r"lora_unet_a.*DoRA") as caught:
        lycore.combine([source, tmp_path / "dora.safetensors"], out)
    assert "extract" in caught.value.hint
    lycore.combine([tmp_path / "dora.safetensors"], out)
    assert out.read_bytes() == (tmp_path / "dora.safetensors").read_bytes()


def test_the_commands(make, checkpoints, tmp_path):
    a, b = make("a.safetensors", 6), make("b.safetensors", 6)
    tuned, base, _ = checkpoints
    out = tmp_path / "out.safetensors"
    done = run_cli("resize", a, "-o", out, "--rank", "3")
    assert done.returncode == 0 and "5 modules resized" in done.stdout, done.stderr
    done = run_cli("combine", f"{a}:0.8", f"{b}:-0.5", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert [s["weight"] for s in json.loads(done.stdout)["sources"]] == [0.8, -0.5]
    done = run_cli("extract", tuned, base, "-o", out, "--rank", "4", "--dtype", "fp16")
    assert done.returncode == 0 and "2 modules of 3 weights" in done.stdout, done.stderr
    done = run_cli("combine", a, "-o", out, "--rank", "4")
    assert done.returncode == 1 and "no meaning with method concat" in done.stderr
