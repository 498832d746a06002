"""Load compiled kernels and launch them on torch's current stream.

Interface for `marlin_kernel.ops` (everything else here is private to kernels and tuning):
    supports(...)  can this device run this weight type? (no compilation)
    gemm(...)      out = a @ W (+ bias), W as sm90_layout.kernel_tensors left it
    product(...)   how gemm multiplies so many rows: its `multiply`, for callers that ask often

A launch costs a dictionary look-up, packing of one argument block and one driver call: kernels are
launched through plans that hold the function, the launch attributes and the argument buffers. Plans
belong to a thread, because the driver call releases the GIL while it reads those buffers.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_kernel import kernel_configs
from marlin_kernel.compiler import KernelSource, compile_kernel
from marlin_kernel.errors import MarlinError
from marlin_kernel.kernel_configs import (
    TILE_K,
    TILE_N,
    DecodeConfig,
    GemmConfig,
    KernelConfig,
)
from marlin_kernel.sm90_layout import Sizes
from marlin_kernel.weight_types import WEIGHT_TYPES

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class LaunchError(MarlinError, RuntimeError):
    """The driver cannot be called, or refused a call, which the message names with its error."""


@functools.lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise LaunchError(
            "cuda.bindings is not installed; it comes with CUDA builds of torch >= 2.10, or "
            "`pip install cuda-bindings`; MARLIN_KERNEL_BACKEND=marlin does without kernels"
        ) from error
    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    driver = _driver()
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        text = driver.cuGetErrorString(code)[1]
        raise LaunchError(f"{what}: {text.decode() if text else code}")
    return values[0] if len(values) == 1 else tuple(values)


# ---- kernels -------------------------------------------------------------------------------------


@functools.cache
def device_arch(index: int) -> str:
    """Compiler target of CUDA device `index`: "sm_90a" on Hopper, else "sm_<capability>"."""
    major, minor = torch.cuda.get_device_capability(index)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


class _Function:
    """A kernel loaded on one device. The module stays loaded as long as the process lives.

    shared_bytes: dynamic shared memory that a block may ask for; carveout: each multiprocessor
    gives shared memory all that it can, so that as many blocks as possible fit.
    """

    def __init__(
        self, source: KernelSource, index: int, shared_bytes: int, carveout: bool = True
    ) -> None:
        driver = _driver()
        cubin = compile_kernel(source, device_arch(index))
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # the primary context is current from here on
            self.module = _check(driver.cuModuleLoadData(cubin.image), "cuModuleLoadData")
            self.handle = _check(
                driver.cuModuleGetFunction(self.module, cubin.symbol.encode()),
                "cuModuleGetFunction",
            )
            attribute = driver.CUfunction_attribute
            settings = [(attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)]
            if carveout:
                settings.append((attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
            for name, value in settings:
                _check(driver.cuFuncSetAttribute(self.handle, name, value), "cuFuncSetAttribute")


_functions: dict[tuple[KernelSource, int], _Function] = {}
_functions_lock = threading.Lock()


def load(source: KernelSource, index: int) -> _Function:
    """The kernel `source` on CUDA device `index`: compiled (or read from the cache) and loaded
    once.
    """
    found = _functions.get((source, index))
    if found is None:
        with _functions_lock:
            found = _functions.get((source, index))
            if found is None:
                properties = torch.cuda.get_device_properties(index)
                most = properties.shared_memory_per_block_optin
                found = _functions[source, index] = _Function(source, index, most)
    return found


# ---- plans ---------------------------------------------------------------------------------------


class Plan:
    """One way to launch one kernel: grid, cluster, shared memory, stream, argument buffer.

    A plan serves one thread at a time.
    """

    def __init__(
        self,
        function: _Function,
        grid: tuple[int, int, int],
        threads: int,
        cluster: int,
        shared_bytes: int,
        stream: int,
        argument_bytes: int,
        *,
        dependent_launch: bool = True,
    ) -> None:
        driver = _driver()
        self._launch = driver.cuLaunchKernelEx
        self._success = driver.CUresult.CUDA_SUCCESS
        self._function = function  # keeps the module alive
        self._handle = function.handle
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(stream)
        attributes = []
        identifier = driver.CUlaunchAttributeID
        if dependent_launch:
            attribute = driver.CUlaunchAttribute()
            attribute.id = identifier.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = identifier.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = 1
            attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        self._config = config
        # Arguments live in one 64-byte aligned block (tensor maps need that).
        self._memory = (ctypes.c_uint8 * (argument_bytes + 64))()
        base = ctypes.addressof(self._memory)
        self._offset = -base % 64
        self.arguments = memoryview(self._memory).cast("B")[self._offset :]
        base += self._offset
        self._pointers = (ctypes.c_void_p * 2)(base, base + _TENSOR_MAP_OFFSET)
        self._pointers_address = ctypes.addressof(self._pointers)

    def launch(self) -> None:
        """Launch with what `arguments` holds. Raises LaunchError if the driver refuses."""
        (code,) = self._launch(self._config, self._handle, self._pointers_address, 0)
        if code != self._success:
            _check((code,), "cuLaunchKernelEx")


_PROBLEM = struct.Struct("<QQQQQqiiiiiii4xQQQ")  # sm90::Problem
_GATHER = struct.Struct("<QQQqiiii")  # sm90::GatherProblem
_GATHERED_TENSORS = struct.Struct("<QQQq")  # its first members
_TENSOR_MAP_OFFSET = 128  # of the second argument in a plan's buffer: the map, or the permutation
_TENSOR_MAP_BYTES = 128
_ADDRESS = struct.Struct("<Q")


class ThreadPlans(threading.local):
    """Plans of one thread by what distinguishes them; at most 4096, then all are made again."""

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], Any] = {}
        self.get = self._plans.get

    def keep(self, key: tuple[Any, ...], plan: Any) -> Any:
        if len(self._plans) >= 4096:
            self._plans.clear()
        self._plans[key] = plan
        return plan


class _ProductPlan(Plan):
    """A plan for products of m tokens with weights of one size, by one of this file's kernels.

    Everything but the addresses of tensors and the row stride of the activations is decided here,
    because host time counts for each call. act_order: the activations are gathered, by the kernel
    or by one in front of it.
    """

    def __init__(
        self,
        config: KernelConfig,
        index: int,
        stream: int,
        dtype: str,
        m: int,
        sizes: Sizes,
        act_order: bool,
        dependent_launch: bool,
    ) -> None:
        k, n, k_padded, n_padded, group_size, weight_type = sizes
        k_tiles, column_tiles = k_padded // TILE_K, n_padded // TILE_N
        self._gathered = act_order and not config.gathers
        if self._gathered:
            k = k_padded
        super().__init__(
            load(config.source(dtype, group_size, weight_type), index),
            config.grid(
                *(m, k_tiles, column_tiles, group_size, multiprocessors(index), weight_type)
            ),
            config.threads,
            config.split if isinstance(config, DecodeConfig) or config.cluster else 1,
            config.shared_bytes(m, k_tiles, group_size, weight_type),
            stream,
            _TENSOR_MAP_OFFSET + _TENSOR_MAP_BYTES,
            dependent_launch=dependent_launch,
        )
        self._gathers = config.gathers
        self._on_stream = (index, stream)
        self._workspace = (0, 0)  # floats and counters that blocks need to add up
        self._memory: Workspace | None = None  # that they had in the last call
        self._mapped: tuple[int, int] | None = None  # address and stride in the tensor map
        self._box: tuple[str, int, int, int] | None = None  # what else the map is made of
        split, whole_tiles = config.split, 0  # of the warpgroup kernel: tiles that are not split
        if isinstance(config, GemmConfig):
            size = (m, column_tiles, multiprocessors(index))
            split, whole_tiles = config.parts(*size), config.whole_tiles(*size)
            self._workspace = config.workspace(*size)
            self._box = (dtype, m, k, config.tokens)
        self._row_stride = -(-k // 8) * 8 if m == 1 else k  # that of a single row means nothing
        self._sizes = (m, n, k, column_tiles, k_tiles, split, whole_tiles)

    def multiply(
        self,
        a: Tensor,
        b: Tensor,
        s: Tensor,
        bias: Tensor | None,
        out: Tensor,
        global_scale: Tensor | None,
        perm: Tensor | None,
    ) -> None:
        """Launch with tensors as `gemm` takes them."""
        if self._gathered:
            a = gather(a.reshape(-1, a.shape[-1]), perm)
        stride = self._row_stride if a.is_contiguous() else a.stride()[0]
        address = a.data_ptr()
        partials = counters = 0
        if self._box is not None:
            if self._workspace[1] > 0:
                memory, capturing = self._memory, torch.cuda.is_current_stream_capturing()
                if capturing or memory is None or _workspaces.get(self._on_stream) is not memory:
                    floats, number = self._workspace
                    memory = workspace(*self._on_stream, 4 * floats, number)
                    self._memory = None if capturing else memory  # a graph's must not be kept
                partials, counters = memory.addresses
            if address % 16 or stride % 8:  # tensor copies need rows that start on 16 bytes
                a = aligned_rows(a)
                address, stride = a.data_ptr(), a.stride(0)
            if self._mapped != (address, stride):
                self._mapped = None
                start, end = _TENSOR_MAP_OFFSET, _TENSOR_MAP_OFFSET + _TENSOR_MAP_BYTES
                dtype, m, k, tokens = self._box
                self.arguments[start:end] = _tensor_map(address, dtype, m, k, 2 * stride, tokens)
                self._mapped = (address, stride)
        elif self._gathers:
            _ADDRESS.pack_into(self.arguments, _TENSOR_MAP_OFFSET, perm.data_ptr())
        _PROBLEM.pack_into(
            self.arguments,
            0,
            address,
            b.data_ptr(),
            s.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            stride,
            *self._sizes,
            partials,
            counters,
            0 if global_scale is None else global_scale.data_ptr(),
        )
        self.launch()


_plans = ThreadPlans()


def _product_plan(config: KernelConfig, index: int, stream: int, *problem: Any) -> _ProductPlan:
    """This thread's plan with these arguments."""
    key = (config, index, stream, *problem)
    return _plans.get(key) or _plans.keep(key, _ProductPlan(*key))


class _Parts:
    """Products of more rows than one launch may take, in two halves."""

    def __init__(self, rows: int, m: int, *problem: Any) -> None:
        self._halves = (slice(0, rows), slice(rows, m))
        self._problem = problem

    def multiply(self, a: Tensor, b: Tensor, s: Tensor, bias: Any, out: Tensor, *rest: Any) -> None:
        """As _ProductPlan.multiply."""
        sizes = self._problem[0]
        a, out = a.reshape(-1, sizes.k), out.view(-1, sizes.n)
        for rows in self._halves:
            part = product(rows.stop - rows.start, *self._problem)
            part.multiply(a[rows], b, s, bias, out[rows], *rest)


class _OnDevice:
    """Products on a device that is not the current one."""

    def __init__(self, *problem: Any) -> None:
        self._problem = problem

    def multiply(self, a: Tensor, *rest: Any) -> None:
        """As _ProductPlan.multiply."""
        with torch.cuda.device(a.device):
            product(*self._problem).multiply(a, *rest)


def product(
    m: int,
    sizes: Sizes,
    dtype: torch.dtype,
    index: int,
    batch_invariant: bool = False,
    act_order: bool = False,
) -> _ProductPlan | _Parts | _OnDevice:
    """How m > 0 rows are multiplied on device `index`, on its current stream: by `multiply`.

    One look-up when it has been asked before. See `gemm` for the arguments.
    """
    current = torch.cuda.current_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    key = (m, sizes, dtype, index, current, stream, batch_invariant, act_order)
    found = _plans.get(key)
    if found is None:
        problem = (sizes, dtype, index, batch_invariant, act_order)
        found = _plans.keep(key, _new_product(m, *problem, current, stream))
    return found


def _new_product(
    m: int,
    sizes: Sizes,
    dtype: torch.dtype,
    index: int,
    batch_invariant: bool,
    act_order: bool,
    current: int,
    stream: int,
) -> _ProductPlan | _Parts | _OnDevice:
    problem = (sizes, dtype, index, batch_invariant, act_order)
    if index != current:
        return _OnDevice(m, *problem)
    select = kernel_configs.select_for_act_order if act_order else kernel_configs.select_config
    k_tiles, column_tiles = sizes.k_padded // TILE_K, sizes.n_padded // TILE_N
    config = select(
        m,
        k_tiles,
        column_tiles,
        sizes.group_size,
        batch_invariant=batch_invariant,
        gpu=_gpu_key(index),
        multiprocessors=multiprocessors(index),
        weight_type=sizes.weight_type,
        dtype=_DTYPES[dtype],
    )
    if batch_invariant and not kernel_configs.affordable(
        config, m, column_tiles, multiprocessors(index)
    ):  # the split must stay, so fewer rows at a time; their bits do not depend on that
        return _Parts(-(-m // 256) * 128, m, *problem)
    return _product_plan(config, index, stream, _DTYPES[dtype], m, sizes, act_order, True)


@functools.cache
def multiprocessors(index: int) -> int:
    """Multiprocessors of CUDA device `index`."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache(maxsize=4096)
def _tensor_map(address: int, dtype: str, m: int, k: int, row_bytes: int, tokens: int) -> bytes:
    """Encoded map of activations [m, k] for boxes of `tokens` rows x 64 k with the 128-byte
    swizzle.
    """
    driver = _driver()
    element = driver.CUtensorMapDataType
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    encoded = _check(
        driver.cuTensorMapEncodeTiled(
            element.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
            if dtype == "float16"
            else element.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [u64(k), u64(m)],
            [u64(row_bytes)],
            [u32(TILE_K), u32(tokens)],
            [u32(1), u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "cuTensorMapEncodeTiled",
    )
    return ctypes.string_at(encoded.getPtr(), _TENSOR_MAP_BYTES)


def aligned_rows(a: Tensor) -> Tensor:
    """A copy of `a` [..., k] as [M, k] whose rows start on 16 bytes."""
    k = a.shape[-1]
    rows = a.reshape(-1, k)
    copy = a.new_empty(rows.shape[0], -(-k // 8) * 8)[:, :k]
    return copy.copy_(rows)


@dataclass(frozen=True)
class Workspace:
    """Memory in which blocks of one launch add up; hold it until the launch has been made."""

    partials: Tensor  # uint8
    counters: Tensor  # int32, zero whenever no kernel runs

    @functools.cached_property
    def addresses(self) -> tuple[int, int]:
        return self.partials.data_ptr(), self.counters.data_ptr()


_workspaces: dict[tuple[int, ...], Workspace] = {}
_outgrown: list[Tensor] = []  # counters that a captured graph may still use
_workspace_lock = threading.Lock()


def workspace(index: int, stream: int, partial_bytes: int, counters: int) -> Workspace:
    """At least so many bytes and zeroed counters, for launches on one stream of device `index`.

    While a CUDA graph is captured, partial sums are temporary memory of the graph, and counters
    are kept for good, apart for every capture: graphs may be replayed on other streams.
    """
    key: tuple[int, ...] = (index, stream)
    capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        status = _check(_driver().cuStreamGetCaptureInfo(stream), "cuStreamGetCaptureInfo")
        key = (index, stream, int(status[1]))
    found = _workspaces.get(key)
    kept_bytes = 0 if capturing else partial_bytes
    if found is None or found.partials.numel() < kept_bytes or found.counters.numel() < counters:
        with _workspace_lock:
            if found is None:
                sizes = (0 if capturing else 1 << 24, 4096)
            else:
                sizes = (found.partials.numel(), found.counters.numel())
                if capturing:
                    _outgrown.append(found.counters)
                else:  # kernels that use it may still run
                    torch.cuda.current_stream(index).synchronize()
            found = _workspaces[key] = _lasting_workspace(
                index, max(kept_bytes, sizes[0]), max(counters, sizes[1])
            )
    if capturing:
        device = found.counters.device
        partials = torch.empty(partial_bytes, dtype=torch.uint8, device=device)
        return Workspace(partials, found.counters)
    return found


def _lasting_workspace(index: int, partial_bytes: int, counters: int) -> Workspace:
    """Memory that outlives captures.

    Captured graphs take over what is allocated on the stream that they capture, torch.compile's
    pools for graphs what is allocated by their thread, and both refuse what stays allocated. Hence
    a thread and a stream of its own.
    """

    def allocate() -> Workspace:
        driver = _driver()
        with torch.cuda.device(index), torch.cuda.stream(_allocation_stream(index)):
            # captures of other threads must not forbid to allocate and to wait
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            _check(
                driver.cuThreadExchangeStreamCaptureMode(mode), "cuThreadExchangeStreamCaptureMode"
            )
            device = torch.device("cuda", index)
            made = Workspace(
                torch.empty(partial_bytes, dtype=torch.uint8, device=device),
                torch.zeros(counters, dtype=torch.int32, device=device),
            )
            _allocation_stream(index).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


@functools.cache
def _allocation_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def launch_config(
    config: KernelConfig,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    bias: Tensor | None,
    out: Tensor,
    k: int,
    n: int,
    k_padded: int,
    n_padded: int,
    group_size: int,
    dependent_launch: bool = True,
    weight_type: str = "uint4b8",
    global_scale: Tensor | None = None,
    perm: Tensor | None = None,
) -> None:
    """Launch `config` for out = a @ W + bias; see `gemm` for the arguments. No checks.

    With `perm`, a kernel that does not gather activations is preceded by one that does.
    """
    index = a.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    sizes = Sizes(k, n, k_padded, n_padded, group_size, weight_type)
    problem = (_DTYPES[a.dtype], a.shape[0], sizes, perm is not None, dependent_launch)
    plan = _product_plan(config, index, stream, *problem)
    plan.multiply(a, b, s, bias, out, global_scale, perm)


def gather(a: Tensor, perm: Tensor, shape: kernel_configs.GatherPlan | None = None) -> Tensor:
    """Columns of the activations in the order of the weights' rows, on the current stream.

    a: float16 or bfloat16 [M, K], elements of a row adjacent, any row stride; perm: int32 [K'], -1
    for zeros, K' a multiple of 64; shape: of the launch, instead of kernel_configs.gather_plan's.
    Returns [M, K'].
    """
    (m, k), k_padded = a.shape, perm.shape[0]
    if k > kernel_configs.MAX_GATHERED_INPUTS:  # more than its indices of 16 bits can tell
        from marlin_kernel import sm80_path

        return sm80_path.gather(a, perm)
    out = a.new_empty(m, k_padded)
    if m == 0:
        return out
    index = a.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    key = ("gather", index, stream, m, k, k_padded, shape)
    plan = _plans.get(key)
    if plan is None:
        if shape is None:
            shape = kernel_configs.gather_plan(m, k, k_padded, multiprocessors(index))
        function = load(shape.source(), index)
        size = (shape.grid, shape.threads, shape.cluster, shape.shared_bytes)
        plan = _plans.keep(key, Plan(function, *size, stream, _GATHER.size))
        _GATHER.pack_into(plan.arguments, 0, 0, 0, 0, 0, m, k, k_padded, shape.part)
    addresses = (a.data_ptr(), perm.data_ptr(), out.data_ptr())
    _GATHERED_TENSORS.pack_into(plan.arguments, 0, *addresses, a.stride(0))
    plan.launch()
    return out


# ---- interface -----------------------------------------------------------------------------------


@functools.cache
def supports(
    device: torch.device, weight_type_name: str, group_size: int, dtype: torch.dtype
) -> bool:
    """Whether `gemm` serves this weight type, group size (-1: one group) and activation dtype.

    Compiles nothing.
    """
    t = WEIGHT_TYPES[weight_type_name]
    # one group of fewer inputs than the smallest group is repeated
    repeated = group_size == -1 and -1 not in t.group_sizes
    return (
        device.type == "cuda"
        and (repeated or group_size in t.group_sizes)
        and _DTYPES.get(dtype) in t.activations
        and torch.cuda.is_available()
        and device_arch(_index(device)) == "sm_90a"
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def gemm(
    a: Tensor,
    b_dev: Tensor,
    s_dev: Tensor,
    bias: Tensor | None,
    out: Tensor,
    k: int,
    n: int,
    k_padded: int,
    n_padded: int,
    group_size: int,
    batch_invariant: bool = False,
    weight_type: str = "uint4b8",
    global_scale: Tensor | None = None,
    perm: Tensor | None = None,
) -> None:
    """``out = a @ W (+ bias)`` on the current stream; W as sm90_layout.kernel_tensors left it.

    a: float16 or bfloat16 [M, k], any M >= 0, contiguous along k, any row stride, or contiguous
    [..., k]; b_dev, s_dev: `weights` and `scales`, in device order; bias: [n] in the dtype of `a`,
    or None; out: [..., n], contiguous, every element is written; k_padded: multiple of 64 and of
    group_size; n_padded: multiple of 64; group_size: one of
    kernel_configs.group_sizes(weight_type), -1 for one scale per feature; batch_invariant: a row's
    bits do not depend on M; global_scale: float32 [1] of types that have one; perm: int32
    [k_padded] or None, the input that each row of W belongs to, -1: none (act-order).
    Nothing is checked here. Raises LaunchError if the driver refuses, CompileError on first use.
    """
    m = a.numel() // k
    if m == 0 or n == 0:
        return
    sizes = Sizes(k, n, k_padded, n_padded, group_size, weight_type)
    how = product(m, sizes, a.dtype, a.get_device(), batch_invariant, perm is not None)
    how.multiply(a, b_dev, s_dev, bias, out, global_scale, perm)


@functools.cache
def _gpu_key(index: int) -> str:
    return kernel_configs.gpu_key(torch.cuda.get_device_name(index))
