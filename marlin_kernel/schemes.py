"""The `quantization_config` of a checkpoint, in the words of each format, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError
from .formats import AWQ_FORMAT, CODE_SUFFIX, LayerSpec, check_format
from .sparse_format import SPARSE_FORMAT, SPARSITY
from .weight_types import WEIGHT_TYPES, WeightType, integer_type, normalize_group_size
from .weight_types import weight_type as lookup

MARLIN_FORMAT_VERSION = 1
_FLOAT4_FORMATS = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 2}  # checkpoint_format -> how zero points are stored


@dataclass(frozen=True)
class Scheme:
    """What holds for all quantized layers of a checkpoint.

    fmt: one of formats.FORMATS, or "marlin-24" (sparse_format); group_size: -1 or inputs per scale;
    act_order: layers carry a group index; gptq_version: 1 (zero points stored minus one) or 2;
    modules: path of every quantized layer -> (inputs, outputs).
    """

    fmt: str
    weight_type: WeightType
    group_size: int
    act_order: bool = False
    gptq_version: int = 1
    modules: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def layer(self, name: str, bias: bool) -> LayerSpec:
        """Spec of the quantized layer at path `name`."""
        k, n = self.modules[name]
        g = normalize_group_size(self.group_size, k)
        return LayerSpec(k, n, self.weight_type, g, self.act_order and g < k, bias)


def quantization_config(
    scheme: Scheme,
    *,
    ignore: Sequence[str] = ("lm_head",),
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json; for "gptq" also quantize_config.json.

    ignore: paths of every linear layer that stays unquantized ("compressed-tensors"); meta:
    informative values ("marlin", "gptq"), for example ``{"quantizer": ["tool:version"]}``.
    """
    check_format(scheme.fmt)
    wtype = scheme.weight_type
    common = {
        "bits": wtype.bits,
        "group_size": scheme.group_size,
        "desc_act": scheme.act_order,
        "sym": wtype.symmetric,
        "meta": dict(meta or {}),
    }
    if scheme.fmt in ("marlin", SPARSE_FORMAT):
        return {
            "quant_method": "marlin",
            "format_version": MARLIN_FORMAT_VERSION,
            **common,
            "weight_type": wtype.name,
            **({"sparsity": SPARSITY} if scheme.fmt == SPARSE_FORMAT else {}),
            "modules": {name: list(sizes) for name, sizes in scheme.modules.items()},
        }
    if scheme.fmt == "gptq":
        names = {version: name for name, version in _GPTQ_FORMATS.items()}
        return {
            "quant_method": "gptq",
            "checkpoint_format": names[scheme.gptq_version],
            **common,
            "lm_head": "lm_head" in scheme.modules,
            "pack_dtype": "int32",
        }
    grouped = scheme.group_size != -1
    strategy = "group" if grouped else "channel"
    names = {name: stored for stored, name in _FLOAT4_FORMATS.items()}
    stored_format = names.get(wtype.name, "pack-quantized")
    weights = {
        "num_bits": wtype.bits,
        "type": "float" if wtype.is_float else "int",
        "symmetric": wtype.symmetric,
        "strategy": "tensor_group" if wtype.global_scale else strategy,
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "format": stored_format,
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "version": "0.17.0",
        "format": stored_format,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {"group_0": group},
    }


def scheme_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Scheme:
    """Read a `quantization_config`, ours or another tool's. Inverse of `quantization_config`.

    config: the dict; shapes: of every tensor in the checkpoint; they say what is quantized.
    Raises CheckpointError for methods and options that cannot be read.
    """
    method = config.get("quant_method")
    readers = {
        "marlin": _read_marlin,
        "gptq": _read_gptq,
        "compressed-tensors": _read_compressed_tensors,
        "awq": _read_awq,
    }
    if method not in readers:
        raise CheckpointError(
            f"quant_method={method!r} cannot be read here; known: {', '.join(readers)}"
        )
    sparse = method == "marlin" and config.get("sparsity") is not None
    suffix = "." + CODE_SUFFIX[SPARSE_FORMAT if sparse else method]
    packed = {n.removesuffix(suffix): s for n, s in shapes.items() if n.endswith(suffix)}
    if not packed:
        raise CheckpointError(
            f"quant_method={method!r}, but the checkpoint has no tensor named *{suffix}"
        )
    try:
        return readers[method](config, packed)
    except KeyError as error:
        raise CheckpointError(f"the quantization_config lacks the key {error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # of a rule, or another kind of value
        raise CheckpointError(f"the quantization_config cannot be read: {error}") from error


Shapes = Mapping[str, tuple[int, ...]]  # of the packed codes, by module path


def _read_marlin(config: Mapping[str, Any], packed: Shapes) -> Scheme:
    version = config["format_version"]
    if version != MARLIN_FORMAT_VERSION:
        raise CheckpointError(
            f"format_version={version} of the Marlin checkpoint is not {MARLIN_FORMAT_VERSION}; "
            "update marlin_kernel"
        )
    modules = {name: (int(k), int(n)) for name, (k, n) in config["modules"].items()}
    if modules.keys() != packed.keys():
        different = sorted(modules.keys() ^ packed.keys())
        raise CheckpointError(
            f"quantization_config lists {len(modules)} quantized modules, the tensors hold "
            f"{len(packed)}; they differ in {different[:3]}"
        )
    sparsity = config.get("sparsity")
    if sparsity not in (None, SPARSITY):
        raise CheckpointError(f"sparsity={sparsity!r} is not read; known: {SPARSITY}")
    return Scheme(
        SPARSE_FORMAT if sparsity else "marlin",
        _marlin_type(config),
        config["group_size"],
        config["desc_act"],
        modules=modules,
    )


def _marlin_type(config: Mapping[str, Any]) -> WeightType:
    """By name; files that have none hold integers."""
    if "weight_type" in config:
        return lookup(config["weight_type"])
    return integer_type(config["bits"], config["sym"])


def _read_awq(config: Mapping[str, Any], packed: Shapes) -> Scheme:
    version, zero_point = config.get("version", "gemm"), config.get("zero_point", True)
    if str(version).lower() != "gemm" or not zero_point or config["bits"] != 4:
        raise CheckpointError(
            f"AWQ files of bits={config['bits']}, version={version!r}, zero_point={zero_point} are "
            'not read; known: 4, "gemm", true'
        )
    return Scheme(
        AWQ_FORMAT,
        WEIGHT_TYPES["uint4"],
        config["group_size"],
        modules={name: (k, words * 8) for name, (k, words) in packed.items()},
    )


def _read_gptq(config: Mapping[str, Any], packed: Shapes) -> Scheme:
    if config.get("dynamic"):
        raise CheckpointError("GPTQ checkpoints with overrides per module (`dynamic`) are not read")
    checkpoint_format = config.get("checkpoint_format", config.get("format", "gptq"))
    if checkpoint_format not in _GPTQ_FORMATS:
        raise CheckpointError(
            f"checkpoint_format={checkpoint_format!r} is not read; known: "
            f"{', '.join(_GPTQ_FORMATS)}"
        )
    wtype = integer_type(config["bits"], config.get("sym", True))
    return Scheme(
        "gptq",
        wtype,
        config["group_size"],
        bool(config.get("desc_act", False)),
        _GPTQ_FORMATS[checkpoint_format],
        {name: (rows * wtype.pack_factor, n) for name, (rows, n) in packed.items()},
    )


def _read_compressed_tensors(config: Mapping[str, Any], packed: Shapes) -> Scheme:
    groups = list(config["config_groups"].values())
    weights = groups[0]["weights"]
    if config["format"] in _FLOAT4_FORMATS and len(groups) == 1:
        wtype = WEIGHT_TYPES[_FLOAT4_FORMATS[config["format"]]]
        if groups[0].get("input_activations") or weights["group_size"] not in wtype.group_sizes:
            raise CheckpointError(
                f"compressed-tensors files of format {config['format']} are read with weights only "
                f"and group_size={wtype.group_sizes[0]}"
            )
        return Scheme(
            "compressed-tensors",
            wtype,
            weights["group_size"],
            modules={name: (columns * 2, n) for name, (n, columns) in packed.items()},
        )
    readable = (
        len(groups) == 1
        and config["format"] == "pack-quantized"
        and weights["type"] == "int"
        and weights["strategy"] in ("group", "channel")
        and not groups[0].get("input_activations")
        and weights.get("actorder") in (None, "static", "weight")
    )
    if not readable:
        raise CheckpointError(
            "only compressed-tensors files with one group of format pack-quantized, integer "
            "weights by group or channel, plain activations and no group index are read, and of "
            f"{' and '.join(_FLOAT4_FORMATS)}"
        )
    wtype = integer_type(weights["num_bits"], weights["symmetric"])
    return Scheme(
        "compressed-tensors",
        wtype,
        weights["group_size"] if weights["strategy"] == "group" else -1,
        modules={name: (words * wtype.pack_factor, n) for name, (n, words) in packed.items()},
    )
