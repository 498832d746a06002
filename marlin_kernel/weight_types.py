"""The table of weight types: the single place that says what a code means.

Every type decodes as ``w = s * (value(q) - z)`` from unsigned codes ``q`` of ``bits`` bits:

integer types   value(q) = q; the zero point z is the constant ``bias`` (symmetric types), or stored
                per group and column as an integer or, in HQQ, as a floating-point number
float types     value(q) is the floating-point number with the bit pattern q; z = 0

Scales are float16, except for the two 4-bit float formats: NVFP4 has float8_e4m3fn scales times one
float32 per tensor, MXFP4 has powers of two, stored as exponent + 127 in a byte (e8m0).
Names follow vLLM's scalar types (``uint4b8``: unsigned 4 bits, bias 8).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

GROUP_SIZES = (-1, 32, 64, 128)  # of integer types: inputs that share a scale; -1 = all of a column
_FLOATS = ("float16", "bfloat16")


@dataclass(frozen=True)
class WeightType:
    """One row of the table.

    name: field's standard name; short: in names of files and kernels; bits: per code; bias: zero
    point of a symmetric integer type, else None; zeros: how zero points are stored ("none",
    "integer", "float"); exponent, mantissa: bits of a floating-point code, 0 for integers;
    group_sizes: what a scale may cover; scale: "float16", "float8_e4m3fn" or "e8m0"; global_scale:
    one float32 factor per tensor; activations: dtypes that it can be multiplied with.
    """

    name: str
    short: str
    bits: int
    bias: int | None = None
    zeros: str = "none"
    exponent: int = 0
    mantissa: int = 0
    group_sizes: tuple[int, ...] = GROUP_SIZES
    scale: str = "float16"
    global_scale: bool = False
    activations: tuple[str, ...] = _FLOATS

    @property
    def symmetric(self) -> bool:
        """No zero points are stored."""
        return self.zeros == "none"

    @property
    def is_float(self) -> bool:
        """Codes are bit patterns of floating-point numbers."""
        return self.exponent > 0

    @property
    def pack_factor(self) -> int:
        """Codes per 32-bit word."""
        return 32 // self.bits

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The code that padding uses: decodes to zero when it equals the zero point."""
        return 0 if self.is_float else 1 << (self.bits - 1)

    @property
    def largest(self) -> float:
        """Largest value of a floating-point code: 448 for e4m3 (the pattern above it is NaN), 6 for
        e2m1.
        """
        top = 1.75 if self.bits == 8 else 2 - 2.0**-self.mantissa
        return top * 2.0 ** (2**self.exponent - 2 ** (self.exponent - 1))


_TYPES = (
    WeightType("uint4b8", "u4b8", 4, 8, activations=(*_FLOATS, "int8", "float8_e4m3fn")),
    WeightType("uint4", "u4", 4, zeros="integer", activations=(*_FLOATS, "int8")),
    # int8 weights are uint8b128: code - 128
    WeightType("uint8b128", "u8b128", 8, 128, activations=(*_FLOATS, "int8")),
    WeightType("uint8", "u8", 8, zeros="integer"),
    WeightType("uint4_hqq", "u4hqq", 4, zeros="float", group_sizes=(64,)),
    WeightType(
        "float8_e4m3fn",
        "fe4m3fn",
        8,
        exponent=4,
        mantissa=3,
        group_sizes=(-1, 128),
        activations=(*_FLOATS, "float8_e4m3fn"),
    ),
    WeightType(
        "nvfp4",
        "nvfp4",
        4,
        exponent=2,
        mantissa=1,
        group_sizes=(16,),
        scale="float8_e4m3fn",
        global_scale=True,
    ),
    WeightType(
        "mxfp4",
        "mxfp4",
        4,
        exponent=2,
        mantissa=1,
        group_sizes=(32,),
        scale="e8m0",
        activations=("bfloat16",),
    ),
)
WEIGHT_TYPES = {t.name: t for t in _TYPES}
# Integer codes with float16 scales and constant or integer zero points: what the solver produces
# and what the integer checkpoint formats hold.
INTEGER_TYPES = {t.name: t for t in _TYPES if not t.is_float and t.zeros != "float"}


def weight_type(name: str) -> WeightType:
    """Look a type up by name. Raises ConfigError naming the known ones."""
    try:
        return WEIGHT_TYPES[name]
    except KeyError:
        raise ConfigError(
            f"weight_type={name!r} is not known; choose one of {', '.join(WEIGHT_TYPES)}"
        ) from None


def integer_type(bits: int, symmetric: bool) -> WeightType:
    """The integer type of `bits` bits. Raises ConfigError if there is none."""
    for t in INTEGER_TYPES.values():
        if t.bits == bits and t.symmetric == symmetric:
            return t
    known = sorted({t.bits for t in INTEGER_TYPES.values()})
    raise ConfigError(f"wbits={bits} has no packed integer type; choose from {known}")


def normalize_group_size(group_size: int, k: int) -> int:
    """Inputs per group: `group_size`, or K if it is -1 or larger than K (one group).

    Raises ConfigError unless group_size is -1, K itself, or one that some type allows.
    """
    if group_size in (-1, k):
        return k
    known = sorted({g for t in _TYPES for g in t.group_sizes})
    if group_size not in known:
        raise ConfigError(
            f"group_size={group_size} is not in {tuple(known)}; -1 means one group per column"
        )
    return min(group_size, k)
