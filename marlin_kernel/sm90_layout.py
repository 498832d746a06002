"""On-disk Marlin tensors (FORMAT.md) to what the sm_90 kernels take, and back.

Everything that is not about places is as for the sm_80 kernels (sm80_layout): act-order as a
permutation of the activations, shards of K, single groups that are repeated. Here codes, scales and
zero points change their order (csrc/sm90/problem.cuh): pairs of columns of 64 x 64 tiles, and next
to each other what one tile needs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import sm80_layout
from .formats import LayerSpec
from .sm80_layout import KernelTensors
from .weight_types import WeightType
from .weight_types import weight_type as lookup

TILE = 64  # features and k of a weight tile


class Sizes(NamedTuple):
    """Of weights in this order; as the arguments of launch.gemm."""

    k: int
    n: int
    k_padded: int
    n_padded: int
    group_size: int
    weight_type: str = "uint4b8"


@functools.lru_cache(maxsize=4096)
def sizes_of(
    k: int, n: int, weights: torch.Size, scales: torch.Size, group_size: int, weight_type: str
) -> Sizes:
    """Sizes of k x n weights, from the shapes of what `kernel_tensors` made of them."""
    t = lookup(weight_type)
    if scales[0] == 1 and t.symmetric and t.scale == "float16":
        group_size = -1
    n_padded = weights[1] * t.pack_factor // 16
    return Sizes(k, n, weights[0] * 16, n_padded, group_size, weight_type)


def kernel_tensors(tensors: Mapping[str, Tensor], spec: LayerSpec) -> KernelTensors:
    """Convert a layer's on-disk tensors, by suffix, on the device they are on.

    The result is that of sm80_layout.kernel_tensors, but for the order of `weights` and `scales`;
    of types that store zero points, `scales` are bytes uint8 [groups, N' / 64 * bytes of a row]
    that hold both, and `zeros` is None. It is complete when the function returns.
    """
    held = sm80_layout.kernel_tensors(tensors, spec)
    weights = order_words(held.weights, spec.weight_type)
    if spec.weight_type.bits == 4 and spec.weight_type.is_float:
        weights = arrange_floats(weights)
    scales = order_rows(held.scales, held.zeros, held.group_size)
    if weights.is_cuda:
        # The kernels prefetch weights before their predecessor in the stream has ended.
        torch.cuda.current_stream(weights.device).synchronize()
    return replace(held, weights=weights, scales=scales, zeros=None)


def stored_tensors(held: KernelTensors, spec: LayerSpec) -> dict[str, Tensor]:
    """On-disk tensors, by suffix, of a layer that `kernel_tensors` converted. Its inverse.

    Raises ConfigError for a shard of K, whose groups can no longer be told.
    """
    wtype = spec.weight_type
    weights = held.weights
    if wtype.bits == 4 and wtype.is_float:
        weights = arrange_floats(weights, inverse=True)
    weights = _reordered_words(weights, wtype, inverse=True)
    scales, zeros = split_rows(held.scales, wtype, held.group_size)
    plain = replace(held, weights=weights, scales=scales, zeros=zeros)
    return sm80_layout.stored_tensors(plain, spec)


def order_words(words: Tensor, wtype: WeightType) -> Tensor:
    """`B` int32 [K'/16, N' * bits/2] in the order of the kernels, as a new tensor."""
    return _reordered_words(words, wtype, inverse=False)


# Nibble p of a word, which holds the code of register p // 2 % 2 + p % 2 * 2 of the operand and of
# half p // 4 of it, has its magnitude in nibble _NIBBLES[p] and its sign in bit _SIGNS[p].
_REGISTERS = [(p // 2 % 2 + p % 2 * 2, p // 4) for p in range(8)]
_NIBBLES = [register // 2 * 4 + register % 2 + 2 * half for register, half in _REGISTERS]
_SIGNS = [8 * (q % 4) + (3 if q >= 4 else 7) for q in _NIBBLES]


def arrange_floats(words: Tensor, inverse: bool = False) -> Tensor:
    """The bits of words of float4_e2m1f codes where csrc/dequant/operand.cuh finds them.

    words: int32, eight codes each in the order of FORMAT.md. Returns new words of the same shape.
    inverse: back to that order.
    """
    out = torch.zeros_like(words)
    for p, (nibble, sign) in enumerate(zip(_NIBBLES, _SIGNS, strict=True)):
        for width, plain, arranged in ((3, 4 * p, 4 * nibble), (1, 4 * p + 3, sign)):
            source, target = (arranged, plain) if inverse else (plain, arranged)
            out |= (words >> source & (1 << width) - 1) << target
    return out


def order_rows(scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """Scales and zero points of sm80_layout.KernelTensors as rows of groups.

    scales: [G, N'] in the stored order of columns, or, with group_size 0, [1, N'] in natural order;
    zeros: int32 words or float16, or None. Returns a tensor of the shape and dtype of `scales`, or
    bytes uint8 [G, N' / 64 * bytes] if there are zeros.
    """
    if group_size == 0:  # natural 16 m + 8 h + g to g, m, h
        blocks = scales.reshape(-1, 4, 2, 8).permute(0, 3, 1, 2)
        return blocks.reshape(scales.shape).contiguous()
    groups, columns = scales.shape[0], scales.shape[1] // TILE
    parts = [_bytes(t, groups, columns) for t in (scales, zeros) if t is not None]
    rows = _reordered_rows(torch.cat(parts, -1), group_size, inverse=False)
    if zeros is None:
        return rows.view(scales.dtype).view(scales.shape)
    return rows.view(groups, -1)


def split_rows(rows: Tensor, wtype: WeightType, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Inverse of `order_rows`: (scales, zeros)."""
    if group_size == 0:
        blocks = rows.reshape(-1, 8, 4, 2).permute(0, 2, 3, 1)
        return blocks.reshape(rows.shape).contiguous(), None
    groups = rows.shape[0]
    if wtype.symmetric:
        plain = _bytes(rows, groups, rows.shape[1] // TILE)
        plain = _reordered_rows(plain, group_size, inverse=True)
        return plain.view(groups, -1).view(rows.dtype), None
    scale_bytes = 2 * TILE  # types with zero points have float16 scales
    zero_bytes = TILE * (16 if wtype.zeros == "float" else wtype.bits) // 8
    plain = _reordered_rows(
        rows.view(groups, -1, scale_bytes + zero_bytes), group_size, inverse=True
    )
    scales = plain[..., :scale_bytes].contiguous().view(groups, -1).view(torch.float16)
    zeros = plain[..., scale_bytes:].contiguous().view(groups, -1)
    return scales, zeros.view(torch.float16 if wtype.zeros == "float" else torch.int32)


def _bytes(values: Tensor, groups: int, columns: int) -> Tensor:
    """uint8 [groups, column tiles, bytes]."""
    return values.contiguous().view(torch.uint8).view(groups, columns, -1)


def _reordered_words(words: Tensor, wtype: WeightType, inverse: bool) -> Tensor:
    k_tiles, columns = words.shape[0] * 16 // TILE, words.shape[1] * 2 // (wtype.bits * TILE)
    # 4 bits: k tile, kk, column, lane, m -> k tile, column, m, lane, kk
    # 8 bits: k tile, kk / 2, kk % 2, column, lane, m, h
    #      -> k tile, column, m, kk / 2, lane, kk % 2, h
    if wtype.bits == 4:
        sizes, order = (k_tiles, 4, columns, 32, 4), (0, 2, 4, 3, 1)
    else:
        sizes, order = (k_tiles, 2, 2, columns, 32, 4, 2), (0, 3, 5, 1, 4, 2, 6)
    return _moved(words, sizes, order, inverse)


def _reordered_rows(rows: Tensor, group_size: int, inverse: bool) -> Tensor:
    """rows: uint8 [groups, column tiles, bytes]."""
    of_tile = max(1, TILE // group_size)
    groups, columns, length = rows.shape
    # unit, row of a tile, column, byte -> unit, column, row, byte
    return _moved(rows, (groups // of_tile, of_tile, columns, length), (0, 2, 1, 3), inverse)


def _moved(values: Tensor, sizes: tuple[int, ...], order: tuple[int, ...], inverse: bool) -> Tensor:
    """A tensor of dimensions `sizes`, whose columns of tiles are dimension order[1], in pairs.

    The other order has the pairs first, then order[0], the member of the pair, and order[2:].
    inverse: from that order back. Returns a new tensor of the shape of `values`.
    """
    moved = torch.empty_like(values)
    plain, paired = (moved, values) if inverse else (values, moved)
    for part, chunk in _parts(plain.view(sizes), paired.reshape(-1), order):
        source, target = (chunk, part) if inverse else (part, chunk)
        target.copy_(source)
    return moved


def _parts(
    plain: Tensor, paired: Tensor, order: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of whole pairs of columns, and of a last single column, in both orders."""
    columns = plain.shape[order[1]]
    whole = columns // 2 * 2
    split = plain.numel() // columns * whole if columns else 0
    for first, count, width, flat in (
        (0, whole, 2, paired[:split]),
        (whole, columns - whole, 1, paired[split:]),
    ):
        if count == 0:
            continue
        part = plain.narrow(order[1], first, count).unflatten(order[1], (-1, width))
        # dimensions after the columns have moved by one; the pair is order[1], its member the next
        moved = [d + (d > order[1]) for d in order]
        part = part.permute(moved[1], moved[0], moved[1] + 1, *moved[2:])
        yield part, flat.view(part.shape)
