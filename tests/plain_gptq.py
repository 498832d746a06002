"""What `gptq.solver` is compared with: the plain GPTQ update of any weight type, input by input.

Inputs in their order, scales from the weights of a group as they are when its first input is
reached, codes and scales rounded by `marlin_kernel.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq.hessian import factorize
from marlin_kernel import reference
from marlin_kernel.formats import QuantizedLinear
from marlin_kernel.weight_types import WeightType, normalize_group_size


def solve(
    weight: Tensor, h: Tensor, wtype: WeightType, group_size: int, percdamp: float = 0.01
) -> QuantizedLinear:
    """Codes of `weight` that keep its outputs, on the grid of `wtype`.

    weight: float [K, N]; h: float [K, K], sum of the outer products of inputs; group_size: one that
    the type allows; percdamp: of the mean diagonal, added to it. Frantar et al., "GPTQ" (2022),
    algorithm 1. Raises NumericalError if h cannot be factored, ConfigError for the group size.
    """
    k = weight.shape[0]
    g = normalize_group_size(group_size, k)
    w = weight.float().clone()
    whole = reference.quantize_stored(w, wtype, group_size)  # global scale, shapes, dtypes
    u = factorize(h.float().clone(), percdamp).u
    codes = torch.empty_like(whole.codes)
    scales, zeros = [], []
    for start in range(0, k, g):
        stop = min(start + g, k)
        group = reference.quantize_stored(w[start:stop], wtype, stop - start, whole.global_scale)
        scales.append(group.scales)
        zeros.append(group.zeros)
        factor = reference.scale_values(group.scales, wtype, whole.global_scale)
        for i in range(start, stop):
            codes[i] = _round(w[i], factor[0], group.zeros, wtype)
            rounded = reference.decode(codes[i], wtype) - _zero(group.zeros, wtype)
            error = (w[i] - rounded * factor[0]) / u[i, i]
            w[i:] -= u[i, i:, None] * error
    return QuantizedLinear.of(
        codes,
        _concatenate(scales),
        wtype,
        group_size,
        zeros=None if zeros[0] is None else torch.cat(zeros),
        global_scale=whole.global_scale,
    )


def _zero(zeros: Tensor | None, wtype: WeightType) -> Tensor | float:
    """Zero points [N] of one group, or the constant."""
    return float(wtype.bias or 0) if zeros is None else zeros[0].float()


def _round(row: Tensor, factor: Tensor, zeros: Tensor | None, wtype: WeightType) -> Tensor:
    """uint8 codes [N] of the grid points nearest to a row of weights."""
    if wtype.is_float:
        return reference.encode(row / factor, wtype)
    codes = (row / factor + _zero(zeros, wtype)).round()
    return codes.clamp(0, wtype.levels - 1).to(torch.uint8)


def _concatenate(parts: list[Tensor]) -> Tensor:
    if parts[0].dtype == torch.float8_e4m3fn:  # which torch cannot concatenate everywhere
        return torch.cat([p.view(torch.uint8) for p in parts]).view(parts[0].dtype)
    return torch.cat(parts)
