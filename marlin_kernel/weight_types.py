"""The table of weight types: the single place that says what a code means.

Every type decodes as ``w = s * (q - z)`` with unsigned codes ``q`` of ``bits`` bits. Symmetric
types have the constant zero point ``bias``; the others carry integer zero points per group and
column. Names follow vLLM's scalar types (``uint4b8``: unsigned 4 bits, bias 8).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

GROUP_SIZES = (-1, 32, 64, 128)  # inputs that share a scale; -1 = all K of a column


@dataclass(frozen=True)
class WeightType:
    """One row of the table.

    name: field's standard name; bits: per code; bias: zero point of a symmetric type, None when the
    zero points are stored.
    """

    name: str
    bits: int
    bias: int | None

    @property
    def symmetric(self) -> bool:
        return self.bias is not None

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
        return 1 << (self.bits - 1)


_TYPES = (
    WeightType("uint4b8", 4, 8),
    WeightType("uint4", 4, None),
    WeightType("uint8b128", 8, 128),
    WeightType("uint8", 8, None),
)
WEIGHT_TYPES = {t.name: t for t in _TYPES}


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
    for t in _TYPES:
        if t.bits == bits and t.symmetric == symmetric:
            return t
    raise ConfigError(
        f"wbits={bits} has no packed integer type; choose from {sorted({t.bits for t in _TYPES})}"
    )


def normalize_group_size(group_size: int, k: int) -> int:
    """Inputs per group: `group_size`, or K if it is -1 or larger than K (one group).

    Raises ConfigError unless group_size is -1, K itself, or one of GROUP_SIZES.
    """
    if group_size in (-1, k):
        return k
    if group_size not in GROUP_SIZES:
        raise ConfigError(
            f"group_size={group_size} is not in {GROUP_SIZES}; -1 means one group per column"
        )
    return min(group_size, k)
