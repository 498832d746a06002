"""Where each code lives in the packed words: padding, the 16 x 64 tile, and the column order of
scales.

Everything here is derived from one fact: one lane of a warp holds, of the 16 x 8 operand fragment
of ``mma.m16n8k16``, the rows ``k = 2 * (lane % 4) + {0, 1, 8, 9}`` of column ``n = lane // 4``.
FORMAT.md draws the tile. Frantar et al., "MARLIN" (2024), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .weight_types import WeightType, normalize_group_size

TILE_K = 16  # rows of one packed tile: the K of one mma
TILE_N = 64  # columns of one packed tile: 8 fragments of 8 columns
WARP = 32  # lanes
PAD_K = 64  # K is padded to whole pipeline steps of the kernels (4 tiles)
PAD_N = TILE_N
# In the sm_80 kernels stored zero points come with groups: a layer with one group has its rows
# repeated for so many inputs.
ONE_GROUP_WITH_ZEROS = 128
SHARD_GROUP_SIZE = 32  # there, groups of a shard of K are filled up to whole runs of so many inputs

# Which of a lane's codes a bit field holds, low bits first: (row offset, column offset). Rows come
# in the order (0, 8 | 1, 9) so that one mask extracts the pair (k, k + 1) of a half2 after a shift.
_FIELDS = {
    4: tuple(zip((0, 8, 0, 8, 1, 9, 1, 9), (0, 0, 8, 8, 0, 0, 8, 8), strict=True)),
    8: tuple(zip((0, 8, 1, 9), (0, 0, 0, 0), strict=True)),
}


@dataclass(frozen=True)
class PackedShape:
    """Sizes of a packed linear layer.

    k, n: the layer's own inputs and outputs; group_size: inputs per scale, K for one group;
    k_padded, n_padded: sizes inside the packed tensors; groups: rows of the scale tensor.
    """

    k: int
    n: int
    group_size: int
    k_padded: int
    n_padded: int
    groups: int


@cache
def packed_shape(k: int, n: int, group_size: int) -> PackedShape:
    """Apply the padding rule: K to a multiple of max(64, group size), N to a multiple of 64.

    Padding weighs exactly zero: added codes equal the zero point of their group, added groups and
    columns have scale 0. The last group may cover fewer than group_size real inputs. Raises
    ConfigError for a group size that no type allows.
    """
    g = normalize_group_size(group_size, k)
    multiple = PAD_K if g == k else max(PAD_K, g)
    k_padded = -(-k // multiple) * multiple
    groups = 1 if g == k else k_padded // g
    return PackedShape(k, n, g, k_padded, -(-n // PAD_N) * PAD_N, groups)


@cache
def tile_order(bits: int) -> Tensor:
    """int64 [16 * 64]: entry i is the index ``16 x 64 row-major`` of the i-th code of a packed
    tile.

    Codes are counted word by word, and inside a word from the low bits up.
    """
    fields = _FIELDS[bits]
    words = TILE_K * TILE_N // WARP // len(fields)  # words of one lane in one tile
    columns = TILE_N // words  # columns that one word of every lane covers together
    order = []
    for lane in range(WARP):
        for j in range(words):
            for row, col in fields:
                k = 2 * (lane % 4) + row
                n = columns * j + lane // 4 + col
                order.append(k * TILE_N + n)
    return torch.tensor(order, dtype=torch.int64)


@cache
def scale_order(grouped: bool) -> Tensor:
    """int64 permutation of 64 (grouped) or 32 (one group) columns: stored[i] = natural[order[i]].

    Grouped: a lane reads the 8 scales of the columns ``lane // 4 + 8 * j`` it multiplies. One
    group: scales apply to the accumulator, whose lane holds the column pairs ``2 * (lane % 4) + {0,
    1}``.
    """
    if grouped:
        return torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
    return torch.tensor([2 * i + t for i in range(4) for t in (0, 1, 8, 9, 16, 17, 24, 25)])


@cache
def zero_order(bits: int) -> Tensor:
    """int64 permutation of 64 columns: order of integer zero points in the kernels' layout.

    A lane reads the eight of the columns ``lane // 4 + 8 * j`` in one word (4 bits) or two. 4 bits:
    nibble j is that of row tile j's first eight columns, nibble j + 4 that of its other eight, so
    that one mask finds both; 8 bits: in order of j.
    """
    if bits == 8:
        return scale_order(True)
    columns = [16 * (p % 4) + 8 * (p // 4) for p in range(8)]
    return torch.tensor([i + c for i in range(8) for c in columns])


def permute_columns(values: Tensor, grouped: bool) -> Tensor:
    """[G, N] in natural column order -> the stored order. N must be a multiple of 64."""
    order = scale_order(grouped).to(values.device)
    if values.dtype == torch.float8_e4m3fn:  # which torch cannot index everywhere
        return permute_columns(values.view(torch.uint8), grouped).view(values.dtype)
    return values.reshape(-1, order.numel())[:, order].reshape(values.shape).contiguous()


def unpermute_columns(values: Tensor, grouped: bool) -> Tensor:
    """Inverse of `permute_columns`."""
    order = torch.argsort(scale_order(grouped)).to(values.device)
    if values.dtype == torch.float8_e4m3fn:
        return unpermute_columns(values.view(torch.uint8), grouped).view(values.dtype)
    return values.reshape(-1, order.numel())[:, order].reshape(values.shape).contiguous()


def words_shape(k_padded: int, n_padded: int, wtype: WeightType) -> tuple[int, int]:
    """Shape of the packed int32 tensor: [K' / 16, N' * 16 / pack_factor]."""
    return k_padded // TILE_K, n_padded * TILE_K // wtype.pack_factor
