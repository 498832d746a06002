"""The operator `torch.ops.marlin_kernel.gemm` and the original Marlin entry point `mul`.

The operator has a fake implementation, so that torch.compile traces through it. Activations
and bias have gradients, packed weights have none (`gradient`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import backends, dense, formats, gradient, reference
from .errors import ConfigError
from .formats import LayerSpec
from .sm90_layout import Sizes, sizes_of
from .weight_types import weight_type as lookup

_SCHEMA = (
    "gemm(Tensor a, Tensor weights, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
    "int k, int n, int group_size, str weight_type, str layout, bool batch_invariant, "
    "Tensor? global_scale=None, str activation='', bool reduce_half=False) -> Tensor"
)
_KERNEL_LAYOUTS = ("sm80", "sm90", *backends.EIGHT_BIT_LAYOUTS)
_KERNEL_ACTIVATIONS = (torch.float16, torch.bfloat16)
_ACTIVATIONS = (*_KERNEL_ACTIVATIONS, torch.float32)
ACTIVATION_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


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
    global_scale: Tensor | None = None,
    activation: str = "",
    reduce_half: bool = False,
) -> Tensor:
    if layout == "sm90":
        sizes = sizes_of(k, n, weights.shape, scales.shape, group_size, weight_type)
        tensors = (a, weights, scales, perm, bias, global_scale)
        return multiply_sm90(*tensors, sizes, batch_invariant)
    check_activations(a, weights, k)
    rows = a if a.dim() == 2 else a.reshape(-1, k)
    if perm is not None and layout not in _KERNEL_LAYOUTS:
        rows = rows.index_select(1, perm)
    if rows.shape[0] == 0:
        out = rows.new_empty(0, n)
    elif layout == "sm80":
        tensors = (weights, scales, zeros, perm, global_scale, bias)
        features = (weight_type, activation, batch_invariant, reduce_half)
        out = _run_sm80(rows, *tensors, n, group_size, *features)
    elif layout in backends.EIGHT_BIT_LAYOUTS:
        out = _run_8bit(
            *(rows, weights, scales, bias, n, group_size, weight_type, layout, batch_invariant)
        )
    else:
        wtype = lookup(weight_type)
        if layout == "marlin":
            natural = (weights, scales, zeros, k, n, wtype, global_scale)
            weights, scales, zeros = backends.natural(*natural)
        if activation:  # as the kernels round them, in float32
            codes, factors = reference.quantize_activations(rows, ACTIVATION_DTYPES[activation])
            rounded = codes.float() * factors[:, None]
            out = dense.multiply(rounded, weights, scales, zeros, bias, group_size, wtype)
            out = out.to(rows.dtype)
        else:
            out = dense.multiply(rows, weights, scales, zeros, bias, group_size, wtype)
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
    global_scale: Tensor | None = None,
    activation: str = "",
    reduce_half: bool = False,
) -> Tensor:
    check_activations(a, weights, k)
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
for one group (kernel layouts: that of backends.Prepared); batch_invariant: a row's result must not
depend on the other rows (kernel layouts); global_scale: float32 [1] of types that have one;
activation: "", "int8" or "float8_e4m3fn": `a` is rounded to 8 bits with one scale per token;
reduce_half: blocks of the sm80 kernel may exchange sums in fp16 (`a` float16). Returns a new tensor
of the dtype of `a`, accumulated in float32.
"""
gradient.register(_library, gemm)


def eager_gemm(a: Tensor, bias: Tensor | None, layout: str) -> Callable[..., Tensor]:
    """What a layer calls for activations `a`: `gemm`, or its implementation if nothing looks on."""
    return _gemm if layout in _KERNEL_LAYOUTS and nothing_looks_on(a, bias) else gemm


def nothing_looks_on(a: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel may be called for activations `a` without the dispatcher, which takes longer
    than the rest of a call: nothing traces, wraps or differentiates the call.
    """
    return (
        not torch.compiler.is_compiling()
        and type(a) is Tensor
        and a.is_cuda
        and not a.requires_grad
        and (bias is None or not bias.requires_grad or not torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def check_activations(a: Tensor, weights: Tensor, k: int) -> None:
    """Raise ConfigError unless `a` is a batch of k inputs that `weights` can be multiplied with."""
    if a.dtype not in _ACTIVATIONS:
        raise ConfigError(f"activations have dtype {a.dtype}; use one of {_ACTIVATIONS}")
    if a.shape[-1:] != (k,):
        raise ConfigError(f"activations of shape {list(a.shape)} do not end in the {k} inputs")
    if a.device != weights.device:
        raise ConfigError(
            f"activations are on {a.device}, the weights on {weights.device}; move one of them"
        )


def _kernel_rows(rows: Tensor, layout: str) -> Tensor:
    """Activations [M, K], or contiguous ones, as the kernels read them, or ConfigError."""
    if rows.dtype not in _KERNEL_ACTIVATIONS:
        raise ConfigError(
            f"the {layout} kernels do not take activations of {rows.dtype}; convert them to "
            "float16 or bfloat16, or call the layer's prepare() with this dtype"
        )
    return rows if rows.is_contiguous() or rows.stride(1) == 1 else rows.contiguous()


def _run_sm80(
    rows: Tensor,
    weights: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    group_size: int,
    weight_type: str,
    activation: str,
    batch_invariant: bool,
    reduce_half: bool,
) -> Tensor:
    rows = _kernel_rows(rows, "sm80")
    path = backends.kernels("sm80")
    out = rows.new_empty(rows.shape[0], n)
    if bias is not None and bias.dtype != rows.dtype:
        bias = bias.to(rows.dtype)
    k_padded, token_scales = weights.shape[0] * 16, None
    if activation:
        dtype = ACTIVATION_DTYPES[activation]
        rows, token_scales = path.quantize_activations(rows, dtype, k_padded)
    path.gemm(
        *(rows, weights, scales, bias, out, rows.shape[1], n),
        *(k_padded, scales.shape[1], group_size),
        weight_type=weight_type,
        zeros=zeros,
        perm=perm,
        token_scales=token_scales,
        global_scale=global_scale,
        batch_invariant=batch_invariant,
        reduce_half=reduce_half,
    )
    return out


def _run_8bit(
    rows: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    group_size: int,
    weight_type: str,
    layout: str,
    batch_invariant: bool,
) -> Tensor:
    rows = _kernel_rows(rows, layout)
    path, quantize = backends.kernels(layout), backends.kernels("sm80").quantize_activations
    activation = backends.EIGHT_BIT_LAYOUTS[layout]
    out = rows.new_empty(rows.shape[0], n)
    if bias is not None and bias.dtype != rows.dtype:
        bias = bias.to(rows.dtype)
    codes, token_scales = quantize(
        rows, ACTIVATION_DTYPES[activation], -(-rows.shape[1] // 16) * 16
    )
    grouped = scales.numel() == 1
    types = path.types(weight_type, activation, rows.dtype, group_size if grouped else 0)
    path.gemm(codes, token_scales, weights, scales, bias, out, types, batch_invariant)
    return out


def multiply_sm90(
    a: Tensor,
    weights: Tensor,
    scales: Tensor,
    perm: Tensor | None,
    bias: Tensor | None,
    global_scale: Tensor | None,
    sizes: Sizes,
    batch_invariant: bool,
) -> Tensor:
    """`gemm` with weights in the layout "sm90", in few steps: the host time of a call counts.

    sizes: of sm90_layout.sizes_of; the rest as of `gemm`.
    """
    shape, dtype, index = a.shape, a.dtype, a.get_device()
    known = dtype in _KERNEL_ACTIVATIONS and shape[-1:] == sizes[:1]
    if not known or index != weights.get_device():
        check_activations(a, weights, sizes.k)
        _kernel_rows(a, "sm90")
    rows = a
    if not a.is_contiguous():
        rows = _kernel_rows(a if a.dim() == 2 else a.reshape(-1, sizes.k), "sm90")
    out = a.new_empty(*shape[:-1], sizes.n)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if out.numel() > 0:
        m = out.numel() // sizes.n
        kernels = backends.kernels("sm90")
        product = kernels.product(m, sizes, dtype, index, batch_invariant, perm is not None)
        product.multiply(rows, weights, scales, bias, out, global_scale, perm)
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
    *,
    weight_type: str = "uint4b8",
    z: Tensor | None = None,
    g_idx: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> None:
    """``C = A @ dequantize(B, s)`` with the arguments of the original Marlin, for every type.

    A: float16 or bfloat16 [M, K]; B: int32 [K / 16, N * bits / 2], codes in Marlin order; C:
    [M, N], overwritten; s: scales [G, N] in Marlin's column order, one group if G == 1; z, g_idx,
    global_scale: as in FORMAT.md, where the type or act-order has them. workspace, thread_k,
    thread_n, sms, max_par: accepted and not needed; workspace is left as it is.
    Raises ConfigError naming the tensor whose shape, dtype or device does not fit.
    """
    k, n, wtype = A.shape[-1], C.shape[-1], lookup(weight_type)
    groups = s.shape[0] if s.dim() == 2 else 0
    width = n * wtype.bits // 2
    fitting = groups > 0 and k % 64 == n % 64 == k % groups == 0
    if not fitting or B.shape != (k // 16, width) or s.shape[1] != n:
        raise ConfigError(
            f"A {list(A.shape)}, B {list(B.shape)}, C {list(C.shape)} and s {list(s.shape)} do not "
            f"belong together: B is [K / 16, {wtype.bits // 2} N], s is [K / group_size, N], K and "
            "N are multiples of 64"
        )
    if C.shape[:-1] != A.shape[:-1] or C.dtype != A.dtype:
        raise ConfigError(
            f"C is {C.dtype} {list(C.shape)}, A is {A.dtype} {list(A.shape)}; they must share the "
            "dtype and all dimensions but the last"
        )
    spec = LayerSpec(k, n, wtype, k // s.shape[0], act_order=g_idx is not None)
    if (z is None) != wtype.symmetric or (global_scale is None) == wtype.global_scale:
        raise ConfigError(
            f"z and global_scale do not fit {weight_type}: it has "
            f"{'no' if wtype.symmetric else 'its'} zero points and "
            f"{'a' if wtype.global_scale else 'no'} global scale"
        )
    tensors = {"B": B, "s": s, "z": z, "g_idx": g_idx, "global_scale": global_scale}
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    for suffix, (shape, dtype) in _mul_shapes(spec).items():
        given = tensors[suffix]
        if given.shape != shape or given.dtype != dtype:
            raise ConfigError(
                f"{suffix} is {given.dtype} {list(given.shape)}; {weight_type} [{k}, {n}] in "
                f"{groups} groups has {dtype} {list(shape)}"
            )
    for name, tensor in (("C", C), *tensors.items()):
        if tensor.device != A.device:
            raise ConfigError(f"{name} is on {tensor.device}, A on {A.device}; move one of them")
    layout = backends.select_backend(A.device, spec, A.dtype).layout
    if layout == "codes":  # would unpack on every call what a Layer unpacks once
        layout = "marlin"
    held = _converted(layout, tensors, spec, A.dtype)
    arguments = (held.weights, held.scales, held.zeros, held.perm, None, k, n)
    group_size = spec.group_size if held.group_size is None else held.group_size
    C.copy_(gemm(A, *arguments, group_size, weight_type, layout, False, global_scale))


@functools.cache
def _mul_shapes(spec: LayerSpec) -> dict[str, formats.Stored]:
    return formats.tensor_shapes("marlin", spec)


_conversions: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _converted(
    layout: str, tensors: dict[str, Tensor], spec: LayerSpec, dtype: torch.dtype
) -> backends.Prepared:
    """Weights of `mul` in a kernel's layout, converted once per `B` and kept as long as it lives.

    `Layer.prepare` needs no such copy.
    """
    if layout == "marlin":
        return backends.prepare(layout, tensors, spec, dtype)
    B = tensors["B"]
    rest = tuple((x, t.data_ptr(), t._version) for x, t in tensors.items() if x != "B")
    key = (layout, dtype, spec, B._version, rest)
    found = _conversions.get(B)
    if found is None or found[0] != key:
        found = _conversions[B] = (key, backends.prepare(layout, tensors, spec, dtype))
    return found[1]
