"""Scale and zero point of every group: min-max, and the Hessian-weighted clipping search.

Weights are held transposed, ``[inputs, outputs]``, so that the inputs of one group are contiguous
rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_kernel.reference import round_scales
from marlin_kernel.weight_types import WeightType


@dataclass(frozen=True)
class GridOptions:
    """How the grid of a group is chosen.

    clip: search shrink factors; clip_min: smallest factor; clip_steps: factors tried in [clip_min,
    1]; signed: also try the mirrored grid of a symmetric type, whose scale is negative, so that the
    end with the larger weight gets the extra level (-2**(bits-1) has no positive counterpart).
    """

    clip: bool = True
    clip_min: float = 0.25
    clip_steps: int = 16
    signed: bool = True


def quantize_to_codes(w: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """``clamp(round(w / s + z))`` as float codes; broadcasts like its arguments."""
    return torch.div(w, scales).add_(zeros).round_().clamp_(0, levels - 1)


def _ranges(w: Tensor, wtype: WeightType, signed: bool) -> list[tuple[Tensor, Tensor]]:
    """Unclipped (scale, zero) pairs to start from, each [G, N], for w [G, g, N]."""
    levels = wtype.levels
    if not wtype.symmetric:
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        step = (high - low) / (levels - 1)
        zeros = torch.where(step > 0, -low / step.clamp(min=1e-30), 0.0).round_()
        return [(step, zeros.clamp_(0, levels - 1))]
    low, high = w.amin(1), w.amax(1)
    zeros = torch.full_like(low, float(wtype.bias))
    if not signed:
        return [(torch.maximum(-low, high) * (2 / (levels - 1)), zeros)]
    # The code 0 means -bias: a positive scale gives the negative end the extra level.
    largest = torch.maximum(-low, high)
    step = torch.where(-low >= high, largest, -largest) / wtype.bias
    return [(step, zeros), (-step, zeros)]


def unclipped_scales(w: Tensor, wtype: WeightType, signed: bool) -> Tensor:
    """Scales [G, N] that cover the whole range of w [G, g, N]."""
    return _ranges(w, wtype, signed)[0][0]


def search_grid(
    w: Tensor, factor: Tensor | None, wtype: WeightType, options: GridOptions
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of all groups.

    w: float32 [G, g, N] (inputs x outputs). factor: float32 [G, g, g] upper triangular R with the
    group's Hessian-weighted error of a row e given by ``|e R|**2`` (R = U**-1 of the group's block,
    so the error left after the later inputs have compensated); None weighs all inputs alike.
    For every group and output the shrink factor with the least error is kept: clipping never makes
    the weighted error larger than no clipping.
    Returns (scales, zeros), float32 [G, N]; scales already have the value fp16 storage gives them.
    Frantar et al., "MARLIN" (2024), section 4.1; GPTQ: arXiv 2210.17323.
    """
    starts = _ranges(w, wtype, options.signed)
    if not options.clip:
        return round_scales(starts[0][0]), starts[0][1]
    shrinks = torch.linspace(1.0, options.clip_min, max(options.clip_steps, 2)).tolist()
    transposed = None if factor is None else factor.transpose(1, 2)
    best_error = torch.full_like(starts[0][0], torch.inf)
    best_scale = torch.empty_like(best_error)
    best_zero = torch.empty_like(best_error)
    for step, zeros in starts:
        for shrink in shrinks:
            scales = round_scales(step * shrink)
            s, z = scales[:, None], zeros[:, None]
            error = quantize_to_codes(w, s, z, wtype.levels).sub_(z).mul_(s).sub_(w)
            if transposed is not None:
                error = torch.bmm(transposed, error)
            error = error.square_().sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scales, best_scale)
            best_zero = torch.where(better, zeros, best_zero)
    return best_scale, best_zero
