"""The sm_80 kernel (csrc/sm80): its configurations, its launch geometry, and the calls that run it.

It serves Ampere and Ada, and every newer GPU as a fallback; MARLIN_KERNEL_FORCE_SM80=1 selects it
everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from marlin_kernel.errors import ConfigError

HEADER = "sm80/kernel.cuh"
WARP = 32
WARP_FEATURES = 64
FRAGMENT_BYTES = 16  # one accumulator fragment of one lane
FIXED_SPLIT_BLOCKS = 128  # batch_invariant: k ranges x column tiles stay within this many blocks

_SCALARS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


@dataclass(frozen=True)
class Sm80Config:
    """One row of the table of tile shapes; csrc/sm80/tile_config.cuh says what each field means."""

    warp_m: int
    warps_m: int
    warps_n: int
    warps_k: int
    tile_k: int
    stages: int
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

    def template_arguments(self, dtype: torch.dtype, group_size: int) -> str:
        """Arguments of TileConfig; group_size 0 means one scale per feature."""
        numbers = (
            *(self.warp_m, self.warps_m, self.warps_n, self.warps_k),
            *(self.tile_k, self.stages, group_size),
        )
        return ", ".join([_SCALARS[dtype], *map(str, numbers)])

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

    grid: blocks; splits: k ranges per tile, 0 for stream-K; partial_bytes, counters: workspace.
    """

    grid: int
    splits: int
    partial_bytes: int
    counters: int


def geometry(
    config: Sm80Config, m: int, n: int, k_padded: int, sms: int, batch_invariant: bool = False
) -> Geometry:
    """Launch geometry of C[m, n], m, n > 0. With batch_invariant the split knows only K and N.

    Raises ConfigError if K is too large for the kernel.
    """
    columns = -(-n // config.tile_n)
    tiles = -(-m // config.tile_m) * columns
    k_tiles = -(-k_padded // config.tile_k)
    blocks = sms * config.blocks_per_sm
    if batch_invariant:
        splits = max(1, min(k_tiles, FIXED_SPLIT_BLOCKS // columns))
        grid = min(blocks, tiles * splits)
        slots = grid if tiles >= grid else tiles * splits
        counters = min(tiles, grid) * config.output_warps
        return Geometry(grid, splits, slots * config.slot_bytes(), counters)
    grid = min(blocks, tiles * k_tiles)
    if 2 * grid * grid * k_tiles >= 2**32:
        raise ConfigError(f"K={k_padded} is too large for the kernel's 32-bit partition")
    return Geometry(grid, 0, 2 * grid * config.slot_bytes(), 2 * grid * config.output_warps)


# Tile shapes by tokens per block. Up to 32 tokens two warps share a tile and split k; from 64 on a
# warp's accumulators fill its registers, and more tokens mean more warps.
CONFIGS = (
    Sm80Config(warp_m=8, warps_m=1, warps_n=4, warps_k=2, tile_k=64, stages=6),
    Sm80Config(warp_m=16, warps_m=1, warps_n=4, warps_k=2, tile_k=64, stages=5),
    Sm80Config(warp_m=32, warps_m=1, warps_n=4, warps_k=2, tile_k=64, stages=4),
    Sm80Config(warp_m=64, warps_m=1, warps_n=4, warps_k=1, tile_k=64, stages=4),
    Sm80Config(warp_m=64, warps_m=2, warps_n=4, warps_k=1, tile_k=64, stages=3),
)

# The rows for batch_invariant: they differ along tokens only, so that every row of a result is
# summed in the same order whichever of them computes it.
BATCH_INVARIANT_CONFIGS = (
    Sm80Config(warp_m=8, warps_m=1, warps_n=4, warps_k=1, tile_k=64, stages=6, blocks_per_sm=2),
    Sm80Config(warp_m=16, warps_m=1, warps_n=4, warps_k=1, tile_k=64, stages=5, blocks_per_sm=2),
    Sm80Config(warp_m=32, warps_m=1, warps_n=4, warps_k=1, tile_k=64, stages=4, blocks_per_sm=2),
    *CONFIGS[3:],
)
