"""Exact packing of integer codes into Marlin's words and back. No rounding happens here.

A packed tile is a permutation of bits, so packing is two tensor operations: join the codes of each
byte, then permute bytes. `layout.tile_order` states the same order code by code; the tests compare
the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError
from .layout import TILE_K, TILE_N, words_shape
from .weight_types import WeightType

# Axes of a tile, slowest first. Its row is k = 8 kh + 2 kq + kl; its column is n = 8 * (...) + nq,
# and what counts the 8-column fragments is j for 8 bits, and 2 j + nl for 4 bits, where nl lies
# inside the word. Words are ordered (k tile, n block, lane, j) with lane = 4 nq + kq.
_AXES_4 = (2, 4, 2, 4, 2, 8)  # kh, kq, kl | j, nl, nq
_AXES_8 = (2, 4, 2, 8, 8)  # kh, kq, kl | j, nq


def check_codes(codes: Tensor, wtype: WeightType) -> None:
    """Raise ConfigError unless every code is an integer that fits into the type's bits."""
    if codes.is_floating_point():
        raise ConfigError(f"codes have dtype {codes.dtype}; integer codes travel as integers")
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= wtype.levels:
            raise ConfigError(
                f"codes span {low}..{high}, outside 0..{wtype.levels - 1} of {wtype.name}"
            )


def pack(codes: Tensor, wtype: WeightType) -> Tensor:
    """Pack integer codes into Marlin's tile order (FORMAT.md).

    codes: any integer dtype [K, N], values in [0, 2**bits); K % 16 == 0, N % 64 == 0.
    Returns int32 [K // 16, N * 16 // pack_factor], contiguous, on the device of `codes`.
    Raises ConfigError naming the offending dimension or value. Inverse: `unpack`.

    For 4 bits, K = 16, N = 64 and codes[k, n] = (3 k + 5 n + n // 16) % 16 the first word is
    0x3bb30880: its lowest digit is codes[0, 0] = 0, the next codes[8, 0] = 8.
    """
    k, n = codes.shape
    if k % TILE_K or n % TILE_N:
        raise ConfigError(
            f"codes of shape [{k}, {n}] do not fill tiles of {TILE_K} x {TILE_N}; pad them first "
            "(formats.write does)"
        )
    check_codes(codes, wtype)
    codes = codes.to(torch.uint8).contiguous()
    tiles_k, blocks = k // TILE_K, n // TILE_N
    if wtype.bits == 4:
        kh, kq, kl, j, nl, nq = _AXES_4
        x = codes.view(tiles_k, kh, kq, kl, blocks, j, nl, nq)
        x = x[:, 0] | (x[:, 1] << 4)  # low nibble k, high nibble k + 8
        x = x.permute(0, 3, 6, 1, 4, 2, 5)  # tile, block, nq, kq, j | kl, nl: 4 bytes of a word
    else:
        kh, kq, kl, j, nq = _AXES_8
        x = codes.view(tiles_k, kh, kq, kl, blocks, j, nq)
        x = x.permute(0, 4, 6, 2, 5, 3, 1)  # tile, block, nq, kq, j | kl, kh
    words = x.contiguous().view(-1).view(torch.int32)
    return words.view(words_shape(k, n, wtype))


def unpack(words: Tensor, wtype: WeightType) -> Tensor:
    """Integer codes uint8 [K, N] from int32 [K // 16, N * 16 // pack_factor]. Inverse of `pack`."""
    tiles_k, width = words.shape
    n = width * wtype.pack_factor // TILE_K
    if width * wtype.pack_factor % TILE_K or n % TILE_N:
        raise ConfigError(f"packed width {width} is not a multiple of a tile for {wtype.name}")
    blocks = n // TILE_N
    x = words.contiguous().view(-1).view(torch.uint8)
    if wtype.bits == 4:
        kh, kq, kl, j, nl, nq = _AXES_4
        x = x.view(tiles_k, blocks, nq, kq, j, kl, nl).permute(0, 3, 5, 1, 4, 6, 2)
        x = torch.stack((x & 15, x >> 4), dim=1)
    else:
        kh, kq, kl, j, nq = _AXES_8
        x = x.view(tiles_k, blocks, nq, kq, j, kl, kh).permute(0, 6, 3, 5, 1, 4, 2)
    return x.reshape(tiles_k * TILE_K, n)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack along dim 1, low bits first: integers [R, C] -> int32 [R, ceil(C * bits / 32)].

    The order of compressed-tensors' ``weight_packed`` and of GPTQ's ``qzeros``; GPTQ's ``qweight``
    is ``pack_rows(codes.T).T``. Missing codes of the last word are zero.
    """
    rows, cols = values.shape
    values = torch.nn.functional.pad(values.to(torch.uint8), (0, -cols % (32 // bits)))
    if bits == 4:
        values = values[:, 0::2] | (values[:, 1::2] << 4)
    return values.contiguous().view(torch.int32)


def unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [R, columns] from int32 [R, ceil(columns * bits / 32)]. Inverse of `pack_rows`."""
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=2).view(words.shape[0], -1)
    return values[:, :columns].contiguous()


# Nibble i of an AWQ word belongs to column AWQ_ORDER[i] of its eight columns.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_awq(values: Tensor) -> Tensor:
    """Pack along dim 1 as AWQ does: 4-bit integers [R, C], C % 8 == 0 -> int32 [R, C / 8].

    The columns 0, 2, 4, 6, 1, 3, 5, 7 of eight are in the nibbles from the lowest up: a row of
    0, 1, ..., 7 becomes 0x75316420.
    """
    order = torch.tensor(AWQ_ORDER, device=values.device)
    blocks = values.reshape(values.shape[0], -1, 8)[:, :, order]
    return pack_rows(blocks.reshape(values.shape), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """uint8 [R, C] from int32 [R, C / 8]. Inverse of `pack_awq`."""
    stored = unpack_rows(words, 4, words.shape[1] * 8)
    order = torch.argsort(torch.tensor(AWQ_ORDER, device=words.device))
    return stored.view(stored.shape[0], -1, 8)[:, :, order].reshape(stored.shape)
