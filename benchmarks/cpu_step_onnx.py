"""A decoding step of the language model as one ONNX graph in one session of ONNX Runtime.

Products are ``MatMulNBits`` or ``DynamicQuantizeMatMul``, attention is ``GroupQueryAttention`` over a cache that is
bound as input and as output, so that it is extended where it lies.

Notation: S tokens of a step, D width, K vocabulary; O outputs, I inputs of a matrix.
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


class _OnnxGraph:
    """Nodes whose outputs are named as they come, and constants that are given to the session where they lie."""

    def __init__(self, bits: int, block: int, accuracy_level: int) -> None:
        self.bits, self.block, self.accuracy_level = bits, block, accuracy_level
        self.nodes: list[Any] = []
        self.small: list[Any] = []
        self.large: dict[str, np.ndarray] = {}

    def add(self, kind: str, *inputs: str | np.ndarray, outputs: list[str] | None = None, **attributes: Any) -> Any:
        """Append a node; returns its output's name, or the names given."""
        from onnx import helper

        names = outputs or [f"{kind}{len(self.nodes)}"]
        inputs = tuple(x if isinstance(x, str) else self.constant(x) for x in inputs)
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names if outputs else names[0]

    def constant(self, array: np.ndarray) -> str:
        """Add numbers; returns their name."""
        from onnx import TensorProto, helper, numpy_helper

        name = f"constant{len(self.small) + 1}"
        if array.nbytes < 2**16:
            self.small.append(numpy_helper.from_array(array, name))
            return name
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="in memory")
        self.small.append(tensor)
        self.large[name] = np.ascontiguousarray(array)
        return name

    def product(self, x: str, matrix: nn.Linear, bits: int | None = None) -> str:
        """``matrix`` of x [1, S, I]; a block of 0 rounds inputs and rows whole (dynamic int8)."""
        bits, outputs, inputs = bits or self.bits, matrix.out_features, matrix.in_features
        bias = vector(matrix.bias, outputs)
        numbers, scales = round_blocks(matrix, bits, self.block or inputs)
        if not self.block:
            inner = (np.ascontiguousarray(numbers.T), scales[:, 0], "", bias)
            return self.add("DynamicQuantizeMatMul", x, *inner, domain="com.microsoft")
        stored = pairs(numbers) ^ 0x88 if bits == 4 else numbers.view(np.uint8) ^ 0x80  # from 8 or 128 on
        stored = stored.reshape(outputs, inputs // self.block, -1)
        sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": self.block}
        inner = (stored, scales.ravel(), "", "", bias)
        return self.add("MatMulNBits", x, *inner, domain="com.microsoft", accuracy_level=self.accuracy_level, **sizes)

    def norm(self, x: str, module: nn.Module) -> str:
        """LayerNorm of the last axis."""
        return self.add("LayerNormalization", x, vector(module.weight), vector(module.bias), epsilon=module.eps)

    def layer(self, hidden: str, layer: PhiDecoderLayer, index: int, text: TextModel) -> str:
        """``PhiDecoderLayer`` with its cache as input and output."""
        attention, rms = layer.self_attn, layer.attention_rmsnorm
        x = self.norm(hidden, layer.input_layernorm)
        q, k, v = (f"{name}_{index}" for name in "qkv")
        self.add("Split", self.product(x, attention.qkv_proj), outputs=[q, k, v], axis=-1, num_outputs=3)
        heads = np.array([0, 0, text.heads, text.head_dim])
        q, k = (
            self.add("Reshape", self.norm(self.add("Reshape", part, heads), module), np.array([0, 0, text.width]))
            for part, module in ((q, attention.q_layernorm), (k, attention.k_layernorm))
        )
        inputs = (q, k, v, f"past_key_{index}", f"past_value_{index}", "last", "total", text.cos, text.sin)
        outputs = [f"attended_{index}", f"key_{index}", f"value_{index}"]
        sizes = {"num_heads": text.heads, "kv_num_heads": text.heads, "scale": text.scale}
        self.add("GroupQueryAttention", *inputs, outputs=outputs, domain="com.microsoft", do_rotary=1, **sizes)
        attended = self.product(outputs[0], attention.dense)
        attended = self.add("SimplifiedLayerNormalization", attended, vector(rms.weight), epsilon=rms.eps, axis=-1)
        inner = self.add("Gelu", self.product(x, layer.mlp.fc1), approximate="tanh")
        return self.add("Add", self.add("Add", attended, self.product(inner, layer.mlp.fc2)), hidden)


class OnnxStep:
    """One session for the whole step."""

    def __init__(
        self, model: TinyGPTVForConditionalGeneration, bits: int, block: int, length: int = CONTEXT, accuracy: int = 4
    ) -> None:
        """Write the graph and load it.

        Args:
            model: its matrices may be on the meta device.
            bits: of the layers' weights; the head has 8.
            block: weights that share a scale; 0 for ``DynamicQuantizeMatMul``.
            length: positions of the cache.
            accuracy: MatMulNBits' ``accuracy_level``: 4 rounds inputs to 8 bits, 0 does not.
        """
        import onnxruntime
        from onnx import TensorProto, helper

        self.text = text = TextModel(model, length)
        graph, layers = _OnnxGraph(bits, block, accuracy), model.language_model.layers
        hidden = graph.add("Cast", graph.add("Gather", text.embedding, "ids"), to=TensorProto.FLOAT)
        for index, layer in enumerate(layers):
            hidden = graph.layer(hidden, layer, index, text)
        final = graph.norm(graph.add("Gather", hidden, np.array([-1]), axis=1), model.language_model.final_layernorm)
        graph.add("Identity", graph.product(final, model.lm_head, 8), outputs=["logits"])
        shape = (1, text.heads, length, text.head_dim)
        self.cache = {
            f"{kind}_{i}": np.zeros(shape, np.float32) for kind in ("key", "value") for i in range(len(layers))
        }
        info = helper.make_tensor_value_info
        inputs = [info("ids", TensorProto.INT64, [1, "S"])]
        inputs += [info(name, TensorProto.INT32, [1]) for name in ("last", "total")]
        inputs += [info(f"past_{name}", TensorProto.FLOAT, shape) for name in self.cache]
        outputs = [info("logits", TensorProto.FLOAT, [1, 1, text.vocabulary])]
        outputs += [info(name, TensorProto.FLOAT, shape) for name in self.cache]
        sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_graph(graph.nodes, "step", inputs, outputs, graph.small)
        data = helper.make_model(proto, opset_imports=sets, ir_version=10).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in graph.large.values()]
        options.add_external_initializers(list(graph.large), values)
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.bindings: dict[int, tuple[Any, dict[str, np.ndarray]]] = {}

    def _binding(self, tokens: int) -> tuple[Any, dict[str, np.ndarray]]:
        """Inputs and outputs of steps of so many tokens, bound once."""
        if tokens not in self.bindings:
            values = {name: np.zeros(1, np.int32) for name in ("last", "total")}
            values |= {
                "ids": np.zeros((1, tokens), np.int64),
                "logits": np.zeros((1, 1, self.text.vocabulary), np.float32),
            }
            binding = self.session.io_binding()
            past = {f"past_{name}": array for name, array in self.cache.items()}
            for name, array in (values | past | self.cache).items():
                bind = binding.bind_output if name == "logits" or name in self.cache else binding.bind_input
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self.bindings[tokens] = binding, values
        return self.bindings[tokens]

    def __call__(self, ids: list[int], past: int) -> np.ndarray:
        """Logits [K] after the last of the tokens, which follow ``past`` positions."""
        binding, values = self._binding(len(ids))
        values["ids"][:] = ids
        values["last"][:], values["total"][:] = past + len(ids) - 1, past + len(ids)
        self.session.run_with_iobinding(binding)
        return values["logits"][0, 0]

    def rewind(self, past: int) -> None:
        """The position is an input."""
