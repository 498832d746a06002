"""Configurations of the sm_80 kernel (csrc/sm80) as data, and the geometry of a launch.

A kernel is a tile shape (`Sm80Config`, a row of the table) and the types it is compiled for
(`KernelTypes`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .compiler import KernelSource
from .errors import ConfigError
from .layout import ONE_GROUP_WITH_ZEROS, SHARD_GROUP_SIZE
from .validity import ARCHITECTURES, Combination, combinations
from .weight_types import WEIGHT_TYPES, WeightType

HEADER = "sm80/kernel.cuh"
HEADER_SM75 = "sm75/kernel.cuh"
WARP = 32
WARP_FEATURES = 64
FRAGMENT_BYTES = 16  # one accumulator fragment of one lane
MIN_K_PER_BLOCK = 512  # shorter k ranges cost more in adding up than they save
FIXED_SPLIT_BLOCKS = 256  # batch_invariant: k ranges x column tiles stay within this many blocks

_CPP = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "int8": "int8_t",
    "float8_e4m3fn": "float8_e4m3",
}
_ACTIVATION_BYTES = {"float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
_SCALE_BYTES = {"float16": 2, "float8_e4m3fn": 1, "e8m0": 1}


@dataclass(frozen=True)
class KernelTypes:
    """What a kernel is compiled for, besides its tile shape.

    weight_type: name in the type table; activation, output: names of dtypes; group_size: inputs per
    scale, 0 for one scale per feature; permuted: activations are gathered by an index; reduce_half:
    blocks exchange sums in fp16; sm75: without asynchronous copies and with the products of sm_75.
    """

    weight_type: str = "uint4b8"
    activation: str = "float16"
    output: str = "float16"
    group_size: int = 128
    permuted: bool = False
    reduce_half: bool = False
    sm75: bool = False

    @property
    def weight(self) -> WeightType:
        return WEIGHT_TYPES[self.weight_type]

    @property
    def eight_bit(self) -> bool:
        """Activations are quantized."""
        return _ACTIVATION_BYTES[self.activation] == 1


def kernel_group_size(t: WeightType, group_size: int) -> int:
    """GROUP_SIZE of the kernel for a layer's group size (-1: one group)."""
    if group_size != -1:
        return group_size
    return ONE_GROUP_WITH_ZEROS if not t.symmetric else 0


def kernel_types(c: Combination, *, permuted: bool = False, sm75: bool = False) -> KernelTypes:
    """The types of the kernel that serves a combination.

    permuted: the kernel gathers activations itself (few tokens; else they are gathered before).
    """
    return KernelTypes(
        c.weight_type.name,
        c.activation,
        c.output,
        # a shard of an act-order layer has its groups cut into runs of SHARD_GROUP_SIZE inputs
        kernel_group_size(c.weight_type, c.group_size if c.k_full else SHARD_GROUP_SIZE),
        permuted,
        c.reduction == "float16",
        sm75,
    )


@dataclass(frozen=True)
class Sm80Config:
    """One row of the table of tile shapes; csrc/sm80/tile_config.cuh says what each field means."""

    warp_m: int
    warps_m: int
    warps_n: int
    warps_k: int
    tile_k: int
    stages: int
    scale_weights: bool
    blocks_per_sm: int = 1

    @property
    def tile_m(self) -> int:
        return self.warp_m * self.warps_m

    @property
    def tile_n(self) -> int:
        return WARP_FEATURES * self.warps_n

    @property
    def output_warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        return self.output_warps * self.warps_k * WARP

    def source(self, types: KernelTypes) -> KernelSource:
        """What to compile."""
        header = HEADER_SM75 if types.sm75 else HEADER
        arguments = self.template_arguments(types)
        return KernelSource(header, f"sm80::gemm<sm80::TileConfig<{arguments}>>")

    def template_arguments(self, types: KernelTypes) -> str:
        """Arguments of TileConfig."""
        names = (_CPP[types.activation], _CPP[types.output])
        numbers = (self.warp_m, self.warps_m, self.warps_n, self.warps_k, self.tile_k, self.stages)
        flags = (types.permuted, types.reduce_half)
        return ", ".join(
            [
                f"weights::{types.weight_type}",
                *names,
                *map(str, numbers),
                str(self.scale_weights).lower(),
                str(types.group_size),
                *(str(flag).lower() for flag in flags),
            ]
        )

    def shared_bytes(self, types: KernelTypes) -> int:
        """Size of the kernel's SharedStorage (the emulator tests compare it with sizeof)."""
        t = types.weight
        fragments = self.warp_m // 8 * 4
        stage = self.tile_k * self.tile_n * t.bits // 8
        stage += self.tile_m * self.tile_k * _ACTIVATION_BYTES[types.activation]
        rows = max(1, self.tile_k // types.group_size) if types.group_size else 0
        zeros = {"none": 0, "integer": t.bits, "float": 16}[t.zeros]  # bits for one column
        stage += rows * self.tile_n * _SCALE_BYTES[t.scale]
        stage += rows * self.tile_n * zeros // 8
        total = self.stages * stage + 16 * ((rows == 0) + (zeros == 0))
        reduced = (self.warps_k - 1) * self.output_warps * fragments * WARP
        total += FRAGMENT_BYTES * max(1, reduced)
        total += self.output_warps * 8 * (WARP_FEATURES + 8) * 2
        return -(-total // 128) * 128

    def slot_bytes(self, types: KernelTypes) -> int:
        """Workspace bytes of one partial tile."""
        return self.tile_m * self.tile_n * (2 if types.reduce_half else 4)


@dataclass(frozen=True)
class Geometry:
    """How one multiplication is laid over the GPU.

    grid: blocks; splits: k ranges per tile, 0 for stream-K; in_turn: with splits, one block takes
    all ranges of a tile; partial_bytes, counters: workspace.
    """

    grid: int
    splits: int
    in_turn: bool
    partial_bytes: int
    counters: int


def geometry(
    config: Sm80Config,
    types: KernelTypes,
    m: int,
    n: int,
    k_padded: int,
    blocks: int,
    batch_invariant: bool = False,
    min_k: int = MIN_K_PER_BLOCK,
) -> Geometry:
    """Launch geometry of C[m, n], m, n > 0. With batch_invariant the split knows only K and N.

    blocks: how many the GPU runs at once (the sums of batch_invariant do not depend on it); min_k:
    K of a block's share below which more blocks are not worth it. Raises ConfigError if K is too
    large for the kernel.
    """
    columns = -(-n // config.tile_n)
    tiles = -(-m // config.tile_m) * columns
    k_tiles = -(-k_padded // config.tile_k)
    if batch_invariant:
        splits = max(1, min(k_tiles, k_padded // min_k, FIXED_SPLIT_BLOCKS // columns))
        in_turn = tiles >= blocks or tiles * splits > 2 * blocks
        grid = min(blocks, tiles if in_turn else tiles * splits)
        slots = grid if in_turn else tiles * splits
        counters = tiles * config.output_warps if not in_turn else 0
        return Geometry(grid, splits, in_turn, slots * config.slot_bytes(types), counters)
    grid = max(1, min(blocks, tiles * k_tiles * config.tile_k // min_k))
    if 2 * grid * grid * k_tiles >= 2**32:
        raise ConfigError(f"K={k_padded} is too large for the kernel's 32-bit partition")
    slots, counters = 2 * grid, 2 * grid * config.output_warps
    return Geometry(grid, 0, False, slots * config.slot_bytes(types), counters)


def _row(
    warp_m: int,
    warps: tuple[int, int, int],
    tile_k: int,
    stages: int,
    *,
    scale: str,
    blocks_per_sm: int = 1,
) -> Sm80Config:
    return Sm80Config(warp_m, *warps, tile_k, stages, scale == "weights", blocks_per_sm)


# Warps are counted along tokens, features and k. Measured on an H200, "sums" beats "weights" by up
# to 7 % wherever its second set of accumulators fits, that is up to 32 tokens per warp.
_TOKENS_8 = _row(8, (1, 4, 1), 128, 4, scale="sums", blocks_per_sm=2)
_TOKENS_16 = _row(16, (1, 4, 1), 128, 4, scale="sums", blocks_per_sm=2)
_TOKENS_32 = _row(16, (2, 4, 1), 128, 3, scale="sums")
_TOKENS_64 = _row(32, (2, 4, 1), 128, 3, scale="sums")
_MANY_TOKENS = _row(64, (1, 8, 1), 64, 4, scale="weights")
# the last two for GPUs whose blocks have only 99 KB of shared memory
_TOKENS_64_SMALL = _row(32, (2, 4, 1), 128, 2, scale="sums")
_MANY_TOKENS_SMALL = _row(64, (2, 4, 1), 64, 3, scale="weights")

_ANY = 2**31
Choices = tuple[tuple[int, Sm80Config], ...]
# (up to how many tokens, row): the first that takes them and fits is used
_CHOICES: Choices = (
    (8, _TOKENS_8),
    (16, _TOKENS_16),
    (32, _TOKENS_32),
    (128, _TOKENS_64),
    (128, _TOKENS_64_SMALL),
    (_ANY, _MANY_TOKENS),
    (_ANY, _MANY_TOKENS_SMALL),
)
# These add up in the same order along k; they differ in tokens per tile and in ring depth only.
_BATCH_INVARIANT_CHOICES: Choices = (
    *_CHOICES[:3],
    (_ANY, _TOKENS_64),
    (_ANY, _TOKENS_64_SMALL),
)
# 8-bit weights: stages of half as many inputs have as many bytes.
_CHOICES_8_BIT: Choices = (
    (8, _row(8, (1, 4, 1), 64, 5, scale="sums", blocks_per_sm=2)),
    (16, _row(16, (1, 4, 1), 64, 5, scale="sums", blocks_per_sm=2)),
    (32, _row(16, (2, 4, 1), 64, 4, scale="sums")),
    (128, _row(32, (2, 4, 1), 64, 4, scale="sums")),
    (128, _row(32, (2, 4, 1), 64, 3, scale="sums")),
    (_ANY, _row(64, (1, 8, 1), 64, 4, scale="weights")),
    (_ANY, _row(32, (2, 4, 1), 64, 3, scale="sums")),
)
# 8-bit activations: sums are scaled, so 32 tokens per warp at most.
_CHOICES_8_BIT_ACTIVATIONS: Choices = (
    (8, _row(8, (1, 4, 1), 128, 4, scale="sums", blocks_per_sm=2)),
    (8, _row(8, (1, 4, 1), 128, 2, scale="sums")),
    (16, _row(16, (1, 4, 1), 128, 4, scale="sums", blocks_per_sm=2)),
    (32, _row(16, (2, 4, 1), 128, 3, scale="sums")),
    (_ANY, _row(32, (2, 4, 1), 128, 3, scale="sums")),
    (_ANY, _row(32, (2, 4, 1), 128, 2, scale="sums")),
)
# FP8 products need more registers (sm_90 converts the operands): 16 tokens per warp at most.
_CHOICES_FP8_ACTIVATIONS: Choices = (
    *_CHOICES_8_BIT_ACTIVATIONS[:2],
    (_ANY, _row(16, (2, 4, 1), 128, 3, scale="sums")),
    (_ANY, _row(16, (2, 4, 1), 128, 2, scale="sums")),
)
# sm_75: 64 KB of shared memory, and copies through registers, so that two stages are enough
_CHOICES_SM75: Choices = (
    (8, _row(8, (1, 4, 1), 64, 2, scale="sums")),
    (16, _row(16, (1, 4, 1), 64, 2, scale="sums")),
    (_ANY, _row(32, (1, 4, 1), 64, 2, scale="sums")),
)
_CHOICES_SM75_8_BIT_ACTIVATIONS: Choices = (
    (8, _row(8, (1, 2, 2), 128, 2, scale="sums")),
    (_ANY, _row(16, (1, 2, 2), 128, 2, scale="sums")),
)


@functools.cache
def choices(types: KernelTypes, batch_invariant: bool = False) -> Choices:
    """(up to how many tokens, row): the rows for some types, smallest first."""
    t = types.weight
    if types.activation == "float8_e4m3fn":
        table = _CHOICES_FP8_ACTIVATIONS
    elif types.eight_bit:
        table = _CHOICES_SM75_8_BIT_ACTIVATIONS if types.sm75 else _CHOICES_8_BIT_ACTIVATIONS
    elif types.sm75:
        table = _CHOICES_SM75
    elif t.bits == 8:
        table = _CHOICES_8_BIT
        if batch_invariant:
            table = (*table[:3], *((_ANY, row) for tokens, row in table if tokens == 128))
    else:
        table = _BATCH_INVARIANT_CHOICES if batch_invariant else _CHOICES
    plain = types.weight_type == "uint4b8" and types.group_size > 0
    if not (plain or batch_invariant or types.sm75):
        # what else they need does not fit the registers beside 64 tokens per warp (sm_120 spills)
        few = tuple(choice for choice in table if choice[1] != _MANY_TOKENS_SMALL)
        table = table if few == table else (*few, (_ANY, _TOKENS_64_SMALL))
    if t.zeros == "float":  # whose subtraction takes too many registers for 64 tokens per warp
        narrow = tuple((tokens, row) for tokens, row in table if row.warp_m < 64)
        table = (*narrow, *((_ANY, row) for _, row in narrow if row.warp_m == 32))
    if t.scale != "float16":  # scales of one byte multiply weights
        table = tuple((tokens, replace(row, scale_weights=True)) for tokens, row in table)
    return table


def configs(types: KernelTypes, batch_invariant: bool = False) -> tuple[Sm80Config, ...]:
    """All rows that `select_config` may choose for some types."""
    return tuple(dict.fromkeys(row for _, row in choices(types, batch_invariant)))


GATHER_TOKENS = 16  # up to so many tokens the kernel gathers act-order activations itself


def all_kernel_types(capability: str | None = None) -> Iterator[KernelTypes]:
    """The types of every kernel that a valid combination needs; capability: of one GPU family."""
    sm75 = capability == "7.5"
    seen = set()
    for c in combinations(capability):
        for permuted in (False, True) if c.act_order else (False,):
            types = kernel_types(c, permuted=permuted, sm75=sm75)
            if types not in seen:
                seen.add(types)
                yield types


def kernels(capability: str) -> Iterator[tuple[KernelTypes, Sm80Config]]:
    """Every kernel that `sm80_path.gemm` can ask for on a GPU family.

    A kernel that gathers activations exists for few tokens only.
    """
    limit = SHARED_LIMITS[ARCHITECTURES[capability]]
    for types in all_kernel_types(capability):
        for tokens, row in choices(types):
            if types.permuted and tokens > GATHER_TOKENS:
                continue
            if row.shared_bytes(types) <= limit:
                yield types, row


# Shared memory that a block may have, in bytes, by compilation target.
SHARED_LIMITS = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90a": 227 << 10,
    "sm_120": 99 << 10,
}


def select_config(
    m: int, types: KernelTypes, shared_limit: int, batch_invariant: bool
) -> Sm80Config:
    """The row for m tokens.

    shared_limit: bytes of shared memory that a block may have.
    Raises ConfigError if nothing fits.
    """
    for tokens, row in choices(types, batch_invariant):
        if m <= tokens and row.shared_bytes(types) <= shared_limit:
            return row
    raise ConfigError(f"no kernel fits {shared_limit} bytes of shared memory per block")
