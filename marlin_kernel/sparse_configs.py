"""The 2:4 Marlin kernels of compute capability 9.0 that exist, as data, and the pure function that
chooses one.

`select` looks at tuned rows (tuning/sparse/<gpu>.json, written by scripts/tune_sparse.py) and falls
back to an estimate of the time of each configuration.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .compiler import KernelSource
from .kernel_configs import (
    MAX_SHARED_BYTES,
    SCALARS,
    SM_SHARED_BYTES,
    TILE_N,
    SmallBatchShape,
    estimate_small_batch,
)
from .scaled_configs import read_tuned

TILE_K = 128
GROUP_SIZES = (-1, 128)  # that the kernels multiply; others are dequantized
TUNING_DIRECTORY = Path(__file__).parent / "tuning" / "sparse"
POSITION_BYTES = 1024  # of a tile
SCALE_BYTES = 128


def tile_bytes(bits: int, group_size: int) -> int:
    """Bytes of a weight tile (64 features x 128 k): codes, positions, scales."""
    return 512 * bits + POSITION_BYTES + (SCALE_BYTES if group_size > 0 else 0)


@dataclass(frozen=True)
class SparseDecodeConfig(SmallBatchShape):
    """One shape of the small-batch kernel (csrc/sparse/decode.cuh)."""

    def source(self, dtype: str, bits: int, group_size: int) -> KernelSource:
        """dtype: "float16" or "bfloat16"; bits: 4 or 8; group_size: -1 or 128."""
        numbers = (
            bits,
            max(group_size, 0),
            *(getattr(self, field.name) for field in fields(self)),
            self.storage_with(tile_bytes(bits, group_size)),
        )
        arguments = ", ".join(map(str, (SCALARS[dtype], *numbers)))
        expression = f"sparse::decode_kernel<sparse::DecodeConfig<{arguments}>>"
        return KernelSource("sparse/decode.cuh", expression)

    def shared_bytes(self, m: int, k_tiles: int, bits: int, group_size: int) -> int:
        """Dynamic shared memory of a launch with m tokens; k_tiles: weight tiles along k."""
        row = -(-k_tiles // self.split) * TILE_K * 2 + 16
        return self.storage_with(tile_bytes(bits, group_size)) + m * row

    def fits(self, m: int, k_tiles: int, bits: int, group_size: int) -> bool:
        return (
            m <= self.max_tokens
            and self.shared_bytes(m, k_tiles, bits, group_size) <= MAX_SHARED_BYTES
        )

    def grid(
        self, m: int, k_tiles: int, column_tiles: int, bits: int, group_size: int, sms: int
    ) -> tuple[int, int, int]:
        """Blocks of a launch on a GPU of `sms` multiprocessors."""
        shared = self.shared_bytes(m, k_tiles, bits, group_size)
        return self.persistent_grid(column_tiles, shared, sms)


@dataclass(frozen=True)
class SparseConfig:
    """One shape of the warpgroup kernel (csrc/sparse/config.cuh explains the numbers).

    tokens: of a tile; groups: warpgroups that multiply, 64 features each; split: blocks of a
    cluster that share a k range; stages: of the ring; blocks_per_sm: blocks that registers must
    leave room for.
    """

    tokens: int
    groups: int
    split: int
    stages: int
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    def source(self, dtype: str, bits: int, group_size: int) -> KernelSource:
        """dtype: "float16" or "bfloat16"; bits: 4 or 8; group_size: -1 or 128."""
        numbers = (
            bits,
            max(group_size, 0),
            *(getattr(self, field.name) for field in fields(self)),
            self.storage_bytes(bits, group_size),
        )
        arguments = ", ".join(map(str, numbers))
        expression = f"sparse::marlin24_kernel<sparse::Config<{SCALARS[dtype]}, {arguments}>>"
        return KernelSource("sparse/kernel.cuh", expression)

    def storage_bytes(self, bits: int, group_size: int) -> int:
        """sizeof(Storage); the kernel asserts that it agrees."""
        tokens = self.stages * 2 * self.tokens * 128
        ring = tokens + self.stages * self.groups * tile_bytes(bits, group_size)
        out = self.groups * min(self.tokens, 64) * 72 * 2 if self.split == 1 else 16
        barriers = 2 * (-(-self.stages * 8 // 16) * 16)
        return -(-(-(-ring // 1024) * 1024 + out + barriers) // 1024) * 1024

    def shared_bytes(self, m: int, k_tiles: int, bits: int, group_size: int) -> int:
        """Dynamic shared memory of a launch, whatever its sizes."""
        return self.storage_bytes(bits, group_size)

    def fits(self, m: int, k_tiles: int, bits: int, group_size: int) -> bool:
        """k_tiles: weight tiles along k."""
        size = self.storage_bytes(bits, group_size)
        partial = self.groups * TILE_N * (self.tokens + 4) * 4 if self.split > 1 else 0
        return (
            k_tiles >= self.split
            and size <= MAX_SHARED_BYTES
            and self.blocks_per_sm * (size + 1024) <= SM_SHARED_BYTES
            and partial <= size - 4096
        )

    def grid(
        self, m: int, k_tiles: int, column_tiles: int, bits: int, group_size: int, sms: int
    ) -> tuple[int, int, int]:
        """Blocks of a launch on a GPU of `sms` multiprocessors."""
        tiles = -(-column_tiles // self.groups) * -(-m // self.tokens)
        blocks = tiles * self.split if self.split > 1 else min(tiles, sms * self.blocks_per_sm)
        return (blocks, 1, 1)


AnyConfig = SparseConfig | SparseDecodeConfig


_DECODE_SHAPES = (  # token_tiles, warps_n, warps_k, stages of 4 bits, of 8 bits, blocks_per_sm
    (1, 1, 4, 4, 2, 4),
    (1, 1, 8, 3, 2, 2),
    (1, 1, 8, 4, 2, 2),
    (1, 1, 16, 2, 1, 1),
    (1, 1, 16, 3, 2, 1),
    (1, 2, 4, 3, 2, 2),
    (1, 2, 8, 2, 1, 1),
    (1, 2, 8, 3, 2, 1),
    (2, 1, 8, 3, 2, 1),
    (2, 1, 8, 2, 1, 2),
)


_DECODE_TILE = {1: 0.046, 2: 0.1}  # us of a tile on a multiprocessor, counted from dense ones


@functools.cache
def supported_configs(bits: int, group_size: int) -> tuple[AnyConfig, ...]:
    """Every configuration that the library may choose and the tests iterate."""
    shapes = [
        *((t, 1, split, 3) for t in (8, 16, 32) for split in (1, 2, 4, 8)),
        *((t, 2, split, 2) for t in (8, 16, 32) for split in (1, 2, 4, 8)),
        *((t, 2, split, 1) for t in (64, 128) for split in (1, 2, 4)),
        (32, 4, 1, 1),
        (256, 2, 1, 1),
    ]
    if bits == 4:  # with 8 bits it spills
        shapes.append((64, 4, 1, 1))
    small: list[AnyConfig] = [
        SparseDecodeConfig(tokens, warps_n, warps_k, split, stages[bits // 8], blocks)
        for tokens, warps_n, warps_k, *stages, blocks in _DECODE_SHAPES
        for split in (1, 2, 4, 8)
    ]
    found = list(dict.fromkeys(small))
    for tokens, groups, split, blocks in shapes:
        for stages in range(12, 1, -1):
            config = SparseConfig(tokens, groups, split, stages, blocks)
            if config.fits(tokens, split, bits, group_size):
                found.append(config)
                break
    return tuple(found)


def estimate(
    config: AnyConfig, m: int, n: int, k: int, bits: int, multiprocessors: int = 132
) -> float:
    """Rough time in microseconds, to rank configurations where no tuned row exists."""
    k_tiles, column_tiles = math.ceil(k / TILE_K), math.ceil(n / TILE_N)
    if isinstance(config, SparseDecodeConfig):
        if m <= config.max_tokens - 8:
            return math.inf  # a token tile for nothing
        return estimate_small_batch(
            config,
            k_tiles,
            column_tiles,
            multiprocessors,
            tokens=m,
            row_bytes=k_tiles / config.split * TILE_K * 2,
            shared_bytes=config.shared_bytes(m, k_tiles, bits, 128),
            tile_bytes=tile_bytes(bits, 128),
            tile_us=_DECODE_TILE[config.token_tiles],
        )
    blocks = -(-column_tiles // config.groups) * -(-m // config.tokens) * config.split
    rounds = math.ceil(blocks / (multiprocessors * config.blocks_per_sm))
    at_once = min(config.blocks_per_sm, math.ceil(blocks / multiprocessors))
    weights = config.groups * tile_bytes(bits, 128)
    tokens = 2 * config.tokens * 128
    mma = config.groups * 4 * max(config.tokens, 32) / 2
    shared = (weights * 2 + tokens * (1 + config.groups)) / 128
    memory = weights / 19 + tokens / 30
    issue = config.groups * 180 / max(at_once, 1)
    clocks = -(-k_tiles // config.split) * max(mma, shared, memory, issue) * at_once
    epilogue = config.groups * 64 * config.tokens / 16 + (1500 if config.split > 1 else 500)
    return 2.0 + rounds * (clocks + epilogue * at_once) / 1700


def _from_row(**numbers: int) -> AnyConfig:
    return (SparseDecodeConfig if "warps_k" in numbers else SparseConfig)(**numbers)


@functools.cache
def _tuned(gpu: str) -> dict[tuple[int, int, int], list[tuple[int, AnyConfig]]]:
    return read_tuned(TUNING_DIRECTORY / f"{gpu}.json", "bits", _from_row)


@functools.lru_cache(maxsize=65536)
def select(
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    gpu: str = "h200",
    multiprocessors: int = 132,
) -> AnyConfig:
    """The configuration for m tokens, n features, k inputs: tuned, or of least estimated time."""
    k_tiles = math.ceil(k / TILE_K)
    for limit, config in _tuned(gpu).get((bits, k, n), []):
        if m <= limit and config.fits(m, k_tiles, bits, group_size):
            return config
    size = m, k_tiles, bits, group_size
    usable = [c for c in supported_configs(bits, group_size) if c.fits(*size)]
    return min(usable, key=lambda c: (estimate(c, m, n, k, bits, multiprocessors), str(c)))


def as_row(config: AnyConfig) -> dict[str, int]:
    """The numbers of a configuration, for tuned tables."""
    return asdict(config)
