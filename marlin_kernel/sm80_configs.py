"""Configurations of the sm_80 kernel (csrc/sm80) as data, and the geometry of a launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin_kernel.compiler import KernelSource
from marlin_kernel.errors import ConfigError

HEADER = "sm80/kernel.cuh"
WARP = 32
WARP_FEATURES = 64
FRAGMENT_BYTES = 16  # one accumulator fragment of one lane
MIN_K_PER_BLOCK = 512  # shorter k ranges cost more in adding up than they save
FIXED_SPLIT_BLOCKS = 256  # batch_invariant: k ranges x column tiles stay within this many blocks

SCALARS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


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

    def source(self, dtype: torch.dtype, group_size: int) -> KernelSource:
        """What to compile; group_size 0 means one scale per feature."""
        arguments = self.template_arguments(dtype, group_size)
        return KernelSource(HEADER, f"sm80::gemm_w4a16<sm80::TileConfig<{arguments}>>")

    def template_arguments(self, dtype: torch.dtype, group_size: int) -> str:
        """Arguments of TileConfig; group_size 0 means one scale per feature."""
        numbers = (
            *(self.warp_m, self.warps_m, self.warps_n, self.warps_k),
            *(self.tile_k, self.stages, str(self.scale_weights).lower(), group_size),
        )
        return ", ".join([SCALARS[dtype], *map(str, numbers)])

    def shared_bytes(self, group_size: int) -> int:
        """Size of the kernel's SharedStorage (the emulator tests compare it with sizeof)."""
        fragments = self.warp_m // 8 * 4
        stage = self.tile_k * self.tile_n // 2 + self.tile_m * self.tile_k * 2
        scales = max(1, self.tile_k // group_size) * self.tile_n * 2 if group_size else 0
        total = self.stages * (stage + scales) if group_size else self.stages * stage + 16
        reduced = (self.warps_k - 1) * self.output_warps * fragments * WARP
        total += FRAGMENT_BYTES * max(1, reduced)
        total += self.output_warps * 8 * (WARP_FEATURES + 8) * 2
        return -(-total // 128) * 128

    def slot_bytes(self) -> int:
        """Workspace bytes of one partial tile."""
        return self.tile_m * self.tile_n * 4


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
        return Geometry(grid, splits, in_turn, slots * config.slot_bytes(), counters)
    grid = max(1, min(blocks, tiles * k_tiles * config.tile_k // min_k))
    if 2 * grid * grid * k_tiles >= 2**32:
        raise ConfigError(f"K={k_padded} is too large for the kernel's 32-bit partition")
    slots, counters = 2 * grid, 2 * grid * config.output_warps
    return Geometry(grid, 0, False, slots * config.slot_bytes(), counters)


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
# (up to how many tokens, row): the first that takes them and fits is used
_CHOICES = (
    (8, _TOKENS_8),
    (16, _TOKENS_16),
    (32, _TOKENS_32),
    (128, _TOKENS_64),
    (128, _TOKENS_64_SMALL),
    (_ANY, _MANY_TOKENS),
    (_ANY, _MANY_TOKENS_SMALL),
)
# These add up in the same order along k; they differ in tokens per tile and in ring depth only.
_BATCH_INVARIANT_CHOICES = (
    *_CHOICES[:3],
    (_ANY, _TOKENS_64),
    (_ANY, _TOKENS_64_SMALL),
)
CONFIGS = tuple(row for _, row in _CHOICES)
BATCH_INVARIANT_CONFIGS = tuple(row for _, row in _BATCH_INVARIANT_CHOICES)


def shipped_sources() -> list[KernelSource]:
    """Every kernel that `sm80_path.gemm` can ask for."""
    return [
        config.source(dtype, group_size)
        for config in CONFIGS
        for dtype in SCALARS
        for group_size in (0, 32, 64, 128)
    ]


def select_config(m: int, group_size: int, shared_limit: int, batch_invariant: bool) -> Sm80Config:
    """The row for m tokens.

    shared_limit: bytes of shared memory that a block may have; group_size 0: one scale per feature.
    Raises ConfigError if nothing fits.
    """
    for tokens, row in _BATCH_INVARIANT_CHOICES if batch_invariant else _CHOICES:
        if m <= tokens and row.shared_bytes(group_size) <= shared_limit:
            return row
    raise ConfigError(f"no kernel fits {shared_limit} bytes of shared memory per block")
