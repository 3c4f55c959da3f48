"""What a language layer keeps for its backward pass on a GPU, found without one: tensors without memory, or a graph.

FlashAttention runs on CUDA alone, but torch knows the shapes of what it saves; so tensors are fake and nothing is
computed.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tinygptv.config import TinyGPTVConfig
from tinygptv.model.language_model import LanguageModel
from tinygptv.model.lora import add_lora
from tinygptv.model.tinygptv import FLOAT32_NAMES
from tinygptv.training.step_memory import layer_activation_bytes

TOKENS = 256


def language_model(depth: int, rank: int, dropout: float) -> LanguageModel:
    """Phi-2's layers with what stage 2 trains; in fake mode they take no memory."""
    config = TinyGPTVConfig.phi2().text_config
    config.num_hidden_layers, config.vocab_size, config.resid_pdrop = depth, 8, dropout
    with unset_fake_temporarily(), torch.device("meta"):
        model = LanguageModel(config).train()
        if rank:
            add_lora(model, rank, 16, dropout)
    for name, parameter in list(model.named_parameters()):
        wide = FLOAT32_NAMES.match(f"language_model.{name}")
        fake = torch.empty(parameter.shape, dtype=torch.float32 if wide else torch.bfloat16)
        trains = "lora_" in name or name.endswith("norm.weight")
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(fake, requires_grad=trains))
    model.rotary_emb.inv_freq = torch.empty(model.rotary_emb.inv_freq.shape)
    return model


@contextmanager
def as_on_a_gpu():
    """The flat path's kernel is taken, in 16 bits."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("tinygptv.model.varlen_attention.has_kernel", lambda query: True),
        torch.autocast("cpu", torch.bfloat16),
    ):
        yield


def flat_inputs(width: int) -> dict:
    return {
        "inputs_embeds": torch.randn(1, TOKENS, width, dtype=torch.bfloat16).requires_grad_(),
        "position_ids": torch.zeros(1, TOKENS, dtype=torch.long),
        "cu_seq_lens_q": torch.zeros(17, dtype=torch.int32),
        "max_length_q": 64,
        "use_cache": False,
    }


def counted(rank: int, dropout: float, *, compiled: bool, fused: bool = False) -> float:
    """Bytes per token that the memory plan counts for one of Phi-2's layers."""
    text = TinyGPTVConfig.phi2().text_config
    text.resid_pdrop = dropout
    return layer_activation_bytes(text, rank, dropout, half=True, compiled=compiled, fused=fused)


def adapter_copies(rank: int) -> float:
    """16-bit copies of the adapters' matrices, which the plan counts apart, per token of the test."""
    return 2 * rank * 6 * TinyGPTVConfig.phi2().text_config.hidden_size / TOKENS


def kept_by_autograd(depth: int, rank: int, dropout: float = 0.0, *, fused: bool = False) -> int:
    """Bytes that autograd keeps for a flat sequence, weights not counted.

    Dropout's masks have another size on CUDA; fused layers have none.
    """
    with as_on_a_gpu():
        model = language_model(depth, rank, dropout)
        kept = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        alive = []

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept.setdefault(storage._cdata, storage.nbytes())
            alive.append(storage)  # keeps the address taken
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**flat_inputs(model.config.hidden_size), fused=fused)
    return sum(kept.values())


def kept_by_the_compiler(rank: int, dropout: float) -> int:
    """Bytes that a compiled layer keeps beside its input: what the forward graph hands to the backward graph."""
    from torch._inductor.compile_fx import compile_fx

    graphs = []

    def inner(graph, example_inputs, **options):
        graphs.append(graph)
        raise InterruptedError  # seen enough

    with as_on_a_gpu():
        model = language_model(1, rank, dropout)
        layer = model.layers[0]
        layer.compile(
            dynamic=True, fullgraph=True, backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=inner)
        )
        try:
            model(**flat_inputs(model.config.hidden_size))
        except Exception:
            assert graphs, "the layer was not compiled"
        torch._dynamo.reset()
    outputs = next(node for node in graphs[0].graph.nodes if node.op == "output").args[0]
    kept = {}
    for node in outputs:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) and node.op != "placeholder" else None
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            kept[storage._cdata] = _size(value)
    return sum(kept.values())


def _size(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return int(storage.nbytes())
