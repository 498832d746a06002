"""Where and in which memory layout a packed layer is computed.

A layout is how the weights of a layer lie in memory while it is used:
    codes   one byte for each code, scales [G, N] in natural order; dequantize and multiply
    marlin  the on-disk tensors; unpack, dequantize and multiply, on any device
    sm80    the kernels of `sm80_path`     (sm80_layout.KernelTensors)
    sm90    the kernels of `launch`        (sm90_layout)
    sm90_int8, sm90_fp8   the kernels of `sm90_8bit_path`, for inputs that are rounded to int8 or
            float8_e4m3fn                  (sm90_8bit_layout.Records)
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import formats, reference, sm80_layout, sm90_layout
from .errors import ConfigError
from .formats import LayerSpec, QuantizedLinear
from .layout import unpermute_columns
from .packing import unpack, unpack_rows
from .sm80_layout import KernelTensors
from .weight_types import WeightType

ENVIRONMENT = "MARLIN_KERNEL_BACKEND"
LAYOUTS = ("codes", "marlin", "sm80", "sm90", "sm90_int8", "sm90_fp8")
EIGHT_BIT_LAYOUTS = {"sm90_int8": "int8", "sm90_fp8": "float8_e4m3fn"}  # and their activations
_KERNEL_MODULES = {  # preferred first
    "sm90": "launch",
    **dict.fromkeys(EIGHT_BIT_LAYOUTS, "sm90_8bit_path"),
    "sm80": "sm80_path",
}
_KERNEL_LAYOUTS = {"sm90": sm90_layout, "sm80": sm80_layout}


@dataclass(frozen=True)
class Selection:
    """The layout chosen for a layer, and why."""

    layout: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """Tensors of a layer in a layout: what `ops.gemm` takes.

    weights: bytes [K, N] ("codes": see `natural`), records ("sm90_int8", "sm90_fp8": see
    sm90_8bit_layout.Records, scales too), else int32 words; scales: natural ("codes") or
    in the order of the layout; zeros: natural ("codes"), as on disk ("marlin"), in the order of the
    layout, or None; perm: integers [K'], activations are gathered by it (the weight rows of an
    act-order layer are sorted by group; -1 in "sm80" and "sm90": no input), or None; group_size:
    inputs per scale as the layout counts them, None: those of the layer.
    """

    layout: str
    weights: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    group_size: int | None = None


def kernel_group_size(group_size: int, k: int) -> int:
    """Group size in the words of the kernels: -1 for one group."""
    return -1 if group_size >= k else group_size


@functools.cache
def kernels(layout: str) -> ModuleType:
    """The module that runs a kernel layout. Raises ConfigError if its parts are not installed."""
    try:
        return importlib.import_module(f".{_KERNEL_MODULES[layout]}", __package__)
    except ImportError as error:
        raise ConfigError(f"the {layout} kernels cannot be loaded: {error}") from error


def _supports(
    layout: str,
    device: torch.device,
    spec: LayerSpec,
    dtype: torch.dtype,
    activation: str | None = None,
) -> bool:
    try:
        supports = getattr(kernels(layout), "supports", None)
    except ConfigError:
        return False
    if supports is None:
        return False
    group_size = kernel_group_size(spec.group_size, spec.k)
    if layout in EIGHT_BIT_LAYOUTS and activation != EIGHT_BIT_LAYOUTS[layout]:
        return False
    if layout == "sm80" or layout in EIGHT_BIT_LAYOUTS:
        features = (activation, spec.act_order, spec.k_full)
        return supports(device, spec.weight_type.name, group_size, dtype, *features)
    if activation is not None:
        return False
    return supports(device, spec.weight_type.name, group_size, dtype)


def select_backend(
    device: torch.device, spec: LayerSpec, dtype: torch.dtype, activation: str | None = None
) -> Selection:
    """Choose the layout for a layer on `device` with activations of `dtype`. Changes nothing.

    activation: "int8" or "float8_e4m3fn" if the layer rounds them. The environment variable
    MARLIN_KERNEL_BACKEND names a layout to use instead.
    Raises ConfigError if that one is unknown or cannot serve the layer.
    """
    forced = os.environ.get(ENVIRONMENT)
    if forced:
        if forced not in LAYOUTS:
            raise ConfigError(f"{ENVIRONMENT}={forced!r} is not one of {', '.join(LAYOUTS)}")
        if forced in _KERNEL_MODULES and not _supports(forced, device, spec, dtype, activation):
            raise ConfigError(
                f"{ENVIRONMENT}={forced} cannot serve {spec.weight_type.name} with "
                f"group_size={spec.group_size} and {dtype} on {device}; unset it"
            )
        return Selection(forced, f"{ENVIRONMENT} is set")
    if device.type != "cuda":
        return Selection("codes", f"dequantize and multiply on {device.type}")
    what = f"{spec.weight_type.name} and {activation or dtype} on {device}"
    for layout in _KERNEL_MODULES:
        if _supports(layout, device, spec, dtype, activation):
            return Selection(layout, f"kernel for {what}")
    return Selection("marlin", f"no kernel for {what}: dequantize")


def prepare(
    layout: str, tensors: Mapping[str, Tensor], spec: LayerSpec, dtype: torch.dtype
) -> Prepared:
    """Convert a layer's on-disk tensors (by suffix) to a layout, on the device they are on."""
    words, scales, zeros = tensors["B"], tensors["s"], tensors.get("z")
    if layout in _KERNEL_LAYOUTS:
        held = _KERNEL_LAYOUTS[layout].kernel_tensors(tensors, spec)
        return Prepared(layout, held.weights, held.scales, held.zeros, held.perm, held.group_size)
    if layout in EIGHT_BIT_LAYOUTS:
        from . import sm90_8bit_layout  # needs the compiler's names

        records = sm90_8bit_layout.records(tensors, spec, EIGHT_BIT_LAYOUTS[layout])
        return Prepared(layout, records.weights, records.scales, None, None)
    if not spec.k_full:
        return _prepare_shard(tensors, spec)
    perm = torch.argsort(tensors["g_idx"], stable=True) if spec.act_order else None
    if layout == "codes":
        args = (words, scales, zeros, spec.k, spec.n, spec.weight_type, tensors.get("global_scale"))
        codes, scales, zeros = natural(*args)
        groups = spec.groups
        return Prepared(
            layout,
            codes,
            scales[:groups].contiguous(),
            None if zeros is None else zeros[:groups].contiguous(),
            perm,
        )
    return Prepared(layout, words, scales, zeros, perm)


def _prepare_shard(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Prepared:
    """A shard of K as "codes": rows sorted by group, each group filled up to whole runs."""
    held = sm80_layout.kernel_tensors(tensors, spec)
    sizes = (held.k_padded, spec.n, spec.weight_type)
    codes, scales, zeros = natural(held.weights, held.scales, None, *sizes, grouped=True)
    perm = held.perm.clamp(min=0).long()  # rows that fill up weigh zero, whatever they multiply
    return Prepared("codes", codes, scales.contiguous(), zeros, perm, held.group_size)


def restore(
    prepared: Prepared, spec: LayerSpec, global_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """On-disk tensors of a prepared layer, by suffix. Inverse of `prepare`.

    global_scale: of the layer, if it has one. Raises ConfigError for a prepared shard of K.
    """
    if prepared.layout in EIGHT_BIT_LAYOUTS:
        from . import sm90_8bit_layout

        records = sm90_8bit_layout.Records(prepared.weights, prepared.scales)
        return sm90_8bit_layout.stored_tensors(records, spec, EIGHT_BIT_LAYOUTS[prepared.layout])
    if prepared.layout in _KERNEL_LAYOUTS or not spec.k_full:
        group_size = prepared.group_size
        if group_size is None:
            group_size = 0 if spec.packed.groups == 1 else spec.group_size
        tensors = (prepared.weights, prepared.scales, prepared.zeros, prepared.perm, global_scale)
        held = KernelTensors(*tensors, group_size)
        return _KERNEL_LAYOUTS.get(prepared.layout, sm80_layout).stored_tensors(held, spec)
    g_idx = None
    if prepared.perm is not None:
        g_idx = torch.empty(spec.k, dtype=torch.int32, device=prepared.perm.device)
        sorted_groups = torch.arange(spec.k, dtype=torch.int32, device=g_idx.device)
        g_idx[prepared.perm] = sorted_groups // spec.group_size
    if prepared.layout == "codes":
        wtype = spec.weight_type
        codes = _uncentre(prepared.weights, wtype)
        if prepared.perm is not None:
            codes = torch.empty_like(codes).index_copy_(0, prepared.perm, codes)
        zeros, scales = prepared.zeros, prepared.scales
        if wtype.zeros == "integer":
            zeros = _uncentre(zeros, wtype)
        elif wtype.zeros == "float":
            zeros = (zeros + wtype.midpoint).half()
        if wtype.scale != "float16":
            scales = _stored_scales(scales, wtype, global_scale)
        facts = (wtype, spec.group_size, global_scale)
        layer = QuantizedLinear(codes, scales, zeros, g_idx, None, *facts)
        return formats.write(layer, "marlin", act_order=spec.act_order)
    tensors = {"B": prepared.weights, "s": prepared.scales, "z": prepared.zeros, "g_idx": g_idx}
    tensors["global_scale"] = global_scale
    return {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}


def natural(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    k: int,
    n: int,
    wtype: WeightType,
    global_scale: Tensor | None = None,
    *,
    grouped: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes and natural scales of on-disk Marlin tensors, without the padding of K and N.

    words, scales, zeros, global_scale: `B`, `s`, `z`, `global_scale`; grouped: columns of `scales`
    are permuted for several groups, default: if there are several.
    Returns (codes [K, N], scales [G', N], zeros [G', N] or None), such that a weight is scale *
    (value - zero). Integer types: int8 codes and zeros ``code - 2**(bits - 1)``, float16 scales
    (HQQ: float32 zeros). Float types: uint8 codes; float32 scales, the global one included, unless
    scales are float16.
    """
    codes = _centre(unpack(words, wtype)[:k, :n].contiguous(), wtype)
    if grouped is None:
        grouped = scales.shape[0] > 1
    scales_n = unpermute_columns(scales, grouped)[:, :n]
    if wtype.scale != "float16":
        scales_n = reference.scale_values(scales_n, wtype, global_scale)
    if wtype.zeros == "integer":
        zeros = _centre(unpack_rows(zeros, wtype.bits, scales.shape[1])[:, :n], wtype)
    elif wtype.zeros == "float":
        zeros = unpermute_columns(zeros, grouped)[:, :n].float() - wtype.midpoint
    return codes, scales_n, zeros


def _stored_scales(scales: Tensor, wtype: WeightType, global_scale: Tensor | None) -> Tensor:
    """Inverse of reference.scale_values: the factors are those of stored scales."""
    if wtype.scale == "e8m0":
        return (torch.log2(scales).round() + 127).to(torch.uint8)
    return (scales / global_scale).to(torch.float8_e4m3fn)


def _centre(codes: Tensor, wtype: WeightType) -> Tensor:
    """uint8 code -> int8 code - 2**(bits - 1). The subtraction wraps, as it must for 8 bits.

    Codes of floating-point types stay as they are.
    """
    return codes if wtype.is_float else (codes - wtype.midpoint).view(torch.int8)


def _uncentre(codes: Tensor, wtype: WeightType) -> Tensor:
    """Inverse of `_centre`."""
    return codes if wtype.is_float else codes.view(torch.uint8) + wtype.midpoint
