"""Exact packing of integer codes into Marlin's words and back. No rounding happens here."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError
from .layout import TILE_K, TILE_N, tile_order, words_shape
from .weight_types import WeightType

_ROWS_AT_ONCE = 512  # rows of codes packed per step: bounds the int64 temporaries


def _to_words(codes: Tensor, bits: int) -> Tensor:
    """int [..., 32 // bits] codes, low bits first -> int32 [...] (bit 31 becomes the sign)."""
    shifts = torch.arange(0, 32, bits, device=codes.device, dtype=torch.int64)
    words = (codes.to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """int32 [...] -> uint8 [..., 32 // bits], low bits first. Inverse of `_to_words`."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def check_codes(codes: Tensor, wtype: WeightType) -> None:
    """Raise ConfigError unless every code fits into the type's bits."""
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

    codes: any integer dtype [K, N], values in [0, 2**bits); K % 16 == 0, N % 64 == 0 (`pad_codes`).
    Returns int32 [K // 16, N * 16 // pack_factor], contiguous, on the device of `codes`.
    Raises ConfigError naming the offending dimension or value. Inverse: `unpack`.

    For 4 bits, K = 16, N = 64 and codes[k, n] = (3 k + 5 n + n // 16) % 16 the first word is
    0x3bb30880: its lowest digit is codes[0, 0] = 0, the next codes[8, 0] = 8.
    """
    k, n = codes.shape
    if k % TILE_K or n % TILE_N:
        raise ConfigError(
            f"codes of shape [{k}, {n}] do not fill tiles of {TILE_K} x {TILE_N}; pad_codes() first"
        )
    check_codes(codes, wtype)
    order = tile_order(wtype.bits).to(codes.device)
    out = torch.empty(words_shape(k, n, wtype), dtype=torch.int32, device=codes.device)
    for row in range(0, k, _ROWS_AT_ONCE):
        part = codes[row : row + _ROWS_AT_ONCE]
        tiles = part.reshape(-1, TILE_K, n // TILE_N, TILE_N).transpose(1, 2)
        fields = tiles.reshape(-1, TILE_K * TILE_N)[:, order]
        words = _to_words(fields.reshape(-1, wtype.pack_factor), wtype.bits)
        out[row // TILE_K : row // TILE_K + part.shape[0] // TILE_K] = words.reshape(-1, out.shape[1])
    return out


def unpack(words: Tensor, wtype: WeightType) -> Tensor:
    """Integer codes uint8 [K, N] from int32 [K // 16, N * 16 // pack_factor]. Inverse of `pack`."""
    tiles_k, width = words.shape
    n = width * wtype.pack_factor // TILE_K
    if width * wtype.pack_factor % TILE_K or n % TILE_N:
        raise ConfigError(f"packed width {width} is not a multiple of a tile for {wtype.name}")
    inverse = torch.argsort(tile_order(wtype.bits)).to(words.device)
    fields = _from_words(words, wtype.bits).reshape(-1, TILE_K * TILE_N)[:, inverse]
    tiles = fields.reshape(tiles_k, n // TILE_N, TILE_K, TILE_N)
    return tiles.transpose(1, 2).reshape(tiles_k * TILE_K, n)


def pad_codes(codes: Tensor, wtype: WeightType, k_padded: int, n_padded: int) -> Tensor:
    """Extend codes [K, N] to [k_padded, n_padded] with the type's middle code (weight zero)."""
    k, n = codes.shape
    if (k, n) == (k_padded, n_padded):
        return codes
    return torch.nn.functional.pad(codes, (0, n_padded - n, 0, k_padded - k), value=wtype.midpoint)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack along dim 1, low bits first: integers [R, C] -> int32 [R, ceil(C * bits / 32)].

    The order of compressed-tensors' ``weight_packed`` and of GPTQ's ``qzeros``; GPTQ's ``qweight`` is
    ``pack_rows(codes.T).T``. Missing codes of the last word are zero.
    """
    rows, cols = values.shape
    factor = 32 // bits
    values = torch.nn.functional.pad(values.to(torch.int64), (0, -cols % factor))
    return _to_words(values.reshape(rows, -1, factor), bits)


def unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [R, columns] from int32 [R, ceil(columns * bits / 32)]. Inverse of `pack_rows`."""
    return _from_words(words, bits).reshape(words.shape[0], -1)[:, :columns]
