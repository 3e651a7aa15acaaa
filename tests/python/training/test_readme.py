"""The README's training script runs as it stands there, on a tiny model of diffusers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch

import lycore

ROOT = Path(__file__).resolve().parents[3]
VALUES = {"MODEL, PICTURES, OUTPUT": ("model", "pictures", "mine.safetensors"), "STEPS, SIZE": (101, 16)}


def script() -> str:
    """The README's block of Python that has a pipeline, with other values in the lines at its top."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (text,) = (block for block in blocks if "StableDiffusionPipeline" in block)
    assert text.count("\n") < 40
    for names, values in VALUES.items():
        text, count = re.subn(f"^{names} = .*$", f"{names} = {values!r}", text, flags=re.MULTILINE)
        assert count == 1, f"the script has no line that sets {names}"
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the script finds: a model and two pictures with captions."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    torch.manual_seed(0)
    letters = [chr(code) + end for code in range(33, 127) for end in ("", "</w>")]
    words = {word: number for number, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    size = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = transformers.CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, **size, **ends)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        sample_size=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=16),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for name in ("cat", "dog"):
        pixels = numpy.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=numpy.uint8)
        image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(f"a {name}")
    monkeypatch.chdir(tmp_path)
    # So that the test does the same with a GPU and without.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_the_readmes_script_trains_a_file_that_diffusers_reads(folder, capsys):
    made: dict[str, object] = {"__name__": "__main__"}
    exec(compile(script(), "README.md", "exec"), made)
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in lines if line] == ["0", "100"]
    report = lycore.open("mine.safetensors").report()
    assert report["summary"]["modules"] == len(made["network"].names) > 20
    made["network"].close()
    pipeline = made["pipeline"]
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 16, 48))
    with torch.no_grad():
        before = pipeline.unet(*inputs).sample
        with lycore.Stack(pipeline.unet) as stack:
            stack.add("mine.safetensors")
            assert stack.apply().changed == len(made["network"].names)
            merged = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights("mine.safetensors")
        loaded = pipeline.unet(*inputs).sample
    assert (merged - before).abs().max() > 1e-4
    assert torch.allclose(loaded, merged, rtol=1e-4, atol=1e-5)
