"""Multiply by unpacked codes: dequantize blocks of weights, or use torch's int4 kernel for CPUs.

This is the whole CPU path, and the fallback of GPUs that have no kernel for a layer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .reference import decode
from .weight_types import WeightType

# Weights dequantized at once on a CPU: 8 MB of float32, so that the buffer is written and read in
# cache. 4096 x 4096 at one token on 2 cores: 2.4 ms, against 24 ms for one pass over all weights.
_BLOCK = 1 << 21
# torch's int4 CPU kernel, bfloat16 only: 0.43 ms there. It loses to float32 blocks above this many
# tokens (4096 x 4096: 12.5 ms at 64).
_INT4_MAX_TOKENS = 32
_INT4_GROUP_SIZES = (32, 64, 128, 256)


def multiply(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    wtype: WeightType,
) -> Tensor:
    """``rows @ W + bias`` for W = scale * (value(code) - zero).

    rows: float [M, K]; codes, scales, zeros: of backends.natural, [K, N], [G, N], [G, N] or None;
    bias: float [N]; group_size: inputs per scale.
    Returns [M, N] of the dtype of `rows`. On a CPU products are formed in float32 whatever that
    dtype is: torch's float16 products there are 50 times slower.
    """
    if rows.device.type != "cpu":
        return _multiply_at_once(rows, codes, scales, zeros, bias, group_size, wtype)
    if _int4_fits(rows, codes, zeros, group_size, wtype):
        packed, scales_and_zeros = _int4_copy(codes, scales)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        out = product(rows.contiguous(), packed, group_size, scales_and_zeros)
        return out if bias is None else out.add_(bias)
    args = (codes, scales, zeros, bias, group_size, wtype)
    return _multiply_blocks(rows.float(), *args).to(rows.dtype)


def _multiply_at_once(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    wtype: WeightType,
) -> Tensor:
    out = torch.mm(rows, dequantize(codes, scales, zeros, group_size, wtype).to(rows.dtype))
    return out if bias is None else out.add_(bias)


def _multiply_blocks(
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    wtype: WeightType,
) -> Tensor:
    k, n = codes.shape
    step = max(1, _BLOCK // (n * group_size)) * group_size
    if bias is None:
        out = rows.new_zeros(rows.shape[0], n)
    else:
        out = bias.float().expand(rows.shape[0], n).clone()
    buffer = rows.new_empty(min(step, k), n)
    for start in range(0, k, step):
        stop = min(start + step, k)
        groups = slice(start // group_size, -(-stop // group_size))
        weight = dequantize(
            codes[start:stop],
            scales[groups],
            None if zeros is None else zeros[groups],
            group_size,
            wtype,
            buffer[: stop - start],
        )
        out.addmm_(rows[:, start:stop], weight)
    return out


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    wtype: WeightType,
    out: Tensor | None = None,
) -> Tensor:
    """Weights ``scale * (value(code) - zero)`` as float32 [K, N], in few passes over memory.

    Arguments as in `multiply`; out: float32 [K, N] to write into. The last group may be partial.
    """
    k, n = codes.shape
    values = decode(codes, wtype) if wtype.is_float else codes
    weight = values.to(torch.float32) if out is None else out.copy_(values)
    whole = k // group_size
    parts = [(weight[: whole * group_size].view(whole, group_size, n), slice(0, whole))]
    if k % group_size:
        parts.append((weight[whole * group_size :].view(1, -1, n), slice(whole, whole + 1)))
    for part, rows in parts:
        if zeros is not None:
            part -= zeros[rows, None].to(torch.float32)
        part *= scales[rows, None].to(torch.float32)
    return weight


# ---- torch's int4 kernel -------------------------------------------------------------------------


@functools.cache
def _has_int4_kernel() -> bool:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return False
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _int4_fits(
    rows: Tensor, codes: Tensor, zeros: Tensor | None, group_size: int, wtype: WeightType
) -> bool:
    k, n = codes.shape
    return (
        rows.dtype is torch.bfloat16
        and rows.shape[0] <= _INT4_MAX_TOKENS
        and wtype.name == "uint4b8"
        and zeros is None
        and group_size in _INT4_GROUP_SIZES
        and k % group_size == 0
        and n % 16 == 0
        and _has_int4_kernel()
    )


_int4_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _int4_copy(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The layer in the layout of torch's kernel, made at the first use and kept with `codes`.

    Half a byte per weight more. Scales are rounded to bfloat16, like every weight would be.
    """
    found = _int4_copies.get(codes)
    if found is None:
        unsigned = codes.T.to(torch.int32) + 8
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
        pairs = torch.stack((scales, torch.zeros_like(scales)), dim=-1).to(torch.bfloat16)
        found = _int4_copies[codes] = (packed, pairs.contiguous())
    return found
