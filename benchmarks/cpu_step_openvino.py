"""A decoding step of the language model as one stateful model of OpenVINO, whose variables are the cache.

Notation: S tokens of a step, N heads, H head width, K vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cpu_step import CONTEXT
from cpu_step_weights import TextModel, pairs, round_blocks, vector
from torch import nn

from tinygptv import TinyGPTVForConditionalGeneration
from tinygptv.model.language_model import PhiDecoderLayer


class OpenvinoStep:
    """One stateful model for the whole step: its variables are the cache."""

    def __init__(
        self, model: TinyGPTVForConditionalGeneration, bits: int, block: int, length: int = CONTEXT, **properties: Any
    ) -> None:
        """Build the model and compile it.

        Args:
            model: its matrices may be on the meta device.
            bits: of the layers' weights; the head has 8.
            block: weights that share a scale; 0 for whole rows.
            length: positions that the rotary tables have.
            properties: of the CPU plugin.
        """
        import openvino
        from openvino import opset13

        self.openvino, self.op, self.bits, self.block = openvino, opset13, bits, block
        self.text, self.arrays, self.sinks = TextModel(model, length), [], []
        op, kinds = opset13, openvino.Type
        ids, first = op.parameter([1, -1], kinds.i64, name="ids"), op.parameter([1], kinds.i64, name="first")
        self.beams = op.parameter([-1], kinds.i32, name="beams")
        count = op.gather(op.shape_of(ids), op.constant(1), op.constant(0))
        one = op.constant(1)
        start = op.squeeze(first, op.constant([0]))
        positions = op.range(start, op.add(start, count), one, "i64")
        self.cos, self.sin = (
            op.gather(op.constant(table), positions, op.constant(0)) for table in (self.text.cos, self.text.sin)
        )
        table = op.convert(op.constant(self.text.embedding), kinds.f32)
        hidden = op.gather(table, ids, op.constant(0))
        # What a query attends to: column j of row i is hidden where j > first + i.
        columns = op.unsqueeze(op.range(op.constant(0), op.add(start, count), one, "i64"), op.constant(0))
        hides = op.greater(columns, op.unsqueeze(positions, op.constant(1)))
        mask = op.select(hides, op.constant(np.float32(-1e30)), op.constant(np.float32(0)))
        self.mask = op.unsqueeze(mask, op.constant([0, 1]))
        for index, layer in enumerate(model.language_model.layers):
            hidden = self._layer(hidden, layer, index)
        last = op.gather(hidden, op.constant([-1]), op.constant(1))
        logits = self._product(self._norm(last, model.language_model.final_layernorm), model.lm_head, 8)
        built = openvino.Model([op.result(logits)], self.sinks, [ids, first, self.beams], "step")
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        self.request = openvino.Core().compile_model(built, "CPU", options | properties).create_infer_request()
        self.past = 0

    def _product(self, x: Any, matrix: nn.Linear, bits: int | None = None) -> Any:
        """Weights as the plugin expects compressed ones: constant, conversion, multiplication."""
        op, kinds, bits = self.op, self.openvino.Type, bits or self.bits
        outputs, inputs = matrix.out_features, matrix.in_features
        block = self.block if bits == 4 or self.block else inputs
        numbers, scales = round_blocks(matrix, bits, block or inputs)
        shape = [outputs, inputs // block, block] if block != inputs else [outputs, inputs]
        data = np.ascontiguousarray(pairs(numbers) if bits == 4 else numbers)
        self.arrays.append(data)  # the model reads it where it lies
        kind = kinds.i4 if bits == 4 else kinds.i8
        weights = op.convert(op.constant(self.openvino.Tensor(data, self.openvino.Shape(shape), kind)), kinds.f16)
        weights = op.multiply(weights, op.constant(scales.reshape(*shape[:-1], 1).astype(np.float16)))
        if len(shape) == 3:
            weights = op.reshape(weights, op.constant([outputs, inputs]), False)
        product = op.matmul(x, op.convert(weights, kinds.f32), False, True)
        return op.add(product, op.constant(vector(matrix.bias, outputs)[None, None]))

    def _norm(self, x: Any, module: nn.Module) -> Any:
        op = self.op
        centred = op.mvn(x, op.constant([-1]), True, module.eps, "inside_sqrt")
        return op.add(op.multiply(centred, op.constant(vector(module.weight))), op.constant(vector(module.bias)))

    def _rotate(self, x: Any) -> Any:
        """Rotary embedding of [1, S, N, H]."""
        op, half = self.op, self.text.rotary // 2
        rest = self.text.head_dim - 2 * half
        low, high, kept = op.variadic_split(x, op.constant(3), op.constant([half, half, rest])).outputs()
        cos, sin = (op.unsqueeze(table, op.constant([0, 2])) for table in (self.cos, self.sin))
        first = op.subtract(op.multiply(low, cos), op.multiply(high, sin))
        second = op.add(op.multiply(high, cos), op.multiply(low, sin))
        return op.concat([first, second, kept], -1)

    def _extended(self, new: Any, name: str) -> Any:
        """Variable [1, N, past, H] with what is new [1, N, S, H] after it."""
        op, text = self.op, self.text
        empty = op.constant(np.zeros((1, text.heads, 0, text.head_dim), np.float32))
        shape = self.openvino.PartialShape([-1, text.heads, -1, text.head_dim])
        past = op.gather(op.read_value(empty, name, self.openvino.Type.f32, shape), self.beams, op.constant(0))
        whole = op.concat([past, new], 2)
        self.sinks.append(op.assign(whole, name))
        return whole

    def _layer(self, hidden: Any, layer: PhiDecoderLayer, index: int) -> Any:
        op, text, attention = self.op, self.text, layer.self_attn
        x = self._norm(hidden, layer.input_layernorm)
        qkv = op.reshape(self._product(x, attention.qkv_proj), op.constant([0, 0, 3, text.heads, text.head_dim]), True)
        q, k, v = (op.squeeze(part, op.constant([2])) for part in op.split(qkv, op.constant(2), 3).outputs())
        q, k = self._rotate(self._norm(q, attention.q_layernorm)), self._rotate(self._norm(k, attention.k_layernorm))
        q, k, v = (op.transpose(part, op.constant([0, 2, 1, 3])) for part in (q, k, v))
        keys, values = self._extended(k, f"key_{index}"), self._extended(v, f"value_{index}")
        scale = op.constant(np.float32(text.scale))
        attended = op.scaled_dot_product_attention(q, keys, values, self.mask, scale)
        attended = op.reshape(op.transpose(attended, op.constant([0, 2, 1, 3])), op.constant([0, 0, -1]), True)
        attended = self._rms(self._product(attended, attention.dense), layer.attention_rmsnorm)
        inner = op.gelu(self._product(x, layer.mlp.fc1), "tanh")
        return op.add(op.add(attended, self._product(inner, layer.mlp.fc2)), hidden)

    def _rms(self, x: Any, module: nn.Module) -> Any:
        op = self.op
        square = op.reduce_mean(op.power(x, op.constant(np.float32(2))), op.constant([-1]), True)
        root = op.sqrt(op.add(square, op.constant(np.float32(module.eps))))
        divided = op.multiply(x, op.divide(op.constant(np.float32(1)), root))
        return op.multiply(divided, op.constant(vector(module.weight)))

    def __call__(self, ids: list[int], past: int) -> np.ndarray:
        """Logits [K] after the last of the tokens, which follow ``past`` positions; the variables hold those."""
        if past != self.past:  # a mask of another size makes nonsense, not an error
            raise ValueError(f"the variables hold {self.past} positions, not {past}: call rewind({past}) first.")
        self.request.infer({"ids": np.array([ids]), "first": np.array([past]), "beams": np.zeros(1, np.int32)})
        self.past += len(ids)
        return self.request.get_output_tensor(0).data[0, 0]

    def rewind(self, past: int) -> None:
        """Make the variables hold so many positions of zeros."""
        self.past = past
        zeros = np.zeros((1, self.text.heads, past, self.text.head_dim), np.float32)
        for state in self.request.query_state():
            state.reset() if past == 0 else setattr(state, "state", self.openvino.Tensor(zeros))
