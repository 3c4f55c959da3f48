"""Triton kernels against the same operations in plain torch; on a CPU through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tinygptv.kernels import reference
from tinygptv.kernels.shapes import AttentionWeights, Branch, Cache, PackedWeight, pack_codes, pad_groups, unpack_codes

fused = pytest.importorskip("tinygptv.kernels.fused")
lowbit = pytest.importorskip("tinygptv.kernels.lowbit")
lowbit_rows = pytest.importorskip("tinygptv.kernels.lowbit_rows")
lookup_ptx = lowbit.lookup_ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, H, G, L, ROTARY = 2, 20, 5, 150, 8
D = N * H


def _random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def _close(actual, expected, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def _dtypes():
    return [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("dtype", _dtypes())
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("norm", ["none", "weight", "bias"])
def test_add_norm(dtype, parts, rms, norm):
    hidden = _random(3, D)
    attention = Branch(_random(parts, 3, D, dtype=dtype), _random(D), _random(D) if rms else None, 0.5)
    mlp = Branch(_random(1, 3, D, dtype=dtype), None if rms else _random(D))
    weight, bias = (None if norm == "none" else _random(D)), (_random(D) if norm == "bias" else None)
    results = []
    for ops in (reference, fused):
        stream = hidden.clone()
        results.append((ops.add_norm(stream, (attention, mlp), weight, bias, 0.25, dtype), stream))
    _close(results[1][0], results[0][0], dtype)
    _close(results[1][1], results[0][1])


def test_both_branches_are_summed_biased_scaled_and_added_to_the_stream():
    """Attention: (1, 3) + (1, 0) + (1, 1) = (3, 4), divided by 5 = sqrt((9 + 16) / 2 + 12.5), times (1, 10)."""

    def of(*values):
        return torch.tensor(values, device=DEVICE)

    attention = Branch(of([[1.0, 3.0]], [[1.0, 0.0]]), of(1.0, 1.0), of(1.0, 10.0), 12.5)
    mlp = Branch(of([[1.0, 2.0]]), of(0.5, 0.0))
    for ops in (reference, fused):
        stream = of([100.0, 200.0])
        found = ops.add_norm(stream, (attention, mlp), None, None, 0.0, torch.float32)
        _close(found, of([102.1, 210.0]))
        _close(stream, of([102.1, 210.0]))
        # the mean is 156.05, the half of the difference 53.95
        normed = ops.add_norm(stream, None, of(1.0, 2.0), of(0.0, 1.0), 53.95**2, torch.float32)
        _close(normed, of([-(0.5**0.5), 1 + 2 * 0.5**0.5]))


def test_add_norm_before_the_first_layer():
    hidden, weight, bias = _random(2, D), _random(D), _random(D)
    kept = hidden.clone()
    expected = reference.add_norm(hidden, None, weight, bias, 0.25, torch.float32)
    _close(fused.add_norm(hidden, None, weight, bias, 0.25, torch.float32), expected)
    assert torch.equal(hidden, kept)


@pytest.mark.parametrize("dtype", _dtypes())
@pytest.mark.parametrize("parts", [1, 2])
def test_bias_gelu(dtype, parts):
    x, bias = _random(parts, 3, 1100), _random(1100)
    _close(fused.bias_gelu(x, bias, dtype), reference.bias_gelu(x, bias, dtype), dtype)
    _close(fused.bias_gelu(x, None, dtype), reference.bias_gelu(x, None, dtype), dtype)


def _attention(norms=True, bias=True):
    half = ROTARY // 2
    angles = torch.arange(L, device=DEVICE)[:, None] / 10 ** torch.arange(half, device=DEVICE)
    cos, sin = torch.ones(L, H, device=DEVICE), torch.zeros(L, H, device=DEVICE)
    cos[:, :ROTARY] = angles.cos().repeat(1, 2)
    sin[:, :half], sin[:, half:ROTARY] = -angles.sin(), angles.sin()
    q_norm, k_norm = [(_random(H), _random(H)) if norms else (None, None) for _ in range(2)]
    return AttentionWeights(_random(3 * D) if bias else None, q_norm, k_norm, 0.5, cos, sin, ROTARY, 0.3)


def _cache(dtype):
    return Cache(_random(G, N, L, H, dtype=dtype), _random(G, N, L, H, dtype=dtype))


def _copy(cache):
    return Cache(cache.keys.clone(), cache.values.clone())


@pytest.mark.parametrize(
    ("dtype", "norms", "slots"),
    [
        (torch.float32, True, [3]),
        (torch.float32, True, [4, 0, 2]),
        (torch.float32, True, [1, G, 2, G]),
        *((dtype, True, [4, 0, 2]) for dtype in _dtypes()[1:]),
        (torch.float32, False, [4, 2]),
    ],
)
def test_attend(dtype, norms, slots, monkeypatch):
    weights, cache = _attention(norms, bias=norms), _cache(dtype)
    lengths = torch.tensor([7, 0, 149, 64, 65, 0], device=DEVICE)
    lengths[G] = 0
    slots = torch.tensor(slots, device=DEVICE)
    partials = _random(2, len(slots), 3 * D)
    expected_cache = _copy(cache)
    expected = reference.attend(partials, weights, expected_cache, slots, lengths)
    for parts in (1, 2, 4) if norms and dtype is torch.float32 else (2,):
        monkeypatch.setattr(fused, "_context_parts", lambda heads, parts=parts: parts)
        own = _copy(cache)
        actual = fused.attend(partials, weights, own, slots, lengths)
        _close(actual, expected, dtype)
        _close(own.keys, expected_cache.keys, dtype)
        _close(own.values, expected_cache.values, dtype)


def test_attend_ignores_what_lies_beyond_a_sequence():
    weights, cache = _attention(), _cache(torch.float32)
    slots, lengths = torch.tensor([2], device=DEVICE), torch.full((G + 1,), 10, device=DEVICE)
    lengths[G] = 0
    partials = _random(1, 1, 3 * D)
    clean = reference.attend(partials, weights, _copy(cache), slots, lengths)
    cache.keys[:, :, 11:] = torch.nan
    cache.values[:, :, 11:] = torch.nan
    for ops in (reference, fused):
        _close(ops.attend(partials, weights, _copy(cache), slots, lengths), clean)


@pytest.mark.parametrize("dtype", _dtypes())
def test_rotate_and_store(dtype):
    weights, cache = _attention(), _cache(dtype)
    slots = torch.tensor([1, 1, 4, G], device=DEVICE)
    positions = torch.tensor([5, 6, 149, 0], device=DEVICE)
    partials = _random(1, 4, 3 * D)
    other = _copy(cache)
    expected = reference.rotate_and_store(partials, weights, cache, slots, positions)
    actual = fused.rotate_and_store(partials, weights, other, slots, positions)
    _close(actual[:3], expected[:3], dtype)
    _close(other.keys, cache.keys, dtype)
    _close(other.values, cache.values, dtype)


def _packed(kind, outputs, inputs, group):
    if kind == "int8":
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE)
        return PackedWeight(codes, _random(outputs, 1).abs(), None, None, inputs, inputs)
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=DEVICE)
    scale = pad_groups(_random(outputs, inputs // group, dtype=torch.float16), group)
    offset = pad_groups(_random(outputs, inputs // group, dtype=torch.float16), group) if kind == "int4" else None
    table = (torch.linspace(-1, 1, 16, device=DEVICE) ** 3).bfloat16().float()
    return PackedWeight(pack_codes(codes), scale, offset, table, group, inputs)


def test_codes_are_packed_in_blocks():
    codes = torch.randint(0, 16, (3, 200), dtype=torch.uint8)
    words = pack_codes(codes)
    assert words.shape == (3, 32)
    assert torch.equal(unpack_codes(words, 200), codes.int())
    assert int(words[1, 5]) & 15 == int(codes[1, 5]) and (int(words[1, 5]) >> 4) & 15 == int(codes[1, 21])


def test_each_table_has_its_own_lookup():
    found = []
    for scale in (1, 2):
        weight = _packed("nf4", 4, 128, 64)
        weight = PackedWeight(weight.codes, weight.scale, None, weight.table * scale, 64, 128)
        bits, text = lowbit._known(weight)
        assert text == lookup_ptx(tuple(bits.tolist())) and lowbit._known(weight)[0] is bits
        assert torch.equal(bits.to(torch.int16).view(torch.bfloat16).float(), weight.table)
        found.append((weight, text))
    assert found[0][1] != found[1][1]


def test_a_table_in_the_memory_of_one_that_is_gone_has_its_own_numbers():
    memory = torch.empty(16, device=DEVICE)  # as the allocator gives it again
    words = _packed("nf4", 4, 128, 64)
    numbers = words.table
    for scale in (1, 2):
        memory.copy_(numbers * scale)
        table = memory.view(16)
        weight = PackedWeight(words.codes, words.scale, None, table, 64, 128)
        torch.testing.assert_close(lowbit.unpack(weight, torch.float32), reference.unpack(weight, torch.float32))
        del weight, table


def test_the_table_is_looked_up_by_permuting_bytes():
    """The PTX, carried out here: ``prmt`` as its manual defines it."""
    bits = tuple(range(0x3F80, 0x3F80 + 16 * 257, 257))
    for word in (0x76543210, 0xFEDCBA98 - 2**32, 0x0F1E2D3C):
        pairs = _run_ptx(lookup_ptx(bits), word & 0xFFFFFFFF)
        numbers = [half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
        assert numbers == [bits[(word >> (4 * k)) & 15] for k in range(8)]


def _run_ptx(text, word):
    registers = {"$4": word}
    for line in text.strip("{ }").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith(".reg"):
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        if name == "prmt.b32":
            source = [(values[i // 4] >> (8 * (i % 4))) & 0xFF for i in range(8)]
            assert not any((values[2] >> (4 * i)) & 8 for i in range(4)), "sign replication is not meant"
            registers[target] = sum(source[(values[2] >> (4 * i)) & 7] << (8 * i) for i in range(4))
        else:
            operation = {"shr.b32": lambda a, b: a >> b, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b}
            registers[target] = operation[name](*values)
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
@pytest.mark.parametrize(
    ("ops", "tokens", "shape", "group"),
    [
        (lowbit, 1, (12, 256), 64),
        (lowbit, 33, (12, 256), 64),
        (lowbit, 5, (10, 192), 32),
        (lowbit, 33, (16, 96), 16),
        (lowbit_rows, 1, (34, 128), 128),
        (lowbit_rows, 3, (12, 192), 64),
    ],
)
def test_products_with_packed_weights(ops, kind, tokens, shape, group, monkeypatch):
    for name in ("DIVISION", "FEW_DIVISION", "DIVISION8"):
        monkeypatch.setattr(ops, name, getattr(ops, name, ops.DIVISION)._replace(least_steps=1), raising=False)
    weight = _packed(kind, *shape, group=group)
    x = _random(tokens, shape[1])
    expected = x @ reference.unpack(weight, torch.float32).T
    products = ops.partial_products(x, weight)
    torch.testing.assert_close(products.sum(0), expected, atol=2e-3, rtol=1e-4)
    assert products.shape == (-(-shape[1] // 128), tokens, shape[0]) and products.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
@pytest.mark.parametrize(("shape", "group"), [((12, 256), 64), ((10, 192), 32), ((16, 96), 16), ((3, 128), 128)])
def test_unpacked_weights(kind, shape, group):
    weight = _packed(kind, *shape, group=group)
    torch.testing.assert_close(lowbit.unpack(weight, torch.float32), reference.unpack(weight, torch.float32))
    half = lowbit.unpack(weight, torch.float16)
    torch.testing.assert_close(half, reference.unpack(weight, torch.float16), atol=2e-3, rtol=2e-3)
    assert lowbit_rows.unpack is lowbit.unpack


@pytest.mark.parametrize(
    ("division", "outputs", "inputs", "parts", "steps"),
    [
        (lowbit.DIVISION, 64, 128, 1, 1),  # no less than two steps
        (lowbit.DIVISION, 64, 5 * 128, 2, 3),
        (lowbit.DIVISION, 2560, 10240, 8, 10),  # Phi-2's second matrix of the MLP
        (lowbit.FEW_DIVISION, 2560, 10240, 16, 5),
        (lowbit.FEW_DIVISION, 51200, 2560, 2, 10),  # its head: enough programs
        (lowbit.DIVISION8, 64, 9 * 128, 1, 9),
        (lowbit.DIVISION8, 64, 10 * 128, 2, 5),
    ],
)
def test_inputs_are_divided_until_the_card_is_busy(division, outputs, inputs, parts, steps):
    assert lowbit._parts(outputs, 64, inputs, 128, division) == (parts, steps)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_few_tokens_have_kernels_of_their_own_on_older_cards(kind, monkeypatch):
    weight, asked = _packed(kind, 12, 256, group=64), []
    monkeypatch.setattr(lowbit, "partial_products", lambda x, weight: asked.append(len(x)))
    for tokens in (1, 4, 5, 64):
        lowbit_rows.partial_products(_random(tokens, 256), weight)
    assert asked == [5, 64]
