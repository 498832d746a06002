"""Runs the sm_80 kernel (csrc/sm80): every type, on every GPU from sm_75 on.

Interface, as in `launch`: supports, gemm; and `quantize_activations` for activations of 8 bits.

Blocks that share an output tile add up in a workspace in global memory (`launch.workspace`), one
for each device and stream; its counters are zero before and after every launch.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
import threading
from dataclasses import replace

import torch
from torch import Tensor

from marlin_kernel import launch
from marlin_kernel.compiler import KernelSource
from marlin_kernel.sm80_configs import (
    GATHER_TOKENS,
    Geometry,
    KernelTypes,
    Sm80Config,
    geometry,
    select_config,
)
from marlin_kernel.validity import Combination, is_supported
from marlin_kernel.weight_types import WEIGHT_TYPES

# ---- launching ---------------------------------------------------------------------------------

RESERVED_SHARED_BYTES = 1024  # of each block, by the system
_PROBLEM = struct.Struct("<11Qq7i4x")  # sm80::Problem
_GATHER = struct.Struct("<3Qq2i")  # sm80::GatherProblem
_QUANTIZE = struct.Struct("<3Qq3i4x")  # sm80::QuantizeProblem
_PREPARE_THREADS = 256
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_EIGHT_BIT = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}


_load_lock = threading.Lock()


@functools.cache
def _load(source: KernelSource, shared_bytes: int, index: int) -> launch._Function:
    with _load_lock:
        return launch._Function(source, index, shared_bytes, carveout=False)


@functools.cache
def _select(index: int, m: int, types: KernelTypes, batch_invariant: bool) -> Sm80Config:
    limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    return select_config(m, types, limit, batch_invariant)


@functools.cache
def _blocks(index: int, config: Sm80Config, types: KernelTypes) -> int:
    """Blocks of a kernel that the device runs at once."""
    properties = torch.cuda.get_device_properties(index)
    per_block = config.shared_bytes(types) + RESERVED_SHARED_BYTES
    fitting = properties.shared_memory_per_multiprocessor // per_block
    return properties.multi_processor_count * max(1, min(config.blocks_per_sm, fitting))


def _workspace(index: int, stream: int, need: Geometry) -> launch.Workspace:
    """The workspace of a stream, at least as large as needed."""
    return launch.workspace(index, stream, need.partial_bytes, need.counters)


_plans = launch.ThreadPlans()


def _plan(
    source: KernelSource,
    threads: int,
    shared_bytes: int,
    argument_bytes: int,
    index: int,
    stream: int,
    grid: int,
) -> launch.Plan:
    """A plan of this thread. It does not overlap its predecessor: the kernel never waits for it."""
    key = (source, index, stream, grid)
    plan = _plans.get(key)
    if plan is None:
        plan = launch.Plan(
            _load(source, shared_bytes, index),
            (grid, 1, 1),
            threads,
            1,
            shared_bytes,
            stream,
            argument_bytes,
            dependent_launch=False,
        )
        _plans.keep(key, plan)
    return plan


@functools.cache
def _source(config: Sm80Config, types: KernelTypes) -> tuple[KernelSource, int]:
    return config.source(types), config.shared_bytes(types)


@functools.cache
def _types(
    weight_type: str, activation: str, output: str, group_size: int, sm75: bool
) -> KernelTypes:
    return KernelTypes(weight_type, activation, output, group_size, sm75=sm75)


@functools.cache
def _is_sm75(index: int) -> bool:
    return torch.cuda.get_device_capability(index) < (8, 0)


# ---- interface ---------------------------------------------------------------------------------


def supports(
    device: torch.device,
    weight_type: str,
    group_size: int,
    dtype: torch.dtype,
    activation: str | None = None,
    act_order: bool = False,
    k_full: bool = True,
) -> bool:
    """Can this kernel serve such a layer on `device`? group_size: -1 for one group.

    dtype: of the layer's inputs and outputs; activation: "int8" or "float8_e4m3fn" if inputs are
    rounded to 8 bits; act_order, k_full: as in validity.Combination. Compiles nothing.
    """
    if device.type != "cuda" or dtype not in NAMES or importlib.util.find_spec("cuda") is None:
        return False
    name, t = NAMES[dtype], WEIGHT_TYPES[weight_type]
    version = torch.cuda.get_device_capability(device)
    if version < (7, 5):
        return False
    if group_size not in t.group_sizes:  # one group of fewer inputs than the smallest group
        group_size = t.group_sizes[0]
    generation = "7.5" if version < (8, 0) else "8.9" if version >= (8, 9) else "8.0"
    c = Combination(t, activation or name, name, group_size, act_order, k_full)
    return is_supported(c, generation)


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
    weight_type: str = "uint4b8",
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    token_scales: Tensor | None = None,
    global_scale: Tensor | None = None,
    reduce_half: bool = False,
    batch_invariant: bool = False,
    config: Sm80Config | None = None,
    sm75: bool = False,
) -> None:
    """out = a @ W (+ bias), on the current stream of the device of `a`; no checks.

    a: float16 or bfloat16 [M, k], elements of a row adjacent, or what `quantize_activations`
    returns with its token_scales; weights, scales, zeros, perm, global_scale: of
    sm80_layout.KernelTensors; bias: [n] or None; out: [M, n], float16 or bfloat16 (that of a
    16-bit `a`), contiguous; k_padded, n_padded: sizes of the packed weights; group_size: inputs per
    scale, 0 or -1 for one scale per column; reduce_half: blocks exchange sums in fp16 (out is
    float16); batch_invariant: the same bits for a row in every batch; config: a row of the table
    instead of the selected one; sm75: use what sm_75 has, on any GPU.
    """
    m = a.shape[0]
    if m == 0 or n == 0:
        return
    index = a.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return gemm(
                *(a, weights, scales, bias, out, k, n, k_padded, n_padded, group_size),
                weight_type=weight_type,
                zeros=zeros,
                perm=perm,
                token_scales=token_scales,
                global_scale=global_scale,
                reduce_half=reduce_half,
                batch_invariant=batch_invariant,
                config=config,
                sm75=sm75,
            )
    output = NAMES[out.dtype]
    activation = output if token_scales is None else _EIGHT_BIT[a.dtype]
    t = WEIGHT_TYPES[weight_type]
    if group_size < 0 or (scales.shape[0] == 1 and t.symmetric and t.scale == "float16"):
        group_size = 0
    types = _types(weight_type, activation, output, group_size, sm75 or _is_sm75(index))
    if reduce_half:
        types = replace(types, reduce_half=True)
    stream = torch._C._cuda_getCurrentRawStream(index)
    if perm is not None:
        if m <= GATHER_TOKENS:
            types = replace(types, permuted=True)
        else:
            a, perm = gather(a, perm), None
        k = k_padded
    if config is None:
        config = _select(index, min(m, 256), types, batch_invariant)
    blocks = _blocks(index, config, types)
    need = geometry(config, types, m, n, k_padded, blocks, batch_invariant)
    workspace = _workspace(index, stream, need)
    source, shared_bytes = _source(config, types)
    plan = _plan(source, config.threads, shared_bytes, _PROBLEM.size, index, stream, need.grid)
    _PROBLEM.pack_into(
        plan.arguments,
        0,
        a.data_ptr(),
        weights.data_ptr(),
        scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        0 if perm is None else perm.data_ptr(),
        0 if token_scales is None else token_scales.data_ptr(),
        0 if global_scale is None else global_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        workspace.partials.data_ptr(),
        workspace.counters.data_ptr(),
        a.stride(0),
        *(m, n, k, n_padded, k_padded, need.splits, need.in_turn),
    )
    plan.launch()


# ---- activations ---------------------------------------------------------------------------------


def _grid(work: int, index: int) -> int:
    """Blocks for so many pieces of work: few different numbers, so that there are few plans."""
    most = 8 * torch.cuda.get_device_properties(index).multi_processor_count
    return min(most, 1 << max(0, work - 1).bit_length())


def run(
    source: KernelSource,
    threads: int,
    shared_bytes: int,
    arguments: bytes,
    work: int,
    device: torch.device,
) -> None:
    """Launch a kernel of one argument on the current stream of a device.

    work: pieces of work, that many blocks or fewer; the kernel's loop over them knows gridDim.x.
    """
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        size = len(arguments)
        plan = _plan(source, threads, shared_bytes, size, index, stream, _grid(work, index))
        plan.arguments[:size] = arguments
        plan.launch()


def gather(a: Tensor, perm: Tensor) -> Tensor:
    """Columns of the activations in the order of the weights' rows.

    a: float16 or bfloat16 [M, K], elements of a row adjacent; perm: int32 [K'], -1 for zeros, K' a
    multiple of 8. Returns [M, K'] on the current stream.
    """
    m, k_padded = a.shape[0], perm.shape[0]
    out = a.new_empty(m, k_padded)
    if m == 0:
        return out
    source = KernelSource("sm80/activations.cuh", "sm80::gather_activations<8>")
    pointers = (a.data_ptr(), perm.data_ptr(), out.data_ptr())
    arguments = _GATHER.pack(*pointers, a.stride(0), m, k_padded)
    work = -(-m * k_padded // (8 * _PREPARE_THREADS))
    run(source, _PREPARE_THREADS, 0, arguments, work, a.device)
    return out


def quantize_activations(a: Tensor, dtype: torch.dtype, k_padded: int) -> tuple[Tensor, Tensor]:
    """Round activations to 8 bits with one scale per token, in the kernels' order of k.

    a: float16 or bfloat16 [M, K], elements of a row adjacent; dtype: torch.int8 or (sm_89 and
    newer) torch.float8_e4m3fn; k_padded: a multiple of 16. Returns (codes [M, k_padded], scales
    float32 [M]), equal to reference.quantize_activations and sm80_layout.kernel_activations.
    """
    m, k = a.shape
    codes = a.new_empty(m, k_padded, dtype=dtype)
    scales = a.new_empty(m, dtype=torch.float32)
    if m == 0:
        return codes, scales
    scalar = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}[a.dtype]
    code = "int8_t" if dtype == torch.int8 else "float8_e4m3"
    expression = f"sm80::quantize_activations<{scalar}, {code}>"
    source = KernelSource("sm80/activations.cuh", expression)
    pointers = (a.data_ptr(), codes.data_ptr(), scales.data_ptr())
    arguments = _QUANTIZE.pack(*pointers, a.stride(0), m, k, k_padded)
    run(source, _PREPARE_THREADS, 4 * _PREPARE_THREADS // 32, arguments, m, a.device)
    return codes, scales
