"""2:4 pruning: of every four consecutive inputs of an output, two weights become zero.

`choose_pairs` is the selection inside the GPTQ update (`solver`): the pair whose removal costs
least after all inputs still to come have compensated as well as they can. `keep_largest` is the
baseline. `prune` removes weights without rounding the others.
Frantar and Alistarh, "SparseGPT" (arXiv 2301.00774), section 3.4; where that scores single weights
by w² / (H⁻¹)_ii, here the six pairs of four are scored exactly.
Everything is held transposed, ``[inputs, outputs]``, as in `solver`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_kernel.errors import ConfigError

from .hessian import Factor

SPARSITIES = ("2:4",)
QUAD = 4  # consecutive inputs that keep two
# Pairs that are removed.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
PAIRS = len(_PAIRS)
TERMS = 3  # of a removal's cost, in x², x y and y²


def check_inputs(k: int, name: str) -> None:
    """Raise ConfigError unless a layer's inputs come in whole quads."""
    if k % QUAD:
        raise ConfigError(
            f"{name}: {k} inputs are no multiple of {QUAD}, which sparsity 2:4 needs; leave the "
            "layer out, or do without --sparsity"
        )


def pair_costs(u: Tensor) -> Tensor:
    """What removing each pair of every quad costs, float32 [K / 4, PAIRS, TERMS].

    u: float32 [K, K], the upper factor U: the diagonal block B of a quad gives the quad's block
    Bᵀ B of the inverse Hessian of all inputs from this quad on. Removing the pair P costs
    w_P ((H⁻¹)_PP)⁻¹ w_Pᵀ (optimal brain surgeon, for two weights); for w_P = (x, y) these are the
    coefficients of x², x y and y².
    """
    quads = u.unflatten(0, (-1, QUAD)).unflatten(2, (-1, QUAD)).diagonal(dim1=0, dim2=2)
    blocks = quads.permute(2, 0, 1).double()  # [K / 4, 4, 4]
    inverse = blocks.mT @ blocks
    costs = []
    for i, j in _PAIRS:
        a, b, c = inverse[:, i, i], inverse[:, i, j], inverse[:, j, j]
        determinant = a * c - b * b
        costs.append(torch.stack([c, -2 * b, a], 1) / determinant[:, None])
    return torch.stack(costs, 1).float()


def choose_pairs(w: Tensor, costs: Tensor) -> Tensor:
    """Which weights of one quad stay, bool [4, N]: all but the pair that costs least.

    w: float32 [4, N], as updated so far. costs: float32 [PAIRS, TERMS] (`pair_costs`).
    """
    removals = []
    for (i, j), (first, mixed, second) in zip(_PAIRS, costs, strict=True):
        removals.append(w[i] * w[i] * first + w[i] * w[j] * mixed + w[j] * w[j] * second)
    cheapest = torch.stack(removals).argmin(0)
    stays = torch.ones(PAIRS, QUAD, dtype=torch.bool, device=w.device)
    for row, pair in enumerate(_PAIRS):
        stays[row, list(pair)] = False
    return stays[cheapest].T


def keep_largest(w: Tensor) -> Tensor:
    """w [K, N] with the two smallest magnitudes of every quad set to zero; of equals, the first."""
    quads = w.unflatten(0, (-1, QUAD))
    sizes = quads.abs()
    smaller = torch.zeros_like(quads, dtype=torch.uint8)  # weights of the quad that go before
    for i, j in _PAIRS:
        first = sizes[:, i] <= sizes[:, j]
        smaller[:, j] += first
        smaller[:, i] += ~first
    return torch.where(smaller >= 2, quads, 0.0).flatten(0, 1)


def quad_order(diagonal: Tensor) -> Tensor:
    """Inputs by falling Hessian diagonal of their quads, whose four inputs stay together: [K]."""
    energy = diagonal.view(-1, QUAD).sum(1)
    first = torch.argsort(energy, descending=True, stable=True) * QUAD
    return (first[:, None] + torch.arange(QUAD, device=diagonal.device)).flatten()


def movable(codes: Tensor, zeros: Tensor) -> Tensor:
    """Which codes may change without breaking the 2:4 pattern, bool [K, N].

    codes: [K, N]; zeros: the zero point of each. In every quad the codes other than zero, and as
    many of its zeros as fill them up to two.
    """
    k, n = codes.shape
    nonzero = (codes != zeros).view(k // QUAD, QUAD, n)
    first = torch.argsort(nonzero.to(torch.uint8), dim=1, descending=True, stable=True)[:, :2]
    return torch.zeros_like(nonzero).scatter_(1, first, True).view(k, n)


def prune(w: Tensor, factor: Factor, order: Tensor | None, blocksize: int) -> Tensor:
    """Pruned weights [K, N]: SparseGPT's update without rounding.

    w: float32 [K, N] in natural order; factor, order: as in `solver._update`, order keeping quads
    together (`quad_order`); blocksize: inputs per lazy update, rounded up to whole quads.
    """
    k = w.shape[0]
    work = w.clone() if order is None else w[order]
    u, costs = factor.u, pair_costs(factor.u)
    diagonal = u.diagonal().tolist()
    width = -(-blocksize // QUAD) * QUAD
    for start in range(0, k, width):
        stop = min(start + width, k)
        errors = torch.empty(stop - start, w.shape[1], device=w.device)
        for i in range(start, stop):
            if i % QUAD == 0:
                stays = choose_pairs(work[i : i + QUAD], costs[i // QUAD])
            error = torch.where(stays[i % QUAD], 0.0, work[i]) / diagonal[i]
            work[i] = torch.where(stays[i % QUAD], work[i], 0.0)
            errors[i - start] = error
            if i + 1 < stop:
                work[i + 1 : stop].addr_(u[i, i + 1 : stop], error, alpha=-1)
        if stop < k:
            work[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return work if order is None else work[torch.argsort(order)]
