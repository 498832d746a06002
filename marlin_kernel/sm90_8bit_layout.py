"""On-disk Marlin tensors (FORMAT.md) to the records of the sm_90a kernels for 8-bit activations,
and back.

A record holds the codes of 64 features x 128 inputs with their scales and zero points;
csrc/sm90_8bit/config.cuh draws it, csrc/dequant/eight_bit_fragment.cuh derives the codes. The
conversion is the same on every device, made of permutations and bit operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .formats import LayerSpec
from .layout import permute_columns, unpermute_columns
from .packing import pack, pack_rows, unpack, unpack_rows
from .scaled_configs import STAGE_K
from .sm80_layout import K_ORDER
from .sm90_8bit_configs import TILE_FEATURES, EightBitTypes
from .weight_types import WEIGHT_TYPES

_K16 = STAGE_K // 16  # k16 tiles of a record
LARGEST_K = 1 << 17  # inputs of a column whose products of 8-bit integers add up in 32 bits


@dataclass(frozen=True)
class Records:
    """A layer as the kernel takes it.

    weights: uint8 [N' / 64, ceil(K' / 128), record bytes]; scales: float32 [N'], a scale of each
    feature, or [1] if the records hold scales of groups; both times EightBitTypes.unit.
    """

    weights: Tensor
    scales: Tensor


def records(tensors: Mapping[str, Tensor], spec: LayerSpec, activation: str) -> Records:
    """Convert a layer's on-disk tensors, by suffix, on the device they are on.

    activation: "int8" or "float8_e4m3fn". Raises ConfigError for more than LARGEST_K inputs of one
    integer sum.
    """
    types = types_of(spec, activation)
    wtype = spec.weight_type
    codes = unpack(tensors["B"], wtype)
    n = codes.shape[1]
    stages = -(-codes.shape[0] // STAGE_K)
    if not types.promote and stages * STAGE_K > LARGEST_K:
        raise ConfigError(
            f"{spec.k} inputs with one scale per feature: sums of {activation} products are exact "
            f"in 32 bits up to {LARGEST_K}; use groups of 128"
        )
    scales = unpermute_columns(tensors["s"], grouped=tensors["s"].shape[0] > 1)
    parts = [_encode(codes, types, stages)]
    rows = []
    if types.group_size:
        rows.append(_rows(scales, stages, types).view(torch.uint8))
        output = torch.full((1,), types.unit, device=codes.device)
    else:
        output = scales[0].float() * types.unit
    if not wtype.symmetric:
        zeros = 128 - unpack_rows(tensors["z"], wtype.bits, n)
        zeros = zeros if types.group_size else zeros.expand(stages, n)
        rows.append(_rows(zeros, stages, types))
    if rows:
        parts.append(torch.cat(rows, dim=3).flatten(2))
    weights = torch.cat(parts, dim=2)
    if weights.is_cuda:
        # The kernels prefetch weights before their predecessor in the stream has ended.
        torch.cuda.current_stream(weights.device).synchronize()
    return Records(weights, output)


def stored_tensors(held: Records, spec: LayerSpec, activation: str) -> dict[str, Tensor]:
    """On-disk tensors, by suffix, of a layer that `records` converted. Its inverse."""
    types = types_of(spec, activation)
    wtype, shape = spec.weight_type, spec.packed
    columns, stages, _ = held.weights.shape
    codes = _decode(held.weights[..., : types.code_bytes], types)
    out = {"B": pack(codes[: shape.k_padded], wtype)}
    rows = held.weights[..., types.code_bytes :]
    rows = rows.reshape(columns, stages, types.rows, types.row_bytes)
    if types.group_size:
        scales = _columns(rows[..., : 2 * TILE_FEATURES].contiguous().view(torch.float16))
        scales = scales[: shape.groups]
    else:
        scales = (held.scales / types.unit).half()[None]
    out["s"] = permute_columns(scales, grouped=scales.shape[0] > 1)
    if not wtype.symmetric:
        zeros = 128 - _columns(rows[..., types.row_bytes - TILE_FEATURES :])
        out["z"] = pack_rows(zeros[: shape.groups], wtype.bits)
    return out


def types_of(spec: LayerSpec, activation: str, output: str = "float16") -> EightBitTypes:
    """What the kernel of such a layer is compiled for."""
    group_size = spec.group_size if spec.packed.groups > 1 else 0
    return EightBitTypes(spec.weight_type.name, activation, output, group_size)


# ---- codes ---------------------------------------------------------------------------------------


def _encode(codes: Tensor, types: EightBitTypes, stages: int) -> Tensor:
    """uint8 [K', N'] -> uint8 [columns, stages, code bytes]."""
    padding = stages * STAGE_K - codes.shape[0]
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
    order = torch.tensor(K_ORDER, device=codes.device)
    # stage, k16 tile, t, byte, column, m, h, g: position 4 t + byte of k, feature 16 m + 8 h + g
    x = codes.view(stages, _K16, 16, -1)[:, :, order].view(stages, _K16, 4, 4, -1, 4, 2, 8)
    if WEIGHT_TYPES[types.weight_type].bits == 8:
        if types.weight_type == "uint8b128":
            x = x ^ 128
        x = x.unflatten(1, (_K16 // 2, 2))  # k32 step, its half
        x = x.permute(5, 0, 1, 6, 8, 3, 2, 7, 4)  # column, stage, step, m, g, t, half, h, byte
        return x.flatten(2)
    x = x.unflatten(1, (_K16 // 4, 4)).permute(5, 0, 1, 6, 8, 3, 2, 4, 7)
    low, high = x[..., 0], x[..., 1]  # rows g and g + 8; the last axis is the byte
    if types.activation == "float8_e4m3fn":
        signs = (low < 8).to(torch.uint8) << 7, (high < 8).to(torch.uint8) << 3
        low, high = (torch.where(v < 8, 7 - v, v - 8) for v in (low, high))
        return (low | high << 4 | signs[0] | signs[1].roll(1, -1)).flatten(2)
    flip = 0x88 if types.weight_type == "uint4b8" else 0
    return ((low | high << 4) ^ flip).flatten(2)


def _decode(words: Tensor, types: EightBitTypes) -> Tensor:
    """Inverse of `_encode`; with the padding."""
    columns, stages, _ = words.shape
    if WEIGHT_TYPES[types.weight_type].bits == 8:
        x = words.reshape(columns, stages, _K16 // 2, 4, 8, 4, 2, 2, 4)
        x = x.permute(1, 2, 6, 5, 8, 0, 3, 7, 4)
        if types.weight_type == "uint8b128":
            x = x ^ 128
    else:
        x = words.reshape(columns, stages, _K16 // 4, 4, 8, 4, 4, 4)
        if types.activation == "float8_e4m3fn":
            negative = x >> 7, (x >> 3 & 1).roll(-1, -1)
            values = x & 7, x >> 4 & 7
            pair = [torch.where(s > 0, 7 - v, v + 8) for s, v in zip(negative, values, strict=True)]
        else:
            x = x ^ (0x88 if types.weight_type == "uint4b8" else 0)
            pair = [x & 15, x >> 4]
        # column, stage, k64, m, g, t, k16, byte, h -> stage, k64, k16, t, byte, column, m, h, g
        x = torch.stack(pair, -1).permute(1, 2, 6, 5, 7, 0, 3, 8, 4)
    x = x.reshape(stages * _K16, 16, columns * TILE_FEATURES)
    order = torch.argsort(torch.tensor(K_ORDER, device=x.device))
    return x[:, order].reshape(stages * STAGE_K, -1)


# ---- scales and zero points ----------------------------------------------------------------------


def _rows(values: Tensor, stages: int, types: EightBitTypes) -> Tensor:
    """[G, N'] -> [columns, stages, rows, 64], features of a row in order of (m, g, h)."""
    padding = stages * types.rows - values.shape[0]
    values = torch.nn.functional.pad(values, (0, 0, 0, padding))
    x = values.view(stages, types.rows, -1, 4, 2, 8).permute(2, 0, 1, 3, 5, 4)
    return x.contiguous().flatten(3)


def _columns(rows: Tensor) -> Tensor:
    """Inverse of `_rows`: [columns, stages, rows, 64] -> [stages * rows, N']."""
    columns, stages, count, _ = rows.shape
    x = rows.reshape(columns, stages, count, 4, 8, 2).permute(1, 2, 0, 3, 5, 4)
    return x.reshape(stages * count, columns * TILE_FEATURES)
