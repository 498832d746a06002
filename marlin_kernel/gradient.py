"""Gradients of products with packed weights: to train adapters (LoRA) on a frozen packed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROWS = 1024  # of the weights that are dequantized at once


def register(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Give an operator ``op(a, ..., bias, k, ...) = a @ W + bias`` gradients of `a` and `bias`.

    Packed weights have none. Where the operator rounds `a` to 8 bits, the gradient is that of the
    product without rounding (straight through).
    """
    names = [argument.name for argument in op._schema.arguments]
    bias, k = names.index("bias"), names.index("k")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs[1:]))
        ctx.settings = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [None, *ctx.saved_tensors]
        given = [s if t is None else t for t, s in zip(tensors, ctx.settings, strict=True)]
        added, given[bias] = given[bias], None
        grads: list[Tensor | None] = [None] * len(names)
        if ctx.needs_input_grad[0]:
            grads[0] = input_gradient(grad, given[k], lambda rows: op(rows, *given[1:]))
        if ctx.needs_input_grad[bias]:
            grads[bias] = grad.reshape(-1, grad.shape[-1]).sum(0).to(added.dtype)
        return tuple(grads)

    name = op.name().removesuffix(".default")
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


def input_gradient(grad: Tensor, k: int, times_weights: Callable[[Tensor], Tensor]) -> Tensor:
    """``grad @ Wᵀ`` [..., k] for grad [..., n], where times_weights(rows) is ``rows @ W``.

    The weights come from the product itself, of rows of the identity matrix: so they are those of
    whatever layout it reads, rounded to the dtype of `grad`, at most 1024 of their k rows at once.
    """
    parts = []
    for start in range(0, k, _ROWS):
        rows = grad.new_zeros(min(_ROWS, k - start), k)
        rows.diagonal(start).fill_(1)
        parts.append(grad @ times_weights(rows).T)
    return torch.cat(parts, -1)
