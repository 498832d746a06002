"""FP16 or BF16 activations times 2:4 sparse 4- or 8-bit weights: kernels and operator.

    torch.ops.marlin_kernel.sparse_gemm(a, weights, scales, bias, k, n, group_size, weight_type)

The kernel of this file (csrc/sparse/kernel.cuh) is for compute capability 9.0; `sparse_sm80` serves
the others from 8.0 on. Weights are in the device layout of csrc/sparse/config.cuh, which
`device_weights` makes of the stored tensors (sparse_format.py). `SparseLayer` (sparse_layer.py) is
what models hold.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from . import gradient, launch, sparse_sm80
from .compiler import KernelSource
from .errors import ConfigError
from .formats import LayerSpec
from .scaled_configs import read_tuned
from .sparse_format import SPARSE_TYPES
from .weight_types import WeightType
from .weight_types import weight_type as lookup

MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
SM_SHARED_BYTES = 228 * 1024  # of one multiprocessor, 1 KB of it reserved per block
TILE_N = 64
TILE_K = 128
GROUP_SIZES = (-1, 128)  # that the kernel multiplies; others are dequantized
TUNING_DIRECTORY = Path(__file__).parent / "tuning" / "sparse"
_SCALARS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_POSITION_BYTES = 1024
_SCALE_BYTES = 128


@dataclass(frozen=True)
class SparseConfig:
    """One shape of the kernel (csrc/sparse/config.cuh explains the numbers).

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
        expression = f"sparse::marlin24_kernel<sparse::Config<{_SCALARS[dtype]}, {arguments}>>"
        return KernelSource("sparse/kernel.cuh", expression)

    def storage_bytes(self, bits: int, group_size: int) -> int:
        """sizeof(Storage); the kernel asserts that it agrees."""
        tokens = self.stages * 2 * self.tokens * 128
        ring = tokens + self.stages * self.groups * tile_bytes(bits, group_size)
        out = self.groups * min(self.tokens, 64) * 72 * 2 if self.split == 1 else 16
        barriers = 2 * (-(-self.stages * 8 // 16) * 16)
        return -(-(-(-ring // 1024) * 1024 + out + barriers) // 1024) * 1024

    def fits(self, k_tiles: int, bits: int, group_size: int) -> bool:
        """k_tiles: weight tiles along k."""
        size = self.storage_bytes(bits, group_size)
        partial = self.groups * TILE_N * (self.tokens + 4) * 4 if self.split > 1 else 0
        return (
            k_tiles >= self.split
            and size <= MAX_SHARED_BYTES
            and self.blocks_per_sm * (size + 1024) <= SM_SHARED_BYTES
            and partial <= size - 4096
        )

    def grid(self, m: int, feature_tiles: int, multiprocessors: int) -> int:
        """Blocks of a launch."""
        tiles = -(-feature_tiles // self.groups) * -(-m // self.tokens)
        if self.split > 1:
            return tiles * self.split
        return min(tiles, multiprocessors * self.blocks_per_sm)


def tile_bytes(bits: int, group_size: int) -> int:
    """Bytes of a weight tile (64 features x 128 k): codes, positions, scales."""
    return 512 * bits + _POSITION_BYTES + (_SCALE_BYTES if group_size > 0 else 0)


@functools.cache
def supported_configs(bits: int, group_size: int) -> tuple[SparseConfig, ...]:
    """Every configuration that the library may choose and the tests iterate."""
    shapes = [
        *((t, 1, split, 3) for t in (8, 16, 32) for split in (1, 2, 4, 8)),
        *((t, 2, split, 2) for t in (8, 16, 32) for split in (1, 2, 4, 8)),
        *((t, 2, split, 1) for t in (64, 128) for split in (1, 2, 4)),
        (256, 2, 1, 1),
    ]
    found = []
    for tokens, groups, split, blocks in shapes:
        for stages in range(12, 1, -1):
            config = SparseConfig(tokens, groups, split, stages, blocks)
            if config.fits(split, bits, group_size):
                found.append(config)
                break
    return tuple(found)


def estimate(
    config: SparseConfig, m: int, n: int, k: int, bits: int, multiprocessors: int = 132
) -> float:
    """Rough time in microseconds, to rank configurations where no tuned row exists."""
    k_tiles, feature_tiles = math.ceil(k / TILE_K), math.ceil(n / TILE_N)
    blocks = -(-feature_tiles // config.groups) * -(-m // config.tokens) * config.split
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


@functools.cache
def _tuned(gpu: str) -> dict[tuple[int, int, int], list[tuple[int, SparseConfig]]]:
    return read_tuned(TUNING_DIRECTORY / f"{gpu}.json", "bits", SparseConfig)


@functools.lru_cache(maxsize=65536)
def select(
    m: int,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    gpu: str = "h200",
    multiprocessors: int = 132,
) -> SparseConfig:
    """The configuration for m tokens, n features, k inputs: tuned, or of least estimated time."""
    k_tiles = math.ceil(k / TILE_K)
    for limit, config in _tuned(gpu).get((bits, k, n), []):
        if m <= limit and config.fits(k_tiles, bits, group_size):
            return config
    usable = [c for c in supported_configs(bits, group_size) if c.fits(k_tiles, bits, group_size)]
    return min(usable, key=lambda c: (estimate(c, m, n, k, bits, multiprocessors), str(c)))


def as_row(config: SparseConfig) -> dict[str, int]:
    """The numbers of a configuration, for tuned tables."""
    return asdict(config)


# ---- weights -------------------------------------------------------------------------------------


def supports(device: torch.device, spec: LayerSpec, dtype: torch.dtype) -> bool:
    """Whether the kernel serves a layer on this device. Compiles nothing."""
    return (
        device.type == "cuda"
        and spec.weight_type.name in SPARSE_TYPES
        and kernel_group(spec.group_size, spec.k) in GROUP_SIZES
        and dtype in _DTYPES
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def kernel_group(group_size: int, k: int) -> int:
    """Group size in the kernel's words: -1 if one group covers all inputs."""
    return -1 if group_size >= k else group_size


def device_weights(
    codes: Tensor, positions: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Stored tensors (`B_24`, `B_meta`, `s`) in the device layout.

    group_size: -1 or 128. Returns (uint8 [N / 64, K / 128, tile bytes], float16 [N]: scales of one
    group, else empty).
    """
    rows, columns = codes.shape[:2]
    parts = [t.reshape(rows, columns, -1).view(torch.uint8) for t in (codes, positions)]
    own = scales.new_empty(0) if group_size > 0 else scales[0].contiguous()
    if group_size > 0:
        wide = scales.new_zeros(columns, rows * TILE_N)
        wide[: scales.shape[0], : scales.shape[1]] = scales
        tiles = wide.view(columns, rows, TILE_N).transpose(0, 1).contiguous()
        parts.append(tiles.view(torch.uint8))
    weights = torch.cat(parts, 2).contiguous()
    if weights.is_cuda:  # the kernel fetches weights before its predecessor in the stream has ended
        torch.cuda.current_stream(weights.device).synchronize()
    return weights, own


def stored_weights(
    weights: Tensor, scales: Tensor, n: int, wtype: WeightType, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `device_weights`: (`B_24`, `B_meta`, `s`)."""
    rows, columns, _ = weights.shape
    size = 512 * wtype.bits
    codes = weights[:, :, :size].contiguous().view(torch.int32)
    positions = weights[:, :, size : size + _POSITION_BYTES].contiguous().view(torch.int32)
    if scales.numel():
        own = scales.view(1, n)
    else:
        tiles = weights[:, :, size + _POSITION_BYTES :].contiguous().view(torch.float16)
        own = tiles.transpose(0, 1).reshape(columns, -1)[:groups, :n].contiguous()
    shape = (rows, columns, 128)
    return codes.view(*shape, wtype.bits), positions.view(*shape, 2), own


# ---- launch --------------------------------------------------------------------------------------

_PROBLEM = struct.Struct("<QQQQiiii")  # sparse::Problem


@functools.lru_cache(maxsize=1)
def _plans() -> launch._ThreadPlans:
    return launch._ThreadPlans()


def launch_config(
    config: SparseConfig,
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    bits: int,
    group_size: int,
    dependent_launch: bool = True,
) -> None:
    """Launch `config` on the current stream. No checks.

    a: [M, K], rows on 16 bytes; weights, scales: of `device_weights`; group_size: -1 or 128; out:
    [M, N], contiguous.
    """
    m, k = a.shape
    n = out.shape[1]
    index = a.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    feature_tiles, k_tiles = weights.shape[:2]
    key = (config, index, stream, a.dtype, bits, group_size, m, feature_tiles, dependent_launch)
    plans = _plans().plans
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= launch._MAX_PLANS:
            plans.clear()
        plan = plans[key] = launch.Plan(
            launch.load(config.source(_DTYPES[a.dtype], bits, group_size), index),
            (config.grid(m, feature_tiles, launch.multiprocessors(index)), 1, 1),
            config.threads,
            config.split,
            config.storage_bytes(bits, group_size),
            stream,
            launch._TENSOR_MAP_OFFSET + launch._TENSOR_MAP_BYTES,
            dependent_launch=dependent_launch,
        )
    row_bytes = 2 * (a.stride(0) if m > 1 else -(-k // 8) * 8)
    start = launch._TENSOR_MAP_OFFSET
    plan.arguments[start : start + launch._TENSOR_MAP_BYTES] = launch._tensor_map(
        a.data_ptr(), _DTYPES[a.dtype], m, k, row_bytes, config.tokens
    )
    _PROBLEM.pack_into(
        plan.arguments,
        0,
        weights.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        k_tiles,
        feature_tiles,
    )
    plan.launch()


def _aligned(a: Tensor) -> Tensor:
    """`a`, or a copy whose rows start on 16 bytes (tensor copies need that)."""
    m, k = a.shape
    if a.stride(1) == 1 and a.data_ptr() % 16 == 0 and (m == 1 or a.stride(0) % 8 == 0):
        return a
    copy = a.new_empty(m, -(-k // 8) * 8)
    copy[:, :k] = a
    return copy[:, :k]


# ---- operator ------------------------------------------------------------------------------------


def _sparse_gemm(
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    k: int,
    n: int,
    group_size: int,
    weight_type: str,
) -> Tensor:
    _check_activations(a, weights, k)
    index, bits = a.device.index, lookup(weight_type).bits
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _sparse_gemm(a, weights, scales, bias, k, n, group_size, weight_type)
    rows = _aligned(a.reshape(-1, k))
    out = rows.new_empty(rows.shape[0], n)
    if rows.shape[0]:
        group = kernel_group(group_size, k)
        bias = bias if bias is None else bias.to(a.dtype)
        if launch.device_arch(index) != "sm_90a":
            config = sparse_sm80.select(rows.shape[0])
            sparse_sm80.launch_config(config, rows, weights, scales, bias, out, bits, group)
            return out.view(*a.shape[:-1], n)
        gpu = torch.cuda.get_device_name(index).removeprefix("NVIDIA ").lower()
        size = rows.shape[0], n, k, bits, group
        config = select(*size, gpu, launch.multiprocessors(index))
        launch_config(config, rows, weights, scales, bias, out, bits, group)
    return out.view(*a.shape[:-1], n)


def _sparse_gemm_fake(
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    k: int,
    n: int,
    group_size: int,
    weight_type: str,
) -> Tensor:
    return a.new_empty(*a.shape[:-1], n)


def _check_activations(a: Tensor, weights: Tensor, k: int) -> None:
    if a.dtype not in _DTYPES:
        raise ConfigError(
            f"activations have dtype {a.dtype}; the sparse kernel takes float16 and bfloat16: "
            "convert them, or call the layer's prepare() with this dtype"
        )
    if a.dim() == 0 or a.shape[-1] != k:
        raise ConfigError(f"activations of shape {list(a.shape)} do not end in the {k} inputs")
    if a.device != weights.device:
        raise ConfigError(
            f"activations are on {a.device}, the weights on {weights.device}; move one of them"
        )


_library = torch.library.Library("marlin_kernel", "FRAGMENT")
_library.define(
    "sparse_gemm(Tensor a, Tensor weights, Tensor scales, Tensor? bias, int k, int n, "
    "int group_size, str weight_type) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.impl("sparse_gemm", _sparse_gemm, "CUDA")
torch.library.register_fake("marlin_kernel::sparse_gemm", _sparse_gemm_fake, lib=_library)

sparse_gemm = torch.ops.marlin_kernel.sparse_gemm.default
"""``out[..., n] = a[..., k] @ W[k, n] + bias`` on a GPU of compute capability 8.0 or newer.

a: float16 or bfloat16; weights, scales: of `device_weights`; bias: [n] or None; group_size: inputs
per scale (128, or k for one group); weight_type: "uint4b8" or "uint8b128".
"""
gradient.register(_library, sparse_gemm)
