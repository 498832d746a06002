"""The 2:4 Marlin kernel for compute capability 8.0 and newer (csrc/sparse/sm80.cuh, `mma.sp`).

Weights lie as in `sparse_marlin.device_weights`; `sparse_marlin` calls this where `wgmma` does not
exist.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import launch
from .compiler import KernelSource

_SCALARS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_PROBLEM = struct.Struct("<QQQQQqiiii")  # sparse::Sm80Problem
_TILE_N, _TILE_K = 64, 128


@dataclass(frozen=True)
class Sm80SparseConfig:
    """One shape of the kernel: tokens of a block; k_parts: groups of four warps that share the k
    range; stages: of each group's ring.
    """

    tokens: int
    k_parts: int
    stages: int

    @property
    def threads(self) -> int:
        return 128 * self.k_parts

    def source(self, dtype: torch.dtype, bits: int, group_size: int) -> KernelSource:
        """bits: 4 or 8; group_size: -1 or 128."""
        numbers = (
            bits,
            max(group_size, 0),
            *(getattr(self, field.name) for field in fields(self)),
            self.storage_bytes(bits, group_size),
        )
        arguments = ", ".join(map(str, numbers))
        expression = f"sparse::sm80_kernel<sparse::Sm80Config<{_SCALARS[dtype]}, {arguments}>>"
        return KernelSource("sparse/sm80.cuh", expression)

    def storage_bytes(self, bits: int, group_size: int) -> int:
        """sizeof(Sm80Storage); the kernel asserts that it agrees."""
        tile = 512 * bits + 1024 + (128 if group_size > 0 else 0)
        ring = self.k_parts * self.stages * (tile + self.tokens * (_TILE_K + 8) * 2)
        return max(ring, self.k_parts * _TILE_N * (self.tokens + 1) * 4)

    def grid(self, m: int, feature_tiles: int) -> tuple[int, int, int]:
        return (feature_tiles, -(-m // self.tokens), 1)


# By rising tokens; their shared memory fits every GPU since sm_80 (99 KB of a block on sm_86).
CONFIGS = (
    Sm80SparseConfig(tokens=8, k_parts=4, stages=3),
    Sm80SparseConfig(tokens=16, k_parts=4, stages=2),
    Sm80SparseConfig(tokens=32, k_parts=2, stages=3),
    Sm80SparseConfig(tokens=64, k_parts=2, stages=2),
)


def select(m: int) -> Sm80SparseConfig:
    """The configuration for m tokens: the least that holds them, else the largest."""
    return next((config for config in CONFIGS if m <= config.tokens), CONFIGS[-1])


_plans = launch.ThreadPlans()


def launch_config(
    config: Sm80SparseConfig,
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    bits: int,
    group_size: int,
) -> None:
    """Launch on the current stream; arguments as in `sparse_marlin.launch_config`. No checks."""
    (m, k), n = a.shape, out.shape[1]
    index = a.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    feature_tiles, k_tiles = weights.shape[:2]
    key = (config, index, stream, a.dtype, bits, group_size, m, feature_tiles)
    plan = _plans.get(key)
    if plan is None:
        plan = launch.Plan(
            launch.load(config.source(a.dtype, bits, group_size), index),
            config.grid(m, feature_tiles),
            config.threads,
            1,
            config.storage_bytes(bits, group_size),
            stream,
            256,
            dependent_launch=False,
        )
        _plans.keep(key, plan)
    _PROBLEM.pack_into(
        plan.arguments,
        0,
        a.data_ptr(),
        weights.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        a.stride(0) if m > 1 else -(-k // 8) * 8,
        m,
        n,
        k,
        k_tiles,
    )
    plan.launch()
