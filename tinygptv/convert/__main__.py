r"""``python -m tinygptv.convert``: release files -> checkpoint, and checkpoint -> other layouts.

    python -m tinygptv.convert release --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \
        --language phi-2/ --checkpoint TinyGPT-V_for_Stage4.pth --image-size 448 --template inst --output checkpoint/
    python -m tinygptv.convert to-release checkpoint/ --output TinyGPT-V_for_Stage4.pth
    python -m tinygptv.convert to-phi2 checkpoint/ --merge-lora --output phi-2-split/

Every mistake is found before gigabytes are written. An output replaces only what this command wrote before.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tinygptv.checkpoint.file_kinds import wrong_kind
from tinygptv.checkpoint.folders import check_output
from tinygptv.convert.match import match_release
from tinygptv.convert.sizes import language_settings
from tinygptv.convert.write import convert_release, write_release_stage, write_split_phi
from tinygptv.data.processing import load_tokenizer
from tinygptv.data.prompts import TEMPLATES

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ROLES = {
    "vision": "eva_vit_g.pth",
    "qformer": "BLIP-2's file: Q-Former, query tokens, ln_vision",
    "language": "Phi-2, a folder or file in any of its four layouts",
    "projection": "MiniGPT-4's projection, for a start at stage 1",
    "checkpoint": "a stage file of the release",
}


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m tinygptv.convert") -> int:
    """Entry point; a bad file or argument ends it with one sentence on stderr."""
    arguments = _parser(prog).parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        _COMMANDS[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    release = commands.add_parser("release", help="files in the original layouts -> checkpoint folder")
    for role, text in _ROLES.items():
        release.add_argument(f"--{role}", help=text)
    release.add_argument("--tokenizer", help="tokenizer folder [the language folder]")
    release.add_argument("--image-size", type=int, help="side of the input in pixels [that of the position embedding]")
    release.add_argument("--vision-heads", type=int, help="attention heads of the ViT [width / 88]")
    release.add_argument("--qformer-heads", type=int, help="attention heads of the Q-Former [width / 64]")
    release.add_argument("--lora-alpha", type=int, default=16, help="LoRA scale numerator [16]")
    release.add_argument("--dtype", choices=sorted(_DTYPES), help="of frozen matrices [the files', at most 16 bits]")
    templates = f"prompt template, one of {', '.join(TEMPLATES)}; stage 4 of the release: inst [human]"
    release.add_argument("--template", default="human", help=templates)
    release.add_argument("--output", required=True, type=Path, help="checkpoint folder, new or empty")
    to_release = commands.add_parser("to-release", help="checkpoint folder -> the release's stage .pth")
    to_release.add_argument("source", type=Path, help="checkpoint folder")
    to_release.add_argument("--output", required=True, type=Path, help="new .pth file")
    to_phi2 = commands.add_parser("to-phi2", help="checkpoint folder -> plain Phi-2, split layout")
    to_phi2.add_argument("source", type=Path, help="checkpoint folder")
    to_phi2.add_argument("--merge-lora", action="store_true", help="fold LoRA adapters into the weights")
    to_phi2.add_argument("--output", required=True, type=Path, help="folder, new or empty")
    return parser


def _release(arguments: argparse.Namespace) -> None:
    if arguments.template not in TEMPLATES:
        raise ValueError(f"--template {arguments.template} is unknown; there are: {', '.join(TEMPLATES)}.")
    given = {role: getattr(arguments, role) for role in _ROLES}
    check_output(arguments.output, [path for path in (*given.values(), arguments.tokenizer) if path])
    for path in (Path(given[role]) for role in _ROLES if given[role]):
        if path.is_file() and (kind := wrong_kind(path)):
            raise ValueError(f"{path} is {kind}.")
    if not (arguments.tokenizer or arguments.language):
        raise ValueError("give --tokenizer, the folder of Phi-2's tokenizer.")
    language_settings(arguments.language)  # a damaged config.json would be blamed on the tokenizer
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.language)
    release = match_release(
        **given,
        image_size=arguments.image_size,
        vision_heads=arguments.vision_heads,
        qformer_heads=arguments.qformer_heads,
        lora_alpha=arguments.lora_alpha,
    )
    print(release.report)
    convert_release(release, arguments.output, tokenizer, _DTYPES.get(arguments.dtype), arguments.template)


def _to_release(arguments: argparse.Namespace) -> None:
    write_release_stage(arguments.source, arguments.output)


def _to_phi2(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, [arguments.source])
    left_out = write_split_phi(arguments.source, arguments.output, merge_lora=arguments.merge_lora)
    print(f"left out {len(left_out)} tensors of added norms, which plain Phi-2 does not have")


_COMMANDS = {"release": _release, "to-release": _to_release, "to-phi2": _to_phi2}

if __name__ == "__main__":
    raise SystemExit(main())
