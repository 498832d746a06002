"""The type table and the one function that says which combinations exist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from marlin_kernel import WEIGHT_TYPES, ConfigError
from marlin_kernel.validity import (
    ACTIVATIONS,
    ARCHITECTURES,
    Combination,
    check,
    combinations,
    is_supported,
    violated_rule,
)

VALID = Combination(WEIGHT_TYPES["uint4b8"], group_size=128)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"activation": "float64"}, "activation='float64' is not one of"),
        ({"weight_type": WEIGHT_TYPES["mxfp4"], "group_size": 32}, "mxfp4.*bfloat16"),
        ({"weight_type": WEIGHT_TYPES["nvfp4"]}, r"group_size=128 is not in \(16,\) for nvfp4"),
        ({"group_size": 96}, "group_size=96 is not in"),
        ({"output": "float64"}, "output='float64'"),
        ({"output": "bfloat16"}, "output=bfloat16 differs"),
        ({"reduction": "int8"}, "reduction='int8'"),
        (
            {"activation": "bfloat16", "output": "bfloat16", "reduction": "float16"},
            "reduction=float16 needs output=float16",
        ),
        ({"weight_type": WEIGHT_TYPES["uint4"], "act_order": True}, "zero points"),
        ({"weight_type": WEIGHT_TYPES["float8_e4m3fn"], "act_order": True}, "integer types"),
        ({"act_order": True, "group_size": -1}, "no effect"),
        ({"act_order": True, "activation": "int8"}, "act_order with int8"),
        ({"k_full": False}, "k_full=False without act_order"),
    ],
)
def test_every_rule_is_named(changes: dict, rule: str) -> None:
    broken = replace(VALID, **changes)
    with pytest.raises(ConfigError, match=rule):
        check(broken)
    assert not is_supported(broken)


@pytest.mark.parametrize(
    ("changes", "capability", "rule"),
    [
        ({"activation": "bfloat16", "output": "bfloat16"}, "7.5", "bfloat16 needs"),
        ({"activation": "int8", "output": "bfloat16"}, "7.5", "bfloat16 needs"),
        ({"activation": "float8_e4m3fn"}, "8.6", "FP8 activations need"),
        ({}, "7.0", "capability='7.0'"),
    ],
)
def test_rules_of_gpu_generations(changes: dict, capability: str, rule: str) -> None:
    c = replace(VALID, **changes)
    check(c)
    with pytest.raises(ConfigError, match=rule):
        check(c, capability)


def test_combinations_are_valid_distinct_and_complete() -> None:
    everything = list(combinations())
    assert all(violated_rule(c) is None for c in everything)
    assert len(set(everything)) == len(everything) == len({str(c) for c in everything})
    assert {c.weight_type.name for c in everything} == set(WEIGHT_TYPES)
    assert {c.activation for c in everything} == set(ACTIVATIONS)
    assert any(c.act_order and not c.k_full for c in everything)
    for capability in ARCHITECTURES:
        there = list(combinations(capability))
        assert set(there) <= set(everything)
        assert all(is_supported(c, capability) for c in there)
    assert set(combinations("9.0")) == set(everything)
    only = list(combinations(types=("uint4",), activations=("int8",), reductions=("float32",)))
    assert {(c.weight_type.name, c.activation) for c in only} == {("uint4", "int8")}


def test_type_table() -> None:
    for t in WEIGHT_TYPES.values():
        assert t.symmetric == (t.bias is not None or t.is_float)
        assert t.bits == (1 + t.exponent + t.mantissa if t.is_float else t.bits)
    largest = {t.name: t.largest for t in WEIGHT_TYPES.values() if t.is_float}
    assert largest == {"float8_e4m3fn": 448, "nvfp4": 6, "mxfp4": 6}
