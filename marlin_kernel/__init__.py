"""Low-bit linear layers in the Marlin format: packing, reference and CUDA kernels.

Importing this package compiles nothing, touches no GPU and does not import transformers; import
`marlin_kernel.hf` for what works with transformers models.
"""

from .checkpoint import CheckpointWriter, convert, open_checkpoint, read_manifest, verify_tensors
from .errors import CheckpointError, ConfigError, DataError, MarlinError, NumericalError
from .formats import FORMATS, LayerSpec, QuantizedLinear
from .layer import Layer, replace_linear
from .ops import gemm, mul
from .packing import pack, unpack
from .schemes import Scheme
from .weight_types import (
    GROUP_SIZES,
    INTEGER_TYPES,
    WEIGHT_TYPES,
    WeightType,
    integer_type,
    weight_type,
)

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "GROUP_SIZES",
    "INTEGER_TYPES",
    "WEIGHT_TYPES",
    "CheckpointError",
    "CheckpointWriter",
    "ConfigError",
    "DataError",
    "Layer",
    "LayerSpec",
    "MarlinError",
    "NumericalError",
    "QuantizedLinear",
    "Scheme",
    "WeightType",
    "convert",
    "gemm",
    "integer_type",
    "mul",
    "open_checkpoint",
    "pack",
    "read_manifest",
    "replace_linear",
    "unpack",
    "verify_tensors",
    "weight_type",
]
