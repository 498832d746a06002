"""Second-order statistics of a linear layer's inputs, and the factor the solver needs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_kernel.errors import NumericalError

from . import products
from .distributed import Workers

log = logging.getLogger(__name__)

# Width of a stripe of H: only stripes on or above the diagonal are computed. Narrow stripes save
# more of the lower triangle, wide ones fill the GPU's multiprocessors.
_STRIPE = 192
_STRIPE_GPU = 1024
_MAX_RETRIES = 16
_LEAF, _LEAF_GPU = 512, 256  # triangles of this size are inverted by the library
_STEP, _STEP_GPU = 256, 1024  # rows or columns of a triangle multiplied at once, at least
_BATCHED, _BATCHED_GPU = 0, 2048  # corners up to this size are multiplied together
_SHARED = 4096  # corners of this size are divided among processes
_BY_PANELS = 16384  # matrices of this size are factored panel by panel
_PANEL = 1024  # columns of a panel
_HALF = (torch.float16, torch.bfloat16)


def _accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``into += 2 aᵀ b``, in place; into: float32 [P, Q], a: [tokens, P], b: [tokens, Q].

    Half-precision operands on a GPU are multiplied on tensor cores: products are exact, sums are
    float32. Otherwise operands are float32.
    """
    if a.is_cuda and a.dtype in _HALF:
        torch.addmm(into, a.T, b, out_dtype=torch.float32, alpha=2, out=into)
    else:
        into.addmm_(a.T, b, alpha=2)


class Hessian:
    """Accumulates ``H = 2 X Xᵀ`` over tokens and, given targets, what asymmetric calibration needs.

    X: what the quantized model feeds this layer; X̃: what the full-precision model feeds it. Sums
    are float32; only the upper triangle of H is accumulated until `matrix` mirrors it. `shift` is
    ``2 (X̃ - X) Xᵀ`` [K, K]; `lack` is ``2 D Xᵀ`` [N, K] with D what the layer's outputs lack.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.k = k
        self.tokens = 0
        self._sum = torch.zeros(k, k, device=device)
        self.shift: Tensor | None = None
        self.lack: Tensor | None = None

    def add(self, x: Tensor, delta: Tensor | None = None, lack: Tensor | None = None) -> None:
        """x, delta = X̃ - X: [tokens, K]; lack = D: [tokens, N]; any float dtype."""
        if not (x.is_cuda and x.dtype in _HALF):
            x = x.float()
        x = x.reshape(-1, self.k)
        self.tokens += x.shape[0]
        stripe = _STRIPE_GPU if x.is_cuda else _STRIPE
        for start in range(0, self.k, stripe):
            stop = min(start + stripe, self.k)
            _accumulate(self._sum[start:stop, start:], x[:, start:stop], x[:, start:])
        if delta is not None:
            if self.shift is None:
                self.shift = torch.zeros(self.k, self.k, device=x.device)
            _accumulate(self.shift, delta.reshape(-1, self.k).to(x.dtype), x)
        if lack is not None:
            lack = lack.reshape(x.shape[0], -1).to(x.dtype)
            if self.lack is None:
                self.lack = torch.zeros(lack.shape[1], self.k, device=x.device)
            _accumulate(self.lack, lack, x)

    def matrix(self) -> Tensor:
        """float32 [K, K], symmetric, summed over tokens. A view: `add` changes it."""
        for start in range(0, self.k, _STRIPE):
            stop = min(start + _STRIPE, self.k)
            block = self._sum[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
        return self._sum

    def sums(self) -> Iterator[Tensor]:
        """All accumulated matrices, to be added up over processes in place."""
        yield from (t for t in (self._sum, self.shift, self.lack) if t is not None)

    def finite(self) -> bool:
        """Whether no NaN or Inf came in (the diagonal sees every input)."""
        return bool(torch.isfinite(self._sum.diagonal()).all())


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor, not empty, holds neither NaN nor Inf; reads it once."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # NaN wins over all others


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


def invert_upper(r: Tensor, workers: Workers | None = None) -> Tensor:
    """Inverse of an upper triangular float32 [K, K], with a third of the work of K solves.

    Blocks on the diagonal are inverted together; then, from small to large, the inverse of
    [[A, B], [0, C]] is [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]]. A GPU multiplies small corners of one size
    together; large ones are divided among `workers`, all of which must call this with the same `r`.
    """
    k = r.shape[0]
    u = torch.zeros(r.shape, device=r.device)
    leaf, batched = (_LEAF_GPU, _BATCHED_GPU) if r.is_cuda else (_LEAF, _BATCHED)
    blocks = _diagonal(r, leaf).contiguous()
    if len(blocks):
        eye = torch.eye(leaf, device=r.device).expand(blocks.shape)
        _diagonal(u, leaf).copy_(torch.linalg.solve_triangular(blocks, eye, upper=True))
    if k % leaf:
        rest = slice(k - k % leaf, k)
        eye = torch.eye(k % leaf, device=r.device)
        u[rest, rest] = torch.linalg.solve_triangular(r[rest, rest], eye, upper=True)
    size = leaf
    while size < k:
        begin = 0
        if size <= batched and k >= 2 * size:
            pairs = _diagonal(u, 2 * size)
            b = _diagonal(r, 2 * size)[:, :size, size:]
            product = products.multiply(pairs[:, :size, :size], b)
            product = products.multiply(product, pairs[:, size:, size:])
            torch.neg(product, out=pairs[:, :size, size:])
            begin = k - k % (2 * size)
        for start in range(begin, k - size, 2 * size):
            middle, end = start + size, min(start + 2 * size, k)
            upper, lower = u[start:middle, start:middle], u[middle:end, middle:end]
            corner, b = u[start:middle, middle:end], r[start:middle, middle:end]
            if workers is None or workers.count == 1 or size < _SHARED:
                corner.copy_(_corner(upper, b, lower, [slice(0, end - middle)]))
            else:
                _shared_corner(corner, upper, b, lower, workers)
        size *= 2
    return u


def _diagonal(a: Tensor, size: int) -> Tensor:
    """The whole blocks [size, size] on the diagonal of a [K, K]: a view [K // size, size, size]."""
    row, column = a.stride()
    strides = (size * (row + column), row, column)
    return a.as_strided((a.shape[0] // size, size, size), strides, a.storage_offset())


def _corner(a: Tensor, b: Tensor, c: Tensor, parts: list[slice]) -> Tensor:
    """These columns, side by side, of -A B C, with upper triangular A and C: their zeros are left
    out. parts: in ascending order."""
    step = _STEP_GPU if a.is_cuda else _STEP
    height, width = max(step, a.shape[0] // 8), max(step, c.shape[0] // 8)
    product = b.new_empty(b.shape[0], sum(part.stop - part.start for part in parts))
    operand, done = products.split(b[:, : parts[-1].stop]), 0
    for part in parts:
        for left in range(part.start, part.stop, width):
            right = min(left + width, part.stop)
            out = product[:, done : done + right - left]
            products.multiply(operand[:, :right], c[:right, left:right], out=out)
            done += right - left
    operand = products.split(product)
    result = torch.empty_like(product)
    for top in range(0, a.shape[0], height):
        rows = slice(top, top + height)
        products.multiply(a[rows, top:], operand[top:], out=result[rows])
    return result.neg_()


def _shared_corner(corner: Tensor, a: Tensor, b: Tensor, c: Tensor, workers: Workers) -> None:
    """``corner = -A B C`` by all processes. Later columns take more work, as C is triangular: each
    process gets some from the left and as many from the right."""
    size, count = c.shape[0], workers.count
    width = -(-size // (2 * count))
    stops = [min(i * width, size) for i in range(2 * count + 1)]
    parts = [slice(*ends) for ends in itertools.pairwise(stops)]
    pairs = [[parts[i], parts[-1 - i]] for i in range(count)]
    lengths = [part.stop - part.start for part in pairs[workers.rank]]
    found = _corner(a, b, c, pairs[workers.rank]).split(lengths, 1)
    own = b.new_zeros(2, b.shape[0], width)  # equal shapes for all
    for columns, place in zip(found, own, strict=True):
        place[:, : columns.shape[1]] = columns
    for pair, values in zip(pairs, workers.stack(own), strict=True):
        for part, columns in zip(pair, values, strict=True):
            corner[:, part] = columns[:, : part.stop - part.start]


def _cholesky(a: Tensor, workers: Workers | None) -> tuple[Tensor, bool]:
    """Lower triangular L with a = L Lᵀ, and whether `a` [K, K], which is used up, was positive
    definite. `workers`, which all hold the same `a`, get the same result."""
    workers = workers or Workers()
    panels = workers.count > 1 or products.on_tensor_cores(a)  # else the library is faster
    if not panels or a.shape[0] < _BY_PANELS:
        lower, info = torch.linalg.cholesky_ex(a)
        return lower, int(info) == 0
    _cholesky_by_panels(a, workers)
    return a, bool(torch.isfinite(a.diagonal()).all())


def _cholesky_by_panels(a: Tensor, workers: Workers) -> None:
    """Cholesky factor of a [K, K] in place, with NaN on its diagonal if there is none.

    Right-looking, in panels of columns that belong to the processes in turn: the owner of a panel
    factors it and sends it to all, and each process takes its product off its own later columns.
    The next owner does that for the next panel first, so that it travels beside the other products.
    All products are split ones (products.py), which on tensor cores are faster than a solve.
    """
    k = a.shape[0]
    panels = [slice(start, min(start + _PANEL, k)) for start in range(0, k, _PANEL)]

    def own(j: int) -> bool:
        return j % workers.count == workers.rank

    def update(c: int, j: int, panel: products.Operand) -> None:
        start, stop = panels[c].start - panels[j].start, panels[c].stop - panels[j].start
        out = a[panels[c].start :, panels[c]]
        products.accumulate(out, panel[start:], panel[start:stop].T, alpha=-1)

    def send(j: int) -> tuple[Tensor, Callable[[], None]]:
        """Factor panel j, if it is this process's, and start to send or to receive it."""
        columns, below = panels[j], slice(panels[j].stop, k)
        panel = torch.empty(k - columns.start, columns.stop - columns.start, device=a.device)
        if own(j):
            lower, info = torch.linalg.cholesky_ex(a[columns, columns])
            lower.masked_fill_(info != 0, torch.nan)
            width = lower.shape[0]
            panel[:width] = lower
            products.multiply(a[below, columns], invert_upper(lower.T), out=panel[width:])
        return panel, workers.broadcast(panel, j % workers.count)

    panel, arrive = send(0)
    for j, columns in enumerate(panels):
        arrive()
        a[columns.start :, columns] = panel
        operand = products.split(panel)
        if j + 1 < len(panels):
            if own(j + 1):
                update(j + 1, j, operand)
            panel, arrive = send(j + 1)
        for c in range(j + 2, len(panels)):
            if own(c):
                update(c, j, operand)
    a.tril_()


def factorize(
    h: Tensor, percdamp: float, name: str = "layer", workers: Workers | None = None
) -> Factor:
    """Factor the damped Hessian; `workers`, which hold the same, share the work.

    h: float32 [K, K], symmetric, with a positive diagonal. One Cholesky of the matrix with reversed
    order gives R with H = R Rᵀ, R upper triangular; inverting the triangle gives the U of GPTQ's
    H**-1 = Uᵀ U with half the work of Cholesky + inverse + Cholesky.
    If the factorization fails the damping is doubled (from at least 1e-4) and that is logged.
    Raises NumericalError if H is not finite, or _MAX_RETRIES doublings do not suffice.
    """
    if not is_finite(h):
        raise NumericalError(
            f"{name}: the Hessian holds NaN or Inf: the activations of the calibration text "
            "overflowed; use --dtype bfloat16 or float32"
        )
    mean = float(h.diagonal().mean())
    damping = percdamp
    for retry in range(_MAX_RETRIES):
        reversed_h = h.flip(0, 1)
        reversed_h.diagonal().add_(damping * mean)
        lower, definite = _cholesky(reversed_h, workers)
        del reversed_h  # matrices of K = 28672 have 3 GiB each
        if definite:
            r = lower.flip(0, 1).contiguous()
            del lower
            u = invert_upper(r, workers)
            if bool(torch.isfinite(u.diagonal()).all()) and bool(torch.isfinite(u.sum())):
                return Factor(r, u, damping, retry)
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
