"""Float32 matrix products at the speed of a GPU's tensor cores.

The data-center GPUs multiply TF32 operands (float32 with 11 bits of precision) six to eight times
as fast as float32 ones. A float32 number is the sum of two TF32 numbers but for 2**-22 of it::

    a = a₁ + a₂     a b ≈ a₂ b₁ + a₁ b₂ + a₁ b₁

so that three such products are as good as one of float32, whose sums round more than that, in less
than half of its time; two suffice if one operand has 11 bits anyway. Ozaki et al., "Error-free
transformations of matrix multiplication" (2012); Ootomo and Yokota, "Recovering single precision
accuracy from Tensor Cores" (2022). Elsewhere, and on GPUs whose tensor cores are no faster than
that, the functions here are the plain products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FAST = {(8, 0), (9, 0), (10, 0), (10, 3)}  # compute capabilities: TF32 at least 6 times as fast
_ROWS = 4096  # of a left operand that are split at once
_SHORT = 256  # inner dimension up to which the terms are one product: the result is written once
_CHAIN = 1024  # terms of a sum on the tensor cores, which cut sums where float32 rounds them
_DROPPED = 13  # bits of a float32 mantissa that TF32 lacks


@dataclass(frozen=True)
class Split:
    """A float32 matrix as the sum of two whose entries are TF32 numbers, the second one nearly.

    tail: None if it is zero. `[]` takes parts of both.
    """

    head: Tensor
    tail: Tensor | None

    def __getitem__(self, key: Any) -> Split:
        return Split(self.head[key], None if self.tail is None else self.tail[key])

    @property
    def shape(self) -> torch.Size:
        return self.head.shape

    @property
    def T(self) -> Split:  # noqa: N802 (as of a tensor)
        return Split(self.head.T, None if self.tail is None else self.tail.T)


Operand = Tensor | Split


def split(a: Tensor, short: bool = False) -> Operand:
    """`a`, float32 [..., P, Q] with strides of any order, ready for several products.

    short: its entries have at most 11 bits, as integers up to 2048 do.
    """
    if not _on_tensor_cores(a.device):
        return a
    if short:
        return Split(a, None)
    half, kept = 1 << (_DROPPED - 1), -1 << _DROPPED
    head = a.view(torch.int32).add(half).bitwise_and_(kept).view(torch.float32)
    return Split(head, a - head)


def put(operand: Operand, rows: slice, values: Tensor) -> None:
    """``operand[rows] = values``; values: float32."""
    if isinstance(operand, Tensor):
        operand[rows] = values
        return
    part = split(values)
    operand.head[rows], operand.tail[rows] = part.head, part.tail


def multiply(a: Operand, b: Operand, out: Tensor | None = None) -> Tensor:
    """``a b`` as float32 [P, R]; a: float32 [P, Q], b: float32 [Q, R], or what `split` made.

    All may have one dimension more in front. out: where to put it, instead of a new tensor.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not _on_tensor_cores(a.device):
        return torch.matmul(a, b, out=out)
    if out is None:
        out = torch.empty(*a.shape[:-1], b.shape[-1], device=_device(a))
    return _products(out, a, b, 1.0, add=False)


def accumulate(out: Tensor, a: Operand, b: Operand, alpha: float = 1.0) -> None:
    """``out += alpha a b`` in place; out: float32 [P, R]; a, b as in `multiply`."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not _on_tensor_cores(a.device):
        out.addmm_(a, b, alpha=alpha)
    else:
        _products(out, a, b, alpha, add=True)


def upper_times(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` for upper triangular a [K, K] and b [K, R]; the zeros are left out, by stripes."""
    b = split(b)
    width = _stripe(a)
    parts = [multiply(a[i : i + width, i:], b[i:]) for i in range(0, a.shape[0], width)]
    return torch.cat(parts)


def transposed_upper_times(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b`` for upper triangular a [K, K] and b [K, R]; the zeros are left out, by stripes."""
    b = split(b)
    width = _stripe(a)
    starts = range(0, a.shape[0], width)
    return torch.cat([multiply(a[: i + width, i : i + width].T, b[: i + width]) for i in starts])


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Inside, float32 products on a GPU keep 11 bits of their operands."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def on_tensor_cores(like: Tensor) -> bool:
    """Whether float32 products of tensors on the device of `like` run on its tensor cores."""
    return _on_tensor_cores(like.device)


@functools.cache
def _on_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST


def _device(a: Operand) -> torch.device:
    return a.device if isinstance(a, Tensor) else a.head.device


def _stripe(a: Tensor) -> int:
    return max(a.shape[0] // 8, 512)


def _products(out: Tensor, a: Operand, b: Operand, alpha: float, add: bool) -> Tensor:
    b = split(b) if isinstance(b, Tensor) else b
    count, inner = a.shape[-2:]
    step = _ROWS if isinstance(a, Tensor) else max(count, 1)
    for start in range(0, count, step):
        rows = (..., slice(start, start + step), slice(None))
        part = split(a[rows]) if isinstance(a, Tensor) else a[rows]
        terms = [(part.head, b.head)]  # the largest last: it is rounded least
        if b.tail is not None:
            terms.insert(0, (part.head, b.tail))
        if part.tail is not None:
            terms.insert(0, (part.tail, b.head))
        if len(terms) > 1 and inner <= _SHORT:
            lefts, rights = zip(*terms, strict=True)
            terms = [(torch.cat(lefts, -1), torch.cat(rights, -2))]
        for i, (left, right) in enumerate(terms):
            for first in range(0, max(left.shape[-1], 1), _CHAIN):
                chain = slice(first, first + _CHAIN)
                more = add or i > 0 or first > 0
                _tf32_product(out[rows], left[..., chain], right[..., chain, :], alpha, more)
    return out


def _tf32_product(out: Tensor, a: Tensor, b: Tensor, alpha: float, add: bool) -> None:
    """``out = alpha a b``, or plus `out`; the tensor cores cut operands to 11 bits."""
    multiply = out.baddbmm_ if out.ndim == 3 else out.addmm_
    with tf32():
        multiply(a, b, beta=1.0 if add else 0.0, alpha=alpha)
