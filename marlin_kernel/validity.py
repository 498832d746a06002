"""Which combinations of types and features exist: one function, which names the rule it applies.

The packer, the kernel generator, the tests and the benchmark all iterate over `combinations`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .weight_types import WEIGHT_TYPES, WeightType

ACTIVATIONS = ("float16", "bfloat16", "int8", "float8_e4m3fn")
OUTPUTS = ("float16", "bfloat16")
REDUCTIONS = ("float32", "float16")
# Compute capability -> target. 7.5: FP16 and INT8 mma, no asynchronous copies; 8.0: BF16,
# cp.async; 8.9: FP8 mma; 9.0: wgmma besides; 12.0: as 8.9.
ARCHITECTURES = {
    "7.5": "sm_75",
    "8.0": "sm_80",
    "8.6": "sm_86",
    "8.9": "sm_89",
    "9.0": "sm_90a",
    "12.0": "sm_120",
}


@dataclass(frozen=True)
class Combination:
    """One way to multiply.

    weight_type: row of the type table; activation: dtype of A as the kernel reads it; output: dtype
    of C; group_size: inputs per scale, -1 for one group; act_order: inputs are assigned to groups
    by an index; k_full: the layer holds all inputs of every group (False: a shard of K whose groups
    are cut anywhere); reduction: dtype of sums that several blocks exchange.
    """

    weight_type: WeightType
    activation: str = "float16"
    output: str = "float16"
    group_size: int = -1
    act_order: bool = False
    k_full: bool = True
    reduction: str = "float32"

    def __str__(self) -> str:
        order = "" if not self.act_order else "-act_order" + ("" if self.k_full else "_shard")
        reduction = "" if self.reduction == "float32" else "-reduce16"
        kernel = f"{self.activation}-{self.weight_type.short}-{self.output}"
        return f"{kernel}-g{self.group_size}{order}{reduction}"


def violated_rule(c: Combination, capability: str | None = None) -> str | None:
    """The rule that forbids a combination, with the way out; None if it is valid.

    capability: a key of ARCHITECTURES, to apply the limits of that GPU generation as well.
    """
    t = c.weight_type
    if c.activation not in ACTIVATIONS:
        return f"activation={c.activation!r} is not one of {', '.join(ACTIVATIONS)}"
    if c.activation not in t.activations:
        return (
            f"{t.name} is not multiplied with {c.activation} activations; use one of "
            f"{', '.join(t.activations)}"
        )
    if c.group_size not in t.group_sizes:
        return f"group_size={c.group_size} is not in {t.group_sizes} for {t.name}"
    eight_bit = c.activation in ("int8", "float8_e4m3fn")
    if c.output not in OUTPUTS:
        return f"output={c.output!r} is not one of {', '.join(OUTPUTS)}"
    if not eight_bit and c.output != c.activation:
        return (
            f"output={c.output} differs from the {c.activation} activations; only 8-bit "
            "activations leave a choice"
        )
    if c.reduction not in REDUCTIONS:
        return f"reduction={c.reduction!r} is not one of {', '.join(REDUCTIONS)}"
    if c.reduction == "float16" and c.output != "float16":
        return f"reduction=float16 needs output=float16, not {c.output}: its range is too small"
    if c.act_order and not t.symmetric:
        return f"act_order with zero points ({t.name}) is not supported; use a symmetric type"
    if c.act_order and t.is_float:
        return f"act_order with {t.name} is not supported; it is for integer types"
    if c.act_order and c.group_size == -1:
        return "act_order with one group (group_size=-1) has no effect; leave it out"
    if c.act_order and eight_bit:
        return f"act_order with {c.activation} activations is not supported; use float16"
    if not c.k_full and not c.act_order:
        return "k_full=False without act_order has no effect: a shard then holds whole groups"
    return None if capability is None else _device_rule(c, capability)


def _device_rule(c: Combination, capability: str) -> str | None:
    if capability not in ARCHITECTURES:
        return f"capability={capability!r} is not one of {', '.join(ARCHITECTURES)}"
    version = tuple(map(int, capability.split(".")))
    if version < (8, 0) and "bfloat16" in (c.activation, c.output):
        return f"bfloat16 needs capability 8.0 or newer, not {capability}; use float16"
    if version < (8, 9) and c.activation == "float8_e4m3fn":
        return f"FP8 activations need capability 8.9 or newer, not {capability}; use int8"
    return None


def is_supported(c: Combination, capability: str | None = None) -> bool:
    """Whether no rule forbids the combination."""
    return violated_rule(c, capability) is None


def check(c: Combination, capability: str | None = None) -> None:
    """Raise ConfigError naming the violated rule, if there is one."""
    rule = violated_rule(c, capability)
    if rule is not None:
        raise ConfigError(rule)


def combinations(
    capability: str | None = None,
    *,
    types: Sequence[str] = tuple(WEIGHT_TYPES),
    activations: Sequence[str] = ACTIVATIONS,
    reductions: Sequence[str] = REDUCTIONS,
) -> Iterator[Combination]:
    """Every valid combination, in a fixed order.

    capability: only those of a GPU generation (a key of ARCHITECTURES); types, activations,
    reductions: only these.
    """
    for name, activation, output, act_order, k_full, reduction in itertools.product(
        types, activations, OUTPUTS, (False, True), (True, False), reductions
    ):
        t = WEIGHT_TYPES[name]
        for group_size in t.group_sizes:
            c = Combination(t, activation, output, group_size, act_order, k_full, reduction)
            if is_supported(c, capability):
                yield c
