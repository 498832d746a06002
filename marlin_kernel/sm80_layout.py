"""On-disk Marlin tensors (FORMAT.md) to what the sm_80 kernels take, and back.

`B` stays as it is: its 16 x 64 tiles hold whole operand fragments. Scales and zero points come in
the order in which lanes read them. Act-order becomes a permutation of the activations:

whole layer     rows of `B` are sorted by group on disk; perm = argsort(g_idx), group size as stored
shard of K      (k_full=False) groups have any number of inputs. Rows are sorted by group here, and
                every group is filled up to whole runs of RUN rows by rows that weigh zero (perm =
                -1): an ordinary layer whose groups are the runs, with scales repeated
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .formats import LayerSpec
from .layout import (
    ONE_GROUP_WITH_ZEROS,
    PAD_K,
    SHARD_GROUP_SIZE,
    TILE_N,
    permute_columns,
    unpermute_columns,
    zero_order,
)
from .packing import pack, pack_rows, unpack, unpack_rows
from .weight_types import WeightType

RUN = SHARD_GROUP_SIZE


@dataclass(frozen=True)
class KernelTensors:
    """A layer as the sm_80 kernels take it.

    weights: int32 words of K' x N'; scales: [K' / group_size, N'] in the stored order, or [1, N']
    in natural order (group_size 0); zeros: int32 words or float16, or None; perm: int32 [K'],
    column of the activations for each row (-1: none), or None; global_scale: float32 [1] or None;
    group_size: inputs per scale, 0 for one scale per feature.
    """

    weights: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    global_scale: Tensor | None
    group_size: int

    @property
    def k_padded(self) -> int:
        return self.weights.shape[0] * 16

    @property
    def n_padded(self) -> int:
        return self.scales.shape[1]


def repeated_group(wtype: WeightType) -> int:
    """Inputs of each copy of the scales of a layer with one group; 0: they are not repeated."""
    if wtype.symmetric and wtype.scale == "float16":
        return 0  # one scale per feature multiplies the sums
    known = [g for g in wtype.group_sizes if g > 0]
    return ONE_GROUP_WITH_ZEROS if -1 in wtype.group_sizes else known[0]


def kernel_tensors(tensors: Mapping[str, Tensor], spec: LayerSpec) -> KernelTensors:
    """Convert a layer's on-disk tensors, by suffix, on the device they are on."""
    wtype = spec.weight_type
    words, scales, zeros = tensors["B"], tensors["s"], tensors.get("z")
    grouped = scales.shape[0] > 1
    if wtype.zeros == "integer":
        zeros = _kernel_zeros(zeros, wtype, scales.shape[1])
    group_size, perm = spec.group_size, None
    if not spec.k_full:
        words, scales, perm = _sort_shard(words, scales, tensors["g_idx"], spec)
        group_size = RUN
    elif spec.act_order:
        perm = torch.argsort(tensors["g_idx"], stable=True).int()
        perm = torch.nn.functional.pad(perm, (0, words.shape[0] * 16 - spec.k), value=-1)
    if not grouped and spec.k_full:
        # natural order; the kernel's groups, where there are any, want it permuted again
        scales, group_size = unpermute_columns(scales, grouped=False), 0
        if wtype.zeros == "float":
            zeros = unpermute_columns(zeros, grouped=False)
        if repeated_group(wtype):
            group_size = repeated_group(wtype)
            rows = -(-words.shape[0] * 16 // group_size)
            scales = permute_columns(scales, grouped=True)
            if wtype.zeros == "float":
                zeros = permute_columns(zeros, grouped=True)
            scales = _repeat(scales, rows)
            zeros = None if zeros is None else _repeat(zeros, rows)
    contiguous = [None if t is None else t.contiguous() for t in (words, scales, zeros)]
    return KernelTensors(*contiguous, perm, tensors.get("global_scale"), group_size)


def stored_tensors(held: KernelTensors, spec: LayerSpec) -> dict[str, Tensor]:
    """On-disk tensors, by suffix, of a layer that `kernel_tensors` converted. Its inverse.

    Raises ConfigError for a shard of K, whose groups can no longer be told.
    """
    wtype, scales, zeros = spec.weight_type, held.scales, held.zeros
    words, out = held.weights, {}
    groups = spec.packed.groups
    if not spec.k_full:
        raise ConfigError(
            "a shard of K (k_full=False) cannot be restored once it is prepared; save the whole "
            "layer, or the shard before prepare()"
        )
    if held.perm is not None:
        g_idx = torch.empty(spec.k, dtype=torch.int32, device=words.device)
        g_idx[held.perm[: spec.k].long()] = (
            torch.arange(spec.k, dtype=torch.int32, device=words.device) // spec.group_size
        )
        out["g_idx"] = g_idx
    if groups == 1:
        scales = _one_group(scales[:1], held.group_size)
    if wtype.zeros == "integer":
        out["z"] = _natural_zeros(zeros[:groups], wtype, held.n_padded)
    elif wtype.zeros == "float":
        out["z"] = _one_group(zeros[:1], held.group_size) if groups == 1 else zeros
    if held.global_scale is not None:
        out["global_scale"] = held.global_scale
    return {"B": words, "s": scales.contiguous()} | out


def _one_group(values: Tensor, group_size: int) -> Tensor:
    if group_size > 0:
        values = unpermute_columns(values, grouped=True)
    return permute_columns(values, grouped=False)


def _repeat(values: Tensor, rows: int) -> Tensor:
    if values.dtype == torch.float8_e4m3fn:
        return _repeat(values.view(torch.uint8), rows).view(values.dtype)
    return values.expand(rows, values.shape[1])


def _kernel_zeros(words: Tensor, wtype: WeightType, n_padded: int) -> Tensor:
    natural = unpack_rows(words, wtype.bits, n_padded)
    order = zero_order(wtype.bits).to(words.device)
    blocks = natural.view(natural.shape[0], -1, TILE_N)[:, :, order]
    return pack_rows(blocks.reshape(natural.shape), wtype.bits)


def _natural_zeros(words: Tensor, wtype: WeightType, n_padded: int) -> Tensor:
    stored = unpack_rows(words, wtype.bits, n_padded)
    order = torch.argsort(zero_order(wtype.bits)).to(words.device)
    blocks = stored.view(stored.shape[0], -1, TILE_N)[:, :, order]
    return pack_rows(blocks.reshape(stored.shape), wtype.bits)


def shard_rows(g_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a shard sorted by group, each group filled up to whole runs of RUN rows.

    g_idx: int [K]. Returns (perm int32 [K'], -1 for filling; group int64 [K' / RUN] of each run);
    K' is a multiple of 64.
    """
    order = torch.argsort(g_idx, stable=True)
    present, counts = torch.unique_consecutive(g_idx[order], return_counts=True)
    runs = -(-counts // RUN)
    total = int(runs.sum())
    runs_padded = -(-total * RUN // PAD_K) * PAD_K // RUN
    perm = torch.full((runs_padded * RUN,), -1, dtype=torch.int32, device=g_idx.device)
    first_row = (torch.cumsum(runs, 0) - runs) * RUN
    first_input = torch.cumsum(counts, 0) - counts
    shift = torch.repeat_interleave(first_row - first_input, counts)
    perm[torch.arange(order.numel(), device=g_idx.device) + shift] = order.int()
    group = torch.repeat_interleave(present.long(), runs)
    return perm, torch.nn.functional.pad(group, (0, runs_padded - total))


def _sort_shard(
    words: Tensor, scales: Tensor, g_idx: Tensor, spec: LayerSpec
) -> tuple[Tensor, Tensor, Tensor]:
    wtype = spec.weight_type
    codes = unpack(words, wtype)[: spec.k]
    perm, group = shard_rows(g_idx)
    filled = torch.nn.functional.pad(codes, (0, 0, 0, 1), value=wtype.midpoint)
    rows = torch.where(perm >= 0, perm, spec.k).long()
    grouped = scales.shape[0] > 1
    scales = unpermute_columns(scales, grouped)[group]
    return pack(filled[rows], wtype), permute_columns(scales, grouped=True), perm


# ---- 8-bit activations ---------------------------------------------------------------------------

# Position i of 16 holds input K_ORDER[i]: what a lane feeds to mma.m16n8k32 lies in one word
# (csrc/dequant/eight_bit.cuh).
K_ORDER = tuple(2 * t + offset for t in range(4) for offset in (0, 1, 8, 9))


def kernel_activations(codes: Tensor, k_padded: int) -> Tensor:
    """Quantized activations in the order of the kernels, filled up with zeros.

    codes: int8 or float8_e4m3fn [M, K]. Returns bytes of the same dtype [M, k_padded].
    """
    values = codes.view(torch.uint8)
    values = torch.nn.functional.pad(values, (0, k_padded - codes.shape[1]))
    order = torch.tensor(K_ORDER, device=codes.device)
    return values.view(codes.shape[0], -1, 16)[:, :, order].reshape(values.shape).view(codes.dtype)
