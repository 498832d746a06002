"""Scaled products of 8-bit matrices, dense and 2:4 sparse, as torch operators.

    scaled_mm(a, b, scale_a, scale_b, out_dtype, bias)
    scaled_sparse_mm(a, b_compressed, b_meta, scale_a, scale_b, out_dtype, bias)

    out[m, n] = (sum_k a[m, k] b[k, n]) * scale_b[n] * scale_a[m] (+ bias[n])

in this order, every product rounded to float32. INT8 sums are exact int32. FP8 (e4m3) sums are
those of the tensor cores (float32 registers, of which additions keep fewer bits, as with torch's
fast accumulation), or float32 on the CPU. Kernels need compute capability 9.0 (csrc/scaled/); other
CUDA devices are refused, the CPU computes through torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct

import torch
from torch import Tensor

from . import launch, scaled_configs
from .errors import ConfigError
from .scaled_configs import STAGE_K, ScaledConfig
from .sparse import TILE_FEATURES, check_compressed, decompress

OPERANDS = (torch.float8_e4m3fn, torch.int8)
OUTPUTS = (torch.bfloat16, torch.float16)


# ---- checks --------------------------------------------------------------------------------------


def _check(
    a: Tensor,
    dtype: torch.dtype,
    n: int,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> None:
    if a.dim() != 2 or a.dtype not in OPERANDS:
        raise ConfigError(
            f"a is {a.dtype} {list(a.shape)}; it must be [M, K] of float8_e4m3fn or int8"
        )
    if dtype != a.dtype:
        raise ConfigError(f"a is {a.dtype}, b is {dtype}; both must have the same dtype")
    if out_dtype not in OUTPUTS:
        raise ConfigError(f"out_dtype={out_dtype} is not bfloat16 or float16")
    for name, scale, count, of in (
        ("scale_a", scale_a, a.shape[0], "token (row of a)"),
        ("scale_b", scale_b, n, "feature (column of b)"),
    ):
        if scale.dtype != torch.float32 or scale.numel() not in (1, count):
            raise ConfigError(
                f"{name} is {scale.dtype} with {scale.numel()} values; it must be float32 with 1 "
                f"value or {count}, one per {of}"
            )
        if scale.device != a.device:
            raise ConfigError(f"{name} is on {scale.device}, a on {a.device}; move one of them")
    if bias is not None:
        if tuple(bias.shape) != (n,) or bias.dtype != out_dtype:
            raise ConfigError(
                f"bias is {bias.dtype} {list(bias.shape)}; it must be {out_dtype} [{n}]"
            )
        if bias.device != a.device:
            raise ConfigError(f"bias is on {bias.device}, a on {a.device}; move one of them")


def _check_dense(a: Tensor, b: Tensor) -> None:
    if b.dim() != 2 or a.dim() != 2 or b.shape[0] != a.shape[1]:
        raise ConfigError(
            f"a {list(a.shape)} and b {list(b.shape)} do not belong together: a is [M, K], b [K, N]"
        )
    if b.stride(0) != 1 and b.shape[0] > 1:
        raise ConfigError(
            f"b has strides {tuple(b.stride())}; it must be column-major, so that the inputs of a "
            "feature are contiguous: pass weight.t() of a Linear weight [N, K]"
        )
    if b.device != a.device:
        raise ConfigError(f"b is on {b.device}, a on {a.device}; move one of them")


def _check_sparse(a: Tensor, values: Tensor, metadata: Tensor) -> None:
    check_compressed(values, metadata)
    stored = 2 * values.shape[1]
    if a.dim() != 2 or not 0 <= stored - a.shape[1] < 32 or a.shape[1] == 0:
        raise ConfigError(
            f"a has shape {list(a.shape)}, b_compressed {list(values.shape)} holds {stored} inputs "
            "(K rounded up to a multiple of 32); they must agree"
        )
    if values.device != a.device:
        raise ConfigError(f"b_compressed is on {values.device}, a on {a.device}; move one of them")


# ---- reference -----------------------------------------------------------------------------------


def reference(
    a: Tensor,
    weight: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    """The same product in plain torch; weight: dense [N, K]. INT8 sums are exact (in float64)."""
    if a.dtype == torch.int8:
        sums = (a.double() @ weight.double().t()).float()
    else:
        sums = a.float() @ weight.float().t()
    sums = sums * scale_b.reshape(1, -1) * scale_a.reshape(-1, 1)
    if bias is not None:
        sums = sums + bias.float()
    return sums.to(out_dtype)


# ---- launch --------------------------------------------------------------------------------------

_PROBLEM = struct.Struct("<QQQQQiiiiii")  # scaled::Problem
_MAPS_OFFSET = 128  # of the second argument
_MAP_BYTES = 128


@functools.lru_cache(maxsize=4096)
def _byte_map(address: int, rows: int, columns: int, row_bytes: int, box: tuple[int, int]) -> bytes:
    """Encoded tensor map of an 8-bit matrix; box: (rows, columns), columns the swizzle's period."""
    driver = launch._driver()
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    swizzles = driver.CUtensorMapSwizzle
    encoded = launch._check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [u64(columns), u64(rows)],
            [u64(row_bytes)],
            [u32(box[1]), u32(box[0])],
            [u32(1), u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B
            if box[1] == 128
            else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "cuTensorMapEncodeTiled",
    )
    return ctypes.string_at(encoded.getPtr(), _MAP_BYTES)


def _aligned(t: Tensor) -> Tensor:
    """`t` [rows, bytes], or a copy of it, with rows that start on 16 bytes (tensor copies need it).

    Weights whose K is a multiple of 16 are never copied.
    """
    stride = t.stride(0) if t.shape[0] > 1 else 0
    if t.stride(1) == 1 and t.data_ptr() % 16 == 0 and stride % 16 == 0:
        return t
    rows, columns = t.shape
    copy = torch.empty(rows, -(-columns // 16) * 16, dtype=t.dtype, device=t.device)
    copy[:, :columns] = t
    return copy[:, :columns]


_plans = launch.ThreadPlans()


def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index).removeprefix("NVIDIA ").lower()


def launch_config(
    config: ScaledConfig,
    a: Tensor,
    weight: Tensor,
    metadata: Tensor | None,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out: Tensor,
    dependent_launch: bool = True,
) -> None:
    """Launch `config` on the current stream. No checks.

    a: [M, K]; weight: [N, K], or the kept values [N, K' / 2] with their metadata; scales: float32
    of one value or one per token and feature; out: [M, N], contiguous.
    """
    m, k = a.shape
    n = weight.shape[0]
    sparse = metadata is not None
    index = a.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    key = (config, index, stream, a.dtype, out.dtype, sparse, m, n, dependent_launch)
    plan = _plans.get(key)
    if plan is None:
        names = str(a.dtype)[6:], str(out.dtype)[6:]
        plan = launch.Plan(
            launch.load(config.source(*names, sparse), index),
            (config.grid(m, n, launch.multiprocessors(index)), 1, 1),
            config.threads,
            config.cluster,
            config.storage_bytes(sparse),
            stream,
            _MAPS_OFFSET + 2 * _MAP_BYTES,
            dependent_launch=dependent_launch,
        )
        _plans.keep(key, plan)
    a, weight = _aligned(a), _aligned(weight)
    row = STAGE_K // 2 if sparse else STAGE_K
    at = _MAPS_OFFSET
    plan.arguments[at : at + _MAP_BYTES] = _byte_map(
        weight.data_ptr(), n, weight.shape[1], _row_bytes(weight), (config.features, row)
    )
    at += _MAP_BYTES
    plan.arguments[at : at + _MAP_BYTES] = _byte_map(
        a.data_ptr(), m, k, _row_bytes(a), (config.tokens // config.multicast, STAGE_K)
    )
    _PROBLEM.pack_into(
        plan.arguments,
        0,
        scale_a.data_ptr(),
        scale_b.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0 if metadata is None else metadata.data_ptr(),
        int(scale_a.numel() > 1),
        int(scale_b.numel() > 1),
        m,
        n,
        math.ceil(k / STAGE_K),
        math.ceil(n / TILE_FEATURES),
    )
    plan.launch()


def _row_bytes(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else -(-t.shape[1] // 16) * 16


def _run(
    a: Tensor,
    weight: Tensor,
    metadata: Tensor | None,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    index = a.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _run(a, weight, metadata, scale_a, scale_b, out_dtype, bias)
    arch = launch.device_arch(index)
    if arch != "sm_90a":
        raise ConfigError(
            f"device {a.device} is {arch}; the scaled kernels need compute capability 9.0: move "
            "the tensors to the CPU, or dequantize"
        )
    m, k = a.shape
    n = weight.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if m == 0:
        return out
    config = scaled_configs.select(
        m, n, k, metadata is not None, _gpu_name(index), launch.multiprocessors(index)
    )
    scales = scale_a.contiguous(), scale_b.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch_config(config, a, weight, metadata, *scales, bias, out)
    return out


# ---- operators -----------------------------------------------------------------------------------


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    _check_dense(a, b)
    _check(a, b.dtype, b.shape[1], scale_a, scale_b, out_dtype, bias)
    if a.device.type == "cuda":
        return _run(a, b.t(), None, scale_a, scale_b, out_dtype, bias)
    return reference(a, b.t(), scale_a, scale_b, out_dtype, bias)


def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    _check_dense(a, b)
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


def _scaled_sparse_mm(
    a: Tensor,
    b_compressed: Tensor,
    b_meta: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    _check_sparse(a, b_compressed, b_meta)
    _check(a, b_compressed.dtype, b_compressed.shape[0], scale_a, scale_b, out_dtype, bias)
    if a.device.type == "cuda":
        values, meta = b_compressed.contiguous(), b_meta.contiguous()
        return _run(a, values, meta, scale_a, scale_b, out_dtype, bias)
    weight = decompress(b_compressed, b_meta, a.shape[1])
    return reference(a, weight, scale_a, scale_b, out_dtype, bias)


def _scaled_sparse_mm_fake(
    a: Tensor,
    b_compressed: Tensor,
    b_meta: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    return a.new_empty(a.shape[0], b_compressed.shape[0], dtype=out_dtype)


_library = torch.library.Library("marlin_kernel", "FRAGMENT")
for _name, _arguments, _function, _fake in (
    ("scaled_mm", "Tensor b", _scaled_mm, _scaled_mm_fake),
    (
        "scaled_sparse_mm",
        "Tensor b_compressed, Tensor b_meta",
        _scaled_sparse_mm,
        _scaled_sparse_mm_fake,
    ),
):
    _library.define(
        f"{_name}(Tensor a, {_arguments}, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, "
        "Tensor? bias=None) -> Tensor",
        tags=(torch.Tag.needs_fixed_stride_order,),
    )
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"marlin_kernel::{_name}", _fake, lib=_library)

scaled_mm = torch.ops.marlin_kernel.scaled_mm.default
"""``a @ b`` of 8-bit matrices with scales, [M, N] of out_dtype.

a: float8_e4m3fn or int8 [M, K]; b: same dtype, [K, N], column-major (`weight.t()`); scale_a:
float32 with 1 value or M; scale_b: float32 with 1 value or N; out_dtype: bfloat16 or float16; bias:
out_dtype [N] or None. Rows that do not start on 16 bytes are copied first.
Raises ConfigError naming what does not fit.
"""

scaled_sparse_mm = torch.ops.marlin_kernel.scaled_sparse_mm.default
"""`scaled_mm` with a 2:4 sparse b: b_compressed, b_meta are what `compress_2_4(weight)` returns."""
