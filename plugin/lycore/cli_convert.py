"""`lycore convert`: an adapter in the spelling of another program."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "convert",
        help="write an adapter in the spelling of another program",
        description="Writes an adapter in another spelling. The output appears whole or not at all.",
    )
    parser.add_argument("file", metavar="FILE", help="an adapter: safetensors, .pt or .ckpt")
    parser.add_argument(
        "--to",
        required=True,
        choices=["kohya", "comfyui", "diffusers", "peft"],
        help="kohya: sd-scripts, A1111, Forge; diffusers: load_lora_weights; peft: PeftModel.from_pretrained",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="the file to write; for peft a folder too, and adapter_config.json goes beside it",
    )
    parser.add_argument("--family", metavar="NAME", help="the model's family, where the file does not tell")
    parser.add_argument(
        "--component",
        metavar="NAME",
        help="write only unet, transformer, text_encoder, text_encoder_2 or text_encoder_3",
    )
    parser.add_argument("--skip", action="store_true", help="leave out what the spelling cannot say, and list it")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """`lycore convert`."""
    from .conversion import convert

    report = convert(
        arguments.file,
        arguments.output,
        to=arguments.to,
        family=arguments.family,
        component=arguments.component,
        skip=arguments.skip,
    )
    print(json.dumps(report, ensure_ascii=False, indent=2) if arguments.json else text(report))
    return 0


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    count = report["summary"]
    family = report["family"]
    lines = [f"{report['output']}: {count['written']} modules in the spelling of {report['to']}"]
    if report["config"]:
        lines.append(f"{report['config']}: ranks and alphas")
    lines.append(f"family: {family['name']} ({family['reason']})" if family else "family: unknown; names kept")
    if count["split"] or count["fused"]:
        lines.append(f"{count['split']} modules split by rows, {count['fused']} put together from several")
    lines += [f"left out: {entry['module']}: {entry['reason']}" for entry in report["left_out"]]
    return "\n".join(lines)
