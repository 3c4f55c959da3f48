"""Steps that other libraries compute: how they are compared with torch's layers, and timed."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from tests.paths import ROOT


@pytest.fixture
def load(monkeypatch):
    """Imports a file of ``benchmarks``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


class TorchStep:
    """Logits of torch's layers with rounded weights, off by some share where it is asked for."""

    def __init__(self, logits, prompt, off=0.0):
        self.logits, self.prompt, self.off, self.reset = logits, prompt, off, None

    def rewind(self, past):
        self.reset = past

    def __call__(self, ids, past):
        assert self.reset == 0 and (len(ids) == 1 or ids == self.prompt)
        row = past + len(ids) - len(self.prompt)
        return self.logits[row] + (self.off * np.abs(self.logits).max() if row == 2 else 0)


def test_a_step_that_differs_from_the_torch_layers_is_told(load, monkeypatch, capsys):
    check = load("cpu_step_check")

    def missing(model):
        raise ImportError("No module named 'onnx'")

    def step(off):
        return lambda model: TorchStep(check.torch_logits(model, 4, 32), check.PROMPT, off)

    found = {"near": (1e-3, step(5e-4)), "far": (1e-3, step(2e-3)), "absent": (1e-3, missing)}
    table = {name: check.Check(4, 32, bound, build) for name, (bound, build) in found.items()}
    monkeypatch.setattr(check, "CHECKS", table)
    assert check.main(["near", "absent"]) == 0
    out = capsys.readouterr().out
    assert "| near | 5.0e-04 | 1e-03 | as torch |" in out and "| absent | not run: No module named 'onnx' | | |" in out
    assert check.main(["far", "near"]) == 1
    assert "| far | 2.0e-03 | 1e-03 | WRONG |" in capsys.readouterr().out


def test_rounded_weights_change_the_logits_by_their_bits(load):
    check = load("cpu_step_check")
    model = check.small_model()
    fine, coarse, blocks = (check.torch_logits(model, *form) for form in ((8, 0), (4, 0), (4, 32)))
    assert fine.shape == (1 + len(check.ANSWER), check.SIZES["vocab_size"])
    assert np.abs(blocks - fine).mean() < 0.9 * np.abs(coarse - fine).mean()


def test_a_reduction_is_the_product(load):
    matrix = load("cpu_step_check").small_model().language_model.layers[0].mlp.fc1
    numbers, scale = (torch.from_numpy(x) for x in load("cpu_step_weights").round_blocks(matrix, 8, 160))
    rows = torch.randn(3, 160)
    expected = rows @ (numbers * scale).T + matrix.bias
    found = load("cpu_step_candidates").ReducedInt8(numbers, scale[:, 0], matrix.bias)(rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_library_is_named_and_the_next_candidate_is_timed(load, monkeypatch, capsys):
    candidates = load("cpu_step_candidates")

    def missing(layers, sizes):
        raise ImportError("No module named 'onnx'")

    class Counts:
        def __init__(self):
            self.calls = []

        def rewind(self, past):
            self.calls.append(past)

        def __call__(self, ids, past):
            self.calls.append((len(ids), past))

    step, host = Counts(), Counts()
    table = {"first": candidates.Candidate(8, 8, missing), "second": candidates.Candidate(8, 8, lambda *_: step, False)}
    monkeypatch.setattr(candidates, "HOST", {8: candidates.Candidate(8, 8, lambda *_: host)})
    monkeypatch.setattr(candidates, "CANDIDATES", table)
    monkeypatch.setattr(candidates, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr("sys.argv", ["cpu_step_candidates.py", "--size", "tiny", "--turns", "1"])
    candidates.main()
    out = capsys.readouterr().out
    assert "first | not run: No module named 'onnx'" in out
    assert "| one token | second |" in out
    assert "| prompt of 64 | C functions, 8 bits |" in out
    answer = [100, *((1, past) for past in range(100, 101 + candidates.TOKENS))]
    assert step.calls == answer
    assert host.calls == answer + 3 * 2 * [0, (64, 0)]
