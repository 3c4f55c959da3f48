"""Operations of a training step's language layers in plain torch: what the Triton kernels must agree with.

Each operation is a pair, forward and backward, that knows nothing of autograd (``training_functions`` joins them). The
backward keeps no masks: dropout is a function of a seed and the element's index, which both compute again.

``seeds`` is int64 on the device, one number for each ``site`` of a layer that drops.

Results of forward operations are new tensors (``copy=True``): ``torch.compile`` of torch 2.11 loses the gradient of an
output that is the same tensor as an intermediate one.

Notation: T tokens, D width, N heads, H head width, R numbers of a head that are rotated. Leading dimensions of [..., D]
are those of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drop_threshold(p: float) -> int:
    """Hashes of 32 bits below this are dropped.

    Raises:
        ValueError: p is no share below 1.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout is {p}; it must be at least 0 and below 1.")
    return min(round(p * 2**32), 2**32 - 1)


def is_kept(shape: torch.Size, seeds: Tensor, site: int, p: float) -> Tensor:
    """Which elements dropout keeps, bool of that shape.

    The lower 32 bits of an element's index are hashed with both halves of the site's seed: two multiplications with
    shifts (Wellons' "lowbias32", 2018), the second half added between them.
    """
    key = seeds[site]
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    x = torch.arange(shape.numel(), device=seeds.device) & 0xFFFFFFFF
    x = x ^ low
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15) ^ high, 0x846CA68B)
    return ((x ^ (x >> 16)) >= drop_threshold(p)).view(shape)


def _times(x: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of a product; halves of the factor, so that 64 bits hold it."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & 0xFFFFFFFF


def _dropped(x: Tensor, seeds: Tensor, site: int, p: float) -> Tensor:
    """x in float32 after dropout."""
    return torch.where(is_kept(x.shape, seeds, site, p), x, 0.0).float() / (1 - p) if p else x.float()


def norm_and_drop(
    hidden: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, seeds: Tensor, site: int, p: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """LayerNorm of the residual stream, and what dropout leaves of it.

    Args:
        hidden: [..., D] float32.
        weight_D: LayerNorm weight, float32.
        bias_D: LayerNorm bias, float32.
        eps: of the LayerNorm.
        seeds: int64, one for each site.
        site: index of this dropout.
        p: share that is dropped.
        dtype: of the results.

    Returns:
        Normalised [..., D]; the same after dropout, None for p = 0; mean and 1 / deviation of each token, float32 [T].
    """
    variance, mean = torch.var_mean(hidden, -1, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    normed = ((hidden - mean) * rstd * weight_D + bias_D).to(dtype, copy=True)
    dropped = _dropped(normed, seeds, site, p).to(dtype, copy=True) if p else None
    return normed, dropped, mean.flatten(), rstd.flatten()


def norm_and_drop_backward(
    hidden: Tensor,
    weight_D: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    seeds: Tensor,
    site: int,
    p: float,
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None],
    weight_trains: bool,
    bias_trains: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``norm_and_drop``, and the residual's own added.

    Args:
        hidden: as given to it.
        weight_D: the same.
        mean_T: what it returned.
        rstd_T: the same.
        seeds: as given to it.
        site: the same.
        p: the same.
        grads: of the residual stream itself, float32 [..., D]; of the normalised stream, twice, because it has two
            readers; of the dropped one, None for p = 0.
        weight_trains: whether the weight's gradient is wanted.
        bias_trains: whether the bias's is.

    Returns:
        Gradients of ``hidden`` [..., D], the weight [D] and the bias [D], float32; None where not wanted.
    """
    passed, first, second, dropped = grads
    shape = (*hidden.shape[:-1], 1)
    rstd = rstd_T.view(shape)
    normed = (hidden - mean_T.view(shape)) * rstd
    g = first.float() + second.float()
    if dropped is not None:
        g = g + _dropped(dropped, seeds, site, p)
    wg = g * weight_D
    to_hidden = (wg - wg.mean(-1, keepdim=True) - normed * (wg * normed).mean(-1, keepdim=True)) * rstd + passed
    return to_hidden, _sum_rows(g * normed) if weight_trains else None, _sum_rows(g) if bias_trains else None


def add_branches(
    hidden: Tensor,
    attention: Tensor,
    rms_weight_D: Tensor,
    rms_eps: float,
    mlp: Tensor,
    seeds: Tensor,
    sites: tuple[int, int],
    p: float,
) -> tuple[Tensor, Tensor]:
    """The next residual stream: ``hidden + dropout(rmsnorm(attention)) + dropout(mlp)``.

    Args:
        hidden: [..., D] float32.
        attention: output of the attention branch [..., D].
        rms_weight_D: float32 weight of its RMSNorm.
        rms_eps: of the RMSNorm.
        mlp: output of the MLP branch [..., D].
        seeds: int64, one for each site.
        sites: indices of both dropouts.
        p: share that is dropped of each branch.

    Returns:
        [..., D] float32, and 1 / root mean square of each token's attention branch, float32 [T].
    """
    rstd = torch.rsqrt(attention.float().square().mean(-1, keepdim=True) + rms_eps)
    normed = attention.float() * rstd * rms_weight_D
    output = _dropped(normed, seeds, sites[0], p) + _dropped(mlp, seeds, sites[1], p) + hidden
    return output, rstd.flatten()


def add_branches_backward(
    grad: Tensor,
    attention: Tensor,
    rms_weight_D: Tensor,
    rstd_T: Tensor,
    seeds: Tensor,
    sites: tuple[int, int],
    p: float,
    weight_trains: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``add_branches``; that of the residual stream is ``grad`` itself.

    Args:
        grad: of its result, float32 [..., D].
        attention: as given to it.
        rms_weight_D: the same.
        rstd_T: what it returned.
        seeds: as given to it.
        sites: the same.
        p: the same.
        weight_trains: whether the weight's gradient is wanted.

    Returns:
        Gradients of both branches [..., D] in the dtype of ``attention``, and of the weight, float32 [D] or None.
    """
    rstd = rstd_T.view(*grad.shape[:-1], 1)
    normed = attention.float() * rstd
    g = _dropped(grad, seeds, sites[0], p)
    wg = g * rms_weight_D
    to_attention = ((wg - normed * (wg * normed).mean(-1, keepdim=True)) * rstd).to(attention.dtype)
    to_mlp = _dropped(grad, seeds, sites[1], p).to(attention.dtype)
    return to_attention, to_mlp, _sum_rows(g * normed) if weight_trains else None


def drop(x: Tensor, seeds: Tensor, site: int, p: float) -> Tensor:
    """Dropout of a contiguous tensor."""
    return _dropped(x, seeds, site, p).to(x.dtype, copy=True)


def drop_backward(passed: Tensor, dropped: Tensor, seeds: Tensor, site: int, p: float) -> Tensor:
    """Gradient of a tensor that is read as it is and after ``drop``.

    Args:
        passed: gradient of the tensor itself.
        dropped: gradient of the dropped one.
        seeds: as given to ``drop``.
        site: the same.
        p: the same.
    """
    return (passed.float() + _dropped(dropped, seeds, site, p)).to(dropped.dtype)


def rotate_heads(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor],
    k_norm: tuple[Tensor, Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """LayerNorm per head and rotary embedding of queries and keys.

    Args:
        qkv: [..., 3 * N * H]: all query heads of a token first, then its key heads, then its value heads.
        q_norm: weight and bias of the queries' LayerNorm, float32 [H] each.
        k_norm: the same for keys.
        eps: of both norms.
        cos: float32 [..., R]; the second half repeats the first and is not read.
        sin: the same.
        num_heads: N.

    Returns:
        Queries and keys [T, N, H].
    """
    half = cos.shape[-1] // 2
    c, s = _angles(cos, half), _angles(sin, half)
    heads = qkv.view(-1, 3, num_heads, q_norm[0].shape[0])
    rotated = []
    for index, (weight, bias) in enumerate((q_norm, k_norm)):
        x = nn.functional.layer_norm(heads[:, index].float(), weight.shape, weight, bias, eps)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        rotated.append(torch.cat((first * c - second * s, second * c + first * s, rest), -1).to(qkv.dtype, copy=True))
    return rotated[0], rotated[1]


def rotate_heads_backward(
    qkv: Tensor,
    q_weight_H: Tensor,
    k_weight_H: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    weights_train: bool,
    biases_train: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``rotate_heads``, and the values' own beside them.

    Args:
        qkv: as given to it.
        q_weight_H: the same.
        k_weight_H: the same.
        eps: the same.
        cos: the same.
        sin: the same.
        grads: of queries, keys and values, contiguous [T, N, H] each.
        weights_train: whether gradients of the norms' weights are wanted.
        biases_train: whether those of the biases are.

    Returns:
        Gradients of ``qkv`` in its shape, of both weights and of both biases, float32 [2, H]; None where not wanted.
    """
    num_tokens, num_heads, head_dim = grads[0].shape
    half = cos.shape[-1] // 2
    c, s = _angles(cos, half), _angles(sin, half)
    heads = qkv.view(num_tokens, 3, num_heads, head_dim)
    to_heads, to_weights, to_biases = [], [], []
    for index, weight in enumerate((q_weight_H, k_weight_H)):
        variance, mean = torch.var_mean(heads[:, index].float(), -1, correction=0, keepdim=True)
        rstd = torch.rsqrt(variance + eps)
        normed = (heads[:, index].float() - mean) * rstd
        g = grads[index].float()
        first, second, rest = g[..., :half], g[..., half : 2 * half], g[..., 2 * half :]
        g = torch.cat((first * c + second * s, second * c - first * s, rest), -1)
        to_weights.append((g * normed).sum((0, 1)))
        to_biases.append(g.sum((0, 1)))
        g = g * weight
        to_heads.append((g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * rstd)
    output = torch.stack((to_heads[0], to_heads[1], grads[2].float()), 1).to(qkv.dtype).view(qkv.shape)
    return (
        output,
        torch.stack(to_weights) if weights_train else None,
        torch.stack(to_biases) if biases_train else None,
    )


def _angles(table: Tensor, half: int) -> Tensor:
    """[..., R] to [T, 1, R / 2]."""
    return table.view(-1, 1, table.shape[-1])[..., :half]


def _sum_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)
