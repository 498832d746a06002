"""FP16 or BF16 activations times 2:4 sparse 4- or 8-bit weights: kernels and operator.

    torch.ops.marlin_kernel.sparse_gemm(a, weights, scales, bias, k, n, group_size, weight_type)

The kernels of this file (csrc/sparse/decode.cuh for small batches, kernel.cuh) are for compute
capability 9.0 and chosen in `sparse_configs`; `sparse_sm80` serves the others from 8.0 on. Weights
are in the device layout of csrc/sparse/config.cuh, which `device_weights` makes of the stored
tensors (sparse_format.py). `SparseLayer` (sparse_layer.py) is what models hold.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from . import gradient, launch, sparse_sm80
from .errors import ConfigError
from .formats import LayerSpec
from .sparse_configs import (
    GROUP_SIZES,
    POSITION_BYTES,
    TILE_N,
    AnyConfig,
    SparseDecodeConfig,
    select,
)
from .sparse_format import SPARSE_TYPES
from .weight_types import WeightType
from .weight_types import weight_type as lookup

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


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
        tiles = wide.view(columns, rows, 4, 2, 8).permute(1, 0, 4, 2, 3)  # [g][m][h] of a tile
        parts.append(tiles.reshape(rows, columns, TILE_N).view(torch.uint8))
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
    positions = weights[:, :, size : size + POSITION_BYTES].contiguous().view(torch.int32)
    if scales.numel():
        own = scales.view(1, n)
    else:
        tiles = weights[:, :, size + POSITION_BYTES :].contiguous().view(torch.float16)
        wide = tiles.view(rows, columns, 8, 4, 2).permute(1, 0, 3, 4, 2).reshape(columns, -1)
        own = wide[:groups, :n].contiguous()
    shape = (rows, columns, 128)
    return codes.view(*shape, wtype.bits), positions.view(*shape, 2), own


# ---- launch --------------------------------------------------------------------------------------

_PROBLEM = struct.Struct("<QQQQiiii")  # sparse::Problem


_plans = launch.ThreadPlans()


def launch_config(
    config: AnyConfig,
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

    a: [M, K], elements of a row adjacent; for a SparseConfig, rows on 16 bytes; weights, scales: of
    `device_weights`; group_size: -1 or 128; out: [M, N], contiguous.
    """
    m, k = a.shape
    n = out.shape[1]
    index = a.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    column_tiles, k_tiles = weights.shape[:2]
    sizes = m, k_tiles, column_tiles
    key = (config, index, stream, a.dtype, bits, group_size, *sizes, dependent_launch)
    plan = _plans.get(key)
    if plan is None:
        plan = launch.Plan(
            launch.load(config.source(_DTYPES[a.dtype], bits, group_size), index),
            config.grid(*sizes, bits, group_size, launch.multiprocessors(index)),
            config.threads,
            config.split,
            config.shared_bytes(m, k_tiles, bits, group_size),
            stream,
            launch._TENSOR_MAP_OFFSET + launch._TENSOR_MAP_BYTES,
            dependent_launch=dependent_launch,
        )
        _plans.keep(key, plan)
    addresses = (
        weights.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    if isinstance(config, SparseDecodeConfig):
        numbers = (a.stride(0), m, n, k, column_tiles, k_tiles, config.split, 0, 0, 0, 0)
        launch._PROBLEM.pack_into(plan.arguments, 0, a.data_ptr(), *addresses, *numbers)
    else:
        row_bytes = 2 * (a.stride(0) if m > 1 else -(-k // 8) * 8)
        start = launch._TENSOR_MAP_OFFSET
        plan.arguments[start : start + launch._TENSOR_MAP_BYTES] = launch._tensor_map(
            a.data_ptr(), _DTYPES[a.dtype], m, k, row_bytes, config.tokens
        )
        _PROBLEM.pack_into(plan.arguments, 0, *addresses, m, n, k_tiles, column_tiles)
    plan.launch()


def _aligned(a: Tensor) -> Tensor:
    """`a`, or a copy whose rows start on 16 bytes (tensor copies need that)."""
    if a.stride(1) == 1 and a.data_ptr() % 16 == 0 and (a.shape[0] == 1 or a.stride(0) % 8 == 0):
        return a
    return launch.aligned_rows(a)


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
    rows = a.reshape(-1, k)
    m = rows.shape[0]
    out = rows.new_empty(m, n)
    if m:
        group = kernel_group(group_size, k)
        bias = bias if bias is None else bias.to(a.dtype)
        if launch.device_arch(index) != "sm_90a":
            old = sparse_sm80.select(m)
            sparse_sm80.launch_config(old, _aligned(rows), weights, scales, bias, out, bits, group)
            return out.view(*a.shape[:-1], n)
        gpu = torch.cuda.get_device_name(index).removeprefix("NVIDIA ").lower()
        config = select(m, n, k, bits, group, gpu, launch.multiprocessors(index))
        if not isinstance(config, SparseDecodeConfig) or rows.stride(1) != 1:
            rows = _aligned(rows)
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
