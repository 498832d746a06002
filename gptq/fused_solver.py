"""The solver's inner loops as CUDA kernels (csrc/): the same functions as in `grid` and `solver`.

`search_grid`, `update`, `sweep`, `prune` and `add_dots` take and return what `grid.search_grid`,
`sparsity.prune` and the functions of `solver` do, for tensors on a GPU. Codes are equal except
where a weight lies within float32 rounding of the middle between two codes, or two clipping
factors, or the removals of two pairs, cost that equally.

Everything is compiled at run time for the device at hand (marlin_kernel.compiler); no CUDA toolkit
is needed.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marlin_kernel import launch
from marlin_kernel.compiler import KernelSource
from marlin_kernel.weight_types import INTEGER_TYPES, WeightType

from . import grid, products, sparsity
from .grid import GridOptions
from .sparsity import QUAD

if TYPE_CHECKING:
    from .hessian import Factor
    from .solver import SolverOptions

SEARCH_GROUPS = (32, 64, 128)  # group sizes of the search kernel
WARP = 32
_BLOCKS = 8  # of inputs, whose products with all others are one: long enough for tensor cores
_HEADERS = "../../gptq/csrc"  # from marlin_kernel/csrc
_THREADS = {"search": 256, "update": 128, "pick": 256, "dots": 256}
_SEARCH = struct.Struct("<6Qq6i")  # gptq::SearchProblem
_PICK = struct.Struct("<5Q2i")  # gptq::PickProblem
_UPDATE = struct.Struct("<7Q4iQ")  # gptq::UpdateProblem
_DOTS = struct.Struct("<3Q5i")  # gptq::DotsProblem
GRIDS = {"integers": 0, "e4m3": 1, "e2m1": 2, "reals": 3}  # gptq::Grid
_KINDS = {"symmetric": 0, "signed": 1, "zero point": 2}  # gptq::GridKind


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: its name, template arguments, and shared memory per block in bytes."""

    name: str
    arguments: tuple[int | bool, ...]
    shared_bytes: int

    @property
    def source(self) -> KernelSource:
        header = "search" if self.name == "pick" else self.name
        values = ", ".join(str(a).lower() for a in self.arguments)
        return KernelSource(f"{_HEADERS}/{header}.cuh", f"gptq::{self.name}_kernel<{values}>")


def search_kernel(group: int, shared_limit: int) -> Kernel:
    """The search for groups of so many inputs, as wide as a block's shared memory allows."""
    for columns in (128, 64, 32):
        # SearchStorage: factor, two sets of errors, two of partial sums of 8 warps
        size = 4 * (group * group + 2 * group * columns + 2 * 8 * columns)
        if size <= shared_limit:
            return Kernel("search", (group, columns), size)
    raise ValueError(f"{shared_limit} bytes of shared memory cannot hold groups of {group}")


def update_kernel(
    sweep: bool, shared_limit: int, prune: bool = False, grid: str = "integers"
) -> Kernel:
    """The sequential loop (GPTQ's, or the coordinate sweep's) over as many inputs as fit.

    prune: with 2:4 pruning; grid: what weights are rounded to, a key of GRIDS.
    """
    point = 1 if grid == "integers" else 4  # bytes of Points<GRID>::Stored
    scale = 4 if grid == "e2m1" else 2  # of Points<GRID>::Scale
    for block in (128, 64):
        # UpdateStorage: matrix, values, errors of a step, reciprocals of two, inverse;
        # scales, zeros, points
        size = 4 * (block * block + block * WARP + 3 * 32 * WARP + block)
        size += block * WARP * (scale + 2 + point)
        if size <= shared_limit:
            return Kernel("update", (block, sweep, prune, GRIDS[grid]), size)
    raise ValueError(f"{shared_limit} bytes of shared memory cannot hold a block of 64 inputs")


def grid_of(wtype: WeightType | None) -> str:
    """The key of GRIDS that a type's points belong to; None: weights are pruned, not rounded."""
    if wtype is None:
        return "reals"
    return f"e{wtype.exponent}m{wtype.mantissa}" if wtype.is_float else "integers"


def _point_dtype(wtype: WeightType | None) -> torch.dtype:
    """Of points in memory: Points<GRID>::Stored."""
    return torch.uint8 if grid_of(wtype) == "integers" else torch.float32


PICK = Kernel("pick", (_THREADS["pick"],), 0)
DOTS = Kernel("dots", (_THREADS["dots"],), 0)


def search_splits(tiles: int, candidates: int, multiprocessors: int) -> int:
    """Into how many parts to cut the candidates, so that all multiprocessors end together.

    tiles: blocks of one part. A block takes its candidates plus about one for loading.
    """

    def duration(splits: int) -> int:
        waves = -(-tiles * splits // multiprocessors)
        return waves * (-(-candidates // splits) + 1)

    return min(range(1, min(candidates, 64) + 1), key=duration)


# ---- launching ---------------------------------------------------------------------------------


_load_lock = threading.Lock()


@functools.cache
def _load(kernel: Kernel, index: int) -> launch._Function:
    size = kernel.shared_bytes
    with _load_lock:
        return launch._Function(kernel.source, index, size, carveout=size > 0)


@functools.cache
def shared_limit(index: int) -> int:
    """Shared memory that a block may have on CUDA device `index`, bytes."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


_plans = launch.ThreadPlans()


def _launch(kernel: Kernel, grid_size: tuple[int, int], like: Tensor, arguments: bytes) -> None:
    """Launch on the current stream of the device of `like`."""
    index = like.device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    key = (kernel, index, stream, grid_size)
    plan = _plans.get(key)
    if plan is None:
        plan = launch.Plan(
            _load(kernel, index), (*grid_size, 1), _THREADS[kernel.name], 1, kernel.shared_bytes,
            stream, 256, dependent_launch=False,
        )  # fmt: skip
        _plans.keep(key, plan)
    plan.arguments[: len(arguments)] = arguments
    with torch.cuda.device(index):
        plan.launch()


# ---- the solver's functions ----------------------------------------------------------------------


def search_grid(
    w: Tensor,
    factor: Tensor | None,
    wtype: WeightType,
    options: GridOptions,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`grid.search_grid` on a GPU: scales and zeros float32 [G, N] of all groups.

    w: float32 [G, g, N]; factor: float32 [G, g, g] upper triangular, or None.
    Without factor, or where the kernel cannot search (`_searches`), torch does it.
    """
    count, g, n = w.shape
    if factor is None or not _searches(g, wtype, options):
        return grid.search_grid(w, factor, wtype, options, global_scale)
    flat = w.reshape(count * g, n)
    scales = torch.empty(count, n, device=w.device)
    zeros = torch.empty_like(scales)
    _search(flat, factor.contiguous(), g * g, g, g, wtype, options, scales, zeros)
    return scales, zeros


def _searches(g: int, wtype: WeightType, options: GridOptions) -> bool:
    """Whether the kernel can search groups of g inputs: clipped integers, groups of 32 to 128."""
    return options.clip and g in SEARCH_GROUPS and wtype.name in INTEGER_TYPES


def _search(
    w: Tensor,
    factor: Tensor,
    factor_stride: int,
    factor_row: int,
    g: int,
    wtype: WeightType,
    options: GridOptions,
    scales: Tensor,
    zeros: Tensor,
) -> None:
    """Search the grids of the inputs w [rows, N]; writes scales, zeros [ceil(rows / g), N].

    factor: at its address lies R of the first group; strides in floats.
    """
    rows, n = w.shape
    index = w.device.index
    kernel = search_kernel(g, shared_limit(index))
    kind = "signed" if options.signed else "symmetric"
    kind = kind if wtype.symmetric else "zero point"
    shrinks = _shrinks(options.clip_min, max(options.clip_steps, 2), index)
    groups = -(-rows // g)
    tiles = -(-n // kernel.arguments[1])
    candidates = shrinks.numel() * (2 if kind == "signed" else 1)
    splits = search_splits(tiles * groups, candidates, launch.multiprocessors(index))
    found = torch.empty(3, splits, groups, n, device=w.device)
    arguments = _SEARCH.pack(
        w.data_ptr(), factor.data_ptr(), shrinks.data_ptr(), *(t.data_ptr() for t in found),
        factor_stride, factor_row, rows, n, shrinks.numel(), _KINDS[kind], wtype.levels,
    )  # fmt: skip
    _launch(kernel, (tiles, groups * splits), w, arguments)
    arguments = _PICK.pack(
        *(t.data_ptr() for t in found), scales.data_ptr(), zeros.data_ptr(), splits, groups * n
    )
    _launch(PICK, (-(-groups * n // _THREADS["pick"]), 1), w, arguments)


@functools.cache
def _shrinks(least: float, steps: int, index: int) -> Tensor:
    return torch.linspace(1.0, least, steps).to(torch.device("cuda", index))


def update(
    w: Tensor,
    factor: Factor,
    order: Tensor | None,
    g: int,
    scales: Tensor | None,
    zeros: Tensor | None,
    groups: Tensor,
    options: SolverOptions,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`solver._update` on a GPU; points of integer types are uint8. options.blocksize has no
    effect."""
    k, n = w.shape
    work = w.clone(memory_format=torch.contiguous_format) if order is None else w[order]
    u, r = factor.u, factor.r
    places = (groups if order is None else groups[order]).to(torch.int32)
    pruned = options.sparsity is not None
    limit, wtype = shared_limit(w.device.index), options.wtype
    kernel = update_kernel(False, limit, pruned, grid_of(wtype))
    costs = sparsity.pair_costs(u) if pruned else None
    block = kernel.arguments[0]
    dynamic = scales is None
    if dynamic:
        scales = torch.empty(int(groups.max()) + 1, n, device=w.device)
        zeros = torch.empty_like(scales)
        if g <= block:  # blocks end where groups end
            block = block // g * g
    points = torch.empty(k, n, dtype=_point_dtype(wtype), device=w.device)

    def quantize(start: int, stop: int, errors: Tensor) -> None:
        if dynamic and start % g == 0:
            _find_group(work, r, start, g, scales, zeros, options, global_scale)
        own = work[start:], u, start, stop, scales, zeros, places, points, errors, options, costs
        _step(kernel, *own)

    # Each dynamic group's grid is searched on the weights as they are when it is reached.
    _feed_back(work, u, block, g if dynamic and g <= block else block, quantize)
    if order is not None:
        natural = torch.empty_like(points)
        natural[order] = points
        points = natural
    return points, scales, zeros


def _feed_back(
    work: Tensor,
    u: Tensor,
    block: int,
    width: int,
    take: Callable[[int, int, Tensor], None],
) -> None:
    """Take inputs in order, `width` at a time, and spread their errors over those still to come.

    work: float32 [K, N], updated in place; u: float32 [K, K], the upper factor. take(start, stop,
    errors): settles work[start:stop] and writes its errors [stop - start, N]. They change the rest
    of their `block` inputs at once, the rest of _BLOCKS blocks when the block ends, and the inputs
    behind those when they end; `block` is a multiple of `width`.
    """
    k, n = work.shape
    errors = torch.empty(min(block * _BLOCKS, k), n, device=work.device)
    for outer in range(0, k, block * _BLOCKS):
        end = min(outer + block * _BLOCKS, k)
        for start in range(outer, end, block):
            stop = min(start + block, end)
            for first in range(start, stop, width):
                last = min(first + width, stop)
                own = errors[first - outer : last - outer]
                take(first, last, own)
                if last < stop:
                    work[last:stop].addmm_(u[first:last, last:stop].T, own, alpha=-1)
            if stop < end:
                own = errors[start - outer : stop - outer]
                work[stop:end].addmm_(u[start:stop, stop:end].T, own, alpha=-1)
        if end < k:
            products.accumulate(work[end:], u[outer:end, end:].T, errors[: end - outer], -1.0)


def _find_group(
    work: Tensor,
    r: Tensor,
    start: int,
    g: int,
    scales: Tensor,
    zeros: Tensor,
    options: SolverOptions,
    global_scale: Tensor | None,
) -> None:
    """Search the grid of the group that begins at input `start`."""
    k = work.shape[0]
    end, j = min(start + g, k), start // g
    own, group = slice(j, j + 1), work[start:end]
    if options.sparsity:  # fitted to the weights that are likely to stay
        group = sparsity.keep_largest(group)
    if _searches(g, options.wtype, options.grid):
        _search(
            group, r[start:, start:], 0, r.stride(0), g, options.wtype, options.grid,
            scales[own], zeros[own],
        )  # fmt: skip
        return
    factors = r[start:end, start:end][None] if options.grid.clip else None
    found = grid.search_grid(group[None], factors, options.wtype, options.grid, global_scale)
    scales[own], zeros[own] = found


def _step(
    kernel: Kernel,
    values: Tensor,
    matrix: Tensor,
    start: int,
    stop: int,
    scales: Tensor,
    zeros: Tensor,
    places: Tensor,
    points: Tensor,
    errors: Tensor,
    options: SolverOptions,
    costs: Tensor | None = None,
) -> None:
    """Run the sequential kernel over inputs start..stop; writes their points and errors.

    values: their weights or gradient, of which only these rows are read.
    costs: float32 [K / 4, PAIRS, TERMS] (`sparsity.pair_costs`) for GPTQ with pruning.
    """
    own = values, matrix[start:, start:], scales, zeros, places[start:], points[start:], errors
    addresses = [t.data_ptr() for t in own]
    removals = 0 if costs is None else costs[start // QUAD :].data_ptr()
    _launch_update(kernel, values, matrix, addresses, stop - start, options.wtype.levels, removals)


def _launch_update(
    kernel: Kernel,
    values: Tensor,
    matrix: Tensor,
    addresses: list[int],
    rows: int,
    levels: int,
    costs: int,
) -> None:
    """addresses: of values to errors in gptq::UpdateProblem; costs: the address of the last one."""
    n = values.shape[1]
    arguments = _UPDATE.pack(*addresses, matrix.stride(0), rows, n, levels, costs)
    _launch(kernel, (-(-n // WARP), 1), values, arguments)


def prune(w: Tensor, factor: Factor, order: Tensor | None, blocksize: int) -> Tensor:
    """`sparsity.prune` on a GPU; blocksize has no effect."""
    work = w.clone(memory_format=torch.contiguous_format) if order is None else w[order]
    u, costs = factor.u, sparsity.pair_costs(factor.u)
    kernel = update_kernel(False, shared_limit(w.device.index), True, "reals")
    block = kernel.arguments[0]
    points = torch.empty_like(work)

    def remove(start: int, stop: int, errors: Tensor) -> None:
        own = work[start:], u[start:, start:], points[start:], errors
        addresses = [t.data_ptr() for t in own]
        addresses[2:2] = 0, 0, 0  # no scales, zeros and groups
        removals = costs[start // QUAD :].data_ptr()
        _launch_update(kernel, work, u, addresses, stop - start, 0, removals)

    _feed_back(work, u, block, block, remove)
    return points if order is None else points[torch.argsort(order)]


def sweep(
    w: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    options: SolverOptions,
) -> Tensor:
    """`solver._sweep` on a GPU; points of integer types are uint8."""
    k, n = w.shape
    residual = w - (codes - zeros[groups]) * scales[groups]
    operand = products.split(residual)
    codes = codes.to(_point_dtype(options.wtype), copy=True)
    scales, zeros = scales.contiguous(), zeros.contiguous()
    places = groups.to(torch.int32)
    pruned = options.sparsity is not None
    limit = shared_limit(w.device.index)
    kernel = update_kernel(True, limit, pruned, grid_of(options.wtype))
    block = kernel.arguments[0]
    moves = torch.empty(min(block * _BLOCKS, k), n, device=w.device)
    for outer in range(0, k, block * _BLOCKS):
        end = min(outer + block * _BLOCKS, k)
        gradient = products.multiply(h[outer:end], operand)
        for start in range(outer, end, block):
            stop = min(start + block, end)
            own = moves[start - outer : stop - outer]
            values = gradient[start - outer :]
            _step(kernel, values, h, start, stop, scales, zeros, places, codes, own, options)
            if stop < end:
                gradient[stop - outer :].addmm_(h[stop:end, start:stop], own, alpha=-1)
        products.put(operand, slice(outer, end), residual[outer:end] - moves[: end - outer])
    return codes


def add_dots(matrix: Tensor, j: int, product: Tensor, codes: Tensor, g: int) -> None:
    """`solver._add_dots` on a GPU, for contiguous tensors."""
    (rows, n), groups = product.shape, matrix.shape[1]
    arguments = _DOTS.pack(
        product.data_ptr(), codes.data_ptr(), matrix.data_ptr(), rows, n, g, j, groups
    )
    _launch(DOTS, (-(-n // _THREADS["dots"]), -(-rows // g)), product, arguments)
