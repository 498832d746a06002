"""Scale and zero search of one group: ranges, clipping, signs, fp16 scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq import grid
from gptq.grid import GridOptions, quantize_to_codes, search_grid
from marlin_kernel import INTEGER_TYPES, WEIGHT_TYPES, reference
from marlin_kernel.reference import MIN_SCALE, round_scales
from marlin_kernel.weight_types import WeightType

U4B8 = WEIGHT_TYPES["uint4b8"]
TYPES = pytest.mark.parametrize("wtype", INTEGER_TYPES.values(), ids=lambda t: t.name)


def groups(count: int = 3, g: int = 32, n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [G, g, N] with a few outliers, and upper triangular factors [G, g, g]."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(count, g, n, generator=draw)
    w[:, 5, ::3] *= 4
    factor = torch.randn(count, g, g, generator=draw).triu() * 0.3
    factor.diagonal(dim1=1, dim2=2).add_(1)
    return w, factor


def error(w: Tensor, factor: Tensor | None, wtype: WeightType, scales: Tensor, zeros: Tensor):
    """float64 [G, N]: |e R|² of every group and output."""
    s, z = scales[:, None], zeros[:, None]
    e = ((quantize_to_codes(w, s, z, wtype.levels) - z) * s - w).double()
    if factor is not None:
        e = factor.double().transpose(1, 2) @ e
    return e.square().sum(1)


@TYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_clipping_is_never_worse_than_no_clipping(wtype, weighted, signed):
    w, factor = groups()
    factor = factor if weighted else None
    options = GridOptions(signed=signed)
    whole = search_grid(w, factor, wtype, replace(options, clip=False))
    clipped = search_grid(w, factor, wtype, options)
    before, after = (error(w, factor, wtype, *found) for found in (whole, clipped))
    assert bool((after <= before * (1 + 1e-5)).all())
    if wtype.bits == 4:  # 8 bits have little to gain
        assert float(after.sum()) < 0.98 * float(before.sum())


@TYPES
def test_search_takes_the_best_of_all_its_candidates(wtype):
    """The weighting must reach the choice: candidates compared under another norm lose."""
    w, factor = groups(count=2, n=10)
    options = GridOptions(clip_steps=7, clip_min=0.4, signed=False)
    scales, zeros = search_grid(w, factor, wtype, options)
    step, zero = search_grid(w, None, wtype, replace(options, clip=False))
    exact = 2 * w.abs().amax(1) / (wtype.levels - 1)
    if not wtype.symmetric:
        exact = (w.amax(1) - w.amin(1)) / (wtype.levels - 1)
    assert torch.equal(step, round_scales(exact)) and torch.equal(zeros, zero)
    trials = [round_scales(exact * s) for s in torch.linspace(1, 0.4, 7).tolist()]
    least = torch.stack([error(w, factor, wtype, t, zero) for t in trials]).amin(0)
    torch.testing.assert_close(error(w, factor, wtype, scales, zeros), least, rtol=1e-4, atol=0)
    plain = search_grid(w, None, wtype, options)[0]
    if wtype.bits == 4:
        assert not torch.equal(scales, plain)  # the weights of the inputs matter here


def test_search_with_both_signs_contains_each_sign():
    """A search over positive scales only can beat it nowhere."""
    w, factor = groups(n=200)
    options = GridOptions()
    scales, zeros = search_grid(w, factor, U4B8, options)
    assert bool((scales < 0).any()) and bool((scales > 0).any())
    found = error(w, factor, U4B8, scales, zeros)
    largest = w.abs().amax(1) / 8
    for sign in (1, -1):
        for shrink in torch.linspace(1, options.clip_min, options.clip_steps).tolist():
            trial = error(w, factor, U4B8, round_scales(sign * largest * shrink), zeros)
            assert bool((found <= trial * (1 + 1e-4)).all())
    unsigned = search_grid(w, factor, U4B8, replace(options, signed=False))
    assert float(found.sum()) < float(error(w, factor, U4B8, *unsigned).sum())


@pytest.mark.parametrize("end", [-1.0, 1.0])
def test_the_larger_end_gets_the_extra_level(end):
    """Unclipped, the largest weight of either sign is reproduced (up to the scale's rounding)."""
    w, _ = groups()
    w.clamp_(-5, 5)
    w[:, 7] = 6.0 * end
    options = GridOptions(clip=False)
    scales, zeros = search_grid(w, None, U4B8, options)
    s, z = scales[:, None], zeros[:, None]
    codes = quantize_to_codes(w, s, z, 16)
    decoded = (codes - z) * s
    assert bool((codes[:, 7] == 0).all())
    torch.testing.assert_close(decoded[:, 7], w[:, 7], rtol=1e-3, atol=0)


@TYPES
def test_unsigned_and_unclipped_is_the_kernels_own_rounding(wtype):
    """`--nearest` and `marlin_kernel.reference.quantize` must mean the same grid."""
    w, _ = groups()
    scales, zeros = search_grid(w, None, wtype, GridOptions(clip=False, signed=False))
    codes = quantize_to_codes(w, scales[:, None], zeros[:, None], wtype.levels)
    flat = w.reshape(-1, w.shape[2])
    wanted_codes, wanted_scales, wanted_zeros = reference.quantize(flat, wtype, 32)
    torch.testing.assert_close(scales, wanted_scales, rtol=2.0**-10, atol=0)
    same = (zeros == wanted_zeros) & (scales == wanted_scales)
    assert float(same.float().mean()) > 0.9  # the rest: ties, decided by the last bit of float32
    assert torch.equal(
        codes.permute(0, 2, 1)[same], wanted_codes.reshape(w.shape).permute(0, 2, 1)[same].float()
    )


@TYPES
@pytest.mark.parametrize("clip", [False, True])
def test_scales_are_storable_and_zeros_are_codes(wtype, clip):
    """Tiny, huge, one-sided and empty groups: scales are fp16 values, never 0; zeros fit."""
    w, _ = groups(count=8, n=16)
    w[0] *= 1e-9
    w[1] *= 1e5
    w[2].abs_()
    w[3].abs_().neg_()
    w[4] = 0
    w[5] = 3.25
    w[6, :31] = 0
    scales, zeros = search_grid(w, None, wtype, GridOptions(clip=clip))
    assert torch.equal(scales, scales.half().float())
    assert bool((scales.abs() >= MIN_SCALE).all())
    assert bool((zeros == zeros.round()).all())
    assert bool((zeros >= 0).all()) and bool((zeros < wtype.levels).all())
    s, z = scales[:, None], zeros[:, None]
    decoded = (quantize_to_codes(w, s, z, wtype.levels) - z) * s
    assert not decoded[4].any()
    torch.testing.assert_close(decoded[5], w[5], rtol=2e-3, atol=0)
    torch.testing.assert_close(decoded[6], w[6], rtol=2e-3, atol=0)
    for side in (2, 3):  # nothing of a one-sided group lands on the other side
        assert bool((decoded[side] * w[side] >= 0).all())


def test_codes_are_clamped_and_half_goes_to_even():
    w = torch.tensor([[-9.0, -8.0, 0.5, 1.5, 7.0, 7.4, 9.0]])
    codes = quantize_to_codes(w, torch.ones(1), torch.full((1,), 8.0), 16)
    assert codes.tolist() == [[0, 0, 8, 10, 15, 15, 15]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["uint4b8", "uint4", "mxfp4"])
def test_groups_searched_a_few_at_a_time_give_the_same(name, weighted, monkeypatch):
    w, factor = groups(count=5, n=24)
    search = (w, factor if weighted else None, WEIGHT_TYPES[name], GridOptions())
    whole = search_grid(*search)
    monkeypatch.setattr("gptq.grid._CACHED", 2 * 32 * 24)
    assert all(map(torch.equal, search_grid(*search), whole))


ALL_TYPES = [name for name, t in WEIGHT_TYPES.items() if not t.global_scale]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ALL_TYPES)
def test_candidates_that_are_left_out_could_not_win(name, weighted, monkeypatch):
    w, factor = groups(count=4, n=60)
    w[1, :, 7] = 0
    w[2, 3, 8] = w[2, 4, 8] = 5.0  # two equal outermost weights
    search = (w, factor if weighted else None, WEIGHT_TYPES[name], GridOptions())
    some = search_grid(*search)
    tried, rounding_errors = [], grid._rounding_errors

    def count(weights: Tensor, *given) -> None:
        tried.append(weights.shape[2])
        rounding_errors(weights, *given)

    monkeypatch.setattr(grid, "_rounding_errors", count)
    search_grid(*search)
    few, _ = sum(tried), tried.clear()
    monkeypatch.setattr(grid._Ends, "least_error", lambda self, s, z: torch.full_like(s, -1.0))
    every = search_grid(*search)
    assert all(map(torch.equal, some, every))
    if WEIGHT_TYPES[name].bits == 8 and not WEIGHT_TYPES[name].is_float:
        assert few < sum(tried) / 2


@pytest.mark.parametrize("name", ALL_TYPES)
def test_no_rounding_costs_less_than_the_bound(name):
    wtype = WEIGHT_TYPES[name]
    w, factor = groups(count=4, n=60)
    scales, zeros = grid._ranges(w, wtype, True)[0]
    ends = grid._Ends.of(w, factor, wtype)
    for shrink in (1.0, 0.7, 0.4):
        s = grid.storable_scales(scales * shrink, wtype)
        out = torch.empty_like(w)
        grid._rounding_errors(w, s[:, None], zeros[:, None], wtype, out)
        e = (factor.double().transpose(1, 2) @ out.double()).square().sum(1)
        bound = ends.least_error(s, zeros)
        assert bool((bound * grid._SURELY <= e).all())
    assert float(bound.max()) > 0


def test_errors_in_few_passes_are_those_of_the_codes():
    """Of a constant zero: rounding before or after it is added is the same, but for ties."""
    w, _ = groups()
    out = torch.empty_like(w)
    for wtype in (U4B8, WEIGHT_TYPES["uint8b128"], WEIGHT_TYPES["uint4"]):
        scales, zeros = search_grid(w, None, wtype, GridOptions())
        s, z = scales[:, None], zeros[:, None]
        grid._rounding_errors(w, s, z, wtype, out)
        wanted = (quantize_to_codes(w, s, z, wtype.levels) - z) * s - w
        assert float(((out - wanted).abs() > 1e-6 * w.abs().max()).float().mean()) < 1e-3
