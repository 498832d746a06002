"""Host time of one eager call: torch.matmul, nn.Linear, the packed operator and `Layer`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from marlin_kernel import Layer, QuantizedLinear, gemm, weight_type


def host_us(
    calls: dict[str, Callable[[], object]], number: int = 200, bursts: int = 41
) -> dict[str, float]:
    """Median microseconds of host time of each call, over bursts that the GPU's queue can hold.

    The calls take turns burst by burst: a processor that changes its speed changes it for all.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(bursts):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                call()
            times[name].append((time.perf_counter() - start) * 1e6 / number)
    torch.cuda.synchronize()
    return {name: statistics.median(taken) for name, taken in times.items()}


@torch.inference_mode()
def call_overhead(k: int, n: int, m: int, dtype: torch.dtype, group_size: int) -> dict[str, float]:
    """Microseconds of host time for m tokens: "matmul", "linear", "op" and "layer"."""
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda")
    scales = torch.full((1 if group_size == -1 else k // group_size, n), 0.01, device="cuda")
    quantized = QuantizedLinear.of(codes, scales.half(), weight_type("uint4b8"), group_size)
    layer = Layer.from_quantized(quantized).prepare(dtype)
    linear = nn.Linear(k, n, bias=False, device="cuda", dtype=dtype)
    weight = linear.weight.t()
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    held = (layer.weights, layer.scales, layer.zeros, layer.perm, layer.bias)
    sizes = (k, n, layer.spec.group_size, "uint4b8", layer.layout, False)
    calls = {
        "matmul": lambda: torch.matmul(x, weight),
        "linear": lambda: linear(x),
        "op": lambda: gemm(x, *held, *sizes),
        "layer": lambda: layer(x),
    }
    for call in calls.values():
        call()
    return host_us(calls)
