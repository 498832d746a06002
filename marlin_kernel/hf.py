"""Load packed checkpoints through transformers.

Importing this module registers the quantization method "marlin", after which
``AutoModelForCausalLM.from_pretrained(folder)`` loads packed folders. `load_model` also reads GPTQ
and compressed-tensors folders into the same layers, plain checkpoints and GGUF files, and checks
what it loaded. Without this import transformers only warns and leaves the packed layers random.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import formats
from .checkpoint import MANIFEST, read_probe, verify_tensors
from .checkpoint_files import read_json
from .errors import CheckpointError
from .formats import LayerSpec
from .fusion import fuse_layers, packed_paths
from .layer import Layer
from .schemes import Scheme, quantization_config, scheme_of
from .sparse_format import SPARSE_FORMAT
from .sparse_layer import SparseLayer

READABLE = ("marlin", "gptq", "compressed-tensors", "awq")
# Largest difference of a probe logit, relative to the largest logit, by the dtype of the model. The
# stored logits are float32; what remains is rounding of activations, which grows through the
# layers.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@register_quantization_config("marlin")
class MarlinConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed folder (schemes.quantization_config).

    foreign: the quantization_config of a GPTQ or compressed-tensors folder that is to be read into
    packed layers; prepare: convert layers to the device's layout after loading; fuse: compute q, k
    and v, and gate and up, as one layer (fusion.fuse_layers), by default on GPUs. These three are
    not saved.
    """

    def __init__(
        self,
        *,
        foreign: dict[str, Any] | None = None,
        prepare: bool = True,
        fuse: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.__dict__.update(kwargs)
        self.quant_method = "marlin"
        self.foreign = foreign
        self.prepare = prepare
        self.fuse = fuse

    def to_dict(self) -> dict[str, Any]:
        hidden = ("foreign", "prepare", "fuse")
        return {k: copy.deepcopy(v) for k, v in self.__dict__.items() if k not in hidden}


@register_quantizer("marlin")
class MarlinQuantizer(HfQuantizer):
    """Puts `Layer` modules into the empty model, and checks and prepares them once loaded."""

    requires_calibration = True  # only packed checkpoints: nothing is quantized on the fly

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        shapes = _stored_shapes(checkpoint_files)
        self._scheme = scheme_of(config.foreign or config.to_dict(), shapes)
        self._loaded: dict[str, nn.Module] = {}
        for name in self._scheme.modules:
            linear = _linear(model, name)
            spec = self._scheme.layer(name, bias=f"{name}.bias" in shapes)
            if (linear.in_features, linear.out_features) != (spec.k, spec.n):
                raise CheckpointError(
                    f"{name} has {spec.k} inputs and {spec.n} outputs in the checkpoint, "
                    f"{linear.in_features} and {linear.out_features} in the model's config"
                )
            stored = _StoredLayer(name, spec, self._scheme, shapes, linear.weight.dtype)
            model.set_submodule(name, stored)
            self._loaded[name] = stored

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # A file may announce act-order and hold groups in natural order, which cost nothing to use.
        act_order = any(stored.moves_groups() for stored in self._loaded.values())
        for name in list(self._loaded):  # nothing may keep tensors that are no longer needed
            model.set_submodule(name, self._loaded.pop(name).layer(act_order))
        if self.quantization_config.prepare:
            prepare_layers(model, self.quantization_config.fuse)
        meta = getattr(self.quantization_config, "meta", None)
        scheme = Scheme(
            "marlin",
            self._scheme.weight_type,
            self._scheme.group_size,
            act_order,
            modules=self._scheme.modules,
        )
        self.quantization_config = MarlinConfig(**quantization_config(scheme, meta=meta))
        model.config.quantization_config = self.quantization_config

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _StoredLayer(nn.Module):
    """Stands in for a linear layer while its tensors are loaded under the names of its format."""

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        scheme: Scheme,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name, self.spec, self.scheme = name, spec, scheme
        for suffix, (shape, stored) in formats.tensor_shapes(scheme.fmt, spec).items():
            found = shapes.get(f"{name}.{suffix}")
            if found is None and suffix == "g_idx" and scheme.fmt == "gptq":
                continue  # optional there
            if found != shape:
                raise CheckpointError(
                    f"{name}.{suffix} has shape {found and list(found)}, expected {list(shape)}: "
                    "the checkpoint is damaged or incomplete"
                )
            # The loader converts floating-point tensors to the dtype that it finds here
            self.register_buffer(suffix, torch.empty(shape, dtype=stored or dtype, device="meta"))

    def moves_groups(self) -> bool:
        """Whether inputs of a group are not next to each other."""
        g_idx = getattr(self, "g_idx", None)
        if g_idx is None:
            return False
        natural = torch.arange(self.spec.k, device=g_idx.device) // self.spec.group_size
        return not torch.equal(g_idx, natural.to(g_idx.dtype))

    def layer(self, act_order: bool) -> Layer:
        """The layer that the loaded tensors hold; act_order: give it a group index."""
        tensors = dict(self.named_buffers())
        absent = [suffix for suffix, tensor in tensors.items() if tensor.is_meta]
        if absent:
            raise CheckpointError(f"{self.name}: {', '.join(absent)} was not loaded")
        if self.scheme.fmt == "marlin" and act_order == self.spec.act_order:
            return Layer.from_tensors(self.spec, tensors)
        if self.scheme.fmt == SPARSE_FORMAT and not act_order:
            return SparseLayer.from_tensors(self.spec, tensors)
        quantized = formats.read(
            tensors,
            self.scheme.fmt,
            self.spec,
            gptq_version=self.scheme.gptq_version,
            name=self.name,
        )
        return Layer.from_quantized(quantized, act_order=act_order)


def _stored_shapes(files: list[str] | None) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file}: packed layers are read from safetensors files only")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"the checkpoint holds a quantized layer {name}, which is no Linear of "
            f"{type(model).__name__}"
        )
    return module


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a local folder that `load_model` reads into packed layers."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return False
    quantization = read_json(file).get("quantization_config") or {}
    return quantization.get("quant_method") in READABLE


def _quantization_of(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def load_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = False,
    fuse: bool | None = None,
) -> PreTrainedModel:
    """Load a causal language model for inference: packed, plain, from the hub, or GGUF.

    path: a folder in the format marlin, gptq or compressed-tensors (pack-quantized), whose
    quantized layers become `Layer`; a plain folder or hub name; or a file ending in .gguf
    (dequantized; needs the package `gguf`). dtype: of embeddings, norms and activations; by default
    float32 on the CPU and the checkpoint's own on a GPU. verify: compare all tensors and the probe
    logits with the manifest (PROBE_TOLERANCE). fuse: see `prepare_layers`. Raises CheckpointError
    if tensors are missing, unexpected or differ; the message names them.
    """
    device = torch.device(device)
    name = os.fspath(path)
    default = torch.float32 if device.type == "cpu" else "auto"
    options: dict[str, Any] = {"dtype": dtype or default}
    if name.endswith(".gguf"):
        name = str(Path(name).parent)
        options["gguf_file"] = Path(path).name
        _require_file(Path(path))
    elif not Path(path).is_dir() and name.startswith((".", "~", "/")):
        raise CheckpointError(f"{name} is not a folder")
    if verify:
        _verify_tensors(Path(path))
    config = AutoConfig.from_pretrained(
        name, **({"gguf_file": options["gguf_file"]} if "gguf_file" in options else {})
    )
    quantization = _quantization_of(config)
    packed = quantization.get("quant_method") in READABLE
    if packed:
        foreign = quantization if quantization["quant_method"] != "marlin" else None
        config.quantization_config = {
            **({} if foreign else quantization),
            "quant_method": "marlin",
            "foreign": foreign,
            "prepare": False,
        }
    model, info = AutoModelForCausalLM.from_pretrained(
        name, config=config, output_loading_info=True, **options
    )
    _check_loaded(model, info, packed)
    if "gguf_file" in options and hasattr(model, "hf_quantizer"):  # an ordinary model now
        model.hf_quantizer.remove_quantization_config(model)
    model.eval().requires_grad_(False)
    model.to(device)
    prepare_layers(model, fuse)
    if verify:
        _verify_probe(model, Path(path))
    return model


def prepare_layers(model: PreTrainedModel, fuse: bool | None = None) -> None:
    """Make the packed layers of a loaded model ready for the device that it is on.

    fuse: compute q, k and v, and gate and up, as one layer where that is possible
    (`fusion.fuse_layers`); default: on GPUs. While layers are fused or converted to the layout of
    the device, one of them at a time exists twice.
    """
    if fuse if fuse is not None else model.device.type == "cuda":
        fuse_layers(model)
    for module in model.modules():
        if isinstance(module, Layer):
            module.prepare(model.dtype)


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")


def _check_loaded(model: PreTrainedModel, info: Mapping[str, Any], packed: bool) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            raise CheckpointError(
                f"loading the checkpoint left {len(found)} {kind}: {', '.join(found[:5])}"
            )
    if packed and set(packed_paths(model)) != set(model.config.quantization_config.modules):
        raise CheckpointError("quantized layers of the checkpoint were not put into the model")


def _verify_tensors(path: Path) -> None:
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"verify=True, but {path} has no {MANIFEST}; only checkpoints written here carry hashes"
        )
    different = verify_tensors(path)
    if different:
        raise CheckpointError(
            f"{len(different)} tensors of {path} differ from the manifest: "
            f"{', '.join(different[:5])}; the checkpoint is damaged, write or copy it again"
        )


def _verify_probe(model: PreTrainedModel, path: Path) -> None:
    probe = read_probe(path)
    if probe is None:
        return
    token_ids, expected = probe
    difference = (probe_logits(model, token_ids) - expected.float()).abs().max()
    tolerance = max(PROBE_TOLERANCE[model.dtype], PROBE_TOLERANCE[expected.dtype])
    limit = tolerance * float(expected.abs().max())
    if not float(difference) <= limit:
        raise CheckpointError(
            f"the logits of the probe tokens differ by {float(difference):.4g} from those stored "
            f"with {path} (limit {limit:.4g} for {model.dtype}, stored {expected.dtype}), though "
            "all tensors are intact: the installed transformers or torch computes this model "
            "differently"
        )


@torch.inference_mode()
def probe_logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Logits of the model at every position of token_ids int [T]: float32 [T, V] on the CPU."""
    ids = token_ids.to(model.device, torch.int64)[None]
    return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder, hub name or GGUF file."""
    name = os.fspath(path)
    if name.endswith(".gguf"):
        _require_file(Path(name))
        return AutoTokenizer.from_pretrained(str(Path(name).parent), gguf_file=Path(name).name)
    return AutoTokenizer.from_pretrained(name)
