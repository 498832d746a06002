"""Compute layers that share their input as one: q, k and v, gate and up.

Columns of a packed weight do not depend on each other, so layers with the same inputs lie side by
side in one packed weight, and one launch reads them all. `fuse_layers` rewires a loaded model:

    self_attn.qkv_proj            FusedLayer: the packed weights of q_proj, k_proj and v_proj
    self_attn.q_proj, k_proj ...  FusedPart: hands out its columns of what qkv_proj computed

The model's code, which calls the parts one after the other, stays as it is, and `state_dict` gives
the tensors of the parts under their own names.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import formats
from .errors import ConfigError
from .formats import LayerSpec
from .layer import Layer

logger = logging.getLogger(__name__)

# Name of the fused layer -> its parts, siblings that the model applies to one and the same input:
# every decoder of the Llama, Mistral and Qwen families.
FUSIBLE = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PER_COLUMN = ("B", "s", "z")  # on-disk tensors [rows, a multiple of N']
_COMMON = ("g_idx", "global_scale")  # must be equal
_SETTINGS = ("batch_invariant", "activation", "reduce_half")  # of a Layer; must be equal
_FUSIBLE_TENSORS = {*_PER_COLUMN, *_COMMON, "bias"}  # a bias gets gaps


class FusedLayer(Layer):
    """Layers side by side. Columns of padding stay between them, with weight and bias zero.

    It has no entries in a state_dict: its parts have.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.parts: tuple[LayerSpec, ...] = ()
        self.columns: tuple[tuple[int, int], ...] = ()  # first and last + 1 of every part
        self._shared: tuple[Tensor, dict[int, Tensor]] | None = None

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> FusedLayer:
        """One layer that holds the on-disk tensors of `layers`. Not prepared yet.

        Raises ConfigError if they differ in more than their outputs (see `obstacle`).
        """
        reason = obstacle(layers)
        if reason:
            raise ConfigError(f"layers cannot be fused: {reason}")
        stored = [layer._stored_tensors() for layer in layers]
        specs = [layer.spec for layer in layers]
        tensors = {
            suffix: torch.cat([tensors[suffix] for tensors in stored], dim=1)
            for suffix in _PER_COLUMN
            if suffix in stored[0]
        }
        tensors |= {suffix: stored[0][suffix] for suffix in _COMMON if suffix in stored[0]}
        starts = itertools.accumulate((spec.packed.n_padded for spec in specs), initial=0)
        columns = tuple((start, start + spec.n) for spec, start in zip(specs, starts, strict=False))
        n = columns[-1][1]
        if specs[0].bias:
            tensors["bias"] = stored[0]["bias"].new_zeros(n)
            for part, (start, stop) in zip(stored, columns, strict=True):
                tensors["bias"][start:stop] = part["bias"]
        fused = cls.from_tensors(replace(specs[0], n=n), tensors)
        fused.parts, fused.columns = tuple(specs), columns
        _copy_settings(layers[0], fused)
        fused._dtype = layers[0]._dtype
        return fused

    def part(self, index: int, x: Tensor) -> Tensor:
        """Outputs of one part: [..., n of the part], a view of what is computed for all.

        All parts of an input are computed when the first of them is asked for, and handed out once
        each, as long as the same tensor `x` is given; it must not be changed in between.
        """
        shared = self._shared
        if shared is None or shared[0] is not x or index not in shared[1]:
            out = self(x)
            shared = (x, {i: out[..., start:stop] for i, (start, stop) in enumerate(self.columns)})
        mine = shared[1].pop(index)
        self._shared = shared if shared[1] else None
        return mine

    def part_tensors(self, index: int) -> dict[str, Tensor]:
        """On-disk tensors of one part, by suffix: copies, in memory of their own."""
        return self._slice(self._stored_tensors(), index)

    def split(self) -> list[Layer]:
        """The parts as layers of their own, prepared if this one is."""
        stored = self._stored_tensors()
        layers = []
        for index, spec in enumerate(self.parts):
            layer = Layer.from_tensors(spec, self._slice(stored, index))
            _copy_settings(self, layer)
            layers.append(layer if self.layout is None else layer.prepare(self._dtype))
        return layers

    def _slice(self, stored: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """Part `index` of on-disk tensors of this layer."""
        tensors = {}
        first, stop = self.columns[index]
        last = first + self.parts[index].packed.n_padded
        for suffix, tensor in stored.items():
            if suffix in _PER_COLUMN:  # any number of elements a column, or of columns an element
                width, columns = tensor.shape[1], self.spec.packed.n_padded
                tensor = tensor[:, first * width // columns : last * width // columns]
            elif suffix == "bias":
                tensor = tensor[first:stop]
            tensors[suffix] = tensor.clone(memory_format=torch.contiguous_format)
        return tensors

    def _save_to_state_dict(self, *_: Any) -> None:
        """Nothing: the parts save themselves."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing: the parts load themselves."""


class FusedPart(nn.Module):
    """Stands where one of the fused layers was.

    spec, in_features, out_features, quantized(): as of the layer it replaces.
    """

    def __init__(self, fused: FusedLayer, index: int) -> None:
        super().__init__()
        # Not a submodule: the parent owns the fused layer, once
        object.__setattr__(self, "fused", fused)
        self.index = index
        self.spec = fused.parts[index]
        self.in_features, self.out_features = self.spec.k, self.spec.n

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], same dtype."""
        return self.fused.part(self.index, x)

    def unfused(self) -> Layer:
        """A layer of its own with the same weights, not prepared."""
        layer = Layer.from_tensors(self.spec, self.fused.part_tensors(self.index))
        _copy_settings(self.fused, layer)
        return layer

    def quantized(self) -> Any:
        """The part as integer codes (formats.QuantizedLinear)."""
        return self.unfused().quantized()

    def extra_repr(self) -> str:
        return f"in_features={self.spec.k}, out_features={self.spec.n}, index={self.index}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.fused.part_tensors(self.index).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        layers = self.fused.split()
        for layer in layers:
            layer.unprepare()
        layers[self.index]._load_from_state_dict(*args)
        reason = obstacle(layers)
        if reason:  # for example other group indices
            raise ConfigError(
                f"a state_dict does not fit fused layers: {reason}; apply unfuse_layers to the "
                "model before it loads"
            )
        fused, loaded = self.fused, FusedLayer.of(layers)
        prepared = fused.layout is not None
        fused._set_stored(loaded._stored_tensors())
        fused.bias = loaded.bias
        if prepared:
            fused.prepare(fused._dtype)


def _copy_settings(source: Layer, target: Layer) -> None:
    for name in _SETTINGS:
        setattr(target, name, getattr(source, name))


def obstacle(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be one; None if they can."""
    packed = [layer for layer in layers if type(layer) is Layer]
    if len(packed) < len(layers):
        return "not all of them are packed layers"
    first = packed[0]
    facts = {
        "inputs": lambda x: x.spec.k,
        "weight types": lambda x: x.spec.weight_type.name,
        "group sizes": lambda x: x.spec.group_size,
        "act-order": lambda x: x.spec.act_order,
        "presence of a bias": lambda x: x.spec.bias,
        "dtypes of the bias": lambda x: None if x.bias is None else x.bias.dtype,
        "devices": lambda x: x._device(),
        **{name.replace("_", " "): operator.attrgetter(name) for name in _SETTINGS},
    }
    for what, fact in facts.items():
        if len({fact(layer) for layer in packed}) > 1:
            return f"they differ in {what}: {', '.join(str(fact(layer)) for layer in packed)}"
    others = formats.tensor_shapes("marlin", first.spec).keys() - _FUSIBLE_TENSORS
    if others:
        return f"they hold {', '.join(sorted(others))}, which are not per column"
    if first.spec.act_order:
        orders = [layer._stored_tensors()["g_idx"] for layer in packed]
        if not all(torch.equal(orders[0], order) for order in orders[1:]):
            return "they assign inputs to groups differently (act-order)"
    if first.spec.weight_type.global_scale:
        scales = [layer.global_scale for layer in packed]
        if not all(torch.equal(scales[0], scale) for scale in scales[1:]):
            return "their global scales differ"
    return None


def fuse_layers(model: nn.Module) -> list[str]:
    """Fuse the packed layers of `model` that share their input (FUSIBLE), in place.

    Layers keep their device and whether they are prepared. While a group of layers is fused its
    tensors exist twice, all others once. Groups that cannot be fused stay as they are, and the
    reason is logged at level INFO. Returns the paths of the fused layers.
    """
    fused_paths = []
    parents = [(path, m) for path, m in model.named_modules() if not isinstance(m, Layer)]
    for path, parent in parents:
        for name, parts in FUSIBLE.items():
            layers = [getattr(parent, part, None) for part in parts]
            if not any(type(layer) is Layer for layer in layers):
                continue
            reason = obstacle(layers)
            if reason is None and hasattr(parent, name):
                reason = f"the model has a {name} of its own"
            if reason is not None:
                logger.info("%s of %s stay apart: %s", ", ".join(parts), path or "model", reason)
                continue
            prepared = layers[0].layout is not None
            fused = FusedLayer.of(layers)
            for index, part in enumerate(parts):
                setattr(parent, part, FusedPart(fused, index))
            setattr(parent, name, fused)
            del layers  # the tensors of the parts go before the next layout is made
            if prepared:
                fused.prepare(fused._dtype)
            fused_paths.append(f"{path}.{name}" if path else name)
    return fused_paths


def unfuse_layers(model: nn.Module) -> list[str]:
    """Undo `fuse_layers`, in place. Returns the paths of the layers that were fused."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, FusedLayer)]
    for path, fused in found:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        for part, layer in zip(FUSIBLE[name], fused.split(), strict=True):
            setattr(parent, part, layer)
        delattr(parent, name)
    return [path for path, _ in found]


def packed_paths(model: nn.Module) -> list[str]:
    """Paths of all packed layers by the names of the checkpoint, fused or not."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, FusedPart)
        or (isinstance(module, Layer) and not isinstance(module, FusedLayer))
    ]
