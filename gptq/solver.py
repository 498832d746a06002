"""The GPTQ update: weights and a Hessian in, integer codes and scales out. Tensors only.

Frantar et al., "GPTQ" (arXiv 2210.17323) with the group grid clipping of Frantar et al., "MARLIN"
(2024); the refit and the sweeps minimise the same quadratic form after rounding.
Everything is held transposed, ``[inputs, outputs]``: one input's weights are one contiguous row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlin_kernel.errors import NumericalError
from marlin_kernel.reference import round_scales
from marlin_kernel.weight_types import WeightType, normalize_group_size

from .grid import GridOptions, quantize_to_codes, search_grid, unclipped_scales
from .hessian import Factor, factorize


@dataclass(frozen=True)
class SolverOptions:
    """Settings of one layer's solution; the defaults live in `gptq.config`.

    blocksize: width of the lazy update (inputs); percdamp: damping relative to mean(diag H);
    act_order: quantize inputs by falling Hessian diagonal; static_groups: groups stay on contiguous
    inputs whatever the order; nearest: round to nearest (no error feedback); refit: rounds of
    closed-form scale refit after the update, each followed by `sweeps` passes of coordinate descent
    over the codes; asymmetric: aim at the full-precision model's outputs from the quantized model's
    inputs; target_damp: damping of that least-squares target.
    """

    wtype: WeightType
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
    """codes uint8 [K, N]; scales float32 [G, N] with fp16 values; zeros float32 [G, N];
    g_idx int64 [K]: group of each input (``k // group_size`` unless act-order moved the groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    statistics: Statistics

    def weight(self) -> Tensor:
        """The dequantized weight, float32 [K, N]."""
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """``(codes - zeros) * scales`` as float32 [K, N]; scales, zeros: [G, N]; groups: int64 [K]."""
    return (codes.float() - zeros.float()[groups]) * scales.float()[groups]


def solve(
    weight: Tensor,
    h: Tensor,
    options: SolverOptions,
    *,
    name: str = "layer",
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    tokens: int = 1,
    parts: Sequence[int] | None = None,
) -> list[Solution]:
    """Quantize one linear layer, or several that share their input, stacked along the outputs.

    weight: float [N, K] as in torch.nn.Linear. h: float32 [K, K], 2 X Xᵀ summed over `tokens`.
    shift: float32 [K, K], 2 (X̃ - X) Xᵀ, and residual: float32 [N, K], 2 (R̃ - R) Xᵀ, of asymmetric
    calibration (`hessian.Hessian`), or None.
    parts: outputs of each stacked layer (default: one layer of N). Returns one Solution per part.
    Raises NumericalError with `name` if weights or Hessian are not finite.
    """
    w = weight.detach().float().T.contiguous()
    if not bool(torch.isfinite(w).all()):
        raise NumericalError(f"{name}: the weights hold NaN or Inf; the checkpoint is damaged")
    k, n = w.shape
    g = normalize_group_size(options.group_size, k)
    diagonal = h.diagonal()
    dead = diagonal == 0
    safe = h.clone()
    if bool(dead.any()):  # as active as the average live input, so that the damping stays theirs
        live = diagonal[~dead]
        safe.diagonal()[dead] = live.mean() if live.numel() else 1.0
    original = w.clone()
    w[dead] = 0

    if options.nearest:
        factor = Factor(safe, safe, 0.0, 0)  # not used: no feedback, no weighting
        order = None
    else:
        order = _order(diagonal, options)
        factor = factorize(safe if order is None else safe[order][:, order], options.percdamp, name)
        if options.asymmetric and shift is not None:
            w += _target_move(w, safe, shift, residual, options.target_damp)

    contiguous = order is None or options.static_groups
    groups = torch.arange(k, device=w.device) // g  # group of each input, or of each place in order
    if options.nearest:
        scales, zeros = _static_grid(w, None, g, options)
        codes = quantize_to_codes(w, scales[groups], zeros[groups], options.wtype.levels)
    elif contiguous:
        scales = zeros = None  # natural order: each group's grid is searched when it is reached
        if order is not None:
            weights = _group_factors(factor, order, g, name) if options.grid.clip else None
            scales, zeros = _static_grid(w, weights, g, options)
        codes, scales, zeros = _update(w, factor, order, g, scales, zeros, groups, options)
    else:
        codes, scales, zeros = _update(w[order], factor, None, g, None, None, groups, options)
        inverse = torch.argsort(order)
        codes, groups = codes[inverse], groups[inverse]

    if not options.nearest and (options.refit or options.sweeps):
        codes, scales = _polish(w, safe, factor.damping, codes, scales, zeros, groups, options)
    solutions = []
    for start, size in _offsets(parts or [n]):
        columns = slice(start, start + size)
        part = codes[:, columns], scales[:, columns], zeros[:, columns]
        statistics = _statistics(
            original[:, columns],
            w[:, columns],
            h,
            *part,
            groups,
            factor,
            int(dead.sum()),
            tokens,
            options,
        )
        solutions.append(
            Solution(part[0].to(torch.uint8), part[1].clone(), part[2].clone(), groups, statistics)
        )
    return solutions


def _offsets(sizes: Sequence[int]) -> list[tuple[int, int]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return list(zip(starts, sizes, strict=True))


def _order(diagonal: Tensor, options: SolverOptions) -> Tensor | None:
    if not options.act_order:
        return None
    return torch.argsort(diagonal, descending=True, stable=True)


def _target_move(
    w: Tensor, h: Tensor, shift: Tensor, residual: Tensor | None, damping: float
) -> Tensor:
    """How far the target moves from W when the inputs are the quantized model's, [K, N].

    With X̃ the full-precision inputs and R̃ - R the error already in the residual stream,
    ``min_Q ‖(R + Q X) - (R̃ + W X̃)‖²`` differs only by a constant from ``min_Q ‖(Q - W*) X‖²``
    with ``W* = W + (W (X̃ - X) + R̃ - R) Xᵀ (X Xᵀ + damping)⁻¹``: ordinary GPTQ on a moved target.
    Asymmetric calibration as an objective: Li et al., "GPTAQ" (arXiv 2504.02692).
    """
    right = shift.T @ w
    if residual is not None:
        right += residual.T
    damped = h.clone()
    damped.diagonal().add_(damping * float(h.diagonal().mean()))
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))


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
    lower, info = torch.linalg.cholesky_ex(inverse.flip(1, 2))  # (H⁻¹)_gg = V Vᵀ, V upper
    if int(info.abs().max()):
        raise NumericalError(
            f"{name}: the Hessian is too badly conditioned to weigh clipping errors with damping "
            f"{factor.damping:.2g}; raise --percdamp (0.01 to 0.1 is usual)"
        )
    v = lower.flip(1, 2)
    eye = torch.eye(g, device=u.device).expand_as(v)
    # ((H⁻¹)_gg)⁻¹ = V⁻ᵀ V⁻¹, and |e R|² = e R Rᵀ eᵀ needs R = V⁻ᵀ
    return torch.linalg.solve_triangular(v, eye, upper=True).transpose(1, 2).contiguous()


def _static_grid(
    w: Tensor, factors: Tensor | None, g: int, options: SolverOptions
) -> tuple[Tensor, Tensor]:
    grouped = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[0] % g)).reshape(-1, g, w.shape[1])
    return search_grid(grouped, factors, options.wtype, options.grid)


def _update(
    w: Tensor,
    factor: Factor,
    order: Tensor | None,
    g: int,
    scales: Tensor | None,
    zeros: Tensor | None,
    groups: Tensor,
    options: SolverOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize input by input, spreading each rounding error over the inputs still to come.

    w: [K, N], in natural order. `order`: the sequence of inputs (None = natural). Given scales and
    zeros are used as they are; otherwise each group's grid is searched when the group is reached,
    on the weights as updated by then.
    """
    k, n = w.shape
    levels = options.wtype.levels
    work = w.clone() if order is None else w[order]
    codes = torch.empty_like(work)
    u, r = factor.u, factor.r
    sequence = groups if order is None else groups[order]
    dynamic = scales is None
    if dynamic:
        scales = torch.empty(int(groups.max()) + 1, n, device=w.device)
        zeros = torch.empty_like(scales)
    places = sequence.tolist()
    diagonal = u.diagonal().tolist()
    for start in range(0, k, options.blocksize):
        stop = min(start + options.blocksize, k)
        errors = torch.empty(stop - start, n, device=w.device)
        if not dynamic:
            block_scales = scales[sequence[start:stop]]
            block_zeros = zeros[sequence[start:stop]]
        for i in range(start, stop):
            if dynamic and i % g == 0:
                end = min(i + g, k)
                group = work[i:end]
                if end > stop:  # the group reaches beyond this block: apply what is pending to it
                    group = group.clone()
                    pending = u[start:i, stop:end].T @ errors[: i - start]
                    group[stop - i :] -= pending
                factors = r[i:end, i:end][None] if options.grid.clip else None
                found = search_grid(group[None], factors, options.wtype, options.grid)
                scales[i // g], zeros[i // g] = found[0][0], found[1][0]
            if dynamic:
                s, z = scales[places[i]], zeros[places[i]]
            else:
                s, z = block_scales[i - start], block_zeros[i - start]
            row = work[i]
            code = quantize_to_codes(row, s, z, levels)
            codes[i] = code
            error = torch.sub(code, z).mul_(s).sub_(row).mul_(-1.0 / diagonal[i])
            errors[i - start] = error
            if i + 1 < stop:
                work[i + 1 : stop].addr_(u[i, i + 1 : stop], error, alpha=-1)
        if stop < k:
            work[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        codes = codes[torch.argsort(order)]
    return codes, scales, zeros


def _polish(
    w: Tensor,
    h: Tensor,
    damping: float,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    options: SolverOptions,
) -> tuple[Tensor, Tensor]:
    """Lower ``(Q - W) H (Q - W)ᵀ`` further: alternate scale refits and coordinate sweeps."""
    damped = h.clone()
    damped.diagonal().add_(damping * float(h.diagonal().mean()))
    for _ in range(max(options.refit, 1)):
        if options.refit:
            scales = _refit_scales(w, damped, codes, scales, zeros, groups)
        for _ in range(options.sweeps):
            codes = _sweep(w, damped, codes, scales, zeros, groups, options)
    return codes, scales


def _refit_scales(
    w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor
) -> Tensor:
    """Least-squares scales for fixed codes, over all groups of an output together.

    Solves ``A d = r`` for the move d of the scales, with A[g, g'] = c_gᵀ H c_g' and r[g] = c_gᵀ H e
    (c: codes minus zero points, e: W minus what the scales make of the codes now; the move instead
    of the scales themselves, because float32 would lose the small error of 8 bits in the energy of
    W). A refit is kept per output only where it lowers the error after rounding to fp16.
    """
    count, n = scales.shape
    c = codes - zeros[groups]
    member = torch.nn.functional.one_hot(groups, count).to(w.dtype)  # [K, G]
    a = torch.empty(n, count, count, device=w.device)
    for j in range(count):
        rows = (groups == j).nonzero().squeeze(1)
        product = h[:, rows] @ c[rows]  # [K, N]
        a[:, :, j] = (member.T @ (c * product)).T
    r = (member.T @ (c * (h @ (w - c * scales[groups])))).T  # [N, G]
    ridge = a.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 1e-6 + 1e-30
    move = torch.linalg.solve(a + ridge * torch.eye(count, device=w.device), r.unsqueeze(-1))
    fitted = round_scales(scales.T + move.squeeze(-1))
    move = fitted - scales.T
    better = torch.einsum("ng,ngh,nh->n", move, a, move) < 2 * (move * r).sum(1)
    return torch.where(better[:, None], fitted, scales.T).T.contiguous()


def _sweep(
    w: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    options: SolverOptions,
) -> Tensor:
    """One pass of exact coordinate descent over the inputs: each code moves to its best value."""
    k, n = w.shape
    s_all, z_all = scales[groups], zeros[groups]
    quantized = (codes - z_all) * s_all
    gradient = h @ (w - quantized)
    codes = codes.clone()
    diagonal = h.diagonal().tolist()
    for start in range(0, k, options.blocksize):
        stop = min(start + options.blocksize, k)
        moves = torch.empty(stop - start, n, device=w.device)
        block = gradient[start:stop]
        for i in range(start, stop):
            old = quantized[i]
            best = torch.add(old, block[i - start], alpha=1.0 / diagonal[i])
            code = quantize_to_codes(best, s_all[i], z_all[i], options.wtype.levels)
            codes[i] = code
            move = code.sub_(z_all[i]).mul_(s_all[i]).sub_(old)
            moves[i - start] = move
            if i + 1 < stop:
                block[i + 1 - start :].addr_(h[i, i + 1 : stop], move, alpha=-1)
        if stop < k:
            gradient[stop:].addmm_(h[stop:, start:stop], moves, alpha=-1)
    return codes


def _statistics(
    w: Tensor,
    target: Tensor,
    h: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    factor: Factor,
    dead: int,
    tokens: int,
    options: SolverOptions,
) -> Statistics:
    n = w.shape[1]
    quantized = dequantize(codes, scales, zeros, groups)
    error = quantized - target
    loss = float((error * (h @ error)).sum()) / 2
    energy = float((w * (h @ w)).sum()) / 2
    g = normalize_group_size(options.group_size, w.shape[0])
    grouped = torch.nn.functional.pad(w, (0, 0, 0, -w.shape[0] % g)).reshape(-1, g, n)
    full = unclipped_scales(grouped, options.wtype, options.grid.signed)
    ratio = (scales.abs() / full.abs().clamp(min=1e-12)).clamp(max=4)
    return Statistics(
        loss=loss / max(tokens, 1) / n,
        relative_error=(max(loss, 0.0) / energy) ** 0.5 if energy > 0 else 0.0,
        relative_weight_error=float((quantized - w).norm() / w.norm().clamp(min=1e-30)),
        clip_mean=float(ratio.mean()),
        clip_fraction=float((ratio < 0.99).float().mean()),
        damping=factor.damping,
        damping_retries=factor.retries,
        dead_inputs=dead,
    )
