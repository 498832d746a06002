"""Second-order statistics of a linear layer's inputs, and the factor the solver needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_kernel.errors import NumericalError

log = logging.getLogger(__name__)

_STRIPE = 384  # width of a stripe of H: only stripes on or above the diagonal are computed
_MAX_RETRIES = 16


class Hessian:
    """Accumulates ``H = 2 X Xᵀ`` over tokens and, given targets, what asymmetric calibration needs.

    X: what the quantized model feeds this layer; X̃: what the full-precision model feeds it. All in
    float32; only the upper triangle of H is accumulated, `matrix` mirrors it. `shift` is
    ``2 (X̃ - X) Xᵀ`` [K, K]; `residual` is ``2 (R̃ - R) Xᵀ`` [N, K] for a layer that is added to
    the residual stream R.
    """

    def __init__(self, k: int, device: torch.device, *, asymmetric: bool = False) -> None:
        self.k = k
        self.tokens = 0
        self._upper = torch.zeros(k, k, device=device)
        self.shift = torch.zeros(k, k, device=device) if asymmetric else None
        self.residual: Tensor | None = None

    def add(self, x: Tensor, target: Tensor | None = None, residual: Tensor | None = None) -> None:
        """x, target: [tokens, K]; residual: R̃ - R, [tokens, N]; any float dtype."""
        x = x.reshape(-1, self.k).float()
        self.tokens += x.shape[0]
        for start in range(0, self.k, _STRIPE):
            stop = min(start + _STRIPE, self.k)
            self._upper[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:], alpha=2)
        if self.shift is not None and target is not None:
            delta = target.reshape(-1, self.k).float() - x
            self.shift.addmm_(delta.T, x, alpha=2)
        if residual is not None:
            residual = residual.reshape(x.shape[0], -1).float()
            if self.residual is None:
                self.residual = torch.zeros(residual.shape[1], self.k, device=x.device)
            self.residual.addmm_(residual.T, x, alpha=2)

    def matrix(self) -> Tensor:
        """float32 [K, K], symmetric, summed over tokens."""
        upper = self._upper.triu()
        return upper + upper.triu(1).T

    def finite(self) -> bool:
        """Whether no NaN or Inf came in (the diagonal sees every input)."""
        return bool(torch.isfinite(self._upper.diagonal()).all())


@dataclass(frozen=True)
class Factor:
    """``H + damping * mean(diag H) * I = R Rᵀ``.

    r: float32 [K, K] upper triangular; u = r**-1, upper triangular, so that H**-1 = uᵀ u.
    damping: the relative damping that was needed; retries: how often it had to be raised.
    """

    r: Tensor
    u: Tensor
    damping: float
    retries: int


def factorize(h: Tensor, percdamp: float, name: str = "layer") -> Factor:
    """Factor the damped Hessian.

    h: float32 [K, K], symmetric, with a positive diagonal. One Cholesky of the matrix with reversed
    order gives R with H = R Rᵀ, R upper triangular; inverting the triangle gives the U of GPTQ's
    H**-1 = Uᵀ U with half the work of Cholesky + inverse + Cholesky.
    If the factorization fails the damping is doubled (from at least 1e-4) and that is logged.
    Raises NumericalError if H is not finite, or _MAX_RETRIES doublings do not suffice.
    """
    if not bool(torch.isfinite(h).all()):
        raise NumericalError(
            f"{name}: the Hessian holds NaN or Inf: the activations of the calibration text "
            "overflowed; use --dtype bfloat16 or float32"
        )
    mean = float(h.diagonal().mean())
    damping = percdamp
    for retry in range(_MAX_RETRIES):
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            r = lower.flip(0, 1)
            eye = torch.eye(h.shape[0], device=h.device)
            u = torch.linalg.solve_triangular(r, eye, upper=True)
            if bool(torch.isfinite(u).all()):
                return Factor(r.contiguous(), u.contiguous(), damping, retry)
        raised = max(damping * 2, 1e-4)
        log.warning(
            "%s: Hessian not positive definite with damping %.2g; raised to %.2g",
            name,
            damping,
            raised,
        )
        damping = raised
    raise NumericalError(
        f"{name}: the Hessian cannot be factorized even with damping {damping:.2g}; "
        "calibrate with more tokens (--nsamples) or check the checkpoint's weights"
    )
