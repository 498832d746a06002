"""The ground truth in plain torch: round, dequantize, multiply. Slow, obvious, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .weight_types import WeightType, normalize_group_size

MIN_SCALE = 2.0**-24  # smallest positive fp16: an all-zero group still gets a usable scale


def round_scales(scales: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Scales as they will be stored: rounded to `dtype`, never zero; returned in the input's dtype.

    Codes must be chosen against these values, so rounding comes first. Signs are kept.
    """
    limit = torch.finfo(dtype).max
    stored = scales.clamp(-limit, limit).to(dtype).to(scales.dtype)
    tiny = torch.copysign(torch.full_like(stored, MIN_SCALE), stored)
    return torch.where(stored.abs() < MIN_SCALE, tiny, stored)


def group_index(k: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """int64 [K]: group of each input, ``k // group_size``."""
    return torch.arange(k, device=device) // normalize_group_size(group_size, k)


def quantize(weight: Tensor, wtype: WeightType, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to the nearest point of a min-max grid per group and output.

    weight: float [K, N]. Symmetric types use the step 2 * max|w| / (levels - 1), asymmetric ones
    (max - min) / (levels - 1) with an integer zero point.
    Returns (codes uint8 [K, N], scales float32 [G, N] already rounded to fp16, zeros int32 [G, N]).
    """
    k, n = weight.shape
    g = normalize_group_size(group_size, k)
    w = torch.nn.functional.pad(weight.float(), (0, 0, 0, -k % g)).reshape(-1, g, n)
    if wtype.symmetric:
        scales = round_scales(2 * w.abs().amax(1) / (wtype.levels - 1))
        zeros = torch.full_like(scales, wtype.bias)
    else:
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        scales = round_scales((high - low) / (wtype.levels - 1))
        zeros = (-low / scales).round().clamp(0, wtype.levels - 1)
    codes = (w / scales[:, None] + zeros[:, None]).round().clamp(0, wtype.levels - 1)
    return codes.reshape(-1, n)[:k].to(torch.uint8), scales, zeros.to(torch.int32)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    wtype: WeightType,
    g_idx: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights ``s * (q - z)`` as `dtype` [K, N].

    codes: integer [K, N]; scales: float [G, N]; zeros: integer [G, N], or None for a symmetric
    type; g_idx: int [K], group of each input. The product is formed in float32 and rounded once.
    """
    g_idx = g_idx.long()
    if g_idx.numel() and bool((g_idx[1:] >= g_idx[:-1]).all()):
        counts = torch.bincount(g_idx, minlength=scales.shape[0])
        expand = lambda t: torch.repeat_interleave(t, counts, dim=0)  # noqa: E731
    else:
        expand = lambda t: t[g_idx]  # noqa: E731
    w = codes.float()
    w -= wtype.bias if zeros is None else expand(zeros.float())
    w *= expand(scales.float())
    return w.to(dtype)


def matmul(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a[M, K] @ weight[K, N] (+ bias)`` accumulated in float64, returned in the dtype of `a`."""
    out = a.double() @ weight.double()
    if bias is not None:
        out = out + bias.double()
    return out.to(a.dtype)
