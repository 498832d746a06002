"""2:4 structured sparsity: of every four consecutive inputs of a feature at most two are not zero.

A compressed weight is two tensors:
    values    [N, K' / 2]  the two kept values of each group of four, in order of k; dtype of the
              weight; K' is K rounded up to a multiple of 32 (values beyond K are zero)
    metadata  int32 [ceil(N / 64), ceil(K / 128), 128, 2]  where they stood, in the order in which
              the sparse matrix instruction wants it

Metadata, from the outside in. A tile describes 64 features x 128 inputs; word `[thread, step]` is
what `thread` of the warpgroup feeds to the instruction of `step` (64 inputs each). With
warp = thread // 32, lane = thread % 32 the word holds
    feature  16 * warp + 8 * (lane % 2) + lane // 4
    inputs   64 * step + 32 * (lane // 2 % 2) ... + 31, that is eight groups of four
and group i of them has bits 4 i .. 4 i + 3: the position (0..3) of its first kept value in the
lower two bits, that of the second in the upper two. The first position is smaller than the second.
Example: a word whose groups all keep positions 1 and 3 is 0xdddddddd (3 << 2 | 1 = 0xd).
Source: PTX ISA, "Sparse matrix storage" of wgmma.mma_async.sp for 8-bit operands; measured on a
GPU by tests/test_sparse_gpu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ConfigError

GROUP = 4  # inputs that keep two values
TILE_FEATURES = 64
TILE_INPUTS = 128
_ALIGNMENT = 32  # inputs: 16 bytes of kept 8-bit values
_FIRST_TWO = 0b0100  # positions 0 and 1: where nothing is kept


def positions_2_4(w: Tensor) -> Tensor:
    """Positions (0..3) of the two kept values of every four: uint8 [N, K / 4, 2], ascending.

    w: [N, K] of any dtype, K a multiple of 4, any device. Values other than zero are kept; a group
    with fewer than two is filled up with the first of its zeros (-0.0 counts as zero).
    Raises ConfigError naming the first group in row order that holds more than two nonzero values.
    """
    if w.dim() != 2 or w.shape[1] % GROUP:
        raise ConfigError(
            f"w has shape {list(w.shape)}; 2:4 sparsity needs [N, K] with K a multiple of {GROUP}: "
            "pad K with zeros"
        )
    nonzero = _nonzero(w).view(w.shape[0], -1, GROUP)
    excess = nonzero.sum(2) > 2
    if bool(excess.any()):
        row, group = divmod(int(excess.flatten().to(torch.uint8).argmax()), excess.shape[1])
        k = GROUP * group
        raise ConfigError(
            f"w[{row}, {k}:{k + GROUP}] holds {int(nonzero[row, group].sum())} nonzero values; 2:4 "
            "sparsity allows two of four: prune first (gptq --sparsity 2:4, or prune_2_4)"
        )
    order = torch.argsort(nonzero.to(torch.uint8), dim=2, descending=True, stable=True)
    return order[:, :, :2].sort(2).values.to(torch.uint8)


def prune_2_4(w: Tensor) -> Tensor:
    """Copy of w [N, K] (float) with the two values of least magnitude of every four set to zero.

    Raises ConfigError if K is no multiple of 4.
    """
    if w.dim() != 2 or w.shape[1] % GROUP:
        raise ConfigError(f"w has shape {list(w.shape)}; K must be a multiple of {GROUP}")
    grouped = w.float().abs().view(w.shape[0], -1, GROUP)
    least = grouped.argsort(dim=2, stable=True)[:, :, :2]
    keep = torch.ones_like(grouped, dtype=torch.bool).scatter_(2, least, False)
    return torch.where(keep.view_as(w), w, torch.zeros((), dtype=w.dtype, device=w.device))


def compress_2_4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Compress a 2:4 sparse weight: (values [N, K' / 2], metadata int32), see the module.

    w: [N, K] as torch.nn.Linear holds it, any dtype and device, K a multiple of 4. Exact:
    `decompress` returns equal values. Raises ConfigError as `positions_2_4` does.
    """
    positions = positions_2_4(w)
    n, k = w.shape
    grouped = _bytes_of(w.contiguous()).view(n, k // GROUP, GROUP, -1)
    index = positions.long().unsqueeze(3).expand(-1, -1, -1, grouped.shape[3])
    kept = grouped.gather(2, index).flatten(1)
    wide = -(-k // _ALIGNMENT) * _ALIGNMENT // 2 * w.element_size()
    kept = torch.nn.functional.pad(kept, (0, wide - kept.shape[1])).contiguous()
    return kept.view(w.dtype), pack_metadata(positions)


def decompress(values: Tensor, metadata: Tensor, k: int | None = None) -> Tensor:
    """Inverse of `compress_2_4`: the dense weight [N, k]; k: inputs, default all that are stored.

    Raises ConfigError if the tensors do not belong together.
    """
    n, half = values.shape
    check_compressed(values, metadata)
    k = 2 * half if k is None else k
    if not 0 < k <= 2 * half:
        raise ConfigError(f"k={k} is not in 1..{2 * half}, what values {list(values.shape)} hold")
    positions = unpack_metadata(metadata, n, 2 * half)
    raw = _bytes_of(values.contiguous()).view(n, half // 2, 2, -1)
    dense = torch.zeros(n, half // 2, GROUP, raw.shape[3], dtype=torch.uint8, device=values.device)
    dense.scatter_(2, positions.long().unsqueeze(3).expand_as(raw), raw)
    return dense.flatten(1).view(values.dtype)[:, :k].contiguous()


def check_compressed(values: Tensor, metadata: Tensor) -> None:
    """Raise ConfigError unless the tensors have the shapes and dtypes of one compressed weight."""
    if values.dim() != 2 or values.shape[1] % (_ALIGNMENT // 2) or 0 in values.shape:
        raise ConfigError(
            f"values have shape {list(values.shape)}; compress_2_4 gives [N, K' / 2] with K' a "
            f"multiple of {_ALIGNMENT}"
        )
    expected = metadata_shape(values.shape[0], 2 * values.shape[1])
    if metadata.dtype != torch.int32 or tuple(metadata.shape) != expected:
        raise ConfigError(
            f"metadata is {metadata.dtype} {list(metadata.shape)}, but values {list(values.shape)} "
            f"belong to int32 {list(expected)}; pass both tensors of one compress_2_4 call"
        )
    if metadata.device != values.device:
        raise ConfigError(f"values are on {values.device}, metadata on {metadata.device}")


def metadata_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """Shape of the metadata of an [n, k] weight."""
    return (-(-n // TILE_FEATURES), -(-k // TILE_INPUTS), 128, 2)


def pack_metadata(positions: Tensor) -> Tensor:
    """Positions uint8 [N, K / 4, 2] to metadata words in instruction order (see the module)."""
    n, groups, _ = positions.shape
    features, inputs, _, _ = metadata_shape(n, GROUP * groups)
    wide = positions.long()
    nibbles = torch.full(
        (features * TILE_FEATURES, inputs * TILE_INPUTS // GROUP),
        _FIRST_TWO,
        dtype=torch.int64,
        device=positions.device,
    )
    nibbles[:n, :groups] = wide[:, :, 0] | wide[:, :, 1] << 2
    # feature tile, warp, upper half of 16 features, feature of 8; input tile, step, half, group
    tiles = nibbles.view(features, 4, 2, 8, inputs, 2, 2, 8)
    shifts = 4 * torch.arange(8, device=positions.device)
    words = (tiles << shifts).sum(7)
    words = words.permute(0, 4, 1, 3, 6, 2, 5).reshape(features, inputs, 128, 2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack_metadata(metadata: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_metadata`: positions uint8 [n, k / 4, 2]."""
    features, inputs = metadata.shape[:2]
    words = metadata.long().view(features, inputs, 4, 8, 2, 2, 2).permute(0, 2, 5, 3, 1, 6, 4)
    shifts = 4 * torch.arange(8, device=metadata.device)
    nibbles = (words.unsqueeze(7) >> shifts & 15).reshape(features * TILE_FEATURES, -1)
    nibbles = nibbles[:n, : k // GROUP]
    return torch.stack([nibbles & 3, nibbles >> 2], 2).to(torch.uint8)


def _nonzero(w: Tensor) -> Tensor:
    if w.dtype.is_floating_point and w.element_size() == 1:
        return (w.view(torch.uint8) & 0x7F) != 0
    return w != 0


def _bytes_of(w: Tensor) -> Tensor:
    """The bytes of a contiguous matrix, uint8 [rows, bytes]."""
    return w.view(torch.uint8)
