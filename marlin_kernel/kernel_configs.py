"""The kernels that exist, as data, and the pure function that chooses one for a problem.

Each configuration is a frozen dataclass: what the C++ template is instantiated with, what a launch
needs (grid, cluster, shared memory), and the limits within which it may be used. `select_config`
looks at tuned rows first (tuning/<gpu>.json, written by scripts/tune.py) and falls back to an
analytic rule.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from marlin_kernel.compiler import KernelSource
from marlin_kernel.errors import ConfigError
from marlin_kernel.weight_types import WEIGHT_TYPES

TILE_N = 64  # features of a weight tile in device memory
TILE_K = 64  # k of a weight tile
MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
SM_SHARED_BYTES = 228 * 1024  # of one multiprocessor, 1 KB of it reserved per block
MAX_WORKSPACE_FLOATS = 16 << 20
GROUP_SIZES = (-1, 32, 64, 128)  # of uint4b8
MAX_GATHERED_INPUTS = 65472  # indices of 16 bits, one of which means no input; a multiple of 64
SCALARS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
TUNING_DIRECTORY = Path(__file__).parent / "tuning"


def group_sizes(weight_type: str) -> tuple[int, ...]:
    """Group sizes that the kernels of a type are compiled for; -1: one scale per feature.

    A single group with zero points, or with scales of a byte, is repeated (sm80_layout).
    """
    t = WEIGHT_TYPES[weight_type]
    return tuple(g for g in t.group_sizes if g > 0 or t.symmetric)


@functools.cache
def tile_bytes(weight_type: str) -> int:
    """Bytes of the codes of a 64 x 64 tile."""
    return TILE_N * TILE_K * WEIGHT_TYPES[weight_type].bits // 8


@functools.cache
def row_bytes(weight_type: str) -> int:
    """Bytes of the scales and zero points of 64 features and one group."""
    t = WEIGHT_TYPES[weight_type]
    scales = TILE_N * (2 if t.scale == "float16" else 1)
    return scales + TILE_N * {"none": 0, "integer": t.bits, "float": 16}[t.zeros] // 8


def _row_bytes_per_tile(group_size: int, weight_type: str) -> int:
    if group_size == -1:
        return 0
    return max(1, TILE_K // group_size) * row_bytes(weight_type)


@functools.cache
def _read_bytes(weight_type: str) -> float:
    """Bytes read for a 64 x 64 tile, with groups as large as the type allows."""
    return tile_bytes(weight_type) + row_bytes(weight_type) * TILE_K / max(group_sizes(weight_type))


# Multiprocessors that a cluster may lie in. How many of an H200's are in each part of the chip
# differs from one to the next, so this counts on less than all of them.
_DOMAINS = (18, 18, 18, 16, 16, 16, 16, 14)


def resident_clusters(blocks: int, per_multiprocessor: int, multiprocessors: int = 132) -> int:
    """Clusters of so many blocks that are resident together, at least 1."""
    if blocks == 1:
        return multiprocessors * per_multiprocessor
    clusters = sum(domain * per_multiprocessor // blocks for domain in _DOMAINS)
    return max(1, clusters * multiprocessors // 132)


@dataclass(frozen=True)
class SmallBatchShape:
    """What the kernels of csrc/sm90/small_batch.cuh have in common.

    token_tiles: tokens / 8 of a block; warps_n: warps side by side, 64 features each; warps_k:
    warps that share a feature column's k range; split: blocks of the cluster that share it further;
    stages: weight tiles in flight per warp; blocks_per_sm: blocks that registers must leave room
    for.
    """

    token_tiles: int
    warps_n: int
    warps_k: int
    split: int
    stages: int
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def max_tokens(self) -> int:
        return 8 * self.token_tiles

    def storage_with(self, stage_bytes: int) -> int:
        """sizeof(SmallBatchStorage) with weight tiles of `stage_bytes`; the kernel asserts that it
        agrees.
        """
        warps = self.warps_n * self.warps_k
        ring = -(-warps * self.stages * stage_bytes // 16) * 16
        partial = warps * TILE_N * self.max_tokens * 4
        received = (2 if self.split > 1 else 1) * self.warps_n * TILE_N * self.max_tokens * 4
        barriers = -(-warps * self.stages * 8 // 16) * 16 + -(-self.warps_k * 8 // 16) * 16
        return -(-(ring + partial + received + barriers) // 128) * 128

    def resident(self, shared_bytes: int) -> int:
        """Blocks of so much shared memory on a multiprocessor (an estimate)."""
        return max(1, min(self.blocks_per_sm, SM_SHARED_BYTES // (shared_bytes + 1024)))

    def persistent_grid(
        self, column_tiles: int, shared_bytes: int, multiprocessors: int
    ) -> tuple[int, int, int]:
        """Blocks of a launch; each walks over columns gridDim.y blocks apart."""
        clusters = resident_clusters(self.split, self.resident(shared_bytes), multiprocessors)
        return (self.split, min(-(-column_tiles // self.warps_n), clusters), 1)


@dataclass(frozen=True)
class DecodeConfig(SmallBatchShape):
    """One shape of the small-batch kernel of dense weights (csrc/sm90/decode.cuh).

    gathers: blocks take whole rows of activations and pick from them by an index (act-order).
    """

    gathers: bool = False

    def source(self, dtype: str, group_size: int, weight_type: str = "uint4b8") -> KernelSource:
        """dtype: "float16" or "bfloat16"; group_size: one of group_sizes(weight_type)."""
        numbers = (
            max(group_size, 0),
            *(self.token_tiles, self.warps_n, self.warps_k, self.split),
            *(self.stages, self.blocks_per_sm),
            self.storage_bytes(group_size, weight_type),
        )
        arguments = f"weights::{weight_type}, {SCALARS[dtype]}, {', '.join(map(str, numbers))}"
        expression = f"sm90::decode_kernel<sm90::DecodeConfig<{arguments}>>"
        if self.gathers:
            expression = (
                f"sm90::decode_gather_kernel<sm90::Gathering<sm90::DecodeConfig<{arguments}>>>"
            )
        return KernelSource("sm90/decode.cuh", expression)

    def storage_bytes(self, group_size: int, weight_type: str = "uint4b8") -> int:
        """Shared memory beside the activations."""
        return self.storage_with(
            tile_bytes(weight_type) + _row_bytes_per_tile(group_size, weight_type)
        )

    def shared_bytes(
        self, m: int, k_tiles: int, group_size: int, weight_type: str = "uint4b8"
    ) -> int:
        """Dynamic shared memory of a launch with m tokens and K' / 64 weight tiles along k."""
        block_tiles = -(-k_tiles // self.split)
        row = (k_tiles if self.gathers else block_tiles) * TILE_K * 2 + 16
        index = block_tiles * TILE_K * 2 if self.gathers else 0
        return self.storage_bytes(group_size, weight_type) + m * row + index

    def grid(
        self,
        m: int,
        k_tiles: int,
        column_tiles: int,
        group_size: int,
        multiprocessors: int = 132,
        weight_type: str = "uint4b8",
    ) -> tuple[int, int, int]:
        """Blocks of a launch with m tokens."""
        shared = self.shared_bytes(m, k_tiles, group_size, weight_type)
        return self.persistent_grid(column_tiles, shared, multiprocessors)

    def fits(self, m: int, k_tiles: int, group_size: int, weight_type: str = "uint4b8") -> bool:
        if WEIGHT_TYPES[weight_type].bits == 4:
            if group_size in (16, 32) and self.threads * self.blocks_per_sm > 512:
                return False  # several groups per tile need more registers than that leaves
            many = group_size in (-1, 16, 32) or WEIGHT_TYPES[weight_type].zeros != "none"
            if many and self.token_tiles > 1 and self.blocks_per_sm > 1:
                return False  # likewise
        if self.gathers and k_tiles * TILE_K > MAX_GATHERED_INPUTS:
            return False
        return (
            0 < m <= self.max_tokens
            and self.shared_bytes(m, k_tiles, group_size, weight_type) <= MAX_SHARED_BYTES
        )


@dataclass(frozen=True)
class GemmConfig:
    """One shape of the warpgroup kernel (csrc/sm90/gemm.cuh).

    tokens: of a tile; m_tiles: 64-feature tiles of each warpgroup; stages: of the ring;
    blocks_per_sm: blocks that registers must leave room for; stage_tiles: 64-k tiles of a stage (1
    or 2); scale_sums: scales multiply the sums of a group instead of the weights; split: parts of
    the k range, when blocks share a tile of outputs; 0: blocks get equal stretches of k of the
    tiles that are split, wherever these begin and end; cluster: those blocks form a cluster and add
    in its shared memory (otherwise in global memory, and split is an argument of the launch); tail:
    only tiles of the last, incomplete round over the multiprocessors are split; warpgroups: that
    multiply, 2 to 4; leaves_room: registers do for a warp of the launch that gathers the next
    product's activations, too.
    """

    tokens: int
    m_tiles: int
    stages: int
    blocks_per_sm: int
    stage_tiles: int
    scale_sums: bool
    split: int = 1
    cluster: bool = False
    tail: bool = False
    warpgroups: int = 2
    leaves_room: bool = False
    gathers: ClassVar[bool] = False  # its activations are in the order of the weights

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)  # one warpgroup feeds

    @property
    def columns(self) -> int:
        """Column tiles (64 features) of a block."""
        return self.warpgroups * self.m_tiles

    @property
    def can_leave_room(self) -> bool:
        """Of other kernels the registers do for such a warp anyway, or are all needed."""
        return self.blocks_per_sm == 1 and self.warpgroups == 2 and self.tokens <= 128

    def source(self, dtype: str, group_size: int, weight_type: str = "uint4b8") -> KernelSource:
        """dtype: "float16" or "bfloat16"; group_size: one of group_sizes(weight_type)."""
        numbers = (
            max(group_size, 0),
            self.tokens,
            self.warpgroups,
            self.m_tiles,
            self.split if self.cluster else min(self.split, 1),
            self.stages,
            self.blocks_per_sm,
            self.stage_tiles,
            int(self.scale_sums),
            self.storage_bytes(group_size, weight_type),
        )
        arguments = f"weights::{weight_type}, {SCALARS[dtype]}, {', '.join(map(str, numbers))}"
        kernel = "roomy_gemm_kernel" if self.leaves_room else "gemm_kernel"
        expression = f"sm90::{kernel}<sm90::GemmConfig<{arguments}>>"
        return KernelSource("sm90/gemm.cuh", expression)

    def storage_bytes(self, group_size: int, weight_type: str = "uint4b8") -> int:
        """sizeof(GemmStorage); the kernel asserts that it agrees."""
        tokens = 64 if self.m_tiles * self.tokens > 128 else self.tokens  # written in turns
        out = self.warpgroups * tokens * (self.m_tiles * TILE_N + 8) * 2
        if self.cluster:
            out = 16
        barriers = 2 * (-(-self.stages * 8 // 16) * 16) + 16
        return -(-(self._ring_bytes(group_size, weight_type) + out + barriers) // 1024) * 1024

    def _ring_bytes(self, group_size: int, weight_type: str) -> int:
        tokens = self.stage_tiles * self.tokens * TILE_K * 2
        rows = 0 if group_size == -1 else max(1, self.stage_tiles * TILE_K // group_size)
        column = self.stage_tiles * tile_bytes(weight_type) + rows * row_bytes(weight_type)
        return -(-self.stages * (tokens + self.columns * column) // 1024) * 1024

    def shared_bytes(
        self, m: int, k_tiles: int, group_size: int, weight_type: str = "uint4b8"
    ) -> int:
        """Dynamic shared memory of a launch."""
        return self.storage_bytes(group_size, weight_type)

    def tiles(self, m: int, column_tiles: int) -> int:
        """Output tiles of a problem."""
        return -(-column_tiles // self.columns) * -(-m // self.tokens)

    def whole_tiles(self, m: int, column_tiles: int, multiprocessors: int = 132) -> int:
        """Tiles that are not split; they come first."""
        tiles = self.tiles(m, column_tiles)
        if self.split == 1:
            return tiles
        slots = multiprocessors * self.blocks_per_sm
        return tiles // slots * slots if self.tail else 0

    def parts(self, m: int, column_tiles: int, multiprocessors: int = 132) -> int:
        """Parts of a tile that is split, at most."""
        if self.split:
            return self.split
        split = self.tiles(m, column_tiles) - self.whole_tiles(m, column_tiles, multiprocessors)
        return -(-multiprocessors * self.blocks_per_sm // split) + 1 if split else 1

    def grid(
        self,
        m: int,
        k_tiles: int,
        column_tiles: int,
        group_size: int,
        multiprocessors: int = 132,
        weight_type: str = "uint4b8",
    ) -> tuple[int, int, int]:
        """Blocks of a launch."""
        whole = self.whole_tiles(m, column_tiles, multiprocessors)
        each = self.split or -(-k_tiles // self.stage_tiles)  # of a tile that is split
        items = whole + (self.tiles(m, column_tiles) - whole) * each
        if self.cluster:
            return (items, 1, 1)
        return (min(items, multiprocessors * self.blocks_per_sm), 1, 1)

    def workspace(self, m: int, column_tiles: int, multiprocessors: int = 132) -> tuple[int, int]:
        """Floats of partial sums and number of counters that a launch needs."""
        if self.split == 1 or self.cluster:
            return 0, 0
        tiles = self.tiles(m, column_tiles) - self.whole_tiles(m, column_tiles, multiprocessors)
        parts = self.parts(m, column_tiles, multiprocessors)
        return tiles * parts * self.columns * TILE_N * self.tokens, self.warpgroups * tiles

    def fits(self, m: int, k_tiles: int, group_size: int, weight_type: str = "uint4b8") -> bool:
        if group_size == 16 and self.scale_sums:
            return False  # a commit and a wait for every 16 k
        short = (self.tokens, self.m_tiles, self.blocks_per_sm) == (16, 2, 2)
        if short and (group_size == -1 or self.split == 0):
            return False  # of registers: the compiler serialises its products, or spills
        partial = self.columns * TILE_N * (self.tokens + 4) * 4
        return (
            m > 0
            and (not self.leaves_room or self.can_leave_room)
            and self.storage_bytes(group_size, weight_type) <= MAX_SHARED_BYTES
            and (not self.cluster or partial <= self._ring_bytes(group_size, weight_type))
            and self.split <= -(-k_tiles // self.stage_tiles)
        )


KernelConfig = DecodeConfig | GemmConfig
_KINDS = {"decode": DecodeConfig, "gemm": GemmConfig}  # by their names in tuned tables


@dataclass(frozen=True)
class GatherPlan:
    """How csrc/sm90/gather.cuh puts activations into the order of the weights' rows.

    threads: of a block; rows: of activations that a block holds, 0: none, threads pick from device
    memory; part: inputs K' that a block works on; grid: blocks; shared_bytes: dynamic shared memory
    of a block; cluster: neighbouring blocks along x that fetch a row together.
    """

    threads: int
    rows: int
    part: int
    grid: tuple[int, int, int]
    shared_bytes: int
    cluster: int = 1

    def source(self) -> KernelSource:
        numbers = f"{self.threads}, {self.rows}, {self.cluster}"
        expression = f"sm90::gather_kernel<sm90::GatherConfig<{numbers}>>"
        if self.rows == 0:
            expression = f"sm90::pick_kernel<{self.threads}>"
        return KernelSource("sm90/gather.cuh", expression)


_GATHER_PART = 512  # inputs of a block that holds rows, at least
_PICKED_TOKENS = 2  # of which threads pick from device memory, at most


@functools.lru_cache(maxsize=4096)
def gather_plan(
    m: int,
    k: int,
    k_padded: int,
    multiprocessors: int = 132,
    *,
    picks: bool | None = None,
    threads: int | None = None,
    blocks: int | None = None,
    cluster: int | None = None,
) -> GatherPlan:
    """For m > 0 tokens of k inputs, which become k_padded (a multiple of 64). Pure.

    picks: threads pick from device memory, instead of rows in shared memory. threads, blocks,
    cluster: of the latter; up to m = blocks * multiprocessors, blocks share a token's inputs, so
    many on each multiprocessor, up to `cluster` of them fetch a row together, and of more tokens,
    larger blocks take several in turn. None: what was fastest (docs/kernel-log.md).
    """
    if picks is None:
        picks = m <= _PICKED_TOKENS
    if picks:
        threads = threads or 32
        parts = -(-k_padded // (4 * threads))
        grid = (parts, min(m, max(1, 8 * multiprocessors // parts)), 1)
        return GatherPlan(threads, 0, 4 * threads, grid, 0)
    if cluster is None:
        cluster = next(size for limit, size in ((16, 8), (64, 4), (m, 1)) if m <= limit)
    if blocks is None:
        limits = ((64, 1), (multiprocessors, 4), (m, 1))
        blocks = next(number for limit, number in limits if m <= limit)
    slots = blocks * multiprocessors
    parts = max(1, min(slots // m, k_padded // _GATHER_PART))
    rows = 1
    if m > slots:
        rows, threads = 2, 256 if k_padded <= 8192 else 512
    row = -(-k // 8) * 16 + 16
    if 2 * (row + k_padded) > MAX_SHARED_BYTES - 4096:  # long rows
        rows, parts = 1, max(parts, 2)
    cluster = max(c for c in (1, 2, 4, 8) if c <= min(cluster, parts))
    threads = threads or (128 if cluster > 1 else 256)
    parts = parts // cluster * cluster
    part = -(-k_padded // (8 * parts)) * 8
    parts = -(-k_padded // part)
    shared = 16 * -(-rows // 2) + rows * row + 2 * part
    resident = max(1, min(SM_SHARED_BYTES // (shared + 1024), 1024 // threads))
    grid = (parts, min(m, max(1, resident * multiprocessors // parts)), 1)
    if grid[1] < m or parts % cluster:
        cluster = 1
    return GatherPlan(threads, rows, part, grid, shared, cluster)


# ---- the configurations that exist ----

_DECODE_SHAPES = (  # token_tiles, warps_n, warps_k, stages, blocks_per_sm
    (1, 1, 4, 4, 4),
    (1, 1, 4, 6, 3),
    (1, 1, 8, 3, 3),
    (1, 1, 8, 4, 2),
    (1, 1, 8, 5, 2),
    (1, 1, 16, 3, 1),
    (1, 1, 16, 4, 1),
    (1, 2, 2, 4, 4),
    (1, 2, 4, 4, 2),
    (1, 2, 8, 3, 1),
    (1, 2, 8, 4, 1),
    (2, 1, 8, 3, 2),
)
_GEMM_SHAPES = (  # tokens, m_tiles, stages, blocks_per_sm, stage_tiles, scale_sums
    (8, 1, 6, 2, 2, True),
    (8, 2, 4, 2, 2, True),
    (16, 1, 6, 2, 2, True),
    (16, 2, 4, 2, 2, True),
    (16, 2, 10, 1, 2, True),
    (32, 1, 6, 1, 2, True),
    (32, 2, 4, 1, 2, True),
    (32, 1, 4, 2, 2, False),
    (64, 1, 6, 1, 2, True),
    (64, 1, 4, 2, 2, False),
    (64, 2, 8, 1, 1, False),
    (64, 2, 5, 1, 2, True),
    (128, 1, 6, 1, 1, False),
    (128, 1, 3, 1, 2, False),
    (128, 2, 4, 1, 1, False),
    (256, 1, 4, 1, 1, False),
)
_WIDE_SHAPES = (  # warpgroups and the same, of more than two
    (3, 128, 1, 3, 1, 2, False),
    (4, 16, 1, 6, 1, 2, True),
    (4, 32, 1, 5, 1, 2, False),
    (4, 64, 1, 5, 1, 2, False),
)
# 8-bit codes: as many bytes in flight are fewer stages.
_DECODE_SHAPES_8 = (
    (1, 1, 4, 2, 4),
    (1, 1, 4, 3, 4),
    (1, 1, 8, 2, 3),
    (1, 1, 8, 2, 2),
    (1, 1, 8, 3, 2),
    (1, 1, 16, 2, 1),
    (1, 1, 16, 3, 1),
    (1, 2, 2, 2, 4),
    (1, 2, 4, 2, 2),
    (1, 2, 4, 3, 2),
    (1, 2, 8, 2, 1),
    (1, 2, 8, 3, 1),
    (2, 1, 8, 2, 2),
    (2, 1, 8, 3, 1),
)
_GEMM_SHAPES_8 = (
    (8, 1, 5, 2, 2, True),
    (8, 2, 3, 2, 2, True),
    (16, 1, 4, 2, 2, True),
    (16, 2, 5, 1, 2, True),
    (32, 1, 6, 1, 2, True),
    (32, 2, 4, 1, 2, True),
    (32, 1, 4, 2, 2, False),
    (64, 1, 6, 1, 2, True),
    (64, 1, 5, 2, 1, False),
    (64, 2, 7, 1, 1, False),
    (128, 1, 6, 1, 1, False),
    (128, 1, 3, 1, 2, False),
    (128, 2, 4, 1, 1, False),
    (256, 1, 4, 1, 1, False),
)
_WIDE_SHAPES_8 = (
    (3, 128, 1, 3, 1, 2, False),
    (4, 32, 1, 4, 1, 2, False),
    (4, 64, 1, 3, 1, 2, False),
)
# 4-bit codes of other types than uint4b8 may need more registers.
_DECODE_SHAPES_4 = (*_DECODE_SHAPES, (2, 1, 8, 3, 1))
# Groups of 16 k scale weights only.
_GEMM_SHAPES_16 = (
    (8, 1, 6, 2, 2, False),
    (16, 1, 6, 2, 2, False),
    (16, 2, 4, 1, 2, False),
)
_SPLITS = (2, 3, 4, 5, 6, 8)
_SPREAD_TOKENS = 16  # of tiles whose last round is spread evenly
_SPREAD_PARTS = 8  # of a tile, more of which take longer to add than they save
_MANY_TOKENS = 1024  # from here on more of them change nothing
_FEW_TOKENS = 4  # up to so many, the small-batch kernel was the faster one at every shape measured
_INVARIANT_SHAPES = ((32, 4, 2), (64, 4, 2), (128, 3, 1))  # tokens, stages, blocks_per_sm


@functools.cache
def supported_configs(weight_type: str = "uint4b8") -> tuple[KernelConfig, ...]:
    """Every configuration that `select_config` may return for a type."""
    decode_shapes, shapes, wide_shapes = _DECODE_SHAPES, _GEMM_SHAPES, _WIDE_SHAPES
    if WEIGHT_TYPES[weight_type].bits == 8:
        decode_shapes, shapes, wide_shapes = _DECODE_SHAPES_8, _GEMM_SHAPES_8, _WIDE_SHAPES_8
    elif weight_type != "uint4b8":
        decode_shapes = _DECODE_SHAPES_4
    if 16 in group_sizes(weight_type):
        shapes = (*_GEMM_SHAPES_16, *(shape for shape in shapes if not shape[-1]))
    configs: list[KernelConfig] = [
        DecodeConfig(t, wn, wk, split, stages, blocks)
        for t, wn, wk, stages, blocks in decode_shapes
        for split in (1, 2, 4, 8)
    ]
    wide = [(shape, groups) for groups, *shape in wide_shapes]
    for shape, groups in [(shape, 2) for shape in shapes] + wide:
        configs.append(GemmConfig(*shape, warpgroups=groups))
        configs += [GemmConfig(*shape, split, warpgroups=groups) for split in _SPLITS]
        configs += [GemmConfig(*shape, split, True, warpgroups=groups) for split in _SPLITS]
        if shape[0] >= 16:
            configs += [
                GemmConfig(*shape, split, tail=True, warpgroups=groups) for split in _SPLITS
            ]
        if shape[0] >= _SPREAD_TOKENS and groups == 2:
            configs.append(GemmConfig(*shape, split=0, tail=True))
    for tokens, stages, blocks in _INVARIANT_SHAPES:
        configs += [GemmConfig(tokens, 1, stages, blocks, 2, False, s) for s in (1, 2, 4)]
    return tuple(dict.fromkeys(configs))


@functools.cache
def gathering_configs(weight_type: str = "uint4b8") -> tuple[DecodeConfig, ...]:
    """Those that gather activations (act-order); they come from `supported_configs`."""
    return tuple(
        dict.fromkeys(
            _gathering(c) for c in supported_configs(weight_type) if isinstance(c, DecodeConfig)
        )
    )


def _gathering(config: DecodeConfig) -> DecodeConfig:
    """With as many blocks as have the registers for it; rows of more than 8 tokens: one."""
    blocks = min(config.blocks_per_sm, 512 // config.threads) if config.token_tiles == 1 else 1
    return replace(config, blocks_per_sm=blocks, gathers=True)


# ---- choice ----

# Constants of the analytic choice: a random search over them, so that the configurations it ranks
# first come close to the fastest of some thousand measurements on an H200 (docs/kernel-log.md).
_TILE_CYCLES = {8: 67.6, 16: 84.1, 32: 72.0, 64: 93.5, 128: 239.0, 256: 426.0}  # by tokens
_SCALED_WEIGHTS = 2.03  # up to 64 tokens, scaling weights takes so much longer than scaling sums
_LONELY = 1.53  # a block alone on its multiprocessor, up to 64 tokens, takes so much longer
_SPREAD = 1.05  # equal stretches of k take so much longer than by their length
_THREE_WARPGROUPS = 1.1  # with three of them, a tile takes so much longer than with two
_CLOCK = 1650.0  # cycles per us under load
_DRAM_RATE, _ACTIVATION_RATE = 5.79e6, 10.0e6  # bytes per us
_START = 2.04  # us of a launch
_PERSISTENT_ROUND, _ROUND = 1.28, 3.23  # us of each round of blocks
_CLUSTER_SUM, _CLUSTER_SUM_PER_FLOAT = 0.117, 2.56e-5  # us
_MEMORY_SUM, _MEMORY_SUM_PER_FLOAT = 1.01, 1.71e-6
_OUTPUT_PER_FLOAT = 2.48e-4
_OVERLAP = 0.292  # of the shorter of reading and computing, what is not hidden

# The same for the small-batch kernel.
_DECODE_START, _DECODE_SHARED = 0.648, 1.19  # us of a launch; more if it fills shared memory
_DECODE_LATENCY = 1.55  # us from asking for a tile to having it
_DECODE_TILE = {1: 0.0307, 2: 0.0784}  # us of a tile per warp on the multiprocessor
_DECODE_DRAM_RATE, _DECODE_L2_RATE = 5.06e6, 3.8e5  # bytes per us: of the GPU, of a multiprocessor
_DECODE_ROUND, _DECODE_OUTPUT_PER_FLOAT = 0.473, 6.58e-5
_DECODE_CLUSTER, _DECODE_CLUSTER_PER_BLOCK = 0.611, 0.103  # us of a round
_DECODE_OVERLAP = 0.565
_DECODE_GATHER = 1.1  # act-order, counted: instructions of a tile (docs/kernel-log.md)
_FEW_GATHERED_TOKENS = 64  # gathered by one warp in each part of a multiprocessor, at most


def estimate(
    config: KernelConfig,
    m: int,
    k_tiles: int,
    column_tiles: int,
    multiprocessors: int = 132,
    weight_type: str = "uint4b8",
) -> float:
    """Predicted microseconds of a launch, to rank configurations where none was tuned.

    Infinite for configurations that have no point for this problem. The constants were found with
    uint4b8; of other types only the bytes are known to it.
    """
    if isinstance(config, DecodeConfig):
        return _estimate_decode(config, m, k_tiles, column_tiles, multiprocessors, weight_type)
    return _estimate_gemm(config, m, k_tiles, column_tiles, multiprocessors, weight_type)


def _estimate_decode(
    config: DecodeConfig,
    m: int,
    k_tiles: int,
    column_tiles: int,
    multiprocessors: int,
    weight_type: str,
) -> float:
    each_tile = _DECODE_TILE[config.token_tiles] * (_DECODE_GATHER if config.gathers else 1.0)
    row_tiles = k_tiles if config.gathers else k_tiles / config.split
    return estimate_small_batch(
        config,
        k_tiles,
        column_tiles,
        multiprocessors,
        tokens=m,
        row_bytes=row_tiles * TILE_K * 2,
        shared_bytes=config.shared_bytes(m, k_tiles, max(group_sizes(weight_type)), weight_type),
        tile_bytes=_read_bytes(weight_type),
        tile_us=each_tile,
    )


def estimate_small_batch(
    shape: SmallBatchShape,
    k_tiles: int,
    column_tiles: int,
    multiprocessors: int,
    *,
    tokens: int,
    row_bytes: float,
    shared_bytes: int,
    tile_bytes: float,
    tile_us: float,
) -> float:
    """Predicted microseconds of a kernel of csrc/sm90/small_batch.cuh.

    k_tiles, column_tiles: weight tiles along k and n, of `tile_bytes`; row_bytes: of a token's
    activations in a block; shared_bytes: of a block; tile_us: microseconds that a multiprocessor
    takes to multiply one tile.
    """
    resident = shape.resident(shared_bytes)
    blocks = -(-column_tiles // shape.warps_n)
    clusters = shape.persistent_grid(column_tiles, shared_bytes, multiprocessors)[1]
    rounds = -(-blocks // clusters)
    on_one = min(resident, -(-clusters * shape.split // multiprocessors))
    warps = on_one * shape.warps_n * shape.warps_k
    block_tiles = -(-k_tiles // shape.split)
    tiles = rounds * -(-block_tiles // shape.warps_k)  # of a warp
    compute = tiles * max(_DECODE_LATENCY / shape.stages, tile_us * warps)
    memory = k_tiles * column_tiles * tile_bytes / _DECODE_DRAM_RATE
    activations = on_one * tokens * row_bytes / _DECODE_L2_RATE
    each_round = _DECODE_ROUND + tokens * shape.warps_n * TILE_N * _DECODE_OUTPUT_PER_FLOAT
    if shape.split > 1:
        each_round += _DECODE_CLUSTER + shape.split * _DECODE_CLUSTER_PER_BLOCK
    return (
        _DECODE_START
        + _DECODE_SHARED * (shared_bytes + 1024) * resident / SM_SHARED_BYTES
        + activations
        + rounds * each_round
        + max(compute, memory)
        + _DECODE_OVERLAP * min(compute, memory)
    )


def _estimate_gemm(
    config: GemmConfig,
    m: int,
    k_tiles: int,
    column_tiles: int,
    multiprocessors: int,
    weight_type: str,
) -> float:
    resident, columns, tokens = config.blocks_per_sm, config.columns, config.tokens
    cycles = _TILE_CYCLES[tokens]
    if tokens <= 64 and not config.scale_sums:
        cycles *= _SCALED_WEIGHTS
    tiles = config.tiles(m, column_tiles)
    slots = multiprocessors * resident
    blocks, whole_rounds, parts = tiles * config.split, 0, float(config.split)
    if config.tail:
        last = tiles % slots
        blocks, whole_rounds = last * config.split, tiles // slots
        if not last or (config.split and not whole_rounds):
            return math.inf
        if not config.split:
            blocks, parts = slots, slots / last
            if parts > _SPREAD_PARTS:
                return math.inf
    if config.cluster:
        slots = resident_clusters(config.split, resident, multiprocessors) * config.split
    rounds = -(-blocks // slots)
    on_busiest = rounds * resident if rounds > 1 else -(-blocks // multiprocessors)
    if min(on_busiest, resident) <= 1 and tokens <= 64 and config.warpgroups == 2:
        cycles *= _LONELY
    if config.warpgroups == 3:
        cycles *= _THREE_WARPGROUPS
    if not config.split:
        cycles *= _SPREAD
    steps = on_busiest * -(-k_tiles // parts) + whole_rounds * resident * k_tiles
    compute = steps * columns * cycles / _CLOCK
    weights = k_tiles * column_tiles * _read_bytes(weight_type)
    activations = tiles * k_tiles * min(m, tokens) * TILE_K * 2
    memory = weights / _DRAM_RATE + activations / _ACTIVATION_RATE
    floats = columns * TILE_N * min(m, tokens)
    reduction = 0.0
    if config.cluster:
        reduction = _CLUSTER_SUM + floats * config.split * _CLUSTER_SUM_PER_FLOAT
    elif parts != 1:
        reduction = _MEMORY_SUM + blocks * columns * TILE_N * tokens * _MEMORY_SUM_PER_FLOAT
    each_round = (_ROUND if config.cluster else _PERSISTENT_ROUND) + floats * _OUTPUT_PER_FLOAT
    return (
        _START
        + (rounds + whole_rounds) * each_round
        + reduction
        + max(compute, memory)
        + _OVERLAP * min(compute, memory)
    )


def affordable(config: KernelConfig, m: int, column_tiles: int, multiprocessors: int = 132) -> bool:
    """Whether the workspace of a launch stays within MAX_WORKSPACE_FLOATS."""
    if isinstance(config, DecodeConfig):
        return True
    return config.workspace(m, column_tiles, multiprocessors)[0] <= MAX_WORKSPACE_FLOATS


def tuning_path(gpu: str, weight_type: str = "uint4b8", dtype: str = "float16") -> Path:
    """The tuned table of a type on a GPU (`gpu_key`), which may not exist.

    dtype: of the activations, float16 or bfloat16. That of bfloat16 holds what was timed again,
    where the other table's choice need not be the fastest: its weights take more instructions.
    """
    folder = TUNING_DIRECTORY / ("" if weight_type == "uint4b8" else weight_type)
    if dtype != WEIGHT_TYPES[weight_type].activations[0]:
        folder /= dtype
    return folder / f"{gpu}.json"


@functools.cache
def _tuned_rows(
    gpu: str, weight_type: str = "uint4b8", dtype: str = "float16"
) -> dict[tuple[int, int], tuple[tuple[int, KernelConfig], ...]]:
    """By (K' / 64, N' / 64): limits of m and their kernels. What `dtype` has no row for follows the
    type's first dtype of activations."""
    table: dict[tuple[int, int], dict[int, KernelConfig]] = {}
    for name in dict.fromkeys((WEIGHT_TYPES[weight_type].activations[0], dtype)):
        path = tuning_path(gpu, weight_type, name)
        for row in json.loads(path.read_text())["rows"] if path.is_file() else ():
            choices = table.setdefault((row["k"] // TILE_K, row["n"] // TILE_N), {})
            for entry in row["choices"]:
                choices[entry["m"]] = _KINDS[entry["kind"]](**entry["config"])
    rows = {}
    for sizes, choices in table.items():
        limits = sorted(choices)
        last = 1 << 62 if limits[-1] >= _MANY_TOKENS else limits[-1]  # also serves all larger m
        rows[sizes] = tuple((last if m == limits[-1] else m, choices[m]) for m in limits)
    return rows


def act_order_path(gpu: str) -> Path:
    """The table of the fastest ways to gather, of uint4b8, which may not exist."""
    return TUNING_DIRECTORY / "act_order" / f"{gpu}.json"


@functools.cache
def _tuned_act_order(
    gpu: str,
) -> dict[tuple[int, int], tuple[tuple[int, KernelConfig | None], ...]]:
    """By (K' / 64, N' / 64): limits of m, and a kernel, which gathers or has a launch in front that
    does; None: the latter for that of `select_config`."""
    path = act_order_path(gpu)
    if not path.is_file():
        return {}
    return {
        (row["k"] // TILE_K, row["n"] // TILE_N): tuple(
            (entry["m"], _KINDS[entry["kind"]](**entry["config"]) if entry["config"] else None)
            for entry in sorted(row["choices"], key=lambda entry: entry["m"])
        )
        for row in json.loads(path.read_text())["rows"]
    }


def gpu_key(name: str) -> str:
    """Name of the tuned table of a GPU, from the name that its driver reports."""
    return name.lower().replace("nvidia", "").strip().replace(" ", "_")


@functools.lru_cache(maxsize=4096)
def _fitting_configs(
    m: int, k_tiles: int, group_size: int, weight_type: str
) -> tuple[KernelConfig, ...]:
    """Whatever the number of outputs."""
    configs = supported_configs(weight_type)
    return tuple(c for c in configs if c.fits(m, k_tiles, group_size, weight_type))


@functools.lru_cache(maxsize=65536)
def select_config(
    m: int,
    k_tiles: int,
    column_tiles: int,
    group_size: int,
    *,
    batch_invariant: bool = False,
    gpu: str = "h200",
    multiprocessors: int = 132,
    weight_type: str = "uint4b8",
    dtype: str = "float16",
) -> KernelConfig:
    """Choose a kernel for m > 0 tokens and K' / 64 x N' / 64 weight tiles. Pure.

    batch_invariant: the order of a row's additions depends on K and N alone, so its bits are the
    same at every m: one split, scales on the weights. gpu: name of a tuned table. dtype: of the
    activations.
    Raises ConfigError if no configuration fits, which no size that packing accepts brings about.
    """
    if batch_invariant:
        return _select_invariant(m, k_tiles, column_tiles, multiprocessors)
    tuned = _tuned_rows(gpu, weight_type, dtype).get((k_tiles, column_tiles), ())
    for limit, config in tuned:
        if m <= limit and config.fits(m, k_tiles, group_size, weight_type):
            return config
    fitting = [
        c
        for c in _fitting_configs(m, k_tiles, group_size, weight_type)
        if affordable(c, m, column_tiles, multiprocessors)
    ]
    if not fitting:
        raise ConfigError(
            f"no kernel for m={m}, {k_tiles} x {column_tiles} weight tiles of {weight_type}, "
            f"group {group_size}"
        )
    if m <= _FEW_TOKENS:
        fitting = [c for c in fitting if isinstance(c, DecodeConfig)] or fitting
    sizes = (m, k_tiles, column_tiles, multiprocessors, weight_type)
    return min(fitting, key=lambda c: estimate(c, *sizes))


@functools.lru_cache(maxsize=65536)
def select_for_act_order(
    m: int,
    k_tiles: int,
    column_tiles: int,
    group_size: int,
    *,
    batch_invariant: bool = False,
    gpu: str = "h200",
    multiprocessors: int = 132,
    weight_type: str = "uint4b8",
    dtype: str = "float16",
) -> KernelConfig:
    """The same for activations that are not in the order of the weights' rows. Pure.

    What a tuned table has: a kernel that gathers them itself, for few tokens of few inputs, or one
    that does well behind a launch that gathers; else that of `select_config`, behind such a launch
    and, for few tokens, with room for it.
    """
    options = {
        "gpu": gpu,
        "multiprocessors": multiprocessors,
        "weight_type": weight_type,
        "dtype": dtype,
    }
    problem = (m, k_tiles, column_tiles, group_size)
    plain = select_config(*problem, batch_invariant=batch_invariant, **options)
    if batch_invariant or m > _FEW_GATHERED_TOKENS:
        return plain
    if weight_type == "uint4b8":
        choices = _tuned_act_order(gpu).get((k_tiles, column_tiles), ())
        config = next((config for limit, config in choices if m <= limit), None)
        if config is not None and config.fits(m, k_tiles, group_size):
            return config
    return leaving_room(plain)


def leaving_room(config: KernelConfig) -> KernelConfig:
    """The same kernel, with room beside it for the launch that gathers, if it can have that."""
    if isinstance(config, GemmConfig) and config.can_leave_room:
        return replace(config, leaves_room=True)
    return config


def _select_invariant(m: int, k_tiles: int, column_tiles: int, multiprocessors: int) -> GemmConfig:
    """Tokens per tile follow m, everything that orders additions follows K and N."""
    blocks = -(-column_tiles // 2)
    longest = min(4, max(1, k_tiles // 8))
    split = max(s for s in (1, 2, 4) if s == 1 or (s <= longest and blocks * s <= multiprocessors))
    tokens, stages, blocks_per_sm = next(
        (row for row in _INVARIANT_SHAPES if m <= row[0]), _INVARIANT_SHAPES[-1]
    )
    return GemmConfig(tokens, 1, stages, blocks_per_sm, 2, False, split)
