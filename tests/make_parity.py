"""Writes ``tests/data/parity``: small release files, and what ``tests/reference_model.py`` computes from them.

    python -m tests.make_parity

The numbers are kept so that a clone without the original's recordings still compares with something that neither our
model nor a change of the reference can move.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import reference_model as reference
from tests.release_files import double, language_state, qformer_state, stage_state, vision_state, write_release
from tinygptv.convert.layouts import plain_key
from tinygptv.miniature.tiny import tiny_config, tiny_tokenizer
from tinygptv.model.tinygptv import TinyGPTVForConditionalGeneration

FOLDER = Path(__file__).parent / "data" / "parity"
HEADS, RANK, ALPHA, ROTARY, QUERIES, NEW = 4, 4, 16, 4, 4, 12
LARGE = 56

TALKS = {
    # name: question and answer of each turn, around the image where there is one ("<I>")
    "caption": [("<I>", "a dog on a sofa\n")],
    "question": [("###Human: <Img><I></Img> [vqa] what? ###Assistant: ", "red###")],
    "conversation": [
        ("[INST] <Img><I></Img> what?  [/INST]", "a dog###"),
        ("[INST] old?  [/INST]", "no, it is young###"),
    ],
    "text": [("[INST] say hi [/INST]", "hi###")],
}


def sequence(talk: list[tuple[str, str]], *, hide_inner_bos: bool) -> tuple[list[int], list[int], list[int]]:
    """Ids (-1 at image positions), labels and mask as the release lays a conversation out."""
    tokenizer = tiny_tokenizer()
    ids: list[int] = []
    labels: list[int] = []
    mask: list[int] = []

    def add(tokens: list[int], learn: bool = False, seen: bool = True) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learn else [-100] * len(tokens))
        mask.extend([int(seen)] * len(tokens))

    for turn, (question, answer) in enumerate(talk):
        add([tokenizer.bos_token_id], seen=turn == 0 or not hide_inner_bos)
        for i, piece in enumerate(question.split("<I>")):
            add([-1] * QUERIES if i else [])
            add(tokenizer.encode(piece, add_special_tokens=False) if piece else [])
        add(tokenizer.encode(answer, add_special_tokens=False), learn=True)
    return ids, labels, mask


def main() -> None:
    """Write the files from a fixed seed."""
    torch.manual_seed(20)
    model = TinyGPTVForConditionalGeneration(tiny_config(lora_rank=RANK, lora_alpha=ALPHA))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    plain = {plain_key(name): tensor.clone() for name, tensor in model.state_dict().items()}
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    write_release(FOLDER, plain, HEADS)

    vision, qformer = double(vision_state(plain)), double(qformer_state(plain))
    stage = {name: tensor.requires_grad_() for name, tensor in double(stage_state(plain, heads=HEADS)).items()}
    prefix = "llama_model.base_model.model."
    language = double(language_state(plain, "fused", HEADS)) | {
        name.removeprefix(prefix): tensor for name, tensor in stage.items() if name.startswith(prefix)
    }
    numbers: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(21)
    for side in (28, LARGE):
        pixels = torch.randn(3, side, side, generator=generator)
        own = (
            vision
            if side == 28
            else vision | {"pos_embed": reference.resample_positions(vision["pos_embed"], side // 14)}
        )
        features = reference.encode_image(own, qformer, pixels.double(), HEADS)
        numbers |= {
            f"pixels_{side}": pixels,
            f"query_features_{side}": features,
            f"image_embeds_{side}": reference.project(stage, features),
        }

    def logits_of(ids: list[int], mask: list[int]) -> Tensor:
        image = iter(numbers["image_embeds_28"])
        rows = [next(image) if token < 0 else language["model.embed_tokens.weight"][token] for token in ids]
        return reference.language(language, torch.stack(rows), torch.tensor(mask), HEADS, ROTARY, ALPHA / RANK)

    total, count = torch.zeros(()).double(), 0
    for name, talk in TALKS.items():
        ids, labels, mask = sequence(talk, hide_inner_bos=name == "conversation")
        logits = logits_of(ids, mask)
        loss, tokens = reference.token_loss(logits, torch.tensor(labels))
        total, count = total + loss, count + tokens
        numbers |= {f"{name}/ids": torch.tensor(ids), f"{name}/labels": torch.tensor(labels)}
        numbers |= {f"{name}/mask": torch.tensor(mask), f"{name}/logits": logits, f"{name}/loss": loss / tokens}
    (total / count).backward()
    numbers |= {f"gradient/{name}": tensor.grad for name, tensor in stage.items() if tensor.grad is not None}

    ids, _, _ = sequence([(TALKS["question"][0][0], "")], hide_inner_bos=False)
    for _ in range(NEW):
        ids.append(int(logits_of(ids, [1] * len(ids))[-1].argmax()))
    numbers["greedy"] = torch.tensor(ids[-NEW:])
    kept = {
        name: tensor.detach().float().contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in numbers.items()
    }
    save_file(kept, FOLDER / "numbers.safetensors")


if __name__ == "__main__":
    main()
