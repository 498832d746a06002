"""The 2:4 Marlin format: a quantized layer that keeps two codes of every four inputs.

For symmetric integer types, whose zero is one code. Three tensors, in tiles of 64 outputs x 128
inputs (both padded up, with zeros):
    B_24    int32 [ceil(N / 64), ceil(K / 128), 128, 4 (4 bits) or 8 (8 bits)]  kept codes
    B_meta  int32 [ceil(N / 64), ceil(K / 128), 128, 2]                         their positions
    s       float16 [G, N]                                     scales, in natural order
so 3 bits a weight (5 with 8-bit codes) and the scales. The third index is the thread of a warpgroup
that feeds these words to the sparse matrix instruction of 64 x 32 inputs; with
warp = thread // 32, lane = thread % 32, g = lane // 4, t = lane % 4:

B_24: step s (0..3) works on inputs 32 s .. 32 s + 31 of the tile, of which kept codes
16 s .. 16 s + 15 remain. Code (u, v, e), each 0 or 1, belongs to output 16 warp + g + 8 u and is
kept code 16 s + 2 t + 8 v + e of it. 4 bits: word s, bits 4 (v + 2 u) + 16 e and up. 8 bits: word
2 s + u, byte v + 2 e.

B_meta: word j describes step 2 j + (lane // 2 % 2), inputs 32 step + 16 (lane % 2) ... + 15, in
four groups of four: group i of output 16 warp + g has bits 4 i and up, that of output
16 warp + g + 8 bits 16 + 4 i and up: the position (0..3) of the first kept code in the lower two,
of the second in the upper two, first < second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ConfigError
from .sparse import GROUP, TILE_FEATURES, TILE_INPUTS, positions_2_4
from .weight_types import WeightType

if TYPE_CHECKING:
    from .formats import LayerSpec, QuantizedLinear

SPARSE_FORMAT = "marlin-24"
SPARSITY = "2:4"
SPARSE_TYPES = ("uint4b8", "uint8b128")
_FIRST_TWO = 0b0100  # positions 0 and 1: where nothing is kept


def check_spec(spec: LayerSpec) -> None:
    """Raise ConfigError, with the way out, if the format cannot hold a layer of this spec."""
    if spec.weight_type.name not in SPARSE_TYPES:
        raise ConfigError(
            f"format {SPARSE_FORMAT!r} holds {' and '.join(SPARSE_TYPES)}, not "
            f"{spec.weight_type.name}; quantize with --sym, or write another format"
        )
    if spec.act_order or spec.k % GROUP:
        raise ConfigError(
            f"format {SPARSE_FORMAT!r} needs inputs in natural groups and a multiple of {GROUP} of "
            f"them (here {spec.k}); use --static-groups, or write another format"
        )


def tensor_shapes(spec: LayerSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the three tensors, by suffix."""
    tiles = (-(-spec.n // TILE_FEATURES), -(-spec.k // TILE_INPUTS), 128)
    return {
        "B_24": ((*tiles, spec.weight_type.bits), torch.int32),
        "B_meta": ((*tiles, 2), torch.int32),
        "s": ((spec.groups, spec.n), torch.float16),
    }


def write(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Tensors of a layer. Raises ConfigError naming the first four inputs with too many weights."""
    check_spec(layer.spec)
    centred = layer.codes.T.to(torch.int16) - layer.weight_type.bias  # [N, K]
    positions = positions_2_4(centred)
    kept = centred.unflatten(1, (-1, GROUP)).gather(2, positions.long()).flatten(1)
    return {
        "B_24": pack_codes(kept + layer.weight_type.bias, layer.weight_type),
        "B_meta": pack_positions(positions),
        "s": layer.scales.contiguous(),
    }


def read(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """(codes uint8 [K, N], scales [G, N]) of the tensors of a layer."""
    kept = unpack_codes(tensors["B_24"], spec.weight_type)
    positions = unpack_positions(tensors["B_meta"])
    codes = torch.full(
        (*positions.shape[:2], GROUP), spec.weight_type.bias, dtype=torch.uint8, device=kept.device
    )
    codes.scatter_(2, positions.long(), kept.view(*positions.shape))
    return codes.flatten(1)[: spec.n, : spec.k].T.contiguous(), tensors["s"]


def pack_codes(kept: Tensor, wtype: WeightType) -> Tensor:
    """Kept codes, integers [N, K / 2], to `B_24`."""
    n, half = kept.shape
    rows, columns = -(-n // TILE_FEATURES), -(-half // (TILE_INPUTS // 2))
    size = (rows * TILE_FEATURES, columns * TILE_INPUTS // 2)
    wide = torch.full(size, wtype.bias, dtype=torch.int64, device=kept.device)
    wide[:n, :half] = kept
    # output tile, warp, u, g, input tile, step, v, t, e
    codes = wide.view(rows, 4, 2, 8, columns, 4, 2, 4, 2)
    codes = codes.permute(0, 4, 1, 3, 7, 5, 2, 6, 8)  # tile, tile, warp, g, t, step, u, v, e
    words = (codes << _code_shifts(wtype, kept.device)).sum((7, 8))  # ..., step, u
    words = words.sum(6) if wtype.bits == 4 else words
    return _int32(words.reshape(rows, columns, 128, wtype.bits))


def unpack_codes(words: Tensor, wtype: WeightType) -> Tensor:
    """Inverse of `pack_codes`: uint8 [N', K' / 2], padding included."""
    rows, columns = words.shape[:2]
    steps = words.long().view(rows, columns, 4, 8, 4, 4, -1)
    steps = steps.expand(-1, -1, -1, -1, -1, -1, 2)[..., None, None]
    codes = steps >> _code_shifts(wtype, words.device) & (wtype.levels - 1)
    codes = codes.permute(0, 2, 6, 3, 1, 5, 7, 4, 8)  # tile, warp, u, g, tile, step, v, t, e
    size = (rows * TILE_FEATURES, columns * TILE_INPUTS // 2)
    return codes.reshape(size).to(torch.uint8)


def _code_shifts(wtype: WeightType, device: torch.device) -> Tensor:
    """Bits of code (u, v, e) in its word: int64 [2, 2, 2]."""
    u, v, e = torch.meshgrid(*(3 * [torch.arange(2, device=device)]), indexing="ij")
    return 4 * (v + 2 * u) + 16 * e if wtype.bits == 4 else 8 * (v + 2 * e)


def pack_positions(positions: Tensor) -> Tensor:
    """Positions uint8 [N, K / 4, 2], ascending, to `B_meta`."""
    n, groups, _ = positions.shape
    rows, columns = -(-n // TILE_FEATURES), -(-groups * GROUP // TILE_INPUTS)
    size = (rows * TILE_FEATURES, columns * TILE_INPUTS // GROUP)
    nibbles = torch.full(size, _FIRST_TWO, dtype=torch.int64, device=positions.device)
    nibbles[:n, :groups] = positions[:, :, 0].long() | positions[:, :, 1].long() << 2
    # output tile, warp, upper eight, g, input tile, word, step of two, half, group
    tiles = nibbles.view(rows, 4, 2, 8, columns, 2, 2, 2, 4)
    tiles = tiles.permute(0, 4, 1, 3, 6, 7, 5, 2, 8)  # tile, tile, warp, g, step, half, word, u, i
    words = (tiles << _position_shifts(positions.device)).sum((7, 8))
    return _int32(words.reshape(rows, columns, 128, 2))


def unpack_positions(words: Tensor) -> Tensor:
    """Inverse of `pack_positions`: uint8 [N', K' / 4, 2], padding included."""
    rows, columns = words.shape[:2]
    tiles = words.long().view(rows, columns, 4, 8, 2, 2, 2)[..., None, None]
    nibbles = tiles >> _position_shifts(words.device) & 15
    nibbles = nibbles.permute(0, 2, 7, 3, 1, 6, 4, 5, 8)
    nibbles = nibbles.reshape(rows * TILE_FEATURES, columns * TILE_INPUTS // GROUP)
    return torch.stack([nibbles & 3, nibbles >> 2], 2).to(torch.uint8)


def _position_shifts(device: torch.device) -> Tensor:
    """Bits of group (upper eight, i) in its word: int64 [2, 4]."""
    upper, i = torch.meshgrid(
        torch.arange(2, device=device), torch.arange(4, device=device), indexing="ij"
    )
    return 16 * upper + 4 * i


def _int32(words: Tensor) -> Tensor:
    """Unsigned 32-bit numbers in int64 as int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
