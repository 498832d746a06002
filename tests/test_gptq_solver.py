"""The GPTQ solver against an obvious float64 implementation, and what it promises by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gptq import solver
from gptq.grid import GridOptions
from gptq.hessian import factorize
from gptq.solver import (
    SolverOptions,
    _group_factors,
    _refit_scales,
    _sweep,
    _target_move,
    _update,
    solve,
)
from marlin_kernel import INTEGER_TYPES, WEIGHT_TYPES, NumericalError
from marlin_kernel.reference import round_scales
from marlin_kernel.weight_types import WeightType, normalize_group_size

pytestmark = pytest.mark.usefixtures("one_thread")

U4B8 = WEIGHT_TYPES["uint4b8"]
PLAIN = GridOptions(clip=False, signed=False)
CLIP = GridOptions(clip=True, clip_steps=9, signed=False)
SIGNED = GridOptions(clip=True, clip_steps=9, signed=True)


def problem(k: int, n: int, tokens: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [N, K] and H = 2 X Xᵀ [K, K] of correlated inputs of different energy."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=draw) / math.sqrt(k) + torch.eye(k)
    energy = torch.rand(k, generator=draw) * 2 + 0.1
    x = torch.randn(tokens or 4 * k, k, generator=draw) @ mixing * energy
    return torch.randn(n, k, generator=draw), 2 * x.T @ x


def options(wtype: WeightType = U4B8, group_size: int = 32, **changes) -> SolverOptions:
    """Plain GPTQ unless told otherwise."""
    plain = dict(grid=PLAIN, act_order=False, static_groups=False, percdamp=0.01)
    return SolverOptions(wtype, group_size, **{**plain, **changes})


def weighted_error(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    """float64 [N]: ``(q - w) H (q - w)ᵀ`` for w, q [K, N]."""
    e = (q - w).double()
    return (e * (h.double() @ e)).sum(0)


# ---- the reference -------------------------------------------------------------------------------


def candidates(group: Tensor, opts: SolverOptions) -> list[tuple[float, float]]:
    """(scale, zero) pairs that one output's group [g] may take, the unclipped one first."""
    levels, grid = opts.wtype.levels, opts.grid
    low, high = float(group.min()), float(group.max())
    if opts.wtype.symmetric:
        largest = max(-low, high)
        if grid.signed:
            step = math.copysign(largest / (levels // 2), 1 if -low >= high else -1)
            starts = [(step, levels // 2), (-step, levels // 2)]
        else:
            starts = [(2 * largest / (levels - 1), levels // 2)]
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (levels - 1)
        starts = [(step, round(-low / step) if step else 0)]
    if not grid.clip:
        starts = starts[:1]
    shrinks = torch.linspace(1.0, grid.clip_min, grid.clip_steps).tolist() if grid.clip else [1.0]
    return [
        (float(round_scales(torch.tensor(step * shrink))), float(zero))
        for step, zero in starts
        for shrink in shrinks
    ]


def rounded(w: Tensor, scale: float, zero: float, levels: int) -> Tensor:
    return ((w / scale + zero).round().clamp(0, levels - 1) - zero) * scale


def best_grid(group: Tensor, metric: Tensor, opts: SolverOptions) -> tuple[float, float]:
    """The candidate with the least ``e M eᵀ``, e: rounding error of one output's group [g]."""

    def error(pair: tuple[float, float]) -> float:
        e = rounded(group, *pair, opts.wtype.levels) - group
        return float(e @ metric @ e)

    return min(candidates(group, opts), key=error)


def reference(weight: Tensor, h: Tensor, opts: SolverOptions) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ as the paper states it, in float64: explicit inverse, one column after the other.

    Inputs not yet fixed follow the optimal brain surgeon's update, and the inverse Hessian loses
    the row and column of the input just fixed. The error of a group, after all inputs still free
    have compensated, is weighted by the inverse of the group's block of that inverse.
    Returns (codes [K, N], scales [G, N], g_idx [K]).
    """
    w, h = weight.double().T.clone(), h.double()
    k, n = w.shape
    g, levels = normalize_group_size(opts.group_size, k), opts.wtype.levels
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.double())
    w[dead] = 0
    inverse = torch.linalg.inv(h + opts.percdamp * h.diagonal().mean() * torch.eye(k))
    order = list(range(k))
    if opts.act_order:
        order.sort(key=lambda i: -float(h[i, i]))
    groups = torch.arange(k) // g
    if not opts.static_groups:
        groups[torch.tensor(order)] = torch.arange(k) // g
    count = int(groups.max()) + 1
    scales, zeros = torch.zeros(count, n), torch.zeros(count, n)

    def choose(j: int) -> None:
        members = (groups == j).nonzero().squeeze(1)
        metric = torch.linalg.inv(inverse[members][:, members])
        for column in range(n):
            found = best_grid(w[members, column], metric, opts)
            scales[j, column], zeros[j, column] = found

    if opts.static_groups and opts.act_order:
        for j in range(count):
            choose(j)
    chosen = set(range(count)) if opts.static_groups and opts.act_order else set()
    codes = torch.zeros(k, n)
    free = torch.ones(k, dtype=torch.bool)
    for i in order:
        j = int(groups[i])
        if j not in chosen:
            choose(j)
            chosen.add(j)
        s, z = scales[j].double(), zeros[j].double()
        codes[i] = (w[i] / s + z).round().clamp(0, levels - 1)
        error = (w[i] - (codes[i].double() - z) * s) / inverse[i, i]
        free[i] = False
        w[free] -= inverse[free][:, i : i + 1] * error
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        w[i] = 0
    return codes, scales, groups


CASES = {
    "plain": (40, options()),
    "partial last group": (80, options()),
    "one group per column": (48, options(group_size=-1)),
    "group larger than K": (40, options(group_size=128)),
    "asymmetric": (80, options(WEIGHT_TYPES["uint4"])),
    "8 bits": (64, options(WEIGHT_TYPES["uint8b128"])),
    "8 bits asymmetric": (80, options(WEIGHT_TYPES["uint8"])),
    "clipped": (80, options(grid=CLIP)),
    "clipped, both signs": (80, options(grid=SIGNED)),
    "clipped, asymmetric": (80, options(WEIGHT_TYPES["uint4"], grid=CLIP)),
    "signs without clipping": (64, options(grid=replace(PLAIN, signed=True))),
    "act-order, moving groups": (80, options(act_order=True)),
    "act-order, moving groups, clipped": (80, options(act_order=True, grid=SIGNED)),
    "act-order, static groups": (80, options(act_order=True, static_groups=True)),
    "act-order, static groups, clipped": (
        80,
        options(act_order=True, static_groups=True, grid=SIGNED),
    ),
    "act-order, static groups, clipped, asymmetric": (
        80,
        options(WEIGHT_TYPES["uint4"], act_order=True, static_groups=True, grid=CLIP),
    ),
    "act-order, one group": (40, options(group_size=-1, act_order=True, grid=CLIP)),
    "much damping": (64, options(percdamp=1.0)),
}


@pytest.mark.parametrize("blocksize", [128, 24])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_textbook(case, blocksize):
    """Blocks that end inside a group and inside K must not change a code."""
    k, opts = CASES[case]
    weight, h = problem(k, 6)
    codes, scales, groups = reference(weight, h, opts)
    found = solve(weight, h, replace(opts, blocksize=blocksize))[0]
    assert torch.equal(found.g_idx, groups)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes.float(), codes)


def test_reference_update_is_the_least_squares_optimum():
    """Guards the reference itself: OBS must equal solving for the free inputs directly."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(50, 7, dtype=torch.float64, generator=draw)
    w = torch.randn(7, dtype=torch.float64, generator=draw)
    inverse = torch.linalg.inv(2 * x.T @ x)
    error = (w[0] - 0.3) / inverse[0, 0]
    updated = w[1:] - inverse[1:, 0] * error
    wanted = torch.linalg.lstsq(x[:, 1:], x @ w - x[:, 0] * 0.3).solution
    torch.testing.assert_close(updated, wanted)


def test_the_free_inputs_compensate_optimally():
    """One coarse input, then inputs on a very fine grid: they land on the least-squares optimum."""
    k, n = 12, 5
    weight, h = problem(k, n, seed=3)
    w = weight.T.contiguous()
    wide = WeightType("wide", "wide", 16, 1 << 15)
    groups = (torch.arange(k) > 0).long()
    scales = torch.tensor([[0.7], [2.0**-11]]).expand(2, n).contiguous()
    zeros = torch.full((2, n), 2.0**15)
    factor = factorize(h, 0.0)
    opts = options(wide, -1)
    codes, _, _ = _update(w, factor, None, k, scales, zeros, groups, opts)
    q = (codes - zeros[groups]) * scales[groups]
    assert torch.equal(q[0], (w[0] / 0.7).round() * torch.tensor(0.7))
    moved = torch.linalg.solve(h[1:, 1:].double(), h[1:, :1].double() @ (w[:1] - q[:1]).double())
    optimum = w.clone()
    optimum[:1] = q[:1]
    optimum[1:] += moved.float()
    assert float((optimum[1:] - w[1:]).abs().max()) > 0.05  # there is something to compensate
    least, reached = weighted_error(w, optimum, h), weighted_error(w, q, h)
    assert bool((reached <= least * 1.001 + 1e-3).all())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("wtype", INTEGER_TYPES.values(), ids=lambda t: t.name)
def test_identity_hessian_is_rounding_to_nearest(wtype, act_order):
    weight, _ = problem(80, 16)
    h = 2 * torch.eye(80)
    opts = options(wtype, act_order=act_order, static_groups=True, percdamp=0.1)
    gptq = solve(weight, h, opts)[0]
    nearest = solve(weight, h, replace(opts, nearest=True))[0]
    assert torch.equal(gptq.codes, nearest.codes)
    assert torch.equal(gptq.scales, nearest.scales)
    w = weight.T
    s, z = nearest.scales[nearest.g_idx], nearest.zeros[nearest.g_idx]
    assert torch.equal(nearest.codes.float(), (w / s + z).round().clamp(0, wtype.levels - 1))


def test_gptq_beats_rounding_where_inputs_are_correlated():
    weight, h = problem(96, 32)
    w = weight.T
    opts = options(grid=SIGNED)
    errors = [
        float(weighted_error(w, solve(weight, h, o)[0].weight(), h).sum())
        for o in (
            replace(opts, nearest=True, grid=PLAIN),
            opts,
            replace(opts, act_order=True, static_groups=True),
            replace(opts, refit=1, sweeps=1),
            replace(opts, act_order=True, static_groups=True, refit=2, sweeps=2),
        )
    ]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[0]
    assert errors[3] < errors[1] and errors[4] < errors[2]


# ---- dead inputs, damage -------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_change_nothing_and_cost_nothing(act_order):
    """An input that is never active must get the weight 0 and not disturb the others' codes."""
    weight, h = problem(64, 6)
    dead = torch.tensor([3, 40, 63])
    h[dead] = 0
    h[:, dead] = 0
    weight[:, dead] = 50.0  # would ruin the scale of its group if it counted
    opts = options(act_order=act_order, static_groups=act_order)
    found = solve(weight, h, opts)[0]
    assert found.statistics.dead_inputs == 3
    assert not found.weight()[dead].any()
    assert float(found.scales.max()) < 1
    codes, scales, _ = reference(weight, h, replace(opts, percdamp=0.0))
    exact = solve(weight, h, replace(opts, percdamp=1e-7))[0]
    assert torch.equal(exact.codes.float(), codes) and torch.equal(exact.scales, scales)


def test_faint_inputs_beside_dead_ones_are_not_damped_away():
    """The stand-in diagonal of dead inputs must not set the damping of faint live ones."""
    weight, h = problem(64, 6)
    h[5] = h[:, 5] = 0
    opts = options(percdamp=0.1)
    loud = solve(weight, h * 2.0**10, opts)[0]
    faint = solve(weight, h * 2.0**-20, opts)[0]
    assert torch.equal(loud.codes, faint.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_and_hessians_stop_with_the_layers_name(bad):
    weight, h = problem(40, 6)
    broken = weight.clone()
    broken[2, 3] = bad
    with pytest.raises(NumericalError, match=r"layers\.7\.q_proj: the weights hold NaN or Inf"):
        solve(broken, h, options(), name="layers.7.q_proj")
    with pytest.raises(NumericalError, match=r"layers\.7\.q_proj"):
        solve(broken, h, options(nearest=True), name="layers.7.q_proj")
    h[1, 2] = bad
    with pytest.raises(NumericalError, match=r"layers\.7\.q_proj: the Hessian holds NaN or Inf"):
        solve(weight, h, options(), name="layers.7.q_proj")


def test_rank_deficient_calibration_raises_the_damping_and_says_so(caplog):
    """Fewer tokens than inputs and no damping: usable codes, and the raise is on record."""
    weight, h = problem(64, 6, tokens=10)
    found = solve(weight, h, options(percdamp=0.0), name="layers.3.o_proj")[0]
    assert found.statistics.damping > 0 and found.statistics.damping_retries > 0
    assert "layers.3.o_proj" in caplog.text and "raised" in caplog.text
    w = weight.T
    nearest = solve(weight, h, options(nearest=True))[0]
    gptq, plain = (float(weighted_error(w, s.weight(), h).sum()) for s in (found, nearest))
    assert gptq < 0.5 * plain  # did not fall back to rounding


def test_nearly_singular_hessian_does_not_crash_the_clipping_search():
    """The blocks of the inverse may be worse conditioned than what `factorize` accepted."""
    weight, h = problem(64, 6, tokens=10)
    opts = options(percdamp=1e-6, act_order=True, static_groups=True, grid=SIGNED)
    found = solve(weight, h, opts)[0]
    assert bool(torch.isfinite(found.weight()).all())


# ---- stacked layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("opts", [
    options(grid=SIGNED, act_order=True, static_groups=True, refit=1, sweeps=1),
    options(grid=SIGNED, act_order=True),
    options(nearest=True),
], ids=["default", "moving groups", "nearest"])  # fmt: skip
def test_stacked_layers_equal_single_ones(opts):
    weight, h = problem(80, 24)
    sizes = [12, 8, 4]
    stacked = solve(weight, h, opts, parts=sizes)
    for part, alone in zip(weight.split(sizes), stacked, strict=True):
        single = solve(part, h, opts)[0]
        assert torch.equal(single.codes, alone.codes)
        assert torch.equal(single.scales, alone.scales)
        assert single.statistics.loss == pytest.approx(alone.statistics.loss, rel=1e-4)
        assert single.statistics.relative_error == pytest.approx(
            alone.statistics.relative_error, rel=1e-4
        )


# ---- polish --------------------------------------------------------------------------------------


def start_of_polish(seed: int, wtype: WeightType = U4B8):
    """Everything `_refit_scales` and `_sweep` take, from a rounded layer."""
    weight, h = problem(80, 24, seed=seed)
    opts = options(wtype, blocksize=24)
    start = solve(weight, h, replace(opts, nearest=True))[0]
    return weight.T.contiguous(), h, start, opts


@pytest.mark.parametrize("wtype", INTEGER_TYPES.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("seed", range(3))
def test_refit_and_sweep_never_increase_the_weighted_error(wtype, seed):
    w, h, start, opts = start_of_polish(seed, wtype)
    codes, groups, scales = start.codes.float(), start.g_idx, start.scales
    error = weighted_error(w, start.weight(), h)
    for _ in range(2):
        scales = _refit_scales(w, h, codes, scales, start.zeros, groups)
        q = (codes - start.zeros[groups]) * scales[groups]
        refit = weighted_error(w, q, h)
        assert bool((refit <= error * (1 + 1e-5)).all())
        codes = _sweep(w, h, codes, scales, start.zeros, groups, opts)
        q = (codes - start.zeros[groups]) * scales[groups]
        swept = weighted_error(w, q, h)
        assert bool((swept <= refit * (1 + 1e-5)).all())
        assert float(swept.sum()) < float(error.sum())
        error = swept


def test_refit_is_the_least_squares_solution():
    w, h, start, _ = start_of_polish(0)
    codes, groups = start.codes.float(), start.g_idx
    fitted = _refit_scales(w, h, codes, start.scales, start.zeros, groups)
    root = torch.linalg.cholesky(h.double())  # error = |rootᵀ (B s - w)|
    for n in range(w.shape[1]):
        basis = torch.zeros(80, fitted.shape[0], dtype=torch.float64)
        basis[torch.arange(80), groups] = (codes - start.zeros[groups])[:, n].double()
        best = torch.linalg.lstsq(root.T @ basis, root.T @ w[:, n].double()).solution
        torch.testing.assert_close(fitted[:, n].double(), best, rtol=2e-3, atol=1e-4)


def test_refit_survives_a_group_that_decodes_to_zero():
    """All codes of a group at the zero point make the least-squares system singular.

    Its scale must stay: with the smallest scale there is, no sweep could ever leave zero again.
    """
    w, h, start, _ = start_of_polish(0)
    codes = start.codes.float()
    codes[:32] = 8.0
    codes[:, 0] = 8.0
    fitted = _refit_scales(w, h, codes, start.scales, start.zeros, start.g_idx)
    assert bool(torch.isfinite(fitted).all())
    assert torch.equal(fitted[0], start.scales[0])
    assert torch.equal(fitted[:, 0], start.scales[:, 0])
    assert not torch.equal(fitted[1:, 1:], start.scales[1:, 1:])


@pytest.mark.parametrize("blocksize", [24, 40, 128])
def test_sweep_is_coordinate_descent(blocksize):
    """Every input in turn takes the code that is best given all others, checked by trying all."""
    w, h, start, opts = start_of_polish(1)
    opts = replace(opts, blocksize=blocksize)
    w, codes, groups = w[:, :2].contiguous(), start.codes[:, :2].float(), start.g_idx
    s, z = start.scales[:, :2].contiguous(), start.zeros[:, :2].contiguous()
    found = _sweep(w, h, codes, s, z, groups, opts)
    wanted = codes.clone()
    levels = torch.arange(16.0)
    for column in range(2):
        q = ((wanted[:, column] - z[groups, column]) * s[groups, column]).double()
        for i in range(80):
            trials = q.repeat(16, 1)
            trials[:, i] = ((levels - z[groups[i], column]) * s[groups[i], column]).double()
            error = trials - w[:, column].double()
            best = int(((error @ h.double()) * error).sum(1).argmin())
            wanted[i, column] = best
            q = trials[best]
    assert torch.equal(found, wanted)


# ---- asymmetric calibration ----------------------------------------------------------------------


@pytest.mark.parametrize("with_residual", [False, True])
def test_target_is_the_least_squares_solution(with_residual):
    """min over W* of |W* X - (W X̃ + R̃ - R)|² + damping · |W* - W|², as one lstsq problem."""
    draw = torch.Generator().manual_seed(2)
    k, n, tokens, damping = 24, 5, 100, 0.3
    x = torch.randn(tokens, k, generator=draw) * (torch.rand(k, generator=draw) + 0.2)
    clean = x + 0.2 * torch.randn(tokens, k, generator=draw)
    residual = torch.randn(tokens, n, generator=draw) if with_residual else torch.zeros(tokens, n)
    w = torch.randn(k, n, generator=draw)
    h, shift = 2 * x.T @ x, 2 * (clean - x).T @ x
    moved = w + _target_move(w, h, shift, 2 * residual.T @ x if with_residual else None, damping)

    weight = (damping * h.diagonal().mean() / 2).sqrt().double()
    left = torch.cat([x.double(), weight * torch.eye(k, dtype=torch.float64)])
    right = torch.cat([(clean @ w + residual).double(), weight * w.double()])
    wanted = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(moved.double(), wanted, rtol=1e-4, atol=1e-4)


def test_asymmetric_solution_is_closer_to_the_full_model():
    """What counts is |Q X - W X̃|: the moved target must serve it better than W itself."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(400, 64, generator=draw)
    clean = x + 0.5 * torch.randn(400, 64, generator=draw) + 0.3 * x.roll(1, 1)
    weight = torch.randn(16, 64, generator=draw)
    h, shift = 2 * x.T @ x, 2 * (clean - x).T @ x
    opts = options(asymmetric=True, target_damp=0.01)
    aimed = solve(weight, h, opts, shift=shift)[0]
    plain = solve(weight, h, replace(opts, asymmetric=False), shift=shift)[0]
    same = solve(weight, h, opts, shift=torch.zeros_like(shift))[0]
    errors = [float((x @ s.weight() - clean @ weight.T).norm()) for s in (aimed, plain)]
    assert errors[0] < 0.9 * errors[1]
    assert torch.equal(same.codes, plain.codes)


# ---- shrinkage -----------------------------------------------------------------------------------


def test_shrinkage_solves_with_fewer_correlations_and_reports_true_losses():
    weight, h = problem(64, 8)
    shrunk = 0.7 * h
    shrunk.diagonal().copy_(h.diagonal())
    opts = options(shrinkage=0.3, refit=1, sweeps=1)
    found = solve(weight, h, opts)[0]
    wanted = solve(weight, shrunk, replace(opts, shrinkage=0.0))[0]
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
    moved = found.weight() - weight.T
    loss = float((moved * (h @ moved)).sum()) / 2
    assert found.statistics.loss == pytest.approx(loss / weight.shape[0], rel=1e-3)
    nearest = [solve(weight, h, options(nearest=True, shrinkage=s))[0].codes for s in (0.0, 0.3)]
    assert torch.equal(*nearest)


def test_shrinkage_helps_where_pairs_of_inputs_are_correlated_otherwise():
    """Two kinds of text: equal energies of single inputs, correlations of their own."""
    draw = torch.Generator().manual_seed(3)
    energy = torch.rand(128, generator=draw) + 0.5

    def inputs() -> torch.Tensor:
        shared = torch.randn(16, 128, generator=draw)
        x = torch.randn(300, 16, generator=draw) @ shared + torch.randn(300, 128, generator=draw)
        return x / x.square().mean(0).sqrt() * energy

    calibration, other = inputs(), inputs()
    weight = torch.randn(64, 128, generator=draw)
    errors = []
    for shrinkage in (0.0, 0.2):
        opts = options(shrinkage=shrinkage, percdamp=0.1, act_order=True, static_groups=True)
        found = solve(weight, 2 * calibration.T @ calibration, opts)[0]
        errors.append(float((other @ (found.weight() - weight.T)).norm()))
    assert errors[1] < 0.97 * errors[0]


# ---- clipping factors of static groups -----------------------------------------------------------


@pytest.mark.parametrize("k", [64, 80])
@pytest.mark.parametrize("act_order", [False, True])
def test_group_factors_are_the_schur_complement(k, act_order):
    """F Fᵀ of a group = H_gg - H_gr H_rr⁻¹ H_rg: the error left when the rest compensates."""
    _, h = problem(k, 1)
    order = torch.argsort(h.diagonal(), descending=True) if act_order else torch.arange(k)
    factor = factorize(h[order][:, order], 0.05)
    found = _group_factors(factor, order, 32, "layer").double()
    damped = h.double() + 0.05 * h.double().diagonal().mean() * torch.eye(k)
    for j in range(-(-k // 32)):
        inside = torch.arange(k) // 32 == j
        g = int(inside.sum())
        a, b, c = damped[inside][:, inside], damped[inside][:, ~inside], damped[~inside][:, ~inside]
        wanted = a - b @ torch.linalg.solve(c, b.T)
        assert found.shape[1:] == (32, 32)
        torch.testing.assert_close((found[j] @ found[j].T)[:g, :g], wanted, rtol=1e-3, atol=1e-2)


# ---- statistics ----------------------------------------------------------------------------------


def test_statistics_say_what_happened():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=draw)
    weight = torch.randn(8, 64, generator=draw)
    opts = options(grid=SIGNED)
    found = solve(weight, 2 * x.T @ x, opts, tokens=200)[0]
    difference = x @ (found.weight() - weight.T)
    facts = found.statistics
    assert facts.loss == pytest.approx(float(difference.square().mean()), rel=1e-3)
    relative = float(difference.norm() / (x @ weight.T).norm())
    assert facts.relative_error == pytest.approx(relative, rel=1e-3)
    relative = float((found.weight() - weight.T).norm() / weight.norm())
    assert facts.relative_weight_error == pytest.approx(relative, rel=1e-3)
    assert facts.damping == 0.01 and facts.damping_retries == 0
    assert 0.25 <= facts.clip_mean < 1 and 0 < facts.clip_fraction <= 1
    whole = solve(weight, 2 * x.T @ x, replace(opts, nearest=True, grid=PLAIN))[0].statistics
    assert whole.clip_mean == pytest.approx(1, rel=1e-3) and whole.clip_fraction == 0


# ---- the same with less work ---------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 40, 96])
def test_quadratic_form_from_one_triangle(k):
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(k, k, generator=draw)
    h, x = root @ root.T, torch.randn(k, 5, generator=draw)
    wanted = (x.double() * (h.double() @ x.double())).sum(0)
    torch.testing.assert_close(solver._quadratic(x, h), wanted.float(), rtol=1e-5, atol=1e-4)
