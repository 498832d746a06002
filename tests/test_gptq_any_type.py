"""GPTQ on the grid of every weight type."""

from __future__ import annotations

import pytest
import torch

from gptq.any_type import solve
from marlin_kernel import WEIGHT_TYPES, ConfigError, QuantizedLinear
from marlin_kernel.formats import read, write


def problem(k: int, n: int):
    """Weights, and a Hessian of correlated inputs."""
    x = torch.randn(4 * k, k) @ (torch.eye(k) + 0.6 * torch.randn(k, k) / k**0.5)
    return torch.randn(k, n), x.T @ x


def weighted_error(layer: QuantizedLinear, weight: torch.Tensor, h: torch.Tensor) -> float:
    d = (layer.dequantize() - weight).double()
    return float((d * (h.double() @ d)).sum())


@pytest.mark.parametrize("wtype", WEIGHT_TYPES.values(), ids=lambda t: t.name)
def test_better_than_rounding(wtype) -> None:
    weight, h = problem(192, 24)
    for group_size in wtype.group_sizes:
        nearest = QuantizedLinear.quantize(weight, wtype, group_size)
        solved = solve(weight, h, wtype, group_size)
        assert solved.spec == nearest.spec
        assert weighted_error(solved, weight, h) < 0.9 * weighted_error(nearest, weight, h)
        again = read(write(solved, "marlin"), "marlin", solved.spec)
        assert torch.equal(again.dequantize(), solved.dequantize())


@pytest.mark.parametrize("wtype", WEIGHT_TYPES.values(), ids=lambda t: t.name)
def test_uncorrelated_inputs_round_to_nearest(wtype) -> None:
    weight, _ = problem(128, 16)
    group_size = wtype.group_sizes[-1]
    solved = solve(weight, torch.eye(128), wtype, group_size)
    nearest = QuantizedLinear.quantize(weight, wtype, group_size)
    assert torch.equal(solved.codes, nearest.codes)
    assert torch.equal(solved.dequantize(), nearest.dequantize())


def test_group_size_of_another_type_is_named() -> None:
    weight, h = problem(64, 8)
    with pytest.raises(ConfigError, match=r"group_size=32 is not in \(16,\) for nvfp4"):
        solve(weight, h, WEIGHT_TYPES["nvfp4"], 32)
