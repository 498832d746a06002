"""Runs the sm_90a kernels for packed weights and 8-bit activations (csrc/sm90_8bit).

Interface, as in `sm80_path`: supports, gemm. Weights are `sm90_8bit_layout.Records`, activations
what `sm80_path.quantize_activations` returns.
"""

from __future__ import annotations

import functools
import importlib.util
import struct

import torch
from torch import Tensor

from . import launch, scaled_mm
from .scaled_configs import STAGE_K
from .sm80_path import NAMES
from .sm90_8bit_configs import TYPES, EightBitConfig, EightBitTypes, select_config
from .weight_types import WEIGHT_TYPES

_PROBLEM = struct.Struct("<QQQQQiiiiiiQ")  # sm90_8bit::Problem


def supports(
    device: torch.device,
    weight_type: str,
    group_size: int,
    dtype: torch.dtype,
    activation: str | None,
    act_order: bool = False,
    k_full: bool = True,
) -> bool:
    """Can these kernels serve such a layer on `device`? group_size: -1 for one group.

    dtype: of the layer's inputs and outputs; activation: what inputs are rounded to; act_order,
    k_full: as in validity.Combination. Compiles nothing.
    """
    return (
        device.type == "cuda"
        and activation in TYPES.get(weight_type, ())
        and group_size in (-1, *WEIGHT_TYPES[weight_type].group_sizes)
        and dtype in NAMES
        and not act_order
        and k_full
        and importlib.util.find_spec("cuda") is not None
        and torch.cuda.is_available()
        and launch.device_arch(launch._index(device)) == "sm_90a"
    )


@functools.cache
def types(weight_type: str, activation: str, dtype: torch.dtype, group_size: int) -> EightBitTypes:
    """What a kernel is compiled for. dtype: of the output; group_size: 0 for one group."""
    return EightBitTypes(weight_type, activation, NAMES[dtype], group_size)


_plans = launch.ThreadPlans()


def _limit_to_resident(plan: launch.Plan, cluster: int) -> None:
    """No more clusters than run at once: tiles are divided among all, and late ones would be late.

    Clusters of 4 do not fit on every multiprocessor.
    """
    most = launch._check(
        launch._driver().cuOccupancyMaxActiveClusters(plan._handle, plan._config),
        "cuOccupancyMaxActiveClusters",
    )
    plan._config.gridDimX = min(plan._config.gridDimX, max(1, int(most)) * cluster)


def launch_config(
    config: EightBitConfig,
    types: EightBitTypes,
    a: Tensor,
    token_scales: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    dependent_launch: bool = True,
) -> None:
    """Launch `config` on the current stream; see `gemm` for the arguments. No checks."""
    (m, k), n = a.shape, out.shape[1]
    index = a.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    key = (config, types, index, stream, m, n, dependent_launch)
    plan = _plans.get(key)
    if plan is None:
        plan = launch.Plan(
            launch.load(config.source(types), index),
            (config.grid(m, n, launch.multiprocessors(index)), 1, 1),
            config.threads,
            config.cluster,
            config.storage_bytes(types),
            stream,
            launch._TENSOR_MAP_OFFSET + launch._TENSOR_MAP_BYTES,
            dependent_launch=dependent_launch,
        )
        if config.multicast > 1:
            _limit_to_resident(plan, config.multicast)
        _plans.keep(key, plan)
    start = launch._TENSOR_MAP_OFFSET
    plan.arguments[start : start + launch._TENSOR_MAP_BYTES] = scaled_mm._byte_map(
        a.data_ptr(), m, k, k, (config.tokens // config.multicast, STAGE_K)
    )
    _PROBLEM.pack_into(
        plan.arguments,
        0,
        token_scales.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0,  # metadata
        1,  # a scale of every token
        int(scales.numel() > 1),
        m,
        n,
        weights.shape[1],
        weights.shape[0],
        weights.data_ptr(),
    )
    plan.launch()


def gemm(
    a: Tensor,
    token_scales: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    types: EightBitTypes,
    batch_invariant: bool = False,
) -> None:
    """out = a @ W (+ bias), on the current stream of the device of `a`; no checks.

    a, token_scales: of sm80_path.quantize_activations: codes [M, K''] in the kernels' order of k,
    contiguous, K'' a multiple of 16 not below K, and float32 [M]; weights, scales: of
    sm90_8bit_layout.Records; bias: [n] of the dtype of `out`, or None; out: [M, n], contiguous;
    batch_invariant: the same bits for a row in every batch.
    Raises LaunchError if the driver refuses, CompileError on first use.
    """
    (m, k), n = a.shape, out.shape[1]
    if m == 0 or n == 0:
        return
    index = a.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return gemm(a, token_scales, weights, scales, bias, out, types, batch_invariant)
    config = select_config(
        *(m, n, k, types, batch_invariant),
        scaled_mm._gpu_name(index),
        launch.multiprocessors(index),
    )
    launch_config(config, types, a, token_scales, weights, scales, bias, out)
