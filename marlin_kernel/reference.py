"""The ground truth in plain torch: round, dequantize, multiply. Slow, obvious, any device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
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


SCALE_DTYPES = {
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "e8m0": torch.uint8,  # exponent + 127
}


@dataclass(frozen=True)
class Quantized:
    """A weight as it is stored, in natural order.

    codes: uint8 [K, N]; scales: [G, N] in the type's SCALE_DTYPES; zeros: uint8 or (HQQ) float16
    [G, N], or None; global_scale: float32 [1], or None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None


@functools.cache
def float_values(wtype: WeightType, device: torch.device | str = "cpu") -> Tensor:
    """float32 [2**bits]: the number that every code of a floating-point type stands for.

    e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP MX 1.0, section 5.3.3); e4m3fn: bias 7,
    no infinity, NaN for codes 127 and 255 (OCP FP8 1.0).
    """
    codes = torch.arange(wtype.levels)
    magnitude = codes % (wtype.levels // 2)
    exponent, mantissa = magnitude >> wtype.mantissa, magnitude % (1 << wtype.mantissa)
    bias = (1 << (wtype.exponent - 1)) - 1
    fraction = mantissa / (1 << wtype.mantissa)
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    values = torch.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)
    values[values > wtype.largest] = torch.nan
    return torch.where(codes >= wtype.levels // 2, -values, values).float().to(device)


def decode(codes: Tensor, wtype: WeightType) -> Tensor:
    """float32 values of codes, without zero point and scale."""
    if not wtype.is_float:
        return codes.float()
    return float_values(wtype, codes.device)[codes.long()]


def encode(values: Tensor, wtype: WeightType) -> Tensor:
    """uint8 codes of the nearest numbers of a floating-point type, ties to the even code.

    values: float, any shape; beyond the largest number they saturate.
    """
    grid = float_values(wtype, values.device)[: wtype.levels // 2]
    grid = grid[~grid.isnan()]
    middles = (grid[1:] + grid[:-1]) / 2  # between code i and i + 1
    magnitude = values.abs().float().contiguous()
    below = torch.bucketize(magnitude, middles, right=False)  # ties go down ...
    tie = (below < middles.numel()) & (magnitude == middles[below.clamp(max=middles.numel() - 1)])
    codes = below + (tie & (below % 2 == 1))  # ... unless that is odd
    sign = torch.where(torch.signbit(values), wtype.levels // 2, 0)
    return (codes + sign).to(torch.uint8)


def scale_values(scales: Tensor, wtype: WeightType, global_scale: Tensor | None = None) -> Tensor:
    """float32 factors that stored scales stand for, the global one included."""
    if wtype.scale == "e8m0":
        return torch.exp2(scales.float() - 127)
    values = scales.float()
    return values if global_scale is None else values * global_scale.float()


def quantize_stored(
    weight: Tensor, wtype: WeightType, group_size: int, global_scale: Tensor | None = None
) -> Quantized:
    """Round a weight to the nearest point of the type's grid, per group and output.

    weight: float [K, N]; group_size: one that the type allows. Integer types: `quantize`. HQQ: the
    min-max grid with a zero point in float16. float8: the largest weight of a group becomes 448.
    NVFP4: that of the tensor becomes 6 * 448, group scales are rounded to e4m3. MXFP4: the scale is
    2**(floor(log2(max|w|)) - 2), as OCP MX 1.0 (section 6.3) has it; larger weights saturate.
    global_scale: float32 [1], that of a tensor which `weight` is a part of (NVFP4).
    Raises ConfigError for a group size that the type does not allow.
    """
    k, n = weight.shape
    if group_size not in wtype.group_sizes and group_size != k:
        raise ConfigError(f"group_size={group_size} is not in {wtype.group_sizes} for {wtype.name}")
    if wtype.zeros != "float" and not wtype.is_float:
        codes, scales, zeros = quantize(weight, wtype, group_size)
        stored = None if wtype.symmetric else zeros.to(torch.uint8)
        return Quantized(codes, scales.half(), stored, None)
    g = normalize_group_size(group_size, k)
    w = torch.nn.functional.pad(weight.float(), (0, 0, 0, -k % g)).reshape(-1, g, n)
    if not wtype.is_float:
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        scales = round_scales((high - low) / (wtype.levels - 1)).half()
        zeros = (-low / scales.float()).half()
        codes = (w / scales.float()[:, None] + zeros.float()[:, None]).round()
        codes = codes.clamp(0, wtype.levels - 1).reshape(-1, n)[:k].to(torch.uint8)
        return Quantized(codes, scales, zeros, None)
    largest = w.abs().amax(1)
    if wtype.scale == "float16":
        scales = round_scales(largest / wtype.largest).half()
    elif wtype.scale == "e8m0":
        exponent = torch.floor(torch.log2(largest)) - (2**wtype.exponent - 2)
        scales = exponent.clamp(-126, 127).add(127).to(torch.uint8)  # 2**-126 where all are zero
    else:
        if global_scale is None:
            global_scale = (largest.amax() / (wtype.largest * 448)).clamp(min=2.0**-100).reshape(1)
        scales = (largest / wtype.largest / global_scale).clamp(2.0**-9, 448)
        scales = scales.to(torch.float8_e4m3fn)
    factors = scale_values(scales, wtype, global_scale)
    codes = encode(w / factors[:, None], wtype).reshape(-1, n)[:k].contiguous()
    return Quantized(codes, scales, None, global_scale)


def quantize(weight: Tensor, wtype: WeightType, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to the nearest point of an integer type's min-max grid per group and output.

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
    global_scale: Tensor | None = None,
) -> Tensor:
    """Weights ``s * (value(q) - z)`` as `dtype` [K, N].

    codes: integer [K, N]; scales: [G, N], float or stored ones; zeros: [G, N], integers or (HQQ)
    floats, or None for a symmetric type; g_idx: int [K], group of each input; global_scale: [1] or
    None. The product is formed in float32 and rounded once.
    """
    g_idx = g_idx.long()
    if g_idx.numel() and bool((g_idx[1:] >= g_idx[:-1]).all()):
        counts = torch.bincount(g_idx, minlength=scales.shape[0])
        expand = lambda t: torch.repeat_interleave(t, counts, dim=0)  # noqa: E731
    else:
        expand = lambda t: t[g_idx]  # noqa: E731
    w = decode(codes, wtype)
    if zeros is not None:
        w -= expand(zeros.float())
    elif wtype.bias is not None:
        w -= wtype.bias
    w *= expand(scale_values(scales, wtype, global_scale))
    return w.to(dtype)


def quantize_activations(a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round activations to 8 bits with one scale per token, ties to even.

    a: float [M, K]; dtype: torch.int8 (largest value 127) or torch.float8_e4m3fn (448).
    Returns (codes of `dtype` [M, K], scales float32 [M]); a is about ``scales[:, None] * codes``.
    """
    largest = 127.0 if dtype == torch.int8 else 448.0
    scales = a.float().abs().amax(1).clamp(min=2.0**-40)
    scales = scales / torch.full_like(scales, largest)  # on a GPU, / 127.0 is * (1 / 127)
    values = a.float() / scales[:, None]
    if dtype == torch.int8:
        values = values.round()
    return values.clamp(-largest, largest).to(dtype), scales


def matmul(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a[M, K] @ weight[K, N] (+ bias)`` accumulated in float64, returned in the dtype of `a`."""
    out = a.double() @ weight.double()
    if bias is not None:
        out = out + bias.double()
    return out.to(a.dtype)
