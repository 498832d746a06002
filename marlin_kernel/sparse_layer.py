"""`SparseLayer`: a linear layer of a 2:4 Marlin checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import formats, sparse_marlin
from .formats import LayerSpec, QuantizedLinear
from .layer import Layer
from .ops import check_activations
from .sparse_format import SPARSE_FORMAT

LAYOUT = "sparse24"  # of csrc/sparse/config.cuh
_STORED = ("B_24", "B_meta", "s")
_PREPARED = ("weights", "scales", "zeros", "perm")


class SparseLayer(Layer):
    """``y = x @ W + bias`` with W 2:4 sparse, stored as in sparse_format.py.

    `prepare` converts to the layout of the sparse kernel where that serves the device, else to the
    layout that the same codes have as a dense Layer. `state_dict` always gives the stored tensors.
    """

    def __init__(self, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        """spec: of the layer; tensors: by suffix, as stored; "bias" if it has one."""
        nn.Module.__init__(self)
        self.spec = spec
        self.in_features, self.out_features = spec.k, spec.n
        self.batch_invariant = False
        self.activation, self.reduce_half = None, False
        self._group_size: int | None = None
        self.layout: str | None = None
        self._dtype: torch.dtype | None = None
        for suffix in (*_STORED, "bias"):
            self.register_buffer(suffix, tensors.get(suffix))

    @classmethod
    def from_tensors(cls, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> SparseLayer:
        """A layer that holds these stored tensors (by suffix), as they are."""
        return cls(spec, tensors)

    @classmethod
    def from_quantized(cls, layer: QuantizedLinear, act_order: bool | None = None) -> SparseLayer:
        """A layer that holds these codes. Raises ConfigError if they are not 2:4 sparse."""
        return cls(layer.spec, formats.write(layer, SPARSE_FORMAT))

    def quantized(self) -> QuantizedLinear:
        """The layer as integer codes."""
        return formats.read(self._stored_tensors(), SPARSE_FORMAT, self.spec)

    def prepare(self, dtype: torch.dtype | None = None) -> SparseLayer:
        """Convert to the layout of the device, releasing the stored tensors. Returns self.

        dtype: of the activations to come (default float16).
        """
        device = self._device()
        if device.type == "meta":
            return self
        stored = self._stored_tensors()
        if sparse_marlin.supports(device, self.spec, dtype or torch.float16):
            group = sparse_marlin.kernel_group(self.spec.group_size, self.spec.k)
            weights = sparse_marlin.device_weights(*(stored[name] for name in _STORED), group)
            held, layout = (*weights, None, None), LAYOUT
        else:
            dense = Layer.from_quantized(formats.read(stored, SPARSE_FORMAT, self.spec))
            dense.prepare(dtype)
            held = tuple(dense._buffers[name] for name in _PREPARED)
            layout, self._group_size = dense.layout, dense._group_size
            self._sizes = dense._sizes
        self._drop((*_STORED, *_PREPARED))
        for name, tensor in zip(_PREPARED, held, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.layout, self._dtype = layout, dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x: float16, bfloat16 or float32 [..., in_features] -> [..., out_features], same dtype."""
        if self.layout is None:
            self.prepare(x.dtype)
        if self.layout is None:  # on the meta device, which holds shapes only
            check_activations(x, self.B_24, self.spec.k)
            return x.new_empty(*x.shape[:-1], self.spec.n)
        if self.layout != LAYOUT:
            return super().forward(x)
        held, spec = self._buffers, self.spec
        return sparse_marlin.sparse_gemm(
            x,
            held["weights"],
            held["scales"],
            held["bias"],
            spec.k,
            spec.n,
            spec.group_size,
            spec.weight_type.name,
        )

    def _device(self) -> torch.device:
        return (self.B_24 if self.layout is None else self.weights).device

    def _stored_tensors(self) -> dict[str, Tensor]:
        spec = self.spec
        if self.layout is None:
            held = {name: self._buffers.get(name) for name in _STORED}
        elif self.layout == LAYOUT:
            buffers = self._buffers["weights"], self._buffers["scales"]
            stored = sparse_marlin.stored_weights(*buffers, spec.n, spec.weight_type, spec.groups)
            held = dict(zip(_STORED, stored, strict=True))
        else:
            dense = formats.read(super()._stored_tensors(), "marlin", spec)
            held = formats.write(dense, SPARSE_FORMAT)
        held["bias"] = self.bias
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def _set_stored(self, tensors: Mapping[str, Tensor]) -> None:
        self._drop(_PREPARED)
        self.layout = self._sizes = None
        for name in _STORED:
            self.register_buffer(name, tensors[name])
