"""Which module computes an operation, what a kernel without memory says, and what training's kernels are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinygptv import kernels
from tinygptv.kernels import (
    host_encoder,
    host_library,
    host_linear,
    lowbit_ops,
    reference,
    step_ops,
    training_functions,
    training_reference,
)


def test_triton_is_for_gpus_that_have_it(monkeypatch):
    pytest.importorskip("triton")
    choose = step_ops.__wrapped__
    assert choose("cuda").__name__ == "tinygptv.kernels.fused"
    assert choose("cpu") is choose("mps") is reference
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert choose("cuda") is reference


def test_tiles_are_for_cards_whose_tensor_cores_triton_uses(monkeypatch):
    pytest.importorskip("triton")
    capabilities = [(7, 5), (8, 0), (12, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    choose = lowbit_ops.__wrapped__
    chosen = [choose(torch.device("cuda", index)).__name__ for index in range(3)]
    assert chosen == [f"tinygptv.kernels.{name}" for name in ("lowbit_rows", "lowbit", "lowbit")]
    assert choose(torch.device("cpu")) is choose(torch.device("mps")) is reference
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert choose(torch.device("cuda", 0)) is reference


class Failing:
    """A library whose functions find no memory; it notes what they are called with."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        return lambda *given: self.asked.append((name, given)) or 1


def test_a_kernel_without_memory_is_one_sentence(monkeypatch):
    library, rows = Failing(), torch.ones(3, 32)
    monkeypatch.setattr(host_linear, "loaded_library", lambda: library)
    monkeypatch.setattr(host_encoder, "loaded_library", lambda: library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    int8 = host_linear.HostInt8(torch.ones(16, 32, dtype=torch.int8), torch.ones(16), None)
    int4 = host_linear.HostInt4(torch.ones(16, 32, dtype=torch.uint8), torch.ones(2, 16, 2).bfloat16(), None)
    for failing, said in (
        (lambda: int8(rows), r"no memory to round 3 rows of 32 inputs\."),
        (lambda: int4(rows), r"no memory to round 3 rows of 32 inputs\."),
        (lambda: host_encoder.round_rows(rows), r"no memory for rows of 32 numbers\."),
        (lambda: host_encoder.attend(torch.ones(7, 3 * 32), 4), r"no memory for the attention of 7 rows\."),
    ):
        with pytest.raises(MemoryError, match=f"^{said}$"):
            failing()
    (_, of_int8), (_, of_int4), (_, of_rows), (_, of_attention) = library.asked
    assert of_int8[-2:] == of_int4[-2:] == (3, 5), "rows and threads"
    assert of_rows[1:5] == (None, None, 0.0, False) and of_rows[7:] == (3, 32, 5) and of_attention[2:] == (7, 4, 8, 5)
    norm = nn.LayerNorm(32, eps=0.25)
    with pytest.raises(MemoryError):
        host_encoder.round_rows(rows, norm, gelu=True)
    assert library.asked[-1][1][1:5] == (norm.weight.data_ptr(), norm.bias.data_ptr(), 0.25, True)


def test_the_library_is_there_where_somebody_asked(monkeypatch):
    monkeypatch.setattr(host_library, "host_library", lambda: None)
    with pytest.raises(AssertionError, match="nobody asked"):
        host_library.loaded_library()
    assert host_library.address(None) is None and host_library.address(torch.ones(0)) == torch.ones(0).data_ptr()


def test_kernels_of_the_backward_pass_get_contiguous_gradients(monkeypatch):
    """A gradient of a sum is one number that is shown everywhere: a kernel reads memory."""
    asked = []

    def spied(name):
        function = getattr(training_reference, name)

        def spy(*given):
            tensors = [
                x for part in given for x in (part if isinstance(part, tuple) else (part,)) if torch.is_tensor(x)
            ]
            asked.append((name, all(x.is_contiguous() for x in tensors)))
            return function(*given)

        return spy

    for name in ("norm_and_drop", "add_branches", "drop", "rotate_heads"):
        monkeypatch.setattr(training_reference, f"{name}_backward", spied(f"{name}_backward"))
    hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((1, 5, 12), (12,), (12,)))
    seeds = training_functions.draw_seeds(1, torch.device("cpu"))[0]
    results = [
        *training_functions.NormAndDrop.apply(hidden, weight, bias, seeds, 1e-5, 0.3, torch.float32),
        training_functions.AddBranches.apply(hidden, hidden, weight, hidden, seeds, 1e-5, 0.3),
        *training_functions.DropForAdapter.apply(hidden, seeds, 0.3),
    ]
    qkv, norm = torch.randn(1, 5, 3 * 2 * 6).requires_grad_(), torch.randn(6).requires_grad_()
    angles = torch.rand(1, 5, 4)
    results += training_functions.RotateHeads.apply(qkv, norm, norm, norm, norm, angles, angles, 1e-5, 2)
    sum(result.sum() for result in results).backward()
    names = sorted(name for name, _ in asked)
    assert names == ["add_branches_backward", "drop_backward", "norm_and_drop_backward", "rotate_heads_backward"]
    assert all(contiguous for _, contiguous in asked), asked


def test_each_layer_has_seeds_of_its_own_from_torchs_generator():
    torch.manual_seed(0)
    seeds = training_functions.draw_seeds(3, torch.device("cpu"))
    assert len(seeds) == 3 and {seed.shape for seed in seeds} == {(4,)} and seeds[0].dtype == torch.int64
    assert len({int(number) for seed in seeds for number in seed}) == 12
    torch.manual_seed(0)
    again = training_functions.draw_seeds(3, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(seeds, again, strict=True))
    assert any(int(number) < 0 for seed in seeds for number in seed), "all 64 bits"
