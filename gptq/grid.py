"""Scale and zero point of every group: min-max, and the Hessian-weighted clipping search.

Weights are held transposed, ``[inputs, outputs]``, so that the inputs of one group are contiguous
rows. A weight of any type is ``(point - zero) * scale``: points are the codes of an integer type,
and the numbers that the codes of a floating-point type stand for (whose zero is 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_kernel import reference
from marlin_kernel.weight_types import WeightType

_CACHED = 1 << 20  # weights whose clipping factors are tried together on a CPU
_SURELY = 0.99  # of a bound on an error: what float32 may have added to it
_WORTHWHILE = 0.8  # share of the outputs still searched below which their weights are copied


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


def quantize_to_codes(
    w: Tensor, scales: Tensor, zeros: Tensor, levels: int, out: Tensor | None = None
) -> Tensor:
    """``clamp(round(w / s + z))`` as float codes; broadcasts like its arguments."""
    return torch.div(w, scales, out=out).add_(zeros).round_().clamp_(0, levels - 1)


def nearest_points(
    w: Tensor, scales: Tensor, zeros: Tensor, wtype: WeightType, out: Tensor | None = None
) -> Tensor:
    """float32 points of the grid nearest to weights; broadcasts like its arguments.

    out: where to put them, of the result's shape.
    """
    if not wtype.is_float:
        return quantize_to_codes(w, scales, zeros, wtype.levels, out)
    points = round_to_float(torch.div(w, scales), wtype)
    return points if out is None else out.copy_(points)


def round_to_float(values: Tensor, wtype: WeightType) -> Tensor:
    """``reference.decode(reference.encode(values))`` by arithmetic: ties to even, saturating."""
    lowest = 2 - (1 << (wtype.exponent - 1))  # exponent of the smallest normal number
    _, exponent = torch.frexp(values)  # |values| in [2**(exponent - 1), 2**exponent)
    exponent = exponent.sub_(1).clamp_(min=lowest).sub_(wtype.mantissa)
    steps = _power_of_two(exponent)
    return (values / steps).round_().mul_(steps).clamp_(-wtype.largest, wtype.largest)


def _power_of_two(exponents: Tensor) -> Tensor:
    """float32 ``2**e`` of int32 exponents, exact on every device; beyond -126..127 the nearest."""
    return ((exponents.clamp(-126, 127) + 127) << 23).view(torch.float32)


def encode_points(points: Tensor, wtype: WeightType) -> Tensor:
    """uint8 codes of points. Inverse: `decode_points`."""
    return reference.encode(points, wtype) if wtype.is_float else points.to(torch.uint8)


def decode_points(codes: Tensor, wtype: WeightType | None) -> Tensor:
    """Points of codes; integers, and weights that were only pruned (None), stay as they are."""
    return reference.decode(codes, wtype) if wtype is not None and wtype.is_float else codes


def find_global_scale(weight: Tensor, wtype: WeightType) -> Tensor | None:
    """float32 [1]: common factor of the scales of `weight` (any shape); None for most types.

    A power of two, so that no product with it rounds, with which the scale of the largest weight
    is half to whole of the largest that the scales' dtype has.
    """
    if not wtype.global_scale:
        return None
    largest = torch.finfo(reference.SCALE_DTYPES[wtype.scale]).max
    ratio = weight.detach().float().abs().amax() / (wtype.largest * largest)
    mantissa, exponent = torch.frexp(ratio.clamp(min=2.0**-100))  # mantissa in [1/2, 1)
    return _power_of_two(exponent - (mantissa == 0.5).to(torch.int32)).reshape(1)


def storable_scales(
    scales: Tensor, wtype: WeightType, global_scale: Tensor | None = None
) -> Tensor:
    """Scales as they will be stored, in float32 and with the global factor: never zero."""
    return reference.scale_values(stored_scales(scales, wtype, global_scale), wtype, global_scale)


def stored_scales(scales: Tensor, wtype: WeightType, global_scale: Tensor | None = None) -> Tensor:
    """`scales` rounded to the dtype that a type stores (reference.SCALE_DTYPES).

    float16 keeps signs; e4m3 is relative to `global_scale`, and e8m0 is the nearest exponent.
    """
    if wtype.scale == "float16":
        return reference.round_scales(scales).half()
    if wtype.scale == "e8m0":
        return torch.log2(scales).round().clamp(-126, 127).add(127).to(torch.uint8)
    dtype = reference.SCALE_DTYPES[wtype.scale]
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    return (scales / global_scale).clamp(smallest, limits.max).to(dtype)


def _ranges(w: Tensor, wtype: WeightType, signed: bool) -> list[tuple[Tensor, Tensor]]:
    """Unclipped (scale, zero) pairs to start from, each [G, N], for w [G, g, N]."""
    levels = wtype.levels
    if wtype.is_float:
        return _float_ranges(w.abs().amax(1), wtype)
    if wtype.zeros == "float":
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        step = (high - low) / (levels - 1)
        return [(step, (-low / reference.round_scales(step)).half().float())]
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


def _float_ranges(largest: Tensor, wtype: WeightType) -> list[tuple[Tensor, Tensor]]:
    """As `_ranges`, for a floating-point type; largest: [G, N] largest magnitude of each group."""
    zeros = torch.zeros_like(largest)
    if wtype.scale == "e8m0":  # OCP MX 1.0, section 6.3; up to a quarter of the range saturates
        top = 2**wtype.exponent - 2  # exponent of the largest number
        _, exponent = torch.frexp(largest)  # largest in [2**(exponent - 1), 2**exponent), or 0
        step = _power_of_two(exponent - 1 - top)
        return [(step, zeros), (2 * step, zeros)]
    step = largest / wtype.largest
    if wtype.bits == 8:
        return [(step, zeros)]
    return [(step, zeros), (1.5 * step, zeros)]  # the largest weight becomes 6, or 4: 5 is missing


def _shrinks(wtype: WeightType, options: GridOptions) -> list[float]:
    """Factors of the unclipped scale to try; powers of two where scales are."""
    if wtype.scale == "e8m0":
        return [s for s in (1.0, 0.5, 0.25, 0.125) if s >= options.clip_min]
    return torch.linspace(1.0, options.clip_min, max(options.clip_steps, 2)).tolist()


def unclipped_scales(w: Tensor, wtype: WeightType, signed: bool) -> Tensor:
    """Scales [G, N] that cover the whole range of w [G, g, N]."""
    return _ranges(w, wtype, signed)[0][0]


def _rounding_errors(
    w: Tensor, scales: Tensor, zeros: Tensor, wtype: WeightType, out: Tensor
) -> None:
    """What rounding adds to weights, into `out`; for a constant zero in few passes."""
    if wtype.bias is None:
        torch.sub(nearest_points(w, scales, zeros, wtype), zeros, out=out)
    else:
        torch.div(w, scales, out=out)
        out.round_().clamp_(-wtype.bias, wtype.levels - 1 - wtype.bias)
    out.mul_(scales).sub_(w)


def search_grid(
    w: Tensor,
    factor: Tensor | None,
    wtype: WeightType,
    options: GridOptions,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of all groups.

    w: float32 [G, g, N] (inputs x outputs). factor: float32 [G, g, g] upper triangular R with the
    group's Hessian-weighted error of a row e given by ``|e R|**2`` (R = U**-1 of the group's block,
    so the error left after the later inputs have compensated); None weighs all inputs alike.
    global_scale: float32 [1], of the types that have one (`find_global_scale`).
    For every group and output the shrink factor with the least error is kept: clipping never makes
    the weighted error larger than no clipping.
    Returns (scales, zeros), float32 [G, N]; scales already have the value that storage gives them.
    Frantar et al., "MARLIN" (2024), section 4.1; GPTQ: arXiv 2210.17323.
    """
    if options.clip and not w.is_cuda:  # groups that stay in the cache while factors are tried
        few = max(_CACHED // (w.shape[1] * w.shape[2]), 1)
        if few < w.shape[0]:
            factors = [None] * -(-w.shape[0] // few) if factor is None else factor.split(few)
            parts = zip(w.split(few), factors, strict=True)
            found = [search_grid(*part, wtype, options, global_scale) for part in parts]
            return torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])
    starts = _ranges(w, wtype, options.signed)
    if not options.clip:
        return storable_scales(starts[0][0], wtype, global_scale), starts[0][1]
    count, _, n = w.shape
    transposed = None if factor is None else factor.transpose(1, 2)
    errors, products = torch.empty(2, w.numel(), device=w.device)
    best = torch.zeros(3, count, n, device=w.device)  # error, scale, zero
    best[0] = torch.inf
    all_ends = _Ends.of(w, factor, wtype)
    for step, zeros in starts:
        # Outputs that may still gain: where they are, and a copy of their weights; ever fewer.
        places = torch.arange(n, device=w.device).expand(count, n)
        weights, ends = w, all_ends
        for shrink in _shrinks(wtype, options):
            scales = storable_scales(step * shrink, wtype, global_scale)
            least = best[0].gather(1, places)
            may_gain = ends.least_error(scales, zeros).mul_(_SURELY) < least
            most = int(may_gain.sum(1).max())
            if most == 0:  # nor will a smaller scale: it clips more
                break
            if most < _WORTHWHILE * places.shape[1]:
                kept = may_gain.to(torch.uint8).topk(most, 1).indices
                weights = weights.gather(2, kept[:, None].expand(-1, w.shape[1], -1))
                ends = ends.take(kept)
                places, step, zeros, scales, least = (
                    t.gather(1, kept) for t in (places, step, zeros, scales, least)
                )
            rounding = errors[: weights.numel()].view(weights.shape)
            _rounding_errors(weights, scales[:, None], zeros[:, None], wtype, rounding)
            if transposed is not None:
                out = products[: weights.numel()].view(weights.shape)
                rounding = torch.bmm(transposed, rounding, out=out)
            error = rounding.square_().sum(1)
            own = places.expand(3, -1, -1)
            found = torch.stack([error, scales, zeros])
            best.scatter_(2, own, torch.where(error < least, found, best.gather(2, own)))
    return best[1], best[2]


@dataclass(frozen=True)
class _Ends:
    """The outermost weights of every group and output, and what clipping them costs at least.

    low, high: [G, N], the least and the largest weight; low_cost, high_cost: [G, N], of moving it.
    With ``|e R|**2`` the error of a row e, an entry e_i costs at least ``e_i**2 / S_ii`` whatever
    the others do, S = (R Rᵀ)⁻¹: the least value of a quadratic form with one entry given.
    """

    low: Tensor
    high: Tensor
    low_cost: Tensor
    high_cost: Tensor
    wtype: WeightType

    @classmethod
    def of(cls, w: Tensor, factor: Tensor | None, wtype: WeightType) -> _Ends:
        """w: [G, g, N]; factor: R [G, g, g] or None, as in `search_grid`."""
        low, high = w.amin(1), w.amax(1)
        if factor is None:
            return cls(low, high, torch.ones_like(low), torch.ones_like(low), wtype)
        eye = torch.eye(w.shape[1], device=w.device).expand_as(factor)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
        s = inverse.square().sum(1, keepdim=True)  # S = R⁻ᵀ R⁻¹; its diagonal [G, 1, g]
        costs = []
        for end in (low, high):  # equal outermost weights: S summed over them, a lower bound still
            costs.append(torch.bmm(s, (w == end[:, None]).float())[:, 0].reciprocal())
        return cls(low, high, *costs, wtype)

    def take(self, columns: Tensor) -> _Ends:
        """Those of some outputs of each group; columns: int64 [G, M]."""
        kept = (t.gather(1, columns) for t in (self.low, self.high, self.low_cost, self.high_cost))
        return _Ends(*kept, self.wtype)

    def least_error(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """[G, N]: what rounding to these grids costs at least; grows as a scale shrinks."""
        first, last = 0, self.wtype.levels - 1
        if self.wtype.is_float:
            first, last = -self.wtype.largest, self.wtype.largest
        one, other = (first - zeros) * scales, (last - zeros) * scales
        above = self.high - torch.maximum(one, other)
        below = torch.minimum(one, other) - self.low
        above = above.clamp_(min=0).square_().mul_(self.high_cost)
        return torch.maximum(above, below.clamp_(min=0).square_().mul_(self.low_cost))
