"""The scaled GEMM kernels that exist, as data, and the pure function that chooses one.

`select` looks at tuned rows (tuning/scaled/<gpu>.json, written by scripts/tune_scaled.py) and falls
back to an estimate of the time of each configuration.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .compiler import KernelSource

MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
SM_SHARED_BYTES = 228 * 1024  # of one multiprocessor, 1 KB of it reserved per block
STAGE_K = 128  # inputs of a stage
TUNING_DIRECTORY = Path(__file__).parent / "tuning" / "scaled"
_OPERANDS = {"float8_e4m3fn": "ptx::Float8", "int8": "ptx::Int8"}
_OUTPUTS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}


@dataclass(frozen=True)
class ScaledConfig:
    """One shape of the kernel (csrc/scaled/config.cuh explains the numbers).

    tokens: of a tile; groups: warpgroups that multiply, 64 features each; multicast: blocks of a
    cluster that share tokens; split: blocks of a cluster that share a k range; stages: of the ring;
    blocks_per_sm: blocks that registers must leave room for.
    """

    tokens: int
    groups: int
    multicast: int
    split: int
    stages: int
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)

    @property
    def features(self) -> int:
        return 64 * self.groups

    @property
    def cluster(self) -> int:
        return self.multicast * self.split

    def source(self, operand: str, out: str, sparse: bool) -> KernelSource:
        """operand: "float8_e4m3fn" or "int8"; out: "float16" or "bfloat16"."""
        numbers = (
            int(sparse),
            *(getattr(self, field.name) for field in fields(self)),
            self.storage_bytes(sparse),
        )
        arguments = ", ".join(map(str, numbers))
        expression = (
            f"scaled::scaled_kernel<scaled::Config<{_OPERANDS[operand]}, {_OUTPUTS[out]}, "
            f"{arguments}>>"
        )
        return KernelSource("scaled/kernel.cuh", expression)

    def stage_bytes(self, sparse: bool) -> int:
        weight = STAGE_K // 2 + 16 if sparse else STAGE_K  # kept values and metadata
        return self.features * weight + self.tokens * STAGE_K

    def storage_bytes(self, sparse: bool) -> int:
        """sizeof(Storage); the kernel asserts that it agrees."""
        ring = self.stages * self.stage_bytes(sparse) + (0 if sparse else 16 * self.stages)
        out = self.groups * min(self.tokens, 64) * 72 * 2 if self.split == 1 else 16
        scales = self.groups * self.tokens * 4
        barriers = 2 * (-(-self.stages * 8 // 16) * 16)
        return -(-(-(-ring // 1024) * 1024 + out + scales + barriers) // 1024) * 1024

    def fits(self, k_tiles: int, sparse: bool) -> bool:
        """k_tiles: stages of the whole k range."""
        resident = self.blocks_per_sm * (self.storage_bytes(sparse) + 1024)
        return (
            k_tiles >= self.split
            and self.storage_bytes(sparse) <= MAX_SHARED_BYTES
            and resident <= SM_SHARED_BYTES
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


@functools.cache
def supported_configs(sparse: bool) -> tuple[ScaledConfig, ...]:
    """Every configuration that the library may choose and the tests iterate."""
    shapes = [
        *((tokens, 2, 1, split, 2) for tokens in (16, 32, 64) for split in (1, 2, 4, 8)),
        *((tokens, 1, 1, split, 3) for tokens in (16, 32, 64) for split in (1, 2, 4, 8)),
        *((128, 1, 1, split, 2) for split in (1, 2, 4)),
        *((128, 2, 1, split, 1) for split in (1, 2, 4)),
        (128, 4, 1, 1, 1),
        *((64, 2, 2, 1, 2), (128, 2, 2, 1, 1)),
        *((256, 2, multicast, 1, 1) for multicast in (1, 2)),
        *((192, 3, multicast, 1, 1) for multicast in (1, 2)),
    ]
    found = []
    for tokens, groups, multicast, split, blocks in shapes:
        for stages in range(12 if tokens <= 64 else 8, 1, -1):
            config = ScaledConfig(tokens, groups, multicast, split, stages, blocks)
            if config.fits(split, sparse):
                found.append(config)
                break
    return tuple(found)


def estimate(
    config: ScaledConfig, m: int, n: int, k: int, sparse: bool, multiprocessors: int = 132
) -> float:
    """Rough time in microseconds, to rank configurations where no tuned row exists.

    Rounds over the multiprocessors times the largest of three costs of a stage: the matrix
    instruction, shared memory (128 bytes a clock cycle for every byte written or read), and this
    multiprocessor's share of the L2 bandwidth.
    """
    k_tiles = math.ceil(k / STAGE_K)
    blocks = config.tiles(m, n) * config.cluster
    room = multiprocessors * config.blocks_per_sm
    rounds = math.ceil(blocks / room)
    at_once = min(config.blocks_per_sm, math.ceil(blocks / multiprocessors))
    mma = config.groups * max(config.tokens, 32) * (1 if sparse else 2)
    stage = config.stage_bytes(sparse)
    read = config.groups * config.tokens * STAGE_K + config.features * (80 if sparse else 128)
    l2 = (stage - config.tokens * STAGE_K * (1 - 1 / config.multicast)) / 28
    clocks = -(-k_tiles // config.split) * max(mma, (stage + read) / 128, l2) * at_once
    epilogue = config.features * config.tokens / 16 + (1500 if config.split > 1 else 500)
    return 2.0 + rounds * (clocks + epilogue * at_once) / 1700


def read_tuned(path: Path, kind: str, make: Callable[..., Any]) -> dict[tuple, list[tuple]]:
    """(row[kind], k, n) -> (m, make(**config)) by rising m; nothing if there is no such file."""
    if not path.is_file():
        return {}
    rows: dict[tuple, list[tuple]] = {}
    for row in json.loads(path.read_text())["rows"]:
        key = (row[kind], row["k"], row["n"])
        rows.setdefault(key, []).append((row["m"], make(**row["config"])))
    for entries in rows.values():
        entries.sort(key=lambda entry: entry[0])
    return rows


@functools.cache
def _tuned(gpu: str) -> dict[tuple[bool, int, int], list[tuple[int, ScaledConfig]]]:
    return read_tuned(TUNING_DIRECTORY / f"{gpu}.json", "sparse", ScaledConfig)


@functools.lru_cache(maxsize=65536)
def select(
    m: int, n: int, k: int, sparse: bool, gpu: str = "h200", multiprocessors: int = 132
) -> ScaledConfig:
    """The configuration for m tokens, n features, k inputs: tuned, or of least estimated time.

    A tuned row holds for token counts up to its own and above the row before it.
    """
    k_tiles = math.ceil(k / STAGE_K)
    for limit, config in _tuned(gpu).get((sparse, k, n), []):
        if m <= limit and config.fits(k_tiles, sparse):
            return config
    usable = [c for c in supported_configs(sparse) if c.fits(k_tiles, sparse)]
    return min(usable, key=lambda c: (estimate(c, m, n, k, sparse, multiprocessors), str(c)))


def as_row(config: ScaledConfig) -> dict[str, int]:
    """The numbers of a configuration, for tuned tables."""
    return asdict(config)
