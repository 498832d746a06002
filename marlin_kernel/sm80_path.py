"""Runs the sm_80 kernel (csrc/sm80): Ampere, Ada, and every newer GPU as a fallback.

Interface, as in `launch`: supports, convert_layout, gemm.

Blocks that share an output tile add up in a workspace in global memory. It belongs to this module,
one for each device and stream; its counters are zero before and after every launch.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_kernel import launch
from marlin_kernel.compiler import KernelSource, compile_kernel
from marlin_kernel.layout import unpermute_columns
from marlin_kernel.sm80_configs import (
    SCALARS,
    Geometry,
    Sm80Config,
    geometry,
    select_config,
)

# ---- launching ---------------------------------------------------------------------------------

RESERVED_SHARED_BYTES = 1024  # of each block, by the system
_PROBLEM = struct.Struct("<7Qq7i4x")  # sm80::Problem


class _Function:
    """A kernel loaded on one device, and what that device offers. Stays loaded."""

    def __init__(self, source: KernelSource, shared_bytes: int, index: int) -> None:
        driver = launch._driver()
        cubin = compile_kernel(source, launch.device_arch(index))
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # the primary context is current from here on
            self.module = launch._check(driver.cuModuleLoadData(cubin.image), "cuModuleLoadData")
            self.handle = launch._check(
                driver.cuModuleGetFunction(self.module, cubin.symbol.encode()),
                "cuModuleGetFunction",
            )
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            launch._check(
                driver.cuFuncSetAttribute(self.handle, limit, shared_bytes), "cuFuncSetAttribute"
            )


_load_lock = threading.Lock()


@functools.cache
def _load(config: Sm80Config, dtype: torch.dtype, group_size: int, index: int) -> _Function:
    with _load_lock:
        source = config.source(dtype, group_size)
        return _Function(source, config.shared_bytes(group_size), index)


@functools.cache
def _select(index: int, m: int, group_size: int, batch_invariant: bool) -> Sm80Config:
    limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    return select_config(m, group_size, limit, batch_invariant)


@functools.cache
def _blocks(index: int, config: Sm80Config, group_size: int) -> int:
    """Blocks of a kernel that the device runs at once."""
    properties = torch.cuda.get_device_properties(index)
    per_block = config.shared_bytes(group_size) + RESERVED_SHARED_BYTES
    fitting = properties.shared_memory_per_multiprocessor // per_block
    return properties.multi_processor_count * max(1, min(config.blocks_per_sm, fitting))


@dataclass(frozen=True)
class _Workspace:
    partials: Tensor  # uint8
    counters: Tensor  # int32, zero whenever no kernel runs


_workspaces: dict[tuple[int, ...], _Workspace] = {}
_workspace_lock = threading.Lock()


def _workspace(index: int, stream: int, need: Geometry) -> _Workspace:
    """The workspace of a stream, at least as large as needed.

    Memory allocated while a CUDA graph is captured belongs to that graph, and its zeroing becomes a
    node of the graph: it is kept apart, for the calls of the same capture.
    """
    key: tuple[int, ...] = (index, stream)
    if torch.cuda.is_current_stream_capturing():
        driver = launch._driver()
        status = launch._check(driver.cuStreamGetCaptureInfo(stream), "cuStreamGetCaptureInfo")
        key = (index, stream, int(status[1]))
    with _workspace_lock:
        found = _workspaces.get(key)
        if (
            found is None
            or found.partials.numel() < need.partial_bytes
            or found.counters.numel() < need.counters
        ):
            if len(key) == 3:  # earlier captures are over, or about to be
                for old in [k for k in _workspaces if len(k) == 3 and k[2] != key[2]]:
                    del _workspaces[old]
            device = torch.device("cuda", index)
            sizes = (0, 0) if found is None else (found.partials.numel(), found.counters.numel())
            found = _workspaces[key] = _Workspace(
                torch.empty(max(sizes[0], need.partial_bytes), dtype=torch.uint8, device=device),
                torch.zeros(max(sizes[1], need.counters), dtype=torch.int32, device=device),
            )
        return found


class _ThreadPlans(threading.local):
    def __init__(self) -> None:
        self.plans: dict[tuple[Any, ...], launch.Plan] = {}


_thread_plans = _ThreadPlans()
_MAX_PLANS = 4096


def _plan(
    config: Sm80Config, dtype: torch.dtype, group_size: int, index: int, stream: int, grid: int
) -> launch.Plan:
    """A plan of this thread. It does not overlap its predecessor: the kernel never waits for it."""
    plans = _thread_plans.plans
    key = (config, dtype, group_size, index, stream, grid)
    plan = plans.get(key)
    if plan is None:
        if len(plans) >= _MAX_PLANS:
            plans.clear()
        plan = plans[key] = launch.Plan(
            _load(config, dtype, group_size, index),
            (grid, 1, 1),
            config.threads,
            1,
            config.shared_bytes(group_size),
            stream,
            _PROBLEM.size,
            dependent_launch=False,
        )
    return plan


# ---- interface ---------------------------------------------------------------------------------


def supports(device: torch.device, weight_type: str, group_size: int, dtype: torch.dtype) -> bool:
    """Can this kernel serve such a layer on `device`? group_size: -1 for one group.

    Compiles nothing.
    """
    return (
        device.type == "cuda"
        and weight_type == "uint4b8"
        and group_size in (-1, 32, 64, 128)
        and dtype in SCALARS
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and importlib.util.find_spec("cuda") is not None
    )


def convert_layout(
    B: Tensor, s: Tensor, k: int, n: int, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """On-disk Marlin tensors (FORMAT.md) to what `gemm` takes.

    B: int32 [K'/16, 2 N']; s: float16 [G, N'] in the stored column order; the other arguments are
    not needed. Returns B itself, whose 16 x 64 tiles hold whole operand fragments, and the scales,
    whose columns return to natural order if there is only one group.
    """
    return B, s if s.shape[0] > 1 else unpermute_columns(s, grouped=False)


def gemm(
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    k: int,
    n: int,
    k_padded: int,
    n_padded: int,
    group_size: int,
    *,
    batch_invariant: bool = False,
    config: Sm80Config | None = None,
) -> None:
    """out = a @ W (+ bias), on the current stream of the device of `a`; no checks.

    a: float16 or bfloat16 [M, K], elements of a row adjacent; weights, scales: from
    `convert_layout`; bias: [N] or None, out: [M, N] contiguous, both of the dtype of `a`; k_padded,
    n_padded: sizes of the packed weights; group_size: -1 for one group; batch_invariant: the same
    bits for a row in every batch; config: a row of the table instead of the selected one.
    """
    m = a.shape[0]
    if m == 0 or n == 0:
        return
    index = a.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return gemm(
                *(a, weights, scales, bias, out, k, n, k_padded, n_padded, group_size),
                batch_invariant=batch_invariant,
                config=config,
            )
    group_size = group_size if scales.shape[0] > 1 else 0
    if config is None:
        config = _select(index, min(m, 256), group_size, batch_invariant)
    blocks = _blocks(index, config, group_size)
    need = geometry(config, m, n, k_padded, blocks, batch_invariant)
    stream = torch._C._cuda_getCurrentRawStream(index)
    workspace = _workspace(index, stream, need)
    plan = _plan(config, a.dtype, group_size, index, stream, need.grid)
    _PROBLEM.pack_into(
        plan.arguments,
        0,
        a.data_ptr(),
        weights.data_ptr(),
        scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        workspace.partials.data_ptr(),
        workspace.counters.data_ptr(),
        a.stride(0),
        *(m, n, k, n_padded, k_padded, need.splits, need.in_turn),
    )
    plan.launch()
