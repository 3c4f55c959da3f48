"""Steps that other libraries compute, compared with torch's layers at a small size; run it before timing them.

    python benchmarks/cpu_step_check.py        exits with 1 where a step's logits are further away than its rounding

onnx, onnxruntime and openvino are no dependencies of the project: what is missing is reported and left out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from cpu_step import build_model
from cpu_step_onnx import OnnxStep
from cpu_step_openvino import OpenvinoStep
from cpu_step_weights import round_blocks
from torch import nn

from tinygptv import TinyGPTVForConditionalGeneration

SIZES = {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 320, "vocab_size": 400}
PROMPT, ANSWER = [5, 17, 99, 3, 250], [7, 300, 12]
LENGTH = 64


class LogitsStep(Protocol):
    """A step of the language model from ids to the logits of the last one."""

    def __call__(self, ids: list[int], past: int, /) -> np.ndarray: ...
    def rewind(self, past: int, /) -> None: ...


@dataclass(frozen=True)
class Check:
    """A way to compute the step.

    Attributes:
        bits: of the layers' weights; the head has 8.
        block: inputs that share a scale; 0: a whole row.
        bound: largest difference allowed, as a share of the largest logit: what rounding of the inputs makes.
        build: from a small model.
    """

    bits: int
    block: int
    bound: float
    build: Callable[[TinyGPTVForConditionalGeneration], LogitsStep]


def _onnx(bits: int, block: int, accuracy: int, bound: float) -> Check:
    return Check(bits, block, bound, lambda model: OnnxStep(model, bits, block, LENGTH, accuracy))


def _openvino(bits: int, block: int, group: int, bound: float) -> Check:
    options = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    return Check(bits, block, bound, lambda model: OpenvinoStep(model, bits, block, LENGTH, **options))


CHECKS = {
    "ONNX Runtime, 8 bits, blocks of 32, inputs as they are": _onnx(8, 32, 0, 1e-5),
    "ONNX Runtime, 4 bits, blocks of 32, inputs as they are": _onnx(4, 32, 0, 1e-5),
    "ONNX Runtime, 8 bits, blocks of 32": _onnx(8, 32, 4, 2e-2),
    "ONNX Runtime, dynamic int8": _onnx(8, 0, 4, 3e-2),
    "OpenVINO, 8 bits, inputs as they are": _openvino(8, 0, 0, 1e-3),
    "OpenVINO, 4 bits, blocks of 32, inputs as they are": _openvino(4, 32, 0, 1e-3),
    "OpenVINO, 4 bits, groups of 32": _openvino(4, 32, 32, 2e-2),
}
"""What is compared, by name."""


def small_model() -> TinyGPTVForConditionalGeneration:
    """Two layers whose norms, biases and matrices are all different."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build_model(2, **SIZES)
    for matrix, _ in _matrices(model):
        weight = torch.randn(matrix.weight.shape, generator=generator) * matrix.in_features**-0.5
        matrix.weight = nn.Parameter(weight, requires_grad=False)
        matrix.bias = nn.Parameter(0.1 * torch.randn(matrix.out_features, generator=generator), requires_grad=False)
    for name, parameter in model.language_model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def difference(check: Check, model: TinyGPTVForConditionalGeneration) -> float:
    """Largest difference of a step's logits from torch's, as a share of the largest logit."""
    expected, found = torch_logits(model, check.bits, check.block), _step_logits(check.build(model))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def torch_logits(model: TinyGPTVForConditionalGeneration, bits: int, block: int) -> np.ndarray:
    """What torch's layers compute with the rounded weights, for the last token of the prompt and each one after it."""
    model = copy.deepcopy(model)
    model.language_model.embed_tokens.float()
    for matrix, is_head in _matrices(model):
        numbers, scales = round_blocks(matrix, 8 if is_head else bits, block or matrix.in_features)
        weight = numbers.reshape(*scales.shape, -1) * scales[..., None]
        matrix.weight.data = torch.from_numpy(weight.reshape(numbers.shape))
    with torch.inference_mode():
        states = model.language_model(torch.tensor([PROMPT + ANSWER])).last_hidden_state[0, len(PROMPT) - 1 :]
        logits: np.ndarray = model.compute_logits(states).numpy()
    return logits


def _matrices(model: TinyGPTVForConditionalGeneration) -> Iterator[tuple[nn.Linear, bool]]:
    """Every matrix that a step multiplies with, and whether it is the head."""
    for layer in model.language_model.layers:
        yield from ((module, False) for module in layer.modules() if type(module) is nn.Linear)
    yield model.lm_head, True


def _step_logits(step: LogitsStep) -> np.ndarray:
    """The same by a step that reads the prompt at once and then token after token."""
    step.rewind(0)
    found = [step(PROMPT, 0).copy()]
    found += [step([token], len(PROMPT) + i).copy() for i, token in enumerate(ANSWER)]
    return np.array(found)


def main(names: Sequence[str] = tuple(CHECKS)) -> int:
    """Print a line for each; 1 where one is too far away."""
    model, num_failed = small_model(), 0
    print("| way | difference from torch | allowed | |\n|---|---|---|---|")
    for name in names:
        check = CHECKS[name]
        try:
            found = difference(check, model)
        except ImportError as error:
            print(f"| {name} | not run: {error} | | |")
            continue
        is_near = found < check.bound
        num_failed += not is_near
        print(f"| {name} | {found:.1e} | {check.bound:.0e} | {'as torch' if is_near else 'WRONG'} |")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
