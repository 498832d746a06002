"""`Layer`: a linear layer with packed weights, and `replace_linear`, which puts it into a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, formats, ops
from .backends import Prepared, Selection
from .errors import ConfigError
from .formats import LayerSpec, QuantizedLinear
from .sm90_layout import Sizes, sizes_of
from .validity import Combination, check
from .weight_types import INTEGER_TYPES, normalize_group_size
from .weight_types import weight_type as lookup

# On-disk tensors; "bias" and "global_scale" are the same in every layout.
_STORED = ("B", "s", "z", "g_idx")
_PREPARED = ("weights", "scales", "zeros", "perm")


class Layer(nn.Module):
    """``y = x @ W + bias`` with W stored as integer codes, [in_features, out_features].

    A new layer holds the on-disk tensors as buffers (FORMAT.md): ``B``, ``s``, ``z`` for types with
    stored zero points, ``g_idx`` for act-order, ``global_scale``, ``bias``. `prepare` converts them
    once to the layout of the device; `state_dict` always gives the on-disk tensors. Scales keep
    their dtype whatever dtype the module is moved to.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = -1,
        bias: bool = False,
        weight_type: str = "uint4b8",
        act_order: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
        activation: str | None = None,
        reduce_half: bool = False,
        shard_groups: int | None = None,
    ) -> None:
        """in_features, out_features: any positive sizes; group_size: one that the type allows, -1
        for one group; dtype: of the bias; batch_invariant: a row's result may not depend on the
        other rows of its batch; activation: "int8" or "float8_e4m3fn": inputs are rounded to 8
        bits, with one scale per token; reduce_half: sums may be exchanged between blocks of a
        kernel in fp16; shard_groups: the layer holds a part of the inputs of an act-order layer
        that has so many groups (k_full=False).

        Raises ConfigError for an unknown weight type, sizes that are not positive, or the rule of
        `validity` that is broken.
        """
        super().__init__()
        wtype = lookup(weight_type)
        group_size = normalize_group_size(group_size, in_features)
        act_order = act_order and (group_size < in_features or shard_groups is not None)
        self.spec = LayerSpec(
            in_features, out_features, wtype, group_size, act_order, bias, shard_groups
        )
        _check_features(self.spec, activation)
        self.in_features, self.out_features = in_features, out_features
        self.batch_invariant = batch_invariant
        self.activation, self.reduce_half = activation, reduce_half
        self._group_size: int | None = None  # inputs per scale of the prepared layout, if others
        self._sizes: Sizes | None = None  # in the layout "sm90"
        self.layout: str | None = None  # None: the on-disk tensors
        self._dtype: torch.dtype | None = None  # of activations, as given to prepare()
        for suffix, (shape, stored) in formats.tensor_shapes("marlin", self.spec).items():
            empty = torch.zeros(shape, dtype=stored or dtype, device=device)
            self.register_buffer(suffix, empty)
        for absent in {"bias", "global_scale"} - self._buffers.keys():
            self.register_buffer(absent, None)

    @classmethod
    def from_quantized(cls, layer: QuantizedLinear, act_order: bool | None = None) -> Layer:
        """A layer that holds exactly these codes, on their device. Not prepared yet.

        act_order: hold a group index even if it is the natural one; default: only if `layer` does.
        """
        spec = layer.spec
        if act_order and spec.group_size < spec.k:
            spec = replace(spec, act_order=True)
        return cls.from_tensors(spec, formats.write(layer, "marlin", act_order=spec.act_order))

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> Layer:
        """A layer that holds these on-disk tensors (by suffix), as they are."""
        args = (spec.k, spec.n, spec.group_size, spec.bias, spec.weight_type.name, spec.act_order)
        layer = cls(*args, device="meta", shard_groups=spec.shard_groups)
        for suffix, tensor in tensors.items():
            setattr(layer, suffix, tensor)
        return layer

    def quantized(self) -> QuantizedLinear:
        """The layer as integer codes."""
        return formats.read(self._stored_tensors(), "marlin", self.spec)

    def pack(
        self,
        linear: nn.Linear,
        scales: Tensor,
        zeros: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> None:
        """Take the weights of a fake-quantized linear layer, as in the original Marlin.

        linear.weight: [N, K], every value ``s * (q - z)`` for an integer code q; scales: [N, G] as
        in the original, or [G, N]; zeros: integers of the same shape; g_idx: int [K].
        Raises ConfigError for shapes that are not those of the layer, and naming the weight that is
        farthest from its grid, if it is not on it.
        """
        spec = self.spec
        if tuple(linear.weight.shape) != (spec.n, spec.k):
            raise ConfigError(
                f"linear.weight has shape {list(linear.weight.shape)}, the layer "
                f"{[spec.n, spec.k]} (outputs, inputs)"
            )
        if g_idx is not None and tuple(g_idx.shape) != (spec.k,):
            raise ConfigError(f"g_idx has shape {list(g_idx.shape)}, expected {[spec.k]}")
        scales = self._grouped(scales, "scales")
        zeros = None if zeros is None else self._grouped(zeros, "zeros")
        groups = torch.arange(spec.k, device=scales.device) // spec.group_size
        groups = groups if g_idx is None else g_idx.long()
        weight = linear.weight.detach().T.double()  # float64: the division must not blur the grid
        if spec.weight_type.name not in INTEGER_TYPES:
            raise ConfigError(
                f"pack() takes integer types, not {spec.weight_type.name}; build such a layer with "
                "Layer.from_quantized(QuantizedLinear.quantize(...))"
            )
        zero = spec.weight_type.bias if zeros is None else zeros.double()[groups]
        step = scales.double()[groups]
        ratio = torch.where((step == 0) & (weight == 0), 0.0, weight / step) + zero
        codes = ratio.round().clamp(0, spec.weight_type.levels - 1)
        distance = (ratio - codes).abs().nan_to_num(nan=torch.inf)
        worst = int(distance.argmax())
        # fp16 weights are off the grid by half an ulp, 2**-11 relative, times the largest code
        limit = spec.weight_type.levels * 2.0**-10
        if float(distance.flatten()[worst]) > limit:
            row, column = divmod(worst, spec.n)
            raise ConfigError(
                f"linear.weight[{column}, {row}] = {float(weight[row, column]):.6g} lies "
                f"{float(distance[row, column]):.3g} steps from the grid of its group; pass "
                "weights that were quantized with these scales and zeros"
            )
        packed = QuantizedLinear.of(
            codes.to(torch.uint8),
            scales,
            spec.weight_type,
            spec.group_size,
            zeros=zeros,
            g_idx=g_idx,
            bias=linear.bias,
        )
        if packed.bias is not None and not spec.bias:
            raise ConfigError("linear has a bias, the layer was made without; pass bias=True")
        tensors = formats.write(packed, "marlin", act_order=spec.act_order)
        if tensors.keys() ^ formats.tensor_shapes("marlin", spec).keys():
            raise ConfigError(
                "g_idx or bias do not fit the layer; make it with act_order and bias as needed"
            )
        self._set_stored(tensors)
        if "bias" in tensors:
            self.bias = tensors["bias"].clone()

    def _grouped(self, values: Tensor, name: str) -> Tensor:
        """[G, N] from [G, N] or [N, G]."""
        spec = self.spec
        if tuple(values.shape) == (spec.groups, spec.n):
            return values.detach()
        if tuple(values.shape) == (spec.n, spec.groups):
            return values.detach().T
        raise ConfigError(
            f"{name} have shape {list(values.shape)}, expected {[spec.groups, spec.n]} or its "
            "transpose"
        )

    def select_backend(self, dtype: torch.dtype | None = None) -> Selection:
        """The layout that `prepare` would choose, and why; changes nothing."""
        dtype = dtype or torch.float16
        return backends.select_backend(self._device(), self.spec, dtype, self.activation)

    def prepare(self, dtype: torch.dtype | None = None) -> Layer:
        """Convert to the layout of the device, releasing the on-disk tensors. Returns self.

        dtype: of the activations to come, by default float16. Does nothing on the meta device.
        """
        device = self._device()
        if device.type == "meta":
            return self
        tensors = self._stored_tensors()
        layout = self.select_backend(dtype).layout
        prepared = backends.prepare(layout, tensors, self.spec, dtype or torch.float16)
        self._drop(_STORED)
        self._drop(_PREPARED)
        for name in _PREPARED:
            self.register_buffer(name, getattr(prepared, name), persistent=False)
        for name in [name for name, tensor in self._buffers.items() if tensor is None]:
            self._buffers[name] = self._buffers.pop(name)  # torch.export counts on them being last
        self.layout = prepared.layout
        self._group_size = prepared.group_size
        self._dtype = dtype
        if self.layout == "sm90":
            shapes = prepared.weights.shape, prepared.scales.shape
            spec, group_size = self.spec, prepared.group_size
            group_size = spec.group_size if group_size is None else group_size
            self._sizes = sizes_of(spec.k, spec.n, *shapes, group_size, spec.weight_type.name)
        return self

    def unprepare(self) -> Layer:
        """Go back to the on-disk tensors. Returns self."""
        if self.layout is not None:
            self._set_stored(self._stored_tensors())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x: float16, bfloat16 or float32 [..., in_features] -> [..., out_features], same dtype."""
        held = self._buffers  # attributes of a module take longer
        bias = held["bias"] if "bias" in held else self.bias
        if self._sizes is not None and ops.nothing_looks_on(x, bias):
            tensors = (held["weights"], held["scales"], held["perm"], bias)
            typed = held.get("global_scale"), self._sizes
            return ops.multiply_sm90(x, *tensors, *typed, self.batch_invariant)
        spec = self.spec
        group_size = spec.group_size
        if self.layout is None and not spec.k_full:
            raise ConfigError("a shard of K (shard_groups) is multiplied after prepare() only")
        if self.layout is None:
            perm = torch.argsort(self.g_idx, stable=True) if spec.act_order else None
            tensors = (self.B, self.s, getattr(self, "z", None), perm)
        else:
            tensors = (held["weights"], held["scales"], held["zeros"], held["perm"])
            if self._group_size is not None:
                group_size = self._group_size
        layout = self.layout or "marlin"
        return ops.eager_gemm(x, bias, layout)(
            x,
            *tensors,
            bias,
            spec.k,
            spec.n,
            group_size,
            spec.weight_type.name,
            layout,
            self.batch_invariant,
            held.get("global_scale"),
            self.activation or "",
            self.reduce_half,
        )

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in_features={spec.k}, out_features={spec.n}, group_size={spec.group_size}, "
            f"weight_type={spec.weight_type.name}, act_order={spec.act_order}, bias={spec.bias}, "
            f"layout={self.layout or 'on-disk'}"
        )

    # ---- buffers: two forms, one at a time ----

    def _device(self) -> torch.device:
        return (self.B if self.layout is None else self.weights).device

    def _drop(self, names: Collection[str]) -> None:
        for name in names:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def _stored_tensors(self) -> dict[str, Tensor]:
        """The on-disk tensors by suffix, bias included, whatever the form held now."""
        if self.layout is None:
            held = {name: self._buffers.get(name) for name in _STORED}
        else:
            tensors = (self._buffers[name] for name in _PREPARED)
            prepared = Prepared(self.layout, *tensors, self._group_size)
            held = backends.restore(prepared, self.spec, self._buffers.get("global_scale"))
        held["bias"] = self.bias
        held["global_scale"] = self._buffers.get("global_scale")
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def _set_stored(self, tensors: Mapping[str, Tensor]) -> None:
        self._drop(_PREPARED)
        self.layout = self._sizes = None
        for name in _STORED:
            if name in tensors:
                self.register_buffer(name, tensors[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        """Moves of the module. Scales and zero points change device, never dtype; integers likewise
        by nature.

        A prepared layer is converted again if the device or the activations' dtype change.
        """
        dtype = self._dtype
        if self.layout is not None:
            device = self._device()
            moved = fn(torch.empty(0, dtype=dtype or torch.float16, device=device))
            stays = moved.device == device and (dtype is None or moved.dtype == dtype)
            if not stays:
                self.unprepare()._apply(fn, recurse)
                return self.prepare(None if dtype is None else moved.dtype)
        names = ("s", "z", "global_scale", "scales", "zeros")
        exact = {name: self._buffers.get(name) for name in names}
        super()._apply(fn, recurse)
        for name, scales in exact.items():
            if scales is not None and self._buffers[name].dtype != scales.dtype:
                self._buffers[name] = scales.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self._stored_tensors().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        prepared = self.layout is not None
        self.unprepare()
        super()._load_from_state_dict(*args)
        if prepared:
            self.prepare(self._dtype)


def _check_features(spec: LayerSpec, activation: str | None) -> None:
    """Raise ConfigError naming the rule of `validity` that a layer of this spec breaks."""
    t = spec.weight_type
    # few inputs may make one group smaller than any that the type allows
    group_size = -1 if spec.group_size == spec.k and spec.k_full else spec.group_size
    if group_size == -1 and -1 not in t.group_sizes:
        group_size = t.group_sizes[0]
    dtype = activation or t.activations[0]
    output = dtype if activation is None else "float16"
    # Without a kernel, act-order is still dequantized; rounded inputs and shards need one.
    act_order = spec.act_order and (activation is not None or not spec.k_full)
    check(Combination(t, dtype, output, group_size, act_order, spec.k_full))


def replace_linear(
    module: nn.Module,
    names: Collection[str] | Callable[[str, nn.Linear], bool],
    group_size: int = -1,
    weight_type: str = "uint4b8",
    act_order: bool = False,
) -> list[str]:
    """Put empty Layers in place of torch.nn.Linear modules, on their devices.

    names: paths of the modules inside `module`, or a predicate (path, linear) -> bool.
    Returns the replaced paths. Raises ConfigError if a name is not a Linear inside `module`.
    """
    if isinstance(module, nn.Linear):
        raise ConfigError("module is a Linear, which cannot replace the module itself; use Layer")
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    if callable(names):
        chosen = [name for name, linear in linears.items() if names(name, linear)]
    else:
        chosen = list(names)
        missing = [name for name in chosen if name not in linears]
        if missing:
            raise ConfigError(f"names {missing[:3]} are not torch.nn.Linear modules of the model")
    for name in chosen:
        linear = linears[name]
        layer = Layer(
            linear.in_features,
            linear.out_features,
            group_size,
            linear.bias is not None,
            weight_type,
            act_order,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        module.set_submodule(name, layer)
    return chosen
