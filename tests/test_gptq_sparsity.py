"""2:4 pruning inside the GPTQ update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptq import sparsity
from gptq.hessian import factorize
from gptq.solver import SolverOptions, solve
from marlin_kernel.errors import ConfigError
from marlin_kernel.sparse import positions_2_4
from marlin_kernel.weight_types import weight_type

U4 = weight_type("uint4b8")


def layer(n: int = 24, k: int = 64, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, K] and H = 2 X Xᵀ of correlated inputs."""
    mix = torch.randn(k, k) / k**0.5 + torch.eye(k)
    x = mix @ (torch.randn(k, tokens) * (torch.rand(k, 1) * 3 + 0.1))
    return torch.randn(n, k), 2 * x @ x.T


def loss(difference: torch.Tensor, h: torch.Tensor) -> float:
    """tr(D H Dᵀ) of [N, K]."""
    return float((difference @ h * difference).sum())


def test_pairs_cost_least() -> None:
    """Against the loss left when all inputs after the pair compensate by least squares."""
    _, h = layer(k=12)
    factor = factorize(h, 0.01, "layer")
    damped = torch.linalg.inv(factor.u.double().T @ factor.u.double())
    w = torch.randn(4, 50)
    stays = sparsity.choose_pairs(w, factor.u[:4, :4])
    assert bool((stays.sum(0) == 2).all())
    for column in range(w.shape[1]):
        best = torch.inf, None
        for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            fixed, free = list(pair), [i for i in range(12) if i not in pair]
            removed = w[fixed, column].double()
            schur = damped[fixed][:, fixed] - damped[fixed][:, free] @ torch.linalg.solve(
                damped[free][:, free], damped[free][:, fixed]
            )
            best = min(best, (float(removed @ schur @ removed), pair))
        assert set((~stays[:, column]).nonzero().flatten().tolist()) == set(best[1])


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("group_size", (-1, 32))
@pytest.mark.parametrize("polish", (0, 1))
def test_joint_solution_is_2_4_and_beats_magnitude(
    act_order: bool, group_size: int, polish: int
) -> None:
    weight, h = layer()
    options = SolverOptions(
        U4, group_size, act_order=act_order, refit=polish, sweeps=polish, sparsity="2:4"
    )
    (joint,) = solve(weight, h, options)
    (rounded,) = solve(weight, h, replace(options, nearest=True))
    for solution in (joint, rounded):
        values = solution.weight().T
        positions_2_4(values)  # raises if it is not 2:4
        assert bool((solution.codes[values.T == 0] == 8).all())
    assert loss(joint.weight().T - weight, h) < 0.6 * loss(rounded.weight().T - weight, h)


def test_blocksize_has_no_effect() -> None:
    weight, h = layer()
    options = SolverOptions(U4, 32, sparsity="2:4", blocksize=6)
    (a,) = solve(weight, h, options)
    (b,) = solve(weight, h, replace(options, blocksize=64))
    assert float((a.codes != b.codes).float().mean()) < 0.01


def test_pruning_alone_beats_magnitude() -> None:
    weight, h = layer()
    factor = factorize(h, 0.01, "layer")
    w = weight.T.contiguous()
    pruned = sparsity.prune(w, factor, None, 16)
    positions_2_4(pruned.T.contiguous())
    least = sparsity.keep_largest(w)
    assert loss((pruned - w).T, h) < 0.7 * loss((least - w).T, h)
    order = sparsity.quad_order(h.diagonal())
    ordered = sparsity.prune(w, factorize(h[order][:, order], 0.01, "layer"), order, 16)
    positions_2_4(ordered.T.contiguous())
    assert loss((ordered - w).T, h) < loss((least - w).T, h)


def test_order_keeps_quads_together() -> None:
    order = sparsity.quad_order(torch.rand(32)).view(-1, 4)
    assert bool((order[:, 0] % 4 == 0).all())
    assert torch.equal(order - order[:, :1], torch.arange(4).expand(8, 4))


def test_movable_codes_keep_the_pattern() -> None:
    codes = torch.tensor([[8, 3], [8, 8], [8, 8], [1, 8], [8, 8], [8, 8], [8, 8], [8, 8]])
    allowed = sparsity.movable(codes, torch.full_like(codes, 8))
    assert bool((allowed.view(2, 4, 2).sum(1) == 2).all())
    assert bool(allowed[codes != 8].all())


def test_inputs_must_come_in_quads() -> None:
    weight, h = layer(k=62)
    with pytest.raises(ConfigError, match="q_proj: 62 inputs are no multiple of 4"):
        solve(weight, h, SolverOptions(U4, -1, sparsity="2:4"), name="q_proj")
