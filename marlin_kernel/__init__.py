"""Low-bit linear layers in the Marlin format: packing, reference and CUDA kernels.

Importing this package compiles nothing and touches no GPU.
"""

from .errors import CheckpointError, ConfigError, DataError, MarlinError, NumericalError
from .weight_types import GROUP_SIZES, WEIGHT_TYPES, WeightType, integer_type, weight_type

__version__ = "0.1.0"

__all__ = [
    "GROUP_SIZES",
    "WEIGHT_TYPES",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MarlinError",
    "NumericalError",
    "WeightType",
    "integer_type",
    "weight_type",
]
