"""The operator `torch.ops.marlin_kernel.gemm` and the original Marlin entry point `mul`.

The operator has a fake implementation, so that torch.compile traces through it. It has no gradient:
packed layers are for inference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import backends, dense
from .errors import ConfigError
from .formats import LayerSpec
from .layout import packed_shape
from .weight_types import weight_type as lookup

_SCHEMA = (
    "gemm(Tensor a, Tensor weights, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
    "int k, int n, int group_size, str weight_type, str layout, bool batch_invariant) -> Tensor"
)
_KERNEL_LAYOUTS = ("sm80", "sm90")
_KERNEL_ACTIVATIONS = (torch.float16, torch.bfloat16)
_ACTIVATIONS = (*_KERNEL_ACTIVATIONS, torch.float32)


def _gemm(
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    group_size: int,
    weight_type: str,
    layout: str,
    batch_invariant: bool,
) -> Tensor:
    _check_activations(a, weights, k)
    rows = a if a.dim() == 2 else a.reshape(-1, k)
    if perm is not None:
        rows = rows.index_select(1, perm)
    if rows.shape[0] == 0:
        out = rows.new_empty(0, n)
    elif layout in _KERNEL_LAYOUTS:
        out = _run_kernel(rows, weights, scales, bias, k, n, group_size, layout, batch_invariant)
    else:
        if layout == "marlin":
            wtype = lookup(weight_type)
            weights, scales, zeros = backends.natural(weights, scales, zeros, k, n, wtype)
        out = dense.multiply(rows, weights, scales, zeros, bias, group_size, lookup(weight_type))
    return out if a.dim() == 2 else out.view(*a.shape[:-1], n)


def _gemm_fake(
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    group_size: int,
    weight_type: str,
    layout: str,
    batch_invariant: bool,
) -> Tensor:
    _check_activations(a, weights, k)
    return a.new_empty(*a.shape[:-1], n)


_library = torch.library.Library("marlin_kernel", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
_library.impl("gemm", _gemm, "CPU")
_library.impl("gemm", _gemm, "CUDA")
torch.library.register_fake("marlin_kernel::gemm", _gemm_fake, lib=_library)

gemm = torch.ops.marlin_kernel.gemm.default
"""``out[..., n] = a[..., k] @ W[k, n] + bias`` for a layer in a layout of `backends`.

a: float16, bfloat16 or float32 [..., k], any strides; weights, scales, zeros, perm: the tensors of
backends.Prepared; bias: [n] or None; k, n: sizes without padding; group_size: inputs per scale, k
for one group; batch_invariant: a row's result must not depend on the other rows (kernel layouts).
Returns a new tensor of the dtype of `a`, accumulated in float32.
"""


def eager_gemm(a: Tensor, layout: str) -> Callable[..., Tensor]:
    """What a layer calls for activations `a`: `gemm`, or its implementation if nothing looks on.

    The dispatcher takes longer than the rest of a call. It is needed when something traces, wraps
    or differentiates the call, and for layouts where its time does not matter.
    """
    nothing_looks_on = (
        layout in _KERNEL_LAYOUTS
        and not torch.compiler.is_compiling()
        and type(a) is Tensor
        and a.is_cuda
        and not a.requires_grad
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )
    return _gemm if nothing_looks_on else gemm


def _check_activations(a: Tensor, weights: Tensor, k: int) -> None:
    if a.dtype not in _ACTIVATIONS:
        raise ConfigError(f"activations have dtype {a.dtype}; use one of {_ACTIVATIONS}")
    if a.dim() == 0 or a.shape[-1] != k:
        raise ConfigError(f"activations of shape {list(a.shape)} do not end in the {k} inputs")
    if a.device != weights.device:
        raise ConfigError(
            f"activations are on {a.device}, the weights on {weights.device}; move one of them"
        )


def _run_kernel(
    rows: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    k: int,
    n: int,
    group_size: int,
    layout: str,
    batch_invariant: bool,
) -> Tensor:
    if rows.dtype not in _KERNEL_ACTIVATIONS:
        raise ConfigError(
            f"the {layout} kernels do not take activations of {rows.dtype}; convert them to "
            "float16 or bfloat16, or call the layer's prepare() with this dtype"
        )
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = rows.new_empty(rows.shape[0], n)
    if bias is not None and bias.dtype != rows.dtype:
        bias = bias.to(rows.dtype)
    shape = packed_shape(k, n, group_size)
    backends.kernels(layout).gemm(
        rows,
        weights,
        scales,
        bias,
        out,
        k,
        n,
        shape.k_padded,
        shape.n_padded,
        backends.kernel_group_size(group_size, k),
        batch_invariant=batch_invariant,
    )
    return out


def mul(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor | None = None,
    thread_k: int = -1,
    thread_n: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    """``C = A @ dequantize(B, s)`` with the arguments of the original Marlin.

    A: float16 [M, K]; B: int32 [K / 16, 2 N], symmetric 4-bit codes in Marlin order; C: float16
    [M, N], overwritten; s: float16 [G, N] in Marlin's column order, one group if G == 1. workspace,
    thread_k, thread_n, sms, max_par: accepted and not needed; workspace is left as it is.
    Raises ConfigError if the shapes do not belong together.
    """
    k, n = A.shape[-1], C.shape[-1]
    if B.dim() != 2 or s.dim() != 2 or B.shape != (k // 16, 2 * n) or s.shape[1] != n or k % 64:
        raise ConfigError(
            f"A {list(A.shape)}, B {list(B.shape)}, C {list(C.shape)} and s {list(s.shape)} do not "
            "belong together: B is [K / 16, 2 N], s is [K / group_size, N], K a multiple of 64"
        )
    if C.shape[:-1] != A.shape[:-1] or C.dtype != A.dtype:
        raise ConfigError(
            f"C is {C.dtype} {list(C.shape)}, A is {A.dtype} {list(A.shape)}; they must share the "
            "dtype and all dimensions but the last"
        )
    spec = LayerSpec(k, n, lookup("uint4b8"), k // s.shape[0])
    layout = backends.select_backend(A.device, spec, A.dtype).layout
    if layout == "codes":  # would unpack on every call what a Layer unpacks once
        layout = "marlin"
    B, s = _converted(layout, B, s, spec, A.dtype)
    C.copy_(gemm(A, B, s, None, None, None, k, n, spec.group_size, "uint4b8", layout, False))


_conversions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _converted(
    layout: str, B: Tensor, s: Tensor, spec: LayerSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights of `mul` in a kernel's layout, converted once per `B` and kept as long as it lives.

    `Layer.prepare` needs no such copy.
    """
    if layout == "marlin":
        return B, s
    key = (layout, dtype, B._version, s.data_ptr(), s._version)
    found = _conversions.get(B)
    if found is None or found[0] != key:
        prepared = backends.prepare(layout, {"B": B, "s": s}, spec, dtype)
        found = _conversions[B] = (key, prepared.weights, prepared.scales)
    return found[1:]
