"""The sm_90a kernels for packed weights and 8-bit activations, as data, and what chooses one.

`select_config` looks at tuned rows (tuning/sm90_8bit/<gpu>.json, written by scripts/tune_w4a8.py)
and falls back to an estimate of the time of each configuration.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .compiler import KernelSource
from .scaled_configs import MAX_SHARED_BYTES, SM_SHARED_BYTES, STAGE_K, read_tuned
from .weight_types import WEIGHT_TYPES

TILE_FEATURES = 64  # of one warpgroup, and of a record
TUNING_DIRECTORY = Path(__file__).parent / "tuning" / "sm90_8bit"
# Weight type -> activations that the kernel multiplies it with.
TYPES = {
    "uint4b8": ("int8", "float8_e4m3fn"),
    "uint4": ("int8",),
    "uint8b128": ("int8",),
    "float8_e4m3fn": ("float8_e4m3fn",),
}
_OPERANDS = {"float8_e4m3fn": "ptx::Float8", "int8": "ptx::Int8"}
_OUTPUTS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}


@dataclass(frozen=True)
class EightBitTypes:
    """What a kernel is compiled for.

    weight_type: name; activation: "int8" or "float8_e4m3fn"; output: "float16" or "bfloat16";
    group_size: inputs per scale, 0 for one scale per feature.
    """

    weight_type: str = "uint4b8"
    activation: str = "int8"
    output: str = "float16"
    group_size: int = 0

    @property
    def promote(self) -> bool:
        """Sums move on to float32 registers as they grow (Config::PROMOTE)."""
        return self.group_size > 0 or self.activation == "float8_e4m3fn"

    @property
    def unit(self) -> float:
        """A weight is unit * byte * scale (csrc/dequant/eight_bit_fragment.cuh)."""
        if self.weight_type != "uint4b8":
            return 1.0
        return 1 / 16 if self.activation == "int8" else 512.0

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a record."""
        return TILE_FEATURES * STAGE_K * WEIGHT_TYPES[self.weight_type].bits // 8

    @property
    def rows(self) -> int:
        """Rows of scales and zero points of a record."""
        if self.group_size:
            return STAGE_K // self.group_size
        return 0 if WEIGHT_TYPES[self.weight_type].symmetric else 1

    @property
    def row_bytes(self) -> int:
        """Of one such row: float16 scales if there are groups, then bytes of zero points."""
        zeros = 0 if WEIGHT_TYPES[self.weight_type].symmetric else TILE_FEATURES
        return (2 * TILE_FEATURES if self.group_size else 0) + zeros

    @property
    def record_bytes(self) -> int:
        """Of 64 features x 128 inputs."""
        return self.code_bytes + self.rows * self.row_bytes


@dataclass(frozen=True)
class EightBitConfig:
    """One shape of the kernel (csrc/sm90_8bit/config.cuh explains the numbers).

    tokens: of a tile; warpgroups: that multiply, 64 features each; multicast: blocks of a cluster
    that share tokens; split: blocks of a cluster that share a k range; stages: of the ring;
    blocks_per_sm: blocks that registers must leave room for; lead: 1 if the first warpgroup starts
    before the others. Of sums that move on to totals: part: tokens at once, 0 for as many as
    registers allow; sets: of sums, 2 if one moves on while the other is multiplied into; turns: 1
    if two warpgroups take turns.
    """

    tokens: int
    warpgroups: int
    multicast: int
    split: int
    stages: int
    blocks_per_sm: int
    lead: int = 0
    part: int = 0
    sets: int = 2
    turns: int = 0

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def features(self) -> int:
        return TILE_FEATURES * self.warpgroups

    @property
    def cluster(self) -> int:
        return self.multicast * self.split

    def template_arguments(self, types: EightBitTypes) -> str:
        """What stands between the angle brackets of sm90_8bit::Config."""
        shape = [str(getattr(self, field.name)) for field in fields(self)]
        return ", ".join(
            [
                f"weights::{types.weight_type}",
                _OPERANDS[types.activation],
                _OUTPUTS[types.output],
                str(types.group_size),
                *shape,
                str(self.storage_bytes(types)),
            ]
        )

    def source(self, types: EightBitTypes) -> KernelSource:
        config = f"sm90_8bit::Config<{self.template_arguments(types)}>"
        return KernelSource("sm90_8bit/kernel.cuh", f"sm90_8bit::gemm_kernel<{config}>")

    def stage_bytes(self, types: EightBitTypes) -> int:
        return self.tokens * STAGE_K + self.warpgroups * types.record_bytes

    def storage_bytes(self, types: EightBitTypes) -> int:
        """sizeof(Storage); the kernel asserts that it agrees."""
        # The array of records is aligned to 128 bytes, its elements are not padded.
        weights = self.stages * self.warpgroups * types.record_bytes
        ring = -(-(self.stages * self.tokens * STAGE_K + weights) // 1024) * 1024
        out = self.warpgroups * min(self.tokens, 64) * 72 * 2 if self.split == 1 else 16
        scales = self.warpgroups * self.tokens * 4
        barriers = 2 * (-(-self.stages * 8 // 16) * 16)
        return -(-(ring + out + scales + barriers + 16) // 1024) * 1024

    def fits(self, types: EightBitTypes, k_tiles: int) -> bool:
        """k_tiles: stages of the whole k range."""
        storage = self.storage_bytes(types)
        ring = self.stages * self.stage_bytes(types)
        partial = self.features * (self.tokens + 4) * 4 if self.split > 1 else 0
        return (
            k_tiles >= self.split
            and partial <= ring
            and storage <= MAX_SHARED_BYTES
            and self.blocks_per_sm * (storage + 1024) <= SM_SHARED_BYTES
        )

    def tiles(self, m: int, n: int) -> int:
        """Tiles of the walk: of a cluster with multicast, else of a block (or its split)."""
        return -(-n // (self.features * self.multicast)) * -(-m // self.tokens)

    def grid(self, m: int, n: int, multiprocessors: int) -> int:
        """Blocks of a launch."""
        if self.split > 1:
            return self.tiles(m, n) * self.split
        room = multiprocessors * self.blocks_per_sm // self.multicast
        return min(self.tiles(m, n), room) * self.multicast


# tokens, warpgroups, multicast, blocks of a multiprocessor, splits
_SHAPES = (
    *((tokens, 1, 1, 3, (1, 2, 4, 8)) for tokens in (8, 16)),
    *((tokens, 2, 1, 2, (1, 2, 4, 8)) for tokens in (8, 16)),
    *((tokens, 4, 1, 1, (1, 2, 4, 8)) for tokens in (8, 16)),
    (32, 1, 1, 2, (1, 2, 4, 8)),
    (32, 3, 1, 1, (1, 2, 3, 4, 6, 8)),
    (64, 1, 1, 2, (1, 2, 4, 8)),
    (64, 2, 1, 1, (1, 2, 4)),
    (64, 3, 1, 1, (1, 2, 3, 4, 6)),
    (128, 2, 1, 1, (1, 2, 4)),
    (192, 2, 1, 1, (1,)),
    (256, 2, 1, 1, (1,)),
    *((tokens, 2, 2, 1, (1,)) for tokens in (64, 128, 192, 256)),
    *((tokens, 2, 4, 1, (1,)) for tokens in (64, 128, 256)),
)
# Those that only symmetric integers have registers for, and only those without groups.
_INTEGER_SHAPES = ((32, 4, 1, 1, (1, 2, 4, 8)),)
_DIRECT_SHAPES = (
    (32, 2, 1, 2, (1, 2, 4, 8)),
    (64, 2, 1, 2, (1, 2, 4)),
    (64, 4, 1, 1, (1, 2, 4)),
    (64, 4, 2, 1, (1,)),
    (128, 3, 1, 1, (1,)),
    (128, 3, 2, 1, (1,)),
)
# weight type, activation, group size, tokens, lead: what the compiler spills registers in
_SPILLING = (
    ("uint8b128", "int8", 128, 192, 0),
    ("uint8b128", "int8", 128, 192, 1),
    ("uint4b8", "int8", 128, 192, 0),
)
# tokens, warpgroups, multicast, part, sets, turns, splits: of sums of e4m3 products
_MOVING_SHAPES = (
    *((256, 2, 1, 128, 1, turns, (1, 2, 4)) for turns in (0, 1)),
    *((256, 2, 2, 128, 1, turns, (1,)) for turns in (0, 1)),
    *((128, 2, multicast, 128, 1, turns, (1, 2)) for multicast in (1, 2) for turns in (0, 1)),
    (128, 3, 1, 64, 1, 0, (1,)),
)


@functools.cache
def supported_configs(types: EightBitTypes) -> tuple[EightBitConfig, ...]:
    """Every configuration that the library may choose and the tests iterate."""
    found = []
    asymmetric = not WEIGHT_TYPES[types.weight_type].symmetric
    short_of_registers = types.activation == "int8" and (
        types.group_size == 64
        or (types.group_size == 32 and WEIGHT_TYPES[types.weight_type].bits == 8)
    )

    def add(config: EightBitConfig, splits: tuple[int, ...]) -> None:
        """With each split, and as many stages as fit."""
        for split in splits:
            for stages in range(16 if config.tokens <= 64 else 8, 2, -1):
                one = replace(config, split=split, stages=stages)
                if not one.fits(types, split):
                    continue
                found.append(one)
                may_lead = types.group_size in (0, 128) and one.tokens >= 128 and not one.turns
                if may_lead and split == 1 and stages >= 4:
                    found.append(replace(one, lead=1))
                break

    for tokens, groups, multicast, blocks, splits in (
        *_SHAPES,
        *(_INTEGER_SHAPES if types.activation == "int8" and not asymmetric else ()),
        *(() if types.promote else _DIRECT_SHAPES),
    ):
        if short_of_registers and tokens > 64:
            continue
        if asymmetric and types.group_size and tokens > 64:  # likewise
            splits = splits[:1]
        add(EightBitConfig(tokens, groups, multicast, 1, 3, blocks), splits)
    if types.activation == "float8_e4m3fn" and types.group_size in (0, 128):
        for tokens, groups, multicast, part, sets, turns, splits in _MOVING_SHAPES:
            config = EightBitConfig(tokens, groups, multicast, 1, 3, 1, 0, part, sets, turns)
            add(config, splits if multicast == 1 else splits[:1])
    key = (types.weight_type, types.activation, types.group_size)
    return tuple(c for c in found if (*key, c.tokens, c.lead) not in _SPILLING)


def estimate(
    config: EightBitConfig, types: EightBitTypes, m: int, n: int, k: int, multiprocessors: int = 132
) -> float:
    """Rough time in microseconds, to rank configurations where no tuned row exists.

    Rounds over the multiprocessors times the largest cost of a stage on one of them: matrix
    instructions, issue slots of decoding and of moving sums on, device memory for the weights, and
    the L2 cache for tokens and weights; never less than what one warpgroup waits for.
    """
    k_tiles = math.ceil(k / STAGE_K)
    blocks = config.tiles(m, n) * config.cluster
    room = multiprocessors * config.blocks_per_sm
    if config.cluster > 2:  # larger clusters do not fit on every multiprocessor
        room = room * 9 // 10
    rounds = math.ceil(blocks / room)
    at_once = min(config.blocks_per_sm, math.ceil(blocks / multiprocessors))
    busy = min(1.0, blocks / multiprocessors) * multiprocessors
    mma = config.warpgroups * 4 * max(config.tokens / 2, 14)
    if types.activation == "float8_e4m3fn" and config.tokens >= 64:
        # Measured: products of 32 and 64 tokens, whose sums move on, reach half the rate; larger
        # ones two thirds of it.
        mma *= 1.5 if config.sets == 1 else 1.9
    moved = config.tokens / 2 * (STAGE_K / types.group_size if types.group_size else 1)
    issue = config.warpgroups * (110 + (3 * moved if types.promote else 0))
    weights = config.warpgroups * types.record_bytes
    # once per band of token tiles (scaled/walk.cuh), the other reads find it in the L2 cache
    token_tiles = math.ceil(m / config.tokens)
    dram = weights / min(8, token_tiles) / (4500 / 1.7 / busy)
    l2 = (weights + config.tokens * STAGE_K / config.multicast) / (6200 / 1.7 / busy)
    alone = 260 + 2 * config.tokens
    clocks = -(-k_tiles // config.split) * max(at_once * max(mma, issue, dram, l2), alone)
    epilogue = config.features * config.tokens / 16 + (2000 if config.split > 1 else 700)
    if config.lead and config.sets == 2:  # hidden behind products, but for the last tile
        epilogue = epilogue / 2 + (epilogue / 2 + 1000) / rounds
    return 2.0 + rounds * (clocks + epilogue * at_once) / 1700


@functools.cache
def _tuned(gpu: str) -> dict[tuple, list[tuple[int, EightBitConfig]]]:
    return read_tuned(TUNING_DIRECTORY / f"{gpu}.json", "types", EightBitConfig)


def tuned_key(types: EightBitTypes) -> str:
    """Name of the types in tuned tables: outputs are alike."""
    return f"{types.weight_type} {types.activation} {types.group_size}"


@functools.lru_cache(maxsize=65536)
def select_config(
    m: int,
    n: int,
    k: int,
    types: EightBitTypes,
    batch_invariant: bool = False,
    gpu: str = "h200",
    multiprocessors: int = 132,
) -> EightBitConfig:
    """The configuration for m tokens, n features, k inputs: tuned, or of least estimated time.

    A tuned row holds for token counts up to its own and above the row before it. batch_invariant:
    only kernels that add up in the same order for every m (k is not split).
    """
    k_tiles = math.ceil(k / STAGE_K)

    def usable(config: EightBitConfig) -> bool:
        same_order = config.split == 1 or not (batch_invariant and types.promote)
        return same_order and config.fits(types, k_tiles)

    for limit, config in _tuned(gpu).get((tuned_key(types), k, n), []):
        if m <= limit and usable(config):
            return config
    known = [config for config in supported_configs(types) if usable(config)]
    return min(known, key=lambda c: (estimate(c, types, m, n, k, multiprocessors), str(c)))


def as_row(config: EightBitConfig) -> dict[str, int]:
    """The numbers of a configuration, for tuned tables."""
    return asdict(config)
