"""The GPTQ update: weights and a Hessian in, integer codes and scales out. Tensors only.

Frantar et al., "GPTQ" (arXiv 2210.17323) with the group grid clipping of Frantar et al., "MARLIN"
(2024); the refit and the sweeps minimise the same quadratic form after rounding.
Everything is held transposed, ``[inputs, outputs]``: one input's weights are one contiguous row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlin_kernel.errors import NumericalError
from marlin_kernel.reference import round_scales
from marlin_kernel.weight_types import WeightType, normalize_group_size

from . import fused_solver, products, sparsity
from .distributed import Workers
from .grid import (
    GridOptions,
    decode_points,
    encode_points,
    find_global_scale,
    nearest_points,
    search_grid,
    unclipped_scales,
)
from .hessian import Factor, factorize, invert_upper, is_finite

_STEP = 32  # rows of a block that change at once when a weight has been rounded
_STRIPES = 8  # of H, of which only the upper triangle is multiplied


@dataclass(frozen=True)
class SolverOptions:
    """Settings of one layer's solution; a run's defaults live in `gptq.config`.

    blocksize: width of the lazy update (inputs); percdamp: damping relative to mean(diag H);
    act_order: quantize inputs by falling Hessian diagonal; static_groups: groups stay on contiguous
    inputs whatever the order; nearest: round to nearest (no error feedback); refit: rounds of
    closed-form scale refit after the update, each followed by `sweeps` passes of coordinate descent
    over the codes; asymmetric: aim at the full-precision model's outputs from the quantized model's
    inputs; target_damp: damping of that least-squares target; shrinkage: share of the correlations
    between inputs that is left out (`_shrunk`); fused: on a GPU, run the inner loops as CUDA
    kernels (`fused_solver`); sparsity: None, or "2:4": two weights of every four inputs
    become zero, chosen inside the update (`sparsity`; by magnitude with `nearest`).
    """

    wtype: WeightType | None  # any type; None: weights are pruned and not rounded
    group_size: int
    grid: GridOptions = field(default_factory=GridOptions)
    blocksize: int = 128
    percdamp: float = 0.1
    act_order: bool = True
    static_groups: bool = True
    nearest: bool = False
    refit: int = 0
    sweeps: int = 0
    asymmetric: bool = False
    target_damp: float = 1.0
    shrinkage: float = 0.0
    fused: bool = True
    sparsity: str | None = None


@dataclass(frozen=True)
class Statistics:
    """What happened to one layer.

    loss: ‖(Q - T) X‖² per token and output, where T is the target: W, or what asymmetric
    calibration makes of it; relative_error: ‖(Q - T) X‖ / ‖W X‖; relative_weight_error: ‖Q - W‖ /
    ‖W‖; clip_mean: mean of the grid range over the unclipped range; clip_fraction: share of groups
    whose range was shrunk; damping, damping_retries: see `hessian.factorize`; dead_inputs: inputs
    that were never active.
    """

    loss: float
    relative_error: float
    relative_weight_error: float
    clip_mean: float
    clip_fraction: float
    damping: float
    damping_retries: int
    dead_inputs: int


@dataclass(frozen=True)
class Solution:
    """codes uint8 [K, N]; scales float32 [G, N] with the values that storage gives them, the global
    one included; zeros float32 [G, N] (0 for types without); g_idx int64 [K]: group of each input
    (``k // group_size`` unless act-order moved the groups); global_scale: float32 [1] or None.
    Weights that were only pruned (wtype None) are float32 codes of one group with the scale 1."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    statistics: Statistics
    wtype: WeightType | None
    global_scale: Tensor | None = None

    def points(self) -> Tensor:
        """What the scales multiply, before zeros are subtracted (`grid`): [K, N]."""
        return decode_points(self.codes, self.wtype)

    def weight(self) -> Tensor:
        """The dequantized weight, float32 [K, N]."""
        return dequantize(self.points(), self.scales, self.zeros, self.g_idx)


def dequantize(points: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """``(points - zeros) * scales`` as float32 [K, N]; scales, zeros: [G, N]; groups: int64 [K]."""
    weight = points.float() - zeros.float().index_select(0, groups)
    return weight.mul_(scales.float().index_select(0, groups))


@dataclass(frozen=True)
class Columns:
    """Quantized outputs of one layer or several stacked ones, before they are told apart.

    codes uint8 [K, N]; scales, zeros float32 [G, N]; g_idx int64 [K]; measures float32 [6, N]: sums
    per output that `Statistics` are made of (`_measure`); damping, retries, dead: see Statistics;
    wtype, global_scale: see Solution.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    measures: Tensor
    damping: float
    retries: int
    dead: int
    wtype: WeightType | None
    global_scale: Tensor | None = None

    def split(self, parts: Sequence[int], tokens: int) -> list[Solution]:
        """One Solution per stacked layer of so many outputs; tokens: what H was summed over."""
        solutions = []
        for start, size in _offsets(parts):
            own = slice(start, start + size)
            solutions.append(
                Solution(
                    self.codes[:, own].contiguous(),
                    self.scales[:, own].contiguous(),
                    self.zeros[:, own].contiguous(),
                    self.g_idx,
                    self._statistics(self.measures[:, own], tokens),
                    self.wtype,
                    self.global_scale,
                )
            )
        return solutions

    def _statistics(self, measures: Tensor, tokens: int) -> Statistics:
        n, groups = measures.shape[1], self.scales.shape[0]
        loss, energy, moved, weight, ratio, clipped = measures.double().sum(1).tolist()
        return Statistics(
            loss=loss / max(tokens, 1) / n,
            relative_error=(max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0,
            relative_weight_error=(moved / weight) ** 0.5 if weight > 0 else 0.0,
            clip_mean=ratio / (groups * n),
            clip_fraction=clipped / (groups * n),
            damping=self.damping,
            damping_retries=self.retries,
            dead_inputs=self.dead,
        )


def solve(
    weight: Tensor,
    h: Tensor,
    options: SolverOptions,
    *,
    name: str = "layer",
    shift: Tensor | None = None,
    lack: Tensor | None = None,
    tokens: int = 1,
    parts: Sequence[int] | None = None,
) -> list[Solution]:
    """Quantize one linear layer, or several that share their input, stacked along the outputs.

    Arguments and errors as in `solve_columns`; tokens: what `h` was summed over.
    parts: outputs of each stacked layer (default: one layer of N). Returns one Solution per part.
    """
    columns = solve_columns(weight, h, options, name=name, shift=shift, lack=lack)
    return columns.split(parts or [weight.shape[0]], tokens)


def solve_columns(
    weight: Tensor,
    h: Tensor,
    options: SolverOptions,
    *,
    name: str = "layer",
    shift: Tensor | None = None,
    lack: Tensor | None = None,
    workers: Workers | None = None,
    global_scale: Tensor | None = None,
    timed: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Columns:
    """Quantize outputs that share their input. No output depends on another.

    weight: float [N, K] as in torch.nn.Linear. h: float32 [K, K], 2 X Xᵀ.
    shift: float32 [K, K], 2 (X̃ - X) Xᵀ, and lack: float32 [N, K], 2 D Xᵀ, of asymmetric calibration
    (`hessian.Hessian`), or None. global_scale: float32 [1] for the types that have one, if `weight`
    is a part of what shares it; default: `grid.find_global_scale` of `weight`. workers: processes
    that hold other outputs and the same Hessian. timed: makes a context that counts the seconds of
    a part of the work.
    Raises NumericalError with `name` if weights or Hessian are not finite.
    """
    w = weight.detach().float().T.contiguous()
    if not is_finite(w):
        raise NumericalError(f"{name}: the weights hold NaN or Inf; the checkpoint is damaged")
    k = w.shape[0]
    g = normalize_group_size(options.group_size, k)
    diagonal = h.diagonal()
    dead = diagonal == 0
    original, safe = w, h
    if options.shrinkage and not options.nearest:
        safe = _shrunk(h, options.shrinkage)
    if bool(dead.any()):  # as active as the average live input, so that the damping stays theirs
        original, safe = w.clone(), h.clone() if safe is h else safe
        live = diagonal[~dead]
        safe.diagonal()[dead] = live.mean() if live.numel() else 1.0
        w[dead] = 0

    if options.sparsity:
        sparsity.check_inputs(k, name)
    if options.nearest:
        factor = Factor(safe, safe, 0.0, 0)  # not used: no feedback, no weighting
        order = None
    else:
        order = _order(diagonal, options)
        permuted = safe if order is None else _permuted(safe, order)
        with timed("solve.factor"):
            factor = factorize(permuted, options.percdamp, name, workers)
        del permuted
        if options.asymmetric and (shift is not None or lack is not None):
            with timed("solve.target"):
                w = w + _target_move(w, safe, shift, lack, options.target_damp)

    if options.wtype is None:
        return _pruned(w, original, h, factor, order, int(dead.sum()), options)
    if global_scale is None:
        global_scale = find_global_scale(weight, options.wtype)
    update = fused_solver.update if _fused(w, options) else _update
    contiguous = order is None or options.static_groups
    groups = torch.arange(k, device=w.device) // g  # group of each input, or of each place in order
    if options.nearest:
        scales, zeros = _static_grid(w, None, g, options, global_scale)
        kept = sparsity.keep_largest(w) if options.sparsity else w
        points = nearest_points(kept, scales[groups], zeros[groups], options.wtype)
    elif contiguous:
        scales = zeros = None  # natural order: each group's grid is searched when it is reached
        if order is not None:
            with timed("solve.grid"):
                weights = _group_factors(factor, order, g, name) if options.grid.clip else None
                scales, zeros = _static_grid(w, weights, g, options, global_scale)
        with timed("solve.update"):
            points, scales, zeros = update(
                w, factor, order, g, scales, zeros, groups, options, global_scale
            )
    else:
        with timed("solve.update"):
            permuted = w.index_select(0, order)
            points, scales, zeros = update(
                permuted, factor, None, g, None, None, groups, options, global_scale
            )
        inverse = torch.argsort(order)
        points, groups = points.index_select(0, inverse), groups[inverse]
    damping, retries = factor.damping, factor.retries
    del factor

    if not options.nearest and (options.refit or options.sweeps):
        state = points, scales, zeros, groups
        points, scales = _polish(w, safe, damping, *state, options, timed)
    with timed("solve.measure"):
        measures = _measure(original, w, h, points, scales, zeros, groups, options)
    found = encode_points(points, options.wtype), scales, zeros, groups, measures
    return Columns(*found, damping, retries, int(dead.sum()), options.wtype, global_scale)


def _pruned(
    w: Tensor,
    original: Tensor,
    h: Tensor,
    factor: Factor,
    order: Tensor | None,
    dead: int,
    options: SolverOptions,
) -> Columns:
    """Pruning without rounding: the weights themselves, as codes of one group with the scale 1."""
    k, n = w.shape
    if options.nearest:
        codes = sparsity.keep_largest(w)
    else:
        prune = fused_solver.prune if _fused(w, options) else sparsity.prune
        codes = prune(w, factor, order, options.blocksize)
    scales, zeros = torch.ones(1, n, device=w.device), torch.zeros(1, n, device=w.device)
    groups = torch.zeros(k, dtype=torch.int64, device=w.device)
    measures = _measure(original, w, h, codes, scales, zeros, groups, options)
    found = codes, scales, zeros, groups, measures
    return Columns(*found, factor.damping, factor.retries, dead, None)


def _shrunk(h: Tensor, share: float) -> Tensor:
    """``(1 - share) H + share diag(H)``: what calibration says of pairs of inputs counts less.

    Pairs are correlated otherwise in other text, and weights that compensate for each other there
    err together here; what it says of single inputs, which damping would blur, is kept. Shrinking
    a covariance towards its diagonal: Schäfer and Strimmer (2005), target D.
    """
    shrunk = h * (1 - share)
    shrunk.diagonal().copy_(h.diagonal())
    return shrunk


def _fused(w: Tensor, options: SolverOptions) -> bool:
    """Whether the CUDA kernels do the inner loops, instead of the reference in torch below."""
    return w.is_cuda and options.fused


def _offsets(sizes: Sequence[int]) -> list[tuple[int, int]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return list(zip(starts, sizes, strict=True))


def _order(diagonal: Tensor, options: SolverOptions) -> Tensor | None:
    if not options.act_order:
        return None
    if options.sparsity:
        return sparsity.quad_order(diagonal)
    return torch.argsort(diagonal, descending=True, stable=True)


def _permuted(h: Tensor, order: Tensor) -> Tensor:
    """``h[order][:, order]``; on a CPU by rows, then by columns, as its caches like it better."""
    if h.is_cuda:
        return h[order[:, None], order]
    return h.index_select(0, order).index_select(1, order)


def _target_move(
    w: Tensor, h: Tensor, shift: Tensor | None, lack: Tensor | None, damping: float
) -> Tensor:
    """How far the target moves from W when the inputs are the quantized model's, [K, N].

    With X̃ the full-precision inputs and R̃ - R the error already in the residual stream,
    ``min_Q ‖(R + Q X) - (R̃ + W X̃)‖²`` differs only by a constant from ``min_Q ‖(Q - W*) X‖²``
    with ``W* = W + D Xᵀ (X Xᵀ + damping)⁻¹``, D = W (X̃ - X) + R̃ - R: ordinary GPTQ on a moved
    target. `lack` holds D Xᵀ; for a layer without residual, `shift` holds (X̃ - X) Xᵀ instead.
    Asymmetric calibration as an objective: Li et al., "GPTAQ" (arXiv 2504.02692).
    """
    damped = h.clone()
    damped.diagonal().add_(damping * float(h.diagonal().mean()))
    lower = torch.linalg.cholesky(damped)
    del damped
    if lack is None and shift.shape[0] < w.shape[1]:  # fewer columns to solve for than outputs
        return products.multiply(_solve_cholesky(lower, shift.T), w)
    right = lack.T if shift is None else products.multiply(shift.T, w)
    if shift is not None and lack is not None:
        right += lack.T
    return _solve_cholesky(lower, right)


def _solve_cholesky(lower: Tensor, right: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹ B`` [K, R] of lower triangular L; tensor cores multiply by the inverse of L."""
    if not products.on_tensor_cores(lower):
        return torch.cholesky_solve(right, lower)
    inverse = invert_upper(lower.T)  # (L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹
    return products.upper_times(inverse, products.transposed_upper_times(inverse, right))


def _group_factors(factor: Factor, order: Tensor, g: int, name: str) -> Tensor:
    """Upper triangular weights [G, g, g] of the clipping search when groups are set beforehand.

    Each group's error is taken after all other inputs have compensated as well as they can: the
    Schur complement ``((H⁻¹)_gg)⁻¹``. H⁻¹ is ordered like `factor`; groups are of natural order.
    """
    u = factor.u[:, torch.argsort(order)]  # columns of U in natural order: H⁻¹ = Uᵀ U
    k = u.shape[0]
    pad = -k % g
    u = torch.nn.functional.pad(u, (0, pad))
    columns = u.reshape(k, -1, g).permute(1, 2, 0)  # [G, g, k]
    inverse = columns @ columns.transpose(1, 2)
    if pad:
        inverse[-1].diagonal()[g - pad :] = 1
    lower, info = torch.linalg.cholesky_ex(inverse)  # (H⁻¹)_gg = L Lᵀ
    if int(info.abs().max()):
        raise NumericalError(
            f"{name}: the Hessian is too badly conditioned to weigh clipping errors with damping "
            f"{factor.damping:.2g}; raise --percdamp (0.01 to 0.1 is usual)"
        )
    eye = torch.eye(g, device=u.device).expand_as(lower)
    # ((H⁻¹)_gg)⁻¹ = L⁻ᵀ L⁻¹, and |e R|² = e R Rᵀ eᵀ needs R = L⁻ᵀ
    return torch.linalg.solve_triangular(lower, eye, upper=False).transpose(1, 2).contiguous()


def _static_grid(
    w: Tensor,
    factors: Tensor | None,
    g: int,
    options: SolverOptions,
    global_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if options.sparsity:  # fitted to the weights that are likely to stay
        w = sparsity.keep_largest(w)
    grouped = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[0] % g)).reshape(-1, g, w.shape[1])
    search = fused_solver.search_grid if _fused(w, options) else search_grid
    return search(grouped, factors, options.wtype, options.grid, global_scale)


def _update(
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
    """Quantize input by input, spreading each rounding error over the inputs still to come.

    w: [K, N], in natural order. `order`: the sequence of inputs (None = natural). Given scales and
    zeros are used as they are; otherwise each group's grid is searched when the group is reached,
    on the weights as updated by then. Returns points (`grid`), scales, zeros.
    """
    k, n = w.shape
    wtype = options.wtype
    work = w.clone() if order is None else w.index_select(0, order)
    points = torch.empty_like(work)
    u, r = factor.u, factor.r
    sequence = groups if order is None else groups[order]
    dynamic = scales is None
    if dynamic:
        scales = torch.empty(int(groups.max()) + 1, n, device=w.device)
        zeros = torch.empty_like(scales)
    places = sequence.tolist()
    diagonal = u.diagonal().tolist()
    width = options.blocksize
    if options.sparsity:
        width = -(-width // sparsity.QUAD) * sparsity.QUAD
        costs = sparsity.pair_costs(u)
    # A group must be up to date when its grid is searched: it begins where a step does.
    begins = not dynamic or g >= k or (g % _STEP == 0 and width % _STEP == 0)
    step = _STEP if begins else width
    for start in range(0, k, width):
        stop = min(start + width, k)
        errors = torch.empty(stop - start, n, device=w.device)
        block, triangle = work[start:stop], u[start:stop, start:stop]
        if not dynamic:
            block_scales = scales.index_select(0, sequence[start:stop]).unbind()
            block_zeros = zeros.index_select(0, sequence[start:stop]).unbind()
        rows = zip(block.unbind(), points[start:stop].unbind(), errors.unbind(), strict=True)
        for i, (row, point, error) in enumerate(rows, start):
            if dynamic and i % g == 0:
                end = min(i + g, k)
                group = work[i:end]
                if end > stop:  # the group reaches beyond this block: apply what is pending to it
                    group = group.clone()
                    pending = u[start:i, stop:end].T @ errors[: i - start]
                    group[stop - i :] -= pending
                if options.sparsity:
                    group = sparsity.keep_largest(group)
                factors = r[i:end, i:end][None] if options.grid.clip else None
                found = search_grid(group[None], factors, wtype, options.grid, global_scale)
                scales[i // g], zeros[i // g] = found[0][0], found[1][0]
            if dynamic:
                s, z = scales[places[i]], zeros[places[i]]
            else:
                s, z = block_scales[i - start], block_zeros[i - start]
            nearest_points(row, s, z, wtype, out=point)
            if options.sparsity:
                place = i % sparsity.QUAD
                if place == 0:
                    quad = work[i : i + sparsity.QUAD]
                    stays = sparsity.choose_pairs(quad, costs[i // sparsity.QUAD])
                point.copy_(torch.where(stays[place], point, z))
            torch.sub(point, z, out=error).mul_(s).sub_(row).mul_(-1.0 / diagonal[i])
            _spread(block, triangle, errors, i - start, step)
        if stop < k:
            work[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        points = points.index_select(0, torch.argsort(order))
    return points, scales, zeros


def _spread(values: Tensor, matrix: Tensor, errors: Tensor, i: int, step: int) -> None:
    """Take what the error of row i changes off the rows of its block that are still to come.

    values, errors: [rows, N]; matrix: [rows, rows], of which row i's upper part counts. Rows of the
    same step change at once, those behind it together for all rows of the step.
    """
    first = i - i % step
    last = min(first + step, values.shape[0])
    if i + 1 < last:
        values[i + 1 : last].addr_(matrix[i, i + 1 : last], errors[i], alpha=-1)
    elif last < values.shape[0]:
        values[last:].addmm_(matrix[first:last, last:].T, errors[first:last], alpha=-1)


def _polish(
    w: Tensor,
    h: Tensor,
    damping: float,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    options: SolverOptions,
    timed: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Tensor, Tensor]:
    """Lower ``(Q - W) H (Q - W)ᵀ`` further: alternate scale refits and coordinate sweeps.

    codes: points (`grid`) here and in what follows. Scales of 8 bits are too coarse to be refitted.
    """
    refit = options.refit if refits(options.wtype) else 0
    damped = h.clone()
    damped.diagonal().add_(damping * float(h.diagonal().mean()))
    fused = _fused(w, options)
    sweep = fused_solver.sweep if fused else _sweep
    for _ in range(max(refit, 1)):
        if refit:
            with timed("solve.refit"):
                scales = _refit_scales(w, damped, codes, scales, zeros, groups, fused)
        with timed("solve.sweep"):
            for _ in range(options.sweeps):
                codes = sweep(w, damped, codes, scales, zeros, groups, options)
    return codes, scales


def refits(wtype: WeightType | None) -> bool:
    """Whether scales are fine enough for what a refit finds: float16, not e4m3 or e8m0."""
    return wtype is not None and wtype.scale == "float16"


def _refit_scales(
    w: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    fused: bool = False,
) -> Tensor:
    """Least-squares scales for fixed codes, over all groups of an output together.

    Solves ``A d = r`` for the move d of the scales, with A[g, g'] = c_gᵀ H c_g' and r[g] = c_gᵀ H e
    (c: codes minus zero points, e: W minus what the scales make of the codes now; the move instead
    of the scales themselves, because float32 would lose the small error of 8 bits in the energy of
    W). A refit is kept per output only where it lowers the error after rounding to fp16.
    fused: sum on a GPU by its kernel.
    """
    add_dots = fused_solver.add_dots if fused else _add_dots
    count, n = scales.shape
    if bool((groups[1:] < groups[:-1]).any()):  # moved groups: bring their inputs together
        order = torch.argsort(groups, stable=True)
        w, codes = w.index_select(0, order), codes.index_select(0, order)
        h, groups = _permuted(h, order), groups[order]
    k = w.shape[0]
    g = int((groups == 0).sum())
    c = codes - zeros.index_select(0, groups)
    a = torch.empty(n, count, count, device=w.device)
    whole = bool((zeros == zeros.round()).all())  # then c are integers or e4m3 numbers: few bits
    operand = products.split(c, short=whole)
    for j in range(count):  # A is symmetric: from group j on
        start, stop = j * g, min(j * g + g, k)
        product = products.multiply(h[start:, start:stop], operand[start:stop])  # [K - start, N]
        add_dots(a, j, product, c[start:], g)
    residual = w - c * scales.index_select(0, groups)
    r = _sum_groups(products.multiply(h, residual).mul_(c), g).T  # [N, G]
    ridge = a.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 1e-6 + 1e-30
    move = torch.linalg.solve(a + ridge * torch.eye(count, device=w.device), r.unsqueeze(-1))
    fitted = round_scales(scales.T + move.squeeze(-1))
    move = fitted - scales.T
    better = torch.einsum("ng,ngh,nh->n", move, a, move) < 2 * (move * r).sum(1)
    return torch.where(better[:, None], fitted, scales.T).T.contiguous()


def _add_dots(matrix: Tensor, j: int, product: Tensor, codes: Tensor, g: int) -> None:
    """Row and column j of A [N, G, G] (`_refit_scales`) from group j on; uses `product` up.

    product: ``H c_j``, codes: c, float32 [rows, N], of the inputs from group j on; g: of a group.
    """
    sums = _sum_groups(product.mul_(codes), g).T
    matrix[:, j:, j] = sums
    matrix[:, j, j:] = sums


def _sum_groups(values: Tensor, g: int) -> Tensor:
    """Sums of g consecutive rows each (the last may be fewer): [K, N] -> [G, N]."""
    k, n = values.shape
    whole = values[: k // g * g].reshape(-1, g, n).sum(1)
    return torch.cat([whole, values[k // g * g :].sum(0, keepdim=True)]) if k % g else whole


def _sweep(
    w: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    options: SolverOptions,
) -> Tensor:
    """One pass of exact coordinate descent over the inputs: each code moves to its best value.

    The gradient of a block of inputs is taken when the block is reached, from what is left of W by
    then: a product of H with every input's final value, instead of one for the first values and
    another one for the moves.
    """
    k = w.shape[0]
    s_all, z_all = scales.index_select(0, groups), zeros.index_select(0, groups)
    quantized = (codes - z_all).mul_(s_all)
    residual = w - quantized
    codes = codes.clone()
    inverse = h.diagonal().reciprocal().tolist()
    movable = sparsity.movable(codes, z_all) if options.sparsity else None
    for start in range(0, k, options.blocksize):
        own = slice(start, min(start + options.blocksize, k))
        gradient = h[own] @ residual
        moves, triangle = torch.empty_like(gradient), h[own, own]
        rows = zip(*(t[own].unbind() for t in (quantized, s_all, z_all, codes)), strict=True)
        for i, (old, s, z, code) in enumerate(rows):
            best = torch.add(old, gradient[i], alpha=inverse[start + i])
            nearest_points(best, s, z, options.wtype, out=code)
            if movable is not None:
                code.copy_(torch.where(movable[start + i], code, z))
            torch.sub(code, z, out=moves[i]).mul_(s).sub_(old)
            _spread(gradient, triangle, moves, i, _STEP)
        residual[own] -= moves
    return codes


def _measure(
    original: Tensor,
    target: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    options: SolverOptions,
) -> Tensor:
    """Sums per output, float32 [6, N]: ‖(Q - T) X‖², ‖W X‖², ‖Q - W‖², ‖W‖², grid range over the
    unclipped range, groups that were shrunk. On a GPU the first two come from TF32 products."""
    k, n = original.shape
    error = dequantize(codes, scales, zeros, groups)
    moved = (error - original).square_().sum(0)
    error -= target
    with products.tf32():
        loss, energy = _quadratic(error, h) / 2, _quadratic(original, h) / 2
    if options.wtype is None:
        ratio = torch.ones_like(scales)
        weight = original.square().sum(0)
        return torch.stack([loss, energy, moved, weight, ratio.sum(0), torch.zeros_like(loss)])
    g = normalize_group_size(options.group_size, k)
    grouped = torch.nn.functional.pad(original, (0, 0, 0, -k % g)).reshape(-1, g, n)
    full = unclipped_scales(grouped, options.wtype, options.grid.signed)
    ratio = (scales.abs() / full.abs().clamp(min=1e-12)).clamp(max=4)
    weight = original.square().sum(0)
    return torch.stack([loss, energy, moved, weight, ratio.sum(0), (ratio < 0.99).float().sum(0)])


def _quadratic(x: Tensor, h: Tensor) -> Tensor:
    """``xᵀ H x`` of every column, float32 [N], for symmetric H [K, K] and x [K, N].

    By blocks of the upper triangle, those beside the diagonal twice: half of the products.
    """
    k = h.shape[0]
    width = max(k // _STRIPES, 1)
    total = torch.zeros(x.shape[1], device=x.device)
    for start in range(0, k, width):
        stop = min(start + width, k)
        product = h[start:stop, start:stop] @ x[start:stop]
        if stop < k:
            product.addmm_(h[start:stop, stop:], x[stop:], alpha=2)
        total += product.mul_(x[start:stop]).sum(0)
    return total
