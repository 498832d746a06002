"""One quantized linear layer, and the tensors that three on-disk formats make of it.

`QuantizedLinear` is the truth; `write` and `read` are pure functions between it and the tensors of
a checkpoint, and change no value: every format decodes to the same ``s * (q - z)``. FORMAT.md
describes the Marlin tensors; the others follow GPTQModel (``gptq`` v1, v2) and compressed-tensors
0.17 to 0.20 (``pack-quantized``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference, sparse_format
from .errors import CheckpointError, ConfigError, NumericalError
from .layout import PackedShape, packed_shape, permute_columns, unpermute_columns, words_shape
from .packing import check_codes, pack, pack_rows, unpack, unpack_awq, unpack_rows
from .sparse_format import SPARSE_FORMAT
from .weight_types import INTEGER_TYPES, WeightType, normalize_group_size

FORMATS = ("marlin", "gptq", "compressed-tensors")
AWQ_FORMAT = "awq"  # read, not written
SCALE_DTYPE = torch.float16
Stored = tuple[tuple[int, ...], "torch.dtype | None"]  # shape and dtype of one tensor
# The suffix by which a reader recognises a quantized layer of each format.
CODE_SUFFIX = {
    "marlin": "B",
    "gptq": "qweight",
    "compressed-tensors": "weight_packed",
    AWQ_FORMAT: "qweight",
    SPARSE_FORMAT: "B_24",
}


@dataclass(frozen=True)
class LayerSpec:
    """What must be known to give a layer's tensors their shapes.

    k, n: inputs and outputs; weight_type: row of the type table; group_size: inputs per scale, or
    k; act_order: inputs are assigned to groups by a stored index; bias: the layer has one;
    shard_groups: the layer is a shard of K of an act-order layer that has so many groups, and holds
    any number of inputs of each (k_full=False).
    """

    k: int
    n: int
    weight_type: WeightType
    group_size: int
    act_order: bool = False
    bias: bool = False
    shard_groups: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1 or self.n < 1:
            raise ConfigError(
                f"a layer of {self.k} inputs and {self.n} outputs; it needs at least one of each"
            )

    @property
    def k_full(self) -> bool:
        """Groups are whole: each has group_size inputs, but for the last one."""
        return self.shard_groups is None

    @property
    def groups(self) -> int:
        return self.shard_groups or -(-self.k // self.group_size)

    @property
    def packed(self) -> PackedShape:
        if self.k_full:
            return packed_shape(self.k, self.n, self.group_size)
        return replace(packed_shape(self.k, self.n, -1), groups=self.groups)


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer as codes: weight[k, n] = scales[j, n] * (value(codes[k, n]) - zeros[j, n]).

    codes: uint8 [K, N], natural row order. scales: [G, N] in the type's dtype
    (reference.SCALE_DTYPES), G = ceil(K / group_size), may be negative. zeros: uint8 or (HQQ)
    float16 [G, N], or None for types that store none. g_idx: int32 [K], group of each input, or
    None for ``k // group_size``. bias: float [N] or None. group_size is normalised: K for one
    group. global_scale: float32 [1], only for types that have one. shard_groups: G of a shard of an
    act-order layer (LayerSpec). `QuantizedLinear.of` and `quantize` build one from looser
    arguments.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    bias: Tensor | None
    weight_type: WeightType
    group_size: int
    global_scale: Tensor | None = None
    shard_groups: int | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        expected = {
            "codes": (self.codes, (spec.k, spec.n), torch.uint8),
            "scales": (self.scales, (spec.groups, spec.n), scale_dtype(self.weight_type)),
            "zeros": (self.zeros, (spec.groups, spec.n), zero_dtype(self.weight_type)),
            "g_idx": (self.g_idx, (spec.k,), torch.int32),
            "bias": (self.bias, (spec.n,), None),
            "global_scale": (self.global_scale, (1,), torch.float32),
        }
        for name, (tensor, shape, dtype) in expected.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or dtype not in (None, tensor.dtype):
                raise ConfigError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; a layer of {spec.k} inputs, "
                    f"{spec.n} outputs and group_size={self.group_size} needs "
                    f"{dtype or 'float'} {list(shape)}"
                )
        if (self.zeros is None) != self.weight_type.symmetric:
            need = "takes no zeros" if self.weight_type.symmetric else "needs zeros"
            raise ConfigError(f"weight_type {self.weight_type.name} {need}")
        if (self.global_scale is not None) != self.weight_type.global_scale:
            need = "needs" if self.weight_type.global_scale else "takes no"
            raise ConfigError(f"weight_type {self.weight_type.name} {need} global_scale")

    @classmethod
    def quantize(
        cls, weight: Tensor, weight_type: WeightType, group_size: int, bias: Tensor | None = None
    ) -> QuantizedLinear:
        """Round a float weight [K, N] to nearest (reference.quantize_stored). bias: [N] or None.

        Raises NumericalError naming the first weight that is NaN or Inf.
        """
        if weight.dim() != 2:
            raise ConfigError(f"weight has shape {list(weight.shape)}; it must be [K, N]")
        if not bool(torch.isfinite(weight).all()):
            k, n = (~torch.isfinite(weight)).nonzero()[0].tolist()
            raise NumericalError(f"weight[{k}, {n}] is {float(weight[k, n])}; only finite numbers")
        q = reference.quantize_stored(weight, weight_type, group_size)
        group_size = normalize_group_size(group_size, weight.shape[0])
        args = (q.codes, q.scales, q.zeros, None, bias, weight_type, group_size, q.global_scale)
        return cls(*args)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scales: Tensor,
        weight_type: WeightType,
        group_size: int,
        *,
        zeros: Tensor | None = None,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        global_scale: Tensor | None = None,
        shard_groups: int | None = None,
    ) -> QuantizedLinear:
        """Build from any dtypes, changing no value.

        codes: integers [K, N]; scales: [G, N], float values that fp16 can hold, or in the dtype of
        the type; zeros: values [G, N] of any dtype, integers unless the type's are floats (a
        symmetric integer type accepts its constant zero point and drops it); g_idx: integers [K]
        (dropped when it is ``k // group_size``); group_size: -1 for one group; bias: [N];
        global_scale: one float, any shape; shard_groups: G of a shard of an act-order layer.
        Raises ConfigError if a value would change.
        """
        check_codes(codes, weight_type)
        group_size = normalize_group_size(group_size, codes.shape[0])
        if zeros is not None and weight_type.zeros == "float":
            zeros = _exact(zeros, "zeros")
        elif zeros is not None:
            zeros = _integers(zeros, weight_type)
            if weight_type.bias is not None:
                if bool((zeros != weight_type.bias).any()):
                    raise ConfigError(
                        f"zeros span {int(zeros.min())}..{int(zeros.max())}; {weight_type.name} "
                        f"has the constant {weight_type.bias}; use an asymmetric type"
                    )
                zeros = None
        if g_idx is not None:
            g_idx, groups = g_idx.to(torch.int32), scales.shape[0]
            if g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
                raise ConfigError(
                    f"g_idx spans {int(g_idx.min())}..{int(g_idx.max())}, outside 0..{groups - 1}: "
                    f"there are {groups} rows of scales"
                )
            if shard_groups is None and torch.equal(g_idx, _natural_groups(g_idx, group_size)):
                g_idx = None
        return cls(
            codes.to(torch.uint8),
            _exact_scales(scales) if weight_type.scale == "float16" else scales.detach(),
            zeros,
            g_idx,
            None if bias is None else bias.detach(),
            weight_type,
            group_size,
            None if global_scale is None else global_scale.detach().float().reshape(1),
            shard_groups,
        )

    @property
    def spec(self) -> LayerSpec:
        k, n = self.codes.shape
        act_order, bias = self.g_idx is not None, self.bias is not None
        facts = (self.weight_type, self.group_size, act_order, bias, self.shard_groups)
        return LayerSpec(k, n, *facts)

    @property
    def group_index(self) -> Tensor:
        """int32 [K]: group of each input."""
        if self.g_idx is not None:
            return self.g_idx
        return _natural_groups(self.codes[:, 0], self.group_size)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as `dtype` [K, N] (the transpose of a torch.nn.Linear weight)."""
        return reference.dequantize(
            self.codes,
            self.scales,
            self.zeros,
            self.weight_type,
            self.group_index,
            dtype,
            self.global_scale,
        )

    def to(self, device: torch.device | str) -> QuantizedLinear:
        """The same layer on another device."""
        names = ("codes", "scales", "zeros", "g_idx", "bias", "global_scale")
        held = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v.to(device) for k, v in held.items() if v is not None})


def _natural_groups(like: Tensor, group_size: int) -> Tensor:
    """int32 [K]: ``k // group_size``, for `like` of shape [K]."""
    return torch.arange(like.shape[0], dtype=torch.int32, device=like.device) // group_size


def _integers(values: Tensor, wtype: WeightType) -> Tensor:
    rounded = values.round() if values.is_floating_point() else values
    if bool((rounded != values).any()):
        raise ConfigError("zeros hold fractions; zero points are integers")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < wtype.levels:
        raise ConfigError(
            f"zeros span {int(values.min())}..{int(values.max())}, outside 0..{wtype.levels - 1} "
            f"of {wtype.name}"
        )
    return rounded.to(torch.uint8)


def _exact(values: Tensor, name: str) -> Tensor:
    """As float16. Subnormal numbers may move by half of the smallest fp16 step, 2**-25."""
    stored = values.detach().to(SCALE_DTYPE)
    error = (stored.float() - values.float()).abs()
    if values.numel() and not bool((error <= 2.0**-25).all()):  # also catches NaN and Inf
        raise ConfigError(
            f"{name} of dtype {values.dtype} lose up to {float(error.max()):.3g} as {SCALE_DTYPE}; "
            "codes must be chosen against stored scales: apply reference.round_scales first"
        )
    return stored


def _exact_scales(scales: Tensor) -> Tensor:
    return _exact(scales, "scales")


def scale_dtype(wtype: WeightType) -> torch.dtype:
    """dtype of the stored scales of a type."""
    return reference.SCALE_DTYPES[wtype.scale]


def zero_dtype(wtype: WeightType) -> torch.dtype:
    """dtype of the zero points of a type that stores them."""
    return torch.float16 if wtype.zeros == "float" else torch.uint8


# ---- shapes --------------------------------------------------------------------------------------


def tensor_shapes(fmt: str, spec: LayerSpec) -> dict[str, Stored]:
    """Shape and dtype of every tensor that a layer has in a format, by suffix.

    dtype None: that of the model. A dtype is what `write` makes; `read` also takes bf16 scales.
    """
    if fmt != AWQ_FORMAT:
        check_format(fmt)
    k, n, groups, wtype = spec.k, spec.n, spec.groups, spec.weight_type
    factor = wtype.pack_factor
    shapes: dict[str, Stored]
    if fmt == "marlin":
        p = spec.packed
        shapes = {
            "B": (words_shape(p.k_padded, p.n_padded, wtype), torch.int32),
            "s": ((p.groups, p.n_padded), scale_dtype(wtype)),
        }
        if wtype.zeros == "integer":
            shapes["z"] = ((p.groups, p.n_padded // factor), torch.int32)
        elif wtype.zeros == "float":
            shapes["z"] = ((p.groups, p.n_padded), torch.float16)
        if wtype.global_scale:
            shapes["global_scale"] = ((1,), torch.float32)
        if spec.act_order:
            shapes["g_idx"] = ((k,), torch.int32)
    elif fmt == SPARSE_FORMAT:
        shapes = dict(sparse_format.tensor_shapes(spec))
    elif fmt == "gptq":
        shapes = {
            "qweight": ((-(-k // factor), n), torch.int32),
            "qzeros": ((groups, -(-n // factor)), torch.int32),
            "scales": ((groups, n), SCALE_DTYPE),
            "g_idx": ((k,), torch.int32),
        }
    elif fmt == AWQ_FORMAT:
        shapes = {
            "qweight": ((k, n // factor), torch.int32),
            "qzeros": ((groups, n // factor), torch.int32),
            "scales": ((groups, n), SCALE_DTYPE),
        }
    elif wtype.is_float:  # nvfp4-pack-quantized, mxfp4-pack-quantized
        shapes = {
            "weight_packed": ((n, -(-k // 2)), torch.uint8),
            "weight_scale": ((n, groups), scale_dtype(wtype)),
        }
        if wtype.global_scale:
            shapes["weight_global_scale"] = ((1,), torch.float32)
    else:
        shapes = {
            "weight_packed": ((n, -(-k // factor)), torch.int32),
            "weight_scale": ((n, groups), SCALE_DTYPE),
            "weight_shape": ((2,), torch.int64),
        }
        if not wtype.symmetric:
            shapes["weight_zero_point"] = ((-(-n // factor), groups), torch.int32)
    if spec.bias:
        shapes["bias"] = ((n,), None)
    return shapes


def check_exportable(fmt: str, spec: LayerSpec) -> None:
    """Raise ConfigError, with the way out, if a format cannot hold a layer of this spec."""
    check_format(fmt)
    if fmt == "marlin":
        return
    if fmt == SPARSE_FORMAT:
        sparse_format.check_spec(spec)
        return
    check_type(fmt, spec.weight_type)
    if not spec.k_full:
        raise ConfigError(f"format {fmt!r} holds whole layers, not shards of K; write the layer")
    if spec.k % spec.group_size:
        raise ConfigError(
            f"group_size={spec.group_size} does not divide the {spec.k} inputs; format {fmt!r} "
            "needs that: choose another group size, or --format marlin, which pads"
        )
    factor = spec.weight_type.pack_factor
    if fmt == "gptq" and (spec.k % factor or spec.n % factor):
        raise ConfigError(
            f"format 'gptq' packs {factor} codes per word along both sides, which {spec.k} inputs "
            f"and {spec.n} outputs do not fill; use --format marlin"
        )
    if fmt == "compressed-tensors" and spec.k % factor:
        raise ConfigError(
            f"format 'compressed-tensors' packs {factor} codes per word along the inputs, which "
            f"{spec.k} inputs do not fill: readers take that for more; use --format marlin"
        )
    if fmt == "compressed-tensors" and spec.act_order:
        raise ConfigError(
            "compressed-tensors readers no longer accept a group index (act-order with moving "
            "groups); use --format gptq, or --static-groups, which needs no index"
        )


def check_type(fmt: str, wtype: WeightType) -> None:
    """Raise ConfigError, with the way out, if a format has no place for a weight type."""
    check_format(fmt)
    known = {"gptq": tuple(INTEGER_TYPES), "compressed-tensors": (*INTEGER_TYPES, "nvfp4", "mxfp4")}
    if wtype.name not in known.get(fmt, (wtype.name,)):
        raise ConfigError(
            f"format {fmt!r} holds {', '.join(known[fmt])}, not {wtype.name}; use --format marlin"
        )


def check_format(fmt: str) -> None:
    """Raise ConfigError unless `fmt` is one of FORMATS, or the 2:4 form of the first."""
    if fmt not in FORMATS and fmt != SPARSE_FORMAT:
        raise ConfigError(f"format={fmt!r} is not known; choose one of {', '.join(FORMATS)}")


# ---- tensors -------------------------------------------------------------------------------------


def write(
    layer: QuantizedLinear, fmt: str, *, act_order: bool | None = None, gptq_version: int = 1
) -> dict[str, Tensor]:
    """Tensors of one layer in a format, keyed by suffix ("B", "qweight", ...), contiguous.

    act_order: store a group index even if it is the natural one (a checkpoint that has it has it in
    every layer); default: only if the layer has one. gptq_version: 1 stores zero points minus one.
    Raises ConfigError if the format cannot hold the layer (`check_exportable`).
    """
    check_exportable(fmt, layer.spec)
    if fmt == "marlin":
        tensors = _write_marlin(layer)
        if act_order:
            tensors["g_idx"] = layer.group_index
    elif fmt == SPARSE_FORMAT:
        tensors = sparse_format.write(layer)
    elif fmt == "gptq":
        tensors = _write_gptq(layer, gptq_version)
    else:
        tensors = _write_compressed_tensors(layer)
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}


def read(
    tensors: Mapping[str, Tensor],
    fmt: str,
    spec: LayerSpec,
    *,
    gptq_version: int = 1,
    name: str = "layer",
) -> QuantizedLinear:
    """The layer that the tensors of a format hold. Inverse of `write`.

    tensors: by suffix; suffixes that the format does not know are ignored. spec: what the tensors
    are; GPTQ files without act-order may lack `g_idx`.
    Raises CheckpointError with `name` if a tensor is missing or has another shape than the spec
    says.
    """
    for suffix, (shape, _) in tensor_shapes(fmt, spec).items():
        if suffix not in tensors:
            if fmt == "gptq" and suffix == "g_idx" and not spec.act_order:
                continue
            raise CheckpointError(f"{name}.{suffix} is missing from the checkpoint")
        if tuple(tensors[suffix].shape) != shape:
            raise CheckpointError(
                f"{name}.{suffix} has shape {list(tensors[suffix].shape)}, expected {list(shape)} "
                f"for {spec.k} inputs, {spec.n} outputs, group_size={spec.group_size}"
            )
    try:
        if fmt == "gptq":
            return _read_gptq(tensors, spec, gptq_version)
        if fmt == SPARSE_FORMAT:
            codes, scales = sparse_format.read(tensors, spec)
            own = {"bias": tensors.get("bias") if spec.bias else None}
            return QuantizedLinear.of(codes, scales, spec.weight_type, spec.group_size, **own)
        if fmt == AWQ_FORMAT:
            return _read_awq(tensors, spec)
        if fmt == "compressed-tensors" and spec.weight_type.is_float:
            return _read_compressed_float4(tensors, spec)
        return (_read_marlin if fmt == "marlin" else _read_compressed_tensors)(tensors, spec)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _write_marlin(layer: QuantizedLinear) -> dict[str, Tensor]:
    spec, wtype, shape = layer.spec, layer.weight_type, layer.spec.packed
    codes = layer.codes
    extra = {}
    if not spec.k_full:
        extra["g_idx"] = layer.group_index
    elif layer.g_idx is not None:
        order = torch.argsort(layer.g_idx, stable=True)
        if not torch.equal(layer.g_idx[order], _natural_groups(order, layer.group_size)):
            raise ConfigError(
                f"g_idx fills groups unevenly; Marlin needs {layer.group_size} inputs in every "
                "group but the last: use --format gptq"
            )
        codes = codes[order]
        extra["g_idx"] = layer.g_idx
    pad_n, pad_k = shape.n_padded - spec.n, shape.k_padded - spec.k
    pad_groups = shape.groups - spec.groups
    # Padding weighs exactly zero: scale 0 where a whole group or column is added, and codes equal
    # to the zero point everywhere.
    # (HQQ: a fractional zero point has no code; there padding relies on activations being zero.)
    scales = layer.scales
    if scales.dtype == torch.float8_e4m3fn:  # which torch cannot pad
        scales = scales.view(torch.uint8)
    scales = torch.nn.functional.pad(scales, (0, pad_n, 0, pad_groups)).view(layer.scales.dtype)
    zeros = layer.zeros
    codes = torch.nn.functional.pad(codes, (0, pad_n, 0, pad_k), value=wtype.midpoint)
    if layer.global_scale is not None:
        extra["global_scale"] = layer.global_scale
    if wtype.zeros == "float":
        zeros = torch.nn.functional.pad(zeros, (0, pad_n, 0, pad_groups))
        extra["z"] = permute_columns(zeros, grouped=shape.groups > 1)
    elif zeros is not None:
        zeros = torch.nn.functional.pad(zeros, (0, pad_n, 0, pad_groups), value=wtype.midpoint)
        groups = torch.arange(spec.k, shape.k_padded, device=codes.device) // spec.group_size
        codes[spec.k :] = zeros[groups.clamp(max=shape.groups - 1)]
        extra["z"] = pack_rows(zeros, wtype.bits)
    return {
        "B": pack(codes, wtype),
        "s": permute_columns(scales, grouped=shape.groups > 1),
        **extra,
    }


def _read_marlin(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedLinear:
    wtype, shape = spec.weight_type, spec.packed
    codes = unpack(tensors["B"], wtype)[: spec.k, : spec.n]
    scales = unpermute_columns(tensors["s"], grouped=shape.groups > 1)[: spec.groups, : spec.n]
    zeros = None
    if wtype.zeros == "integer":
        zeros = unpack_rows(tensors["z"], wtype.bits, shape.n_padded)[: spec.groups, : spec.n]
    elif wtype.zeros == "float":
        zeros = unpermute_columns(tensors["z"], shape.groups > 1)[: spec.groups, : spec.n]
    g_idx = None
    if not spec.k_full:
        g_idx = tensors["g_idx"]
    elif spec.act_order:
        g_idx = tensors["g_idx"]
        natural = torch.empty_like(codes)
        natural[torch.argsort(g_idx, stable=True)] = codes
        codes = natural
    return QuantizedLinear.of(
        codes.contiguous(),
        scales.contiguous(),
        wtype,
        spec.group_size,
        zeros=zeros,
        g_idx=g_idx,
        bias=tensors["bias"] if spec.bias else None,
        global_scale=tensors.get("global_scale"),
        shard_groups=spec.shard_groups,
    )


def _write_gptq(layer: QuantizedLinear, version: int) -> dict[str, Tensor]:
    wtype = layer.weight_type
    zeros = layer.zeros
    if zeros is None:
        zeros = torch.full_like(layer.scales, wtype.bias, dtype=torch.uint8)
    if version == 1:
        if bool((zeros == 0).any()):
            raise ConfigError(
                "a zero point is 0, which GPTQ v1 (zeros stored minus one) cannot express; "
                "write v2 (gptq_version=2) or --format marlin"
            )
        zeros = zeros - 1
    return {
        "qweight": pack_rows(layer.codes.T, wtype.bits).T,
        "qzeros": pack_rows(zeros, wtype.bits),
        "scales": layer.scales,
        "g_idx": layer.group_index,
    }


def _read_gptq(tensors: Mapping[str, Tensor], spec: LayerSpec, version: int) -> QuantizedLinear:
    wtype = spec.weight_type
    codes = unpack_rows(tensors["qweight"].T, wtype.bits, spec.k).T.contiguous()
    stored = unpack_rows(tensors["qzeros"], wtype.bits, spec.n)
    if wtype.symmetric:
        # Files exist that say v1 but hold v2 zeros: both constants mean the same symmetric grid.
        odd = (stored != wtype.bias) & (stored != wtype.bias - 1)
        if bool(odd.any()):
            raise ConfigError(
                f"the checkpoint says symmetric, but qzeros hold {int(stored[odd][0])} where "
                f'{wtype.bias - 1} or {wtype.bias} is expected; set "sym": false if it is not'
            )
        zeros = None
    else:
        zeros = (stored + (1 if version == 1 else 0)) & (wtype.levels - 1)
    return QuantizedLinear.of(
        codes,
        tensors["scales"],
        wtype,
        spec.group_size,
        zeros=zeros,
        g_idx=tensors.get("g_idx"),
        bias=tensors["bias"] if spec.bias else None,
    )


def _write_compressed_tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    wtype = layer.weight_type
    if wtype.is_float:
        return _write_compressed_float4(layer)
    tensors = {
        "weight_packed": pack_rows(layer.codes.T, wtype.bits),
        "weight_scale": layer.scales.T,
        "weight_shape": torch.tensor(tuple(layer.codes.T.shape), dtype=torch.int64),
    }
    if layer.zeros is not None:
        tensors["weight_zero_point"] = pack_rows(layer.zeros, wtype.bits).T
    return tensors


def _read_compressed_tensors(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedLinear:
    wtype = spec.weight_type
    if tensors["weight_shape"].tolist() != [spec.n, spec.k]:
        raise ConfigError(
            f"weight_shape is {tensors['weight_shape'].tolist()}, expected {[spec.n, spec.k]}"
        )
    zeros = None
    if not wtype.symmetric:
        zeros = unpack_rows(tensors["weight_zero_point"].T, wtype.bits, spec.n)
    return QuantizedLinear.of(
        unpack_rows(tensors["weight_packed"], wtype.bits, spec.k).T.contiguous(),
        tensors["weight_scale"].T.contiguous(),
        wtype,
        spec.group_size,
        zeros=zeros,
        bias=tensors["bias"] if spec.bias else None,
    )


def _read_awq(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedLinear:
    """AutoAWQ's "gemm" packing: eight outputs per word, in the order of packing.AWQ_ORDER."""
    return QuantizedLinear.of(
        unpack_awq(tensors["qweight"]),
        tensors["scales"],
        spec.weight_type,
        spec.group_size,
        zeros=unpack_awq(tensors["qzeros"]),
        bias=tensors["bias"] if spec.bias else None,
    )


def _write_compressed_float4(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Inverse of `_read_compressed_float4`. Raises ConfigError for a global scale whose reciprocal,
    which is what the format stores, is not exact."""
    codes = torch.nn.functional.pad(layer.codes, (0, 0, 0, layer.codes.shape[0] % 2)).T
    tensors = {
        "weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4),
        "weight_scale": layer.scales.T,
    }
    if layer.global_scale is not None:
        divisor = 1 / layer.global_scale
        if not torch.equal(1 / divisor, layer.global_scale):
            raise ConfigError(
                f"compressed-tensors stores 1 / global_scale, which is not exact for "
                f"{float(layer.global_scale):.9g}; use a power of two, or --format marlin"
            )
        tensors["weight_global_scale"] = divisor
    return tensors


def _read_compressed_float4(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedLinear:
    """NVFP4 and MXFP4 of compressed-tensors: two codes per byte, even inputs in the low nibble.

    It divides by its global scale; ours multiplies.
    """
    packed = tensors["weight_packed"].view(torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), dim=2).view(spec.n, -1)[:, : spec.k]
    divisor = tensors.get("weight_global_scale")
    return QuantizedLinear.of(
        codes.T.contiguous(),
        tensors["weight_scale"].T.contiguous(),
        spec.weight_type,
        spec.group_size,
        bias=tensors["bias"] if spec.bias else None,
        global_scale=None if divisor is None else 1 / divisor.float(),
    )
